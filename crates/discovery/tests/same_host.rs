//! Two processes' worth of discovery on this machine, over real multicast. Where the machine has none, the tests say
//! so and stop.

use discovery::{Discovery, DiscoverySettings, PeerEvent, start};
use std::time::Duration;
use tokio::{sync::watch, time::timeout};
use types::{NodeId, Role};

/// Far longer than an announcement takes.
const PATIENCE: Duration = Duration::from_secs(5);

fn settings(id: u128, cluster: &str, roles: &[Role]) -> DiscoverySettings {
    DiscoverySettings {
        // Other runs on this network must not be found.
        cluster: format!("{cluster}-{}", std::process::id()),
        id: NodeId(id),
        name: format!("test {id}"),
        fingerprints: watch::channel(vec!["0011223344556677".to_owned()]).1,
        roles: roles.to_vec(),
        port: 40_000 + id as u16,
        mdns: true,
        peers: Vec::new(),
        interfaces: Vec::new(),
    }
}

/// Ids whose first digits differ, as random ones do.
const ONE: u128 = 1 << 96 | 1;
const TWO: u128 = 2 << 96 | 2;

async fn next_found(discovery: &mut Discovery, expected: u128) -> Option<PeerEvent> {
    loop {
        match timeout(PATIENCE, discovery.next()).await {
            Ok(Some(event @ PeerEvent::Found { id, .. })) if id == NodeId(expected) => {
                return Some(event);
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return None,
        }
    }
}

#[tokio::test]
async fn two_find_each_other_and_hear_the_goodbye() {
    let start_one = |id, cluster: &str, roles: &[Role]| start(settings(id, cluster, roles));
    let (mut one, two) =
        match (start_one(ONE, "home", &[Role::Node]), start_one(TWO, "home", &[Role::Router])) {
            (Ok(one), Ok(two)) => (one, two),
            (Err(error), _) | (_, Err(error)) => return eprintln!("skipped: {error}"),
        };
    let mut two = two;
    let Some(PeerEvent::Found { addresses, roles, .. }) = next_found(&mut one, TWO).await else {
        return eprintln!("skipped: no multicast on this machine");
    };
    assert_eq!(roles, [Role::Router]);
    assert!(
        !addresses.is_empty() && addresses.iter().all(|address| address.port() == 40_002),
        "{addresses:?}"
    );
    let loopback = addresses.iter().position(|address| address.ip().is_loopback());
    assert!(loopback.is_none_or(|first| addresses[first..].iter().all(|address| address.ip().is_loopback())));
    assert!(next_found(&mut two, ONE).await.is_some(), "one way only");

    let left = std::time::Instant::now();
    two.shutdown().await;
    assert!(left.elapsed() < Duration::from_secs(2), "{:?}", left.elapsed());
    let lost = timeout(PATIENCE, async {
        loop {
            if one.next().await == Some(PeerEvent::Lost { id: NodeId(TWO) }) {
                return;
            }
        }
    });
    lost.await.expect("the goodbye arrives");
    one.shutdown().await;
}

#[tokio::test]
async fn other_clusters_are_not_found() {
    let (Ok(mut one), Ok(two)) =
        (start(settings(ONE, "flat", &[Role::Node])), start(settings(TWO, "office", &[Role::Node])))
    else {
        return eprintln!("skipped: no mDNS on this machine");
    };
    let found = timeout(Duration::from_secs(3), async {
        loop {
            match one.next().await {
                Some(PeerEvent::Ignored { .. }) => {}
                event => return event,
            }
        }
    });
    let found = found.await;
    assert!(found.is_err(), "{found:?}");
    two.shutdown().await;
    one.shutdown().await;
}

#[tokio::test]
async fn configured_peers_need_no_mdns() {
    let peers = vec!["127.0.0.1:7800".to_owned()];
    let mut alone =
        start(DiscoverySettings { mdns: false, peers, ..settings(ONE, "home", &[]) }).expect("starts");
    let found = timeout(PATIENCE, alone.next()).await.expect("in time");
    let addresses = vec!["127.0.0.1:7800".parse().expect("an address")];
    assert_eq!(found, Some(PeerEvent::Configured { entry: "127.0.0.1:7800".to_owned(), addresses }));
    alone.shutdown().await;

    let peers = vec!["127.0.0.1:7800".to_owned(), "studio".to_owned()];
    let error =
        start(DiscoverySettings { mdns: false, peers, ..settings(ONE, "home", &[]) }).expect_err("no port");
    assert_eq!(error.to_string(), "peers: \"studio\" is not host:port (the port is missing)");
}
