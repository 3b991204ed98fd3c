//! Announcing and hearing over mDNS (DNS-SD, RFC 6763).
//!
//! [`Mdns`] owns the daemon, which has a thread and a socket of its own; [`fn@watch`] filters what the daemon hears. The
//! pure part, [`Heard`], knows which announcements concern us and what has been told before.

use crate::{DiscoveryError, DiscoverySettings, PeerEvent};
use mdns_sd::{IfKind, Receiver, ResolvedService, ScopedIp, ServiceDaemon, ServiceEvent, ServiceInfo};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv6Addr, SocketAddr, SocketAddrV6},
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use types::{NodeId, Role, limits::NODES_MAX};

/// What all processes of all clusters announce.
const SERVICE: &str = "_mlx-node._udp.local.";
/// The version of what is in the TXT record, its `v`.
const TXT_VERSION: &str = "1";
/// Bytes of a name in an instance's name, which holds 63 in all (RFC 6763, section 4.1.1).
const NAME_BYTES_MAX: usize = 48;
/// How long each step of leaving may take: a goodbye is two packets 120 ms apart.
const LEAVE_TIME_MAX: Duration = Duration::from_millis(500);
/// The daemon sends the second goodbye after 120 ms; it must not be stopped before.
const GOODBYE_REPEAT: Duration = Duration::from_millis(150);
/// Pause before listening again after the daemon has dropped us for being slow.
const BROWSE_AGAIN: Duration = Duration::from_secs(1);

/// The daemon with our announcement.
#[derive(Debug)]
pub(crate) struct Mdns {
    daemon: ServiceDaemonHandle,
    fullname: String,
}

/// [`ServiceDaemon`] has no `Debug`.
#[derive(Clone)]
pub(crate) struct ServiceDaemonHandle(ServiceDaemon);

impl std::fmt::Debug for ServiceDaemonHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServiceDaemon")
    }
}

impl Mdns {
    /// Starts the daemon, announces this process and listens.
    pub(crate) fn start(
        settings: &DiscoverySettings,
    ) -> Result<(Self, Receiver<ServiceEvent>), DiscoveryError> {
        check_interfaces(&settings.interfaces)?;
        let failed = |error: mdns_sd::Error| DiscoveryError::Mdns { message: error.to_string() };
        let daemon = ServiceDaemon::new().map_err(failed)?;
        if !settings.interfaces.is_empty() {
            daemon.disable_interface(IfKind::All).map_err(failed)?;
            let names: Vec<IfKind> = settings.interfaces.iter().cloned().map(IfKind::Name).collect();
            daemon.enable_interface(names).map_err(failed)?;
        }
        let service = announcement(settings).map_err(failed)?;
        let fullname = service.get_fullname().to_owned();
        daemon.register(service).map_err(failed)?;
        let heard = daemon.browse(SERVICE).map_err(failed)?;
        Ok((Self { daemon: ServiceDaemonHandle(daemon), fullname }, heard))
    }

    pub(crate) fn daemon(&self) -> ServiceDaemonHandle {
        self.daemon.clone()
    }

    /// Says goodbye, waits until that has left, and ends the daemon; each within [`LEAVE_TIME_MAX`].
    pub(crate) async fn leave(&self) {
        let daemon = &self.daemon.0;
        if let Ok(gone) = daemon.unregister(&self.fullname)
            && timeout(LEAVE_TIME_MAX, gone.recv_async()).await.is_ok()
        {
            tokio::time::sleep(GOODBYE_REPEAT).await;
        }
        if let Ok(ended) = daemon.shutdown() {
            let _ = timeout(LEAVE_TIME_MAX, ended.recv_async()).await;
        }
    }
}

impl Drop for Mdns {
    fn drop(&mut self) {
        // Both fail after `leave`, as they should; without it they make the best of an early end.
        let _ = self.daemon.0.unregister(&self.fullname);
        let _ = self.daemon.0.shutdown();
    }
}

fn announcement(settings: &DiscoverySettings) -> mdns_sd::Result<ServiceInfo> {
    let id = settings.id.to_string();
    let short = &id[..8];
    let instance = format!("{}-{short}", label(&settings.name));
    // A host name of our own: the system's responder owns the machine's.
    let host = format!("mlx-node-{short}.local.");
    let roles: Vec<&str> = settings.roles.iter().map(role_name).collect();
    let own = settings.fingerprints.borrow().first().cloned().unwrap_or_default();
    let txt = [
        ("v", TXT_VERSION),
        ("id", &id),
        ("cluster", &settings.cluster),
        ("roles", &roles.join(",")),
        ("fp", &own),
    ];
    let mut service =
        ServiceInfo::new(SERVICE, &instance, &host, "", settings.port, &txt[..])?.enable_addr_auto();
    // The names hold a random id, so nobody else has them: no need to ask around for a second first.
    service.set_requires_probe(false);
    Ok(service)
}

/// A name as part of a DNS label: no dots, no control characters, not too long.
fn label(name: &str) -> String {
    let mut label = String::new();
    for c in name.chars().map(|c| if c == '.' || c == '\\' || c.is_control() { '-' } else { c }) {
        if label.len() + c.len_utf8() > NAME_BYTES_MAX {
            break;
        }
        label.push(c);
    }
    label
}

fn role_name(role: &Role) -> &'static str {
    match role {
        Role::Node => "node",
        Role::Router => "router",
    }
}

fn check_interfaces(names: &[String]) -> Result<(), DiscoveryError> {
    if names.is_empty() {
        return Ok(());
    }
    let failed = |error: std::io::Error| DiscoveryError::Mdns { message: error.to_string() };
    let known: BTreeSet<String> =
        if_addrs::get_if_addrs().map_err(failed)?.into_iter().map(|interface| interface.name).collect();
    match names.iter().find(|name| !known.contains(*name)) {
        Some(name) => {
            Err(DiscoveryError::Interface { name: name.clone(), known: known.into_iter().collect() })
        }
        None => Ok(()),
    }
}

/// Passes on what concerns us until nobody listens or the daemon has ended.
pub(crate) async fn watch(
    daemon: ServiceDaemonHandle,
    mut announcements: Receiver<ServiceEvent>,
    mut settings: DiscoverySettings,
    events: mpsc::Sender<PeerEvent>,
) {
    let mut heard = Heard::new(&settings);
    let mut rekeyed = settings.fingerprints.clone();
    loop {
        let announcement = tokio::select! {
            announcement = announcements.recv_async() => announcement,
            () = events.closed() => return,
            () = changed(&mut rekeyed) => {
                heard.rekey(rekeyed.borrow_and_update().clone());
                settings.fingerprints = rekeyed.clone();
                // Who was a stranger may be a peer now: the daemon tells everything again to a new listener.
                match announcement(&settings).and_then(|own| daemon.0.register(own)).and_then(|()| daemon.0.browse(SERVICE)) {
                    Ok(again) => announcements = again,
                    Err(error) => tracing::warn!(%error, "mDNS goes on with the old key's announcement"),
                }
                continue;
            }
        };
        let told = match announcement {
            Ok(ServiceEvent::ServiceResolved(service)) => heard.resolved(&Announcement::from(&*service)),
            Ok(ServiceEvent::ServiceRemoved(_, fullname)) => heard.removed(&fullname),
            Ok(_) => continue,
            Err(_) => {
                // The daemon drops listeners that lag behind; it tells everything again to new ones.
                tokio::time::sleep(BROWSE_AGAIN).await;
                match daemon.0.browse(SERVICE) {
                    Ok(again) => announcements = again,
                    Err(mdns_sd::Error::Again) => {}
                    Err(error) => {
                        tracing::debug!(%error, "mDNS has ended");
                        return;
                    }
                }
                continue;
            }
        };
        for event in told {
            if events.send(event).await.is_err() {
                return;
            }
        }
    }
}

/// Resolves once the fingerprints have changed; never, where nobody can change them.
async fn changed(fingerprints: &mut watch::Receiver<Vec<String>>) {
    if fingerprints.changed().await.is_err() {
        std::future::pending().await
    }
}

/// One announcement, free of the daemon's types.
#[derive(Debug, Clone, Default)]
struct Announcement {
    fullname: String,
    txt: BTreeMap<String, String>,
    addresses: Vec<SocketAddr>,
}

impl From<&ResolvedService> for Announcement {
    fn from(service: &ResolvedService) -> Self {
        let txt = service.txt_properties.iter();
        let txt = txt.map(|property| (property.key().to_owned(), property.val_str().to_owned())).collect();
        let mut addresses: Vec<_> =
            service.addresses.iter().filter_map(|ip| socket_address(ip, service.port)).collect();
        crate::sort_addresses(&mut addresses);
        Self { fullname: service.fullname.to_lowercase(), txt, addresses }
    }
}

/// Link-local IPv6 addresses mean something together with an interface only.
fn socket_address(ip: &ScopedIp, port: u16) -> Option<SocketAddr> {
    let ScopedIp::V6(v6) = ip else { return Some(SocketAddr::new(ip.to_ip_addr(), port)) };
    scoped(*v6.addr(), port, v6.scope_id().index)
}

fn scoped(ip: Ipv6Addr, port: u16, interface: u32) -> Option<SocketAddr> {
    match (ip.is_unicast_link_local(), interface) {
        (true, 0) => None,
        (true, scope) => Some(SocketAddrV6::new(ip, port, 0, scope).into()),
        (false, _) => Some((ip, port).into()),
    }
}

/// What has been heard and told.
#[derive(Debug)]
pub(crate) struct Heard {
    id: NodeId,
    cluster: String,
    fingerprints: Vec<String>,
    /// By the instance's full name, at most [`NODES_MAX`].
    peers: BTreeMap<String, Known>,
    /// Full names of instances that are not ours and were logged, at most [`NODES_MAX`].
    strangers: BTreeSet<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Known {
    id: NodeId,
    addresses: Vec<SocketAddr>,
    roles: Vec<Role>,
}

impl Heard {
    pub(crate) fn new(settings: &DiscoverySettings) -> Self {
        let (peers, strangers) = (BTreeMap::new(), BTreeSet::new());
        let (cluster, fingerprints) = (settings.cluster.clone(), settings.fingerprints.borrow().clone());
        Self { id: settings.id, cluster, fingerprints, peers, strangers }
    }

    /// Goes by other fingerprints from now on; who was a stranger is looked at anew.
    fn rekey(&mut self, fingerprints: Vec<String>) {
        self.fingerprints = fingerprints;
        self.strangers.clear();
    }

    fn resolved(&mut self, announcement: &Announcement) -> Vec<PeerEvent> {
        let Announcement { fullname, txt, addresses } = announcement;
        let text = |key: &str| txt.get(key).map_or("", String::as_str);
        let Ok(id) = text("id").parse::<NodeId>() else {
            return self.stranger(fullname, format!("its id is {:?}", text("id")));
        };
        if id == self.id {
            return Vec::new();
        }
        if let Some(reason) = self.mismatch(text) {
            return self.stranger(fullname, reason);
        }
        if addresses.is_empty() {
            return Vec::new();
        }
        let roles: Vec<Role> = [Role::Node, Role::Router]
            .into_iter()
            .filter(|role| text("roles").split(',').any(|name| name == role_name(role)))
            .collect();
        let known = Known { id, addresses: addresses.clone(), roles: roles.clone() };
        let before = self.peers.get(fullname);
        if before == Some(&known) {
            return Vec::new();
        }
        if before.is_none() && self.peers.len() >= NODES_MAX {
            return self.stranger(fullname, format!("{NODES_MAX} peers are known already"));
        }
        self.strangers.remove(fullname);
        let before = self.peers.insert(fullname.clone(), known);
        let lost = before.filter(|before| before.id != id).map(|before| PeerEvent::Lost { id: before.id });
        let found = PeerEvent::Found { id, addresses: addresses.clone(), roles };
        lost.into_iter().chain([found]).collect()
    }

    /// Why an announcement is not for us.
    fn mismatch<'a>(&self, text: impl Fn(&str) -> &'a str) -> Option<String> {
        let expected =
            [("v", "announcement version", TXT_VERSION), ("cluster", "cluster", self.cluster.as_str())];
        if let Some((key, what, ours)) = expected.into_iter().find(|(key, _, ours)| text(key) != *ours) {
            return Some(format!("its {what} is {:?}, ours is {ours:?}", text(key)));
        }
        let theirs = text("fp");
        let known = self.fingerprints.iter().any(|ours| ours == theirs);
        (!known).then(|| {
            let ours: Vec<String> = self.fingerprints.iter().map(|ours| format!("{ours:?}")).collect();
            format!("its cluster key is {theirs:?}, ours is {}", ours.join(" or "))
        })
    }

    fn removed(&mut self, fullname: &str) -> Vec<PeerEvent> {
        let fullname = fullname.to_lowercase();
        self.strangers.remove(&fullname);
        self.peers.remove(&fullname).map(|known| PeerEvent::Lost { id: known.id }).into_iter().collect()
    }

    /// Someone who is not for us; if it was before, that peer is lost.
    fn stranger(&mut self, fullname: &str, reason: String) -> Vec<PeerEvent> {
        let lost = self.peers.remove(fullname).map(|known| PeerEvent::Lost { id: known.id });
        let is_new = self.strangers.len() < NODES_MAX && self.strangers.insert(fullname.to_owned());
        let ignored = is_new.then(|| {
            tracing::info!(instance = fullname, reason, "ignored an mlx-node");
            PeerEvent::Ignored { instance: fullname.to_owned(), reason }
        });
        lost.into_iter().chain(ignored).collect()
    }
}

#[cfg(test)]
mod tests;
