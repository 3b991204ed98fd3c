//! How fast a model is, measured with dummy tokens before it serves: a seed for the engine's and the routers' estimates.
//!
//! The probe writes to blocks from the first one on and counts its sequences down from the largest id. The engine that
//! comes after it takes every block for free and counts up, so neither has to know of the other. Steps of decoding overlap
//! as the engine's do: what is measured is the time from one step's tokens to the next one's.

use engine::{BlockId, Input, Model, ModelError, RowSampling, SequenceId, Slice};
use std::time::{Duration, Instant};
use types::{BLOCK_TOKENS, NodeRates, SamplingParams, TokenId};

/// Where measuring stops, whatever has been measured by then; a step that has begun is finished.
const PROBE_TIME_MAX: Duration = Duration::from_secs(2);
/// Tokens of the measured prompt: long enough to be like prompts, short enough for a slow machine.
const PREFILL_TOKENS: usize = 128;
/// Decode steps measured with each number of rows, after one that only warms up.
const DECODE_STEPS: usize = 6;
/// Blocks of a row of decode steps: with 1, 2, 4 and so on up to 1024 rows the first one comes to have 88 tokens.
const ROW_BLOCKS: usize = 3;
/// Share of a decode step's time that a further row is taken to cost where only one row could be measured.
const ROW_SHARE_UNKNOWN: f64 = 0.1;

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Measured {
    pub(super) rates: NodeRates,
    /// Seconds of a decode step, by rows: 1, 2, 4 and so on, as far as there was time.
    pub(super) decode_step_s: Vec<(u32, f32)>,
}

/// Measures a model before anybody else uses it.
pub(super) fn measure(model: &mut dyn Model, clock: impl Fn() -> Instant) -> Result<Measured, ModelError> {
    let mut probe = Probe::new(model, clock);
    // The first only warms up: buffers, kernels, pages.
    probe.read(PREFILL_TOKENS)?;
    let prefill_tokens_per_s = probe.read(PREFILL_TOKENS)?;
    let mut decode_step_s = vec![(1, probe.decode(1)?)];
    for rows in row_counts(probe.rows_max()).skip(1) {
        if !probe.has_time() {
            break;
        }
        decode_step_s.push((rows as u32, probe.decode(rows)?));
    }
    // Fewer rows never take longer: where they seem to, something else ran meanwhile. A node must not look slow for that:
    // routers would send it nothing, and it could not correct itself.
    let mut least_s = f64::INFINITY;
    for (_, seconds) in decode_step_s.iter_mut().rev() {
        least_s = least_s.min(*seconds);
        *seconds = least_s;
    }
    let (_, one_s) = decode_step_s[0];
    let row_s = match decode_step_s.last() {
        Some(&(rows, many_s)) if rows > 1 => (many_s - one_s) / f64::from(rows - 1),
        _ => one_s * ROW_SHARE_UNKNOWN,
    };
    let rates = NodeRates {
        prefill_tokens_per_s: prefill_tokens_per_s as f32,
        decode_step_s: one_s as f32,
        decode_row_s: row_s as f32,
    };
    let decode_step_s = decode_step_s.into_iter().map(|(rows, seconds)| (rows, seconds as f32)).collect();
    Ok(Measured { rates, decode_step_s })
}

/// 1, 2, 4 and so on, `most` last.
fn row_counts(most: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), move |&rows| (rows < most).then(|| (rows * 2).min(most)))
}

struct Probe<'a, C> {
    model: &'a mut dyn Model,
    clock: C,
    begin: Instant,
    sampling: SamplingParams,
    /// Blocks of each row, and what they and the model's context hold.
    row_blocks: usize,
    row_tokens: usize,
    rows: Vec<Row>,
    sequences: u64,
}

/// A sequence of a prompt of one token and what follows it.
struct Row {
    id: SequenceId,
    blocks: Vec<BlockId>,
    /// As far as they are known.
    tokens: Vec<TokenId>,
    /// Of these, and perhaps one more that is being drawn, whose KV a step writes or wrote.
    submitted: usize,
}

impl<'a, C: Fn() -> Instant> Probe<'a, C> {
    fn new(model: &'a mut dyn Model, clock: C) -> Self {
        let row_blocks = ROW_BLOCKS.min(model.limits().blocks).max(1);
        let row_tokens = (row_blocks * BLOCK_TOKENS).min(model.card().context_tokens as usize);
        let (begin, sampling) = (clock(), SamplingParams::greedy());
        Self { model, clock, begin, sampling, row_blocks, row_tokens, rows: Vec::new(), sequences: 0 }
    }

    fn rows_max(&self) -> usize {
        let limits = self.model.limits();
        limits.slots.min(limits.blocks / self.row_blocks).max(1)
    }

    fn has_time(&self) -> bool {
        (self.clock)().saturating_duration_since(self.begin) < PROBE_TIME_MAX
    }

    fn sequence(&mut self) -> SequenceId {
        self.sequences += 1;
        SequenceId(u64::MAX - self.sequences)
    }

    /// Reads a prompt of so many tokens, or as many as fit, and gives tokens a second.
    fn read(&mut self, tokens: usize) -> Result<f64, ModelError> {
        let room = self.model.limits().blocks * BLOCK_TOKENS;
        let tokens = tokens.min(room).min(self.model.card().context_tokens as usize).max(1);
        let vocab = self.model.card().vocab_size.max(1);
        let prompt: Vec<TokenId> = (0..tokens as u32).map(|index| (index * 7 + 1) % vocab).collect();
        let blocks: Vec<BlockId> = (0..tokens.div_ceil(BLOCK_TOKENS) as u32).map(BlockId).collect();
        let sampling = self.sampling.clone();
        let sample = RowSampling::plain(&sampling, 0, &prompt, &[]);
        let slice = Slice {
            sequence: self.sequence(),
            blocks: &blocks,
            start: 0,
            input: Input::Tokens(&prompt),
            sample: Some(sample),
            drafts: 0,
            score: None,
        };
        let begin = (self.clock)();
        self.model.submit(&[slice])?;
        self.model.collect()?;
        let time = (self.clock)().saturating_duration_since(begin);
        Ok(tokens as f64 / time.as_secs_f64().max(1e-6))
    }

    /// Decodes with so many rows; gives the median seconds of a step: tokens that are taken late come after too long a time,
    /// and those after them after too short a one.
    fn decode(&mut self, rows: usize) -> Result<f64, ModelError> {
        while self.rows.len() < rows {
            let id = self.sequence();
            let first = (self.rows.len() * self.row_blocks) as u32;
            let blocks = (first..first + self.row_blocks as u32).map(BlockId).collect();
            self.rows.push(Row { id, blocks, tokens: vec![0], submitted: 0 });
        }
        let mut last = (self.clock)();
        self.submit()?;
        let mut times: Vec<f64> = Vec::new();
        while times.len() <= DECODE_STEPS && (times.is_empty() || self.has_time()) && self.fits() {
            self.submit()?;
            self.collect()?;
            let now = (self.clock)();
            times.push(now.saturating_duration_since(last).as_secs_f64());
            last = now;
        }
        self.collect()?;
        times.push((self.clock)().saturating_duration_since(last).as_secs_f64());
        // The first one warms up, the last one had nothing behind it; either counts only where there is no other.
        let last = times.len() - 1;
        let counted = if times.len() > 2 { &mut times[1..last] } else { &mut times[..] };
        counted.sort_unstable_by(f64::total_cmp);
        Ok(counted[(counted.len() - 1) / 2])
    }

    fn fits(&self) -> bool {
        self.rows.iter().all(|row| row.submitted < self.row_tokens)
    }

    fn submit(&mut self) -> Result<(), ModelError> {
        let rows = self.rows.iter().enumerate();
        let slices: Vec<Slice<'_>> = rows.map(|(index, row)| row.slice(index, &self.sampling)).collect();
        self.model.submit(&slices)?;
        for row in &mut self.rows {
            row.submitted = row.tokens.len().max(row.submitted + 1);
        }
        Ok(())
    }

    fn collect(&mut self) -> Result<(), ModelError> {
        let drawn = self.model.collect()?;
        for (row, drawn) in self.rows.iter_mut().zip(drawn.drawn) {
            row.tokens.push(drawn.token);
        }
        Ok(())
    }
}

impl Row {
    /// Its next token, known or not; `index` is its place in every step.
    fn slice<'a>(&'a self, index: usize, params: &'a SamplingParams) -> Slice<'a> {
        let (prompt, output) = self.tokens.split_at(1);
        let known = self.submitted < self.tokens.len();
        let (input, late) =
            if known { (Input::Tokens(&self.tokens[self.submitted..]), 0) } else { (Input::Drawn(index), 1) };
        let position = (output.len() + late) as u32;
        let sample = Some(RowSampling::plain(params, position, prompt, output));
        Slice {
            sequence: self.id,
            blocks: &self.blocks,
            start: self.submitted,
            input,
            sample,
            drafts: 0,
            score: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::ModelLimits;
    use testkit::{FakeModel, FakeSettings, StepCost, VirtualClock};

    /// The fake model panics where the contract of models is broken.
    fn measured(slots: usize, blocks: usize, context_tokens: u32, base_ms: u64) -> (Measured, Duration) {
        let ms = Duration::from_millis;
        let limits = ModelLimits { slots, blocks, kv_bytes_per_token: 1 };
        let cost = StepCost {
            base: ms(base_ms),
            row: ms(1),
            prefill_token: ms(1),
            kv_1024: Duration::ZERO,
            ..StepCost::none()
        };
        let settings = FakeSettings { context_tokens, limits, cost, ..FakeSettings::default() };
        let clock = VirtualClock::new();
        let (mut model, _) = FakeModel::new(settings, clock.clone());
        let measured = measure(&mut model, || clock.now()).expect("nothing fails");
        (measured, clock.elapsed())
    }

    #[test]
    fn rates_and_table_are_what_steps_take() {
        let check = |slots: usize, blocks: usize, context_tokens: u32, rows: &[u32]| {
            let (measured, elapsed) = measured(slots, blocks, context_tokens, 4);
            let counts: Vec<u32> = measured.decode_step_s.iter().map(|entry| entry.0).collect();
            assert_eq!(counts, rows);
            for (rows, seconds) in &measured.decode_step_s {
                assert!(
                    (f64::from(*seconds) - 0.004 - 0.001 * f64::from(*rows)).abs() < 1e-5,
                    "{measured:?}"
                );
            }
            let rates = measured.rates;
            let prefill_tokens = context_tokens.min(128) as f32;
            let expected = prefill_tokens / (0.004 + prefill_tokens * 0.001);
            assert!((rates.prefill_tokens_per_s - expected).abs() < 0.1, "{rates:?}");
            assert!((rates.decode_step_s - 0.005).abs() < 1e-5, "{rates:?}");
            let row_s = if rows.len() == 1 { 0.0005 } else { 0.001 };
            assert!((rates.decode_row_s - row_s).abs() < 1e-5, "{rates:?}");
            assert!(elapsed < PROBE_TIME_MAX, "{elapsed:?}");
        };
        check(4, 1024, 8192, &[1, 2, 4]);
        check(12, 1024, 8192, &[1, 2, 4, 8, 12]);
        check(1, 1024, 8192, &[1]);
        // Few blocks for many slots, and a context that one block holds.
        check(64, 16, 512, &[1, 2, 4, 5]);
        check(4, 1, 32, &[1]);
    }

    /// As when a compiler runs beside it: the first steps with one row are slow.
    #[test]
    fn more_rows_are_never_faster() {
        let limits = ModelLimits { slots: 8, blocks: 1024, kv_bytes_per_token: 1 };
        let cost = StepCost { base: Duration::from_millis(4), ..StepCost::none() };
        let clock = VirtualClock::new();
        let (mut model, handle) =
            FakeModel::new(FakeSettings { limits, cost, ..FakeSettings::default() }, clock.clone());
        let disturbed = || {
            if handle.steps().len() < 12 {
                clock.advance(Duration::from_millis(50));
            }
            clock.now()
        };
        let measured = measure(&mut model, disturbed).expect("nothing fails");
        assert_eq!(measured.decode_step_s, [1, 2, 4, 8].map(|rows| (rows, 0.004)));
        assert_eq!((measured.rates.decode_step_s, measured.rates.decode_row_s), (0.004, 0.0));
    }

    #[test]
    fn slow_machines_measure_less() {
        let (measured, elapsed) = measured(64, 1024, 8192, 100);
        let counts: Vec<u32> = measured.decode_step_s.iter().map(|entry| entry.0).collect();
        assert_eq!(counts, [1, 2]);
        assert!(
            elapsed < PROBE_TIME_MAX + Duration::from_millis(350),
            "three steps more at most: {elapsed:?}"
        );
        let (measured, elapsed) = self::measured(64, 1024, 8192, 3000);
        assert_eq!(measured.decode_step_s.len(), 1);
        assert!((measured.rates.decode_step_s - 3.001).abs() < 0.01, "{measured:?}");
        assert!(
            elapsed < Duration::from_secs(16),
            "two prompts and the fewest steps there can be: {elapsed:?}"
        );
    }
}
