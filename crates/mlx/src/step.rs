//! One step's slices as the forward pass needs them: in order, with their block tables.

use crate::{
    attention::{Attention, Gathered, RowGroup, Run, ShortRuns, Targets},
    kernels::Tile,
    kv::BLOCK,
    layers::Path,
};
use engine::{BlockId, Input, RowSampling, Slice};
use mlx_rs::{Array, error::Result, ops::concatenate};
use types::{BLOCK_TOKENS, TokenId};

/// Blocks of a row in compiled passes: this many tokens, doubled as often as needed.
pub(crate) const BLOCK_BUCKET: usize = 256 / BLOCK_TOKENS;

/// A step's slices in the order in which they are computed.
#[derive(Debug)]
pub(crate) struct Ordered<'a> {
    /// Slices of one token, then longer ones.
    pub(crate) slices: Vec<&'a Slice<'a>>,
    pub(crate) singles: usize,
    /// Rows of the step whose logits are wanted: of the slices that sample the last token's and those before its guesses, and
    /// all that are to be told of.
    pub(crate) wanted: Vec<i32>,
    /// Of the tokens that are drawn: which of these, and how to draw.
    pub(crate) sampled: Vec<i32>,
    pub(crate) sampling: Vec<RowSampling<'a>>,
    /// Of the slices that tell of their prompt, in the engine's order.
    pub(crate) scores: Vec<Score<'a>>,
    /// For each of them the row of its own token where that is being drawn.
    pub(crate) late: Vec<Option<usize>>,
    /// For each token that is drawn, in the engine's order, where it is among them.
    pub(crate) order: Vec<usize>,
}

/// What a slice tells of its prompt.
#[derive(Debug)]
pub(crate) struct Score<'a> {
    /// Its first among the wanted rows: one for each target.
    pub(crate) first: usize,
    pub(crate) targets: &'a [TokenId],
    pub(crate) top: u32,
}

impl<'a> Ordered<'a> {
    pub(crate) fn new(slices: &'a [Slice<'a>]) -> Self {
        let single = |slice: &Slice<'_>| slice.input.count() == 1;
        let mut indexes: Vec<usize> = (0..slices.len()).collect();
        // A stable sort: single tokens first, everything else as it came.
        indexes.sort_by_key(|&index| !single(&slices[index]));
        let singles = slices.iter().filter(|slice| single(slice)).count();
        let (mut wanted, mut sampled, mut sampling, mut late, mut computed) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut scores = Vec::new();
        let mut row = 0;
        for &index in &indexes {
            let slice = &slices[index];
            if let Some(score) = slice.score {
                let score = Score { first: wanted.len(), targets: score.targets, top: score.top };
                wanted.extend((row..row + score.targets.len()).map(|row| row as i32));
                scores.push((index, score));
            }
            row += slice.input.count();
            // Where tokens are guessed, at the place of each and before them.
            let first = row - slice.draws();
            for (at, sample) in (first..).zip(slice.rows()) {
                if wanted.last() != Some(&(at as i32)) {
                    wanted.push(at as i32);
                }
                sampled.push(wanted.len() as i32 - 1);
                sampling.push(sample);
                late.push(matches!(slice.input, Input::Drawn(_)).then_some(at));
                computed.push(index);
            }
        }
        let mut order: Vec<usize> = (0..computed.len()).collect();
        order.sort_by_key(|&at| computed[at]);
        scores.sort_by_key(|(index, _)| *index);
        let scores = scores.into_iter().map(|(_, score)| score).collect();
        let slices = indexes.into_iter().map(|index| &slices[index]).collect();
        Self { slices, singles, wanted, sampled, sampling, scores, late, order }
    }

    /// Whether its tokens are drawn from logits of their own, apart from the pass: they wait for masks, or more is told
    /// than which they are.
    pub(crate) fn is_drawn_apart(&self) -> bool {
        let apart = |row: &RowSampling<'_>| row.masked || row.logprobs.is_some();
        !self.scores.is_empty() || self.sampling.iter().any(apart)
    }

    /// Of tokens that are drawn and told more of, in the engine's order: where they are among these, and how many
    /// alternatives are told.
    pub(crate) fn told(&self) -> Vec<(usize, u32)> {
        let of = |&at: &usize| self.sampling[at].logprobs.map(|top| (at, top));
        self.order.iter().filter_map(of).collect()
    }

    /// Of slices that tell of their prompts: tokens and alternatives.
    pub(crate) fn scored(&self) -> Vec<(usize, u32)> {
        self.scores.iter().map(|score| (score.targets.len(), score.top)).collect()
    }

    pub(crate) fn runs(&self) -> &[&'a Slice<'a>] {
        &self.slices[self.singles..]
    }

    /// Position of each token; our GPU kernels read them in the tables.
    pub(crate) fn positions(&self, path: Path) -> Vec<i32> {
        if path == Path::Kernel {
            return Vec::new();
        }
        let of_slice = |slice: &&Slice<'_>| slice.start..slice.start + slice.input.count();
        self.slices.iter().flat_map(of_slice).map(|position| position as i32).collect()
    }

    /// What the step attends to.
    pub(crate) fn attention(&self, path: Path, scale: f32) -> Attention {
        let pure = path == Path::Pure;
        let singles = &self.slices[..self.singles];
        let blocks = singles.iter().map(|slice| blocks_of(slice.start + 1)).max().unwrap_or(0);
        let blocks = if path == Path::Kernel { block_bucket(blocks) } else { blocks };
        let rows = (!singles.is_empty()).then(|| RowGroup {
            count: singles.len() as i32,
            table: tokens_table(singles, singles.len(), blocks),
            appended: None,
            gathered: pure.then(|| gathered_rows(singles, blocks)),
        });
        let mut runs = Vec::with_capacity(self.runs().len());
        let mut row = self.singles as i32;
        for slice in self.runs() {
            let count = slice.input.count();
            let used = &slice.blocks[..blocks_of(slice.start + count)];
            let mut table = vec![slice.start as i32];
            if path == Path::Kernel {
                table.extend([row, count as i32]);
            }
            table.extend(ids(used));
            // Small arrays are passed to kernels in another way, which would be another kernel.
            let table = filled(table, 3 + BLOCK_BUCKET);
            runs.push(Run {
                rows: (row, row + count as i32),
                start: slice.start,
                table: Array::from_slice(&table, &[table.len() as i32]),
                gathered: pure.then(|| Gathered {
                    blocks: Array::from_slice(&ids(used).collect::<Vec<_>>(), &[used.len() as i32]),
                    positions: (slice.start..slice.start + count).map(|at| at as i32).collect(),
                    mask: None,
                }),
            });
            row += count as i32;
        }
        let targets = pure.then(|| targets(&self.slices));
        Attention { path, scale, rows, runs, short: None, targets }
    }

    /// The same on a GPU where all runs are short, for tokens placed by `places`.
    pub(crate) fn attention_in_tiles(&self, places: &Places, tile: Tile, scale: f32) -> Attention {
        let rows = (places.rows > 0).then(|| RowGroup {
            count: places.rows as i32,
            table: tokens_table(&self.slices[..self.singles], places.rows, places.blocks),
            appended: None,
            gathered: None,
        });
        let short = ShortRuns { tile, table: self.tiles_table(places) };
        let path = Path::Kernel;
        Attention { path, scale, rows, runs: Vec::new(), short: Some(short), targets: None }
    }

    /// The same on a GPU with every token as a row of its own.
    pub(crate) fn attention_in_rows(&self, places: &Places, scale: f32) -> Result<Attention> {
        let rows = RowGroup::together(tokens_table(&self.slices, places.rows, places.blocks))?;
        let path = Path::Kernel;
        Ok(Attention { path, scale, rows: Some(rows), runs: Vec::new(), short: None, targets: None })
    }

    /// Whether all tokens are drawn at, and some of them are guesses: each is a row then.
    pub(crate) fn is_rows_with_guesses(&self) -> bool {
        let tokens = |slice: &&&Slice<'_>| slice.draws() == slice.input.count();
        !self.runs().is_empty()
            && self.scores.is_empty()
            && self.slices.iter().filter(tokens).count() == self.slices.len()
    }

    /// Where the step's tokens are among `places.count`, one after another.
    pub(crate) fn placed(&self, places: &Places) -> Vec<usize> {
        let mut at = if places.guesses { self.singles } else { places.rows };
        let mut placed: Vec<usize> = (0..self.singles).collect();
        for slice in self.runs() {
            let count = slice.input.count();
            placed.extend(at..at + count);
            at += count.next_multiple_of(places.tile);
        }
        placed
    }

    /// Tokens of all runs, each filled up to whole tiles of `tile` tokens.
    pub(crate) fn tokens_in_tiles(&self, tile: usize) -> usize {
        self.runs().iter().map(|slice| slice.input.count().next_multiple_of(tile)).sum()
    }

    /// Most blocks that a slice's tokens attend to.
    pub(crate) fn blocks(&self) -> usize {
        let blocks = self.slices.iter().map(|slice| blocks_of(slice.start + slice.input.count()));
        blocks.max().unwrap_or(0)
    }

    /// See [`ShortRuns::table`].
    pub(crate) fn tiles_table(&self, places: &Places) -> Array {
        let tiles = (places.count - places.rows) / places.tile;
        let width = 1 + places.tile + places.blocks;
        let mut first_rows = (places.rows..).step_by(places.tile).map(|row| row as i32);
        let mut table = Vec::with_capacity(tiles * width);
        for slice in self.runs() {
            let end = slice.start + slice.input.count();
            for start in (slice.start..end).step_by(places.tile) {
                let positions = (start..start + places.tile).map(|at| if at < end { at as i32 } else { -1 });
                table.extend(first_rows.next());
                table.extend(positions);
                let used = &slice.blocks[..blocks_of(end)];
                table.extend(ids(used).chain(std::iter::repeat(0)).take(places.blocks));
            }
        }
        table.resize(tiles * width, -1);
        Array::from_slice(&table, &[tiles as i32, width as i32])
    }
}

/// Where the tokens of a step with short runs are: rows first, then runs, each filled up to whole tiles. Of a step of rows
/// and their guesses each token may be a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Places {
    /// Room for rows.
    pub(crate) rows: usize,
    /// Tokens of a tile.
    pub(crate) tile: usize,
    /// Room for all tokens.
    pub(crate) count: usize,
    /// Blocks of a table.
    pub(crate) blocks: usize,
    /// Whether each token is a row, those of runs too.
    pub(crate) guesses: bool,
}

/// Blocks of a row in passes that are compiled for it.
pub(crate) fn block_bucket(blocks: usize) -> usize {
    blocks.next_multiple_of(BLOCK_BUCKET).next_power_of_two()
}

fn ids(blocks: &[BlockId]) -> impl Iterator<Item = i32> {
    blocks.iter().map(|block| block.0 as i32)
}

fn filled(mut table: Vec<i32>, least: usize) -> Vec<i32> {
    table.resize(table.len().max(least), 0);
    table
}

/// `[rows, 1 + blocks]`: position and block table of each token; rows past these are marked as unused.
pub(crate) fn tokens_table(slices: &[&Slice<'_>], rows: usize, blocks: usize) -> Array {
    let mut table = Vec::with_capacity(rows * (1 + blocks));
    for slice in slices {
        for position in slice.start..slice.start + slice.input.count() {
            table.push(position as i32);
            let used = &slice.blocks[..blocks_of(position + 1)];
            table.extend(ids(used).chain(std::iter::repeat(0)).take(blocks));
        }
    }
    while table.len() < rows * (1 + blocks) {
        table.push(-1);
        table.extend(std::iter::repeat_n(0, blocks));
    }
    Array::from_slice(&table, &[rows as i32, 1 + blocks as i32])
}

impl RowGroup {
    /// Rows of which some are of one sequence, by their table.
    pub(crate) fn together(table: Array) -> Result<Self> {
        let count = table.dim(0);
        let indexes = Array::from_slice(&(0..count).collect::<Vec<_>>(), &[count, 1]);
        let appended = Some(concatenate(&[indexes, table.clone()], 1)?);
        Ok(Self { count, table, appended, gathered: None })
    }
}

fn gathered_rows(slices: &[&Slice<'_>], blocks: usize) -> Gathered {
    let mut table = Vec::with_capacity(slices.len() * blocks);
    let mut mask = Vec::with_capacity(slices.len() * blocks * BLOCK_TOKENS);
    for slice in slices {
        let used = &slice.blocks[..blocks_of(slice.start + 1)];
        table.extend(ids(used).chain(std::iter::repeat(0)).take(blocks));
        mask.extend((0..blocks * BLOCK_TOKENS).map(|at| at <= slice.start));
    }
    let shape = [slices.len() as i32, 1, 1, blocks as i32 * BLOCK];
    Gathered {
        blocks: Array::from_slice(&table, &[table.len() as i32]),
        positions: slices.iter().map(|slice| slice.start as i32).collect(),
        mask: Some(Array::from_slice(&mask, &shape)),
    }
}

/// Where each token of the step is written.
fn targets(slices: &[&Slice<'_>]) -> Targets {
    let places = slices.iter().flat_map(|slice| {
        (slice.start..slice.start + slice.input.count())
            .map(|at| (slice.blocks[at / BLOCK_TOKENS].0 as i32, (at % BLOCK_TOKENS) as i32))
    });
    let (blocks, offsets): (Vec<i32>, Vec<i32>) = places.unzip();
    let array = |values: &[i32]| Array::from_slice(values, &[values.len() as i32]);
    Targets { blocks: array(&blocks), offsets: array(&offsets) }
}

/// Blocks that hold `tokens` tokens.
pub(crate) fn blocks_of(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}
