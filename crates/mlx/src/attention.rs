//! Attention of one step: rows that append a single token together, longer runs each by itself.
//!
//! Three paths compute the same: [`crate::native`] on a CPU, [`crate::kernels`] on a GPU, and MLX's operations alone.
//! The first two read blocks where they lie and write new ones in place; the last copies a row's blocks together first.

use crate::{
    kernels::{self, Tile},
    kv::KvPool,
    layers::Path,
    native, raw,
    rope::StepRope,
};
use mlx_rs::{
    Array,
    error::{Exception, Result},
    fast,
    ops::{concatenate, select, softmax_axis, tanh},
};

/// What the queries of a layer see, and how scores become weights.
#[derive(Debug, Clone, Default)]
pub(crate) struct Look {
    /// So many tokens, the query's own among them; all before it where none.
    pub(crate) window: Option<i32>,
    /// Scores become `cap · tanh(score / cap)`.
    pub(crate) cap: Option<f32>,
    /// `[heads]`: scores of a token whose value is nothing, one for each query head.
    pub(crate) sinks: Option<Array>,
    /// All that our GPU kernels need to know, where that is more than rotations: [`crate::rope::Rope::numbers_with`].
    pub(crate) numbers: Option<Array>,
}

impl Look {
    pub(crate) fn is_plain(&self) -> bool {
        self.window.is_none() && self.cap.is_none() && self.sinks.is_none()
    }

    /// For our CPU operations: sinks, cap and window, of which nothing stands for none.
    fn numbers(&self) -> (Array, f32, i32) {
        let sinks = self.sinks.clone().unwrap_or_else(|| Array::from_slice::<f32>(&[], &[0]));
        (sinks, self.cap.unwrap_or(0.0), self.window.unwrap_or(0))
    }
}

/// Which layer attends.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) index: usize,
    pub(crate) rope: &'a StepRope<'a>,
    pub(crate) look: &'a Look,
}

/// Rows that each append one token: the first rows of the step.
#[derive(Debug)]
pub(crate) struct RowGroup {
    /// How many.
    pub(crate) count: i32,
    /// `[count, 1 + blocks]`: position, then the block table; -1 as position marks a row that is only there to fill.
    pub(crate) table: Array,
    /// On a GPU, where several rows are of one sequence: `[count, 2 + blocks]`, each row's index before what the table says.
    /// All are appended before any attends.
    pub(crate) appended: Option<Array>,
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
    /// Of the queries: one a row, or those of a run.
    pub(crate) positions: Vec<i32>,
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
    /// Rotates, appends the step's keys and values to the layer's in `kv`, and attends:
    /// `[tokens, heads · head_dim]`; nothing where only the KV is `wanted`.
    pub(crate) fn forward(
        &self,
        layer: Layer<'_>,
        qkv: Qkv,
        kv: &mut KvPool,
        wanted: bool,
    ) -> Result<Option<Array>> {
        let mut parts = match layer.rope {
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
        layer: Layer<'_>,
        qkv: &Qkv,
        kv: &mut KvPool,
        rope: (&Array, i32),
        wanted: bool,
    ) -> Result<Vec<Array>> {
        let (index, look) = (layer.index, layer.look);
        let rope = (look.numbers.as_ref().unwrap_or(rope.0), rope.1);
        let mut parts = Vec::with_capacity(2 + self.runs.len());
        if let Some(group) = &self.rows {
            parts.push(kernels::attend_rows(qkv, kv, (index, look), group, rope)?);
        }
        if let Some(short) = &self.short {
            parts.extend(kernels::attend_tiles(qkv, kv, (index, look), short, rope, wanted)?);
        }
        for run in &self.runs {
            let (queries, keys, values) = kernels::append_run(qkv, kv, index, run, rope)?;
            if wanted {
                let (start, count) = (run.start as i32, run.rows.1 - run.rows.0);
                let positions: Vec<i32> = (start..start + count).collect();
                parts.push(self.attend(&queries, &keys, &values, Mask::At(&positions, None), look)?);
            }
        }
        Ok(parts)
    }

    /// On a CPU by our operations, or by MLX's anywhere; everything is rotated.
    fn in_operations(
        &self,
        layer: Layer<'_>,
        all: &Parts,
        kv: &mut KvPool,
        wanted: bool,
    ) -> Result<Vec<Array>> {
        if self.path == Path::Pure {
            self.write(layer.index, all, kv)?;
            if !wanted {
                return Ok(Vec::new());
            }
        }
        let mut parts = Vec::with_capacity(1 + self.runs.len());
        if let Some(group) = &self.rows {
            let part = all.rows((0, group.count))?;
            parts.push(if self.path == Path::Native {
                let (pool, (sinks, cap, window)) = (&kv.layers[layer.index], layer.look.numbers());
                let Parts { queries, keys, values } = &part;
                native::attend_rows(
                    queries,
                    keys,
                    values,
                    &pool.keys,
                    &pool.values,
                    &group.table,
                    &sinks,
                    self.scale,
                    cap,
                    window,
                )?
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

    /// `queries [rows, heads, count, dim]` to `keys` and `values` `[rows, kv_heads, length, dim]`:
    /// `[rows · count, heads · dim]`.
    fn attend(
        &self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        mask: Mask<'_>,
        look: &Look,
    ) -> Result<Array> {
        let (rows, heads, count, dim) = (queries.dim(0), queries.dim(1), queries.dim(2), queries.dim(3));
        let windowed = look.window.map(|window| mask.within(window, rows, keys.dim(2))).transpose()?;
        let mask = windowed.as_ref().map_or(mask, Mask::Seen);
        let attended = match (look.cap, mask) {
            (Some(cap), mask) => {
                let seen = mask.array(count, keys.dim(2))?;
                capped(queries, keys, values, (self.scale, cap), seen.as_ref())?
            }
            (None, Mask::At(_, None)) => {
                let causal = fast::ScaledDotProductAttentionMask::Causal;
                let sinks = look.sinks.as_ref();
                fast::scaled_dot_product_attention(queries, keys, values, self.scale, causal, sinks)?
            }
            (None, Mask::At(_, Some(seen)) | Mask::Seen(seen)) => {
                let sinks = look.sinks.as_ref();
                fast::scaled_dot_product_attention(queries, keys, values, self.scale, seen, sinks)?
            }
        };
        attended.swap_axes(1, 2)?.reshape(&[rows * count, heads * dim])
    }

    fn native_run(
        &self,
        layer: Layer<'_>,
        part: &Parts,
        kv: &mut KvPool,
        run: &Run,
        wanted: bool,
    ) -> Result<Option<Array>> {
        let (pool, Parts { queries, keys, values }) = (&kv.layers[layer.index], part);
        let (pool_keys, pool_values) = (&pool.keys, &pool.values);
        if wanted {
            let (sinks, cap, window) = layer.look.numbers();
            native::attend_run(
                queries,
                keys,
                values,
                pool_keys,
                pool_values,
                &run.table,
                &sinks,
                self.scale,
                cap,
                window,
            )
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
        kv.write(layer, [blocks, offsets], &all.keys, &all.values)
    }

    fn gathered_rows(&self, layer: Layer<'_>, part: &Parts, kv: &KvPool, group: &RowGroup) -> Result<Array> {
        let Some(gathered) = &group.gathered else { unreachable!("the pure path gathers") };
        let (heads, dim) = (part.queries.dim(1), part.queries.dim(2));
        let (keys, values) = kv.gather(layer.index, &gathered.blocks, group.count)?;
        let queries = part.queries.reshape(&[group.count, heads, 1, dim])?;
        self.attend(&queries, &keys, &values, gathered.mask(), layer.look)
    }

    fn gathered_run(&self, layer: Layer<'_>, part: &Parts, kv: &KvPool, run: &Run) -> Result<Array> {
        let Some(gathered) = &run.gathered else { unreachable!("the pure path gathers") };
        let (keys, values) = kv.gather(layer.index, &gathered.blocks, 1)?;
        let length = run.start as i32 + run.rows.1 - run.rows.0;
        let last = [1, keys.dim(1), length, keys.dim(3)];
        let (keys, values) = (raw::slice(&keys, &[0; 4], &last)?, raw::slice(&values, &[0; 4], &last)?);
        let queries = part.queries.swap_axes(0, 1)?.expand_dims(0)?;
        self.attend(&queries, &keys, &values, gathered.mask(), layer.look)
    }
}

/// Which keys a query sees.
#[derive(Debug, Clone, Copy)]
enum Mask<'a> {
    /// The queries stand at these positions, one a row of the batch, or those of a run; everything before them is seen where
    /// nothing else is said.
    At(&'a [i32], Option<&'a Array>),
    /// `[rows, 1, count, length]`.
    Seen(&'a Array),
}

impl Gathered {
    fn mask(&self) -> Mask<'_> {
        Mask::At(&self.positions, self.mask.as_ref())
    }
}

impl Mask<'_> {
    /// The last `window` of what is seen, `[rows, 1, count, length]`.
    fn within(self, window: i32, rows: i32, length: i32) -> Result<Array> {
        let Self::At(positions, _) = self else {
            return Err(Exception::custom("a window needs positions"));
        };
        let count = positions.len() as i32 / rows;
        let queries = Array::from_slice(positions, &[rows, 1, count, 1]);
        let keys = Array::from_slice(&(0..length).collect::<Vec<_>>(), &[length]);
        let first = queries.subtract(Array::from_int(window))?;
        keys.le(&queries)?.logical_and(keys.gt(&first)?)
    }

    /// Of `count` queries and `length` keys; none where everything is seen.
    fn array(self, count: i32, length: i32) -> Result<Option<Array>> {
        match self {
            Self::Seen(seen) => Ok(Some(seen.clone())),
            Self::At(_, Some(seen)) => Ok(Some(seen.clone())),
            Self::At(_, None) if count == 1 => Ok(None),
            Self::At(_, None) => {
                let keys = Array::from_slice(&(0..length).collect::<Vec<_>>(), &[length]);
                let queries = (length - count..length).collect::<Vec<_>>();
                keys.le(Array::from_slice(&queries, &[count, 1])).map(Some)
            }
        }
    }
}

/// Attention whose scores stay between -cap and cap, in MLX's basic operations; shapes as in [`Attention::attend`].
fn capped(
    queries: &Array,
    keys: &Array,
    values: &Array,
    (scale, cap): (f32, f32),
    seen: Option<&Array>,
) -> Result<Array> {
    let (rows, heads, count, dim) = (queries.dim(0), queries.dim(1), queries.dim(2), queries.dim(3));
    let kv_heads = keys.dim(1);
    let number = |value: f32| Array::from_f32(value).as_dtype(queries.dtype());
    let queries =
        queries.multiply(number(scale / cap)?)?.reshape(&[rows, kv_heads, heads / kv_heads, count, dim])?;
    let (keys, values) = (keys.expand_dims(2)?, values.expand_dims(2)?);
    let scores = tanh(queries.matmul(keys.swap_axes(3, 4)?)?)?.multiply(number(cap)?)?;
    let scores = match seen {
        Some(seen) => {
            let seen = if seen.ndim() == 4 { seen.expand_dims(2)? } else { seen.clone() };
            select(seen, &scores, number(f32::NEG_INFINITY)?)?
        }
        None => scores,
    };
    let weights = softmax_axis(&scores, -1, true)?;
    weights.matmul(&values)?.reshape(&[rows, heads, count, dim])
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

fn rows_of(array: &Array, (from, to): (i32, i32)) -> Result<Array> {
    if from == 0 && to == array.dim(0) {
        return Ok(array.clone());
    }
    raw::slice(array, &[from, 0, 0], &[to, array.dim(1), array.dim(2)])
}
