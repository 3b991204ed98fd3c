//! Configured addresses: checked at start, resolved again and again.

use crate::{DiscoveryError, PeerEvent};
use std::{collections::BTreeSet, net::SocketAddr, time::Duration};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};

/// How often names are looked up again: machines move, and name servers come back.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(30);
/// Longest a lookup may take; resolvers give up after about as long.
const RESOLVE_TIME_MAX: Duration = Duration::from_secs(10);
/// Addresses of one name that are used.
const ADDRESSES_MAX: usize = 16;

/// A checked entry of `peers`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PeerName {
    /// As it was given.
    entry: String,
    host: String,
    port: u16,
}

/// Checks the form of an entry; whether the name exists shows later, and again and again.
pub(crate) fn parse(entry: &str) -> Result<PeerName, DiscoveryError> {
    let wrong = |reason: &str| DiscoveryError::Peer { entry: entry.to_owned(), reason: reason.to_owned() };
    let (host, port) = entry.rsplit_once(':').ok_or_else(|| wrong("the port is missing"))?;
    let port: u16 = port.parse().map_err(|_| wrong("the port is not a number from 1 to 65535"))?;
    if port == 0 {
        return Err(wrong("port 0 cannot be dialled"));
    }
    let host = match host.strip_prefix('[') {
        Some(rest) => {
            let host = rest.strip_suffix(']').ok_or_else(|| wrong("a bracket is not closed"))?;
            // The scope of a link-local address follows a percent sign.
            let address = host.split('%').next().unwrap_or(host);
            address.parse::<std::net::Ipv6Addr>().map_err(|_| wrong("the brackets hold no IPv6 address"))?;
            host
        }
        None if host.contains(':') => return Err(wrong("an IPv6 address needs brackets")),
        None => host,
    };
    let odd = |c: char| c.is_whitespace() || c.is_control() || c == '/';
    if host.is_empty() {
        return Err(wrong("the host is missing"));
    }
    if host.contains(odd) {
        return Err(wrong("the host holds a character that no host's name has"));
    }
    Ok(PeerName { entry: entry.to_owned(), host: host.to_owned(), port })
}

/// Looks `name` up for as long as anyone listens, and tells what changed.
pub(crate) async fn resolve(name: PeerName, events: mpsc::Sender<PeerEvent>) {
    let mut tick = interval(RESOLVE_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut known, mut failing) = (Vec::new(), false);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = events.closed() => return,
        }
        let error =
            match timeout(RESOLVE_TIME_MAX, tokio::net::lookup_host((name.host.as_str(), name.port))).await {
                Ok(Ok(found)) => {
                    let found: BTreeSet<SocketAddr> = found.collect();
                    let mut addresses: Vec<SocketAddr> = found.into_iter().take(ADDRESSES_MAX).collect();
                    crate::sort_addresses(&mut addresses);
                    failing = false;
                    if addresses != known {
                        known.clone_from(&addresses);
                        let entry = name.entry.clone();
                        if events.send(PeerEvent::Configured { entry, addresses }).await.is_err() {
                            return;
                        }
                    }
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer within {} s", RESOLVE_TIME_MAX.as_secs()),
            };
        if !failing {
            let seconds = RESOLVE_INTERVAL.as_secs();
            tracing::warn!(
                host = name.host,
                error,
                "cannot look up a configured peer; trying every {seconds} s"
            );
            failing = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_checked() {
        let good = |entry: &str, host: &str, port| {
            let expected = PeerName { entry: entry.to_owned(), host: host.to_owned(), port };
            assert_eq!(parse(entry).expect("valid"), expected);
        };
        good("studio.local:7800", "studio.local", 7800);
        good("10.0.0.7:1", "10.0.0.7", 1);
        good("[fd00::2]:7800", "fd00::2", 7800);
        good("[fe80::1%en0]:7800", "fe80::1%en0", 7800);
        let bad = |entry: &str, reason: &str| {
            let error = parse(entry).expect_err("invalid").to_string();
            assert_eq!(error, format!("peers: {entry:?} is not host:port ({reason})"));
        };
        bad("studio", "the port is missing");
        bad("studio:", "the port is not a number from 1 to 65535");
        bad("studio:70000", "the port is not a number from 1 to 65535");
        bad("studio:0", "port 0 cannot be dialled");
        bad(":7800", "the host is missing");
        bad("fd00::2:7800", "an IPv6 address needs brackets");
        bad("[fd00::2:7800", "a bracket is not closed");
        bad("[studio]:7800", "the brackets hold no IPv6 address");
        bad("https://studio:7800", "an IPv6 address needs brackets");
        bad("stu dio:7800", "the host holds a character that no host's name has");
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_told_once_and_looked_up_until_nobody_listens() {
        let (sender, mut events) = mpsc::channel(4);
        let task = tokio::spawn(resolve(parse("127.0.0.1:7800").expect("valid"), sender));
        let addresses = vec!["127.0.0.1:7800".parse().expect("an address")];
        let entry = "127.0.0.1:7800".to_owned();
        assert_eq!(events.recv().await, Some(PeerEvent::Configured { entry, addresses }));
        let again = timeout(RESOLVE_INTERVAL * 4, events.recv()).await;
        assert!(again.is_err(), "nothing changed, so nothing is told: {again:?}");
        drop(events);
        timeout(RESOLVE_INTERVAL * 2, task).await.expect("ends").expect("no panic");
    }
}
