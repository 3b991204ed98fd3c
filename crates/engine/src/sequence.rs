//! [`Sequence`]: everything the engine knows of one request, from its submission to its last event.
//!
//! Prompt and output lie in one list of tokens. Of these the first `submitted` are in the model's KV once the steps in
//! flight have run, and the first `computed` are there already. Up to two more tokens are being drawn and not known yet
//! (`ahead`). Where tokens are guessed ahead, they lie behind the known ones until their step is collected. A prompt being
//! read, a row being decoded and a row to be read again are the same thing with more or fewer
//! tokens to go.

mod guesses;

use crate::{
    BlockId, DrawnToken, Input, RowSampling, Scoring, SequenceId, Slice,
    grammar::{Matcher, MatcherError, TokenMask},
    memory::Held,
    sessions::SessionKey,
    speculation::Why,
};
use std::time::{Duration, Instant};
use types::{
    BLOCK_TOKENS, BlockHash, ClientId, Finish, FinishReason, GenerateDraft, GenerateError, GenerateRequest,
    ModelCard, Priority, RequestId, SamplingParams, Speculation, TokenEvent, TokenId, TokenLogprobs,
    TokenReport, Usage, limits,
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
    /// Prompt, then output, then guesses.
    tokens: Vec<TokenId>,
    /// How many of these are guesses, and where they come from.
    drafts: usize,
    why: Option<Why>,
    /// What a source says of the token that is being drawn.
    expected: Option<(TokenId, Why)>,
    /// How it may be guessed.
    speculation: Speculation,
    /// Whose answers may say what it goes on with.
    salt: BlockHash,
    accepted_drafts: u32,
    rejected_drafts: u32,
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

/// What drawn tokens led to.
#[derive(Debug)]
pub(crate) struct Drawn {
    /// Prompt tokens that a cache had, where the first one drawn here is among them.
    pub(crate) started: Option<u32>,
    /// Index of the first, tokens and what is told of them, to pass on; none where the text ended before.
    pub(crate) tokens: Option<(u32, Vec<TokenId>, Vec<TokenLogprobs>)>,
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
    /// Tokens guessed behind it.
    pub(crate) drafts: usize,
    pub(crate) scores: bool,
}

impl Submitted {
    /// Tokens that its step draws of it.
    pub(crate) fn draws(&self) -> usize {
        if self.samples { self.drafts + 1 } else { 0 }
    }
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
        let salt = draft.cache.root(card.root);
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
            drafts: 0,
            why: None,
            expected: None,
            speculation: draft.speculation,
            salt,
            accepted_drafts: 0,
            rejected_drafts: 0,
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
        &self.tokens[..self.known()]
    }

    /// Its KV, its tokens, and how many of these are in the KV.
    pub(crate) fn kv(&mut self) -> (&mut Held, &[TokenId], usize) {
        let known = self.known();
        (&mut self.held, &self.tokens[..known], self.computed)
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

    /// Whether a step can do something for it: not where its last token is being drawn, nor while its guesses may come true.
    pub(crate) fn is_runnable(&self) -> bool {
        self.output_left() > 0 && self.drafts == 0
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
            // What is being drawn, or was just now, comes out when the step before ends.
            _ if self.ahead > 0 => Some(at),
            Emitted::ThisStep => Some(at),
            Emitted::At(last) => Some(last),
            Emitted::Never => None,
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

    /// Its part of a step, over its next `tokens` pending tokens and what is guessed behind them, for which it has the blocks.
    pub(crate) fn slice(&self, tokens: usize) -> Slice<'_> {
        let end = self.submitted + tokens;
        let samples = end == self.total();
        let drafts = if samples { self.drafts } else { 0 };
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
        let input = match self.tokens.get(self.submitted..end + drafts) {
            Some(tokens) => Input::Tokens(tokens),
            None => Input::Drawn(self.ahead_index),
        };
        Slice {
            sequence: self.id,
            blocks: self.blocks(),
            start: self.submitted,
            input,
            sample: samples.then_some(sample),
            drafts,
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
        let (end, drafts) = (self.submitted, if samples { self.drafts } else { 0 });
        Submitted { id: self.id, epoch: self.epoch, start, end, samples, drafts, scores }
    }

    /// What may be drawn next, after all that is known, and then after each guess.
    pub(crate) fn masks(&mut self, vocab_size: u32) -> Result<Vec<TokenMask>, MatcherError> {
        let mut masks = vec![self.mask(vocab_size, 0)?];
        for at in 0..self.drafts {
            let token = self.tokens[self.known() + at];
            if let Some(matcher) = &mut self.matcher {
                matcher.consume(token)?;
            }
            masks.push(self.mask(vocab_size, at + 1)?);
        }
        if let Some(matcher) = self.matcher.as_mut().filter(|_| self.drafts > 0) {
            matcher.rollback(self.drafts)?;
        }
        Ok(masks)
    }

    /// What may be drawn behind so many guesses, which the matcher has taken.
    fn mask(&mut self, vocab_size: u32, guessed: usize) -> Result<TokenMask, MatcherError> {
        let short = self.known_output() + (guessed as u32) < self.min_tokens;
        let early = short || self.ignore_eos;
        let Some(matcher) = &mut self.matcher else {
            let mut mask = TokenMask::all(vocab_size);
            if short {
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

    /// Takes the tokens of a part that was computed: the one after its last one, and those behind guesses that came true, as
    /// far as the text goes. Also says where its guesses came from and how many there were and came true.
    pub(crate) fn draw(&mut self, part: &Submitted, drawn: Vec<DrawnToken>) -> (Drawn, Option<(Why, usize)>) {
        let guesses = self.tokens.split_off(self.known());
        let why = self.why.take();
        self.drafts = 0;
        self.ahead -= 1;
        let mut all = Drawn { started: None, tokens: None, end: None };
        let mut accepted = 0;
        for (at, token) in drawn.into_iter().enumerate() {
            let came_true = guesses.get(at) == Some(&token.token);
            self.take(token, &mut all);
            if all.end.is_some() || !came_true {
                break;
            }
            accepted += 1;
            if part.epoch == self.epoch {
                // What was guessed is in the KV already.
                self.submitted += 1;
                self.computed += 1;
            }
        }
        self.accepted_drafts += accepted as u32;
        self.rejected_drafts += (part.drafts - accepted) as u32;
        if let Some(end) = &mut all.end {
            // Ended before the last guesses were counted.
            (end.usage.accepted_drafts, end.usage.rejected_drafts) =
                (self.accepted_drafts, self.rejected_drafts);
        }
        (all, why.map(|why| (why, accepted)))
    }

    fn take(&mut self, drawn: DrawnToken, all: &mut Drawn) {
        let token = drawn.token;
        let index = self.known_output();
        if self.ends.contains(&token) {
            let mut end = self.finish(FinishReason::Stop);
            end.usage.completion_tokens += 1;
            all.end = Some(end);
            return;
        }
        if let Some(Err(error)) = self.matcher.as_mut().map(|matcher| matcher.consume(token)) {
            let failed = FinishReason::Failed(GenerateError::Engine { message: error.to_string() });
            all.end = Some(self.finish(failed));
            return;
        }
        self.tokens.push(token);
        if index == self.given {
            all.started = Some(self.cached.unwrap_or(0));
        }
        let (_, tokens, logprobs) = all.tokens.get_or_insert((index, Vec::new(), Vec::new()));
        tokens.push(token);
        logprobs.extend(drawn.logprobs);
        self.emitted = Emitted::ThisStep;
        let complete = self.matcher.as_ref().is_some_and(|matcher| matcher.is_complete());
        all.end = if complete {
            Some(self.finish(FinishReason::Stop))
        } else {
            (self.known_output() == self.max_tokens).then(|| self.finish(FinishReason::Length))
        };
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
            accepted_drafts: self.accepted_drafts,
            rejected_drafts: self.rejected_drafts,
        };
        Finish { reason, usage }
    }

    fn blocks(&self) -> &[BlockId] {
        self.held.blocks()
    }

    /// Tokens known.
    fn known(&self) -> usize {
        self.tokens.len() - self.drafts
    }

    /// Tokens known and being drawn.
    fn total(&self) -> usize {
        self.known() + self.ahead as usize
    }

    fn output_tokens(&self) -> u32 {
        self.known_output() + self.ahead
    }

    fn known_output(&self) -> u32 {
        (self.known() - self.prompt_tokens) as u32
    }
}

/// Negative for what has passed.
fn seconds_until(due: Instant, now: Instant) -> f64 {
    if due >= now { (due - now).as_secs_f64() } else { -(now - due).as_secs_f64() }
}
