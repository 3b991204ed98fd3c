//! How fast a model is, measured with dummy tokens before it serves: a seed for the engine's and the routers' estimates.
//!
//! The probe writes to blocks from the first one on and counts its sequences down from the largest id. The engine that
//! comes after it takes every block for free and counts up, so neither has to know of the other. Steps overlap as the
//! engine's do: what is measured is the time from one step's tokens to the next one's. With a pipeline that is less than a
//! row waits for its next token, since its rows are in several passes.

use engine::{BlockId, Input, Model, ModelError, Overlap, RowSampling, SequenceId, Slice};
use std::ops::Range;
use std::time::{Duration, Instant};
use types::{BLOCK_TOKENS, NodeRates, SamplingParams, TokenId};

/// Where measuring stops, whatever has been measured by then; a step that has begun is finished.
const PROBE_TIME_MAX: Duration = Duration::from_secs(2);
/// Tokens of the measured prompt: long enough to be like prompts, short enough for a slow machine.
const PREFILL_TOKENS: usize = 128;
/// Slices of a pipeline's prompt that are measured beyond those that fill it.
const SLICES_MORE: usize = 2;
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
    /// Seconds of a decode step, by its rows: 1, 2, 4 and so on, as far as there was time. With a pipeline, from one pass's
    /// end to the next one's, with as many in flight as the engine will have.
    pub(super) decode_step_s: Vec<(u32, f32)>,
}

/// Measures a model before anybody else uses it.
pub(super) fn measure(model: &mut dyn Model, clock: impl Fn() -> Instant) -> Result<Measured, ModelError> {
    let mut probe = Probe::new(model, clock);
    // The first only warms up: buffers, kernels, pages.
    probe.read(PREFILL_TOKENS)?;
    let prefill_tokens_per_s = match probe.model.overlap(0) {
        Overlap::Lookahead => probe.read(PREFILL_TOKENS)?,
        Overlap::Stages { flights, .. } => probe.read_staged(PREFILL_TOKENS, flights)?,
    };
    let mut measured = vec![probe.decode(1)?];
    for rows in row_counts(probe.rows_max()).skip(1) {
        if !probe.has_time() {
            break;
        }
        measured.push(probe.decode(rows)?);
    }
    // Fewer rows never take longer: where they seem to, something else ran meanwhile. A node must not look slow for that:
    // routers would send it nothing, and it could not correct itself.
    let mut least = (f64::INFINITY, f64::INFINITY);
    for decode in measured.iter_mut().rev() {
        least = (least.0.min(decode.token_s), least.1.min(decode.pass_s));
        (decode.token_s, decode.pass_s) = least;
    }
    let one_s = measured[0].token_s;
    let row_s = match measured.last() {
        Some(many) if many.rows > 1 => (many.token_s - one_s) / (many.rows - 1) as f64,
        _ => one_s * ROW_SHARE_UNKNOWN,
    };
    let rates = NodeRates {
        prefill_tokens_per_s: prefill_tokens_per_s as f32,
        decode_step_s: one_s as f32,
        decode_row_s: row_s as f32,
    };
    // Of passes with equally many rows those count that were measured last: more of them were in flight.
    let mut decode_step_s: Vec<(u32, f32)> = Vec::new();
    for decode in &measured {
        let rows = decode.pass_rows as u32;
        decode_step_s.retain(|entry| entry.0 != rows);
        decode_step_s.push((rows, decode.pass_s as f32));
    }
    Ok(Measured { rates, decode_step_s })
}

/// Decoding with some rows.
#[derive(Debug, Clone, Copy)]
struct Decode {
    rows: usize,
    /// Seconds from a row's token to its next one.
    token_s: f64,
    /// Rows of the largest pass.
    pass_rows: usize,
    /// Seconds from the end of a pass to the end of the next one.
    pass_s: f64,
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

    /// The same of a pipeline: slices of so many tokens follow each other, `flights` at a time; the time from one's end to
    /// the next one's counts.
    fn read_staged(&mut self, tokens: usize, flights: usize) -> Result<f64, ModelError> {
        let room = self.model.limits().blocks * BLOCK_TOKENS;
        let room = room.min(self.model.card().context_tokens as usize);
        let slices = (flights + SLICES_MORE).min(room / tokens);
        if slices < 2 || !self.has_time() {
            return self.read(tokens);
        }
        let vocab = self.model.card().vocab_size.max(1);
        let prompt: Vec<TokenId> = (0..tokens as u32).map(|index| (index * 7 + 1) % vocab).collect();
        let blocks: Vec<BlockId> =
            (0..(slices * tokens).div_ceil(BLOCK_TOKENS) as u32).map(BlockId).collect();
        let sequence = self.sequence();
        let (mut submitted, mut collected) = (0, 0);
        let (mut first, mut last) = (None, (self.clock)());
        while collected < slices {
            if submitted < slices && submitted - collected < flights {
                let slice = Slice {
                    sequence,
                    blocks: &blocks,
                    start: submitted * tokens,
                    input: Input::Tokens(&prompt),
                    sample: None,
                    drafts: 0,
                    score: None,
                };
                self.model.submit(&[slice])?;
                submitted += 1;
                continue;
            }
            self.model.collect()?;
            collected += 1;
            last = (self.clock)();
            first.get_or_insert(last);
        }
        let time = last.saturating_duration_since(first.unwrap_or(last)).as_secs_f64();
        Ok(((slices - 1) * tokens) as f64 / time.max(1e-6))
    }

    /// Decodes with so many rows; of each time the median counts: tokens that are taken late come after too long a time,
    /// and those after them after too short a one.
    fn decode(&mut self, rows: usize) -> Result<Decode, ModelError> {
        while self.rows.len() < rows {
            let id = self.sequence();
            let first = (self.rows.len() * self.row_blocks) as u32;
            let blocks = (first..first + self.row_blocks as u32).map(BlockId).collect();
            self.rows.push(Row { id, blocks, tokens: vec![0], submitted: 0 });
        }
        match self.model.overlap(rows) {
            Overlap::Lookahead => {
                let step_s = self.decode_ahead()?;
                Ok(Decode { rows, token_s: step_s, pass_rows: rows, pass_s: step_s })
            }
            Overlap::Stages { groups, .. } => {
                let groups = groups.clamp(1, rows);
                let token_s = self.decode_staged(groups)?;
                let pass_rows = rows.div_ceil(groups);
                Ok(Decode { rows, token_s, pass_rows, pass_s: token_s / groups as f64 })
            }
        }
    }

    /// Seconds of a step while the one after it is in flight.
    fn decode_ahead(&mut self) -> Result<f64, ModelError> {
        let all = 0..self.rows.len();
        let mut last = (self.clock)();
        self.submit(all.clone())?;
        let mut times: Vec<f64> = Vec::new();
        while times.len() <= DECODE_STEPS && (times.is_empty() || self.has_time()) && self.fits() {
            self.submit(all.clone())?;
            self.collect(all.clone())?;
            let now = (self.clock)();
            times.push(now.saturating_duration_since(last).as_secs_f64());
            last = now;
        }
        self.collect(all)?;
        times.push((self.clock)().saturating_duration_since(last).as_secs_f64());
        // The first one warms up, the last one had nothing behind it; either counts only where there is no other.
        let last = times.len() - 1;
        let counted = if times.len() > 2 { &mut times[1..last] } else { &mut times[..] };
        Ok(median(counted))
    }

    /// Seconds from a pass's end to its next one's, with the rows in `groups` passes that are in flight together.
    fn decode_staged(&mut self, groups: usize) -> Result<f64, ModelError> {
        let rows = self.rows.len();
        let part = |group: usize| group * rows / groups..(group + 1) * rows / groups;
        let mut last = vec![(self.clock)(); groups];
        for group in 0..groups {
            self.submit(part(group))?;
        }
        let mut times: Vec<f64> = Vec::new();
        let mut turns = 0;
        while turns <= DECODE_STEPS && (turns == 0 || self.has_time()) && self.fits() {
            for (group, last) in last.iter_mut().enumerate() {
                self.collect(part(group))?;
                let now = (self.clock)();
                times.push(now.saturating_duration_since(*last).as_secs_f64());
                *last = now;
                self.submit(part(group))?;
            }
            turns += 1;
        }
        for (group, last) in last.into_iter().enumerate() {
            self.collect(part(group))?;
            if turns == 0 {
                times.push((self.clock)().saturating_duration_since(last).as_secs_f64());
            }
        }
        // The first turn warms up; it counts only where there is no other.
        let counted = if turns > 1 { &mut times[groups..] } else { &mut times[..] };
        Ok(median(counted))
    }

    fn fits(&self) -> bool {
        self.rows.iter().all(|row| row.submitted < self.row_tokens)
    }

    fn submit(&mut self, part: Range<usize>) -> Result<(), ModelError> {
        let rows = self.rows[part.clone()].iter().enumerate();
        let slices: Vec<Slice<'_>> = rows.map(|(index, row)| row.slice(index, &self.sampling)).collect();
        self.model.submit(&slices)?;
        for row in &mut self.rows[part] {
            row.submitted = row.tokens.len().max(row.submitted + 1);
        }
        Ok(())
    }

    fn collect(&mut self, part: Range<usize>) -> Result<(), ModelError> {
        let drawn = self.model.collect()?;
        for (row, drawn) in self.rows[part].iter_mut().zip(drawn.drawn) {
            row.tokens.push(drawn.token);
        }
        Ok(())
    }
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times[(times.len() - 1) / 2]
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
        measured_in(1, slots, blocks, context_tokens, base_ms)
    }

    fn measured_in(
        stages: usize,
        slots: usize,
        blocks: usize,
        context_tokens: u32,
        base_ms: u64,
    ) -> (Measured, Duration) {
        let ms = Duration::from_millis;
        let limits = ModelLimits { slots, blocks, kv_bytes_per_token: 1 };
        let cost = StepCost {
            base: ms(base_ms),
            row: ms(1),
            prefill_token: ms(1),
            kv_1024: Duration::ZERO,
            ..StepCost::none()
        };
        let settings = FakeSettings { context_tokens, limits, cost, stages, ..FakeSettings::default() };
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

    /// Stages that take a part of a pass each, with a pass for each of them in flight.
    #[test]
    fn a_pipeline_is_measured_with_its_passes_in_flight() {
        let check = |stages: usize, slots: usize, blocks: usize, context_tokens: u32, passes: &[u32]| {
            let (measured, elapsed) = measured_in(stages, slots, blocks, context_tokens, 4);
            let counts: Vec<u32> = measured.decode_step_s.iter().map(|entry| entry.0).collect();
            assert_eq!(counts, passes, "{stages} stages: {measured:?}");
            for (rows, seconds) in &measured.decode_step_s {
                // A row alone has no other pass beside it.
                let beside = if slots == 1 { 1.0 } else { stages as f64 };
                let expected = (0.004 + 0.001 * f64::from(*rows)) / beside;
                assert!((f64::from(*seconds) - expected).abs() < 1e-4, "{stages} stages: {measured:?}");
            }
            assert!((measured.rates.decode_step_s - 0.005).abs() < 1e-4, "{measured:?}");
            let slices = (context_tokens / 128).min(blocks as u32 / 4);
            let beside = if slices < 2 { 1.0 } else { stages as f32 };
            let tokens = context_tokens.min(128) as f32;
            let expected = tokens * beside / (0.004 + tokens * 0.001);
            let prefill = measured.rates.prefill_tokens_per_s;
            assert!((prefill / expected - 1.0).abs() < 0.01, "{prefill}, not {expected}");
            assert!(elapsed < PROBE_TIME_MAX, "{elapsed:?}");
        };
        check(2, 8, 1024, 8192, &[1, 2, 4]);
        check(4, 16, 1024, 8192, &[1, 2, 4]);
        check(3, 1, 1024, 8192, &[1]);
        check(2, 4, 16, 128, &[1, 2]);
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
