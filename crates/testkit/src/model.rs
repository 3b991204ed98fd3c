//! [`FakeModel`]: a model whose text is a hash, whose seconds are virtual, and which panics when its contract is broken.

use crate::VirtualClock;
use engine::{Model, ModelError, ModelLimits, SequenceId, Slice};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};
use types::{AssetsHash, BlockHash, FinishReason, GenerateRequest, ModelCard, SamplingParams, TokenId};

/// The token that ends a [`FakeModel`]'s text.
const EOS: TokenId = 0;
/// KV is allocated in multiples of this many tokens, as the real models do.
const KV_STEP_TOKENS: u64 = 256;

/// How long a step takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepCost {
    /// Of every step.
    pub base: Duration,
    /// Of each prompt token.
    pub prefill_token: Duration,
    /// Of each decode row.
    pub row: Duration,
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
            prefill_token: Duration::from_millis(1),
            row: Duration::from_millis(1),
            kv_1024: Duration::from_micros(200),
            jitter: 0.05,
        }
    }

    /// No time at all.
    pub fn none() -> Self {
        let zero = Duration::ZERO;
        Self { base: zero, prefill_token: zero, row: zero, kv_1024: zero, jitter: 0.0 }
    }

    fn seconds(&self, slices: &[Slice<'_>], number: u64) -> f64 {
        let mut seconds = self.base.as_secs_f64();
        for slice in slices {
            let (start, tokens) = (slice.start as f64, slice.tokens.len() as f64);
            let (attended, each) = if is_row(slice) {
                (start + 1.0, self.row)
            } else {
                (tokens / 32.0 * (start + tokens / 2.0), self.prefill_token)
            };
            seconds += tokens * each.as_secs_f64() + attended / 1024.0 * self.kv_1024.as_secs_f64();
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
            limits: ModelLimits { slots: 4, kv_tokens: 32_768, kv_bytes_per_token: 1024 },
            cost: StepCost::mac(),
            eos_at: None,
        }
    }
}

/// What a request's text is.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// The tokens that come out.
    pub tokens: Vec<TokenId>,
    /// How it ends.
    pub reason: FinishReason,
    /// Tokens drawn, with the one that ended the text.
    pub completion_tokens: u32,
}

impl FakeSettings {
    /// What a request must give, whatever runs beside it, as long as nothing is cancelled or fails.
    pub fn output(&self, request: &GenerateRequest) -> Output {
        let text = self.text(&request.prompt, &request.sampling);
        let mut tokens = Vec::new();
        while (tokens.len() as u32) < request.max_tokens {
            let token = text.token(tokens.len() as u32);
            if (token == EOS && !request.ignore_eos) || request.stop_tokens.contains(&token) {
                let completion_tokens = tokens.len() as u32 + 1;
                return Output { tokens, reason: FinishReason::Stop, completion_tokens };
            }
            tokens.push(token);
        }
        let completion_tokens = tokens.len() as u32;
        Output { tokens, reason: FinishReason::Length, completion_tokens }
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
}

/// A failure to inject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The backend fails.
    Backend,
    /// The step's slice of this index makes it fail (the last one where there are fewer).
    Sequence(usize),
    /// The next sequence cannot be opened; at the next `open` whatever the step.
    Open,
}

/// A step that was run.
#[derive(Debug, Clone, PartialEq)]
pub struct StepRecord {
    /// When it began and ended.
    pub time: (Instant, Instant),
    /// Sequences of decode rows.
    pub rows: Vec<SequenceId>,
    /// Slices of prompts: sequence, start, tokens.
    pub slices: Vec<(SequenceId, usize, usize)>,
}

#[derive(Debug, Default)]
struct Shared {
    open: usize,
    opened: u64,
    calls: u64,
    faults: BTreeMap<u64, Fault>,
    fail_open: bool,
    record: Vec<StepRecord>,
}

/// What a test sees of a [`FakeModel`] that an engine owns.
#[derive(Debug, Clone, Default)]
pub struct FakeHandle(Arc<Mutex<Shared>>);

impl FakeHandle {
    /// Sequences that are open.
    pub fn open(&self) -> usize {
        self.lock().open
    }

    /// Sequences that were ever opened.
    pub fn opened(&self) -> u64 {
        self.lock().opened
    }

    /// Steps that were run, in order.
    pub fn steps(&self) -> Vec<StepRecord> {
        self.lock().record.clone()
    }

    /// Makes the `nth` step from now fail; 0 is the next one. [`Fault::Open`] concerns the next `open` instead.
    pub fn inject(&self, nth: u64, fault: Fault) {
        let mut shared = self.lock();
        if fault == Fault::Open {
            shared.fail_open = true;
        } else {
            let call = shared.calls + nth;
            shared.faults.insert(call, fault);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Open {
    tokens_max: usize,
    /// The KV.
    tokens: Vec<TokenId>,
}

/// A model without weights. Its text depends on prompt and seed only; see [`FakeSettings::output`].
///
/// It panics when the engine breaks the contract of [`Model`]: sequences opened twice, not at all or past the limits, gaps,
/// steps that name a sequence twice, tokens or sampling state that are not the sequence's, calls after a lost backend.
#[derive(Debug)]
pub struct FakeModel {
    settings: FakeSettings,
    card: ModelCard,
    clock: VirtualClock,
    handle: FakeHandle,
    open: BTreeMap<SequenceId, Open>,
    closed: BTreeSet<SequenceId>,
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
        };
        let handle = FakeHandle::default();
        let model = Self {
            settings,
            card,
            clock,
            handle: handle.clone(),
            open: BTreeMap::new(),
            closed: BTreeSet::new(),
            lost: false,
        };
        (model, handle)
    }

    /// The token after what is in the KV of a slice's sequence.
    fn draw(&self, slice: &Slice<'_>) -> Option<TokenId> {
        let sampling = slice.sample?;
        let kv = &self.open[&slice.sequence].tokens;
        let known = [sampling.prompt, sampling.output].concat();
        assert_eq!(*kv, known, "{:?}: the KV is not prompt and output", slice.sequence);
        let position = sampling.output.len() as u32;
        assert_eq!(sampling.position, position, "{:?}: wrong sampling position", slice.sequence);
        Some(self.settings.text(sampling.prompt, sampling.params).token(position))
    }
}

impl Model for FakeModel {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn limits(&self) -> ModelLimits {
        self.settings.limits
    }

    fn open(&mut self, sequence: SequenceId, tokens_max: usize) -> Result<(), ModelError> {
        assert!(!self.lost, "open of {sequence:?} after the backend was lost");
        assert!(!self.closed.contains(&sequence), "{sequence:?} was used before");
        if std::mem::take(&mut self.handle.lock().fail_open) {
            self.closed.insert(sequence);
            return Err(ModelError::Sequence { sequence, message: "injected into open".to_owned() });
        }
        let previous = self.open.insert(sequence, Open { tokens_max, tokens: Vec::new() });
        assert!(previous.is_none(), "{sequence:?} was opened twice");
        assert!(tokens_max > 0 && tokens_max <= self.card.context_tokens as usize, "{tokens_max} tokens");
        let slots = self.settings.limits.slots;
        assert!(self.open.len() <= slots, "{} sequences in {slots} slots", self.open.len());
        let mut shared = self.handle.lock();
        shared.open += 1;
        shared.opened += 1;
        Ok(())
    }

    fn step(&mut self, slices: &[Slice<'_>]) -> Result<Vec<TokenId>, ModelError> {
        assert!(!self.lost, "a step after the backend was lost");
        assert!(!slices.is_empty(), "a step without slices");
        let distinct: BTreeSet<_> = slices.iter().map(|slice| slice.sequence).collect();
        assert_eq!(distinct.len(), slices.len(), "a step names a sequence twice");
        let number = {
            let mut shared = self.handle.lock();
            shared.calls += 1;
            shared.calls - 1
        };
        let fault = self.handle.lock().faults.remove(&number);
        match fault {
            Some(Fault::Sequence(index)) => {
                let sequence = slices[index.min(slices.len() - 1)].sequence;
                return Err(ModelError::Sequence { sequence, message: "injected".to_owned() });
            }
            Some(Fault::Backend | Fault::Open) => {
                self.lost = true;
                return Err(ModelError::Backend("injected".to_owned()));
            }
            None => {}
        }
        for slice in slices {
            let open = self.open.get_mut(&slice.sequence);
            let open = open.unwrap_or_else(|| panic!("a step of {:?}, which is not open", slice.sequence));
            assert!(!slice.tokens.is_empty(), "{:?}: an empty slice", slice.sequence);
            assert_eq!(slice.start, open.tokens.len(), "{:?}: a gap or an overlap", slice.sequence);
            open.tokens.extend_from_slice(slice.tokens);
            let (tokens, tokens_max) = (open.tokens.len(), open.tokens_max);
            assert!(tokens <= tokens_max, "{:?}: {tokens} tokens of {tokens_max}", slice.sequence);
        }
        let held = |open: &Open| (open.tokens.len() as u64).next_multiple_of(KV_STEP_TOKENS);
        let (held, most): (u64, _) = (self.open.values().map(held).sum(), self.settings.limits.kv_tokens);
        assert!(held <= most, "{held} tokens in a KV of {most}");
        let drawn = slices.iter().filter_map(|slice| self.draw(slice)).collect();
        let begin = self.clock.now();
        self.clock.advance(Duration::from_secs_f64(self.settings.cost.seconds(slices, number)));
        let (rows, prompts): (Vec<Slice<'_>>, Vec<Slice<'_>>) = slices.iter().copied().partition(is_row);
        self.handle.lock().record.push(StepRecord {
            time: (begin, self.clock.now()),
            rows: rows.iter().map(|slice| slice.sequence).collect(),
            slices: prompts.iter().map(|slice| (slice.sequence, slice.start, slice.tokens.len())).collect(),
        });
        Ok(drawn)
    }

    fn close(&mut self, sequence: SequenceId) {
        assert!(!self.lost, "close of {sequence:?} after the backend was lost");
        assert!(self.open.remove(&sequence).is_some(), "{sequence:?} was closed without being open");
        self.closed.insert(sequence);
        self.handle.lock().open -= 1;
    }
}

fn is_row(slice: &Slice<'_>) -> bool {
    slice.sample.is_some_and(|sampling| slice.tokens.len() == 1 && !sampling.output.is_empty())
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
