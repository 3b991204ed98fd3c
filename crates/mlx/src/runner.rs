//! [`engine::Model`] over a family's tensors: turns a step's slices into one forward pass and its logits into tokens.
//!
//! Owns the KV of all blocks and the steps in flight. A pass is one over the tokens of all slices: first those of rows
//! that append a single token, then those of longer runs. On a GPU passes of rows, and of rows beside short runs, are
//! compiled ones ([`crate::passes`]).

use crate::{
    kv::{KvPool, backend},
    layers::{Path, Wanted},
    models::{Family, StepInput},
    passes::Passes,
    sampler::{self, Draws},
    step::Ordered,
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

/// A loaded model.
#[derive(Debug)]
pub(crate) struct Runner {
    card: ModelCard,
    limits: ModelLimits,
    family: Rc<dyn Family>,
    path: Path,
    kv: KvPool,
    passes: Option<Passes>,
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
        let passes = match path {
            Path::Kernel => Some(Passes::new(&family, &kv, limits.slots, card.vocab_size)?),
            Path::Native | Path::Pure => None,
        };
        Ok(Self { card, limits, family, path, kv, passes, flights: VecDeque::new() })
    }

    /// How many graphs of passes were built.
    #[cfg(test)]
    pub(crate) fn traced(&self) -> u64 {
        self.passes.as_ref().map_or(0, Passes::traced)
    }

    fn forward(&mut self, slices: &[Slice<'_>]) -> Result<Flight> {
        let ordered = Ordered::new(slices);
        if self.path == Path::Pure {
            return self.forward_pure(&ordered);
        }
        let places = self.passes.as_ref().and_then(|passes| passes.places(&ordered));
        let drawn = if let (Some(passes), Some(places)) = (&self.passes, places) {
            let placed = ordered.placed(&places);
            let tokens = self.tokens(&ordered, &placed, places.count)?;
            passes.run(places, &ordered, &placed, tokens, &mut self.kv)?
        } else {
            let count = ordered.slices.iter().map(|slice| slice.input.count()).sum();
            let tokens = self.tokens(&ordered, &(0..count).collect::<Vec<_>>(), count)?;
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

    /// The step's tokens as i32, on the device where the host does not know them yet: the i-th at `placed[i]` of
    /// `[count]`, with anything between them.
    fn tokens(&self, ordered: &Ordered<'_>, placed: &[usize], count: usize) -> Result<Array> {
        let before = self.flights.back();
        let mut known = vec![0; count];
        let mut drawn = Vec::new();
        let mut placed = placed.iter();
        for slice in &ordered.slices {
            let mut put = |token: i32| {
                if let Some(&at) = placed.next() {
                    known[at] = token;
                }
            };
            match slice.input {
                Input::Tokens(tokens) => tokens.iter().for_each(|&token| put(token as i32)),
                Input::Drawn(index) => {
                    put(-1);
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
        let (first, rest) = known.split_at(drawn.len());
        if first.iter().all(|&token| token < 0) {
            // Rows that go on, then the rest.
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

    fn prepare(&mut self) -> std::result::Result<bool, ModelError> {
        match &self.passes {
            Some(passes) => passes.warm(&mut self.kv).map_err(backend),
            None => Ok(false),
        }
    }
}

/// Tokens of the device on the host: the one read of a step.
fn known(tokens: &Array) -> Result<Vec<TokenId>> {
    tokens.eval()?;
    Ok(tokens.as_slice::<i32>().iter().map(|&token| token as TokenId).collect())
}
