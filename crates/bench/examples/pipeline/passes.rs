//! Passes of a model, as an engine would begin and collect them, timed.

use engine::{BlockId, Input, Model, ModelError, Overlap, RowSampling, SequenceId, Slice};
use std::time::Instant;
use types::{BLOCK_TOKENS, SamplingParams, TokenId};

/// Times that a prompt is read once more; the shortest counts.
const READS: usize = 1;
/// Turns of decoding that warm up, and that are measured.
const TURNS: [usize; 2] = [3, 30];
/// Tokens before each row's own, as a pipeline's stages measure themselves.
const CONTEXT: usize = 2 * BLOCK_TOKENS;
/// Blocks of a row.
const ROW_BLOCKS: usize = CONTEXT / BLOCK_TOKENS + 2;

pub(crate) struct Passes<'a, M: Model + ?Sized> {
    model: &'a mut M,
    greedy: SamplingParams,
}

impl<'a, M: Model + ?Sized> Passes<'a, M> {
    pub(crate) fn new(model: &'a mut M) -> Self {
        Self { model, greedy: SamplingParams::greedy() }
    }

    pub(crate) fn model(&self) -> &M {
        self.model
    }

    /// Passes that may be in flight while a prompt is read.
    pub(crate) fn flights(&self) -> usize {
        self.model.overlap(0).flights()
    }

    /// Passes into which the model divides so many rows.
    pub(crate) fn groups(&self, rows: usize) -> usize {
        self.model.overlap(rows).groups()
    }

    /// Seconds to read a prompt in slices, so many in flight.
    pub(crate) fn read(&mut self, tokens: usize, slice: usize, flights: usize) -> Result<f64, ModelError> {
        let vocabulary = self.model.card().vocab_size;
        let prompt: Vec<TokenId> = (0..tokens as u32).map(|at| (at * 7 + 1) % vocabulary).collect();
        let blocks: Vec<BlockId> = (0..tokens.div_ceil(BLOCK_TOKENS) as u32).map(BlockId).collect();
        let mut least = f64::INFINITY;
        for _ in 0..=READS {
            let begin = Instant::now();
            let mut in_flight = 0;
            for (at, part) in prompt.chunks(slice).enumerate() {
                if in_flight == flights {
                    self.model.collect()?;
                    in_flight -= 1;
                }
                let slice = Slice {
                    sequence: SequenceId(0),
                    blocks: &blocks,
                    start: at * slice,
                    input: Input::Tokens(part),
                    sample: None,
                    drafts: 0,
                    score: None,
                };
                self.model.submit(&[slice])?;
                in_flight += 1;
            }
            for _ in 0..in_flight {
                self.model.collect()?;
            }
            least = least.min(begin.elapsed().as_secs_f64());
        }
        Ok(least)
    }

    /// Seconds from a row's token to its next one, with rows divided as the model has it.
    pub(crate) fn decode_as_chosen(&mut self, rows: usize) -> Result<f64, ModelError> {
        match self.model.overlap(rows) {
            Overlap::Stages { groups, .. } => self.decode(rows, groups),
            Overlap::Lookahead => self.decode_ahead(rows),
        }
    }

    /// The same with so many passes in flight, each of which knows its tokens: the median.
    pub(crate) fn decode(&mut self, rows: usize, groups: usize) -> Result<f64, ModelError> {
        let part = |group: usize| group * rows / groups..(group + 1) * rows / groups;
        let mut times = Vec::new();
        let mut last = vec![Instant::now(); groups];
        for group in 0..groups {
            self.submit(part(group), 0, false)?;
        }
        for turn in 0..TURNS[0] + TURNS[1] {
            for (group, last) in last.iter_mut().enumerate() {
                self.model.collect()?;
                let now = Instant::now();
                if turn >= TURNS[0] {
                    times.push((now - *last).as_secs_f64());
                }
                *last = now;
                self.submit(part(group), turn + 1, false)?;
            }
        }
        for _ in 0..groups {
            self.model.collect()?;
        }
        Ok(median(times))
    }

    /// The same of a model that takes in what the pass before draws.
    fn decode_ahead(&mut self, rows: usize) -> Result<f64, ModelError> {
        let mut times = Vec::new();
        self.submit(0..rows, 0, false)?;
        let mut last = Instant::now();
        for turn in 0..TURNS[0] + TURNS[1] {
            self.submit(0..rows, turn + 1, true)?;
            self.model.collect()?;
            let now = Instant::now();
            if turn >= TURNS[0] {
                times.push((now - last).as_secs_f64());
            }
            last = now;
        }
        self.model.collect()?;
        Ok(median(times))
    }

    fn submit(&mut self, rows: std::ops::Range<usize>, turn: usize, drawn: bool) -> Result<(), ModelError> {
        let blocks: Vec<Vec<BlockId>> = rows
            .clone()
            .map(|row| (0..ROW_BLOCKS).map(|at| BlockId((row * ROW_BLOCKS + at) as u32)).collect())
            .collect();
        let slices: Vec<Slice<'_>> = rows
            .zip(&blocks)
            .enumerate()
            .map(|(index, (row, blocks))| Slice {
                sequence: SequenceId(row as u64),
                blocks,
                start: CONTEXT + turn,
                input: if drawn { Input::Drawn(index) } else { Input::Tokens(&[1]) },
                sample: Some(RowSampling::plain(&self.greedy, turn as u32, &[], &[])),
                drafts: 0,
                score: None,
            })
            .collect();
        self.model.submit(&slices)
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}
