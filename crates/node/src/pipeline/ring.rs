//! A rank's seat in the ring, and the ways by which it reaches the next one: its own TCP stops at this machine's loopback,
//! and goes on through a tunnel between the nodes, which is encrypted and ends with either of them.
//!
//! Where the configuration says so, ranks reach each other straight, and their nodes see to it only that a rank ends with the
//! next member's connection and with its own part.

use crate::engine_start::EngineCommandLine;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use transport::{Peer, Tunnel, TunnelOpening};
use types::TunnelOrder;

/// From a rank's start to its socket: as long as [`super::Group`] waits for all to find each other.
pub(super) const JOIN_TIME_MAX: Duration = Duration::from_secs(12);
/// How often a rank's socket is tried that is not there yet.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);
/// Bytes carried at once: a pass's hidden states are up to megabytes.
const CARRY_BYTES: usize = 64 << 10;
/// Stands for ranks that are no neighbours, which nobody connects to.
const NOBODY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9);

/// Where a rank is to listen, and where it finds the others: what its process is told.
#[derive(Debug)]
pub(super) struct Seat {
    rank: usize,
    /// Which members there are, as MLX reads it.
    file: HostFile,
    /// Of JACCL: where the first rank listens for the others.
    coordinator: Option<SocketAddrV4>,
    /// The tunnels' ends, where there are to be tunnels.
    pub(super) tunnels: Option<TunnelEnds>,
}

/// Where a rank meets the tunnels between the nodes.
#[derive(Debug)]
pub(super) struct TunnelEnds {
    /// Where the rank listens.
    pub(super) inlet: SocketAddrV4,
    /// Where it connects to.
    outlet: TcpListener,
}

impl Seat {
    /// One whose rank listens at `own` and finds the next one at `next`, with nothing between them.
    pub(super) fn direct(
        rank: usize,
        size: usize,
        own: SocketAddrV4,
        next: SocketAddrV4,
    ) -> io::Result<Self> {
        let file = HostFile::of_ring(rank, size, own, next)?;
        Ok(Self { rank, file, coordinator: None, tunnels: None })
    }

    /// One over JACCL: `devices[i][j]` are those of rank `i` that lead to rank `j`.
    pub(super) fn jaccl(
        rank: usize,
        coordinator: SocketAddrV4,
        devices: &[Vec<Vec<&str>>],
    ) -> io::Result<Self> {
        let file = HostFile::write(&device_matrix(devices))?;
        Ok(Self { rank, file, coordinator: Some(coordinator), tunnels: None })
    }

    /// One that is reached through tunnels: takes ports of the loopback.
    pub(super) async fn take(rank: usize, size: usize) -> io::Result<Self> {
        let outlet = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        // MLX binds it itself: it is free again until then. Whoever takes it meanwhile costs a start.
        let inlet = v4(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?)?;
        let file = HostFile::of_ring(rank, size, inlet, v4(outlet.local_addr()?)?)?;
        Ok(Self { rank, file, coordinator: None, tunnels: Some(TunnelEnds { inlet, outlet }) })
    }

    /// Gives the rank's process its place.
    pub(super) fn apply(&self, command: &mut EngineCommandLine) {
        command.env.push(("MLX_RANK".into(), self.rank.to_string().into()));
        let file = self.file.0.clone().into();
        match self.coordinator {
            None => command.env.push(("MLX_HOSTFILE".into(), file)),
            Some(coordinator) => {
                command.env.push(("MLX_IBV_DEVICES".into(), file));
                command.env.push(("MLX_JACCL_COORDINATOR".into(), coordinator.to_string().into()));
            }
        }
    }
}

/// As MLX reads it: nothing, one device or several, by rank of whose they are and where they lead.
fn device_matrix(devices: &[Vec<Vec<&str>>]) -> String {
    let list = |of: Vec<String>| format!("[{}]", of.join(","));
    // Names of letters, digits and underscores, as the configuration has them: nothing in them is to be escaped.
    let entry = |devices: &Vec<&str>| match devices.as_slice() {
        [] => "null".to_owned(),
        [device] => format!("\"{device}\""),
        several => list(several.iter().map(|device| format!("\"{device}\"")).collect()),
    };
    list(devices.iter().map(|row| list(row.iter().map(entry).collect())).collect())
}

/// A file that goes with its rank.
#[derive(Debug)]
struct HostFile(PathBuf);

impl HostFile {
    /// The file of a ring's rank: its own address and the next one's; it connects to nobody else.
    fn of_ring(rank: usize, size: usize, own: SocketAddrV4, next: SocketAddrV4) -> io::Result<Self> {
        let mut addresses = vec![NOBODY; size];
        addresses[(rank + 1) % size] = next;
        addresses[rank] = own;
        let rows: Vec<String> = addresses.iter().map(|address| format!("[\"{address}\"]")).collect();
        Self::write(&format!("[{}]", rows.join(",")))
    }

    fn write(text: &str) -> io::Result<Self> {
        /// Names that files of a process before, with this one's id, may have been left under.
        const TRIES_MAX: usize = 100;
        static NEXT: AtomicU64 = AtomicU64::new(0);
        for _ in 0..TRIES_MAX {
            let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(format!("mlx-node-ring-{process}-{number}.json"));
            // Never one that somebody else has put there.
            match File::create_new(&path) {
                Ok(mut file) => {
                    let written = Self(path);
                    file.write_all(text.as_bytes())?;
                    return Ok(written);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other(format!("{} is full of mlx-node-ring files", std::env::temp_dir().display())))
    }
}

impl Drop for HostFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!(file = %self.0.display(), %error, "a file is left");
        }
    }
}

fn v4(address: SocketAddr) -> io::Result<SocketAddrV4> {
    match address {
        SocketAddr::V4(address) => Ok(address),
        SocketAddr::V6(address) => Err(io::Error::other(format!("{address} is no IPv4 address"))),
    }
}

/// A port that is free now, for a rank to listen at.
pub(super) async fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await?.local_addr()?.port())
}

/// The way from a seat to the next rank, for as long as there is one; says how that ended.
pub(super) async fn way(seat: &Seat, peer: &Peer, order: TunnelOrder) -> String {
    match &seat.tunnels {
        Some(ends) => outlet(&ends.outlet, peer, order).await,
        // What runs there is not seen; a member that is lost is.
        None => format!("the next member is lost: {}", peer.closed().await),
    }
}

/// Carries a rank's bytes to the next rank and back; says how that ended.
async fn outlet(listener: &TcpListener, peer: &Peer, order: TunnelOrder) -> String {
    let connected = async {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        Ok::<_, io::Error>(stream)
    };
    let stream = match timeout(JOIN_TIME_MAX, connected).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return format!("the process's socket: {error}"),
        Err(_) => return "the process did not look for the next one".to_owned(),
    };
    match peer.tunnel(order, JOIN_TIME_MAX).await {
        Ok(tunnel) => carry(stream, tunnel).await,
        Err(error) => format!("no way to the next process: {error}"),
    }
}

/// Carries the bytes of the rank before to a rank that listens at `inlet`, and back; says how that ended.
pub(super) async fn inlet(opening: TunnelOpening, inlet: SocketAddrV4) -> String {
    let connected = async {
        loop {
            match TcpStream::connect(inlet).await {
                Ok(stream) => return stream,
                // It does not listen yet.
                Err(_) => sleep(CONNECT_INTERVAL).await,
            }
        }
    };
    let given_up = opening.cancelled();
    let stream = tokio::select! {
        stream = timeout(JOIN_TIME_MAX, connected) => match stream {
            Ok(stream) => stream,
            Err(_) => return "the process did not listen".to_owned(),
        },
        () = given_up => return "the node before has given up".to_owned(),
    };
    if let Err(error) = stream.set_nodelay(true) {
        return format!("the process's socket: {error}");
    }
    match opening.accept().await {
        Ok(tunnel) => carry(stream, tunnel).await,
        Err(error) => format!("the node before: {error}"),
    }
}

async fn carry(mut stream: TcpStream, mut tunnel: Tunnel) -> String {
    match copy_bidirectional_with_sizes(&mut stream, &mut tunnel, CARRY_BYTES, CARRY_BYTES).await {
        Ok(_) => "a way between two processes has ended".to_owned(),
        Err(error) => format!("a way between two processes broke: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_seat_names_itself_and_the_next_one() {
        for (rank, size) in [(0, 2), (1, 2), (0, 3), (2, 3), (7, 8)] {
            let seat = Seat::take(rank, size).await.expect("ports");
            let file = fs::read_to_string(&seat.file.0).expect("written");
            let ends = seat.tunnels.as_ref().expect("there are to be tunnels");
            let rows: Vec<&str> = file.trim_matches(['[', ']']).split("],[").collect();
            assert_eq!(rows.len(), size, "{file}");
            assert_eq!(rows[rank], format!("\"{}\"", ends.inlet));
            assert_eq!(rows[(rank + 1) % size], format!("\"{}\"", ends.outlet.local_addr().expect("bound")));
            let path = seat.file.0.clone();
            drop(seat);
            assert!(!path.exists(), "{} is left", path.display());
        }
    }

    /// What a process is told of its place.
    fn told(seat: &Seat) -> Vec<(String, String)> {
        let mut command = EngineCommandLine { program: "/nowhere".into(), args: Vec::new(), env: Vec::new() };
        seat.apply(&mut command);
        let text = |text: std::ffi::OsString| text.into_string().expect("text");
        command.env.into_iter().map(|(name, value)| (text(name), text(value))).collect()
    }

    #[test]
    fn a_direct_seat_names_the_next_ones_own_address() {
        let at = |last: u8, port: u16| SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, last), port);
        let seat = Seat::direct(2, 3, at(3, 7003), at(1, 7001)).expect("a file");
        let file = fs::read_to_string(&seat.file.0).expect("written");
        assert_eq!(file, "[[\"10.0.0.1:7001\"],[\"127.0.0.1:9\"],[\"10.0.0.3:7003\"]]");
        let path = seat.file.0.to_str().expect("text").to_owned();
        let expected = [("MLX_RANK".to_owned(), "2".to_owned()), ("MLX_HOSTFILE".to_owned(), path)];
        assert_eq!(told(&seat), expected);
    }

    #[test]
    fn a_seat_over_jaccl_has_the_devices_of_all() {
        let coordinator = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), 7001);
        let devices = [vec![vec![], vec!["rdma_en5"]], vec![vec!["rdma_en3", "rdma_en4"], vec![]]];
        let seat = Seat::jaccl(1, coordinator, &devices).expect("a file");
        let file = fs::read_to_string(&seat.file.0).expect("written");
        assert_eq!(file, "[[null,\"rdma_en5\"],[[\"rdma_en3\",\"rdma_en4\"],null]]");
        let path = seat.file.0.to_str().expect("text").to_owned();
        let expected =
            [("MLX_RANK", "1"), ("MLX_IBV_DEVICES", &path), ("MLX_JACCL_COORDINATOR", "10.0.0.1:7001")];
        assert_eq!(told(&seat), expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
}
