use super::*;

fn settings(id: u128) -> DiscoverySettings {
    DiscoverySettings {
        cluster: "home".to_owned(),
        id: NodeId(id),
        name: "studio".to_owned(),
        fingerprints: watch::channel(vec!["00112233".to_owned()]).1,
        roles: vec![Role::Node, Role::Router],
        port: 7800,
        mdns: true,
        peers: Vec::new(),
        interfaces: Vec::new(),
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// What a process with these settings announces, as another one hears it.
fn announced(settings: &DiscoverySettings, addresses: &[&str]) -> Announcement {
    let service = announcement(settings).expect("valid");
    let mut heard = Announcement::from(&service.as_resolved_service());
    heard.addresses = addresses.iter().map(|text| address(text)).collect();
    heard
}

fn found(id: u128, addresses: &[&str], roles: &[Role]) -> PeerEvent {
    let addresses = addresses.iter().map(|text| address(text)).collect();
    PeerEvent::Found { id: NodeId(id), addresses, roles: roles.to_vec() }
}

#[test]
fn a_peer_is_told_once_until_something_changes() {
    let mut heard = Heard::new(&settings(1));
    let both = [Role::Node, Role::Router];
    let one = announced(&settings(2), &["10.0.0.2:7800"]);
    assert_eq!(heard.resolved(&one), [found(2, &["10.0.0.2:7800"], &both)]);
    assert_eq!(heard.resolved(&one), []);
    let moved = announced(&settings(2), &["10.0.0.3:7800", "127.0.0.1:7800"]);
    assert_eq!(heard.resolved(&moved), [found(2, &["10.0.0.3:7800", "127.0.0.1:7800"], &both)]);
    let router =
        announced(&DiscoverySettings { roles: vec![Role::Router], ..settings(2) }, &["10.0.0.3:7800"]);
    assert_eq!(heard.resolved(&router), [found(2, &["10.0.0.3:7800"], &[Role::Router])]);
    assert_eq!(heard.removed(&router.fullname.to_uppercase()), [PeerEvent::Lost { id: NodeId(2) }]);
    assert_eq!(heard.removed(&router.fullname), []);
    assert_eq!(heard.resolved(&router), [found(2, &["10.0.0.3:7800"], &[Role::Router])]);
}

#[test]
fn itself_and_strangers_are_ignored() {
    let mut heard = Heard::new(&settings(1));
    assert_eq!(heard.resolved(&announced(&settings(1), &["10.0.0.2:7800"])), []);
    let ignored = [
        (
            DiscoverySettings { cluster: "office".to_owned(), ..settings(2 << 96) },
            "its cluster is \"office\"",
        ),
        (
            DiscoverySettings {
                fingerprints: watch::channel(vec!["ffffffff".to_owned()]).1,
                ..settings(3 << 96)
            },
            "its cluster key is",
        ),
    ];
    for (settings, expected) in &ignored {
        let announced = announced(settings, &["10.0.0.2:7800"]);
        match heard.resolved(&announced).as_slice() {
            [PeerEvent::Ignored { instance, reason }] => {
                assert!(*instance == announced.fullname && reason.starts_with(expected), "{reason}");
            }
            told => panic!("{told:?}"),
        }
        assert_eq!(heard.resolved(&announced), [], "told once");
    }
    assert_eq!(heard.strangers.len(), 2, "the other cluster and the other key");
    assert_eq!(heard.resolved(&announced(&settings(4 << 96), &[])), [], "nowhere to reach it yet");
    let nobody = Announcement { fullname: "x".to_owned(), ..Announcement::default() };
    assert!(matches!(heard.resolved(&nobody)[..], [PeerEvent::Ignored { .. }]));
}

#[test]
fn a_peer_that_changes_its_cluster_is_lost() {
    let mut heard = Heard::new(&settings(1));
    assert_eq!(heard.resolved(&announced(&settings(2), &["10.0.0.2:7800"])).len(), 1);
    let gone = DiscoverySettings { cluster: "office".to_owned(), ..settings(2) };
    let told = heard.resolved(&announced(&gone, &["10.0.0.2:7800"]));
    assert!(matches!(told[..], [PeerEvent::Lost { id: NodeId(2) }, PeerEvent::Ignored { .. }]), "{told:?}");
}

#[test]
fn what_is_kept_is_bounded() {
    let mut heard = Heard::new(&settings(1));
    for id in 0..2 * NODES_MAX as u128 {
        // The instance's name holds the id's first eight digits.
        let _ = heard.resolved(&announced(&settings((id + 2) << 96), &["10.0.0.2:7800"]));
    }
    assert_eq!((heard.peers.len(), heard.strangers.len()), (NODES_MAX, NODES_MAX));
}

#[test]
fn names_become_labels() {
    assert_eq!(label("Ana's Mac.local"), "Ana's Mac-local");
    assert_eq!(label("a\\b\nc"), "a-b-c");
    assert_eq!(label(&"é".repeat(100)), "é".repeat(24));
    let long = DiscoverySettings { name: "é".repeat(100), ..settings(2) };
    let fullname = announcement(&long).expect("valid").get_fullname().to_owned();
    assert!(fullname.find("._mlx-node").is_some_and(|end| end <= 63), "{fullname}");
}

#[test]
fn link_local_addresses_need_an_interface() {
    let ip = |text: &str| text.parse().expect("an address");
    assert_eq!(scoped(ip("fe80::1"), 7800, 0), None);
    let on_two = scoped(ip("fe80::1"), 7800, 2).expect("usable");
    assert!(matches!(on_two, SocketAddr::V6(v6) if v6.scope_id() == 2));
    assert_eq!(scoped(ip("fd00::1"), 7800, 2), Some(address("[fd00::1]:7800")));
}

#[test]
fn unknown_interfaces_are_named() {
    let unknown = DiscoverySettings { interfaces: vec!["nosuch0".to_owned()], ..settings(1) };
    let error = Mdns::start(&unknown).map(drop).expect_err("unknown").to_string();
    assert!(
        error.starts_with("interfaces: \"nosuch0\" is not a network interface of this machine (they are: "),
        "{error}"
    );
}

#[test]
fn while_the_key_changes_both_fingerprints_are_known() {
    let with = |id, fingerprint: &str| DiscoverySettings {
        fingerprints: watch::channel(vec![fingerprint.to_owned()]).1,
        ..settings(id)
    };
    let mut heard = Heard::new(&with(1, "old"));
    let other = announced(&with(2, "new"), &["10.0.0.2:7800"]);
    let told = heard.resolved(&other);
    let [PeerEvent::Ignored { reason, .. }] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!(reason, "its cluster key is \"new\", ours is \"old\"");
    heard.rekey(vec!["old".to_owned(), "new".to_owned()]);
    let both = [Role::Node, Role::Router];
    assert_eq!(heard.resolved(&other), [found(2, &["10.0.0.2:7800"], &both)]);
    // The same peer, with the other key: nothing is new of it.
    assert_eq!(heard.resolved(&announced(&with(2, "old"), &["10.0.0.2:7800"])), []);
    heard.rekey(vec!["new".to_owned()]);
    let told = heard.resolved(&announced(&with(2, "old"), &["10.0.0.2:7800"]));
    assert!(matches!(told[..], [PeerEvent::Lost { .. }, PeerEvent::Ignored { .. }]), "{told:?}");
}
