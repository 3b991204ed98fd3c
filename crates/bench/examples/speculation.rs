//! What guessing tokens ahead gains on the model in a folder or file, as one JSON line: `mlx-node bench engine --speculation`
//! for machines with nothing but this program and MLX's library.
//!
//!     speculation MODEL [BATCHES] [NEW_TOKENS] [cpu]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "what the program prints is its result")]

use bench::{SpeculationBenchSettings, speculation_bench};
use engine::EngineSettings;
use mlx::{Dequantize, DeviceChoice, LoadSettings};
use std::{error::Error, path::PathBuf};
use tokenizers::Tokenizer;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |at: usize, default: &str| arguments.get(at).map_or(default, String::as_str).to_owned();
    let batches = argument(1, "1,4,16").split(',').map(str::parse).collect::<Result<Vec<usize>, _>>()?;
    let load = LoadSettings {
        model: PathBuf::from(
            arguments.first().ok_or("usage: speculation MODEL [BATCHES] [NEW_TOKENS] [cpu]")?,
        ),
        name: "model".to_owned(),
        slots: batches.iter().copied().max().unwrap_or(1),
        context_tokens: Some(2048),
        kv_bytes: None,
        kv_bits: None,
        verify: false,
        dequantize: Dequantize::Auto,
        device: if argument(3, "") == "cpu" { DeviceChoice::Cpu } else { DeviceChoice::Auto },
    };
    let (model, assets) = mlx::load(&load, &mut |_, _| ())?;
    let tokenizer = Tokenizer::from_bytes(&assets.tokenizer_json).map_err(|error| error.to_string())?;
    let encode =
        |text: &str| tokenizer.encode(text, false).map_or_else(|_| vec![1], |e| e.get_ids().to_vec());
    let new_tokens = argument(2, "96").parse()?;
    let settings = SpeculationBenchSettings { batches, new_tokens, engine: EngineSettings::default() };
    let figures = speculation_bench(model, &encode, &settings)?;
    for measurement in &figures.measurements {
        eprintln!("{}", serde_json::to_string(measurement)?);
    }
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}
