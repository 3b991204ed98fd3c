//! `mlx-node engine`: the process that owns a model. Commands come on stdin, reports leave on stdout, as frames.

use crate::{
    EXIT_FAILED, EXIT_USAGE, failed, logging,
    settings::EngineProcessSettings,
    values::{Dequantize, Device},
};
use ::engine::{EngineSettings, Speculate};
use mlx::{AnyModel, DeviceChoice, LoadSettings};
use node::engine_process::{self, Loaded, LoadedEmbedder, LoadedModel};
use std::process::ExitCode;

/// Loads the model and generates until the parent ends it or is gone. `json` is an [`EngineProcessSettings`].
pub(crate) fn run(json: &str) -> ExitCode {
    let settings: EngineProcessSettings = match serde_json::from_str(json) {
        Ok(settings) => settings,
        Err(error) => return failed(EXIT_USAGE, format_args!("engine --settings: {error}")),
    };
    logging::start(&settings.log, settings.log_format);
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
    let load_settings = load_settings(settings);
    let load = |progress: &mut dyn FnMut(&str, f32)| {
        let (model, assets) = mlx::load_any(&load_settings, progress).map_err(|error| error.to_string())?;
        Ok(match model {
            AnyModel::Generator(model) => Loaded::Generator(LoadedModel { model, assets }),
            AnyModel::Embedder(model) => Loaded::Embedder(LoadedEmbedder { model, assets }),
        })
    };
    engine_process::run(load, engine_settings, std::io::stdin(), stdout)
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
