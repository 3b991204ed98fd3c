//! `mlx-node bench engine`: what this machine makes of a model, step by step and under load, without network.
#![expect(clippy::print_stdout, reason = "what the command prints is its result")]

use crate::{
    EXIT_FAILED, EXIT_USAGE, bench_speculation,
    config::Values,
    engine::load_settings,
    failed, hardware, logging,
    settings::{self, ModelSettings},
};
use ::bench::{
    EngineBenchSettings, EngineFigures, LoadBenchSettings, LoadFigures, engine_steps, engine_under_load,
};
use ::engine::EngineSettings;
use serde::Serialize;
use std::process::ExitCode;
use types::{NodeRates, SamplingDraft, SamplingParams};

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct EngineArguments {
    /// Rows decoded together, one measurement each
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,4,8,16")]
    batches: Vec<u16>,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 128)]
    prompt_tokens: u32,
    /// Tokens decoded in each row
    #[arg(long, default_value_t = 64)]
    new_tokens: u32,
    /// Prompt tokens in one step
    #[arg(long, default_value_t = 2048)]
    step_tokens: u32,
    /// Draw from the nucleus (`top_p` 0.9) instead of greedily
    #[arg(long)]
    sampled: bool,
    /// Also measure what requests do to each other: a long prompt beside rows, a prefix found again, rows that come and go
    #[arg(long)]
    under_load: bool,
    /// Tokens of the long prompt
    #[arg(long, default_value_t = 4096)]
    long_prompt_tokens: u32,
    /// Rows of which one leaves and one joins in every step
    #[arg(long, default_value_t = 64)]
    churn_rows: u16,
    /// Their contexts in tokens, one measurement each
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "256,4096")]
    churn_contexts: Vec<u32>,
    /// Steps of each measurement under load
    #[arg(long, default_value_t = 60)]
    load_steps: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    hardware: String,
    version: &'static str,
    model: &'a str,
    prompt_tokens: u32,
    new_tokens: u32,
    sampled: bool,
    figures: Vec<EngineFigures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    under_load: Option<LoadFigures>,
}

/// Loads the model of `values` in this process, measures, prints; with `speculation` instead of steps what guessing tokens
/// ahead gains.
///
/// # Errors
/// The exit code; what was wrong has been said.
pub(crate) fn engine(
    values: &Values,
    arguments: &EngineArguments,
    speculation: bool,
) -> Result<(), ExitCode> {
    logging::start(&values.log.0, values.log_format);
    let usage = |what: String| Err(failed(EXIT_USAGE, what));
    if arguments.batches.is_empty() || arguments.batches.contains(&0) {
        return usage("--batches has a 0; a batch has at least 1 row".to_owned());
    }
    if speculation && (arguments.under_load || arguments.sampled) {
        return usage(
            "--speculation is a measurement of its own, without --under-load and --sampled".to_owned(),
        );
    }
    let &EngineArguments { prompt_tokens, new_tokens, step_tokens, .. } = arguments;
    if prompt_tokens == 0 || new_tokens < 2 || step_tokens == 0 {
        return usage(format!(
            "--prompt-tokens is {prompt_tokens}, --new-tokens {new_tokens} and --step-tokens {step_tokens}; \
             at least 1, 2 and 1 are needed"
        ));
    }
    let ModelSettings { source, offline, mut engine } =
        settings::model_settings(values).map_err(|error| failed(EXIT_USAGE, error))?;
    engine.model =
        mlx::hub::resolve(&source, offline, &mut |_, _| ()).map_err(|error| failed(EXIT_FAILED, error))?;
    if speculation {
        let batches = arguments.batches.iter().copied().map(usize::from).collect();
        return bench_speculation::run(engine, batches, new_tokens, arguments.json);
    }
    let load = under_load_settings(arguments, &engine);
    let largest = arguments.batches.iter().copied().max().map_or(1, usize::from);
    engine.slots = largest.max(load.as_ref().map_or(1, LoadBenchSettings::slots)) as u32;
    let (mut model, _) =
        mlx::load(&load_settings(engine), &mut |_, _| ()).map_err(|error| failed(EXIT_FAILED, error))?;
    let under_load = load.as_ref().map_or(0, LoadBenchSettings::context);
    let (needed, context) =
        ((prompt_tokens + new_tokens).max(under_load as u32), model.card().context_tokens);
    if needed > context {
        return usage(format!("prompt and new tokens come to {needed}; the model's context is {context}"));
    }
    let sampling = if arguments.sampled {
        SamplingParams::try_from(SamplingDraft { top_p: 0.9, ..SamplingDraft::default() }).expect("in range")
    } else {
        SamplingParams::greedy()
    };
    let settings = EngineBenchSettings {
        batches: arguments.batches.iter().copied().map(usize::from).collect(),
        prompt_tokens: prompt_tokens as usize,
        new_tokens: new_tokens as usize,
        step_tokens: step_tokens as usize,
        sampling,
    };
    let (needed, blocks) = (settings.blocks(), model.limits().blocks);
    if needed > blocks {
        return usage(format!("{needed} blocks of KV are needed; there is memory for {blocks}"));
    }
    let figures = engine_steps(model.as_mut(), &settings).map_err(|error| failed(EXIT_FAILED, error))?;
    let under_load = load
        .map(|mut settings| {
            settings.engine.rates = rates_of(&figures);
            engine_under_load(model, &settings)
        })
        .transpose()
        .map_err(|error| failed(EXIT_FAILED, error))?;
    let report = Report {
        hardware: hardware::describe(),
        version: env!("CARGO_PKG_VERSION"),
        model: &source,
        prompt_tokens,
        new_tokens,
        sampled: arguments.sampled,
        figures,
        under_load,
    };
    if arguments.json {
        println!("{}", serde_json::to_string(&report).expect("plain data"));
    } else {
        print_table(&report);
    }
    Ok(())
}

/// What was measured, as the start-up of an engine measures it.
fn rates_of(figures: &[EngineFigures]) -> NodeRates {
    let (Some(few), Some(many)) =
        (figures.iter().min_by_key(|f| f.batch), figures.iter().max_by_key(|f| f.batch))
    else {
        return EngineSettings::default().rates;
    };
    let step_s = |figures: &EngineFigures| figures.decode_step_ms_p50 / 1e3;
    let row_s = (step_s(many) - step_s(few)) / (many.batch - few.batch).max(1) as f64;
    NodeRates {
        prefill_tokens_per_s: few.prefill_tokens_per_s as f32,
        decode_step_s: (step_s(few) - row_s * (few.batch - 1) as f64).max(0.0) as f32,
        decode_row_s: row_s.max(0.0) as f32,
    }
}

fn under_load_settings(
    arguments: &EngineArguments,
    engine: &settings::EngineProcessSettings,
) -> Option<LoadBenchSettings> {
    arguments.under_load.then(|| LoadBenchSettings {
        rows: 8,
        long_prompt: arguments.long_prompt_tokens as usize,
        prefix: 2048,
        churn_rows: usize::from(arguments.churn_rows),
        churn_contexts: arguments.churn_contexts.iter().map(|&tokens| tokens as usize).collect(),
        steps: arguments.load_steps as usize,
        engine: EngineSettings {
            ttft_target: engine.ttft_target,
            tpot_target: engine.tpot_target,
            ..EngineSettings::default()
        },
    })
}

fn print_table(report: &Report<'_>) {
    println!("{} on {}", report.model, report.hardware);
    println!(
        "{:>6} {:>14} {:>13} {:>12} {:>12}",
        "rows", "prefill tok/s", "decode tok/s", "step p50 ms", "max ms"
    );
    for figures in &report.figures {
        println!(
            "{:>6} {:>14.1} {:>13.1} {:>12.1} {:>12.1}",
            figures.batch,
            figures.prefill_tokens_per_s,
            figures.decode_tokens_per_s,
            figures.decode_step_ms_p50,
            figures.decode_step_ms_max
        );
    }
    let Some(load) = &report.under_load else { return };
    let ([quiet, quiet_p99], [during, during_p99]) = (load.quiet_itl_ms, load.during_prefill_itl_ms);
    println!("between tokens: {quiet:.1} ms, p99 {quiet_p99:.1} ms");
    println!(
        "  while a prompt is read: {during:.1} ms, p99 {during_p99:.1} ms, {:.2} times; its first token after {:.0} ms",
        load.itl_p99_ratio_during_prefill, load.long_ttft_ms
    );
    let [cold, warm] = load.prefix_ttft_ms;
    println!("first token behind a new prefix: {cold:.0} ms; found again: {warm:.0} ms");
    for churn in &load.churn {
        println!(
            "rows of {} tokens: {:.2} ms a step, {:.2} ms where one leaves and one joins",
            churn.context, churn.steady_step_ms, churn.churn_step_ms
        );
    }
}
