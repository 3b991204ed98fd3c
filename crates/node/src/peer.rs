//! A node as a router sees it: its reports are fed to the dispatch until the connection ends.
//!
//! One [`PeerActor`] per node, this process's own included, which needs no connection. The actor owns the node's place in
//! the dispatch: however it ends, the node is gone from there.

use crate::connected::Connected;
use crate::engine_handle::{EngineHandle, NodeReport};
use crate::reports::Teller;
use crate::target::Target;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use transport::{ControlReceiver, Peer};
use wire::Hello;

pub(crate) struct PeerActor;

/// A node, and where its reports come from.
pub(crate) enum PeerSource {
    Local { hello: Hello, engine: EngineHandle, reports: watch::Receiver<NodeReport> },
    Remote { peer: Peer, reports: ControlReceiver },
}

impl PeerSource {
    pub(crate) fn hello(&self) -> &Hello {
        match self {
            Self::Local { hello, .. } => hello,
            Self::Remote { peer, .. } => peer.hello(),
        }
    }

    pub(crate) fn target(&self) -> Target {
        match self {
            Self::Local { engine, .. } => Target::Local(engine.clone()),
            Self::Remote { peer, .. } => Target::Remote(peer.clone()),
        }
    }
}

pub(crate) enum PeerMsg {
    /// There are no more reports, for this reason.
    Ended(String),
}

pub(crate) struct PeerState {
    name: String,
    peer: Option<Peer>,
    task: JoinHandle<()>,
}

impl Actor for PeerActor {
    type Msg = PeerMsg;
    type State = PeerState;
    type Arguments = (PeerSource, Connected);

    async fn pre_start(
        &self,
        myself: ActorRef<PeerMsg>,
        (source, mut connected): Self::Arguments,
    ) -> Result<PeerState, ActorProcessingErr> {
        let name = source.hello().name.clone();
        let ended = move |reason: String| {
            // Fails only where the actor has stopped.
            let _ = myself.send_message(PeerMsg::Ended(reason));
        };
        Ok(match source {
            PeerSource::Local { engine, reports, .. } => {
                let task = tokio::spawn(async move {
                    feed_local(&mut connected, engine, reports).await;
                    drop(connected);
                    ended("its node has stopped".to_owned());
                });
                PeerState { name, peer: None, task }
            }
            PeerSource::Remote { peer, reports } => {
                tracing::info!(node = %name, address = %peer.remote_address(), "a node joined");
                let connection = peer.clone();
                let task = tokio::spawn(async move {
                    // No silence is waited out here: the transport ends the connection of a silent node.
                    feed_remote(&mut connected, reports).await;
                    drop(connected);
                    ended(connection.closed().await);
                });
                PeerState { name, peer: Some(peer), task }
            }
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<PeerMsg>,
        message: PeerMsg,
        state: &mut PeerState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            PeerMsg::Ended(reason) => {
                tracing::info!(node = %state.name, %reason, "a node is gone");
                myself.stop(Some(reason));
            }
        }
        Ok(())
    }

    async fn post_stop(&self, _: ActorRef<PeerMsg>, state: &mut PeerState) -> Result<(), ActorProcessingErr> {
        state.task.abort();
        if let Some(peer) = &state.peer {
            peer.close("the router is leaving");
        }
        Ok(())
    }
}

async fn feed_remote(connected: &mut Connected, mut reports: ControlReceiver) {
    while let Some(control) = reports.next().await {
        connected.take(control);
    }
}

async fn feed_local(
    connected: &mut Connected,
    engine: EngineHandle,
    mut reports: watch::Receiver<NodeReport>,
) {
    let mut teller = Teller::new(engine);
    loop {
        let report = reports.borrow_and_update().clone();
        teller.news(report).into_iter().for_each(|control| connected.take(control));
        if reports.changed().await.is_err() {
            return;
        }
    }
}
