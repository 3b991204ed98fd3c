//! Attention of one step: rows that append a single token together, longer runs each by itself.
//!
//! Three paths compute the same: [`crate::native`] on a CPU, [`crate::kernels`] on a GPU, and MLX's operations alone.
//! The first two read blocks where they lie and write new ones in place; the last copies a row's blocks together first.

use crate::{
    kernels::{self, Tile},
    kv::{BLOCK, KvPool},
    layers::Path,
    native, raw,
    rope::StepRope,
};
use mlx_rs::{Array, error::Result, fast, ops::concatenate};

/// Rows that each append one token: the first rows of the step.
#[derive(Debug)]
pub(crate) struct RowGroup {
    /// How many.
    pub(crate) count: i32,
    /// `[count, 1 + blocks]`: position, then the block table; -1 as position marks a row that is only there to fill.
    pub(crate) table: Array,
    /// For the pure path.
    pub(crate) gathered: Option<Gathered>,
}

/// Consecutive tokens of one sequence.
#[derive(Debug)]
pub(crate) struct Run {
    /// Rows of the step's tokens, first and past the last.
    pub(crate) rows: (i32, i32),
    /// Tokens in the KV before them.
    pub(crate) start: usize,
    /// `[1 + blocks]`: start, then the block table; on a GPU `[3 + blocks]`: start, the first row, rows, then the table.
    pub(crate) table: Array,
    /// For the pure path.
    pub(crate) gathered: Option<Gathered>,
}

/// Tokens of runs so short that they attend in tiles of our own, all runs together.
#[derive(Debug)]
pub(crate) struct ShortRuns {
    pub(crate) tile: Tile,
    /// `[tokens / tile, 1 + tile + blocks]`: row of a tile's first token among the step's, positions of its tokens, then
    /// their run's block table; -1 as position marks a token that is only there to fill.
    pub(crate) table: Array,
}

/// Which blocks to copy together, for rows of equal numbers of blocks.
#[derive(Debug)]
pub(crate) struct Gathered {
    /// Blocks of all rows, one row after another.
    pub(crate) blocks: Array,
    /// `[rows, 1, 1, tokens]`: the positions that each row sees; none where the run's own order says it.
    pub(crate) mask: Option<Array>,
}

/// Where the pure path writes: block and offset of each of the step's tokens.
#[derive(Debug)]
pub(crate) struct Targets {
    pub(crate) blocks: Array,
    pub(crate) offsets: Array,
}

/// What to attend to, for every layer of a step.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) path: Path,
    pub(crate) scale: f32,
    pub(crate) rows: Option<RowGroup>,
    pub(crate) runs: Vec<Run>,
    /// Instead of `runs`.
    pub(crate) short: Option<ShortRuns>,
    pub(crate) targets: Option<Targets>,
}

/// One layer's queries, keys and values of some tokens, side by side and not yet rotated.
#[derive(Debug)]
pub(crate) struct Qkv {
    /// `[tokens, heads + 2 · kv_heads, head_dim]`.
    pub(crate) product: Array,
    pub(crate) heads: i32,
    pub(crate) kv_heads: i32,
}

/// Queries `[tokens, heads, head_dim]`, keys and values `[tokens, kv_heads, head_dim]`.
#[derive(Debug)]
struct Parts {
    queries: Array,
    keys: Array,
    values: Array,
}

impl Attention {
    /// Rotates, appends the step's keys and values to layer `layer` of `kv`, and attends:
    /// `[tokens, heads · head_dim]`; nothing where only the KV is `wanted`.
    pub(crate) fn forward(
        &self,
        layer: usize,
        rope: &StepRope<'_>,
        qkv: Qkv,
        kv: &mut KvPool,
        wanted: bool,
    ) -> Result<Option<Array>> {
        let mut parts = match rope {
            StepRope::Fused { wavelengths, half } => {
                self.in_kernels(layer, &qkv, kv, (wavelengths, *half), wanted)?
            }
            rope => {
                let parts = qkv.parts()?;
                let (queries, keys) = (rope.apply(&parts.queries)?, rope.apply(&parts.keys)?);
                self.in_operations(layer, &Parts { queries, keys, ..parts }, kv, wanted)?
            }
        };
        if !wanted {
            // Nobody reads what attends; the writes alone must happen.
            kv.pending.append(&mut parts);
        }
        Ok(match parts.len() {
            0 => None,
            1 => parts.pop(),
            _ => Some(concatenate(&parts, 0)?),
        })
    }

    /// On a GPU: our kernels rotate, append, and attend or prepare MLX's attention.
    fn in_kernels(
        &self,
        layer: usize,
        qkv: &Qkv,
        kv: &mut KvPool,
        rope: (&Array, i32),
        wanted: bool,
    ) -> Result<Vec<Array>> {
        let mut parts = Vec::with_capacity(2 + self.runs.len());
        if let Some(group) = &self.rows {
            parts.push(kernels::attend_rows(qkv, kv, layer, group, rope)?);
        }
        if let Some(short) = &self.short {
            parts.extend(kernels::attend_tiles(qkv, kv, layer, short, rope, wanted)?);
        }
        for run in &self.runs {
            let (queries, keys, values) = kernels::append_run(qkv, kv, layer, run, rope)?;
            if wanted {
                parts.push(self.causal(queries, keys, values)?);
            }
        }
        Ok(parts)
    }

    /// On a CPU by our operations, or by MLX's anywhere; everything is rotated.
    fn in_operations(&self, layer: usize, all: &Parts, kv: &mut KvPool, wanted: bool) -> Result<Vec<Array>> {
        if self.path == Path::Pure {
            self.write(layer, all, kv)?;
            if !wanted {
                return Ok(Vec::new());
            }
        }
        let mut parts = Vec::with_capacity(1 + self.runs.len());
        if let Some(group) = &self.rows {
            let part = all.rows((0, group.count))?;
            parts.push(if self.path == Path::Native {
                let layer = &kv.layers[layer];
                let Parts { queries, keys, values } = &part;
                let (pool_keys, pool_values) = (&layer.keys, &layer.values);
                native::attend_rows(queries, keys, values, pool_keys, pool_values, &group.table, self.scale)?
            } else {
                self.gathered_rows(layer, &part, kv, group)?
            });
        }
        for run in &self.runs {
            let part = all.rows(run.rows)?;
            parts.extend(match self.path {
                Path::Native => self.native_run(layer, &part, kv, run, wanted)?,
                _ => Some(self.gathered_run(layer, &part, kv, run)?),
            });
        }
        Ok(parts)
    }

    /// `queries [1, heads, count, dim]` at the end of `keys`, `values` `[1, kv_heads, length, dim]`.
    fn causal(&self, queries: Array, keys: Array, values: Array) -> Result<Array> {
        let (heads, count, dim) = (queries.dim(1), queries.dim(2), queries.dim(3));
        let causal = fast::ScaledDotProductAttentionMask::Causal;
        let attended = fast::scaled_dot_product_attention(queries, keys, values, self.scale, causal, None)?;
        attended.swap_axes(1, 2)?.reshape(&[count, heads * dim])
    }

    fn native_run(
        &self,
        layer: usize,
        part: &Parts,
        kv: &mut KvPool,
        run: &Run,
        wanted: bool,
    ) -> Result<Option<Array>> {
        let (pool, Parts { queries, keys, values }) = (&kv.layers[layer], part);
        let (pool_keys, pool_values) = (&pool.keys, &pool.values);
        if wanted {
            native::attend_run(queries, keys, values, pool_keys, pool_values, &run.table, self.scale)
                .map(Some)
        } else {
            let written = native::append_run(keys, values, pool_keys, pool_values, &run.table)?;
            kv.pending.push(written);
            Ok(None)
        }
    }

    /// Writes all tokens of the step into their blocks, by MLX's own operations.
    fn write(&self, layer: usize, all: &Parts, kv: &mut KvPool) -> Result<()> {
        let Some(Targets { blocks, offsets }) = &self.targets else { return Ok(()) };
        let shape = [all.keys.dim(0), 1, all.keys.dim(1), 1, all.keys.dim(2)];
        let pool = &mut kv.layers[layer];
        for (pool, new) in [(&mut pool.keys, &all.keys), (&mut pool.values, &all.values)] {
            // Out of its place, so that nothing else holds its buffer when the write is evaluated.
            let old = std::mem::replace(pool, Array::from_int(0));
            *pool = raw::scatter(&old, &[blocks, offsets], &new.reshape(&shape)?, &[0, 2])?;
        }
        Ok(())
    }

    fn gathered_rows(&self, layer: usize, part: &Parts, kv: &KvPool, group: &RowGroup) -> Result<Array> {
        let Some(gathered) = &group.gathered else { unreachable!("the pure path gathers") };
        let (heads, dim) = (part.queries.dim(1), part.queries.dim(2));
        let (keys, values) = gather(kv, layer, &gathered.blocks, group.count)?;
        let queries = part.queries.reshape(&[group.count, heads, 1, dim])?;
        let attended = match &gathered.mask {
            Some(mask) => fast::scaled_dot_product_attention(queries, keys, values, self.scale, mask, None)?,
            None => fast::scaled_dot_product_attention(queries, keys, values, self.scale, None, None)?,
        };
        attended.reshape(&[group.count, heads * dim])
    }

    fn gathered_run(&self, layer: usize, part: &Parts, kv: &KvPool, run: &Run) -> Result<Array> {
        let Some(gathered) = &run.gathered else { unreachable!("the pure path gathers") };
        let (keys, values) = gather(kv, layer, &gathered.blocks, 1)?;
        let length = run.start as i32 + run.rows.1 - run.rows.0;
        let last = [1, keys.dim(1), length, keys.dim(3)];
        let (keys, values) = (raw::slice(&keys, &[0; 4], &last)?, raw::slice(&values, &[0; 4], &last)?);
        self.causal(part.queries.swap_axes(0, 1)?.expand_dims(0)?, keys, values)
    }
}

impl Qkv {
    fn parts(&self) -> Result<Parts> {
        let (count, dim) = (self.product.dim(0), self.product.dim(2));
        let part = |from: i32, to: i32| raw::slice(&self.product, &[0, from, 0], &[count, to, dim]);
        let (keys, values) = (self.heads, self.heads + self.kv_heads);
        Ok(Parts {
            queries: part(0, keys)?,
            keys: part(keys, values)?,
            values: part(values, values + self.kv_heads)?,
        })
    }
}

impl Parts {
    fn rows(&self, range: (i32, i32)) -> Result<Self> {
        Ok(Self {
            queries: rows_of(&self.queries, range)?,
            keys: rows_of(&self.keys, range)?,
            values: rows_of(&self.values, range)?,
        })
    }
}

/// Keys and values `[rows, heads, tokens, head_dim]` of `rows` rows with the same number of blocks.
fn gather(kv: &KvPool, layer: usize, blocks: &Array, rows: i32) -> Result<(Array, Array)> {
    let each = blocks.dim(0) / rows;
    let pool = &kv.layers[layer];
    let together = |pool: &Array| {
        let (heads, dim) = (pool.dim(1), pool.dim(3));
        let taken = pool.take_axis(blocks, 0)?.reshape(&[rows, each, heads, BLOCK, dim])?;
        taken.swap_axes(1, 2)?.reshape(&[rows, heads, each * BLOCK, dim])
    };
    Ok((together(&pool.keys)?, together(&pool.values)?))
}

fn rows_of(array: &Array, (from, to): (i32, i32)) -> Result<Array> {
    if from == 0 && to == array.dim(0) {
        return Ok(array.clone());
    }
    raw::slice(array, &[from, 0, 0], &[to, array.dim(1), array.dim(2)])
}
