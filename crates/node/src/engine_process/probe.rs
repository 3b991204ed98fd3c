//! How fast a model is, measured with dummy tokens before it serves: a seed for the engine's and the routers' estimates.

use engine::{Model, ModelError, RowSampling, SequenceId, Slice};
use std::time::{Duration, Instant};
use types::{NodeRates, SamplingParams, TokenId};

/// Where measuring stops, whatever has been measured by then.
const PROBE_TIME_MAX: Duration = Duration::from_secs(2);
/// Tokens of the measured prompt: long enough to be like prompts, short enough for a slow machine.
const PREFILL_TOKENS: usize = 128;
/// Tokens of the prompt that only warms up: buffers, kernels, pages.
const WARM_UP_TOKENS: usize = 16;
/// Decode steps measured with each number of rows, after one that only warms up.
const DECODE_STEPS: usize = 6;
/// Rows of the second measurement of decode steps.
const ROWS: usize = 4;
/// Tokens that a row of the measurement may come to have.
const TOKENS_MAX: usize = PREFILL_TOKENS + 4 * (DECODE_STEPS + 1);
/// Models round what a sequence takes up to at most a multiple of this.
const KV_STEP_TOKENS: usize = 256;
/// Share of a decode step's time that a further row is taken to cost where only one row could be measured.
const ROW_SHARE_UNKNOWN: f64 = 0.1;

/// Measures a model without open sequences; leaves it without.
pub(super) fn measure(model: &mut dyn Model, clock: impl Fn() -> Instant) -> Result<NodeRates, ModelError> {
    let begin = clock();
    let mut probe = Probe::new(model, clock);
    probe.row(WARM_UP_TOKENS)?;
    probe.close();
    let prefill_tokens = PREFILL_TOKENS.min(probe.tokens_max.saturating_sub(2 * DECODE_STEPS + 2)).max(1);
    let prefill = probe.row(prefill_tokens)?;
    let one = probe.decode(1, begin)?;
    let mut rows = probe.rows.len();
    while rows < probe.rows_max() && probe.clock_left(begin) {
        probe.row(WARM_UP_TOKENS)?;
        rows += 1;
    }
    let many = probe.decode(rows, begin)?;
    probe.close();
    let one_s = one.as_secs_f64();
    let row_s = match rows {
        0 | 1 => one_s * ROW_SHARE_UNKNOWN,
        _ => ((many.as_secs_f64() - one_s) / (rows - 1) as f64).max(0.0),
    };
    Ok(NodeRates {
        prefill_tokens_per_s: (prefill_tokens as f64 / prefill.as_secs_f64().max(1e-6)) as f32,
        decode_step_s: one_s as f32,
        decode_row_s: row_s as f32,
    })
}

struct Probe<'a, C> {
    model: &'a mut dyn Model,
    clock: C,
    sampling: SamplingParams,
    tokens_max: usize,
    rows: Vec<Row>,
    opened: u64,
}

struct Row {
    id: SequenceId,
    /// All tokens so far: the prompt, and what was drawn.
    tokens: Vec<TokenId>,
    prompt: usize,
    computed: usize,
}

impl<'a, C: Fn() -> Instant> Probe<'a, C> {
    fn new(model: &'a mut dyn Model, clock: C) -> Self {
        let context = model.card().context_tokens as usize;
        // A share of the memory, so that several rows fit.
        let memory = (model.limits().kv_tokens / (ROWS as u64 + 1)) as usize;
        let tokens_max = context.min(memory).min(TOKENS_MAX);
        Self { model, clock, sampling: SamplingParams::greedy(), tokens_max, rows: Vec::new(), opened: 0 }
    }

    /// Rows that fit at once, each with memory to spare for rounding.
    fn rows_max(&self) -> usize {
        let limits = self.model.limits();
        let row_tokens = self.tokens_max.next_multiple_of(KV_STEP_TOKENS) as u64;
        ROWS.min(limits.slots).min((limits.kv_tokens / row_tokens) as usize)
    }

    fn clock_left(&self, begin: Instant) -> bool {
        (self.clock)().saturating_duration_since(begin) < PROBE_TIME_MAX
    }

    /// Opens a row, reads a prompt of that many tokens, and says how long that took.
    fn row(&mut self, tokens: usize) -> Result<Duration, ModelError> {
        // From the other end than the engine, which counts from 0.
        let id = SequenceId(u64::MAX - self.opened);
        self.opened += 1;
        let vocab = self.model.card().vocab_size.max(1);
        let tokens: Vec<TokenId> = (0..tokens as u32).map(|index| (index * 7 + 1) % vocab).collect();
        self.model.open(id, self.tokens_max.max(tokens.len() + 1))?;
        self.rows.push(Row { id, prompt: tokens.len(), tokens, computed: 0 });
        let last = self.rows.len() - 1;
        self.step(last..last + 1)
    }

    /// Decodes with the newest `rows` rows; gives the shortest time of a step. A start-up on a busy machine must not make
    /// a node look slow: routers would send it nothing, and it could not correct itself.
    fn decode(&mut self, rows: usize, begin: Instant) -> Result<Duration, ModelError> {
        let range = self.rows.len().saturating_sub(rows)..self.rows.len();
        let warm_up = self.step(range.clone())?;
        let mut times = Vec::new();
        while times.len() < DECODE_STEPS && self.clock_left(begin) && self.fits(range.clone()) {
            times.push(self.step(range.clone())?);
        }
        Ok(times.into_iter().min().unwrap_or(warm_up))
    }

    fn fits(&self, range: std::ops::Range<usize>) -> bool {
        self.rows[range].iter().all(|row| row.tokens.len() < self.tokens_max)
    }

    fn step(&mut self, range: std::ops::Range<usize>) -> Result<Duration, ModelError> {
        let slices: Vec<Slice<'_>> =
            self.rows[range.clone()].iter().map(|row| row.slice(&self.sampling)).collect();
        let begin = (self.clock)();
        let drawn = self.model.step(&slices)?;
        let time = (self.clock)().saturating_duration_since(begin);
        for (row, token) in self.rows[range].iter_mut().zip(drawn) {
            row.computed = row.tokens.len();
            row.tokens.push(token);
        }
        Ok(time)
    }

    fn close(&mut self) {
        for row in self.rows.drain(..) {
            self.model.close(row.id);
        }
    }
}

impl Row {
    fn slice<'a>(&'a self, params: &'a SamplingParams) -> Slice<'a> {
        let (prompt, output) = self.tokens.split_at(self.prompt);
        let sample = Some(RowSampling { params, position: output.len() as u32, prompt, output });
        Slice { sequence: self.id, start: self.computed, tokens: &self.tokens[self.computed..], sample }
    }
}
