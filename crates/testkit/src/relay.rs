//! [`UdpRelay`]: a longer way between two UDP sockets, where the kernel has none to offer.
//!
//! Datagrams arrive in the order in which they came, all by the same time later, however many are on their way: a delay, no
//! limit of the rate. Each sender has a socket of its own towards the other end, which answers there. Of each way one thread
//! notes when a datagram came, another hands it on when it is due.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

/// Datagrams of one sender on their way in one direction; what comes beyond that is lost, as in a switch that is full.
const DATAGRAMS_MAX: usize = 8192;
/// Senders; datagrams of further ones are lost.
const SENDERS_MAX: usize = 64;
/// The largest datagram there is.
const DATAGRAM_BYTES_MAX: usize = 65_535;
/// How often a thread that waits for datagrams looks whether there is an end of it.
const STOP_INTERVAL: Duration = Duration::from_millis(50);

/// What went through a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Relayed {
    /// Bytes handed on to where it leads.
    pub forth_bytes: u64,
    /// Bytes handed on from there.
    pub back_bytes: u64,
    /// Datagrams that it had no room for.
    pub lost: u64,
}

#[derive(Debug, Default)]
struct Counts {
    forth: AtomicU64,
    back: AtomicU64,
    lost: AtomicU64,
    stop: AtomicBool,
}

/// A running relay; it ends when it is dropped.
#[derive(Debug)]
pub struct UdpRelay {
    address: SocketAddr,
    counts: Arc<Counts>,
}

impl UdpRelay {
    /// Relays whatever comes to [`Self::address`], a free port of `to`'s loopback, to `to`, and what comes from there back
    /// to whoever it is for, each `delay` later.
    ///
    /// # Errors
    /// Where the system gives no socket.
    pub fn start(to: SocketAddr, delay: Duration) -> io::Result<Self> {
        let loopback = match to {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::LOCALHOST, 0)),
        };
        let front = UdpSocket::bind(loopback)?;
        front.set_read_timeout(Some(STOP_INTERVAL))?;
        let address = front.local_addr()?;
        let counts = Arc::<Counts>::default();
        let shared = counts.clone();
        thread::spawn(move || receive_all(&front, to, delay, &shared));
        Ok(Self { address, counts })
    }

    /// Where datagrams are to be sent.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What went through so far.
    pub fn relayed(&self) -> Relayed {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Relayed {
            forth_bytes: of(&self.counts.forth),
            back_bytes: of(&self.counts.back),
            lost: of(&self.counts.lost),
        }
    }
}

impl Drop for UdpRelay {
    fn drop(&mut self) {
        self.counts.stop.store(true, Ordering::Relaxed);
    }
}

/// A datagram and when it is to be handed on.
type Due = (Instant, Vec<u8>);

/// The front's life. All others end with it: their channels' senders are its own, and they see the same flag.
fn receive_all(front: &UdpSocket, to: SocketAddr, delay: Duration, counts: &Arc<Counts>) {
    let mut senders: HashMap<SocketAddr, SyncSender<Due>> = HashMap::new();
    let mut datagram = vec![0; DATAGRAM_BYTES_MAX];
    while !counts.stop.load(Ordering::Relaxed) {
        // Beside nothing having come, an error tells that an earlier datagram could not be delivered: as on any network.
        let Ok((bytes, from)) = front.recv_from(&mut datagram) else { continue };
        let due = (Instant::now() + delay, datagram[..bytes].to_vec());
        if !senders.contains_key(&from)
            && senders.len() < SENDERS_MAX
            && let Ok(line) = open(front, from, to, delay, counts)
        {
            senders.insert(from, line);
        }
        hand_over(senders.get(&from), due, counts);
    }
}

/// The way of one sender, both directions.
fn open(
    front: &UdpSocket,
    from: SocketAddr,
    to: SocketAddr,
    delay: Duration,
    counts: &Arc<Counts>,
) -> io::Result<SyncSender<Due>> {
    let any = match to {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(STOP_INTERVAL))?;
    let (there, back) = (socket.try_clone()?, front.try_clone()?);
    let (forth, line) = sync_channel(DATAGRAMS_MAX);
    let shared = counts.clone();
    thread::spawn(move || deliver(&line, &shared.forth, |datagram| there.send(datagram)));
    let (answers, line) = sync_channel(DATAGRAMS_MAX);
    let shared = counts.clone();
    thread::spawn(move || deliver(&line, &shared.back, |datagram| back.send_to(datagram, from)));
    let shared = counts.clone();
    thread::spawn(move || {
        let mut datagram = vec![0; DATAGRAM_BYTES_MAX];
        while !shared.stop.load(Ordering::Relaxed) {
            let Ok(bytes) = socket.recv(&mut datagram) else { continue };
            hand_over(Some(&answers), (Instant::now() + delay, datagram[..bytes].to_vec()), &shared);
        }
    });
    Ok(forth)
}

fn hand_over(line: Option<&SyncSender<Due>>, due: Due, counts: &Counts) {
    let taken = match line {
        Some(line) => !matches!(line.try_send(due), Err(TrySendError::Full(_))),
        None => false,
    };
    if !taken {
        counts.lost.fetch_add(1, Ordering::Relaxed);
    }
}

fn deliver(line: &Receiver<Due>, count: &AtomicU64, send: impl Fn(&[u8]) -> io::Result<usize>) {
    for (due, datagram) in line {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        // One that cannot be sent is lost, as on any network.
        if let Ok(bytes) = send(&datagram) {
            count.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_millis(40);
    const PATIENCE: Duration = Duration::from_secs(10);

    /// Someone who sends back whatever comes.
    fn echo(at: SocketAddr) -> io::Result<SocketAddr> {
        let socket = UdpSocket::bind(at)?;
        let address = socket.local_addr()?;
        thread::spawn(move || {
            let mut datagram = [0; 1500];
            while let Ok((bytes, from)) = socket.recv_from(&mut datagram) {
                socket.send_to(&datagram[..bytes], from).expect("the sender is there");
            }
        });
        Ok(address)
    }

    fn client(relay: &UdpRelay) -> UdpSocket {
        let any: SocketAddr =
            if relay.address().is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" }.parse().unwrap();
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect(relay.address()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    #[test]
    fn datagrams_come_late_whole_and_in_order_and_answers_too() {
        for at in ["127.0.0.1:0", "[::1]:0"] {
            // A machine without IPv6 has no ::1.
            let Ok(address) = echo(at.parse().unwrap()) else { continue };
            let relay = UdpRelay::start(address, DELAY).unwrap();
            let clients = [client(&relay), client(&relay)];
            let since = Instant::now();
            for number in 0..20_u8 {
                for (at, client) in clients.iter().enumerate() {
                    client.send(&[at as u8, number, 7]).unwrap();
                }
            }
            for (at, client) in clients.iter().enumerate() {
                for number in 0..20_u8 {
                    let mut datagram = [0; 1500];
                    let bytes = client.recv(&mut datagram).unwrap();
                    assert_eq!(datagram[..bytes], [at as u8, number, 7], "{address}");
                }
            }
            assert!(since.elapsed() >= 2 * DELAY, "{:?}", since.elapsed());
            // Counted after it was sent.
            let done = Relayed { forth_bytes: 120, back_bytes: 120, lost: 0 };
            let deadline = Instant::now() + PATIENCE;
            while relay.relayed() != done {
                assert!(Instant::now() < deadline, "{:?}", relay.relayed());
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// As many as there is room for are on their way at once: later than one by one they would be by far.
    #[test]
    fn a_delay_is_no_limit_of_the_rate() {
        let relay = UdpRelay::start(echo("127.0.0.1:0".parse().unwrap()).unwrap(), DELAY).unwrap();
        let client = client(&relay);
        let since = Instant::now();
        for _ in 0..100 {
            client.send(&[1; 100]).unwrap();
        }
        for _ in 0..100 {
            client.recv(&mut [0; 1500]).unwrap();
        }
        assert!(since.elapsed() < 50 * DELAY, "{:?}", since.elapsed());
    }
}
