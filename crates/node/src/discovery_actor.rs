//! Discovery: turns what is found into one [`UplinkActor`] per router, and announces this process.
//!
//! [`DiscoveryActor`] owns the uplinks by the router's id, or by address where only that is known; those of addresses that
//! no configured entry leads to any more end. The watcher task hands over one event at a time and waits until it has been
//! dealt with.

use crate::settings::{GOODBYE_TIME_MAX, UPLINKS_MAX};
use crate::uplink::{UplinkActor, UplinkMsg, UplinkSettings};
use discovery::{Discovery, PeerEvent};
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use types::{NodeId, Role};

pub(crate) struct DiscoveryActor;

pub(crate) struct DiscoveryActorSettings {
    pub(crate) discovery: Discovery,
    pub(crate) id: NodeId,
    /// None without the node role: then nobody is dialled.
    pub(crate) uplinks: Option<UplinkSettings>,
}

pub(crate) enum DiscoveryMsg {
    /// `taken` is dropped once the event is dealt with.
    Event { event: PeerEvent, taken: oneshot::Sender<()> },
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Id(NodeId),
    Address(SocketAddr),
}

pub(crate) struct DiscoveryActorState {
    id: NodeId,
    settings: Option<UplinkSettings>,
    uplinks: BTreeMap<Key, ActorRef<UplinkMsg>>,
    configured: Configured,
    watcher: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Actor for DiscoveryActor {
    type Msg = DiscoveryMsg;
    type State = DiscoveryActorState;
    type Arguments = DiscoveryActorSettings;

    async fn pre_start(
        &self,
        myself: ActorRef<DiscoveryMsg>,
        settings: DiscoveryActorSettings,
    ) -> Result<DiscoveryActorState, ActorProcessingErr> {
        let (stop, stopped) = oneshot::channel();
        let watcher = tokio::spawn(watch(settings.discovery, myself, stopped));
        Ok(DiscoveryActorState {
            id: settings.id,
            settings: settings.uplinks,
            uplinks: BTreeMap::new(),
            configured: Configured::default(),
            watcher: Some((stop, watcher)),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<DiscoveryMsg>,
        message: DiscoveryMsg,
        state: &mut DiscoveryActorState,
    ) -> Result<(), ActorProcessingErr> {
        let DiscoveryMsg::Event { event, taken } = message;
        match event {
            PeerEvent::Found { id, addresses, roles } => {
                if id != state.id && roles.contains(&Role::Router) {
                    state.found(&myself, Key::Id(id), addresses).await?;
                }
            }
            PeerEvent::Configured { entry, addresses } => {
                for address in state.configured.leads_to(entry, &addresses) {
                    state.lost(&Key::Address(address));
                }
                // Which of them is the same router shows when they are connected.
                for address in addresses {
                    state.found(&myself, Key::Address(address), vec![address]).await?;
                }
            }
            PeerEvent::Lost { id } => state.lost(&Key::Id(id)),
            PeerEvent::Ignored { .. } => {}
        }
        drop(taken);
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<DiscoveryMsg>,
        event: SupervisionEvent,
        state: &mut DiscoveryActorState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorTerminated(who, _, _) => state.forget(who.get_id()),
            SupervisionEvent::ActorFailed(who, error) => {
                tracing::error!(%error, "an uplink failed");
                state.forget(who.get_id());
            }
            _ => {}
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<DiscoveryMsg>,
        state: &mut DiscoveryActorState,
    ) -> Result<(), ActorProcessingErr> {
        for uplink in state.uplinks.values() {
            uplink.stop(None);
        }
        if let Some((stop, watcher)) = state.watcher.take() {
            drop(stop);
            if tokio::time::timeout(GOODBYE_TIME_MAX, watcher).await.is_err() {
                tracing::warn!("discovery does not stop");
            }
        }
        Ok(())
    }
}

impl DiscoveryActorState {
    async fn found(
        &mut self,
        myself: &ActorRef<DiscoveryMsg>,
        key: Key,
        addresses: Vec<SocketAddr>,
    ) -> Result<(), ActorProcessingErr> {
        let Some(settings) = &self.settings else { return Ok(()) };
        if let Some(uplink) = self.uplinks.get(&key)
            && uplink.send_message(UplinkMsg::Found(addresses.clone())).is_ok()
        {
            return Ok(());
        }
        if self.uplinks.len() >= UPLINKS_MAX {
            tracing::warn!(?key, "a router is not dialled: {UPLINKS_MAX} are already");
            return Ok(());
        }
        let arguments = (settings.clone(), addresses);
        let (uplink, _) = Actor::spawn_linked(None, UplinkActor, arguments, myself.get_cell()).await?;
        self.uplinks.insert(key, uplink);
        Ok(())
    }

    fn lost(&self, key: &Key) {
        if let Some(uplink) = self.uplinks.get(key) {
            // Fails only where it has stopped by itself.
            let _ = uplink.send_message(UplinkMsg::Lost);
        }
    }

    fn forget(&mut self, actor: ActorId) {
        self.uplinks.retain(|_, uplink| uplink.get_id() != actor);
    }
}

/// Where the configured entries lead. As many as there are entries, each with a few addresses.
#[derive(Default)]
struct Configured {
    entries: BTreeMap<String, BTreeSet<SocketAddr>>,
}

impl Configured {
    /// An entry leads to these addresses now; gives those that nothing leads to any more.
    fn leads_to(&mut self, entry: String, addresses: &[SocketAddr]) -> Vec<SocketAddr> {
        let now = addresses.iter().copied().collect();
        let before = self.entries.insert(entry, now).unwrap_or_default();
        let led_to = |address: &SocketAddr| self.entries.values().any(|entry| entry.contains(address));
        before.into_iter().filter(|address| !led_to(address)).collect()
    }
}

async fn watch(mut discovery: Discovery, actor: ActorRef<DiscoveryMsg>, mut stopped: oneshot::Receiver<()>) {
    loop {
        let event = tokio::select! {
            event = discovery.next() => event,
            _ = &mut stopped => break,
        };
        let Some(event) = event else { break };
        let (taken, done) = oneshot::channel();
        if actor.send_message(DiscoveryMsg::Event { event, taken }).is_err() {
            break;
        }
        // Dropped rather than sent: both mean that it has been dealt with.
        let _ = done.await;
    }
    discovery.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_nothing_leads_to_any_more_are_lost() {
        let mut configured = Configured::default();
        let mut check = |entry: &str, addresses: &[u16], lost: &[u16]| {
            let address = |&port: &u16| SocketAddr::from(([10, 0, 0, 1], port));
            let addresses: Vec<SocketAddr> = addresses.iter().map(address).collect();
            let expected: Vec<SocketAddr> = lost.iter().map(address).collect();
            assert_eq!(configured.leads_to(entry.to_owned(), &addresses), expected, "{entry}");
        };
        check("a:1", &[1, 2], &[]);
        check("b:1", &[2, 3], &[]);
        check("a:1", &[1, 2], &[]);
        check("a:1", &[4], &[1]);
        check("b:1", &[4], &[2, 3]);
        check("a:1", &[], &[]);
        check("b:1", &[], &[4]);
    }
}
