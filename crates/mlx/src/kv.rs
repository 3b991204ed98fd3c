//! Keys and values of open sequences: contiguous slots, each row with its own length, nothing shared between rows.
//!
//! A [`Slab`] holds slots of one capacity (256 tokens, doubling); a sequence starts in the smallest and moves up when
//! it outgrows its slot, so that joining and leaving touch nobody else and at most half of a slot is unused. Rows are
//! written in place: the step before has been evaluated, so nothing else holds the buffers.

use crate::raw::{scatter, slice, slice_update};
use engine::{ModelError, SequenceId};
use mlx_rs::{
    Array, Dtype,
    error::Result,
    ops::{concatenate, zeros_dtype},
};
use std::{collections::BTreeMap, mem};

/// Tokens of the smallest slot; also the granularity that GPU attention kernels like.
pub(crate) const CAPACITY_MIN: usize = 256;

/// Shapes that all KV of a model shares.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvShape {
    pub(crate) layers: usize,
    pub(crate) heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) dtype: Dtype,
}

impl KvShape {
    /// Bytes of one token's keys and values in all layers.
    pub(crate) fn bytes_per_token(&self) -> u64 {
        let elements = 2 * self.layers as u64 * self.heads as u64 * self.head_dim as u64;
        elements * if self.dtype == Dtype::Float32 { 4 } else { 2 }
    }
}

/// Keys and values `[slots, heads, capacity, head_dim]` of one layer.
#[derive(Debug)]
struct LayerKv {
    keys: Array,
    values: Array,
}

/// Slots of one capacity.
#[derive(Debug)]
struct Slab {
    slots: Vec<Option<SequenceId>>,
    layers: Vec<LayerKv>,
}

/// Where a sequence's KV lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// Tokens the slot can hold; names the slab.
    pub(crate) capacity: usize,
    /// The slot in the slab.
    pub(crate) slot: usize,
}

/// Single tokens to be written in one slab by one step: `rows[i]` at `positions[i]`.
#[derive(Debug)]
pub(crate) struct RowWrites {
    pub(crate) capacity: usize,
    /// Slots, `[n]`.
    pub(crate) slots: Array,
    /// Positions, `[n]`.
    pub(crate) positions: Array,
    /// Rows of the step's tokens, first and past the last.
    pub(crate) rows: (i32, i32),
}

/// Consecutive tokens to be written into one slot by one step.
#[derive(Debug)]
pub(crate) struct RunWrite {
    pub(crate) place: Place,
    pub(crate) start: usize,
    /// Rows of the step's tokens, first and past the last.
    pub(crate) rows: (i32, i32),
}

/// The KV of all open sequences.
#[derive(Debug)]
pub(crate) struct KvSlabs {
    shape: KvShape,
    slabs: BTreeMap<usize, Slab>,
    places: BTreeMap<SequenceId, Place>,
}

impl KvSlabs {
    pub(crate) fn new(shape: KvShape) -> Self {
        Self { shape, slabs: BTreeMap::new(), places: BTreeMap::new() }
    }

    pub(crate) fn shape(&self) -> KvShape {
        self.shape
    }

    pub(crate) fn is_open(&self, sequence: SequenceId) -> bool {
        self.places.contains_key(&sequence)
    }

    /// Opens an empty sequence.
    pub(crate) fn open(&mut self, sequence: SequenceId) -> Result<()> {
        let place = self.free_slot(CAPACITY_MIN, sequence)?;
        self.places.insert(sequence, place);
        Ok(())
    }

    /// Frees a sequence's slot, and a slab's memory with its last sequence or once most of it is unused.
    pub(crate) fn close(&mut self, sequence: SequenceId) {
        if let Some(place) = self.places.remove(&sequence) {
            self.free(place);
        }
    }

    /// Where a sequence that holds `length` tokens lies, moved so that `needed` fit.
    pub(crate) fn reserve(&mut self, sequence: SequenceId, length: usize, needed: usize) -> Result<Place> {
        let old = self.places[&sequence];
        if needed <= old.capacity {
            return Ok(old);
        }
        let new = self.free_slot(needed.next_power_of_two().max(CAPACITY_MIN), sequence)?;
        if length > 0 {
            for layer in 0..self.shape.layers {
                let (keys, values) = self.view(layer, old.capacity, (old.slot, old.slot + 1), length)?;
                let slab = self.slabs.get_mut(&new.capacity).expect("just made");
                let target = &mut slab.layers[layer];
                write_run(&mut target.keys, &keys, new.slot, 0, length)?;
                write_run(&mut target.values, &values, new.slot, 0, length)?;
            }
        }
        self.free(old);
        self.places.insert(sequence, new);
        Ok(new)
    }

    /// Writes a step's keys and values `[tokens, heads, head_dim]` of one layer.
    ///
    /// All writes of a layer come before any [`view`](Self::view) of it: a view holds the buffer, and a write to a
    /// held buffer copies it.
    pub(crate) fn write(
        &mut self,
        layer: usize,
        keys: &Array,
        values: &Array,
        singles: &[RowWrites],
        runs: &[RunWrite],
    ) -> Result<()> {
        let KvShape { heads, head_dim, .. } = self.shape;
        let rows =
            |array: &Array, (from, to): (i32, i32)| slice(array, &[from, 0, 0], &[to, heads, head_dim]);
        for write in singles {
            let target = &mut self.slabs.get_mut(&write.capacity).expect("reserved").layers[layer];
            let shape = [write.rows.1 - write.rows.0, 1, heads, 1, head_dim];
            for (slab, new) in [(&mut target.keys, keys), (&mut target.values, values)] {
                let updates = rows(new, write.rows)?.reshape(&shape)?;
                *slab = scatter(&take(slab), &[&write.slots, &write.positions], &updates, &[0, 2])?;
            }
        }
        for run in runs {
            let target = &mut self.slabs.get_mut(&run.place.capacity).expect("reserved").layers[layer];
            let count = (run.rows.1 - run.rows.0) as usize;
            for (slab, new) in [(&mut target.keys, keys), (&mut target.values, values)] {
                let update = rows(new, run.rows)?.swap_axes(0, 1)?.expand_dims(0)?;
                write_run(slab, &update, run.place.slot, run.start, count)?;
            }
        }
        Ok(())
    }

    /// Keys and values `[slots, heads, length, head_dim]` of some slots of a slab, without a copy.
    pub(crate) fn view(
        &self,
        layer: usize,
        capacity: usize,
        (first, last): (usize, usize),
        length: usize,
    ) -> Result<(Array, Array)> {
        let kv = &self.slabs[&capacity].layers[layer];
        let start = [first as i32, 0, 0, 0];
        let stop = [last as i32, self.shape.heads, length as i32, self.shape.head_dim];
        Ok((slice(&kv.keys, &start, &stop)?, slice(&kv.values, &start, &stop)?))
    }

    /// All arrays, to be evaluated with a step.
    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.slabs.values().flat_map(|slab| &slab.layers).flat_map(|layer| [&layer.keys, &layer.values])
    }

    fn free_slot(&mut self, capacity: usize, sequence: SequenceId) -> Result<Place> {
        let shape = self.shape;
        let slab =
            self.slabs.entry(capacity).or_insert_with(|| Slab { slots: Vec::new(), layers: Vec::new() });
        let slot = match slab.slots.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                let slot = slab.slots.len();
                slab.resize(shape, capacity, slots_after(slot))?;
                slot
            }
        };
        slab.slots[slot] = Some(sequence);
        Ok(Place { capacity, slot })
    }

    fn free(&mut self, place: Place) {
        let shape = self.shape;
        let Some(slab) = self.slabs.get_mut(&place.capacity) else { return };
        slab.slots[place.slot] = None;
        let used = slab.slots.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        if used == 0 {
            self.slabs.remove(&place.capacity);
        } else if used * 4 <= slab.slots.len() {
            // Shrinking is an economy: if it fails, the slab stays as large as it was.
            let _ = slab.resize(shape, place.capacity, slots_after(used - 1));
        }
    }
}

impl Slab {
    /// Grows or shrinks to `slots`, keeping the first ones.
    fn resize(&mut self, shape: KvShape, capacity: usize, slots: usize) -> Result<()> {
        let old = self.slots.len();
        let size = |count: usize| [count as i32, shape.heads, capacity as i32, shape.head_dim];
        let resized = |array: &Array| {
            if slots <= old {
                // Into memory of its own: a slice, contiguous or not, would keep all of the old one.
                let kept = slice(array, &[0; 4], &size(slots))?;
                slice_update(&zeros_dtype(&size(slots), shape.dtype)?, &kept, &[0; 4], &size(slots))
            } else {
                let more = zeros_dtype(&size(slots - old), shape.dtype)?;
                if old == 0 { Ok(more) } else { concatenate(&[array, &more], 0) }
            }
        };
        let mut layers = Vec::with_capacity(shape.layers);
        for layer in 0..shape.layers {
            let (keys, values) = match self.layers.get(layer) {
                Some(kv) => (resized(&kv.keys)?, resized(&kv.values)?),
                None => (zeros_dtype(&size(slots), shape.dtype)?, zeros_dtype(&size(slots), shape.dtype)?),
            };
            layers.push(LayerKv { keys, values });
        }
        self.layers = layers;
        self.slots.resize(slots, None);
        Ok(())
    }
}

/// Slots of a slab that needs slot `slot`: 1, 2, 4, then multiples of 4, a quarter more than needed when large.
fn slots_after(slot: usize) -> usize {
    match slot {
        0 => 1,
        1 => 2,
        _ => (slot + 1 + slot / 4).next_multiple_of(4),
    }
}

/// `array` out of its place, leaving an empty one: its buffer must have no other holder when the write is evaluated.
fn take(array: &mut Array) -> Array {
    mem::replace(array, Array::from_int(0))
}

fn write_run(slab: &mut Array, update: &Array, slot: usize, start: usize, count: usize) -> Result<()> {
    let (heads, head_dim) = (slab.dim(1), slab.dim(3));
    let (slot, start, count) = (slot as i32, start as i32, count as i32);
    let first = [slot, 0, start, 0];
    let last = [slot + 1, heads, start + count, head_dim];
    *slab = slice_update(&take(slab), update, &first, &last)?;
    Ok(())
}

/// A backend error as the engine sees it.
pub(crate) fn backend(error: mlx_rs::error::Exception) -> ModelError {
    ModelError::Backend(error.what().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_rs::transforms::eval;
    use std::collections::BTreeMap;

    const SHAPE: KvShape = KvShape { layers: 2, heads: 2, head_dim: 4, dtype: Dtype::Float32 };

    /// What a sequence's token at a position is filled with.
    fn value(sequence: u64, position: usize) -> f32 {
        (sequence * 10_000) as f32 + position as f32
    }

    fn filled(values: impl Iterator<Item = f32>) -> Array {
        let all: Vec<f32> = values.flat_map(|value| [value; 8]).collect();
        Array::from_slice(&all, &[all.len() as i32 / 8, 2, 4])
    }

    /// Sequences that open, grow by single tokens and runs, move up and close in a fixed pseudo-random order always
    /// find their own keys and values.
    #[test]
    fn rows_keep_their_own_through_growth_moves_and_shrinking() {
        let mut kv = KvSlabs::new(SHAPE);
        let mut lengths: BTreeMap<u64, usize> = BTreeMap::new();
        let mut state = 42_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for step in 0..120_u64 {
            if lengths.len() < 7 && random(3) > 0 {
                kv.open(SequenceId(step)).unwrap();
                lengths.insert(step, 0);
            }
            let single = random(2) == 0;
            let (mut singles, mut runs) = (Vec::new(), Vec::new());
            let mut contents = Vec::new();
            for (&id, length) in &mut lengths {
                let count = if single { 1 } else { 1 + random(90) as usize };
                let place = kv.reserve(SequenceId(id), *length, *length + count).unwrap();
                let rows = (contents.len() as i32, (contents.len() + count) as i32);
                contents.extend((*length..*length + count).map(|position| value(id, position)));
                if single {
                    let one = |value: usize| Array::from_slice(&[value as i32], &[1]);
                    let (slots, positions) = (one(place.slot), one(*length));
                    singles.push(RowWrites { capacity: place.capacity, slots, positions, rows });
                } else {
                    runs.push(RunWrite { place, start: *length, rows });
                }
                *length += count;
            }
            for layer in 0..SHAPE.layers {
                let keys = filled(contents.iter().copied());
                let values = filled(contents.iter().map(|value| -value));
                kv.write(layer, &keys, &values, &singles, &runs).unwrap();
            }
            eval(kv.arrays()).unwrap();
            for (&id, &length) in &lengths {
                let place = kv.places[&SequenceId(id)];
                let (keys, values) =
                    kv.view(1, place.capacity, (place.slot, place.slot + 1), length).unwrap();
                let expected: Vec<f32> = (0..length).flat_map(|at| [value(id, at); 4]).collect();
                let expected: Vec<f32> = [expected.clone(), expected].concat();
                let (keys, values) = (keys.contiguous().unwrap(), values.contiguous().unwrap());
                assert_eq!(keys.as_slice::<f32>(), expected, "step {step}, sequence {id}");
                assert!(values.as_slice::<f32>().iter().zip(&expected).all(|(value, key)| *value == -key));
            }
            if random(3) == 0 {
                let ids: Vec<u64> = lengths.keys().copied().collect();
                for id in ids.into_iter().filter(|_| random(2) == 0) {
                    kv.close(SequenceId(id));
                    lengths.remove(&id);
                }
            }
        }
        for id in lengths.into_keys() {
            kv.close(SequenceId(id));
        }
        assert!(kv.slabs.is_empty() && kv.places.is_empty(), "memory is given back with the last sequence");
    }
}
