//! [`FakeModel`]: a model whose text is a hash, whose seconds are virtual, and which panics when its contract is broken.

use crate::VirtualClock;
use engine::{BlockId, Input, Model, ModelError, ModelLimits, SequenceId, Slice};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};
use types::{
    AssetsHash, BLOCK_TOKENS, BlockHash, FinishReason, GenerateRequest, ModelCard, SamplingParams, TokenId,
};

/// The token that ends a [`FakeModel`]'s text.
const EOS: TokenId = 0;
/// Steps that may be in flight.
const FLIGHTS_MAX: usize = 2;

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
            kv_1024: Duration::from_micros(200),
            jitter: 0.05,
        }
    }

    /// No time at all.
    pub fn none() -> Self {
        let zero = Duration::ZERO;
        Self { base: zero, slices: zero, prefill_token: zero, row: zero, kv_1024: zero, jitter: 0.0 }
    }

    fn seconds(&self, slices: &[Slice<'_>], number: u64) -> f64 {
        let mut seconds = self.base.as_secs_f64();
        if !slices.iter().all(is_row) {
            seconds += self.slices.as_secs_f64();
        }
        for slice in slices {
            let (start, tokens) = (slice.start as f64, slice.input.count() as f64);
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
            limits: ModelLimits { slots: 4, blocks: 1024, kv_bytes_per_token: 1024 },
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
    /// What a request must give, whatever runs beside it, as long as nothing is cancelled or fails; with the part of the
    /// answer that it brought.
    pub fn output(&self, request: &GenerateRequest) -> Output {
        let text = self.text(&request.prompt, &request.sampling);
        let mut tokens = request.output.clone();
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
    drawn: Option<Vec<TokenId>>,
    end: Instant,
}

/// A model without weights. Its text depends on prompt and seed only; see [`FakeSettings::output`].
///
/// Steps take virtual time, one after another, beginning when they are submitted. It panics when the engine breaks the
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
    /// When the last step submitted ends.
    busy_until: Instant,
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
            blocks: vec![[None; BLOCK_TOKENS]; settings.limits.blocks],
            busy_until: clock.now(),
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
                let before = self.flights.back().unwrap_or_else(|| {
                    panic!("{:?} goes on from a step that was collected already", slice.sequence)
                });
                // A lost step draws nothing that anybody will see.
                vec![before.drawn.as_ref().map_or(EOS, |drawn| drawn[index])]
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

    /// The token after what is in the KV of a slice that appended `tokens`.
    fn draw(&self, slice: &Slice<'_>, tokens: &[TokenId]) -> Option<TokenId> {
        let sampling = slice.sample?;
        let late = match slice.input {
            Input::Tokens(_) => &[][..],
            Input::Drawn(_) => tokens,
        };
        let known = [sampling.prompt, sampling.output, late].concat();
        assert_eq!(slice.start + tokens.len(), known.len(), "{:?}: tokens are left out", slice.sequence);
        for (position, &token) in known.iter().enumerate() {
            let block = slice.blocks[position / BLOCK_TOKENS];
            let cell = self.blocks[block.0 as usize][position % BLOCK_TOKENS];
            let at = (slice.sequence, position, block);
            assert_eq!(cell, Some((position, token)), "{at:?}: the KV is not prompt and output");
        }
        let position = (sampling.output.len() + late.len()) as u32;
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

    fn submit(&mut self, slices: &[Slice<'_>]) -> Result<(), ModelError> {
        assert!(!self.lost, "a step after the backend was lost");
        assert!(!slices.is_empty(), "a step without slices");
        let slots = self.settings.limits.slots;
        assert!(slices.len() <= slots, "{} slices in {slots} slots", slices.len());
        assert!(self.flights.len() < FLIGHTS_MAX, "more than {FLIGHTS_MAX} steps in flight");
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
        let drawn =
            slices.iter().zip(&inputs).filter_map(|(slice, tokens)| self.draw(slice, tokens)).collect();
        let drawn = (fault != Some(Fault::Lost)).then_some(drawn);
        let begin = self.busy_until.max(self.clock.now());
        let end = begin + Duration::from_secs_f64(self.settings.cost.seconds(slices, number));
        self.busy_until = end;
        self.flights.push_back(Flight { drawn, end });
        let (rows, prompts): (Vec<Slice<'_>>, Vec<Slice<'_>>) = slices.iter().copied().partition(is_row);
        self.handle.lock().record.push(StepRecord {
            time: (begin, end),
            rows: rows.iter().map(|slice| slice.sequence).collect(),
            slices: prompts.iter().map(|slice| (slice.sequence, slice.start, slice.input.count())).collect(),
        });
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<TokenId>, ModelError> {
        assert!(!self.lost, "a step is collected after the backend was lost");
        let Some(flight) = self.flights.pop_front() else { panic!("no step is in flight") };
        self.clock.advance(flight.end.saturating_duration_since(self.clock.now()));
        flight.drawn.ok_or_else(|| {
            self.lost = true;
            ModelError::Backend("injected".to_owned())
        })
    }
}

fn is_row(slice: &Slice<'_>) -> bool {
    let one = |position| slice.input.count() == 1 && position > 0;
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
