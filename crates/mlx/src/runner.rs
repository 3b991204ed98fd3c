//! [`engine::Model`] over a family's tensors: turns a step's slices into one forward pass and its logits into tokens.
//!
//! Owns the KV of all blocks and the steps in flight. A pass is one over the tokens of all slices: first those of rows
//! that append a single token, then those of longer runs. Passes of rows alone are compiled on a GPU, for a few numbers
//! of rows and blocks to which the real ones are filled up.

use crate::{
    attention::{Attention, RowGroup},
    kv::{KvPool, backend},
    layers::{Path, Wanted},
    models::{Family, StepInput},
    raw::Compiled,
    sampler::{self, Draws},
    step::{BLOCK_BUCKET, Ordered, block_bucket, blocks_of, rows_table},
};
use engine::{Input, Model, ModelError, ModelLimits, RowSampling, Slice};
use mlx_rs::{
    Array,
    error::Result,
    ops::{concatenate, lt, select},
    transforms::{async_eval, eval},
};
use std::{collections::VecDeque, rc::Rc};
use types::{ModelCard, TokenId};

/// Rows of compiled passes.
const ROW_BUCKETS: [usize; 14] = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];

/// A loaded model.
#[derive(Debug)]
pub(crate) struct Runner {
    card: ModelCard,
    limits: ModelLimits,
    family: Rc<dyn Family>,
    path: Path,
    kv: KvPool,
    compiled: Option<Compiled>,
    flights: VecDeque<Flight>,
}

/// A step in flight.
#[derive(Debug)]
struct Flight {
    /// Drawn tokens as i32; none where no slice samples.
    tokens: Option<Array>,
    /// For each slice that samples, in the engine's order, where its token is among them.
    order: Vec<usize>,
}

impl Runner {
    pub(crate) fn new(
        card: ModelCard,
        limits: ModelLimits,
        family: Box<dyn Family>,
        path: Path,
    ) -> Result<Self> {
        let kv = KvPool::new(family.dims().kv, limits.blocks, path)?;
        let family: Rc<dyn Family> = family.into();
        let compiled = match path {
            Path::Kernel => Some(compile(&family, &kv)?),
            Path::Native | Path::Pure => None,
        };
        Ok(Self { card, limits, family, path, kv, compiled, flights: VecDeque::new() })
    }

    /// Builds the graphs of passes that are sure to come, so that none is built while clients wait.
    pub(crate) fn warm_up(&mut self) -> Result<()> {
        if self.compiled.is_none() {
            return Ok(());
        }
        let most = bucket(self.limits.slots);
        for rows in ROW_BUCKETS.into_iter().take_while(|&rows| rows <= most) {
            let pass = RowsPass {
                tokens: Array::from_slice(&vec![0_i32; rows], &[rows as i32]),
                table: rows_table(&[], rows, BLOCK_BUCKET),
                draws: Draws::new(&[], &[], rows, self.card.vocab_size),
            };
            let drawn = self.rows_pass(&pass)?;
            eval([&drawn])?;
        }
        Ok(())
    }

    /// How many graphs of passes were built.
    #[cfg(test)]
    pub(crate) fn traced(&self) -> u64 {
        self.compiled.as_ref().map_or(0, Compiled::traced)
    }

    fn forward(&mut self, slices: &[Slice<'_>]) -> Result<Flight> {
        let ordered = Ordered::new(slices);
        if self.path == Path::Pure {
            return self.forward_pure(&ordered);
        }
        let tokens = self.tokens(&ordered)?;
        let rows_alone = ordered.runs().is_empty() && ordered.sampling.len() == ordered.singles;
        let drawn = if self.compiled.is_some() && rows_alone {
            Some(self.forward_rows(&ordered, tokens)?)
        } else {
            let attention = ordered.attention(self.path, self.family.dims().scale);
            let positions = ordered.positions(self.path);
            let wanted = Wanted::Rows(&ordered.wanted);
            let input =
                StepInput { tokens: tokens.clone(), positions: &positions, attention: &attention, wanted };
            let logits = self.family.forward(&input, &mut self.kv)?;
            let count = ordered.sampling.len();
            let draw = |logits: Array| {
                let draws = Draws::new(&ordered.sampling, &ordered.late, count, self.card.vocab_size);
                sampler::draw_on_device(&logits, &draws, &tokens, self.path)
            };
            logits.map(draw).transpose()?
        };
        let pending = std::mem::take(&mut self.kv.pending);
        async_eval(drawn.iter().chain(&pending).chain([&self.kv.fence]))?;
        Ok(Flight { tokens: drawn, order: ordered.order })
    }

    /// The step in MLX's operations, which write in place only what nothing else holds: everything is evaluated.
    fn forward_pure(&mut self, ordered: &Ordered<'_>) -> Result<Flight> {
        let named = ordered.slices.iter().flat_map(|slice| slice.blocks).map(|block| block.0 as usize + 1);
        self.kv.grow(named.max().unwrap_or(0))?;
        let before = match self.flights.back().and_then(|flight| flight.tokens.as_ref()) {
            Some(tokens) => known(tokens)?,
            None => Vec::new(),
        };
        let resolve = |index: usize| self.flights.back().map_or(0, |flight| before[flight.order[index]]);
        let mut tokens = Vec::new();
        let mut outputs = Vec::new();
        for slice in &ordered.slices {
            let mut late = None;
            match slice.input {
                Input::Tokens(given) => tokens.extend(given.iter().map(|&token| token as i32)),
                Input::Drawn(index) => {
                    late = Some(resolve(index));
                    tokens.push(resolve(index) as i32);
                }
            }
            if let Some(sampling) = slice.sample {
                outputs.push(sampling.output.iter().copied().chain(late).collect::<Vec<_>>());
            }
        }
        let tokens = Array::from_slice(&tokens, &[tokens.len() as i32]);
        let attention = ordered.attention(self.path, self.family.dims().scale);
        let positions = ordered.positions(self.path);
        let wanted = Wanted::Rows(&ordered.wanted);
        let input = StepInput { tokens, positions: &positions, attention: &attention, wanted };
        let logits = self.family.forward(&input, &mut self.kv)?;
        eval(self.kv.arrays().chain(&logits))?;
        let sampling = ordered.sampling.iter().zip(&outputs);
        let sampling: Vec<_> = sampling.map(|(row, output)| RowSampling { output, ..*row }).collect();
        let drawn = match logits {
            Some(logits) => {
                let drawn = sampler::sample(&logits, &sampling)?;
                let drawn: Vec<i32> = drawn.into_iter().map(|token| token as i32).collect();
                Some(Array::from_slice(&drawn, &[drawn.len() as i32]))
            }
            None => None,
        };
        Ok(Flight { tokens: drawn, order: ordered.order.clone() })
    }

    /// The step's tokens `[n]` as i32, on the device where the host does not know them yet.
    fn tokens(&self, ordered: &Ordered<'_>) -> Result<Array> {
        let before = self.flights.back();
        let mut known = Vec::new();
        let mut drawn = Vec::new();
        for slice in &ordered.slices {
            match slice.input {
                Input::Tokens(tokens) => known.extend(tokens.iter().map(|&token| token as i32)),
                Input::Drawn(index) => {
                    known.push(-1);
                    drawn.push(before.and_then(|flight| flight.order.get(index)).map_or(0, |&at| at as i32));
                }
            }
        }
        let count = known.len() as i32;
        let (false, Some(Flight { tokens: Some(tokens), .. })) = (drawn.is_empty(), before) else {
            return Ok(Array::from_slice(&known, &[count]));
        };
        let device = |at: &[i32]| Wanted::Rows(at).of(tokens);
        if drawn.len() == known.len() {
            return device(&drawn);
        }
        if known[drawn.len()..].iter().all(|&token| token >= 0) {
            // Rows that go on, then the rest.
            let rest = &known[drawn.len()..];
            return concatenate(&[device(&drawn)?, Array::from_slice(rest, &[rest.len() as i32])], 0);
        }
        let mut next = drawn.iter();
        let at: Vec<i32> = known
            .iter()
            .map(|&token| if token < 0 { next.next().copied().unwrap_or(0) } else { 0 })
            .collect();
        let known = Array::from_slice(&known, &[count]);
        let at = Array::from_slice(&at, &[count]);
        select(lt(&known, Array::from_int(0))?, tokens.take_axis(at, 0)?, &known)
    }

    /// A pass of rows alone, filled up to a shape for which there is a graph.
    fn forward_rows(&mut self, ordered: &Ordered<'_>, tokens: Array) -> Result<Array> {
        let count = ordered.singles;
        let rows = bucket(count);
        let blocks = ordered.slices.iter().map(|slice| blocks_of(slice.start + 1)).max().unwrap_or(0);
        let tokens = if rows == count {
            tokens
        } else {
            let more = vec![0_i32; rows - count];
            concatenate(&[tokens, Array::from_slice(&more, &[more.len() as i32])], 0)?
        };
        let pass = RowsPass {
            tokens,
            table: rows_table(&ordered.slices, rows, block_bucket(blocks)),
            draws: Draws::new(&ordered.sampling, &ordered.late, rows, self.card.vocab_size),
        };
        self.rows_pass(&pass)
    }

    fn rows_pass(&mut self, pass: &RowsPass) -> Result<Array> {
        let Some(compiled) = &self.compiled else { unreachable!("only where passes are compiled") };
        let RowsPass { tokens, table, draws } = pass;
        let mut outputs =
            compiled.call(&[tokens, table, &draws.rows, &draws.changes, &self.kv.fence])?.into_iter();
        let mut next =
            || outputs.next().ok_or_else(|| mlx_rs::error::Exception::custom("an output is missing"));
        let drawn = next()?;
        self.kv.fence = next()?;
        Ok(drawn)
    }
}

/// What a compiled pass takes beside the fence.
#[derive(Debug)]
struct RowsPass {
    tokens: Array,
    table: Array,
    draws: Draws,
}

/// The pass of rows alone: tokens, tables, draws, changes and fence to drawn tokens and fence.
fn compile(family: &Rc<dyn Family>, kv: &KvPool) -> Result<Compiled> {
    let (family, kv) = (Rc::clone(family), kv.clone());
    Compiled::new(move |inputs: &[Array]| {
        let [tokens, table, rows, changes, fence] = inputs else {
            return Err(mlx_rs::error::Exception::custom(format!("{} inputs instead of 5", inputs.len())));
        };
        // The pools are constants of the graph: their memory stays where it is.
        let mut kv = kv.behind(fence);
        let attention = Attention {
            path: Path::Kernel,
            scale: family.dims().scale,
            rows: Some(RowGroup { count: tokens.dim(0), table: table.clone(), gathered: None }),
            runs: Vec::new(),
            targets: None,
        };
        let input =
            StepInput { tokens: tokens.clone(), positions: &[], attention: &attention, wanted: Wanted::All };
        let logits = family.forward(&input, &mut kv)?;
        let logits = logits.ok_or_else(|| mlx_rs::error::Exception::custom("no logits"))?;
        let draws = Draws { rows: rows.clone(), changes: changes.clone() };
        Ok(vec![sampler::draw_on_device(&logits, &draws, tokens, Path::Kernel)?, kv.fence])
    })
}

impl Model for Runner {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn limits(&self) -> ModelLimits {
        self.limits
    }

    fn submit(&mut self, slices: &[Slice<'_>]) -> std::result::Result<(), ModelError> {
        let flight = self.forward(slices).map_err(backend)?;
        self.flights.push_back(flight);
        Ok(())
    }

    fn collect(&mut self) -> std::result::Result<Vec<TokenId>, ModelError> {
        let Some(flight) = self.flights.pop_front() else {
            return Err(ModelError::Backend("no step is in flight".to_owned()));
        };
        let Some(tokens) = flight.tokens else {
            // Nothing to read; but what follows must not run ahead without bound.
            eval([&self.kv.fence]).map_err(backend)?;
            return Ok(Vec::new());
        };
        let drawn = known(&tokens).map_err(backend)?;
        Ok(flight.order.into_iter().map(|at| drawn[at]).collect())
    }
}

/// Tokens of the device on the host: the one read of a step.
fn known(tokens: &Array) -> Result<Vec<TokenId>> {
    tokens.eval()?;
    Ok(tokens.as_slice::<i32>().iter().map(|&token| token as TokenId).collect())
}

fn bucket(rows: usize) -> usize {
    ROW_BUCKETS.into_iter().find(|&bucket| bucket >= rows).unwrap_or_else(|| rows.next_multiple_of(64))
}
