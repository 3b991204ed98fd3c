//! quinn over turmoil's UDP: the one file that knows both. (The trait changes in quinn 0.12.)

use crate::PORT;
use quinn::{AsyncUdpSocket, UdpPoller, udp};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use std::{
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};
use turmoil::net::UdpSocket;

/// What all sockets share. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Network(Arc<NetworkState>);

#[derive(Debug, Default)]
struct NetworkState {
    /// Packets that get lost, of a thousand.
    loss: AtomicU32,
    /// A hash of all bytes that were sent, in their order.
    sent: AtomicU64,
}

impl Network {
    pub(crate) fn lose(&self, permille: u32) {
        self.0.loss.store(permille, Ordering::Relaxed);
    }

    pub(crate) fn sent(&self) -> u64 {
        self.0.sent.load(Ordering::Relaxed)
    }

    fn record(&self, packet: &[u8]) {
        // Its keys are always the same.
        let mut hasher = DefaultHasher::new();
        (self.sent(), packet).hash(&mut hasher);
        self.0.sent.store(hasher.finish(), Ordering::Relaxed);
    }
}

type Readable = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A machine's UDP socket.
pub(crate) struct SimSocket {
    socket: Arc<UdpSocket>,
    /// The one wait for a packet; quinn has one task that receives.
    readable: Mutex<Option<Readable>>,
    network: Network,
    random: Mutex<SmallRng>,
}

impl SimSocket {
    pub(crate) async fn bind(network: Network, seed: u64) -> io::Result<Self> {
        let socket = Arc::new(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).await?);
        let random = Mutex::new(SmallRng::seed_from_u64(seed));
        Ok(Self { socket, readable: Mutex::new(None), network, random })
    }

    fn is_lost(&self) -> bool {
        let permille = self.network.0.loss.load(Ordering::Relaxed);
        // No number is drawn where nothing can be lost.
        let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
        permille > 0 && random.random_range(0..1000) < permille
    }
}

impl fmt::Debug for SimSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SimSocket").field(&self.socket).finish()
    }
}

impl AsyncUdpSocket for SimSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &udp::Transmit<'_>) -> io::Result<()> {
        self.network.record(transmit.contents);
        if !self.is_lost() {
            // To a machine that is down, as to one that is not: nobody says.
            let _ = self.socket.try_send_to(transmit.contents, transmit.destination);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [io::IoSliceMut<'_>],
        meta: &mut [udp::RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut readable = self.readable.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(wait) = readable.as_mut() {
                ready!(wait.as_mut().poll(context));
                *readable = None;
            }
            match self.socket.try_recv_from(&mut buffers[0]) {
                Ok((len, addr)) => {
                    meta[0] = udp::RecvMeta { addr, len, stride: len, ecn: None, dst_ip: None };
                    return Poll::Ready(Ok(1));
                }
                Err(_) => {
                    let socket = Arc::clone(&self.socket);
                    *readable = Some(Box::pin(async move {
                        // turmoil's never fails.
                        let _ = socket.readable().await;
                    }));
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
