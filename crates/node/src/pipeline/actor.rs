//! [`PipelineActor`]: carries out what this member's [`Group`] says.
//!
//! It stands where an engine's supervisor does on other nodes. It owns the round and the epoch of which this node is the
//! head; stages that the node hosts for another head belong to the streams on which they were asked for.

use super::group::{Action, Event, Group};
use super::head::{self, EngineTimes, Planned};
use super::host::PipelineHost;
use crate::dispatch::now;
use crate::settings::ENGINE_REAP_TIME_MAX;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use types::PipelineReport;

/// How often it is looked who is there, which is also the group's clock.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// A pipeline that runs is formed anew where that gives so many times its tokens a second: measurements differ by less from
/// one time to the next, and forming one costs seconds and all caches.
const GAIN_MIN: f64 = 1.1;

pub(crate) struct PipelineActor;

pub(crate) enum PipelineMsg {
    /// It is time to look who is there.
    Look,
    /// A round has ended.
    Planned(u64, Result<Planned, super::Unplanned>),
    /// Something happened.
    Event(Event),
}

pub(crate) struct PipelineState {
    host: PipelineHost,
    times: EngineTimes,
    group: Group,
    round: Option<JoinHandle<()>>,
    /// What the last round gave.
    planned: Option<(u64, Arc<Planned>)>,
    /// The last one; it may have ended.
    epoch: Option<Epoch>,
    /// What runs, or is about to.
    running: Option<Arc<Planned>>,
    looks: JoinHandle<()>,
}

struct Epoch {
    number: u64,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Actor for PipelineActor {
    type Msg = PipelineMsg;
    type State = PipelineState;
    type Arguments = (PipelineHost, String, EngineTimes);

    async fn pre_start(
        &self,
        myself: ActorRef<PipelineMsg>,
        (host, name, times): Self::Arguments,
    ) -> Result<PipelineState, ActorProcessingErr> {
        let listener = myself.clone();
        host.listen(Box::new(move |event| {
            // Fails only where the actor has stopped.
            let _ = listener.send_message(PipelineMsg::Event(event));
        }));
        let group = Group::new(host.own(), name, host.settings().members.clone(), now());
        let looks = myself.send_interval(LOOK_INTERVAL, || PipelineMsg::Look);
        Ok(PipelineState {
            host,
            times,
            group,
            round: None,
            planned: None,
            epoch: None,
            running: None,
            looks,
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<PipelineMsg>,
        message: PipelineMsg,
        state: &mut PipelineState,
    ) -> Result<(), ActorProcessingErr> {
        let event = match message {
            PipelineMsg::Look => {
                let seen = state.host.dispatch().pipeline_members(&state.host.settings().model);
                Event::Present { seen, quiet: state.host.engine().open_requests() == 0 }
            }
            PipelineMsg::Planned(round, planned) => {
                let planned = state.worth(planned);
                let members = planned.as_ref().map(|planned| planned.members.clone());
                let members = members.map_err(Clone::clone);
                if let Err(why) = &members {
                    tracing::warn!(?why, "no plan for the pipeline");
                }
                state.planned = planned.ok().map(|planned| (round, Arc::new(planned)));
                Event::Planned { round, members }
            }
            PipelineMsg::Event(event) => event,
        };
        if matches!(event, Event::Torn(_)) {
            state.running = None;
        }
        for action in state.group.handle(now(), event) {
            state.carry_out(&myself, action);
        }
        state.report();
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<PipelineMsg>,
        state: &mut PipelineState,
    ) -> Result<(), ActorProcessingErr> {
        state.looks.abort();
        if let Some(round) = state.round.take() {
            round.abort();
        }
        if let Some(Epoch { stop, task, .. }) = state.epoch.take() {
            stop.send_replace(true);
            // Its processes are killed, and are gone within that time.
            let _ = timeout(2 * ENGINE_REAP_TIME_MAX, task).await;
        }
        Ok(())
    }
}

impl PipelineState {
    fn carry_out(&mut self, myself: &ActorRef<PipelineMsg>, action: Action) {
        match action {
            Action::Plan { round, members } => {
                tracing::info!(round, members = members.len(), "measuring for a pipeline");
                let (host, myself) = (self.host.clone(), myself.clone());
                if let Some(before) = self.round.take() {
                    before.abort();
                }
                self.round = Some(tokio::spawn(async move {
                    let planned = head::plan(&host, &members).await;
                    // Fails only where the actor has stopped.
                    let _ = myself.send_message(PipelineMsg::Planned(round, planned));
                }));
            }
            Action::Start { epoch, round } => {
                let planned = self.planned.as_ref().filter(|(of, _)| *of == round);
                let Some((_, planned)) = planned.cloned() else {
                    let reason = "its plan is gone".to_owned();
                    let failed = Event::Failed { epoch, culprit: None, reason };
                    let _ = myself.send_message(PipelineMsg::Event(failed));
                    return;
                };
                tracing::info!(epoch, stages = planned.members.len(), plan = ?planned.plan, "starting a pipeline");
                self.running = Some(planned.clone());
                let (host, times, myself) = (self.host.clone(), self.times, myself.clone());
                let (stop, stopped) = watch::channel(false);
                let task = tokio::spawn(async move {
                    let tell = |event| {
                        // Fails only where the actor has stopped.
                        let _ = myself.send_message(PipelineMsg::Event(event));
                    };
                    head::run_epoch(&host, epoch, &planned, times, tell, stopped).await;
                });
                self.epoch = Some(Epoch { number: epoch, stop, task });
            }
            Action::Tear { epoch, reason } => {
                tracing::info!(epoch, %reason, "ending a pipeline");
                match self.epoch.as_ref().filter(|it| it.number == epoch) {
                    Some(running) => drop(running.stop.send_replace(true)),
                    // It was never begun.
                    None => drop(myself.send_message(PipelineMsg::Event(Event::Torn(epoch)))),
                }
            }
        }
    }

    /// What is to come of a plan: where one runs that is about as good, that one.
    fn worth(&self, found: Result<Planned, super::Unplanned>) -> Result<Planned, super::Unplanned> {
        match (found, &self.running) {
            (Ok(found), Some(running)) if found.plan.tokens_per_s < running.plan.tokens_per_s * GAIN_MIN => {
                Ok(Planned::clone(running))
            }
            (found, _) => found,
        }
    }

    /// Tells how the pipeline stands.
    fn report(&self) {
        let stand = self.group.stand(now());
        self.host.engine().pipeline(PipelineReport {
            model: self.host.settings().model.clone(),
            head: stand.head,
            epoch: stand.epoch,
            phase: stand.phase,
            detail: stand.detail,
            plan: self.running.as_ref().map(|running| running.plan.clone()),
        });
    }
}
