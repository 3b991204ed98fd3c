//! Prefill and decode rates of the model in a folder, one JSON line a batch size: what `scripts/compare-mlx-lm-gpu` runs
//! where only this program and MLX's library are.
//!
//!     engine_steps MODEL [BATCHES] [PROMPT_TOKENS] [NEW_TOKENS]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "what the program prints is its result")]

use bench::{EngineBenchSettings, engine_steps};
use mlx::{Dequantize, DeviceChoice, LoadSettings};
use std::{error::Error, path::PathBuf, time::Instant};
use types::SamplingParams;

/// Prompt tokens in one step: mlx-lm's default too.
const STEP_TOKENS: usize = 2048;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |at: usize, default: &str| arguments.get(at).map_or(default, String::as_str).to_owned();
    let batches = argument(1, "1,8,16,64").split(',').map(str::parse).collect::<Result<Vec<usize>, _>>()?;
    let settings = EngineBenchSettings {
        batches,
        prompt_tokens: argument(2, "512").parse()?,
        new_tokens: argument(3, "256").parse()?,
        step_tokens: STEP_TOKENS,
        sampling: SamplingParams::greedy(),
    };
    let load = LoadSettings {
        model: PathBuf::from(arguments.first().ok_or("usage: engine_steps MODEL [BATCHES] [PROMPT] [NEW]")?),
        name: "model".to_owned(),
        slots: settings.batches.iter().copied().max().unwrap_or(1),
        context_tokens: None,
        kv_bytes: None,
        kv_bits: None,
        verify: false,
        dequantize: Dequantize::Auto,
        device: DeviceChoice::Auto,
    };
    let begin = Instant::now();
    let (mut model, _) = mlx::load(&load, &mut |_, _| ())?;
    eprintln!("loaded in {:.1} s", begin.elapsed().as_secs_f64());
    let (needed, blocks) = (settings.blocks(), model.limits().blocks);
    if needed > blocks {
        return Err(format!("{needed} blocks of KV are needed; there is memory for {blocks}").into());
    }
    for &batch in &settings.batches {
        let settings = EngineBenchSettings { batches: vec![batch], ..settings.clone() };
        for figures in engine_steps(model.as_mut(), &settings)? {
            println!("{}", serde_json::to_string(&figures)?);
        }
    }
    Ok(())
}
