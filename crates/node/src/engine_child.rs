//! One life of an engine child: started, read until it ends, and gone for certain afterwards.
//!
//! Commands flow from [`EngineHandle`] through a bounded channel into the child's pipe, reports from its other pipe
//! straight into the handle's table. Nothing here waits for a consumer.

use crate::engine_actor::EngineActorSettings;
use crate::engine_handle::{EngineHandle, ProtocolError};
use crate::engine_start::{EngineLife, StartedEngine};
use crate::settings::{ENGINE_EXIT_TIME_MAX, ENGINE_REAP_TIME_MAX, RANK_SILENCE_MAX, RANK_START_TIME_MAX};
use bytes::BytesMut;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use wire::{Decoder, EngineCommand, EngineReport, FrameClass};

/// Bytes read at once; most reads are a step's tokens.
const READ_BYTES: usize = 64 << 10;

/// How a child ended.
#[derive(Debug)]
pub(crate) struct ChildEnd {
    pub(crate) reason: String,
    /// For how long it had been ready.
    pub(crate) ready_for: Option<Duration>,
}

/// What the supervisor of a pipeline hears of the first rank, beside what that serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadNews {
    /// It and its neighbours have found each other.
    Joined,
    /// It serves.
    Ready,
}

/// That supervisor.
#[derive(Clone, Copy)]
pub(crate) struct HeadWatch<'a> {
    /// Told of news.
    pub(crate) on: &'a (dyn Fn(HeadNews) + Send + Sync),
    /// It has neighbours, and so beats.
    pub(crate) beats: bool,
}

/// Runs a child until it ends or `stop` turns true. When this returns, the process is gone and `engine` says so. A
/// pipeline's first rank is killed where it stops beating, and when it is to stop: its neighbours go at the same time.
pub(crate) async fn run(
    EngineActorSettings { starter, load_time_max, silence_max }: &EngineActorSettings,
    engine: &EngineHandle,
    mut stop: watch::Receiver<bool>,
    watch: Option<HeadWatch<'_>>,
) -> ChildEnd {
    let end = match starter.start() {
        Ok(StartedEngine { commands, reports, life: mut child }) => {
            let writer = tokio::spawn(write_commands(commands, engine.child_started()));
            let mut life = Life {
                engine,
                watch,
                loading: String::new(),
                ready: None,
                failed: None,
                silence_max: *silence_max,
            };
            let seen = life.read(reports, Instant::now() + *load_time_max, &mut stop).await;
            // Whatever happens from here on, nothing more is accepted for it.
            let status = reap(&mut *child, seen.is_some()).await;
            writer.abort();
            let reason = match (life.failed, seen) {
                (Some(message), _) => message,
                (None, Some(seen)) => seen,
                (None, None) => status,
            };
            ChildEnd { reason, ready_for: life.ready.map(|since| since.elapsed()) }
        }
        Err(error) => ChildEnd { reason: error.to_string(), ready_for: None },
    };
    engine.child_ended(&end.reason);
    end
}

struct Life<'a> {
    engine: &'a EngineHandle,
    watch: Option<HeadWatch<'a>>,
    /// What it was last loading.
    loading: String,
    ready: Option<Instant>,
    /// What it said of its own end.
    failed: Option<String>,
    silence_max: Duration,
}

impl Life<'_> {
    /// Reads until the child has ended or must; `Some` says why where its exit status would not.
    async fn read(
        &mut self,
        mut reports: Box<dyn AsyncRead + Send + Unpin>,
        load_deadline: Instant,
        stop: &mut watch::Receiver<bool>,
    ) -> Option<String> {
        let decoder = Decoder::<EngineReport>::new(FrameClass::Engine);
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        let mut stopping = false;
        let mut deadline = load_deadline;
        let beats = self.watch.is_some_and(|watch| watch.beats);
        let mut beaten = Instant::now() + RANK_START_TIME_MAX;
        loop {
            buffer.reserve(READ_BYTES);
            let silent = beats && beaten < deadline;
            let expired = sleep_until(if silent { beaten } else { deadline });
            tokio::select! {
                read = reports.read_buf(&mut buffer) => match read {
                    Ok(0) => return decoder.finish(&buffer).err().map(|error| error.to_string()),
                    Ok(_) => {}
                    Err(error) => return Some(format!("its output cannot be read: {error}")),
                },
                () = expired => {
                    let waited = match self.ready {
                        _ if stopping => "did not exit when asked",
                        _ if silent => "does not beat: it hangs or is stopped",
                        None => "was not ready in time",
                        Some(_) => "has said nothing for too long: it hangs",
                    };
                    return Some(format!("the engine {waited}"));
                }
                () = stopped(stop), if !stopping => {
                    if self.watch.is_some() {
                        return Some("the pipeline is formed anew".to_owned());
                    }
                    if self.ready.is_none() {
                        // It does not listen while it loads, and has nothing to finish.
                        return Some("the engine was stopped as it was loading".to_owned());
                    }
                    stopping = true;
                    deadline = Instant::now() + ENGINE_EXIT_TIME_MAX;
                    self.engine.ask_child_to_exit();
                }
            }
            let mut told = false;
            loop {
                match decoder.next(&mut buffer) {
                    Ok(Some(report)) => {
                        told |= !matches!(report, EngineReport::Beat { .. });
                        if let Err(error) = self.take(report) {
                            return Some(error.to_string());
                        }
                    }
                    Ok(None) => break,
                    Err(error) => return Some(format!("protocol error: {error}")),
                }
            }
            beaten = Instant::now() + RANK_SILENCE_MAX;
            // A rank that beats lives; that it works, what else it says has to show.
            if told && self.ready.is_some() && !stopping {
                deadline = Instant::now() + self.silence_max;
            }
        }
    }

    fn tell(&self, news: HeadNews) {
        if let Some(watch) = self.watch {
            (watch.on)(news);
        }
    }

    fn take(&mut self, report: EngineReport) -> Result<(), ProtocolError> {
        let error = |message: &str| Err(ProtocolError { message: message.to_owned() });
        match report {
            EngineReport::Loading { what, fraction } => {
                if what != self.loading {
                    tracing::info!(%what, "engine loading");
                }
                tracing::debug!(%what, fraction, "engine loading");
                self.loading = what;
            }
            EngineReport::Ready { .. } if self.ready.is_some() => return error("ready for the second time"),
            EngineReport::Ready { card, assets, rates, slots } => {
                if assets.hash() != card.assets {
                    return error("the assets are not those that the model card names");
                }
                tracing::info!(model = %card.name, slots, ?rates, "engine ready");
                self.ready = Some(Instant::now());
                self.engine.child_ready(card, assets, slots);
                self.tell(HeadNews::Ready);
            }
            EngineReport::Failed { message } => self.failed = Some(message),
            EngineReport::Joined if self.watch.is_some() => self.tell(HeadNews::Joined),
            EngineReport::Beat { .. } if self.watch.is_some() => {}
            EngineReport::Joined
            | EngineReport::StageReady
            | EngineReport::Beat { .. }
            | EngineReport::Profile(_) => return error("a report of a pipeline's rank, which it is not"),
            EngineReport::Rejected { .. }
            | EngineReport::Event { .. }
            | EngineReport::Load(_)
            | EngineReport::Cache(_)
            | EngineReport::Sessions { .. }
            | EngineReport::Embedded { .. }
                if self.ready.is_none() =>
            {
                return error("a report before it was ready");
            }
            EngineReport::Rejected { id, error } => self.engine.child_rejected(id, error)?,
            EngineReport::Event { id, event } => self.engine.child_event(id, event)?,
            EngineReport::Embedded { id, vectors } => self.engine.child_embedded(id, vectors)?,
            EngineReport::Load(load) => self.engine.child_load(load),
            EngineReport::Cache(events) => self.engine.child_cache(events),
            EngineReport::Sessions { call, sessions } => self.engine.child_sessions(call, sessions)?,
        }
        Ok(())
    }
}

/// Resolves once the child has to go, also when whoever would say so is gone.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone.
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn write_commands(
    mut pipe: Box<dyn AsyncWrite + Send + Unpin>,
    mut commands: mpsc::Receiver<EngineCommand>,
) {
    let mut buffer = BytesMut::new();
    while let Some(command) = commands.recv().await {
        let mut next = Some(command);
        while let Some(command) = next {
            if let Err(error) = wire::encode(FrameClass::Engine, &command, &mut buffer) {
                // Cannot be for what passed its own type's limits; without it the request ends with the child.
                tracing::error!(%error, "a command for the engine cannot be encoded");
                return;
            }
            next = commands.try_recv().ok();
        }
        if pipe.write_all(&buffer).await.is_err() {
            // The reading side sees the end too, and knows more.
            return;
        }
        buffer.clear();
    }
}

/// Makes sure that the engine is gone, and says how it went.
pub(crate) async fn reap(life: &mut dyn EngineLife, kill: bool) -> String {
    if kill {
        life.kill();
    }
    let ended = match timeout(ENGINE_REAP_TIME_MAX, life.ended()).await {
        Ok(ended) => ended,
        Err(_) => {
            life.kill();
            match timeout(ENGINE_REAP_TIME_MAX, life.ended()).await {
                Ok(Ok(_)) => return "the engine was killed".to_owned(),
                Ok(Err(error)) => Err(error),
                Err(_) => return "the engine cannot be killed".to_owned(),
            }
        }
    };
    match ended {
        Ok(status) => format!("the engine ended ({status})"),
        Err(error) => format!("the engine's end cannot be read: {error}"),
    }
}
