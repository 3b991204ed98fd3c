//! [`Engine`]: owns all sequences, the KV blocks and the model. A step is: admit, plan, submit the next pass, collect the
//! one before, pass on what was drawn; with a pipeline as model, submit one while there is room for it, else collect one.

mod guess;
mod pass;

use crate::{
    DraftSource, Model, ModelError, Overlap, SequenceId,
    admission::Admission,
    cost::{CostModel, StepShape},
    grammar::Matcher,
    load::LoadView,
    memory::{Held, Memory},
    scheduler::Scheduler,
    sequence::{self, Sequence, Submitted, Targets},
    settings::{EngineSettings, RATES_UNMEASURED, TARGET_MAX},
    shares::Shares,
    speculation::Speculation,
};
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};
use types::{
    BLOCK_TOKENS, CacheEvent, ClientId, Finish, FinishReason, GenerateError, GenerateRequest, NodeLoad,
    NodeRates, Priority, RequestId, SessionId, SessionInfo, TokenEvent, Usage, limits,
};

/// A prompt's first token is due after the TTFT target plus this many times the seconds that reading it alone takes: long
/// prompts may wait for short ones, and for long ones that came before.
const TTFT_STRETCH: f64 = 2.0;
/// A prompt is read in good time within half of the time to its deadline, but not sooner than within the first nor later
/// than within the second of these multiples of what reading it alone takes: who sends a long prompt waits anyway, and
/// gentleness must not make a fast machine slow.
const GOOD_STRETCH: [f64; 2] = [1.75, 4.0];
/// The same where no request waits behind it: nobody but its sender gains by haste.
const CALM_STRETCH: [f64; 2] = [4.0, 8.0];
/// While all prompts are in good time, a step with slices takes at most this many times what its rows alone take: a reader
/// hardly sees a pace that differs by less than a factor of two.
const GENTLE_STRETCH: f64 = 1.75;
/// Where no request waits, a step with slices is to take at most this many times what its rows alone take, however late a
/// prompt is, unless the smallest slice takes longer: the prompt takes half as long again, and nobody else gains by haste.
const CALM_STEP_STRETCH: f64 = 3.0;
/// Shortest `Retry-After` in seconds: a few steps.
const RETRY_AFTER_MIN_S: f64 = 0.1;
/// Longest `Retry-After` in seconds: what runs is predicted by its `max_tokens`, and most texts end long before.
const RETRY_AFTER_MAX_S: f64 = 30.0;
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

/// A pass that the model computes.
#[derive(Debug)]
struct Flight {
    parts: Vec<Submitted>,
    shape: StepShape,
    submitted: Instant,
    /// Whether fewer passes than fill a pipeline were in flight with it: how long it took then says how long its way is,
    /// and not how soon the next one follows.
    filling: bool,
    expected_s: f64,
    /// Whose tokens wait for masks to be drawn, in the order of their rows, and how many are guessed behind each.
    masked: Vec<(SequenceId, usize)>,
    /// Whether any are.
    guesses: bool,
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

    /// Takes a request into the waiting queue. One that brings a part of its answer goes on after it, as if that had been
    /// drawn here.
    ///
    /// # Errors
    /// [`GenerateError::Unavailable`] when draining or after a failure, [`GenerateError::UnknownModel`],
    /// [`GenerateError::Invalid`] for tokens outside the vocabulary, an id that is in use, or a grammar, which must be
    /// compiled first; [`GenerateError::ContextExceeded`] for what can never fit, [`GenerateError::Busy`] when the queue is
    /// full.
    pub fn submit(&mut self, now: Instant, request: GenerateRequest) -> Result<(), GenerateError> {
        if request.rules.grammar.is_some() {
            return Err(invalid("the grammar was not compiled".to_owned(), "grammar"));
        }
        self.enqueue(now, request, None)
    }

    /// [`Engine::submit`] for a request with a grammar: `matcher` is at the beginning of the texts that it allows.
    ///
    /// # Errors
    /// As from [`Engine::submit`], and [`GenerateError::Invalid`] where the answer so far is not in the grammar.
    pub fn submit_under(
        &mut self,
        now: Instant,
        request: GenerateRequest,
        mut matcher: Matcher,
    ) -> Result<(), GenerateError> {
        for &token in &request.output {
            matcher.consume(token).map_err(|error| invalid(error.to_string(), "output"))?;
        }
        self.enqueue(now, request, Some(matcher))
    }

    /// Whether [`Engine::submit`] would take a request now, its grammar aside.
    ///
    /// # Errors
    /// As from [`Engine::submit`].
    pub fn check(&self, request: &GenerateRequest) -> Result<(), GenerateError> {
        self.check_request(request)?;
        // Slots that are free count: what is submitted between two steps has not been admitted yet.
        let most = self.model.limits().slots + limits::ENGINE_WAITING_MAX;
        if self.waiting.len() + self.running.len() >= most {
            let wait_s = self.seconds_to_free_slot().clamp(RETRY_AFTER_MIN_S, RETRY_AFTER_MAX_S);
            return Err(GenerateError::Busy { retry_after_ms: (wait_s * 1000.0).ceil() as u64 });
        }
        Ok(())
    }

    fn enqueue(
        &mut self,
        now: Instant,
        request: GenerateRequest,
        matcher: Option<Matcher>,
    ) -> Result<(), GenerateError> {
        self.check(&request)?;
        if matcher.as_ref().is_some_and(Matcher::is_complete) {
            // All that was lost with the node that it comes from is the word that this is the end.
            let usage = Usage {
                prompt_tokens: request.prompt.len() as u32,
                completion_tokens: request.output.len() as u32,
                ..Usage::default()
            };
            let finish = Finish { reason: FinishReason::Stop, usage };
            self.ended.push((request.id, TokenEvent::Finished(finish)));
            return Ok(());
        }
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        // Of a prompt whose tokens are told of nothing may be left out.
        let cached = self.settings.prefix_cache && request.report.prompt_logprobs.is_none();
        let root = cached.then(|| request.cache.root(self.model.card().root));
        let given = [request.prompt.as_slice(), &request.output].concat();
        let held = Held::new(root, &given);
        let cached = self.memory.matched(held.reusable(given.len())).0 * BLOCK_TOKENS;
        let target = |given: Option<u32>, usual: Duration| {
            given.map_or(usual, |ms| Duration::from_millis(u64::from(ms)).min(TARGET_MAX))
        };
        let alone_s = self.cost.first_slice_seconds() + self.cost.slice_seconds(cached, given.len() - cached);
        let stretched = |by: f64| Duration::from_secs_f64((by * alone_s).min(TARGET_MAX.as_secs_f64()));
        let allowed =
            target(request.service.ttft_target_ms, self.settings.ttft_target) + stretched(TTFT_STRETCH);
        let between = |[least, most]: [f64; 2]| (allowed / 2).clamp(stretched(least), stretched(most));
        let targets = Targets {
            arrived: now,
            first_due: now + allowed,
            good_due: now + between(GOOD_STRETCH),
            calm_due: now + between(CALM_STRETCH),
            tpot: target(request.service.tpot_target_ms, self.settings.tpot_target),
        };
        let sequence = Sequence::new(id, request, self.model.card(), matcher, held, targets);
        self.shares.enter(sequence.client);
        if let Some(session) = &sequence.session {
            self.memory.touch_session(session, now);
        }
        self.waiting.push(sequence);
        Ok(())
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
                self.cost.observe(flight.shape, now.saturating_duration_since(begin).as_secs_f64());
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

    fn check_request(&self, request: &GenerateRequest) -> Result<(), GenerateError> {
        let card = self.model.card();
        let unavailable = match &self.state {
            State::Serving => None,
            State::Draining => Some("it is draining".to_owned()),
            State::Failed(error) => Some(error.to_string()),
        };
        if let Some(reason) = unavailable {
            return Err(GenerateError::Unavailable { model: card.name.clone(), reason });
        }
        if request.model != card.name {
            let served = vec![card.name.clone()];
            return Err(GenerateError::UnknownModel { model: request.model.clone(), served });
        }
        let invalid = |message: String, param: &str| Err(invalid(message, param));
        let vocab = card.vocab_size;
        if let Some(at) = request.prompt.iter().position(|&token| token >= vocab) {
            let token = request.prompt[at];
            let message = format!("token {token} at position {at} of the prompt is not below {vocab}");
            return invalid(message, "prompt");
        }
        if let Some(token) = request.output.iter().find(|token| **token >= vocab) {
            return invalid(format!("token {token} of the answer so far is not below {vocab}"), "output");
        }
        if let Some(token) = request.speculation.prediction.iter().find(|token| **token >= vocab) {
            return invalid(format!("token {token} of the prediction is not below {vocab}"), "prediction");
        }
        if let Some((token, _)) = request.sampling.logit_bias.iter().find(|(token, _)| *token >= vocab) {
            return invalid(format!("token {token} of logit_bias is not below {vocab}"), "logit_bias");
        }
        let prompt_tokens = request.prompt.len() as u32;
        let tokens = u64::from(prompt_tokens) + u64::from(request.max_tokens);
        let blocks = self.model.limits().blocks;
        if tokens > u64::from(card.context_tokens) || sequence::most_blocks(request) > blocks {
            return Err(GenerateError::ContextExceeded {
                prompt_tokens,
                max_tokens: request.max_tokens,
                context_tokens: (card.context_tokens as usize).min(blocks * BLOCK_TOKENS) as u32,
            });
        }
        let in_use = self.waiting.iter().chain(&self.running).any(|sequence| sequence.request == request.id)
            || self.ended.iter().any(|(id, _)| *id == request.id);
        if in_use {
            return invalid(format!("a request with the id {} is already here", request.id), "id");
        }
        Ok(())
    }

    fn settle(&mut self, now: Instant) {
        for sequence in self.running.iter_mut().chain(&mut self.waiting) {
            sequence.settle(now);
        }
    }

    /// One pass beside the one in flight, whose tokens it takes in.
    fn step_ahead(
        &mut self,
        now: Instant,
        events: &mut Vec<(RequestId, TokenEvent)>,
        summary: &mut StepSummary,
    ) -> Result<(), ModelError> {
        let mut before = self.flights.pop_front();
        // What is planned now begins when the pass in flight ends.
        let at = before.as_ref().map_or(now, |flight| self.end_of(flight).max(now));
        if let Some(mut flight) = before.take_if(|flight| self.is_awaited(flight)) {
            flight.shape.wait();
            self.collect(now, flight, events, summary)?;
        }
        self.admit(now, summary);
        self.begin(now, at, summary)?;
        if let Some(flight) = before {
            self.collect(now, flight, events, summary)?;
        }
        self.draw()
    }

    /// One more pass while stages are free; where they are not, or nobody can go on, waits for the oldest.
    fn step_staged(
        &mut self,
        now: Instant,
        most: usize,
        events: &mut Vec<(RequestId, TokenEvent)>,
        summary: &mut StepSummary,
    ) -> Result<(), ModelError> {
        let before = self.flights.len();
        if before < most {
            self.begin(now, now, summary)?;
            self.draw()?;
        }
        let begun = self.flights.len() > before;
        if begun && self.flights.len() < most {
            return Ok(());
        }
        match self.flights.pop_front() {
            Some(flight) => self.collect(now, flight, events, summary),
            None => Ok(()),
        }
    }

    /// How passes follow one another now.
    fn overlap(&self) -> Overlap {
        self.model.overlap(self.running.iter().filter(|sequence| sequence.decodes()).count())
    }

    /// Whether a pass that is planned now can do something for it: a pipeline's passes do not know what those before draw.
    fn is_runnable(&self, sequence: &Sequence) -> bool {
        sequence.is_runnable() && (!self.is_staged() || !sequence.is_ahead())
    }

    fn is_staged(&self) -> bool {
        matches!(self.model.overlap(0), Overlap::Stages { .. })
    }

    /// Seconds from a row's token to its next one, with so many rows.
    fn decode_seconds(&self, rows: usize) -> f64 {
        let groups = self.model.overlap(rows).groups();
        groups as f64 * self.cost.decode_seconds(rows.div_ceil(groups))
    }

    fn begin_of(&self, flight: &Flight) -> Instant {
        self.last_end.map_or(flight.submitted, |end| end.max(flight.submitted))
    }

    fn end_of(&self, flight: &Flight) -> Instant {
        let expected = Duration::from_secs_f64(flight.expected_s.min(TARGET_MAX.as_secs_f64()));
        self.begin_of(flight) + expected
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

    /// Seconds until the first running sequence will have ended, at the latest.
    fn seconds_to_free_slot(&self) -> f64 {
        let rows = self.running.len().max(1);
        let step_s = self.decode_seconds(rows);
        let left = |sequence: &Sequence| {
            self.cost.slice_seconds(sequence.submitted(), sequence.prefill_left())
                + step_s * f64::from(sequence.output_left())
        };
        self.running.iter().map(left).fold(RETRY_AFTER_MAX_S, f64::min)
    }
}

fn invalid(message: String, param: &str) -> GenerateError {
    GenerateError::Invalid { message, param: Some(param.to_owned()) }
}
