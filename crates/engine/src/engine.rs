//! [`Engine`]: owns all sequences and the model. A step is: admit, plan, run the model, pass on what was drawn.

use crate::{
    Model, ModelError, SequenceId,
    cost::{CostModel, StepShape},
    scheduler::{self, Budgets, Candidate, Plan, Room, Scheduler},
    sequence::{self, Sequence},
};
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};
use types::{
    FinishReason, GenerateError, GenerateRequest, NodeLoad, NodeRates, RequestId, TokenEvent, limits,
};

/// Speed assumed of a machine that was not measured: a small CPU with a small model. Corrected within a few steps.
const RATES_UNMEASURED: NodeRates =
    NodeRates { prefill_tokens_per_s: 200.0, decode_step_s: 0.05, decode_row_s: 0.01 };
/// A prompt's first token is due after the TTFT target plus this many times the seconds that reading it alone takes: long
/// prompts may wait for short ones, and for long ones that came before.
const TTFT_STRETCH: f64 = 2.0;
/// Targets above this mean "no hurry"; it keeps deadlines within what an [`Instant`] can hold.
const TARGET_MAX: Duration = Duration::from_secs(3600);
/// Shortest `Retry-After` in seconds: a few steps.
const RETRY_AFTER_MIN_S: f64 = 0.1;
/// Longest `Retry-After` in seconds: what runs is predicted by its `max_tokens`, and most texts end long before.
const RETRY_AFTER_MAX_S: f64 = 30.0;

/// How an engine schedules.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineSettings {
    /// Time from a request's arrival to its first token that is aimed at, for a prompt of no length.
    pub ttft_target: Duration,
    /// Time from token to token that is aimed at. A shorter one is used to read prompts faster.
    pub tpot_target: Duration,
    /// How fast the model was measured to be; corrected as it runs.
    pub rates: NodeRates,
}

impl Default for EngineSettings {
    /// One second to the first token and ten tokens a second: twice what people read.
    fn default() -> Self {
        Self {
            ttft_target: Duration::from_secs(1),
            tpot_target: Duration::from_millis(100),
            rates: RATES_UNMEASURED,
        }
    }
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepSummary {
    /// Sequences that left the waiting queue.
    pub admitted: u32,
    /// Sequences that gave up their KV and went back to it.
    pub preempted: u32,
    /// Decode rows in the pass.
    pub rows: u32,
    /// Slices of prompts in the pass.
    pub slices: u32,
    /// Prompt tokens in the pass.
    pub prefill_tokens: u32,
    /// Tokens passed on.
    pub tokens: u32,
    /// Requests that ended.
    pub finished: u32,
    /// Seconds that the pass was expected to take; 0 where there was none.
    pub expected_s: f64,
}

/// The engine of one model.
///
/// Contract: the caller alternates [`Engine::step`] with the time before the pass and [`Engine::observe`] with the time
/// after it, back to back while [`Engine::is_idle`] is false, and calls [`Engine::submit`] and [`Engine::cancel`] in
/// between. Every request that `submit` accepted gets [`TokenEvent::Tokens`] with gapless indexes and then exactly one
/// [`TokenEvent::Finished`], whatever happens, as long as `step` is called.
#[derive(Debug)]
pub struct Engine {
    model: Box<dyn Model>,
    ttft_target: Duration,
    tpot_target: Duration,
    scheduler: Scheduler,
    cost: CostModel,
    /// In order of arrival.
    waiting: VecDeque<Sequence>,
    /// Open in the model, in order of admission.
    running: Vec<Sequence>,
    /// Last events of requests that ended between steps.
    ended: Vec<(RequestId, TokenEvent)>,
    /// The pass whose duration is not known yet.
    passed: Option<(Instant, StepShape)>,
    next_id: u64,
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
    pub fn new(model: Box<dyn Model>, settings: EngineSettings) -> Self {
        Self {
            model,
            ttft_target: settings.ttft_target.min(TARGET_MAX),
            tpot_target: settings.tpot_target.min(TARGET_MAX),
            scheduler: Scheduler::default(),
            cost: CostModel::new(&settings.rates, &RATES_UNMEASURED),
            waiting: VecDeque::new(),
            running: Vec::new(),
            ended: Vec::new(),
            passed: None,
            next_id: 0,
            state: State::Serving,
        }
    }

    /// Takes a request into the waiting queue.
    ///
    /// # Errors
    /// [`GenerateError::Unavailable`] when draining or after a failure, [`GenerateError::UnknownModel`],
    /// [`GenerateError::Invalid`] for tokens outside the vocabulary or an id that is in use,
    /// [`GenerateError::ContextExceeded`] for what can never fit, [`GenerateError::Busy`] when the queue is full.
    pub fn submit(&mut self, now: Instant, request: GenerateRequest) -> Result<(), GenerateError> {
        self.check(&request)?;
        // Slots that are free count: what is submitted between two steps has not been admitted yet.
        let most = self.model.limits().slots + limits::ENGINE_WAITING_MAX;
        if self.waiting.len() + self.running.len() >= most {
            let wait_s = self.seconds_to_free_slot().clamp(RETRY_AFTER_MIN_S, RETRY_AFTER_MAX_S);
            return Err(GenerateError::Busy { retry_after_ms: (wait_s * 1000.0).ceil() as u64 });
        }
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let stretch_s = TTFT_STRETCH * self.cost.slice_seconds(0, request.prompt.len());
        let stretch = Duration::from_secs_f64(stretch_s.min(TARGET_MAX.as_secs_f64()));
        let first_due = now + self.ttft_target + stretch;
        self.waiting.push_back(Sequence::new(id, request, self.model.card(), first_due));
        Ok(())
    }

    /// Ends a request, wherever it is. Its slot is free for the next step, which also brings its last event.
    /// One that has ended, or was never here, is left alone.
    pub fn cancel(&mut self, request: RequestId) {
        let by_request = |sequence: &Sequence| sequence.request == request;
        if let Some(index) = self.waiting.iter().position(by_request) {
            if let Some(sequence) = self.waiting.remove(index) {
                self.end_later(&sequence, FinishReason::Cancelled);
            }
        } else if let Some(index) = self.running.iter().position(by_request) {
            let sequence = self.running.remove(index);
            self.model.close(sequence.id);
            self.end_later(&sequence, FinishReason::Cancelled);
        }
    }

    /// Runs one pass over what is most urgent at `now` and appends what happened to `events`.
    ///
    /// Without work it does nothing. [`Engine::observe`] should follow with the time after the pass.
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
        self.passed = None;
        let mut summary = StepSummary::default();
        self.preempt(&mut summary);
        let result = self.admit(&mut summary).and_then(|()| {
            let plan = self.plan(now);
            if plan.parts.is_empty() { Ok(()) } else { self.pass(now, &plan, events, &mut summary) }
        });
        if let Err(error) = &result {
            self.fail(error.clone());
        }
        summary.finished += self.ended.len() as u32;
        events.append(&mut self.ended);
        result.map(|()| summary)
    }

    /// Tells the time after a step's pass: the engine learns from it how long steps take.
    pub fn observe(&mut self, now: Instant) {
        self.settle(now);
        if let Some((begin, shape)) = self.passed.take() {
            self.cost.observe(shape, now.saturating_duration_since(begin).as_secs_f64());
        }
    }

    /// From now on nothing new is taken; what is here runs to its end.
    pub fn drain(&mut self) {
        if matches!(self.state, State::Serving) {
            self.state = State::Draining;
        }
    }

    /// Whether there is nothing to do: no request, and no event to bring.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.ended.is_empty()
    }

    /// What there is to do at `_now`; nothing in it depends on the time yet.
    pub fn load(&self, _now: Instant) -> NodeLoad {
        let limits = self.model.limits();
        let all = || self.running.iter().chain(&self.waiting);
        NodeLoad {
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            slots: limits.slots as u32,
            prefill_backlog_tokens: all().map(|sequence| sequence.prefill_left() as u64).sum(),
            decode_backlog_tokens: all().map(|sequence| u64::from(sequence.output_left())).sum(),
            kv_tokens: (limits.kv_tokens - self.room().kv_tokens, limits.kv_tokens),
            rates: self.rates(),
        }
    }

    /// How fast the model is, as far as known by now.
    pub fn rates(&self) -> NodeRates {
        self.cost.rates()
    }

    fn check(&self, request: &GenerateRequest) -> Result<(), GenerateError> {
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
        let invalid = |message: String, param: &str| {
            Err(GenerateError::Invalid { message, param: Some(param.to_owned()) })
        };
        let vocab = card.vocab_size;
        if let Some(at) = request.prompt.iter().position(|&token| token >= vocab) {
            let token = request.prompt[at];
            let message = format!("token {token} at position {at} of the prompt is not below {vocab}");
            return invalid(message, "prompt");
        }
        if let Some((token, _)) = request.sampling.logit_bias.iter().find(|(token, _)| *token >= vocab) {
            return invalid(format!("token {token} of logit_bias is not below {vocab}"), "logit_bias");
        }
        let prompt_tokens = request.prompt.len() as u32;
        let tokens = u64::from(prompt_tokens) + u64::from(request.max_tokens);
        let kv_tokens = self.model.limits().kv_tokens;
        if tokens > u64::from(card.context_tokens) || sequence::most_tokens(request) > kv_tokens {
            return Err(GenerateError::ContextExceeded {
                prompt_tokens,
                max_tokens: request.max_tokens,
                context_tokens: u64::from(card.context_tokens).min(kv_tokens) as u32,
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
        for sequence in &mut self.running {
            sequence.settle(now);
        }
    }

    /// Takes KV from the youngest sequences until the others' next step fits. The oldest always goes on, since no request
    /// is taken that does not fit alone; those that yield wait in the order in which they came.
    fn preempt(&mut self, summary: &mut StepSummary) {
        let limit = self.model.limits().kv_tokens;
        let taken = |running: &[Sequence]| running.iter().map(Sequence::taken).sum::<u64>();
        while self.running.len() > 1 && taken(&self.running) > limit {
            let youngest = (0..self.running.len()).max_by_key(|&index| self.running[index].arrival);
            let Some(index) = youngest else { break };
            let mut sequence = self.running.remove(index);
            self.model.close(sequence.id);
            sequence.restart(SequenceId(self.next_id));
            self.next_id += 1;
            tracing::debug!(id = %sequence.request, kv_tokens = limit, "preempted: the KV is full");
            let place = self.waiting.partition_point(|other| other.arrival < sequence.arrival);
            self.waiting.insert(place, sequence);
            summary.preempted += 1;
        }
    }

    /// Moves from waiting to running whatever the order and the room allow.
    fn admit(&mut self, summary: &mut StepSummary) -> Result<(), ModelError> {
        while let Some(index) = scheduler::next_admitted(&self.waiting, self.room()) {
            let Some(sequence) = self.waiting.remove(index) else { break };
            match self.model.open(sequence.id, sequence.tokens_max()) {
                Ok(()) => {
                    self.running.push(sequence);
                    summary.admitted += 1;
                }
                Err(ModelError::Sequence { message, .. }) => {
                    self.end_later(&sequence, FinishReason::Failed(GenerateError::Engine { message }));
                }
                Err(error @ ModelError::Backend(_)) => {
                    self.waiting.push_front(sequence);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn room(&self) -> Room {
        let limits = self.model.limits();
        let expected: u64 = self.running.iter().map(Sequence::expected).sum();
        Room {
            slots: limits.slots.saturating_sub(self.running.len()),
            kv_tokens: limits.kv_tokens.saturating_sub(expected),
        }
    }

    fn plan(&mut self, now: Instant) -> Plan {
        let slice_s = self.cost.slice_seconds(0, scheduler::SLICE_TOKENS_MIN);
        let pause_max = self.tpot_target + Duration::from_secs_f64(slice_s.min(TARGET_MAX.as_secs_f64()));
        let candidate = |sequence: &Sequence| Candidate {
            decodes: sequence.decodes(),
            start: sequence.computed(),
            pending: sequence.pending(),
            slack_s: sequence.slack_s(now, self.tpot_target, pause_max),
        };
        let candidates: Vec<Candidate> = self.running.iter().map(candidate).collect();
        // A target below what a pass over all rows and one slice takes cannot be met while prompts wait; keeping to it
        // would only run more passes over the weights, with less in each.
        let mut least = StepShape::default();
        for candidate in candidates.iter().filter(|candidate| candidate.decodes) {
            least.add_row(candidate.start + 1);
        }
        least.add_slice(0, scheduler::SLICE_TOKENS_MIN);
        let budgets = Budgets {
            tpot_s: self.tpot_target.as_secs_f64().max(self.cost.seconds(least)),
            // A request that arrives just after such a step began can still meet its target.
            prefill_only_s: self.ttft_target.as_secs_f64() / 2.0,
        };
        self.scheduler.plan(now, &candidates, &self.cost, budgets)
    }

    /// Runs the model on a plan and takes in what it drew.
    fn pass(
        &mut self,
        now: Instant,
        plan: &Plan,
        events: &mut Vec<(RequestId, TokenEvent)>,
        summary: &mut StepSummary,
    ) -> Result<(), ModelError> {
        let slices: Vec<_> =
            plan.parts.iter().map(|part| self.running[part.index].slice(part.tokens)).collect();
        let sampling = slices.iter().filter(|slice| slice.sample.is_some()).count();
        let drawn = match self.model.step(&slices) {
            Ok(drawn) if drawn.len() == sampling => drawn,
            Ok(drawn) => {
                let message = format!("{} tokens were drawn for {sampling} rows", drawn.len());
                return Err(ModelError::Backend(message));
            }
            Err(ModelError::Sequence { sequence, message }) => return self.fail_one(sequence, message),
            Err(error @ ModelError::Backend(_)) => return Err(error),
        };
        self.passed = Some((now, plan.shape));
        summary.expected_s = self.cost.seconds(plan.shape);
        let mut drawn = drawn.into_iter();
        let mut finished = Vec::new();
        for part in &plan.parts {
            let sequence = &mut self.running[part.index];
            if sequence.decodes() {
                summary.rows += 1;
            } else {
                summary.slices += 1;
                summary.prefill_tokens += part.tokens as u32;
            }
            if !sequence.advance(part.tokens) {
                continue;
            }
            let outcome = sequence.draw(drawn.next().expect("as many tokens as slices that sample"));
            if let Some((index, token)) = outcome.token {
                events.push((sequence.request, TokenEvent::Tokens { index, tokens: vec![token] }));
                summary.tokens += 1;
            }
            if let Some(finish) = outcome.end {
                events.push((sequence.request, TokenEvent::Finished(finish)));
                finished.push(sequence.id);
            }
        }
        for &id in &finished {
            self.model.close(id);
        }
        self.running.retain(|sequence| !finished.contains(&sequence.id));
        summary.finished += finished.len() as u32;
        Ok(())
    }

    /// Ends the one sequence that made a pass fail. The others' state is as before it; they go on in the next step.
    fn fail_one(&mut self, id: SequenceId, message: String) -> Result<(), ModelError> {
        let Some(index) = self.running.iter().position(|sequence| sequence.id == id) else {
            return Err(ModelError::Backend(format!("{message} (of {id:?}, which is not running)")));
        };
        let sequence = self.running.remove(index);
        self.model.close(id);
        self.end_later(&sequence, FinishReason::Failed(GenerateError::Engine { message }));
        Ok(())
    }

    /// Ends everything. The model is not touched any more.
    fn fail(&mut self, error: ModelError) {
        tracing::error!(%error, running = self.running.len(), waiting = self.waiting.len(), "the engine failed");
        let all: Vec<Sequence> = self.running.drain(..).chain(self.waiting.drain(..)).collect();
        for sequence in &all {
            let failed = GenerateError::Engine { message: error.to_string() };
            self.end_later(sequence, FinishReason::Failed(failed));
        }
        self.state = State::Failed(error);
    }

    fn end_later(&mut self, sequence: &Sequence, reason: FinishReason) {
        self.ended.push((sequence.request, TokenEvent::Finished(sequence.finish(reason))));
    }

    /// Seconds until the first running sequence will have ended, at the latest.
    fn seconds_to_free_slot(&self) -> f64 {
        let rows = self.running.len().max(1);
        let rates = self.cost.rates();
        let step_s = f64::from(rates.decode_step_s) + f64::from(rates.decode_row_s) * (rows - 1) as f64;
        let left = |sequence: &Sequence| {
            self.cost.slice_seconds(sequence.computed(), sequence.prefill_left())
                + step_s * f64::from(sequence.output_left())
        };
        self.running.iter().map(left).fold(RETRY_AFTER_MAX_S, f64::min)
    }
}
