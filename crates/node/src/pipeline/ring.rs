//! A rank's seat in the ring, and the ways by which it reaches the next one: its own TCP stops at this machine's loopback,
//! and goes on through a tunnel between the nodes, which is encrypted and ends with either of them.

use crate::engine_start::EngineCommandLine;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use transport::{Peer, Tunnel, TunnelOpening};
use types::TunnelOrder;

/// From a rank's start to its socket: as long as [`super::Group`] waits for all to find each other.
pub(super) const JOIN_TIME_MAX: Duration = Duration::from_secs(12);
/// How often a rank's socket is tried that is not there yet.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);
/// Stands for ranks that are no neighbours, which nobody connects to.
const NOBODY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9);

/// Where a rank is to listen, and where it finds the next one.
#[derive(Debug)]
pub(super) struct Seat {
    rank: usize,
    /// Where the rank listens.
    pub(super) inlet: SocketAddrV4,
    /// Where it connects to.
    pub(super) outlet: TcpListener,
    hostfile: HostFile,
}

impl Seat {
    /// Takes ports and writes the file that MLX reads.
    pub(super) async fn take(rank: usize, size: usize) -> io::Result<Self> {
        let outlet = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        // MLX binds it itself: it is free again until then. Whoever takes it meanwhile costs a start.
        let inlet = v4(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?)?;
        let mut addresses = vec![NOBODY; size];
        addresses[(rank + 1) % size] = v4(outlet.local_addr()?)?;
        addresses[rank] = inlet;
        let rows: Vec<String> = addresses.iter().map(|address| format!("[\"{address}\"]")).collect();
        let hostfile = HostFile::write(&format!("[{}]", rows.join(",")))?;
        Ok(Self { rank, inlet, outlet, hostfile })
    }

    /// Gives the rank's process its place.
    pub(super) fn apply(&self, command: &mut EngineCommandLine) {
        command.env.push(("MLX_RANK".into(), self.rank.to_string().into()));
        command.env.push(("MLX_HOSTFILE".into(), self.hostfile.0.clone().into()));
    }
}

/// A file that goes with its rank.
#[derive(Debug)]
struct HostFile(PathBuf);

impl HostFile {
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

/// Carries a rank's bytes to the next rank and back; says how that ended.
pub(super) async fn outlet(listener: &TcpListener, peer: &Peer, order: TunnelOrder) -> String {
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
    match copy_bidirectional(&mut stream, &mut tunnel).await {
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
            let file = fs::read_to_string(&seat.hostfile.0).expect("written");
            let rows: Vec<&str> = file.trim_matches(['[', ']']).split("],[").collect();
            assert_eq!(rows.len(), size, "{file}");
            assert_eq!(rows[rank], format!("\"{}\"", seat.inlet));
            assert_eq!(rows[(rank + 1) % size], format!("\"{}\"", seat.outlet.local_addr().expect("bound")));
            let path = seat.hostfile.0.clone();
            drop(seat);
            assert!(!path.exists(), "{} is left", path.display());
        }
    }
}
