//! [`engine::Model`] over a family's tensors: turns a step's slices into one forward pass and its logits into tokens.
//!
//! Owns the KV of all blocks and the steps in flight. A pass is one over the tokens of all slices: first those of rows
//! that append a single token, then those of longer runs. On a GPU passes of rows, and of rows beside short runs, are
//! compiled ones ([`crate::passes`]).
//!
//! Where rows wait for masks, or more is told of tokens than which they are, a pass ends at the logits and its tokens are
//! drawn in a graph of their own, at once or with [`Model::draw`].
//!
//! Over a part of a model's layers it is one stage of a pipeline ([`crate::pipeline`]): what enters comes from the stage
//! before, what leaves is what the next one needs, and only the last one draws, apart from its pass.

use crate::{
    kv::{KvPool, backend},
    layers::{Path, Wanted},
    logprobs::{self, Logprobs},
    models::{Dims, Family, Part, StepInput},
    passes::Passes,
    sampler::{self, Draws},
    step::Ordered,
};
use engine::{
    DrawnToken, Input, Model, ModelError, ModelLimits, RowSampling, Slice, StepOutput, grammar::TokenMask,
};
use mlx_rs::{
    Array,
    error::{Exception, Result},
    ops::{concatenate, lt, select},
    transforms::{async_eval, eval},
};
use std::{collections::VecDeque, rc::Rc};
use types::{ModelCard, SamplingParams, TokenId};

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
#[derive(Debug, Default)]
pub(crate) struct Flight {
    /// Of a part that is followed by another one: what it made of the step's tokens, `[tokens, hidden]`.
    pub(crate) hidden: Option<Array>,
    /// Of the last part, where there are no logits: what its work is done with.
    pub(crate) written: Vec<Array>,
    /// Drawn tokens as i32; none where no slice samples, and before they are drawn.
    pub(crate) tokens: Option<Array>,
    /// For each token that is drawn, in the engine's order, where it is among them.
    pub(crate) order: Vec<usize>,
    /// What its tokens are drawn from.
    undrawn: Option<Undrawn>,
    /// Of drawn tokens: where they are among these, and how many alternatives are told.
    pub(crate) told: Vec<(usize, u32)>,
    pub(crate) of_drawn: Option<Logprobs>,
    /// Of slices that tell of their prompts: tokens and alternatives.
    pub(crate) scored: Vec<(usize, u32)>,
    pub(crate) of_prompts: Option<Logprobs>,
}

/// What the part before makes of a step's tokens, in their order, `[tokens, hidden]`.
pub(crate) struct Entering<'a> {
    /// Perhaps not there yet.
    pub(crate) hidden: Array,
    /// Waits until it is, before anything that needs it is evaluated.
    pub(crate) arrival: &'a mut dyn FnMut() -> Result<()>,
}

/// What tokens are drawn from.
#[derive(Debug)]
struct Undrawn {
    /// `[rows, vocabulary]`: those of the rows, and perhaps more that fill up.
    logits: Array,
    how: How,
    /// For each row that waits for a mask, in the engine's order, which it is.
    masked: Vec<usize>,
}

/// How rows are drawn.
#[derive(Debug)]
enum How {
    /// By our own operations, with the step's tokens, of which some may be rows' last.
    OnDevice { draws: Draws, tokens: Array },
    /// In MLX's operations.
    Pure(Vec<OwnedRow>),
}

/// [`RowSampling`] that outlives its step's submission.
#[derive(Debug)]
struct OwnedRow {
    params: SamplingParams,
    position: u32,
    prompt: Vec<TokenId>,
    output: Vec<TokenId>,
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

    /// The layers that are here.
    pub(crate) fn part(&self) -> Part {
        self.dims().part
    }

    pub(crate) fn dims(&self) -> Dims {
        self.family.dims()
    }

    /// One pass over all slices; `entering` where another part comes before.
    pub(crate) fn forward(&mut self, slices: &[Slice<'_>], entering: Option<Entering<'_>>) -> Result<Flight> {
        let ordered = Ordered::new(slices);
        if self.path == Path::Pure {
            return self.forward_pure(&ordered, entering);
        }
        let part = self.part();
        let apart = ordered.is_drawn_apart() || !part.is_whole();
        let places = self.passes.as_ref().and_then(|passes| passes.places(&ordered));
        let real = ordered.slices.iter().map(|slice| slice.input.count()).sum();
        let (placed, count) = match &places {
            Some(places) => (ordered.placed(places), places.count),
            None => ((0..real).collect(), real),
        };
        let mut arrival = None;
        // Rows' last tokens are those that are being drawn, which only a whole model takes in.
        let (entering, late) = match entering {
            Some(Entering { hidden, arrival: wait }) => {
                arrival = Some(wait);
                (spread(&hidden, &placed, count)?, Array::from_slice(&[0_i32], &[1]))
            }
            None => {
                let tokens = self.tokens(&ordered, &placed, count)?;
                (tokens.clone(), tokens)
            }
        };
        let out = if let (Some(passes), Some(places)) = (&self.passes, places) {
            let out = passes.run(places, &ordered, &placed, entering, &mut self.kv)?;
            match out {
                Some(hidden) if !part.is_last() => {
                    let placed: Vec<i32> = placed.iter().map(|&at| at as i32).collect();
                    Some(Wanted::Rows(&placed).of(&hidden)?)
                }
                out => out,
            }
        } else {
            let attention = ordered.attention(self.path, self.family.dims().scale);
            let positions = ordered.positions(self.path);
            let wanted = Wanted::Rows(&ordered.wanted);
            let input = StepInput { entering, positions: &positions, attention: &attention, wanted };
            let logits = self.family.forward(&input, &mut self.kv)?;
            let count = ordered.sampling.len();
            let draw = |logits: Array| {
                let draws = Draws::new(&ordered.sampling, &ordered.late, count, self.card.vocab_size);
                sampler::draw_on_device(&logits, &draws, &late, self.path)
            };
            if apart { logits } else { logits.map(draw).transpose()? }
        };
        if let Some(wait) = arrival {
            wait()?;
        }
        let pending = std::mem::take(&mut self.kv.pending);
        async_eval(out.iter().chain(&pending).chain([&self.kv.fence]))?;
        if !part.is_last() {
            return Ok(Flight { hidden: out, ..Flight::default() });
        }
        if !apart {
            return Ok(Flight { tokens: out, order: ordered.order, ..Flight::default() });
        }
        let written =
            if out.is_none() { [pending, vec![self.kv.fence.clone()]].concat() } else { Vec::new() };
        let late_rows = ordered.late.clone();
        let flight = self.apart(&ordered, out, |count| How::OnDevice {
            // Where a pass was compiled, its logits' rows are filled up.
            draws: Draws::new(&ordered.sampling, &late_rows, count, self.card.vocab_size),
            tokens: late,
        })?;
        Ok(Flight { written, ..flight })
    }

    /// A step whose tokens are drawn from `logits` of all wanted rows, and what it tells of prompts.
    fn apart(
        &self,
        ordered: &Ordered<'_>,
        logits: Option<Array>,
        how: impl FnOnce(usize) -> How,
    ) -> Result<Flight> {
        let mut flight = Flight { order: ordered.order.clone(), ..Flight::default() };
        let Some(logits) = logits else { return Ok(flight) };
        if !ordered.scores.is_empty() {
            let rows: Vec<i32> = ordered
                .scores
                .iter()
                .flat_map(|score| score.first..score.first + score.targets.len())
                .map(|row| row as i32)
                .collect();
            let targets = ordered.scores.iter().flat_map(|score| score.targets);
            let targets: Vec<i32> = targets.map(|&token| token as i32).collect();
            let targets = Array::from_slice(&targets, &[rows.len() as i32]);
            let top = ordered.scores.iter().map(|score| score.top).max().unwrap_or(0);
            let told = Logprobs::new(&Wanted::Rows(&rows).of(&logits)?, &targets, top)?;
            async_eval(told.arrays())?;
            flight.of_prompts = Some(told);
            flight.scored = ordered.scored();
        }
        if ordered.sampling.is_empty() {
            return Ok(flight);
        }
        flight.told = ordered.told();
        let logits =
            if ordered.scores.is_empty() { logits } else { Wanted::Rows(&ordered.sampled).of(&logits)? };
        let masked: Vec<usize> =
            ordered.order.iter().copied().filter(|&at| ordered.sampling[at].masked).collect();
        let how = how(logits.dim(0) as usize);
        flight.undrawn = Some(Undrawn { logits, how, masked });
        if flight.undrawn.as_ref().is_some_and(|undrawn| undrawn.masked.is_empty()) {
            self.draw_apart(&mut flight, &[])?;
        }
        Ok(flight)
    }

    /// Draws the tokens of a step that waits for it.
    pub(crate) fn draw_apart(&self, flight: &mut Flight, masks: &[TokenMask]) -> Result<()> {
        let Some(Undrawn { logits, how, masked }) = flight.undrawn.take() else { return Ok(()) };
        if masks.len() != masked.len() {
            return Err(Exception::custom(format!("{} masks for {} rows", masks.len(), masked.len())));
        }
        let mut of_rows = vec![None; logits.dim(0) as usize];
        masked.iter().zip(masks).for_each(|(&row, mask)| of_rows[row] = Some(mask));
        let allowed = match masked.is_empty() {
            false => logprobs::masked(&logits, &of_rows)?,
            true if flight.told.is_empty() && flight.scored.is_empty() => logits.clone(),
            // A GPU draws in place, and there is more to tell of these.
            true => logits.add(Array::from_f32(0.0).as_dtype(logits.dtype())?)?,
        };
        let tokens = match &how {
            How::OnDevice { draws, tokens } => sampler::draw_on_device(&allowed, draws, tokens, self.path)?,
            How::Pure(rows) => {
                let sampling: Vec<_> = rows
                    .iter()
                    .map(|row| RowSampling::plain(&row.params, row.position, &row.prompt, &row.output))
                    .collect();
                let drawn = sampler::sample(&allowed, &sampling)?;
                let drawn: Vec<i32> = drawn.into_iter().map(|token| token as i32).collect();
                Array::from_slice(&drawn, &[drawn.len() as i32])
            }
        };
        if let Some(top) = flight.told.iter().map(|told| told.1).max() {
            let rows: Vec<i32> = flight.told.iter().map(|told| told.0 as i32).collect();
            let rows = Wanted::Rows(&rows);
            flight.of_drawn = Some(Logprobs::new(&rows.of(&logits)?, &rows.of(&tokens)?, top)?);
        }
        async_eval(flight.of_drawn.iter().flat_map(Logprobs::arrays).chain([&tokens]))?;
        flight.tokens = Some(tokens);
        Ok(())
    }

    /// The step in MLX's operations, which write in place only what nothing else holds: everything is evaluated.
    fn forward_pure(&mut self, ordered: &Ordered<'_>, entering: Option<Entering<'_>>) -> Result<Flight> {
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
            outputs
                .extend(slice.rows().map(|row| row.output.iter().copied().chain(late).collect::<Vec<_>>()));
        }
        let entering = match entering {
            Some(Entering { hidden, arrival }) => {
                arrival()?;
                hidden
            }
            None => Array::from_slice(&tokens, &[tokens.len() as i32]),
        };
        let attention = ordered.attention(self.path, self.family.dims().scale);
        let positions = ordered.positions(self.path);
        let wanted = Wanted::Rows(&ordered.wanted);
        let input = StepInput { entering, positions: &positions, attention: &attention, wanted };
        let logits = self.family.forward(&input, &mut self.kv)?;
        eval(self.kv.arrays().chain(&logits))?;
        if !self.part().is_last() {
            return Ok(Flight { hidden: logits, ..Flight::default() });
        }
        if ordered.is_drawn_apart() || !self.part().is_whole() {
            let rows = ordered.sampling.iter().zip(outputs).map(|(row, output)| OwnedRow {
                params: row.params.clone(),
                position: row.position,
                prompt: row.prompt.to_vec(),
                output,
            });
            let rows = rows.collect();
            return self.apart(ordered, logits, |_| How::Pure(rows));
        }
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
        Ok(Flight { tokens: drawn, order: ordered.order.clone(), ..Flight::default() })
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
        let flight = self.forward(slices, None).map_err(backend)?;
        self.flights.push_back(flight);
        Ok(())
    }

    fn draw(&mut self, masks: &[TokenMask]) -> std::result::Result<(), ModelError> {
        let Some(mut flight) = self.flights.pop_back() else {
            return Err(ModelError::Backend("no step waits for masks".to_owned()));
        };
        self.draw_apart(&mut flight, masks).map_err(backend)?;
        self.flights.push_back(flight);
        Ok(())
    }

    fn collect(&mut self) -> std::result::Result<StepOutput, ModelError> {
        let Some(flight) = self.flights.pop_front() else {
            return Err(ModelError::Backend("no step is in flight".to_owned()));
        };
        if flight.waits_for_masks() {
            return Err(ModelError::Backend("a step is collected before it was drawn".to_owned()));
        }
        if flight.tokens.is_none() {
            // Nothing to read; but what follows must not run ahead without bound.
            eval([&self.kv.fence]).map_err(backend)?;
        }
        flight.read().map_err(backend)
    }

    fn prepare(&mut self) -> std::result::Result<bool, ModelError> {
        match &self.passes {
            Some(passes) => passes.warm(&mut self.kv).map_err(backend),
            None => Ok(false),
        }
    }
}

impl Flight {
    /// A step whose tokens another process drew: these in which order, and what is told of them and of prompts.
    pub(crate) fn drawn_elsewhere(
        tokens: Option<Array>,
        order: Vec<usize>,
        (told, of_drawn): (Vec<(usize, u32)>, Option<Logprobs>),
        (scored, of_prompts): (Vec<(usize, u32)>, Option<Logprobs>),
    ) -> Self {
        Self { tokens, order, told, of_drawn, scored, of_prompts, ..Self::default() }
    }

    /// Whether its tokens are still to be drawn.
    pub(crate) fn waits_for_masks(&self) -> bool {
        self.undrawn.is_some()
    }

    /// What the step brought, on the host.
    pub(crate) fn read(&self) -> Result<StepOutput> {
        let tokens = self.tokens.as_ref().map(known).transpose()?.unwrap_or_default();
        let mut drawn: Vec<DrawnToken> =
            self.order.iter().map(|&at| DrawnToken { token: tokens[at], logprobs: None }).collect();
        if let Some(told) = &self.of_drawn {
            // Both are in the engine's order.
            let asked = drawn.iter_mut().zip(&self.order);
            let asked = asked.filter(|(_, at)| self.told.iter().any(|(told, _)| told == *at));
            let told = told.read(self.told.iter().map(|told| told.1))?;
            asked.zip(told).for_each(|((drawn, _), told)| drawn.logprobs = Some(told));
        }
        let mut scores = Vec::with_capacity(self.scored.len());
        if let Some(told) = &self.of_prompts {
            let tops = self.scored.iter().flat_map(|&(count, top)| std::iter::repeat_n(top, count));
            let mut told = told.read(tops)?.into_iter();
            scores.extend(self.scored.iter().map(|&(count, _)| told.by_ref().take(count).collect()));
        }
        Ok(StepOutput { drawn, scores })
    }
}

/// Rows `[rows, hidden]`, the i-th at `placed[i]` of `[count, hidden]`, with anything between them.
fn spread(rows: &Array, placed: &[usize], count: usize) -> Result<Array> {
    if placed.len() == count && placed.iter().copied().eq(0..count) {
        return Ok(rows.clone());
    }
    let mut from = vec![0; count];
    placed.iter().enumerate().for_each(|(row, &at)| from[at] = row as i32);
    rows.take_axis(Array::from_slice(&from, &[count as i32]), 0)
}

/// Tokens of the device on the host: the one read of a step.
fn known(tokens: &Array) -> Result<Vec<TokenId>> {
    tokens.eval()?;
    Ok(tokens.as_slice::<i32>().iter().map(|&token| token as TokenId).collect())
}
