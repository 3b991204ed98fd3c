//! [`FakeModel`]: a model whose text is a hash, whose seconds are virtual, and which panics when its contract is broken.

mod text;

pub use text::{FakeSettings, Output, StepCost};

use crate::VirtualClock;
use engine::{
    BlockId, DrawnToken, Input, Model, ModelError, ModelLimits, Overlap, RowSampling, SequenceId, Slice,
    StepOutput, grammar::TokenMask,
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};
use text::{EOS, Text, first_allowed, is_row, scored};
use types::{AssetsHash, BLOCK_TOKENS, BlockHash, ModelCard, TokenId, TokenLogprobs};

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
        if self.flights.is_empty() {
            self.clock.advance(self.settings.cost.host);
        }
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
