//! [`Ways`]: what is between ranks, as nodes have it: a rank's TCP stops at the loopback and goes on through a tunnel of a
//! QUIC connection; between the two ends of that a relay delivers every datagram later, where there is to be a delay.

use crate::Failure;
use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};
use testkit::UdpRelay;
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    time::sleep,
};
use transport::{ClusterKey, Endpoint, IncomingRequest, Peer, RouterLink};
use types::{EpochId, NodeId, Role, TunnelOrder};
use wire::Hello;

/// How long ranks may take to look for each other.
const JOIN_TIME_MAX: Duration = Duration::from_secs(30);
/// Between two attempts.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);
/// As nodes have it (`node::pipeline`).
const CARRY_BYTES: usize = 64 << 10;
const TUNNEL: TunnelOrder = TunnelOrder { epoch: EpochId { head: NodeId(1), number: 1 }, rank: 1 };

/// Ways that are open for as long as this is there.
pub(crate) struct Ways {
    delay: Duration,
    runtime: Runtime,
    relays: Vec<UdpRelay>,
}

impl Ways {
    pub(crate) fn new(delay: Duration) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        Ok(Self { delay, runtime, relays: Vec::new() })
    }

    /// Carries whoever connects to what is returned to `to`.
    pub(crate) fn open(&mut self, to: SocketAddrV4) -> Result<SocketAddrV4, Failure> {
        let loopback = (Ipv4Addr::LOCALHOST, 0);
        let key = ClusterKey::generate()?;
        let _entered = self.runtime.enter();
        let near = Endpoint::bind(loopback.into(), &key)?;
        let far = Endpoint::bind(loopback.into(), &key)?;
        let address = match self.delay.is_zero() {
            true => near.local_address(),
            false => {
                self.relays.push(UdpRelay::start(near.local_address(), self.delay)?);
                self.relays.last().map_or_else(|| near.local_address(), UdpRelay::address)
            }
        };
        let (peer, reports, link, listener) = self.runtime.block_on(async {
            let welcome = hello(1);
            let (accepted, link) = tokio::join!(near.accept(&welcome), far.join(address, hello(2)));
            let (peer, reports) = accepted.ok_or("the endpoint is closed")?;
            Ok::<_, Failure>((peer, reports, link?, TcpListener::bind(loopback).await?))
        })?;
        let address = crate::v4(listener.local_addr()?)?;
        let say = |what: &str, failed: Failure| println!("the way to {what}: {failed}");
        self.runtime.spawn(async move {
            // They live as long as their connection.
            let _ends = (near, reports);
            carry_out(&listener, &peer).await.unwrap_or_else(|failed| say("a tunnel", failed));
        });
        self.runtime.spawn(async move {
            let _far = far;
            carry_in(&link, to).await.unwrap_or_else(|failed| say("a rank", failed));
        });
        Ok(address)
    }
}

fn hello(node: u128) -> Hello {
    Hello {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        node: NodeId(node),
        name: node.to_string(),
        cluster: "bench".to_owned(),
        roles: vec![Role::Node],
        hardware: String::new(),
    }
}

async fn carry_out(listener: &TcpListener, peer: &Peer) -> Result<(), Failure> {
    let (mut stream, _) = listener.accept().await?;
    stream.set_nodelay(true)?;
    let mut tunnel = peer.tunnel(TUNNEL, JOIN_TIME_MAX).await?;
    // Its end is the ranks' end.
    let _ = copy_bidirectional_with_sizes(&mut stream, &mut tunnel, CARRY_BYTES, CARRY_BYTES).await;
    Ok(())
}

async fn carry_in(link: &RouterLink, to: SocketAddrV4) -> Result<(), Failure> {
    let Some(IncomingRequest::Tunnel(opening)) = link.next_request().await else {
        return Err("no tunnel was asked for".into());
    };
    let mut stream = loop {
        match TcpStream::connect(to).await {
            Ok(stream) => break stream,
            // It does not listen yet; who asked gives up in time.
            Err(_) => sleep(CONNECT_INTERVAL).await,
        }
    };
    stream.set_nodelay(true)?;
    let mut tunnel = opening.accept().await?;
    let _ = copy_bidirectional_with_sizes(&mut stream, &mut tunnel, CARRY_BYTES, CARRY_BYTES).await;
    Ok(())
}
