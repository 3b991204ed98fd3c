//! Other machines: whom mDNS tells of, whether their ports answer, and whether they reach this one.

use super::Findings;
use crate::{
    hardware,
    settings::{KeyOrigin, Settings},
};
use discovery::{DiscoverySettings, PeerEvent};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};
use tokio::sync::watch;
use transport::{Endpoint, JoinError};
use types::{NodeId, Role};
use wire::Hello;

/// A round trip that is too long for a cable or a good Wi-Fi, in seconds.
const RTT_S_MAX: f64 = 0.02;
/// Addresses of one machine that are tried: it may have several, and the first that answers is enough.
const ADDRESSES_MAX: usize = 4;

/// Who was heard of.
#[derive(Debug, Default)]
struct Heard {
    peers: BTreeMap<NodeId, (Vec<SocketAddr>, Vec<Role>)>,
    /// Entries of `peers` with where they lead.
    configured: BTreeMap<String, Vec<SocketAddr>>,
}

/// Listens and tries. `cluster` is what this machine's endpoint knows, where it runs.
pub(super) async fn look(
    findings: &mut Findings,
    settings: &Settings,
    cluster: Option<&Value>,
    time: Duration,
) {
    if matches!(settings.key_origin, KeyOrigin::Random(_)) {
        return;
    }
    let local = local_id(cluster);
    let mut heard = match listen(findings, settings, time).await {
        Ok(heard) => heard,
        Err(error) => {
            findings.problem("discovery", error, "name the other machines with --peers");
            return;
        }
    };
    let itself = local.and_then(|id| heard.peers.remove(&id));
    if settings.mdns {
        mdns(findings, &heard, local.is_some(), itself.is_some());
    }
    for entry in &settings.peers {
        if !heard.configured.contains_key(entry) {
            let remedy = "check the name in peers, or write its address";
            findings.problem("peers", format!("{entry} leads to no address"), remedy);
        }
    }
    reach(findings, settings, &heard).await;
    if let Some(cluster) = cluster {
        reached(findings, &heard, cluster);
    }
}

/// The id of the endpoint's own node.
fn local_id(cluster: Option<&Value>) -> Option<NodeId> {
    let nodes = cluster?["nodes"].as_array()?;
    nodes.iter().find(|node| node["local"] == true)?["id"].as_str()?.parse().ok()
}

/// Hears whom discovery tells of, and notes who is not of this cluster.
async fn listen(findings: &mut Findings, settings: &Settings, time: Duration) -> Result<Heard, String> {
    let mut discovery = discovery::start(DiscoverySettings {
        cluster: settings.cluster.clone(),
        id: random_id()?,
        name: format!("{} doctor", settings.name),
        fingerprints: watch::channel(settings.keys.fingerprints()).1,
        // Nobody connects to who does nothing.
        roles: Vec::new(),
        port: settings.listen.port(),
        mdns: settings.mdns,
        peers: settings.peers.clone(),
        interfaces: settings.interfaces.clone(),
    })
    .map_err(|error| error.to_string())?;
    let mut heard = Heard::default();
    let end = tokio::time::Instant::now() + time;
    while let Ok(Some(event)) = tokio::time::timeout_at(end, discovery.next()).await {
        match event {
            PeerEvent::Found { id, addresses, roles } => {
                heard.peers.insert(id, (addresses, roles));
            }
            PeerEvent::Configured { entry, addresses } => {
                heard.configured.insert(entry, addresses);
            }
            PeerEvent::Lost { id } => {
                heard.peers.remove(&id);
            }
            PeerEvent::Ignored { instance, reason } => {
                let remedy = "where it should belong to this cluster, give it the same `cluster` and the same key file";
                findings.note("mDNS", format!("{instance} is not of this cluster: {reason}"), remedy);
            }
        }
    }
    discovery.shutdown().await;
    // Another doctor at work.
    heard.peers.retain(|_, (_, roles)| !roles.is_empty());
    Ok(heard)
}

fn mdns(findings: &mut Findings, heard: &Heard, runs: bool, itself: bool) {
    if runs && !itself {
        findings.problem(
            "mDNS",
            "the mlx-node of this machine is not heard on this machine",
            local_network("this machine lets no multicast pass"),
        );
    } else if heard.peers.is_empty() {
        findings.note(
            "mDNS",
            "no other mlx-node of this cluster is heard",
            local_network("on networks without multicast (guest Wi-Fi, VPN) name the others with --peers"),
        );
    } else {
        findings.ok("mDNS", format!("{} other mlx-node of this cluster heard", heard.peers.len()));
    }
}

/// On macOS a program needs leave to use the local network, and is not told that it has none.
fn local_network(other: &str) -> String {
    if cfg!(target_os = "macos") {
        format!(
            "allow it in System Settings, Privacy & Security, Local Network, for mlx-node or its terminal; else {other}"
        )
    } else {
        other.to_owned()
    }
}

/// Knocks at every router that was heard of.
async fn reach(findings: &mut Findings, settings: &Settings, heard: &Heard) {
    let routers = heard.peers.values().filter(|(_, roles)| roles.contains(&Role::Router));
    let doors = routers.map(|(addresses, _)| addresses).chain(heard.configured.values());
    let doors: BTreeSet<Vec<SocketAddr>> =
        doors.map(|addresses| addresses.iter().copied().take(ADDRESSES_MAX).collect()).collect();
    if doors.is_empty() {
        return;
    }
    let endpoint = match Endpoint::bind((Ipv4Addr::UNSPECIFIED, 0).into(), &settings.keys) {
        Ok(endpoint) => endpoint,
        Err(error) => {
            return findings.problem(
                "reach",
                error.to_string(),
                "give this program leave to use the network",
            );
        }
    };
    for addresses in doors {
        let mut failed = None;
        for address in addresses {
            match knock(&endpoint, settings, address).await {
                Ok(said) => {
                    answered(findings, address, said);
                    failed = None;
                    break;
                }
                Err(JoinError::Itself { .. }) => failed = None,
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            let remedy = match &error {
                JoinError::Address { .. } => "check the address",
                JoinError::Unreachable { .. } => {
                    "start mlx-node there; let UDP to its `listen` port pass its firewall; on a Mac allow mlx-node in \
                     Privacy & Security, Local Network"
                }
                JoinError::Key { .. } => {
                    "copy the key file of one machine to the other; mlx-node key fingerprint tells them apart"
                }
                JoinError::Refused { .. } => "run the same version with the same `cluster` on both",
                JoinError::Itself { .. } => "leave this machine out of its own peers",
            };
            findings.problem("reach", error.to_string(), remedy);
        }
    }
    endpoint.close("looked at enough").await;
}

/// Who a router says it is, and how long it took to say so.
async fn knock(
    endpoint: &Endpoint,
    settings: &Settings,
    address: SocketAddr,
) -> Result<(Hello, Duration), JoinError> {
    let reason = |reason: String| JoinError::Unreachable { router: address, reason };
    let hello = Hello {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        node: random_id().map_err(reason)?,
        name: format!("{} doctor", settings.name),
        cluster: settings.cluster.clone(),
        roles: Vec::new(),
        hardware: hardware::describe(),
    };
    let started = Instant::now();
    let link = endpoint.join(address, hello).await?;
    let took = started.elapsed();
    let router = link.router().clone();
    link.close("a doctor: it has looked");
    Ok((router, took))
}

fn answered(findings: &mut Findings, address: SocketAddr, (router, took): (Hello, Duration)) {
    let ours = env!("CARGO_PKG_VERSION");
    let said = format!("{} at {address} answers after {} ms", router.name, took.as_millis());
    if router.program == ours {
        findings.ok("reach", said);
    } else {
        let said = format!("{said}, but runs version {}, this machine {ours}", router.program);
        findings.note("reach", said, "run the same version on all machines");
    }
}

/// Whether nodes that were heard of have come to this machine's router: nodes dial routers.
fn reached(findings: &mut Findings, heard: &Heard, cluster: &Value) {
    let nodes = cluster["nodes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let known: BTreeSet<NodeId> = nodes.iter().filter_map(|node| node["id"].as_str()?.parse().ok()).collect();
    let is_node = |roles: &[Role]| roles.contains(&Role::Node);
    for (id, (addresses, _)) in heard.peers.iter().filter(|(_, (_, roles))| is_node(roles)) {
        if known.contains(id) {
            continue;
        }
        let place = addresses.first().map_or_else(|| id.to_string(), ToString::to_string);
        findings.problem(
            "reached",
            format!("the node at {place} is heard here but has not come to this router"),
            "let UDP to this machine's `listen` port pass its firewall; where networks differ, name this machine in its peers",
        );
    }
}

/// How the nodes of a running cluster are.
pub(super) fn nodes(findings: &mut Findings, cluster: &Value) {
    let nodes = cluster["nodes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let versions: BTreeSet<&str> = nodes.iter().filter_map(|node| node["version"].as_str()).collect();
    if versions.len() > 1 {
        let versions: Vec<&str> = versions.into_iter().collect();
        let said = format!("the nodes run versions {}", versions.join(" and "));
        findings.note("versions", said, "run the same version on all machines");
    }
    for node in nodes {
        let name = node["name"].as_str().unwrap_or("a node");
        let state = node["engine"]["state"].as_str().unwrap_or("unknown");
        let detail = node["engine"]["detail"].as_str().map(|why| format!(" ({why})")).unwrap_or_default();
        let rtt_s = node["rtt_s"].as_f64().unwrap_or(0.0);
        if node["avoided"] == true {
            let remedy = "see its log; it is tried again by itself";
            findings.problem("node", format!("{name} is left alone, since it failed lately"), remedy);
        } else if state == "restarting" {
            findings.problem("node", format!("{name} restarts its engine{detail}"), "see its log");
        } else if rtt_s > RTT_S_MAX {
            let said = format!("{name} is {state}, but {:.0} ms away", rtt_s * 1e3);
            findings.note("node", said, "a cable, or Thunderbolt, serves better than a busy Wi-Fi");
        } else {
            findings.ok("node", format!("{name} is {state}{detail}"));
        }
    }
}

fn random_id() -> Result<NodeId, String> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(|error| format!("the system gives no random numbers: {error}"))?;
    Ok(NodeId(u128::from_le_bytes(id)))
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};
    use serde_json::json;

    #[test]
    fn nodes_that_are_not_well_are_told() {
        let mut findings = Findings::default();
        nodes(
            &mut findings,
            &json!({ "nodes": [
                { "name": "a", "version": "1", "engine": { "state": "ready" }, "rtt_s": null },
                { "name": "b", "version": "2", "engine": { "state": "ready" }, "rtt_s": 0.05 },
                { "name": "c", "version": "2", "engine": { "state": "restarting", "detail": "killed" } },
                { "name": "d", "version": "2", "engine": { "state": "ready" }, "avoided": true },
            ] }),
        );
        let told: Vec<_> = findings.0.iter().map(|finding| (finding.level, finding.said.as_str())).collect();
        let expected = [
            (Level::Note, "the nodes run versions 1 and 2"),
            (Level::Ok, "a is ready"),
            (Level::Note, "b is ready, but 50 ms away"),
            (Level::Problem, "c restarts its engine (killed)"),
            (Level::Problem, "d is left alone, since it failed lately"),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn a_node_that_does_not_come_is_told() {
        let mut heard = Heard::default();
        let address: SocketAddr = "10.0.0.2:7415".parse().expect("an address");
        for id in [1, 2] {
            heard.peers.insert(NodeId(id), (vec![address], vec![Role::Node]));
        }
        heard.peers.insert(NodeId(3), (vec![address], vec![Role::Router]));
        let mut findings = Findings::default();
        let node = json!({ "id": NodeId(1), "local": true });
        assert_eq!(local_id(Some(&json!({ "nodes": [node] }))), Some(NodeId(1)));
        reached(&mut findings, &heard, &json!({ "nodes": [node] }));
        assert_eq!(findings.0.len(), 1, "{findings:?}");
        assert!(findings.0[0].said.contains("10.0.0.2:7415"), "{findings:?}");
    }
}
