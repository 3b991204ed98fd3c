//! Prefill and decode rates of a model at several batch sizes, by its own steps.

use engine::{Model, ModelError, RowSampling, SequenceId, Slice};
use serde::Serialize;
use std::time::Instant;
use types::{SamplingParams, TokenId};

/// What to measure.
#[derive(Debug, Clone)]
pub struct EngineBenchSettings {
    /// Rows decoded together, one measurement each.
    pub batches: Vec<usize>,
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded in each row.
    pub new_tokens: usize,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
}

/// What was measured at one batch size.
#[derive(Debug, Clone, Serialize)]
pub struct EngineFigures {
    /// Rows.
    pub batch: usize,
    /// Prompt tokens a second, all prompts in one step.
    pub prefill_tokens_per_s: f64,
    /// Tokens a second of all rows together.
    pub decode_tokens_per_s: f64,
    /// Milliseconds of the median decode step.
    pub decode_step_ms_p50: f64,
    /// Milliseconds of the slowest decode step.
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
    let mut next_id = 0;
    let mut figures = Vec::new();
    for &batch in &settings.batches {
        round(model, settings, batch, 2, &mut next_id)?;
        figures.push(round(model, settings, batch, settings.new_tokens, &mut next_id)?);
    }
    Ok(figures)
}

fn round(
    model: &mut dyn Model,
    settings: &EngineBenchSettings,
    batch: usize,
    new_tokens: usize,
    next_id: &mut u64,
) -> Result<EngineFigures, ModelError> {
    let vocabulary = u64::from(model.card().vocab_size);
    let ids: Vec<_> = (0..batch as u64).map(|row| SequenceId(*next_id + row)).collect();
    *next_id += batch as u64;
    // Fixed pseudo-random prompts, different in every row (Knuth's multiplicative hash).
    let token = |row: u64, at: u64| ((row * 1_000_003 + at + 7) * 2_654_435_761 % vocabulary) as TokenId;
    let prompts: Vec<Vec<TokenId>> =
        ids.iter().map(|id| (0..settings.prompt_tokens as u64).map(|at| token(id.0, at)).collect()).collect();
    for &id in &ids {
        model.open(id, settings.prompt_tokens + new_tokens)?;
    }
    let mut outputs = vec![Vec::new(); batch];
    let begin = Instant::now();
    step(model, settings, &ids, &prompts, &mut outputs)?;
    let prefill = begin.elapsed().as_secs_f64();
    let mut steps = Vec::with_capacity(new_tokens);
    for _ in 1..new_tokens {
        let begin = Instant::now();
        step(model, settings, &ids, &prompts, &mut outputs)?;
        steps.push(begin.elapsed().as_secs_f64());
    }
    for &id in &ids {
        model.close(id);
    }
    let decoding: f64 = steps.iter().sum();
    let decoded = steps.len() * batch;
    steps.sort_by(f64::total_cmp);
    Ok(EngineFigures {
        batch,
        prefill_tokens_per_s: (batch * settings.prompt_tokens) as f64 / prefill,
        decode_tokens_per_s: decoded as f64 / decoding,
        decode_step_ms_p50: steps.get(steps.len() / 2).map_or(0.0, |seconds| seconds * 1e3),
        decode_step_ms_max: steps.last().map_or(0.0, |seconds| seconds * 1e3),
    })
}

/// One step of all rows: the whole prompt first, one token each afterwards.
fn step(
    model: &mut dyn Model,
    settings: &EngineBenchSettings,
    ids: &[SequenceId],
    prompts: &[Vec<TokenId>],
    outputs: &mut [Vec<TokenId>],
) -> Result<(), ModelError> {
    let rows = ids.iter().zip(prompts).zip(outputs.iter());
    let slices: Vec<_> = rows
        .map(|((&sequence, prompt), output)| {
            let (start, tokens) = match output.len() {
                0 => (0, &prompt[..]),
                count => (prompt.len() + count - 1, &output[count - 1..]),
            };
            let params = &settings.sampling;
            let sample = Some(RowSampling { params, position: output.len() as u32, prompt, output });
            Slice { sequence, start, tokens, sample }
        })
        .collect();
    let drawn = model.step(&slices)?;
    drop(slices);
    for (output, token) in outputs.iter_mut().zip(drawn) {
        output.push(token);
    }
    Ok(())
}
