//! [`EngineHost`]: an engine and what its node is told of it, without pipes, threads or a clock: commands and times go
//! in, reports come out.

use super::LoadedModel;
use super::probe;
use engine::{Engine, EngineSettings, ModelError};
use std::time::{Duration, Instant};
use types::{GenerateError, NodeLoad, SessionInfo, SessionRequest, limits};
use wire::{EngineCommand, EngineReport};

/// While only numbers change, at most one report of load or cache in this time: half of what the node passes on.
const LOAD_INTERVAL: Duration = limits::LOAD_INTERVAL_MIN.checked_div(2).expect("not divided by zero");

/// One engine as its process runs it.
///
/// Contract: until [`EngineHost::is_over`], take the commands that are there, waiting for one at most
/// [`limits::LOAD_INTERVAL_MAX`] and only where [`EngineHost::is_idle`]; then [`EngineHost::step`] with the time before
/// it, [`EngineHost::stepped`] with the time after it, and send the reports of all three in their order.
#[derive(Debug)]
pub struct EngineHost {
    engine: Engine,
    load_told: (NodeLoad, Instant),
    cache_told: Instant,
    /// Ends once nothing is left to do.
    leaving: bool,
}

impl EngineHost {
    /// Measures a model, which moves `clock`, and makes its engine; also gives the reports that come first.
    ///
    /// # Errors
    /// Where the model fails as it is measured.
    pub fn new(
        mut loaded: LoadedModel,
        mut settings: EngineSettings,
        clock: impl Fn() -> Instant,
    ) -> Result<(Self, Vec<EngineReport>), ModelError> {
        let measured = probe::measure(&mut *loaded.model, &clock)?;
        tracing::debug!(?measured, "measured");
        let rates = measured.rates;
        (settings.rates, settings.decode_step_s) = (rates, measured.decode_step_s);
        let slots = loaded.model.limits().slots as u32;
        let card = loaded.model.card().clone();
        let engine = Engine::new(loaded.model, settings);
        let now = clock();
        let load = engine.load(now);
        let ready = EngineReport::Ready { card, assets: loaded.assets, rates, slots };
        let host = Self { engine, load_told: (load, now), cache_told: now, leaving: false };
        Ok((host, vec![ready, EngineReport::Load(load)]))
    }

    /// Whether there is nothing to do but to wait for a command.
    pub fn is_idle(&self) -> bool {
        self.engine.is_idle() && !self.leaving
    }

    /// Whether it was told to leave and has nothing left to do.
    pub fn is_over(&self) -> bool {
        self.engine.is_idle() && self.leaving
    }

    /// While it is idle: a part, of seconds at most, of what makes later steps faster. False: nothing is left of it.
    ///
    /// # Errors
    /// Where the model is lost.
    pub fn prepare(&mut self) -> Result<bool, ModelError> {
        self.engine.prepare()
    }

    /// The engine, to look at.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Does what the node wants.
    pub fn take(&mut self, now: Instant, command: EngineCommand, reports: &mut Vec<EngineReport>) {
        match command {
            EngineCommand::Submit(request) if self.leaving => {
                let reason = "the engine is leaving".to_owned();
                let error = GenerateError::Unavailable { model: request.model.clone(), reason };
                reports.push(EngineReport::Rejected { id: request.id, error });
            }
            EngineCommand::Submit(request) => {
                let id = request.id;
                if let Err(error) = self.engine.submit(now, *request) {
                    reports.push(EngineReport::Rejected { id, error });
                }
            }
            EngineCommand::Cancel(id) => self.engine.cancel(id),
            EngineCommand::Sessions { call, request } => {
                let sessions = self.sessions(now, &request);
                reports.push(EngineReport::Sessions { call, sessions });
            }
            EngineCommand::Shutdown => {
                self.leaving = true;
                self.engine.drain();
            }
        }
    }

    /// One step of the engine, which waits for the model.
    ///
    /// # Errors
    /// Where the model is lost; the reports hold the ends of all requests, and there is no further step.
    pub fn step(&mut self, now: Instant, reports: &mut Vec<EngineReport>) -> Result<(), ModelError> {
        let mut events = Vec::new();
        let stepped = self.engine.step(now, &mut events);
        reports.extend(events.into_iter().map(|(id, event)| EngineReport::Event { id, event }));
        stepped.map(|_| ())
    }

    /// What is to be done after a step, also a failed one.
    pub fn stepped(&mut self, now: Instant, reports: &mut Vec<EngineReport>) {
        self.engine.observe(now);
        self.tell_cache(now, reports);
        let load = self.engine.load(now);
        let (told, at) = &self.load_told;
        let requests = (load.running, load.waiting) != (told.running, told.waiting);
        // A sign of life where nothing changes.
        let overdue = now - *at >= limits::LOAD_INTERVAL_MAX;
        if requests || overdue || (load != *told && now - *at >= LOAD_INTERVAL) {
            reports.push(EngineReport::Load(load));
            self.load_told = (load, now);
        }
    }

    /// Seldom enough that blocks which come and go in between are not worth a word.
    fn tell_cache(&mut self, now: Instant, reports: &mut Vec<EngineReport>) {
        if now - self.cache_told < LOAD_INTERVAL && !self.engine.is_idle() {
            return;
        }
        self.cache_told = now;
        let events = self.engine.take_cache_events();
        if !events.is_empty() {
            reports.push(EngineReport::Cache(events));
        }
    }

    /// The sessions that a request is about, which end if it says so.
    fn sessions(&mut self, now: Instant, request: &SessionRequest) -> Vec<SessionInfo> {
        let mut sessions = self.engine.sessions(now);
        match request {
            SessionRequest::List { client } => sessions.retain(|session| session.client == *client),
            SessionRequest::End { client, id } => {
                sessions.retain(|session| session.client == *client && session.id == *id);
                self.engine.end_session(*client, id);
            }
        }
        sessions
    }
}
