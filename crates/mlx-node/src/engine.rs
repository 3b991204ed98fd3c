//! `mlx-node engine`: the process that owns a model, or a part of one. Commands come on stdin, reports leave on stdout, as
//! frames.

use crate::{
    EXIT_FAILED, EXIT_USAGE, failed, logging,
    settings::EngineProcessSettings,
    values::{Dequantize, Device},
};
use ::engine::{EngineSettings, Speculate};
use mlx::{
    AnyModel, DeviceChoice, LoadSettings,
    distributed::{Backend, Group},
    pipeline::{self, StageEvent},
};
use node::engine_process::{self, Loaded, LoadedEmbedder, LoadedModel, RankTask, StageStep};
use std::{fs::File, io::stdin, ops::Range, process::ExitCode};

/// The environment's word for a rank's place, which MLX reads too.
const VARIABLE_RANK: &str = "MLX_RANK";

/// Loads the model and generates, or does what its task says, until the parent ends it or is gone. `json` is an [`EngineProcessSettings`].
pub(crate) fn run(json: &str) -> ExitCode {
    let settings: EngineProcessSettings = match serde_json::from_str(json) {
        Ok(settings) => settings,
        Err(error) => return failed(EXIT_USAGE, format_args!("engine --settings: {error}")),
    };
    logging::start(&settings.log, settings.log_format);
    engine_process::end_with_parent();
    // Tells this process' lines from its parent's, which share one stderr.
    let span = tracing::info_span!("engine", pid = std::process::id());
    let _entered = span.enter();
    let stdout = match engine_process::private_stdout() {
        Ok(stdout) => stdout,
        Err(error) => return failed(EXIT_FAILED, format_args!("engine: stdout cannot be had: {error}")),
    };
    let engine_settings = EngineSettings {
        ttft_target: settings.ttft_target,
        tpot_target: settings.tpot_target,
        session_ttl: settings.session_ttl,
        session_quota: settings.session_quota,
        prefix_cache: settings.prefix_cache,
        speculation: if settings.speculation { Speculate::Auto } else { Speculate::Off },
        ..EngineSettings::default()
    };
    let task = settings.task.clone();
    let load_settings = load_settings(settings);
    match task {
        None => whole(&load_settings, engine_settings, stdout),
        Some(RankTask::Measure { rows }) => {
            let measure = |progress: &mut dyn FnMut(&str, f32)| {
                pipeline::measure(&load_settings, rows, progress).map_err(|error| error.to_string())
            };
            engine_process::run_measure(measure, stdin(), stdout)
        }
        Some(RankTask::Rank { layers, kv_tokens, jaccl }) => {
            let backend = if jaccl { Backend::Jaccl } else { Backend::Ring };
            let ranges: Vec<_> =
                layers.iter().map(|&(first, after)| first as usize..after as usize).collect();
            match std::env::var(VARIABLE_RANK).unwrap_or_default().parse::<usize>() {
                Ok(0) => head(backend, &load_settings, &ranges, kv_tokens, engine_settings, stdout),
                Ok(_) => stage(backend, &load_settings, &ranges, kv_tokens, stdout),
                Err(error) => failed(EXIT_USAGE, format_args!("engine: {VARIABLE_RANK}: {error}")),
            }
        }
    }
}

/// Serves a model.
fn whole(load_settings: &LoadSettings, engine_settings: EngineSettings, stdout: File) -> ExitCode {
    let load = |progress: &mut dyn FnMut(&str, f32)| {
        let (model, assets) = mlx::load_any(load_settings, progress).map_err(|error| error.to_string())?;
        Ok(match model {
            AnyModel::Generator(model) => Loaded::Generator(LoadedModel { model, assets }),
            AnyModel::Embedder(model) => Loaded::Embedder(LoadedEmbedder { model, assets }),
        })
    };
    engine_process::run(load, engine_settings, stdin(), stdout)
}

/// Is the first rank of a pipeline, which serves its model.
fn head(
    backend: Backend,
    load_settings: &LoadSettings,
    ranges: &[Range<usize>],
    kv_tokens: u64,
    engine_settings: EngineSettings,
    stdout: File,
) -> ExitCode {
    let load = |group: Group, progress: &mut dyn FnMut(&str, f32)| {
        let loaded = pipeline::load_head(load_settings, group, ranges, Some(kv_tokens), progress);
        let (head, assets) = loaded.map_err(|error| error.to_string())?;
        Ok(Loaded::Generator(LoadedModel { model: Box::new(head), assets }))
    };
    engine_process::run_head(|| join(backend), load, engine_settings, stdin(), stdout)
}

/// Is another rank of a pipeline.
fn stage(
    backend: Backend,
    load_settings: &LoadSettings,
    ranges: &[Range<usize>],
    kv_tokens: u64,
    stdout: File,
) -> ExitCode {
    let stage = |on: &mut dyn FnMut(StageStep<'_>)| {
        let group = join(backend)?;
        on(StageStep::Joined);
        let mut tell = |event: StageEvent<'_>| {
            on(match event {
                StageEvent::Loading { what, fraction } => StageStep::Loading { what, fraction },
                StageEvent::Ready => StageStep::Ready,
                StageEvent::Pass => StageStep::Pass,
            });
        };
        let ended = pipeline::run_stage(load_settings, group, ranges, Some(kv_tokens), &mut tell);
        ended.map_err(|error| error.to_string())
    };
    engine_process::run_stage(stage, stdin(), stdout)
}

fn join(backend: Backend) -> Result<Group, String> {
    Group::join(backend).map_err(|error| error.to_string())
}

/// The same in `mlx`'s terms.
pub(crate) fn load_settings(settings: EngineProcessSettings) -> LoadSettings {
    LoadSettings {
        model: settings.model,
        name: settings.name,
        slots: settings.slots as usize,
        context_tokens: settings.context_tokens.map(|tokens| tokens as usize),
        kv_bytes: settings.kv_bytes,
        kv_bits: settings.kv_bits,
        verify: settings.verify,
        dequantize: match settings.dequantize {
            Dequantize::Auto => mlx::Dequantize::Auto,
            Dequantize::Never => mlx::Dequantize::Never,
            Dequantize::Always => mlx::Dequantize::Always,
        },
        device: match settings.device {
            Device::Auto => DeviceChoice::Auto,
            Device::Cpu => DeviceChoice::Cpu,
            Device::Gpu => DeviceChoice::Gpu,
        },
    }
}
