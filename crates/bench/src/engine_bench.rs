//! Prefill and decode rates of a model at several batch sizes, by its own steps, one always in flight.

use engine::{BlockId, Input, Model, ModelError, RowSampling, SequenceId, Slice};
use serde::Serialize;
use std::time::Instant;
use types::{BLOCK_TOKENS, SamplingParams, TokenId};

/// What to measure.
#[derive(Debug, Clone)]
pub struct EngineBenchSettings {
    /// Rows decoded together, one measurement each.
    pub batches: Vec<usize>,
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded in each row; at least 2.
    pub new_tokens: usize,
    /// Prompt tokens in one step.
    pub step_tokens: usize,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
}

impl EngineBenchSettings {
    /// Blocks of KV that the largest batch takes.
    pub fn blocks(&self) -> usize {
        self.batches.iter().copied().max().unwrap_or(0) * self.row_blocks()
    }

    fn row_blocks(&self) -> usize {
        (self.prompt_tokens + self.new_tokens).div_ceil(BLOCK_TOKENS)
    }
}

/// What was measured at one batch size.
#[derive(Debug, Clone, Serialize)]
pub struct EngineFigures {
    /// Rows.
    pub batch: usize,
    /// Prompt tokens a second.
    pub prefill_tokens_per_s: f64,
    /// Tokens a second of all rows together.
    pub decode_tokens_per_s: f64,
    /// Milliseconds from one decode step's tokens to the next one's: the median.
    pub decode_step_ms_p50: f64,
    /// The longest.
    pub decode_step_ms_max: f64,
}

/// Measures each batch size in turn, after one unmeasured round.
///
/// # Errors
/// What the model reports.
pub fn engine_steps(
    model: &mut dyn Model,
    settings: &EngineBenchSettings,
) -> Result<Vec<EngineFigures>, ModelError> {
    let mut figures = Vec::new();
    while model.prepare()? {}
    let mut next = 0;
    for &batch in &settings.batches {
        // The whole round once: the shapes of its last steps differ from those of its first.
        round(model, settings, batch, next)?;
        figures.push(round(model, settings, batch, next + batch as u64)?);
        next += 2 * batch as u64;
    }
    Ok(figures)
}

/// A sequence that is measured.
struct Row {
    sequence: SequenceId,
    prompt: Vec<TokenId>,
    output: Vec<TokenId>,
    blocks: Vec<BlockId>,
}

/// A part of a row's prompt, by positions.
struct Piece {
    row: usize,
    from: usize,
    to: usize,
}

fn round(
    model: &mut dyn Model,
    settings: &EngineBenchSettings,
    batch: usize,
    first: u64,
) -> Result<EngineFigures, ModelError> {
    let vocabulary = u64::from(model.card().vocab_size);
    // Fixed pseudo-random prompts, different in every row (Knuth's multiplicative hash).
    let token = |row: u64, at: u64| ((row * 1_000_003 + at + 7) * 2_654_435_761 % vocabulary) as TokenId;
    let row = |index: usize| {
        let id = first + index as u64;
        Row {
            sequence: SequenceId(id),
            prompt: (0..settings.prompt_tokens as u64).map(|at| token(id, at)).collect(),
            output: Vec::new(),
            // A row's blocks lie among those of the others, as they do after some traffic.
            blocks: (0..settings.row_blocks()).map(|at| BlockId((at * batch + index) as u32)).collect(),
        }
    };
    let mut rows: Vec<Row> = (0..batch).map(row).collect();
    let begin = Instant::now();
    prefill(model, settings, &mut rows)?;
    let prefilling = begin.elapsed().as_secs_f64();
    let mut steps = decode(model, settings, &mut rows)?;
    let decoding: f64 = steps.iter().sum();
    let decoded = steps.len() * batch;
    steps.sort_by(f64::total_cmp);
    Ok(EngineFigures {
        batch,
        prefill_tokens_per_s: (batch * settings.prompt_tokens) as f64 / prefilling,
        decode_tokens_per_s: decoded as f64 / decoding,
        decode_step_ms_p50: steps.get(steps.len() / 2).map_or(0.0, |seconds| seconds * 1e3),
        decode_step_ms_max: steps.last().map_or(0.0, |seconds| seconds * 1e3),
    })
}

/// All prompts, in steps of at most `step_tokens`, and the first token of each row.
fn prefill(
    model: &mut dyn Model,
    settings: &EngineBenchSettings,
    rows: &mut [Row],
) -> Result<(), ModelError> {
    let mut flying: Option<Vec<usize>> = None;
    for step in pieces(rows.len(), settings.prompt_tokens, settings.step_tokens) {
        let slice = |piece: &Piece| {
            let Row { sequence, prompt, output, blocks } = &rows[piece.row];
            let sample = RowSampling::plain(&settings.sampling, 0, prompt, output);
            Slice {
                sequence: *sequence,
                blocks,
                start: piece.from,
                input: Input::Tokens(&prompt[piece.from..piece.to]),
                sample: (piece.to == prompt.len()).then_some(sample),
                drafts: 0,
                score: None,
            }
        };
        model.submit(&step.iter().map(slice).collect::<Vec<_>>())?;
        let whole = step.iter().filter(|piece| piece.to == settings.prompt_tokens);
        let drawing = whole.map(|piece| piece.row).collect();
        if let Some(before) = flying.replace(drawing) {
            collect(model, rows, &before)?;
        }
    }
    flying.map_or(Ok(()), |last| collect(model, rows, &last))
}

/// Seconds of each step after the first token.
fn decode(
    model: &mut dyn Model,
    settings: &EngineBenchSettings,
    rows: &mut [Row],
) -> Result<Vec<f64>, ModelError> {
    let all: Vec<usize> = (0..rows.len()).collect();
    let count = settings.new_tokens - 1;
    let mut steps = Vec::with_capacity(count);
    let mut since = Instant::now();
    submit_row_each(model, settings, rows, false)?;
    for step in 1..=count {
        if step < count {
            submit_row_each(model, settings, rows, true)?;
        }
        collect(model, rows, &all)?;
        steps.push(since.elapsed().as_secs_f64());
        since = Instant::now();
    }
    Ok(steps)
}

/// A token more of every row: the last one known, or the one that is being drawn.
fn submit_row_each(
    model: &mut dyn Model,
    settings: &EngineBenchSettings,
    rows: &[Row],
    drawn: bool,
) -> Result<(), ModelError> {
    let slices: Vec<_> =
        rows.iter().enumerate().map(|(index, row)| row.next(settings, drawn.then_some(index))).collect();
    model.submit(&slices)
}

impl Row {
    /// The slice of the token after the last known one, which the step in flight draws at index `drawn`.
    fn next<'a>(&'a self, settings: &'a EngineBenchSettings, drawn: Option<usize>) -> Slice<'a> {
        let Self { sequence, prompt, output, blocks } = self;
        let position = output.len() + usize::from(drawn.is_some());
        let last = output.len().saturating_sub(1);
        let sample = RowSampling::plain(&settings.sampling, position as u32, prompt, output);
        Slice {
            sequence: *sequence,
            blocks,
            start: prompt.len() + position - 1,
            input: drawn.map_or_else(|| Input::Tokens(&output[last..]), Input::Drawn),
            sample: Some(sample),
            drafts: 0,
            score: None,
        }
    }
}

/// The oldest step's tokens, to the rows that drew them.
fn collect(model: &mut dyn Model, rows: &mut [Row], drawing: &[usize]) -> Result<(), ModelError> {
    let output = model.collect()?;
    for (&row, token) in drawing.iter().zip(output.tokens()) {
        rows[row].output.push(token);
    }
    Ok(())
}

/// The prompts of `rows` rows cut into steps, one row after another.
fn pieces(rows: usize, prompt_tokens: usize, step_tokens: usize) -> Vec<Vec<Piece>> {
    let mut steps = vec![Vec::new()];
    let mut room = step_tokens;
    for row in 0..rows {
        let mut from = 0;
        while from < prompt_tokens {
            if room == 0 {
                steps.push(Vec::new());
                room = step_tokens;
            }
            let to = prompt_tokens.min(from + room);
            room -= to - from;
            if let Some(step) = steps.last_mut() {
                step.push(Piece { row, from, to });
            }
            from = to;
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_every_prompt_once() {
        for (rows, prompt, step) in [(1, 5, 8), (3, 5, 4), (2, 512, 2048), (5, 7, 7), (4, 6, 8)] {
            let steps = pieces(rows, prompt, step);
            let mut read = vec![0; rows];
            for pieces in &steps {
                assert!(pieces.iter().map(|piece| piece.to - piece.from).sum::<usize>() <= step);
                for piece in pieces {
                    assert_eq!(piece.from, read[piece.row]);
                    read[piece.row] = piece.to;
                }
            }
            assert_eq!(read, vec![prompt; rows]);
            assert_eq!(steps.len(), (rows * prompt).div_ceil(step));
        }
    }
}
