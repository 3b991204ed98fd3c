//! A relay that delivers bytes later: as on a longer way, however many are on it.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    sync::mpsc::{Receiver, sync_channel},
    thread,
    time::{Duration, Instant},
};

/// Bytes read at once.
const CHUNK_BYTES: usize = 256 << 10;
/// Chunks on their way: far more than ranks have in flight.
const CHUNKS_MAX: usize = 4096;
/// How long who is relayed to may take to listen.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(20);
/// Between two attempts.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);

pub(crate) struct Relay;

impl Relay {
    /// Relays whoever connects to what is returned to `to`, for the life of this process.
    pub(crate) fn start(to: SocketAddrV4, delay: Duration) -> io::Result<SocketAddrV4> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let SocketAddr::V4(address) = listener.local_addr()? else {
            return Err(io::Error::other("no IPv4 address"));
        };
        thread::spawn(move || {
            while let Ok((from, _)) = listener.accept() {
                // Whoever is not relayed hears of it by the connection's end.
                thread::spawn(move || relay(&from, to, delay));
            }
        });
        Ok(address)
    }
}

fn relay(from: &TcpStream, to: SocketAddrV4, delay: Duration) -> io::Result<()> {
    let begin = Instant::now();
    let to = loop {
        match TcpStream::connect(to) {
            Ok(stream) => break stream,
            Err(error) if begin.elapsed() > CONNECT_TIME_MAX => return Err(error),
            Err(_) => thread::sleep(CONNECT_INTERVAL),
        }
    };
    for stream in [from, &to] {
        stream.set_nodelay(true)?;
    }
    one_way(from.try_clone()?, to.try_clone()?, delay);
    one_way(to, from.try_clone()?, delay);
    Ok(())
}

/// Two threads: one notes when bytes came, one hands them on when it is time.
fn one_way(mut from: TcpStream, to: TcpStream, delay: Duration) {
    let (sender, receiver) = sync_channel::<(Instant, Vec<u8>)>(CHUNKS_MAX);
    thread::spawn(move || {
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Ok(count) = from.read(&mut chunk) {
            if count == 0 || sender.send((Instant::now() + delay, chunk[..count].to_vec())).is_err() {
                break;
            }
        }
    });
    thread::spawn(move || deliver(&receiver, to));
}

fn deliver(receiver: &Receiver<(Instant, Vec<u8>)>, mut to: TcpStream) {
    for (due, bytes) in receiver {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&bytes).is_err() {
            return;
        }
    }
    // Its own end too: whoever listens there hears that nothing more comes.
    let _ = to.shutdown(std::net::Shutdown::Write);
}
