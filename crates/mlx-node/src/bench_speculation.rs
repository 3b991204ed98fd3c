//! `mlx-node bench engine --speculation`: what guessing tokens ahead gains on a model, and what it costs where nothing is
//! to be guessed.
#![expect(clippy::print_stdout, reason = "what the command prints is its result")]

use crate::{EXIT_FAILED, EXIT_USAGE, engine::load_settings, failed, settings::EngineProcessSettings};
use ::bench::{SpeculationBenchSettings, speculation_bench};
use ::engine::{EngineSettings, Speculate};
use std::process::ExitCode;
use tokenizers::Tokenizer;

/// What prompts of the measurement and their answers take at most.
const CONTEXT_TOKENS: u32 = 2048;
/// Of that for prompts.
const PROMPT_TOKENS: u32 = 1024;

/// Loads the model, measures with as many rows at once as `batches` says, prints.
///
/// # Errors
/// The exit code; what was wrong has been said.
pub(crate) fn run(
    mut settings: EngineProcessSettings,
    batches: Vec<usize>,
    new_tokens: u32,
    json: bool,
) -> Result<(), ExitCode> {
    if new_tokens > CONTEXT_TOKENS - PROMPT_TOKENS {
        return Err(failed(
            EXIT_USAGE,
            format_args!(
                "--new-tokens is {new_tokens}; with --speculation at most {} are measured",
                CONTEXT_TOKENS - PROMPT_TOKENS
            ),
        ));
    }
    settings.slots = batches.iter().copied().max().unwrap_or(1) as u32;
    settings.context_tokens = Some(CONTEXT_TOKENS);
    let engine = EngineSettings {
        ttft_target: settings.ttft_target,
        tpot_target: settings.tpot_target,
        speculation: Speculate::Auto,
        ..EngineSettings::default()
    };
    let (model, assets) =
        mlx::load(&load_settings(settings), &mut |_, _| ()).map_err(|error| failed(EXIT_FAILED, error))?;
    let tokenizer = Tokenizer::from_bytes(&assets.tokenizer_json).map_err(|error| {
        failed(EXIT_FAILED, format_args!("the model's tokenizer cannot be read: {error}"))
    })?;
    let encode = |text: &str| {
        let tokens = tokenizer.encode(text, false).map(|encoding| encoding.get_ids().to_vec());
        let mut tokens = tokens.ok().filter(|tokens| !tokens.is_empty()).unwrap_or_else(|| vec![0]);
        tokens.truncate(PROMPT_TOKENS as usize);
        tokens
    };
    let settings = SpeculationBenchSettings { batches, new_tokens, engine };
    let figures = speculation_bench(model, &encode, &settings).map_err(|error| failed(EXIT_FAILED, error))?;
    if json {
        println!("{}", serde_json::to_string(&figures).expect("plain data"));
        return Ok(());
    }
    println!(
        "{:>8} {:>6} {:>14} {:>14} {:>6} {:>9} {:>9} {:>9}",
        "text", "rows", "without tok/s", "with tok/s", "ratio", "accepted", "rejected", "different"
    );
    for measured in &figures.measurements {
        let ([without, with], [accepted, rejected]) = (measured.tokens_per_s, measured.guesses);
        println!(
            "{:>8} {:>6} {without:>14.1} {with:>14.1} {:>6.2} {accepted:>9} {rejected:>9} {:>9}",
            measured.text, measured.rows, measured.ratio, measured.different
        );
    }
    Ok(())
}
