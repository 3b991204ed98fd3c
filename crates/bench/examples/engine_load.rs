//! What requests do to each other on the model in a folder, as one JSON line: for machines with nothing but this program
//! and MLX's library.
//!
//!     engine_load MODEL [CHURN_ROWS] [STEPS] [TPOT_MS]
#![expect(clippy::print_stdout, reason = "what the program prints is its result")]

use bench::{LoadBenchSettings, engine_under_load};
use engine::EngineSettings;
use mlx::{Dequantize, DeviceChoice, LoadSettings};
use std::{error::Error, path::PathBuf, time::Duration};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |at: usize, default: &str| arguments.get(at).map_or(default, String::as_str).to_owned();
    // Ten milliseconds a token: what rows are promised on a machine as fast as a GPU.
    let tpot_target = Duration::from_millis(argument(3, "10").parse()?);
    let settings = LoadBenchSettings {
        rows: 8,
        long_prompt: 4096,
        prefix: 2048,
        churn_rows: argument(1, "64").parse()?,
        churn_contexts: vec![256, 4096],
        steps: argument(2, "200").parse()?,
        engine: EngineSettings { tpot_target, ..EngineSettings::default() },
    };
    let load = LoadSettings {
        model: PathBuf::from(
            arguments.first().ok_or("usage: engine_load MODEL [CHURN_ROWS] [STEPS] [TPOT_MS]")?,
        ),
        name: "model".to_owned(),
        slots: settings.slots(),
        context_tokens: None,
        kv_bytes: None,
        kv_bits: None,
        verify: false,
        dequantize: Dequantize::Auto,
        device: DeviceChoice::Auto,
    };
    let (model, _) = mlx::load(&load, &mut |_, _| ())?;
    println!("{}", serde_json::to_string(&engine_under_load(model, &settings)?)?);
    Ok(())
}
