//! The socket: who may connect, and the handshake on both sides.

use crate::{ClusterKey, ControlReceiver, Peer, RouterLink};
use std::{io, net::SocketAddr, sync::Arc};
use wire::Hello;

/// Why an endpoint cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The address cannot be listened on.
    #[error("cannot listen on UDP {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The socket given cannot be used.
    #[error("cannot use the socket: {source}")]
    Socket {
        /// What the system said.
        source: io::Error,
    },
    /// The TLS library refuses our settings.
    #[error("TLS cannot be set up: {message}")]
    Tls {
        /// What it said.
        message: String,
    },
}

/// Why a router was not joined.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// The address cannot be dialled from here.
    #[error("cannot connect to {router}: {reason}")]
    Address {
        /// The address.
        router: SocketAddr,
        /// What is wrong with it.
        reason: String,
    },
    /// Nobody there, or the connection broke off.
    #[error("{router} does not answer: {reason}")]
    Unreachable {
        /// The address.
        router: SocketAddr,
        /// What was seen.
        reason: String,
    },
    /// One of the two does not have the other's cluster key.
    #[error("{router} has another cluster key, or is no mlx-node: {reason}")]
    Key {
        /// The address.
        router: SocketAddr,
        /// What TLS said.
        reason: String,
    },
    /// It has the key and will not have us: another version, another cluster.
    #[error("{router} refused this node: {reason}")]
    Refused {
        /// The address.
        router: SocketAddr,
        /// Why, with both values.
        reason: String,
    },
    /// The address is this very process.
    #[error("{router} is this process itself")]
    Itself {
        /// The address.
        router: SocketAddr,
    },
}

/// One UDP socket for all connections of a process. Clones share it.
#[derive(Debug, Clone)]
pub struct Endpoint {}

impl Endpoint {
    /// Listens on `address`. An unspecified address means all of both IPv4 and IPv6 where the system can.
    pub fn bind(address: SocketAddr, key: &ClusterKey) -> Result<Self, TransportError> {
        let _ = (address, key);
        Ok(Self {})
    }

    /// Uses a socket and a runtime of the caller's, and random numbers from a seed if there is one.
    pub fn with_socket(
        socket: Arc<dyn quinn::AsyncUdpSocket>,
        runtime: Arc<dyn quinn::Runtime>,
        key: &ClusterKey,
        rng_seed: Option<[u8; 32]>,
    ) -> Result<Self, TransportError> {
        let _ = (socket, runtime, key, rng_seed);
        Ok(Self {})
    }

    /// Where this endpoint listens.
    pub fn local_address(&self) -> SocketAddr {
        SocketAddr::from(([0, 0, 0, 0], 0))
    }

    /// Node side: dials a router, says hello, and is welcomed or refused, within [`crate::limits::HANDSHAKE_TIME_MAX`].
    pub async fn join(&self, router: SocketAddr, hello: Hello) -> Result<RouterLink, JoinError> {
        let _ = hello;
        tokio::task::yield_now().await;
        Err(JoinError::Itself { router })
    }

    /// Router side: the next node that proved the key and said a matching hello; `None` once closed. Others are
    /// logged and skipped. Until this is first called, nobody can connect. Safe to cancel.
    pub async fn accept(&self, welcome: &Hello) -> Option<(Peer, ControlReceiver)> {
        let _ = welcome;
        tokio::task::yield_now().await;
        None
    }

    /// Closes all connections and takes no more; waits until the other ends were told, at most
    /// [`crate::limits::CLOSE_TIME_MAX`].
    pub async fn close(&self, reason: &str) {
        let _ = reason;
        tokio::task::yield_now().await;
    }
}
