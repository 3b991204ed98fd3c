//! [`Sequence`]: everything the engine knows of one request, from its submission to its last event.
//!
//! Prompt and output lie in one list of tokens. Of these the first `submitted` are in the model's KV once the steps in
//! flight have run, and the first `computed` are there already. Up to two more tokens are being drawn and not known yet
//! (`ahead`). A prompt being read, a row being decoded and a row to be read again are the same thing with more or fewer
//! tokens to go.

use crate::{
    BlockId, DrawnToken, Input, RowSampling, Scoring, SequenceId, Slice,
    grammar::{Matcher, MatcherError, TokenMask},
    memory::Held,
    sessions::SessionKey,
};
use std::time::{Duration, Instant};
use types::{
    BLOCK_TOKENS, ClientId, Finish, FinishReason, GenerateDraft, GenerateError, GenerateRequest, ModelCard,
    Priority, RequestId, SamplingParams, TokenEvent, TokenId, TokenLogprobs, TokenReport, Usage, limits,
};

/// Output tokens for which an admitted sequence finds room: most answers end within them, while `max_tokens` is often as
/// much as the context holds. A sequence that goes on and finds none left is read again later ([`Sequence::restart`]).
const GROWTH_TOKENS: usize = 512;
/// Tokens of a slice whose log-probabilities are asked for: each has logits of its own, which take half a megabyte with
/// the largest vocabularies.
const SCORED_TOKENS_MAX: usize = 128;

// The first of a prompt comes with those that its first slice tells of.
const _: () = assert!(SCORED_TOKENS_MAX < limits::LOGPROB_TOKENS_MAX);

/// Blocks of KV that a request may come to: its whole prompt and output.
pub(crate) fn most_blocks(request: &GenerateRequest) -> usize {
    (request.prompt.len() + request.max_tokens as usize).div_ceil(BLOCK_TOKENS)
}

/// When a sequence's tokens are due.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Targets {
    /// When it came.
    pub(crate) arrived: Instant,
    /// When its first token is due.
    pub(crate) first_due: Instant,
    /// When its prompt is read in good time: a deadline says what may be, not what is aimed at.
    pub(crate) good_due: Instant,
    /// The same where no request waits behind it.
    pub(crate) calm_due: Instant,
    /// Time from token to token.
    pub(crate) tpot: Duration,
}

/// One request inside the engine.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) request: RequestId,
    pub(crate) client: ClientId,
    pub(crate) priority: Priority,
    pub(crate) session: Option<SessionKey>,
    pub(crate) targets: Targets,
    /// Its KV.
    pub(crate) held: Held,
    /// Prompt, then output.
    tokens: Vec<TokenId>,
    prompt_tokens: usize,
    /// Output tokens that came with the request.
    given: u32,
    /// Tokens in the KV once all steps in flight have run.
    submitted: usize,
    /// Tokens in the KV by steps that were collected.
    computed: usize,
    /// Tokens being drawn by steps in flight.
    ahead: u32,
    /// Index of the last of these among what its step draws.
    ahead_index: usize,
    /// Grows with each restart.
    epoch: u32,
    /// Prompt tokens that a cache had when it was first admitted; none before.
    cached: Option<u32>,
    max_tokens: u32,
    sampling: SamplingParams,
    /// Tokens that end the text: the request's own and, unless ignored, the model's; these also where a grammar says when
    /// it ends.
    ends: Vec<TokenId>,
    /// Where its output is in its grammar; boxed, as most have none.
    matcher: Option<Box<Matcher>>,
    /// Output tokens before one that ends the text.
    min_tokens: u32,
    /// End a text only where its grammar leaves nothing else.
    ignore_eos: bool,
    report: TokenReport,
    /// Tokens of the prompt that were told of, where asked for.
    told: usize,
    emitted: Emitted,
}

/// When the last token came out.
#[derive(Debug, Clone, Copy)]
enum Emitted {
    Never,
    /// In the step whose end is not known yet.
    ThisStep,
    At(Instant),
}

/// What a drawn token led to.
#[derive(Debug)]
pub(crate) struct Drawn {
    /// Prompt tokens that a cache had, where the token is the first one drawn here.
    pub(crate) started: Option<u32>,
    /// Index and token to pass on; none where the text ended before it.
    pub(crate) token: Option<(u32, DrawnToken)>,
    pub(crate) end: Option<Finish>,
}

/// A slice that was submitted, to be taken in when its step is collected.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Submitted {
    pub(crate) id: SequenceId,
    epoch: u32,
    start: usize,
    end: usize,
    pub(crate) samples: bool,
    pub(crate) scores: bool,
}

impl Sequence {
    /// `held`: nothing yet, of prompt and output. `matcher`: behind the output that came with the request.
    pub(crate) fn new(
        id: SequenceId,
        request: GenerateRequest,
        card: &ModelCard,
        matcher: Option<Matcher>,
        held: Held,
        targets: Targets,
    ) -> Self {
        let draft = GenerateDraft::from(request);
        let mut ends = draft.stop_tokens;
        if !draft.ignore_eos || matcher.is_some() {
            ends.extend_from_slice(&card.eos_tokens);
        }
        let client = draft.service.client;
        let (prompt_tokens, given) = (draft.prompt.len(), draft.output.len() as u32);
        let mut tokens = draft.prompt;
        tokens.extend(draft.output);
        Self {
            id,
            request: draft.id,
            client,
            priority: draft.service.priority,
            session: draft.cache.session.map(|session| (client, session)),
            targets,
            held,
            prompt_tokens,
            given,
            tokens,
            submitted: 0,
            computed: 0,
            ahead: 0,
            ahead_index: 0,
            epoch: 0,
            cached: None,
            max_tokens: draft.max_tokens,
            sampling: draft.sampling,
            ends,
            matcher: matcher.map(Box::new),
            min_tokens: draft.rules.min_tokens,
            ignore_eos: draft.ignore_eos,
            report: draft.report,
            told: 0,
            emitted: Emitted::Never,
        }
    }

    /// Who came before whom.
    pub(crate) fn arrival(&self) -> u64 {
        self.id.0
    }

    /// Prompt and output as far as known.
    pub(crate) fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Its KV, its tokens, and how many of these are in the KV.
    pub(crate) fn kv(&mut self) -> (&mut Held, &[TokenId], usize) {
        (&mut self.held, &self.tokens, self.computed)
    }

    /// Tokens whose KV is there already.
    pub(crate) fn computed(&self) -> usize {
        self.computed
    }

    /// Tokens whose KV is there once all steps in flight have run.
    pub(crate) fn submitted(&self) -> usize {
        self.submitted
    }

    /// Blocks that it is expected to take.
    pub(crate) fn expected_blocks(&self) -> usize {
        let growth = (self.output_left() as usize).min(GROWTH_TOKENS);
        (self.total() + growth).div_ceil(BLOCK_TOKENS)
    }

    /// Whether a token of it is being drawn.
    pub(crate) fn is_ahead(&self) -> bool {
        self.ahead > 0
    }

    /// Begins with what the cache gave it; returns the prompt tokens to pay for, once.
    pub(crate) fn begin(&mut self, adopted: usize) -> usize {
        (self.submitted, self.computed) = (adopted, adopted);
        if self.cached.is_some() {
            return 0;
        }
        let cached = adopted.min(self.prompt_tokens);
        self.cached = Some(cached as u32);
        self.prompt_tokens - cached
    }

    /// Forgets its KV, which was given up: all its tokens are to be read again. What it draws stays the same.
    pub(crate) fn restart(&mut self) {
        self.epoch += 1;
        (self.submitted, self.computed) = (0, 0);
    }

    /// Tokens that are known, or will be, and not submitted yet.
    pub(crate) fn pending(&self) -> usize {
        self.total() - self.submitted
    }

    /// Tokens of which its next slice may consist.
    pub(crate) fn slice_tokens_max(&self) -> usize {
        if self.report.prompt_logprobs.is_some() { SCORED_TOKENS_MAX } else { usize::MAX }
    }

    /// Whether all it needs next is the token after its last one.
    pub(crate) fn decodes(&self) -> bool {
        self.pending() == 1 && self.output_tokens() > 0
    }

    /// Whether a step can do something for it: not where its last token is being drawn.
    pub(crate) fn is_runnable(&self) -> bool {
        self.output_left() > 0
    }

    /// Tokens still to be read.
    pub(crate) fn prefill_left(&self) -> usize {
        if self.decodes() { 0 } else { self.pending() }
    }

    /// Tokens that it may still generate, beyond those being drawn.
    pub(crate) fn output_left(&self) -> u32 {
        self.max_tokens - self.output_tokens()
    }

    /// Seconds until the next token is due, for a step that begins at `at`; negative when it is late.
    ///
    /// Token j is due at `first_due + j·tpot` (FairBatching, arXiv 2510.14392), so time not used by early tokens may be
    /// spent on others' prompts; but never so much that the row pauses for longer than `pause_max`.
    pub(crate) fn slack_s(&self, at: Instant, pause_max: Duration) -> f64 {
        let mut due = self.targets.first_due + self.targets.tpot * (self.output_tokens() - self.given);
        let last = match self.emitted {
            // What is being drawn comes out when the step before ends.
            _ if self.ahead > 0 => Some(at),
            Emitted::At(last) => Some(last),
            Emitted::Never | Emitted::ThisStep => None,
        };
        if let Some(last) = last {
            due = due.min(last + pause_max);
        }
        seconds_until(due, at)
    }

    /// Seconds until its first token is due at `now`; negative when it is late.
    pub(crate) fn wait_left_s(&self, now: Instant) -> f64 {
        seconds_until(self.targets.first_due, now)
    }

    /// Seconds until its prompt is read in good time, later if no request waits behind it; negative afterwards.
    pub(crate) fn good_time_s(&self, now: Instant, others_wait: bool) -> f64 {
        seconds_until(if others_wait { self.targets.good_due } else { self.targets.calm_due }, now)
    }

    /// Its part of a step, over its next `tokens` pending tokens, for which it has the blocks.
    pub(crate) fn slice(&self, tokens: usize) -> Slice<'_> {
        let end = self.submitted + tokens;
        let (prompt, output) = self.tokens.split_at(self.prompt_tokens);
        let position = self.output_tokens();
        let sample = RowSampling {
            params: &self.sampling,
            position,
            prompt,
            output,
            masked: self.matcher.is_some() || position < self.min_tokens,
            logprobs: self.report.logprobs,
        };
        let input = match self.tokens.get(self.submitted..end) {
            Some(tokens) => Input::Tokens(tokens),
            None => Input::Drawn(self.ahead_index),
        };
        Slice {
            sequence: self.id,
            blocks: self.blocks(),
            start: self.submitted,
            input,
            sample: (end == self.total()).then_some(sample),
            score: self.scoring(end),
        }
    }

    /// What its next slice, up to `end`, is to tell of the prompt.
    fn scoring(&self, end: usize) -> Option<Scoring<'_>> {
        let top = self.report.prompt_logprobs?;
        let past = (end + 1).min(self.prompt_tokens);
        let targets = self.tokens.get(self.submitted + 1..past).filter(|targets| !targets.is_empty())?;
        (past > self.told).then_some(Scoring { targets, top })
    }

    /// Notes that such a slice was submitted; `drawn_index` is that of the next token that the step draws.
    pub(crate) fn submit(&mut self, tokens: usize, drawn_index: usize) -> Submitted {
        let (start, scores) = (self.submitted, self.scoring(self.submitted + tokens).is_some());
        self.submitted += tokens;
        let samples = self.submitted == self.total();
        if samples {
            self.ahead += 1;
            self.ahead_index = drawn_index;
        }
        Submitted { id: self.id, epoch: self.epoch, start, end: self.submitted, samples, scores }
    }

    /// What may be drawn next, after all that is known.
    pub(crate) fn mask(&mut self, vocab_size: u32) -> Result<TokenMask, MatcherError> {
        let early = self.known_output() < self.min_tokens || self.ignore_eos;
        let Some(matcher) = &mut self.matcher else {
            let mut mask = TokenMask::all(vocab_size);
            if early {
                self.ends.iter().for_each(|&end| mask.forbid(end));
            }
            // Who ends a text with every token of the vocabulary has an answer of none.
            return Ok(if mask.is_empty() { TokenMask::all(vocab_size) } else { mask });
        };
        let mut mask = matcher.mask()?;
        if early {
            let mut longer = mask.clone();
            self.ends.iter().for_each(|&end| longer.forbid(end));
            // A text that is complete ends, however short it is.
            mask = if longer.is_empty() { mask } else { longer };
        } else if matcher.may_end() {
            self.ends.iter().for_each(|&end| mask.allow(end));
        }
        Ok(mask)
    }

    /// What to tell of the prompt's tokens, of which a slice brought so much.
    pub(crate) fn tell(&mut self, part: &Submitted, scores: Vec<TokenLogprobs>) -> Option<TokenEvent> {
        self.report.prompt_logprobs?;
        let index = self.told as u32;
        let first = if self.told == 0 { Some(None) } else { None };
        // What is read again was told of before.
        let known = self.told.saturating_sub(part.start + 1);
        let logprobs: Vec<_> = first.into_iter().chain(scores.into_iter().skip(known).map(Some)).collect();
        self.told += logprobs.len();
        (!logprobs.is_empty()).then_some(TokenEvent::Prompt { index, logprobs })
    }

    /// Notes that a submitted slice has been computed; false where its KV was given up since.
    pub(crate) fn compute(&mut self, part: &Submitted) -> bool {
        let current = part.epoch == self.epoch;
        if current {
            self.computed = part.end;
        }
        current
    }

    /// Takes the token drawn after its last one.
    pub(crate) fn draw(&mut self, drawn: DrawnToken) -> Drawn {
        let token = drawn.token;
        self.ahead -= 1;
        let index = self.known_output();
        let started = (index == self.given).then(|| self.cached.unwrap_or(0));
        if self.ends.contains(&token) {
            let mut end = self.finish(FinishReason::Stop);
            end.usage.completion_tokens += 1;
            return Drawn { started: None, token: None, end: Some(end) };
        }
        if let Some(Err(error)) = self.matcher.as_mut().map(|matcher| matcher.consume(token)) {
            let failed = FinishReason::Failed(GenerateError::Engine { message: error.to_string() });
            return Drawn { started: None, token: None, end: Some(self.finish(failed)) };
        }
        self.tokens.push(token);
        self.emitted = Emitted::ThisStep;
        let complete = self.matcher.as_ref().is_some_and(|matcher| matcher.is_complete());
        let end = if complete {
            Some(self.finish(FinishReason::Stop))
        } else {
            (self.known_output() == self.max_tokens).then(|| self.finish(FinishReason::Length))
        };
        Drawn { started, token: Some((index, drawn)), end }
    }

    /// Tells when the step that was just collected ended.
    pub(crate) fn settle(&mut self, now: Instant) {
        if matches!(self.emitted, Emitted::ThisStep) {
            if self.known_output() == self.given + 1 {
                // A first token that came late is not made up for by hurrying those after it.
                self.targets.first_due = self.targets.first_due.max(now);
            }
            self.emitted = Emitted::At(now);
        }
    }

    /// Its last event's content, were it to end now.
    pub(crate) fn finish(&self, reason: FinishReason) -> Finish {
        let usage = Usage {
            prompt_tokens: self.prompt_tokens as u32,
            cached_tokens: self.cached.unwrap_or(0),
            completion_tokens: self.known_output(),
            ..Usage::default()
        };
        Finish { reason, usage }
    }

    fn blocks(&self) -> &[BlockId] {
        self.held.blocks()
    }

    /// Tokens known and being drawn.
    fn total(&self) -> usize {
        self.tokens.len() + self.ahead as usize
    }

    fn output_tokens(&self) -> u32 {
        self.known_output() + self.ahead
    }

    fn known_output(&self) -> u32 {
        (self.tokens.len() - self.prompt_tokens) as u32
    }
}

/// Negative for what has passed.
fn seconds_until(due: Instant, now: Instant) -> f64 {
    if due >= now { (due - now).as_secs_f64() } else { -(now - due).as_secs_f64() }
}
