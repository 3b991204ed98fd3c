//! [`Sequence`]: everything the engine knows of one request, from its submission to its last event.
//!
//! Prompt and output lie in one list of tokens, of which the first `computed` are in the model's KV: a prompt being read,
//! a row being decoded and a row to be read again are the same thing with more or fewer tokens to go.

use crate::{RowSampling, SequenceId, Slice};
use std::time::{Duration, Instant};
use types::{
    Finish, FinishReason, GenerateDraft, GenerateRequest, ModelCard, RequestId, SamplingParams, TokenId,
    Usage,
};

/// Reserved KV is a multiple of this many tokens, as models allocate it.
const RESERVE_TOKENS: u64 = 256;

/// Output tokens for which an admitted sequence finds room: most answers end within them, while `max_tokens` is often as
/// much as the context holds. A sequence that goes on and finds none left is read again later ([`Sequence::restart`]).
const GROWTH_TOKENS: u64 = 512;

/// KV tokens that a request may come to: its whole prompt and output.
pub(crate) fn most_tokens(request: &GenerateRequest) -> u64 {
    (request.prompt.len() as u64 + u64::from(request.max_tokens)).next_multiple_of(RESERVE_TOKENS)
}

/// One request inside the engine.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) request: RequestId,
    /// Grows with each request; who comes later yields first.
    pub(crate) arrival: u64,
    /// Prompt, then output.
    tokens: Vec<TokenId>,
    prompt_tokens: usize,
    /// Tokens in the model's KV.
    computed: usize,
    max_tokens: u32,
    sampling: SamplingParams,
    /// Tokens that end the text: the request's own and, unless ignored, the model's.
    ends: Vec<TokenId>,
    /// Deadline of the first token; that of the others counts from here.
    first_due: Instant,
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
    /// Index and token to pass on; none where the text ended before it.
    pub(crate) token: Option<(u32, TokenId)>,
    pub(crate) end: Option<Finish>,
}

impl Sequence {
    pub(crate) fn new(
        id: SequenceId,
        request: GenerateRequest,
        card: &ModelCard,
        first_due: Instant,
    ) -> Self {
        let draft = GenerateDraft::from(request);
        let mut ends = draft.stop_tokens;
        if !draft.ignore_eos {
            ends.extend_from_slice(&card.eos_tokens);
        }
        Self {
            id,
            request: draft.id,
            arrival: id.0,
            prompt_tokens: draft.prompt.len(),
            tokens: draft.prompt,
            computed: 0,
            max_tokens: draft.max_tokens,
            sampling: draft.sampling,
            ends,
            first_due,
            emitted: Emitted::Never,
        }
    }

    /// Tokens that its KV will hold at most.
    pub(crate) fn tokens_max(&self) -> usize {
        self.prompt_tokens + self.max_tokens as usize
    }

    /// KV tokens that it takes, or will once its prompt is read.
    pub(crate) fn taken(&self) -> u64 {
        (self.tokens.len() as u64).next_multiple_of(RESERVE_TOKENS)
    }

    /// KV tokens that it is expected to take.
    pub(crate) fn expected(&self) -> u64 {
        let growth = u64::from(self.output_left()).min(GROWTH_TOKENS);
        (self.tokens.len() as u64 + growth).next_multiple_of(RESERVE_TOKENS)
    }

    /// Forgets its KV: all its tokens are to be read again, as the sequence `id`. What it draws stays the same.
    pub(crate) fn restart(&mut self, id: SequenceId) {
        self.id = id;
        self.computed = 0;
    }

    /// Tokens in the model's KV.
    pub(crate) fn computed(&self) -> usize {
        self.computed
    }

    /// Known tokens that are not in the model's KV yet; at least one.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether all it needs next is the token after its last one.
    pub(crate) fn decodes(&self) -> bool {
        self.pending() == 1 && self.output_tokens() > 0
    }

    /// Prompt tokens still to be read.
    pub(crate) fn prefill_left(&self) -> usize {
        if self.decodes() { 0 } else { self.pending() }
    }

    /// Tokens that it may still generate.
    pub(crate) fn output_left(&self) -> u32 {
        self.max_tokens - self.output_tokens()
    }

    /// Seconds until the next token is due; negative when it is late.
    ///
    /// Token j is due at `first_due + j·tpot` (FairBatching, arXiv 2510.14392), so time not used by early tokens may be
    /// spent on others' prompts; but never so much that the row pauses for longer than `pause_max`.
    pub(crate) fn slack_s(&self, now: Instant, tpot: Duration, pause_max: Duration) -> f64 {
        let due = self.first_due + tpot * self.output_tokens();
        let due = match self.emitted {
            Emitted::At(last) => due.min(last + pause_max),
            Emitted::Never | Emitted::ThisStep => due,
        };
        if due >= now { (due - now).as_secs_f64() } else { -(now - due).as_secs_f64() }
    }

    /// Its part of a step, over its next `tokens` pending tokens.
    pub(crate) fn slice(&self, tokens: usize) -> Slice<'_> {
        let end = self.computed + tokens;
        let (prompt, output) = self.tokens.split_at(self.prompt_tokens);
        let position = self.output_tokens();
        let sample = RowSampling { params: &self.sampling, position, prompt, output };
        Slice {
            sequence: self.id,
            start: self.computed,
            tokens: &self.tokens[self.computed..end],
            sample: (end == self.tokens.len()).then_some(sample),
        }
    }

    /// Notes that `tokens` more are in the KV; says whether that slice drew a token.
    pub(crate) fn advance(&mut self, tokens: usize) -> bool {
        self.computed += tokens;
        self.computed == self.tokens.len()
    }

    /// Takes the token drawn after its last one.
    pub(crate) fn draw(&mut self, token: TokenId) -> Drawn {
        if self.ends.contains(&token) {
            let mut end = self.finish(FinishReason::Stop);
            end.usage.completion_tokens += 1;
            return Drawn { token: None, end: Some(end) };
        }
        let index = self.output_tokens();
        self.tokens.push(token);
        self.emitted = Emitted::ThisStep;
        let end = (self.output_left() == 0).then(|| self.finish(FinishReason::Length));
        Drawn { token: Some((index, token)), end }
    }

    /// Tells when the step that just ran ended.
    pub(crate) fn settle(&mut self, now: Instant) {
        if matches!(self.emitted, Emitted::ThisStep) {
            if self.output_tokens() == 1 {
                // A first token that came late is not made up for by hurrying those after it.
                self.first_due = self.first_due.max(now);
            }
            self.emitted = Emitted::At(now);
        }
    }

    /// Its last event's content, were it to end now.
    pub(crate) fn finish(&self, reason: FinishReason) -> Finish {
        let usage = Usage {
            prompt_tokens: self.prompt_tokens as u32,
            cached_tokens: 0,
            completion_tokens: self.output_tokens(),
        };
        Finish { reason, usage }
    }

    fn output_tokens(&self) -> u32 {
        (self.tokens.len() - self.prompt_tokens) as u32
    }
}
