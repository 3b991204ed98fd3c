//! Finds the other processes of a cluster: over mDNS, from a list of addresses, or both.
//!
//! [`start`] announces this process and watches for others; the events come out of [`Discovery::next`], through one
//! bounded channel. `mdns` owns the daemon's thread and the filtering of what it hears, `peers` resolves the
//! configured addresses again and again. Nothing here connects to anyone: what is found is a hint, and the transport
//! asks every peer to prove the cluster key.
#![warn(missing_docs)]

mod mdns;
mod peers;

use mdns::Mdns;
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
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
    /// Fingerprints of the cluster's keys, at least one; those of others are ignored. The first is announced. They may change
    /// while discovery runs.
    pub fingerprints: watch::Receiver<Vec<String>>,
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
        /// Its id.
        id: NodeId,
        /// Where it may be reached, the most promising first.
        addresses: Vec<SocketAddr>,
        /// What it does.
        roles: Vec<Role>,
    },
    /// A configured entry leads to these addresses now, and to no others any more. Who is there, and what they do, nobody
    /// knows before they are asked.
    Configured {
        /// The entry, `host:port`.
        entry: String,
        /// The most promising first.
        addresses: Vec<SocketAddr>,
    },
    /// An `mlx-node` is there that is not of this cluster; told once.
    Ignored {
        /// The announced instance.
        instance: String,
        /// What is other about it.
        reason: String,
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

/// Events that may wait for their reader; more make the sources wait.
const EVENTS_MAX: usize = 256;

/// A running discovery. Dropped without [`Discovery::shutdown`], it leaves as fast as it can.
#[derive(Debug)]
pub struct Discovery {
    events: mpsc::Receiver<PeerEvent>,
    mdns: Option<Mdns>,
    /// Aborted when dropped.
    tasks: JoinSet<()>,
}

/// Starts to announce and to look. Needs a tokio runtime.
pub fn start(settings: DiscoverySettings) -> Result<Discovery, DiscoveryError> {
    let names = settings.peers.iter().map(|entry| peers::parse(entry)).collect::<Result<BTreeSet<_>, _>>()?;
    let (sender, events) = mpsc::channel(EVENTS_MAX);
    let mut tasks = JoinSet::new();
    let mdns = if settings.mdns {
        let (mdns, announcements) = Mdns::start(&settings)?;
        tasks.spawn(mdns::watch(mdns.daemon(), announcements, settings.clone(), sender.clone()));
        Some(mdns)
    } else {
        None
    };
    for name in names {
        tasks.spawn(peers::resolve(name, sender.clone()));
    }
    // Without a source there are no events, but there is no end either.
    tasks.spawn(async move { sender.closed().await });
    Ok(Discovery { events, mdns, tasks })
}

impl Discovery {
    /// The next event; waits for as long as there is none. Safe to cancel.
    pub async fn next(&mut self) -> Option<PeerEvent> {
        self.events.recv().await
    }

    /// Says goodbye to the others and stops; waits, for a bounded time, until the goodbye has left.
    pub async fn shutdown(mut self) {
        self.tasks.abort_all();
        if let Some(mdns) = self.mdns.take() {
            mdns.leave().await;
        }
    }
}

/// The most promising first: private and public IPv4, IPv6, then addresses of one link only, then this machine's own.
fn sort_addresses(addresses: &mut [SocketAddr]) {
    addresses.sort_by_key(|address| {
        let rank = match address.ip() {
            ip if ip.is_loopback() => 4,
            IpAddr::V4(ip) if ip.is_link_local() => 3,
            IpAddr::V6(ip) if ip.is_unicast_link_local() => 2,
            IpAddr::V6(_) => 1,
            IpAddr::V4(_) => 0,
        };
        (rank, *address)
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_addresses_come_last() {
        let parse = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let sorted = [
            "10.0.0.2:1",
            "192.168.1.2:1",
            "[fd00::2]:1",
            "[fe80::1%2]:1",
            "169.254.0.9:1",
            "127.0.0.1:1",
            "[::1]:1",
        ];
        let expected: Vec<_> = sorted.iter().map(|text| parse(text)).collect();
        let mut addresses: Vec<_> = expected.iter().rev().copied().collect();
        sort_addresses(&mut addresses);
        assert_eq!(addresses, expected);
    }
}
