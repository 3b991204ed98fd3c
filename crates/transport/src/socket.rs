//! The UDP socket of an endpoint: sends at once, and hears of the system only what it waits for.
//!
//! Done by hand because tokio's own socket always waits for room to send as well: each packet that leaves makes room, and
//! wakes the process once more for nothing.

use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit, UdpSocketState},
};
use socket2::{Domain, Protocol, Type};
use std::{
    fmt,
    io::{self, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Binds an address; IPv6 as a dual-stack socket where the system can. Needs a tokio runtime.
pub(crate) fn bind(address: SocketAddr) -> io::Result<Socket> {
    let socket = socket2::Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6()
        && let Err(error) = socket.set_only_v6(false)
    {
        tracing::debug!(%error, "IPv6 only");
    }
    socket.bind(&address.into())?;
    let socket = UdpSocket::from(socket);
    let state = UdpSocketState::new((&socket).into())?;
    let io = watch(socket, Interest::READABLE)?;
    Ok(Socket { io, state, full: AtomicBool::new(false) })
}

#[expect(
    deprecated,
    reason = "its successor is unsafe; a UDP socket is sound: its descriptor stays what it is"
)]
fn watch(socket: UdpSocket, what: Interest) -> io::Result<AsyncFd<UdpSocket>> {
    AsyncFd::with_interest(socket, what)
}

/// A socket whose readiness to be read is watched.
#[derive(Debug)]
pub(crate) struct Socket {
    io: AsyncFd<UdpSocket>,
    state: UdpSocketState,
    /// The last packet found no room.
    full: AtomicBool,
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Room { socket: self, watched: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = self.state.send(self.io.get_ref().into(), transmit);
        if sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            self.full.store(true, Ordering::Relaxed);
        }
        sent
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.io.poll_read_ready(context))?;
            let Ok(received) = guard.try_io(|io| self.state.recv(io.get_ref().into(), buffers, meta)) else {
                continue;
            };
            // Fewer than fit are all there were; what has come since makes the socket ready again.
            if received.as_ref().is_ok_and(|&received| received < buffers.len()) {
                guard.clear_ready();
            }
            return Poll::Ready(received);
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.get_ref().local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

/// Waits for room to send, once there was none.
struct Room {
    socket: Arc<Socket>,
    /// The same socket, watched for room only as long as somebody waits for it.
    watched: Option<AsyncFd<UdpSocket>>,
}

impl UdpPoller for Room {
    fn poll_writable(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.socket.full.load(Ordering::Relaxed) {
            self.watched = None;
            return Poll::Ready(Ok(()));
        }
        let this = &mut *self;
        let watched = match &this.watched {
            Some(watched) => watched,
            None => {
                let socket = this.socket.io.get_ref().try_clone()?;
                this.watched.insert(watch(socket, Interest::WRITABLE)?)
            }
        };
        ready!(watched.poll_write_ready(context))?.retain_ready();
        this.socket.full.store(false, Ordering::Relaxed);
        this.watched = None;
        Poll::Ready(Ok(()))
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Room").field("waiting", &self.watched.is_some()).finish_non_exhaustive()
    }
}
