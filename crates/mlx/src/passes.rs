//! Compiled passes of a GPU: rows alone, and rows beside short runs, each for a few shapes to which the real ones are
//! filled up. Building a pass takes the host longer than the device takes to compute a small one, and MLX's attention
//! plans anew for each new length of a run; a compiled pass costs neither.

use crate::{
    attention::{Attention, RowGroup, ShortRuns},
    kernels::{self, Tile, TileKind},
    kv::KvPool,
    layers::{Path, Wanted},
    models::{Dims, Family, Heads, StepInput},
    raw::Compiled,
    sampler::{self, Draws},
    step::{BLOCK_BUCKET, Ordered, Places, block_bucket, tokens_table},
};
use mlx_rs::{
    Array, Dtype,
    error::{Exception, Result},
    ops::zeros_dtype,
    transforms::eval,
};
use std::{cell::RefCell, collections::VecDeque, rc::Rc};
use types::BLOCK_TOKENS;

/// Rows of passes of rows alone.
const ROW_BUCKETS: [usize; 14] = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];
/// Room for rows beside runs: fewer kinds, since each comes with each number of tokens.
const ROW_BUCKETS_BESIDE: [usize; 6] = [1, 8, 16, 32, 64, 128];
/// Room for the tokens of runs.
const TOKEN_BUCKETS: [usize; 11] = [16, 32, 48, 64, 128, 256, 512, 768, 1024, 1536, 2048];
/// Blocks of tables in passes with runs: 4096 tokens, doubled as often as needed. Room costs little, each kind is built.
const RUN_BLOCKS_MIN: usize = 4096 / BLOCK_TOKENS;
/// More tokens than these are faster by MLX's attention, unless ours runs on matrix units too.
const LANES_TOKENS_MAX: usize = 256;
/// More rows and guesses than these are computed as runs beside rows: a text's tokens share its KV then.
const GUESSED_ROWS_MAX: usize = 256;
/// Room for which passes are built before anybody needs them.
const WARM_TOKENS_MAX: usize = 512;
/// The same of rows with guesses.
const WARM_GUESSED_ROWS_MAX: usize = 64;

/// The compiled passes of one model.
#[derive(Debug)]
pub(crate) struct Passes {
    rows: Compiled,
    /// The same up to the logits.
    rows_undrawn: Compiled,
    /// Rows and their guesses, each a row of its own.
    guesses: Compiled,
    guesses_undrawn: Compiled,
    runs: Option<RunPasses>,
    vocabulary: u32,
    dims: Dims,
    /// Shapes that are sure to come and were not built yet.
    to_warm: RefCell<VecDeque<Places>>,
}

/// Passes with runs.
#[derive(Debug)]
struct RunPasses {
    tile: Tile,
    /// Beside rows, or drawing tokens of their own.
    beside_rows: Compiled,
    /// The same up to the logits.
    beside_rows_undrawn: Compiled,
    /// Parts of prompts and nothing else: no logits.
    alone: Compiled,
}

impl Passes {
    pub(crate) fn new(family: &Rc<dyn Family>, kv: &KvPool, slots: usize, vocabulary: u32) -> Result<Self> {
        let dims = family.dims();
        let heads = Heads { queries: dims.heads, keys: dims.kv.heads, dim: dims.kv.head_dim };
        let of_rows = |drawn: bool, guesses: bool| {
            let (family, kv) = (Rc::clone(family), kv.clone());
            Compiled::new(move |inputs| pass_of_rows(inputs, (drawn, guesses), &*family, &kv))
        };
        let (rows, rows_undrawn) = (of_rows(true, false)?, of_rows(false, false)?);
        let (guesses, guesses_undrawn) = (of_rows(true, true)?, of_rows(false, true)?);
        let runs = match kernels::tile(heads, dims.kv.dtype, dims.plain) {
            Some(tile) => {
                let beside_rows = |drawn: bool| {
                    let (family, kv) = (Rc::clone(family), kv.clone());
                    Compiled::new(move |inputs| pass_beside_rows(inputs, drawn, &*family, &kv, tile))
                };
                let (alone, kv_alone) = (Rc::clone(family), kv.clone());
                Some(RunPasses {
                    tile,
                    beside_rows: beside_rows(true)?,
                    beside_rows_undrawn: beside_rows(false)?,
                    alone: Compiled::new(move |inputs| pass_of_runs(inputs, &*alone, &kv_alone, tile))?,
                })
            }
            None => None,
        };
        let to_warm = RefCell::default();
        let passes = Self { rows, rows_undrawn, guesses, guesses_undrawn, runs, vocabulary, dims, to_warm };
        passes.to_warm.borrow_mut().extend(passes.expected(slots));
        Ok(passes)
    }

    /// Builds one of the graphs that are sure to come, so that it is not built while clients wait; false: none is left.
    pub(crate) fn warm(&self, kv: &mut KvPool) -> Result<bool> {
        let Some(places) = self.to_warm.borrow_mut().pop_front() else { return Ok(false) };
        let count = places.count as i32;
        let entering = match self.dims.part.is_first() {
            true => zeros_dtype(&[count], Dtype::Int32)?,
            false => zeros_dtype(&[count, self.dims.hidden], self.dims.kv.dtype)?,
        };
        let drawn = self.run(places, &Ordered::new(&[]), &[], entering, kv)?;
        eval(drawn.iter().chain([&kv.fence]))?;
        Ok(true)
    }

    /// Shapes of short texts: longer ones only differ in their tables. The most likely first.
    fn expected(&self, slots: usize) -> Vec<Places> {
        let room = |buckets: &[usize]| {
            let most = bucket(slots, buckets);
            buckets.iter().copied().take_while(move |&rows| rows <= most).collect::<Vec<_>>()
        };
        let mut expected = Vec::new();
        for rows in room(&ROW_BUCKETS) {
            expected.push(Places { rows, tile: 1, count: rows, blocks: BLOCK_BUCKET, guesses: false });
        }
        if let Some(RunPasses { tile, .. }) = &self.runs {
            let tile = tile.tokens as usize;
            for rows in room(&ROW_BUCKETS_BESIDE) {
                for tokens in self.token_buckets().filter(|&tokens| tokens <= WARM_TOKENS_MAX) {
                    expected.push(Places {
                        rows,
                        tile,
                        count: rows + tokens,
                        blocks: RUN_BLOCKS_MIN,
                        guesses: false,
                    });
                }
            }
            for tokens in self.token_buckets() {
                expected.push(Places {
                    rows: 0,
                    tile,
                    count: tokens,
                    blocks: RUN_BLOCKS_MIN,
                    guesses: false,
                });
            }
        }
        let guessed = ROW_BUCKETS.into_iter().filter(|rows| (2..=WARM_GUESSED_ROWS_MAX).contains(rows));
        for rows in guessed {
            expected.push(Places { rows, tile: 1, count: rows, blocks: BLOCK_BUCKET, guesses: true });
        }
        expected
    }

    fn token_buckets(&self) -> impl Iterator<Item = usize> + use<> {
        let matrix = self.runs.as_ref().is_some_and(|runs| matches!(runs.tile.kind, TileKind::Matrix { .. }));
        let most = if matrix { usize::MAX } else { LANES_TOKENS_MAX };
        TOKEN_BUCKETS.into_iter().take_while(move |&tokens| tokens <= most)
    }

    /// How many graphs were built.
    #[cfg(test)]
    pub(crate) fn traced(&self) -> u64 {
        let runs = self.runs.as_ref().map_or(0, |runs| {
            runs.beside_rows.traced() + runs.beside_rows_undrawn.traced() + runs.alone.traced()
        });
        let rows = [&self.rows, &self.rows_undrawn, &self.guesses, &self.guesses_undrawn];
        rows.map(Compiled::traced).iter().sum::<u64>() + runs
    }

    /// Where the step's tokens are in the pass to which it is filled up; none where there is no compiled pass for such steps.
    pub(crate) fn places(&self, ordered: &Ordered<'_>) -> Option<Places> {
        let singles = &ordered.slices[..ordered.singles];
        if singles.iter().any(|slice| slice.sample.is_none()) || !ordered.scores.is_empty() {
            return None;
        }
        let blocks = block_bucket(ordered.blocks());
        if ordered.runs().is_empty() {
            let rows = bucket(ordered.singles, &ROW_BUCKETS);
            return Some(Places { rows, tile: 1, count: rows, blocks, guesses: false });
        }
        if ordered.is_rows_with_guesses() && ordered.sampling.len() <= GUESSED_ROWS_MAX {
            let rows = bucket(ordered.sampling.len(), &ROW_BUCKETS);
            return Some(Places { rows, tile: 1, count: rows, blocks, guesses: true });
        }
        let tile = self.runs.as_ref()?.tile.tokens as usize;
        let tokens = ordered.tokens_in_tiles(tile);
        let tokens = self.token_buckets().find(|&room| room >= tokens)?;
        let blocks = blocks.max(RUN_BLOCKS_MIN);
        if ordered.sampling.is_empty() {
            return Some(Places { rows: 0, tile, count: tokens, blocks, guesses: false });
        }
        // Room for rows is room for drawn tokens: those of prompts that end are among them. There is always some, since no
        // kernel takes none.
        let rows = bucket(ordered.sampling.len(), &ROW_BUCKETS_BESIDE);
        Some(Places { rows, tile, count: rows + tokens, blocks, guesses: false })
    }

    /// Runs a pass over tokens that are where `placed` says; the drawn ones `[rows]`, if any, or the logits `[rows,
    /// vocabulary]` of those that are drawn apart: the first ones are those that sample. A part of a model draws apart, and
    /// gives all that entered where another part follows.
    pub(crate) fn run(
        &self,
        places: Places,
        ordered: &Ordered<'_>,
        placed: &[usize],
        tokens: Array,
        kv: &mut KvPool,
    ) -> Result<Option<Array>> {
        let room = places.rows;
        let singles = if places.guesses { &ordered.slices[..] } else { &ordered.slices[..ordered.singles] };
        let table = || tokens_table(singles, places.rows, places.blocks);
        let (rows, rows_undrawn) = match places.guesses {
            true => (&self.guesses, &self.guesses_undrawn),
            false => (&self.rows, &self.rows_undrawn),
        };
        let apart = ordered.is_drawn_apart() || !self.dims.part.is_whole();
        let draws = || Draws::new(&ordered.sampling, &ordered.late, room, self.vocabulary);
        let outputs = match &self.runs {
            Some(passes) if places.rows == 0 => {
                passes.alone.call(&[&tokens, &ordered.tiles_table(&places), &kv.fence])?
            }
            Some(passes) if places.count > places.rows => {
                let mut wanted: Vec<i32> =
                    ordered.wanted.iter().map(|&at| placed[at as usize] as i32).collect();
                wanted.resize(room, 0);
                let wanted = Array::from_slice(&wanted, &[room as i32]);
                let (table, tiles) = (table(), ordered.tiles_table(&places));
                if apart {
                    passes.beside_rows_undrawn.call(&[&tokens, &table, &tiles, &wanted, &kv.fence])?
                } else {
                    let draws = draws();
                    let inputs = [&tokens, &table, &tiles, &wanted, &draws.rows, &draws.changes, &kv.fence];
                    passes.beside_rows.call(&inputs)?
                }
            }
            _ if apart => rows_undrawn.call(&[&tokens, &table(), &kv.fence])?,
            _ => {
                let (table, draws) = (table(), draws());
                rows.call(&[&tokens, &table, &draws.rows, &draws.changes, &kv.fence])?
            }
        };
        let mut outputs = outputs.into_iter();
        kv.fence = outputs.next().ok_or_else(|| Exception::custom("the fence is missing"))?;
        Ok(outputs.next())
    }
}

/// Tokens, tables, draws and changes where they are drawn, and fence to fence and drawn tokens, or logits. With guesses some
/// rows follow others in the same text.
fn pass_of_rows(
    inputs: &[Array],
    (drawn, guesses): (bool, bool),
    family: &dyn Family,
    kv: &KvPool,
) -> Result<Vec<Array>> {
    let (tokens, table, draws, fence) = match inputs {
        [tokens, table, rows, changes, fence] if drawn => (tokens, table, Some((rows, changes)), fence),
        [tokens, table, fence] if !drawn => (tokens, table, None, fence),
        _ => return Err(Exception::custom(format!("{} inputs of a pass of rows", inputs.len()))),
    };
    let rows = match guesses {
        true => RowGroup::together(table.clone())?,
        false => RowGroup { count: tokens.dim(0), table: table.clone(), appended: None, gathered: None },
    };
    let attention = Attention {
        path: Path::Kernel,
        scale: family.dims().scale,
        rows: Some(rows),
        runs: Vec::new(),
        short: None,
        targets: None,
    };
    pass(tokens, &attention, Wanted::All, draws, family, kv.behind(fence))
}

/// Tokens, tables of rows and of tiles, wanted rows, draws and changes where they are drawn, and fence to fence and drawn
/// tokens, or logits.
fn pass_beside_rows(
    inputs: &[Array],
    drawn: bool,
    family: &dyn Family,
    kv: &KvPool,
    tile: Tile,
) -> Result<Vec<Array>> {
    let (tokens, table, tiles, wanted, draws, fence) = match inputs {
        [tokens, table, tiles, wanted, rows, changes, fence] if drawn => {
            (tokens, table, tiles, wanted, Some((rows, changes)), fence)
        }
        [tokens, table, tiles, wanted, fence] if !drawn => (tokens, table, tiles, wanted, None, fence),
        _ => return Err(Exception::custom(format!("{} inputs of a pass beside rows", inputs.len()))),
    };
    let count = table.dim(0);
    let attention = Attention {
        path: Path::Kernel,
        scale: family.dims().scale,
        rows: Some(RowGroup { count, table: table.clone(), appended: None, gathered: None }),
        runs: Vec::new(),
        short: Some(ShortRuns { tile, table: tiles.clone() }),
        targets: None,
    };
    pass(tokens, &attention, Wanted::At(wanted), draws, family, kv.behind(fence))
}

/// Tokens, tables of tiles and fence to fence.
fn pass_of_runs(inputs: &[Array], family: &dyn Family, kv: &KvPool, tile: Tile) -> Result<Vec<Array>> {
    let [tokens, tiles, fence] = inputs else {
        return Err(Exception::custom(format!("{} inputs instead of 3", inputs.len())));
    };
    let attention = Attention {
        path: Path::Kernel,
        scale: family.dims().scale,
        rows: None,
        runs: Vec::new(),
        short: Some(ShortRuns { tile, table: tiles.clone() }),
        targets: None,
    };
    let mut kv = kv.behind(fence);
    let wanted = Wanted::Rows(&[]);
    let entering = tokens.clone();
    let input = StepInput { entering, positions: &[], attention: &attention, wanted };
    let hidden = family.forward(&input, &mut kv)?;
    Ok([kv.fence].into_iter().chain(hidden).collect())
}

/// The pools of `kv` are constants of the graph: their memory stays where it is.
fn pass(
    tokens: &Array,
    attention: &Attention,
    wanted: Wanted<'_>,
    draws: Option<(&Array, &Array)>,
    family: &dyn Family,
    mut kv: KvPool,
) -> Result<Vec<Array>> {
    let input = StepInput { entering: tokens.clone(), positions: &[], attention, wanted };
    let logits = family.forward(&input, &mut kv)?.ok_or_else(|| Exception::custom("no logits"))?;
    let Some((rows, changes)) = draws else { return Ok(vec![kv.fence, logits]) };
    let draws = Draws { rows: rows.clone(), changes: changes.clone() };
    let drawn = sampler::draw_on_device(&logits, &draws, tokens, Path::Kernel)?;
    Ok(vec![kv.fence, drawn])
}

fn bucket(rows: usize, buckets: &[usize]) -> usize {
    buckets.iter().copied().find(|&bucket| bucket >= rows).unwrap_or_else(|| rows.next_multiple_of(64))
}
