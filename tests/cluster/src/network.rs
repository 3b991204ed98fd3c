//! Networks of their own: namespaces joined by a bridge, the client in a namespace too, so that nothing of it touches
//! the host's network.

use crate::skip;
use std::{
    fmt, io,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// On a bridge of one machine a connection takes no time.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// Where a process or a client stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On the host; only its loopback is used.
    Host,
    /// In the namespace of that name.
    Namespace(String),
}

impl Place {
    /// A command that runs `program` there, with the same process id.
    pub fn command(&self, program: &std::path::Path) -> Command {
        match self {
            Self::Host => Command::new(program),
            Self::Namespace(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(program);
                command
            }
        }
    }

    /// Connects from there.
    pub(crate) fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        #[cfg(target_os = "linux")]
        if let Self::Namespace(name) = self {
            let namespace = std::fs::File::open(format!("/run/netns/{name}"))?;
            // A socket stays in the namespace where it was made; the thread that went there ends.
            let connecting = std::thread::spawn(move || {
                rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), None)?;
                TcpStream::connect_timeout(&address, CONNECT_TIME_MAX)
            });
            return connecting.join().expect("connecting does not panic");
        }
        TcpStream::connect_timeout(&address, CONNECT_TIME_MAX)
    }
}

/// Connects to a port of `place` that somebody is about to open, before whoever it is meant for can; none where it was not
/// to be had within five seconds.
pub fn stray_connection(place: &Place, address: SocketAddr) -> Option<TcpStream> {
    let deadline = std::time::Instant::now() + CONNECT_TIME_MAX;
    while std::time::Instant::now() < deadline {
        if let Ok(stream) = place.connect(address) {
            return Some(stream);
        }
    }
    None
}

/// Namespaces on one bridge: one for the client, and as many as asked for.
pub struct Network {
    hub: String,
    places: Vec<String>,
}

impl Network {
    /// Makes a network; none, with a message, where that is not allowed.
    pub fn new(places: u8) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("mlxt{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut network = Self { hub: format!("{prefix}-hub"), places: Vec::new() };
        match network.build(&prefix, places) {
            Ok(()) => Some(network),
            Err(error) => {
                skip(&format!("network namespaces cannot be made here: {error}"));
                None
            }
        }
    }

    fn build(&mut self, prefix: &str, places: u8) -> Result<(), String> {
        let hub = self.hub.clone();
        ip(&["netns", "add", &hub])?;
        ip(&["-n", &hub, "link", "add", "bridge", "type", "bridge", "mcast_snooping", "0"])?;
        ip(&["-n", &hub, "address", "add", &format!("{}/24", address(1)), "dev", "bridge"])?;
        ip(&["-n", &hub, "link", "set", "bridge", "up"])?;
        for index in 0..places {
            let name = format!("{prefix}-{index}");
            ip(&["netns", "add", &name])?;
            self.places.push(name.clone());
            let port = format!("port{index}");
            ip(&["-n", &hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
            ip(&["-n", &hub, "link", "set", &port, "master", "bridge", "up"])?;
            ip(&["-n", &name, "address", "add", &format!("{}/24", address(index + 2)), "dev", "eth0"])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
            ip(&["-n", &name, "link", "set", "eth0", "up"])?;
            // Where multicast goes.
            ip(&["-n", &name, "route", "add", "default", "via", &address(1).to_string()])?;
        }
        Ok(())
    }

    /// Where the client stands.
    pub fn client(&self) -> Place {
        Place::Namespace(self.hub.clone())
    }

    /// Pulls the cable of the namespace of that number, or plugs it in again.
    ///
    /// # Panics
    /// Where the system does not do it.
    pub fn plug(&self, index: u8, is_in: bool) {
        let state = if is_in { "up" } else { "down" };
        ip(&["-n", &self.hub, "link", "set", &format!("port{index}"), state]).expect("the port is there");
    }

    /// The namespace of that number, and its address.
    pub fn place(&self, index: u8) -> (Place, Ipv4Addr) {
        (Place::Namespace(self.places[usize::from(index)].clone()), address(index + 2))
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("hub", &self.hub).finish_non_exhaustive()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in self.places.iter().chain([&self.hub]) {
            // What was never made cannot be removed.
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

/// The same in every network: they do not see each other.
fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, last)
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let failed = |what: String| format!("ip {}: {what}", arguments.join(" "));
    let output = Command::new("ip").args(arguments).output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}
