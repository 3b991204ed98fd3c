//! What a [`super::FakeModel`] is like: how long its steps take, and which text each request gets.

use engine::{
    ModelLimits, Slice,
    grammar::{Matcher, TokenMask, Vocabulary},
};
use std::{ops::RangeInclusive, time::Duration};
use types::{FinishReason, GenerateRequest, SamplingParams, TokenId, TokenLogprobs};

/// The token that ends a text.
pub(super) const EOS: TokenId = 0;

/// How long a step takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepCost {
    /// Of every step.
    pub base: Duration,
    /// Of a step with prompt tokens, whatever their number.
    pub slices: Duration,
    /// Of each prompt token.
    pub prefill_token: Duration,
    /// Of each decode row.
    pub row: Duration,
    /// Of each token guessed ahead of one.
    pub draft: Duration,
    /// Of each 1024 tokens of KV that a decode row, or a tile of 32 prompt tokens, attends to.
    pub kv_1024: Duration,
    /// What the host takes to plan a step, which the device waits for where no other step is in flight.
    pub host: Duration,
    /// Steps take up to this share more or less; which, depends on the step's number only.
    pub jitter: f64,
}

impl StepCost {
    /// A Mac with a model of a few billion parameters: 20 ms a step, 1 ms a prompt token.
    pub fn mac() -> Self {
        Self {
            base: Duration::from_millis(20),
            slices: Duration::ZERO,
            prefill_token: Duration::from_millis(1),
            row: Duration::from_millis(1),
            draft: Duration::from_micros(300),
            kv_1024: Duration::from_micros(200),
            host: Duration::ZERO,
            jitter: 0.05,
        }
    }

    /// No time at all.
    pub fn none() -> Self {
        let zero = Duration::ZERO;
        Self {
            base: zero,
            slices: zero,
            prefill_token: zero,
            row: zero,
            draft: zero,
            kv_1024: zero,
            host: zero,
            jitter: 0.0,
        }
    }

    pub(super) fn seconds(&self, slices: &[Slice<'_>], number: u64) -> f64 {
        let mut seconds = self.base.as_secs_f64();
        if !slices.iter().all(is_row) {
            seconds += self.slices.as_secs_f64();
        }
        for slice in slices {
            let (start, tokens) = (slice.start as f64, slice.input.count() as f64);
            let (attended, of_tokens) = if is_row(slice) {
                (start + 1.0, self.row.as_secs_f64() + (tokens - 1.0) * self.draft.as_secs_f64())
            } else {
                (tokens / 32.0 * (start + tokens / 2.0), tokens * self.prefill_token.as_secs_f64())
            };
            seconds += of_tokens + attended / 1024.0 * self.kv_1024.as_secs_f64();
        }
        let share = (mix(number) % 2001) as f64 / 1000.0 - 1.0;
        seconds * (1.0 + share * self.jitter)
    }
}

/// What a [`super::FakeModel`] is like.
#[derive(Debug, Clone)]
pub struct FakeSettings {
    /// The name that requests ask for.
    pub name: String,
    /// Tokens of prompt and output together.
    pub context_tokens: u32,
    /// Tokens in its vocabulary; at least 3. Token 0 ends a text.
    pub vocab_size: u32,
    /// What it holds.
    pub limits: ModelLimits,
    /// How long it takes.
    pub cost: StepCost,
    /// Stages that compute different steps at a time, each an equal part; one is a device that looks ahead.
    pub stages: usize,
    /// Position in the output at which the text ends, drawn from this range by prompt and seed; none: it never does.
    pub eos_at: Option<RangeInclusive<u32>>,
}

impl Default for FakeSettings {
    /// A small Mac: 4 slots, 8k tokens of context and 32k of KV, texts that do not end by themselves.
    fn default() -> Self {
        Self {
            name: "fake".to_owned(),
            context_tokens: 8192,
            vocab_size: 1000,
            limits: ModelLimits { slots: 4, blocks: 1024, kv_bytes_per_token: 1024 },
            cost: StepCost::mac(),
            stages: 1,
            eos_at: None,
        }
    }
}

/// What a request's text is.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// The tokens that come out.
    pub tokens: Vec<TokenId>,
    /// Of the tokens drawn here, where asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Of the prompt's tokens, where asked for.
    pub prompt: Vec<Option<TokenLogprobs>>,
    /// How it ends.
    pub reason: FinishReason,
    /// Tokens drawn, with the one that ended the text.
    pub completion_tokens: u32,
}

impl FakeSettings {
    /// What a request must give, whatever runs beside it, as long as nothing is cancelled or fails; with the part of the
    /// answer that it brought.
    pub fn output(&self, request: &GenerateRequest) -> Output {
        self.output_under(request, None)
    }

    /// The same under the request's grammar, compiled for [`FakeSettings::vocabulary`].
    ///
    /// # Panics
    /// Where the answer that the request brought is not in the grammar, or the grammar allows nothing.
    pub fn output_under(&self, request: &GenerateRequest, mut matcher: Option<Matcher>) -> Output {
        let text = self.text(&request.prompt, &request.sampling);
        let ends = |token: TokenId| {
            (token == EOS && (!request.ignore_eos || request.rules.grammar.is_some()))
                || request.stop_tokens.contains(&token)
        };
        let mut output = Output {
            tokens: request.output.clone(),
            logprobs: Vec::new(),
            prompt: self.prompt_logprobs(request),
            reason: FinishReason::Length,
            completion_tokens: 0,
        };
        if let Some(matcher) = &mut matcher {
            output.tokens.iter().for_each(|&token| matcher.consume(token).expect("in the grammar"));
            if matcher.is_complete() {
                output.prompt.clear();
            }
        }
        while (output.tokens.len() as u32) < request.max_tokens {
            if matcher.as_ref().is_some_and(Matcher::is_complete) {
                output.reason = FinishReason::Stop;
                break;
            }
            let position = output.tokens.len() as u32;
            let early = position < request.rules.min_tokens;
            let mut mask = TokenMask::all(self.vocab_size);
            if let Some(matcher) = &mut matcher {
                mask = matcher.mask().expect("something may follow");
                if matcher.may_end() {
                    (0..self.vocab_size).filter(|&token| ends(token)).for_each(|token| mask.allow(token));
                }
            }
            if early || (request.ignore_eos && matcher.is_some()) {
                let mut longer = mask.clone();
                (0..self.vocab_size).filter(|&token| ends(token)).for_each(|token| longer.forbid(token));
                mask = if longer.is_empty() { mask } else { longer };
            }
            let token = first_allowed(text.token(position), &mask);
            if ends(token) {
                output.reason = FinishReason::Stop;
                output.completion_tokens = position + 1;
                return output;
            }
            output.tokens.push(token);
            output.logprobs.extend(request.report.logprobs.map(|top| text.logprobs(position, token, top)));
            if let Some(matcher) = &mut matcher {
                matcher.consume(token).expect("allowed");
            }
        }
        if matcher.as_ref().is_some_and(Matcher::is_complete) {
            output.reason = FinishReason::Stop;
        }
        output.completion_tokens = output.tokens.len() as u32;
        output
    }

    fn prompt_logprobs(&self, request: &GenerateRequest) -> Vec<Option<TokenLogprobs>> {
        let Some(top) = request.report.prompt_logprobs else { return Vec::new() };
        let told =
            |(at, &token): (usize, &TokenId)| (at > 0).then(|| scored(self.vocab_size, at, token, top));
        request.prompt.iter().enumerate().map(told).collect()
    }

    /// What its tokens stand for: 1 to 256 for a byte each, the others for two characters of JSON's and letters.
    pub fn vocabulary(&self) -> Vocabulary {
        const CHARS: &[u8] = b"{}[]\":, 0123456789abcdefghijklmnopqrstuvwxyz";
        let word = |token: u32| match token {
            EOS => Vec::new(),
            1..=256 => vec![(token - 1) as u8],
            _ => {
                let pair = (token - 257) as usize;
                vec![CHARS[pair / CHARS.len() % CHARS.len()], CHARS[pair % CHARS.len()]]
            }
        };
        Vocabulary::new((0..self.vocab_size).map(word).collect(), vec![EOS])
    }

    pub(super) fn text(&self, prompt: &[TokenId], sampling: &SamplingParams) -> Text {
        let key = prompt.iter().fold(mix(sampling.seed), |key, &token| mix(key ^ u64::from(token)));
        let eos_at = self.eos_at.as_ref().map(|range| {
            let positions = u64::from(range.end() - range.start()) + 1;
            range.start() + (mix(key) % positions) as u32
        });
        Text { key, eos_at, vocab_size: self.vocab_size }
    }
}

/// A text that depends on prompt and seed.
#[derive(Debug)]
pub(super) struct Text {
    key: u64,
    eos_at: Option<u32>,
    vocab_size: u32,
}

impl Text {
    pub(super) fn token(&self, position: u32) -> TokenId {
        if self.eos_at == Some(position) {
            return EOS;
        }
        1 + (mix(self.key ^ mix(u64::from(position))) % u64::from(self.vocab_size - 1)) as TokenId
    }

    pub(super) fn logprobs(&self, position: u32, token: TokenId, top: u32) -> TokenLogprobs {
        probable(mix(self.key ^ mix(u64::from(position) << 32)), token, top, self.vocab_size)
    }
}

/// Made up, of a token at a place.
fn probable(key: u64, token: TokenId, top: u32, vocab_size: u32) -> TokenLogprobs {
    let of = |rank: u32| -(rank as f32) - (key % 1000) as f32 / 1000.0;
    let top = (0..top).map(|rank| (((key % 7919) as u32 + rank) % vocab_size, of(rank))).collect();
    TokenLogprobs { logprob: of((mix(key ^ u64::from(token)) % 50) as u32), top }
}

/// Of a prompt's token at a position.
pub(super) fn scored(vocab_size: u32, position: usize, token: TokenId, top: u32) -> TokenLogprobs {
    probable(mix(position as u64 ^ 0x5c0_4e5), token, top, vocab_size)
}

/// The token that a text has next, or else the next one that may be drawn; the end only where that is meant, or all.
pub(super) fn first_allowed(token: TokenId, mask: &TokenMask) -> TokenId {
    let size = mask.vocab_size();
    let mut from = (0..size).map(|step| (token + step) % size);
    let other = from.find(|&next| mask.allows(next) && (next == token || next != EOS));
    other.or_else(|| mask.allows(EOS).then_some(EOS)).expect("a mask allows a token")
}

pub(super) fn is_row(slice: &Slice<'_>) -> bool {
    let one = |position| slice.input.count() == 1 + slice.drafts && position > 0;
    slice.sample.is_some_and(|sampling| one(sampling.position))
}

/// SplitMix64's step and finalizer (Steele, Lea, Flood 2014).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    for multiplier in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
        z = (z ^ (z >> 30)).wrapping_mul(multiplier);
        z ^= z >> 27;
    }
    z ^ (z >> 31)
}
