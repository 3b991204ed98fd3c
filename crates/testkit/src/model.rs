//! [`FakeModel`]: a model whose text is a hash, whose seconds are virtual, and which panics when its contract is broken.

use crate::VirtualClock;
use engine::{
    BlockId, DrawnToken, Input, Model, ModelError, ModelLimits, Overlap, RowSampling, SequenceId, Slice,
    StepOutput,
    grammar::{Matcher, TokenMask, Vocabulary},
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};
use types::{
    AssetsHash, BLOCK_TOKENS, BlockHash, FinishReason, GenerateRequest, ModelCard, SamplingParams, TokenId,
    TokenLogprobs,
};

/// The token that ends a [`FakeModel`]'s text.
const EOS: TokenId = 0;

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
            jitter: 0.0,
        }
    }

    fn seconds(&self, slices: &[Slice<'_>], number: u64) -> f64 {
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

/// What a [`FakeModel`] is like.
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

    fn text(&self, prompt: &[TokenId], sampling: &SamplingParams) -> Text {
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
struct Text {
    key: u64,
    eos_at: Option<u32>,
    vocab_size: u32,
}

impl Text {
    fn token(&self, position: u32) -> TokenId {
        if self.eos_at == Some(position) {
            return EOS;
        }
        1 + (mix(self.key ^ mix(u64::from(position))) % u64::from(self.vocab_size - 1)) as TokenId
    }

    fn logprobs(&self, position: u32, token: TokenId, top: u32) -> TokenLogprobs {
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
fn scored(vocab_size: u32, position: usize, token: TokenId, top: u32) -> TokenLogprobs {
    probable(mix(position as u64 ^ 0x5c0_4e5), token, top, vocab_size)
}

/// The token that a text has next, or else the next one that may be drawn; the end only where that is meant, or all.
fn first_allowed(token: TokenId, mask: &TokenMask) -> TokenId {
    let size = mask.vocab_size();
    let mut from = (0..size).map(|step| (token + step) % size);
    let other = from.find(|&next| mask.allows(next) && (next == token || next != EOS));
    other.or_else(|| mask.allows(EOS).then_some(EOS)).expect("a mask allows a token")
}

/// A failure to inject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The backend fails when a step is begun.
    Backend,
    /// The backend fails while a step runs.
    Lost,
    /// The step's slice of this index makes it fail (the last one where there are fewer).
    Sequence(usize),
}

/// A step that was run.
#[derive(Debug, Clone, PartialEq)]
pub struct StepRecord {
    /// When it began and ended.
    pub time: (Instant, Instant),
    /// Sequences of decode rows.
    pub rows: Vec<SequenceId>,
    /// Tokens guessed ahead of them.
    pub drafts: usize,
    /// Slices of prompts: sequence, start, tokens.
    pub slices: Vec<(SequenceId, usize, usize)>,
}

#[derive(Debug, Default)]
struct Shared {
    calls: u64,
    faults: BTreeMap<u64, Fault>,
    record: Vec<StepRecord>,
}

/// What a test sees of a [`FakeModel`] that an engine owns.
#[derive(Debug, Clone, Default)]
pub struct FakeHandle(Arc<Mutex<Shared>>);

impl FakeHandle {
    /// Steps that were run, in order.
    pub fn steps(&self) -> Vec<StepRecord> {
        self.lock().record.clone()
    }

    /// Prompt tokens that were computed, in all steps.
    pub fn prefill_tokens(&self) -> usize {
        self.lock().record.iter().flat_map(|step| &step.slices).map(|slice| slice.2).sum()
    }

    /// Makes the `nth` step from now fail; 0 is the next one.
    pub fn inject(&self, nth: u64, fault: Fault) {
        let mut shared = self.lock();
        let call = shared.calls + nth;
        shared.faults.insert(call, fault);
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A token in a block, with its position in its sequence.
type Cell = Option<(usize, TokenId)>;

#[derive(Debug)]
struct Flight {
    /// What the step draws; none where the backend is lost on the way.
    output: Option<StepOutput>,
    /// Rows that wait for a mask: index among those drawn, their text, position and what is to be told.
    masked: Vec<(usize, Row)>,
    end: Instant,
}

/// A row that draws.
#[derive(Debug)]
struct Row {
    text: Text,
    position: u32,
    /// The token guessed before it, where there is one: what the row before it must draw.
    after: Option<TokenId>,
    logprobs: Option<u32>,
    masked: bool,
}

impl Row {
    /// `before`: what the row before it drew, and whether the guesses up to there came true. Behind one that did not, another
    /// text goes on.
    fn draw(&self, before: &mut (TokenId, bool), mask: &TokenMask) -> DrawnToken {
        let (drawn, right) = *before;
        let right = self.after.is_none_or(|guess| right && guess == drawn);
        let position = if right { self.position } else { self.position ^ 0x5555_0000 };
        let token = first_allowed(self.text.token(position), mask);
        *before = (token, right);
        let told = self.logprobs.map(|top| self.text.logprobs(self.position, token, top));
        DrawnToken { token, logprobs: told }
    }
}

/// A model without weights. Its text depends on prompt and seed only; see [`FakeSettings::output`].
///
/// Steps take virtual time, one after another, beginning when they are submitted; with several stages each begins when
/// the one before has left the first of them. It panics when the engine breaks the
/// contract of [`Model`]: blocks that are not there, that two slices write to, or that do not hold what they should
/// when a token is drawn after them; more steps in flight than allowed; steps that name a sequence twice; tokens or
/// sampling state that are not the sequence's; calls after a lost backend.
#[derive(Debug)]
pub struct FakeModel {
    settings: FakeSettings,
    card: ModelCard,
    clock: VirtualClock,
    handle: FakeHandle,
    blocks: Vec<[Cell; BLOCK_TOKENS]>,
    flights: VecDeque<Flight>,
    /// When the last step submitted leaves each stage.
    busy_until: Vec<Instant>,
    lost: bool,
}

impl FakeModel {
    /// A model that moves `clock`, and the handle to it.
    pub fn new(settings: FakeSettings, clock: VirtualClock) -> (Self, FakeHandle) {
        let card = ModelCard {
            name: settings.name.clone(),
            root: BlockHash::root(&[settings.name.as_bytes()]),
            context_tokens: settings.context_tokens,
            vocab_size: settings.vocab_size,
            eos_tokens: vec![EOS],
            assets: AssetsHash([0; 32]),
            created_s: 0,
            kind: types::ModelKind::Generator,
        };
        let handle = FakeHandle::default();
        let model = Self {
            blocks: vec![[None; BLOCK_TOKENS]; settings.limits.blocks],
            busy_until: vec![clock.now(); settings.stages.max(1)],
            settings,
            card,
            clock,
            handle: handle.clone(),
            flights: VecDeque::new(),
            lost: false,
        };
        (model, handle)
    }

    /// The tokens that a slice appends.
    fn input(&self, slice: &Slice<'_>) -> Vec<TokenId> {
        match slice.input {
            Input::Tokens(tokens) => tokens.to_vec(),
            Input::Drawn(index) => {
                assert_eq!(self.settings.stages, 1, "a pipeline does not know what is being drawn");
                let before = self.flights.back().unwrap_or_else(|| {
                    panic!("{:?} goes on from a step that was collected already", slice.sequence)
                });
                // A lost step draws nothing that anybody will see.
                vec![before.output.as_ref().map_or(EOS, |output| output.drawn[index].token)]
            }
        }
    }

    /// Appends a slice's tokens to its blocks; returns those that it wrote to.
    fn append(&mut self, slice: &Slice<'_>, tokens: &[TokenId]) -> BTreeSet<BlockId> {
        assert!(!tokens.is_empty(), "{:?}: an empty slice", slice.sequence);
        let end = slice.start + tokens.len();
        let context = self.card.context_tokens as usize;
        assert!(end <= context, "{:?}: {end} tokens in a context of {context}", slice.sequence);
        let mut written = BTreeSet::new();
        for (position, &token) in (slice.start..).zip(tokens) {
            let block = *slice
                .blocks
                .get(position / BLOCK_TOKENS)
                .unwrap_or_else(|| panic!("{:?}: no block for position {position}", slice.sequence));
            let cells = self.blocks.get_mut(block.0 as usize);
            let cells = cells.unwrap_or_else(|| panic!("{block:?} does not exist"));
            cells[position % BLOCK_TOKENS] = Some((position, token));
            written.insert(block);
        }
        written
    }

    /// How tokens are drawn after what is in the KV of a slice that appended `tokens`.
    fn rows(&self, slice: &Slice<'_>, tokens: &[TokenId]) -> Vec<Row> {
        assert!(slice.drafts < tokens.len(), "{:?}: {} guesses", slice.sequence, slice.drafts);
        let Some(sampling) = slice.sample else {
            assert_eq!(slice.drafts, 0, "{:?}: guesses where nothing is drawn", slice.sequence);
            return Vec::new();
        };
        let late = match slice.input {
            Input::Tokens(_) => &[][..],
            Input::Drawn(_) => tokens,
        };
        assert!(
            late.is_empty() || slice.drafts == 0,
            "{:?}: guesses behind an unknown token",
            slice.sequence
        );
        let known = [sampling.prompt, sampling.output, late].concat();
        assert_eq!(slice.start + tokens.len(), known.len(), "{:?}: tokens are left out", slice.sequence);
        for (position, &token) in known.iter().enumerate() {
            let block = slice.blocks[position / BLOCK_TOKENS];
            let cell = self.blocks[block.0 as usize][position % BLOCK_TOKENS];
            let at = (slice.sequence, position, block);
            assert_eq!(cell, Some((position, token)), "{at:?}: the KV is not prompt and output");
        }
        let first = (sampling.output.len() - slice.drafts + late.len()) as u32;
        let row = |(at, sampling): (usize, RowSampling<'_>)| {
            let position = first + at as u32;
            assert_eq!(sampling.position, position, "{:?}: wrong sampling position", slice.sequence);
            let RowSampling { logprobs, masked, .. } = sampling;
            let text = self.settings.text(sampling.prompt, sampling.params);
            let after = at.checked_sub(1).map(|at| tokens[tokens.len() - slice.drafts + at]);
            Row { text, position, after, logprobs, masked }
        };
        slice.rows().enumerate().map(row).collect()
    }

    /// What a slice tells of its prompt.
    fn scores(&self, slice: &Slice<'_>) -> Option<Vec<TokenLogprobs>> {
        let score = slice.score?;
        let count = slice.input.count();
        assert!(
            (1..=count).contains(&score.targets.len()),
            "{:?}: {} targets",
            slice.sequence,
            score.targets.len()
        );
        let Input::Tokens(tokens) = slice.input else { panic!("{:?}: a score of a row", slice.sequence) };
        let next = tokens[1..].iter().zip(score.targets);
        assert!(next.clone().all(|(token, target)| token == target), "{:?}: other targets", slice.sequence);
        let of = |(at, &token): (usize, &TokenId)| scored(self.card.vocab_size, at, token, score.top);
        Some((slice.start + 1..).zip(score.targets).map(of).collect())
    }
}

impl Model for FakeModel {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn limits(&self) -> ModelLimits {
        self.settings.limits
    }

    fn overlap(&self, rows: usize) -> Overlap {
        match self.settings.stages {
            0 | 1 => Overlap::Lookahead,
            stages => Overlap::Stages { flights: stages, groups: rows.clamp(1, stages) },
        }
    }

    fn submit(&mut self, slices: &[Slice<'_>]) -> Result<(), ModelError> {
        assert!(!self.lost, "a step after the backend was lost");
        assert!(!slices.is_empty(), "a step without slices");
        let slots = self.settings.limits.slots;
        assert!(slices.len() <= slots, "{} slices in {slots} slots", slices.len());
        let most = self.settings.stages.max(2);
        assert!(self.flights.len() < most, "more than {most} steps in flight");
        let distinct: BTreeSet<_> = slices.iter().map(|slice| slice.sequence).collect();
        assert_eq!(distinct.len(), slices.len(), "a step names a sequence twice");
        let (number, fault) = {
            let mut shared = self.handle.lock();
            shared.calls += 1;
            let number = shared.calls - 1;
            (number, shared.faults.remove(&number))
        };
        match fault {
            Some(Fault::Sequence(index)) => {
                let sequence = slices[index.min(slices.len() - 1)].sequence;
                return Err(ModelError::Sequence { sequence, message: "injected".to_owned() });
            }
            Some(Fault::Backend) => {
                self.lost = true;
                return Err(ModelError::Backend("injected".to_owned()));
            }
            Some(Fault::Lost) | None => {}
        }
        let inputs: Vec<_> = slices.iter().map(|slice| self.input(slice)).collect();
        let mut written = BTreeSet::new();
        for (slice, tokens) in slices.iter().zip(&inputs) {
            for block in self.append(slice, tokens) {
                assert!(written.insert(block), "two slices of a step write to {block:?}");
            }
        }
        assert!(self.flights.iter().all(|flight| flight.masked.is_empty()), "a step before it was drawn");
        let rows: Vec<Row> =
            slices.iter().zip(&inputs).flat_map(|(slice, tokens)| self.rows(slice, tokens)).collect();
        let any = TokenMask::all(self.card.vocab_size);
        let mut before = (EOS, true);
        let output = StepOutput {
            drawn: rows.iter().map(|row| row.draw(&mut before, &any)).collect(),
            scores: slices.iter().filter_map(|slice| self.scores(slice)).collect(),
        };
        let output = (fault != Some(Fault::Lost)).then_some(output);
        let masked = rows.into_iter().enumerate().filter(|(_, row)| row.masked).collect();
        let begin = self.busy_until[0].max(self.clock.now());
        let stage_s = self.settings.cost.seconds(slices, number) / self.busy_until.len() as f64;
        let mut end = begin;
        for busy_until in &mut self.busy_until {
            end = end.max(*busy_until) + Duration::from_secs_f64(stage_s);
            *busy_until = end;
        }
        self.flights.push_back(Flight { output, masked, end });
        let (rows, prompts): (Vec<Slice<'_>>, Vec<Slice<'_>>) = slices.iter().copied().partition(is_row);
        self.handle.lock().record.push(StepRecord {
            time: (begin, end),
            rows: rows.iter().map(|slice| slice.sequence).collect(),
            drafts: slices.iter().map(|slice| slice.drafts).sum(),
            slices: prompts.iter().map(|slice| (slice.sequence, slice.start, slice.input.count())).collect(),
        });
        Ok(())
    }

    fn draw(&mut self, masks: &[TokenMask]) -> Result<(), ModelError> {
        let vocab_size = self.card.vocab_size;
        let Some(flight) = self.flights.back_mut() else { panic!("no step is in flight") };
        assert!(!masks.is_empty(), "nothing waits for no masks");
        assert_eq!(masks.len(), flight.masked.len(), "masks for the rows that wait for one");
        let mut before = (EOS, true);
        for ((index, row), mask) in flight.masked.drain(..).zip(masks) {
            assert_eq!(mask.vocab_size(), vocab_size, "a mask of another vocabulary");
            assert!(!mask.is_empty(), "nothing may be drawn");
            if let Some(output) = &mut flight.output {
                output.drawn[index] = row.draw(&mut before, mask);
            }
        }
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, ModelError> {
        assert!(!self.lost, "a step is collected after the backend was lost");
        let Some(flight) = self.flights.pop_front() else { panic!("no step is in flight") };
        self.clock.advance(flight.end.saturating_duration_since(self.clock.now()));
        assert!(flight.masked.is_empty(), "a step is collected before it was drawn");
        flight.output.ok_or_else(|| {
            self.lost = true;
            ModelError::Backend("injected".to_owned())
        })
    }
}

fn is_row(slice: &Slice<'_>) -> bool {
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
