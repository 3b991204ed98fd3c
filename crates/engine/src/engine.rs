//! [`Engine`]: owns all sequences, the KV blocks and the model. A step is: admit, plan, submit the next pass, collect the
//! one before, pass on what was drawn; with a pipeline as model, submit one while there is room for it, else collect one.

mod flight;
mod guess;
mod pass;
mod submit;

use crate::{
    DraftSource, Model, ModelError, Overlap, SequenceId,
    admission::Admission,
    cost::CostModel,
    load::LoadView,
    memory::Memory,
    scheduler::Scheduler,
    sequence::Sequence,
    settings::{EngineSettings, RATES_UNMEASURED, TARGET_MAX},
    shares::Shares,
    speculation::Speculation,
};
use flight::Flight;
use std::{collections::VecDeque, time::Instant};
use types::{
    CacheEvent, ClientId, FinishReason, GenerateError, NodeLoad, NodeRates, Priority, RequestId, SessionId,
    SessionInfo, TokenEvent,
};

/// While all prompts are in good time, a step with slices takes at most this many times what its rows alone take: a reader
/// hardly sees a pace that differs by less than a factor of two.
const GENTLE_STRETCH: f64 = 1.75;
/// Where no request waits, a step with slices is to take at most this many times what its rows alone take, however late a
/// prompt is, unless the smallest slice takes longer: the prompt takes half as long again, and nobody else gains by haste.
const CALM_STEP_STRETCH: f64 = 3.0;

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepSummary {
    /// Sequences that left the waiting queue.
    pub admitted: u32,
    /// Sequences that gave up their slot or KV and went back to it.
    pub preempted: u32,
    /// Decode rows in the pass that was begun.
    pub rows: u32,
    /// Slices of prompts in that pass.
    pub slices: u32,
    /// Prompt tokens in that pass.
    pub prefill_tokens: u32,
    /// Seconds that the pass that was begun is expected to take; 0 where there was none.
    pub expected_s: f64,
    /// Tokens guessed ahead in that pass.
    pub drafts: u32,
    /// Tokens passed on, of the pass that was collected.
    pub tokens: u32,
    /// Requests that ended.
    pub finished: u32,
}

/// The engine of one model.
///
/// Contract: the caller alternates [`Engine::step`] with the time before it and [`Engine::observe`] with the time after
/// it, back to back while [`Engine::is_idle`] is false, and calls [`Engine::submit`] and [`Engine::cancel`] in between.
/// Every request that `submit` accepted gets [`TokenEvent::Started`] and [`TokenEvent::Tokens`] with gapless indexes, if it
/// gets a token at all, and then exactly one [`TokenEvent::Finished`], whatever happens, as long as `step` is called.
#[derive(Debug)]
pub struct Engine {
    model: Box<dyn Model>,
    settings: EngineSettings,
    scheduler: Scheduler,
    cost: CostModel,
    memory: Memory,
    shares: Shares,
    /// In order of arrival.
    waiting: Vec<Sequence>,
    /// In order of admission.
    running: Vec<Sequence>,
    /// Passes that were submitted and not collected, the oldest first.
    flights: VecDeque<Flight>,
    /// Last events of requests that ended between steps.
    ended: Vec<(RequestId, TokenEvent)>,
    /// The pass that was collected, whose end is not known yet.
    passed: Option<Flight>,
    /// When the last pass ended: the next one begins then, if it was submitted before.
    last_end: Option<Instant>,
    next_id: u64,
    admissions: u64,
    /// Passes that were collected.
    passes: u64,
    speculation: Speculation,
    state: State,
}

#[derive(Debug)]
enum State {
    Serving,
    Draining,
    Failed(ModelError),
}

impl Engine {
    /// An engine without requests.
    pub fn new(model: Box<dyn Model>, mut settings: EngineSettings) -> Self {
        settings.ttft_target = settings.ttft_target.min(TARGET_MAX);
        settings.tpot_target = settings.tpot_target.min(TARGET_MAX);
        Self {
            scheduler: Scheduler::default(),
            cost: CostModel::new(&settings.rates, &settings.decode_step_s, &RATES_UNMEASURED),
            memory: Memory::new(model.limits().blocks, &settings),
            shares: Shares::default(),
            waiting: Vec::new(),
            running: Vec::new(),
            flights: VecDeque::new(),
            ended: Vec::new(),
            passed: None,
            last_end: None,
            next_id: 0,
            admissions: 0,
            passes: 0,
            speculation: Speculation::default(),
            state: State::Serving,
            model,
            settings,
        }
    }

    /// Also asks this source for tokens to guess ahead, with those that the engine has anyway.
    pub fn guess_with(&mut self, source: Box<dyn DraftSource>) {
        self.speculation.add(source);
    }

    /// Ends a request, wherever it is. Its slot and KV are free for the next step, which also brings its last event.
    /// One that has ended, or was never here, is left alone.
    pub fn cancel(&mut self, request: RequestId) {
        let by_request = |sequence: &Sequence| sequence.request == request;
        let sequence = if let Some(index) = self.waiting.iter().position(by_request) {
            self.waiting.remove(index)
        } else if let Some(index) = self.running.iter().position(by_request) {
            self.running.remove(index)
        } else {
            return;
        };
        let finish = sequence.finish(FinishReason::Cancelled);
        self.ended.push((request, TokenEvent::Finished(finish)));
        self.forget(sequence);
    }

    /// Begins a pass over what is most urgent at `now`, then waits for the one before, and appends what that brought to
    /// `events`. With a pipeline it waits only where no further pass can be begun; where tokens are guessed ahead, it waits first.
    ///
    /// Without work it does nothing. [`Engine::observe`] should follow with the time after it.
    ///
    /// # Errors
    /// [`ModelError::Backend`] where the model is lost: all requests have ended, with events that say so, and every
    /// further step fails alike. Trouble with a single sequence is that request's last event instead.
    pub fn step(
        &mut self,
        now: Instant,
        events: &mut Vec<(RequestId, TokenEvent)>,
    ) -> Result<StepSummary, ModelError> {
        if let State::Failed(error) = &self.state {
            return Err(error.clone());
        }
        self.settle(now);
        self.memory.expire(now);
        let mut summary = StepSummary::default();
        let result = match self.overlap() {
            Overlap::Lookahead => self.step_ahead(now, events, &mut summary),
            overlap @ Overlap::Stages { .. } => {
                self.admit(now, &mut summary);
                self.step_staged(now, overlap.flights(), events, &mut summary)
            }
        };
        if let Err(error) = &result {
            self.fail(error.clone());
        }
        summary.finished += self.ended.len() as u32;
        events.append(&mut self.ended);
        result.map(|()| summary)
    }

    /// Tells the time after a step: the engine learns from it how long passes take.
    pub fn observe(&mut self, now: Instant) {
        self.settle(now);
        if let Some(flight) = self.passed.take() {
            if !flight.filling {
                let begin = self.begin_of(&flight);
                self.learn(&flight, now.saturating_duration_since(begin).as_secs_f64());
            }
            self.last_end = Some(now);
        }
    }

    /// While it is idle: lets the model do a part of what makes later steps faster. False: nothing is left of it.
    ///
    /// # Errors
    /// [`ModelError::Backend`] where the model is lost, as from [`Engine::step`].
    pub fn prepare(&mut self) -> Result<bool, ModelError> {
        if !self.is_idle() || !matches!(self.state, State::Serving) {
            return Ok(false);
        }
        let prepared = self.model.prepare();
        if let Err(error) = &prepared {
            self.fail(error.clone());
        }
        prepared
    }

    /// From now on nothing new is taken; what is here runs to its end.
    pub fn drain(&mut self) {
        if matches!(self.state, State::Serving) {
            self.state = State::Draining;
        }
    }

    /// Whether there is nothing to do: no request, no pass in flight, and no event to bring.
    pub fn is_idle(&self) -> bool {
        let none = self.waiting.is_empty() && self.running.is_empty() && self.ended.is_empty();
        none && self.flights.is_empty()
    }

    /// What there is to do at `now`.
    pub fn load(&self, now: Instant) -> NodeLoad {
        let view = LoadView {
            now,
            waiting: &self.waiting,
            running: &self.running,
            memory: &self.memory,
            decode_s: &|rows| self.decode_seconds(rows),
            cost: &self.cost,
            slots: self.model.limits().slots,
            ttft_target: self.settings.ttft_target,
            passes: self.passes,
            step_s: self.flights.iter().map(|flight| flight.expected_s).sum(),
            drafts: self.speculation.counts(),
        };
        view.load()
    }

    /// How fast the model is, as far as known by now.
    pub fn rates(&self) -> NodeRates {
        self.cost.rates()
    }

    /// The sessions whose KV is kept at `now`, by client and name.
    pub fn sessions(&self, now: Instant) -> Vec<SessionInfo> {
        self.memory.sessions(now)
    }

    /// Keeps a session's KV no longer; false where there was none. Its requests go on.
    pub fn end_session(&mut self, client: ClientId, session: &SessionId) -> bool {
        self.memory.end_session(&(client, session.clone()))
    }

    /// What changed in the prefix cache since the last call, for routers.
    pub fn take_cache_events(&mut self) -> Vec<CacheEvent> {
        self.memory.take_events()
    }

    /// The whole prefix cache, for a router that knows nothing of it.
    pub fn cache_snapshot(&self) -> Vec<CacheEvent> {
        self.memory.snapshot()
    }

    /// Asserts what must always hold of blocks, cache and sessions; takes time in proportion to all blocks.
    ///
    /// # Panics
    /// Where it does not hold.
    pub fn check_invariants(&self) {
        self.memory.check(self.running.iter().chain(&self.waiting).map(|sequence| &sequence.held));
        let requests = (self.running.len() + self.waiting.len()) as u32;
        assert_eq!(self.shares.requests(), requests, "requests in the clients' accounts");
    }

    fn settle(&mut self, now: Instant) {
        for sequence in self.running.iter_mut().chain(&mut self.waiting) {
            sequence.settle(now);
        }
    }

    /// Moves from waiting to running whatever the order and the room allow.
    fn admit(&mut self, now: Instant, summary: &mut StepSummary) {
        let slots = self.model.limits().slots;
        // One that yields a slot a step: what is decided next may depend on what that brings.
        let mut may_yield = true;
        while !self.waiting.is_empty() {
            self.shares.refill(self.waiting.iter().map(|sequence| sequence.client));
            let admission = Admission {
                now,
                waiting: &self.waiting,
                running: &self.running,
                memory: &self.memory,
                shares: &self.shares,
                slots,
                admissions: self.admissions,
            };
            let full = self.running.len() >= slots;
            if full && !may_yield {
                break;
            }
            let Some(index) = admission.next() else { break };
            let yielding = if full { admission.yields(&self.waiting[index]) } else { None };
            if full && yielding.is_none() {
                break;
            }
            let aged = admission.is_aged(&self.waiting[index]);
            let mut sequence = self.waiting.remove(index);
            if aged {
                sequence.priority = Priority::High;
            }
            self.admissions += 1;
            if let Some(yielding) = yielding {
                may_yield = false;
                self.preempt(yielding, summary);
            }
            let tokens = sequence.tokens().len();
            let adopted = self.memory.adopt(&mut sequence.held, tokens);
            let unpaid = sequence.begin(adopted);
            self.shares.charge_input(sequence.client, unpaid);
            self.running.push(sequence);
            summary.admitted += 1;
        }
    }

    /// Takes slot and KV from the youngest sequence of the lowest priority; false where only one is left.
    fn preempt_youngest(&mut self, summary: &mut StepSummary) -> bool {
        if self.running.len() < 2 {
            return false;
        }
        let youngest = (0..self.running.len()).min_by_key(|&index| {
            let sequence = &self.running[index];
            (sequence.priority, std::cmp::Reverse(sequence.arrival()))
        });
        youngest.is_some_and(|index| {
            self.preempt(index, summary);
            true
        })
    }

    /// Sends a running sequence back to those who wait, in the order in which they came. What it computed stays in the
    /// cache as long as nobody needs the memory more.
    fn preempt(&mut self, index: usize, summary: &mut StepSummary) {
        let mut sequence = self.running.remove(index);
        tracing::debug!(id = %sequence.request, computed = sequence.computed(), "preempted");
        self.memory.release(&mut sequence.held);
        sequence.restart();
        let place = self.waiting.partition_point(|other| other.arrival() < sequence.arrival());
        self.waiting.insert(place, sequence);
        summary.preempted += 1;
    }

    /// Ends the one sequence that made a pass fail. The others' state is as before it; they go on in the next step.
    fn fail_one(&mut self, id: SequenceId, message: String) -> Result<(), ModelError> {
        let Some(index) = self.running.iter().position(|sequence| sequence.id == id) else {
            return Err(ModelError::Backend(format!("{message} (of {id:?}, which is not running)")));
        };
        let sequence = self.running.remove(index);
        let finish = sequence.finish(FinishReason::Failed(GenerateError::Engine { message }));
        self.ended.push((sequence.request, TokenEvent::Finished(finish)));
        self.forget(sequence);
        Ok(())
    }

    /// Ends everything. The model is not touched any more.
    fn fail(&mut self, error: ModelError) {
        tracing::error!(%error, running = self.running.len(), waiting = self.waiting.len(), "the engine failed");
        let all: Vec<Sequence> = self.running.drain(..).chain(self.waiting.drain(..)).collect();
        for sequence in all {
            let failed = FinishReason::Failed(GenerateError::Engine { message: error.to_string() });
            self.ended.push((sequence.request, TokenEvent::Finished(sequence.finish(failed))));
            self.forget(sequence);
        }
        self.flights.clear();
        self.state = State::Failed(error);
    }

    /// Takes everything from a sequence that has ended and is in no queue any more.
    fn forget(&mut self, mut sequence: Sequence) {
        self.speculation.forget(sequence.id);
        self.memory.release(&mut sequence.held);
        self.shares.leave(sequence.client);
    }
}
