//! The node: hosts the supervisor of its engine, or of its part in a pipeline, and tells routers how that is.
//!
//! [`NodeActor`] owns the supervisor and the reporter, a task that turns the engine's changes into [`NodeReport`]s:
//! at most one in [`limits::LOAD_INTERVAL_MIN`], at least one in [`limits::LOAD_INTERVAL_MAX`]. Peers watch the last one;
//! requests reach the engine through [`EngineHandle`], which admits them.

use crate::engine_actor::{EngineActor, EngineActorSettings};
use crate::engine_handle::{EngineHandle, NodeReport};
use crate::pipeline::{EngineTimes, PipelineActor, PipelineHost};
use crate::settings::ACTOR_STOP_TIME_MAX;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout_at};
use types::limits;

pub(crate) struct NodeActor;

/// What serves a node's model.
pub(crate) enum Serves {
    /// An engine of its own.
    Engine(EngineActorSettings),
    /// A pipeline, in which it has a part under this name.
    Pipeline(PipelineHost, String, EngineTimes),
}

pub(crate) struct NodeActorSettings {
    pub(crate) serves: Serves,
    pub(crate) handle: EngineHandle,
    pub(crate) reports: watch::Sender<NodeReport>,
}

pub(crate) enum NodeMsg {
    /// Take nothing new and tell everybody.
    Drain,
}

pub(crate) struct NodeActorState {
    handle: EngineHandle,
    /// The supervisor of its engine, or of its part in a pipeline.
    supervisor: ActorCell,
    reporter: JoinHandle<()>,
}

impl Actor for NodeActor {
    type Msg = NodeMsg;
    type State = NodeActorState;
    type Arguments = NodeActorSettings;

    async fn pre_start(
        &self,
        myself: ActorRef<NodeMsg>,
        settings: NodeActorSettings,
    ) -> Result<NodeActorState, ActorProcessingErr> {
        let NodeActorSettings { serves, handle, reports } = settings;
        let reporter = tokio::spawn(report(handle.clone(), reports));
        let supervisor = match serves {
            Serves::Engine(engine) => {
                let arguments = (engine, handle.clone());
                let started = Actor::spawn_linked(None, EngineActor, arguments, myself.get_cell()).await?;
                started.0.get_cell()
            }
            Serves::Pipeline(host, name, times) => {
                let arguments = (host, name, times);
                let started = Actor::spawn_linked(None, PipelineActor, arguments, myself.get_cell()).await?;
                started.0.get_cell()
            }
        };
        Ok(NodeActorState { handle, supervisor, reporter })
    }

    async fn handle(
        &self,
        _: ActorRef<NodeMsg>,
        message: NodeMsg,
        state: &mut NodeActorState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            NodeMsg::Drain => state.handle.drain(),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<NodeMsg>,
        event: SupervisionEvent,
        _: &mut NodeActorState,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(_, error) = event {
            tracing::error!(%error, "the engine supervisor failed");
            myself.stop(Some("the engine supervisor failed".to_owned()));
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<NodeMsg>,
        state: &mut NodeActorState,
    ) -> Result<(), ActorProcessingErr> {
        if let Err(error) = state.supervisor.stop_and_wait(None, Some(ACTOR_STOP_TIME_MAX)).await {
            tracing::warn!(%error, "the engine supervisor does not stop");
        }
        state.reporter.abort();
        Ok(())
    }
}

async fn report(engine: EngineHandle, reports: watch::Sender<NodeReport>) {
    let mut changes = engine.changes();
    loop {
        changes.mark_unchanged();
        reports.send_replace(engine.report());
        let told = Instant::now();
        if let Ok(Err(_)) = timeout_at(told + limits::LOAD_INTERVAL_MAX, changes.changed()).await {
            return;
        }
        sleep_until(told + limits::LOAD_INTERVAL_MIN).await;
    }
}
