//! The router: takes the nodes that connect, and hosts one [`PeerActor`] for each.
//!
//! [`RouterActor`] owns who is connected; what is known of them and the choice between them is in the dispatch, which
//! requests use directly. The acceptor hands over one node at a time and waits until it has been taken in.

use crate::dispatch::Dispatch;
use crate::peer::{PeerActor, PeerSource};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use transport::Endpoint;
use wire::Hello;

pub(crate) struct RouterActor;

pub(crate) struct RouterActorSettings {
    pub(crate) endpoint: Endpoint,
    pub(crate) hello: Hello,
    pub(crate) dispatch: Arc<Dispatch>,
    /// This process's own node.
    pub(crate) local: Option<PeerSource>,
}

pub(crate) enum RouterMsg {
    /// A node is there; `taken` is dropped once that is dealt with.
    Connected { source: PeerSource, taken: oneshot::Sender<()> },
}

pub(crate) struct RouterActorState {
    dispatch: Arc<Dispatch>,
    acceptor: JoinHandle<()>,
}

impl Actor for RouterActor {
    type Msg = RouterMsg;
    type State = RouterActorState;
    type Arguments = RouterActorSettings;

    async fn pre_start(
        &self,
        myself: ActorRef<RouterMsg>,
        settings: RouterActorSettings,
    ) -> Result<RouterActorState, ActorProcessingErr> {
        let RouterActorSettings { endpoint, hello, dispatch, local } = settings;
        if let Some(local) = local {
            take_in(&myself, &dispatch, local).await?;
        }
        let acceptor = tokio::spawn(async move {
            while let Some((peer, reports)) = endpoint.accept(&hello).await {
                let (taken, done) = oneshot::channel();
                let source = PeerSource::Remote { peer, reports };
                if myself.send_message(RouterMsg::Connected { source, taken }).is_err() {
                    return;
                }
                // Dropped rather than sent: both mean that it has been dealt with.
                let _ = done.await;
            }
        });
        Ok(RouterActorState { dispatch, acceptor })
    }

    async fn handle(
        &self,
        myself: ActorRef<RouterMsg>,
        message: RouterMsg,
        state: &mut RouterActorState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RouterMsg::Connected { source, taken } => {
                take_in(&myself, &state.dispatch, source).await?;
                drop(taken);
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<RouterMsg>,
        event: SupervisionEvent,
        _: &mut RouterActorState,
    ) -> Result<(), ActorProcessingErr> {
        // A peer's place in the dispatch goes with it; the others stay.
        if let SupervisionEvent::ActorFailed(_, error) = event {
            tracing::error!(%error, "a peer failed");
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<RouterMsg>,
        state: &mut RouterActorState,
    ) -> Result<(), ActorProcessingErr> {
        state.acceptor.abort();
        Ok(())
    }
}

/// Gives a node its place and its actor, or sends it away.
async fn take_in(
    myself: &ActorRef<RouterMsg>,
    dispatch: &Arc<Dispatch>,
    source: PeerSource,
) -> Result<(), ActorProcessingErr> {
    match dispatch.connect(source.hello().clone(), source.target()) {
        Ok(connected) => {
            Actor::spawn_linked(None, PeerActor, (source, connected), myself.get_cell()).await?;
        }
        Err(reason) => {
            tracing::info!(node = %source.hello().name, %reason, "a node was not taken in");
            if let PeerSource::Remote { peer, .. } = source {
                peer.close(&reason);
            }
        }
    }
    Ok(())
}
