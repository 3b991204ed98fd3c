//! The engine supervisor: starts the engine child, starts it again when it dies, and ends it.
//!
//! [`EngineActor`] owns the child's task (`engine_child.rs`) and the decision when the next one starts. Requests do not
//! pass through its mailbox: they go through [`EngineHandle`], which it only hands to each new child.

use crate::engine_child::{self, ChildEnd};
use crate::engine_handle::EngineHandle;
use crate::engine_start::StartEngine;
use crate::settings::{RESTART_DELAY, RESTART_DELAY_MAX, STABLE_AFTER};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) struct EngineActor;

#[derive(Debug)]
pub(crate) struct EngineActorSettings {
    pub(crate) starter: Arc<dyn StartEngine>,
    pub(crate) load_time_max: Duration,
    pub(crate) silence_max: Duration,
}

pub(crate) enum EngineMsg {
    /// The child's task is over.
    Ended(ChildEnd),
    /// It is time for the next child.
    Start,
}

pub(crate) struct EngineActorState {
    settings: Arc<EngineActorSettings>,
    engine: EngineHandle,
    /// Deaths in a row.
    deaths: u32,
    stop: watch::Sender<bool>,
    child: Option<JoinHandle<()>>,
}

impl Actor for EngineActor {
    type Msg = EngineMsg;
    type State = EngineActorState;
    type Arguments = (EngineActorSettings, EngineHandle);

    async fn pre_start(
        &self,
        myself: ActorRef<EngineMsg>,
        (settings, engine): Self::Arguments,
    ) -> Result<EngineActorState, ActorProcessingErr> {
        myself.send_message(EngineMsg::Start)?;
        let stop = watch::Sender::new(false);
        Ok(EngineActorState { settings: settings.into(), engine, deaths: 0, stop, child: None })
    }

    async fn handle(
        &self,
        myself: ActorRef<EngineMsg>,
        message: EngineMsg,
        state: &mut EngineActorState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            EngineMsg::Start => {
                let (settings, engine) = (state.settings.clone(), state.engine.clone());
                let stop = state.stop.subscribe();
                state.child = Some(tokio::spawn(async move {
                    let end = engine_child::run(&settings, &engine, stop, None).await;
                    // Fails only where the actor has stopped, which knows already.
                    let _ = myself.send_message(EngineMsg::Ended(end));
                }));
            }
            EngineMsg::Ended(end) => {
                state.child = None;
                if end.ready_for.is_some_and(|time| time >= STABLE_AFTER) {
                    state.deaths = 0;
                }
                let delay = restart_delay(state.deaths);
                state.deaths = state.deaths.saturating_add(1);
                tracing::warn!(reason = %end.reason, restart_in = ?delay, "the engine is down");
                drop(myself.send_after(delay, || EngineMsg::Start));
            }
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<EngineMsg>,
        state: &mut EngineActorState,
    ) -> Result<(), ActorProcessingErr> {
        state.stop.send_replace(true);
        if let Some(child) = state.child.take() {
            // Bounded by the child's own timeouts.
            child.await?;
        }
        Ok(())
    }
}

fn restart_delay(deaths: u32) -> Duration {
    match deaths {
        0 => Duration::ZERO,
        _ => RESTART_DELAY.saturating_mul(1 << (deaths - 1).min(16)).min(RESTART_DELAY_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_restart_is_immediate_and_then_they_slow_down() {
        let delays: Vec<u64> = (0..8).map(|deaths| restart_delay(deaths).as_secs()).collect();
        assert_eq!(delays, [0, 1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(restart_delay(u32::MAX), RESTART_DELAY_MAX);
    }
}
