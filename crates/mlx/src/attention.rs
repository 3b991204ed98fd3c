//! Attention of one step: single-token rows against their slabs, longer runs each against its own slot.

use crate::{
    kv::{KvSlabs, Place},
    layers::Path,
    native,
};
use mlx_rs::{
    Array, Dtype,
    error::Result,
    fast,
    ops::{concatenate, softmax_axis},
};

/// Rows of one slab that each append a single token.
#[derive(Debug)]
pub(crate) struct RowGroup {
    pub(crate) capacity: usize,
    /// Rows of the step's tokens, first and past the last, in the order of their slots.
    pub(crate) rows: (i32, i32),
    /// Slots `0..slots` are computed; where that is more than there are rows, `spread` says which row stands in each.
    pub(crate) slots: usize,
    /// For each slot the row computed in it, and for each row its slot; none where slots and rows coincide.
    pub(crate) spread: Option<(Array, Array)>,
    /// Positions attended: at least every row's length after this step.
    pub(crate) length: usize,
    pub(crate) mask: RowMask,
}

/// Which positions the rows of a group see.
#[derive(Debug)]
pub(crate) enum RowMask {
    /// How many, for each slot `[slots]`: for our own softmax.
    Visible(Array),
    /// `[slots, 1, 1, length]`: booleans for kernels, numbers to be added to the scores for plain operations.
    Array(Array),
}

/// A run of tokens of one sequence.
#[derive(Debug)]
pub(crate) struct RunGroup {
    pub(crate) place: Place,
    pub(crate) rows: (i32, i32),
    /// Tokens in the slot after this step.
    pub(crate) length: usize,
    /// Positions that the first token sees, itself included, `[1]`.
    pub(crate) visible: Array,
}

/// What to attend to, for every layer of a step.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) path: Path,
    pub(crate) scale: f32,
    pub(crate) row_groups: Vec<RowGroup>,
    pub(crate) run_groups: Vec<RunGroup>,
}

impl Attention {
    /// `queries [tokens, heads, head_dim] → [tokens, heads · head_dim]`, this step's keys and values being written.
    pub(crate) fn forward(&self, layer: usize, queries: &Array, kv: &KvSlabs) -> Result<Array> {
        let mut parts = Vec::with_capacity(self.row_groups.len() + self.run_groups.len());
        for group in &self.row_groups {
            parts.push(self.rows(layer, queries, kv, group)?);
        }
        for group in &self.run_groups {
            parts.push(self.run(layer, queries, kv, group)?);
        }
        if parts.len() == 1 { Ok(parts.remove(0)) } else { concatenate(&parts, 0) }
    }

    fn rows(&self, layer: usize, queries: &Array, kv: &KvSlabs, group: &RowGroup) -> Result<Array> {
        let (heads, head_dim) = (queries.dim(1), queries.dim(2));
        let count = group.rows.1 - group.rows.0;
        let slots = group.slots as i32;
        let mut queries = rows_of(queries, group.rows)?;
        if let Some((row_of_slot, _)) = &group.spread {
            queries = queries.take_axis(row_of_slot, 0)?;
        }
        let (keys, values) = kv.view(layer, group.capacity, (0, group.slots), group.length)?;
        let kv_heads = kv.shape().heads;
        let attended = match &group.mask {
            RowMask::Array(mask) if self.path == Path::Kernel => {
                let queries = queries.reshape(&[slots, heads, 1, head_dim])?;
                fast::scaled_dot_product_attention(queries, keys, values, self.scale, mask, None)?
            }
            // Products over each key-value head with its group of query heads, the keys read once for the group.
            mask => {
                let grouped = queries.reshape(&[slots, kv_heads, heads / kv_heads, head_dim])?;
                let scores = grouped.matmul(keys.swap_axes(2, 3)?)?;
                let weights = match mask {
                    RowMask::Visible(visible) => native::masked_softmax(&scores, visible, self.scale, 0)?,
                    RowMask::Array(mask) => softmax_axis(
                        scores.multiply(scalar(self.scale, scores.dtype())?)?.add(mask)?,
                        -1,
                        true,
                    )?,
                };
                weights.matmul(values)?
            }
        };
        let attended = attended.reshape(&[slots, heads * head_dim])?;
        match &group.spread {
            Some((_, slot_of_row)) => attended.take_axis(slot_of_row, 0)?.reshape(&[count, heads * head_dim]),
            None => Ok(attended),
        }
    }

    fn run(&self, layer: usize, queries: &Array, kv: &KvSlabs, group: &RunGroup) -> Result<Array> {
        let (heads, head_dim) = (queries.dim(1), queries.dim(2));
        let count = group.rows.1 - group.rows.0;
        let slot = group.place.slot;
        let (keys, values) = kv.view(layer, group.place.capacity, (slot, slot + 1), group.length)?;
        let queries = rows_of(queries, group.rows)?.swap_axes(0, 1)?;
        let attended = if self.path == Path::Native {
            let kv_heads = kv.shape().heads;
            // Query heads of a group below each other: one product for each key-value head.
            let stacked = queries.reshape(&[1, kv_heads, heads / kv_heads * count, head_dim])?;
            let scores = stacked.matmul(keys.swap_axes(2, 3)?)?;
            let scores = scores.reshape(&[1, heads, count, group.length as i32])?;
            let weights = native::masked_softmax(&scores, &group.visible, self.scale, 1)?;
            let stacked = weights.reshape(&[1, kv_heads, heads / kv_heads * count, group.length as i32])?;
            stacked.matmul(values)?.reshape(&[heads, count, head_dim])?
        } else {
            let causal = fast::ScaledDotProductAttentionMask::Causal;
            let queries = queries.expand_dims(0)?;
            fast::scaled_dot_product_attention(queries, keys, values, self.scale, causal, None)?
                .squeeze_axes(&[0])?
        };
        attended.swap_axes(0, 1)?.reshape(&[count, heads * head_dim])
    }
}

fn rows_of(array: &Array, (from, to): (i32, i32)) -> Result<Array> {
    if from == 0 && to == array.dim(0) {
        return Ok(array.clone());
    }
    crate::raw::slice(array, &[from, 0, 0], &[to, array.dim(1), array.dim(2)])
}

fn scalar(value: f32, dtype: Dtype) -> Result<Array> {
    let array = Array::from_f32(value);
    if dtype == Dtype::Float32 { Ok(array) } else { array.as_dtype(dtype) }
}
