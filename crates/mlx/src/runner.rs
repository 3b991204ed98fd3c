//! [`engine::Model`] over a family's tensors: turns a step's slices into one forward pass and its logits into tokens.
//!
//! Owns the KV of all open sequences. Each call ends with everything evaluated, so the next one finds every buffer
//! unshared and writes it in place.

use crate::{
    attention::{Attention, RowGroup, RowMask, RunGroup},
    kv::{CAPACITY_MIN, KvSlabs, Place, RowWrites, RunWrite, backend},
    layers::Path,
    models::{Dims, Family, StepInput},
    sampler,
};
use engine::{Model, ModelError, ModelLimits, SequenceId, Slice};
use mlx_rs::{Array, Dtype, error::Result, transforms::eval};
use types::{ModelCard, TokenId};

/// A loaded model.
#[derive(Debug)]
pub(crate) struct Runner {
    card: ModelCard,
    limits: ModelLimits,
    family: Box<dyn Family>,
    path: Path,
    kv: KvSlabs,
    open: usize,
}

/// A slice with its place, on its way into a step.
#[derive(Debug, Clone, Copy)]
struct Placed<'a> {
    /// Index among the engine's slices.
    index: usize,
    slice: &'a Slice<'a>,
    place: Place,
}

impl Runner {
    pub(crate) fn new(card: ModelCard, limits: ModelLimits, family: Box<dyn Family>, path: Path) -> Self {
        let kv = KvSlabs::new(family.dims().kv);
        Self { card, limits, family, path, kv, open: 0 }
    }

    /// Single tokens first, slab by slab in the order of their slots; then runs.
    fn place<'a>(&mut self, slices: &'a [Slice<'a>]) -> Result<(Vec<Placed<'a>>, Vec<Placed<'a>>)> {
        let mut placed = Vec::with_capacity(slices.len());
        for (index, slice) in slices.iter().enumerate() {
            let place = self.kv.reserve(slice.sequence, slice.start, slice.start + slice.tokens.len())?;
            placed.push(Placed { index, slice, place });
        }
        let (mut singles, runs): (Vec<_>, Vec<_>) =
            placed.into_iter().partition(|placed| placed.slice.tokens.len() == 1);
        singles.sort_by_key(|single| single.place);
        Ok((singles, runs))
    }

    /// The tokens drawn, each with the index of its slice.
    fn forward(&mut self, slices: &[Slice<'_>]) -> Result<Vec<(usize, TokenId)>> {
        let (singles, runs) = self.place(slices)?;
        let ordered: Vec<_> = singles.iter().chain(&runs).copied().collect();

        let (mut tokens, mut positions) = (Vec::new(), Vec::new());
        let (mut wanted, mut sampling, mut sources) = (Vec::new(), Vec::new(), Vec::new());
        for Placed { index, slice, .. } in &ordered {
            tokens.extend(slice.tokens.iter().map(|&token| token as i32));
            positions.extend((slice.start..slice.start + slice.tokens.len()).map(|position| position as i32));
            if let Some(row) = slice.sample {
                wanted.push(tokens.len() as i32 - 1);
                sampling.push(row);
                sources.push(*index);
            }
        }

        let Dims { scale, kv: shape, .. } = self.family.dims();
        let (mut single_writes, mut row_groups) = (Vec::new(), Vec::new());
        let mut row = 0;
        for group in singles.chunk_by(|one, two| one.place.capacity == two.place.capacity) {
            let rows = (row, row + group.len() as i32);
            row = rows.1;
            single_writes.push(row_writes(group, rows));
            row_groups.push(row_group(group, rows, self.path, shape.dtype)?);
        }
        let (mut run_writes, mut run_groups) = (Vec::new(), Vec::new());
        for &Placed { slice, place, .. } in &runs {
            let rows = (row, row + slice.tokens.len() as i32);
            row = rows.1;
            run_writes.push(RunWrite { place, start: slice.start, rows });
            let visible = Array::from_slice(&[slice.start as i32 + 1], &[1]);
            run_groups.push(RunGroup { place, rows, length: slice.start + slice.tokens.len(), visible });
        }

        let attention = Attention { path: self.path, scale, row_groups, run_groups };
        let input = StepInput {
            tokens: Array::from_slice(&tokens, &[tokens.len() as i32]),
            positions: &positions,
            singles: &single_writes,
            runs: &run_writes,
            attention: &attention,
            wanted: &wanted,
        };
        let logits = self.family.forward(&input, &mut self.kv)?;
        // KV with the logits, in one evaluation: a slice in the middle of a prompt has nothing else to ask for it.
        eval(self.kv.arrays().chain(&logits))?;
        let drawn = match logits {
            Some(logits) => sampler::sample(&logits, &sampling)?,
            None => Vec::new(),
        };
        Ok(sources.into_iter().zip(drawn).collect())
    }
}

impl Model for Runner {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn limits(&self) -> ModelLimits {
        self.limits
    }

    fn open(&mut self, sequence: SequenceId, _tokens_max: usize) -> std::result::Result<(), ModelError> {
        let error = |message: String| ModelError::Sequence { sequence, message };
        if self.kv.is_open(sequence) {
            return Err(error(format!("sequence {} is open already", sequence.0)));
        }
        if self.open >= self.limits.slots {
            return Err(error(format!("all {} slots are taken", self.limits.slots)));
        }
        self.kv.open(sequence).map_err(backend)?;
        self.open += 1;
        Ok(())
    }

    fn step(&mut self, slices: &[Slice<'_>]) -> std::result::Result<Vec<TokenId>, ModelError> {
        if slices.is_empty() {
            return Ok(Vec::new());
        }
        let mut drawn = self.forward(slices).map_err(backend)?;
        drawn.sort_unstable_by_key(|entry| entry.0);
        Ok(drawn.into_iter().map(|entry| entry.1).collect())
    }

    fn close(&mut self, sequence: SequenceId) {
        if self.kv.is_open(sequence) {
            self.kv.close(sequence);
            self.open -= 1;
        }
    }
}

fn row_writes(group: &[Placed<'_>], rows: (i32, i32)) -> RowWrites {
    let array = |value: &dyn Fn(&Placed<'_>) -> usize| {
        let values: Vec<i32> = group.iter().map(|placed| value(placed) as i32).collect();
        Array::from_slice(&values, &[values.len() as i32])
    };
    RowWrites {
        capacity: group[0].place.capacity,
        slots: array(&|placed| placed.place.slot),
        positions: array(&|placed| placed.slice.start),
        rows,
    }
}

fn row_group(group: &[Placed<'_>], rows: (i32, i32), path: Path, dtype: Dtype) -> Result<RowGroup> {
    let capacity = group[0].place.capacity;
    let slots = group.iter().map(|placed| placed.place.slot + 1).max().unwrap_or(0);
    let longest = group.iter().map(|placed| placed.slice.start + 1).max().unwrap_or(0);
    // Without compiled shapes a fine step saves work; kernels like whole capacities.
    let granularity = if path == Path::Kernel { CAPACITY_MIN } else { 32 };
    let length = longest.next_multiple_of(granularity).min(capacity);

    let mut row_of_slot = vec![None; slots];
    for (row, placed) in group.iter().enumerate() {
        row_of_slot[placed.place.slot] = Some(row);
    }
    let spread = (slots != group.len()).then(|| {
        // An unused slot computes the first row's query against its own stale keys; nobody reads the result.
        let rows: Vec<i32> = row_of_slot.iter().map(|row| row.unwrap_or(0) as i32).collect();
        let slots_of_rows: Vec<i32> = group.iter().map(|placed| placed.place.slot as i32).collect();
        (
            Array::from_slice(&rows, &[rows.len() as i32]),
            Array::from_slice(&slots_of_rows, &[slots_of_rows.len() as i32]),
        )
    });

    // An unused slot sees its first position only, so that its softmax is defined.
    let visible = row_of_slot.iter().map(|row| row.map_or(1, |row| group[row].slice.start + 1));
    let shape = [slots as i32, 1, 1, length as i32];
    let mask = match path {
        Path::Native => {
            let values: Vec<i32> = visible.map(|seen| seen as i32).collect();
            RowMask::Visible(Array::from_slice(&values, &[slots as i32]))
        }
        Path::Pure => {
            let values: Vec<f32> = visible
                .flat_map(|seen| (0..length).map(move |at| if at < seen { 0.0 } else { f32::NEG_INFINITY }))
                .collect();
            let mask = Array::from_slice(&values, &shape);
            RowMask::Array(if dtype == Dtype::Float32 { mask } else { mask.as_dtype(dtype)? })
        }
        Path::Kernel => {
            let values: Vec<bool> = visible.flat_map(|seen| (0..length).map(move |at| at < seen)).collect();
            RowMask::Array(Array::from_slice(&values, &shape))
        }
    };
    Ok(RowGroup { capacity, rows, slots, spread, length, mask })
}
