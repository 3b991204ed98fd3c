//! How long a model takes to load, and how much memory at most, against reading its files once from a warm cache.
//!
//!     loading MODEL [never|always|auto]      whether quantized weights are expanded
//!
//! Prints one JSON line. Peak memory is Linux's (`VmHWM`); it holds everything of the process, so the figure is told above
//! what there was before loading.
#![expect(clippy::print_stdout, reason = "what the program prints is its result")]

use mlx::{Dequantize, DeviceChoice, LoadSettings};
use std::{
    error::Error,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    time::Instant,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = PathBuf::from(arguments.next().ok_or("usage: loading MODEL [never|always|auto]")?);
    let dequantize = match arguments.next().as_deref() {
        None | Some("auto") => Dequantize::Auto,
        Some("never") => Dequantize::Never,
        Some("always") => Dequantize::Always,
        Some(other) => return Err(format!("{other:?} is not never, always or auto").into()),
    };
    // Once to warm the cache, once to measure it.
    read_all(&model)?;
    let begin = Instant::now();
    let file_bytes = read_all(&model)?;
    let read_s = begin.elapsed().as_secs_f64();
    let settings = LoadSettings {
        model,
        name: "model".to_owned(),
        slots: 1,
        context_tokens: Some(1024),
        // As little KV as there may be.
        kv_bytes: Some(1 << 30),
        kv_bits: None,
        verify: false,
        dequantize,
        device: DeviceChoice::Auto,
    };
    let before = memory("VmRSS");
    let begin = Instant::now();
    let loaded = mlx::load(&settings, &mut |_, _| ())?;
    let load_s = begin.elapsed().as_secs_f64();
    let figures = serde_json::json!({
        "file_mb": file_bytes >> 20,
        "read_s": read_s,
        "load_s": load_s,
        "load_of_read": load_s / read_s,
        "peak_mb": memory("VmHWM").saturating_sub(before) >> 10,
        "after_mb": memory("VmRSS").saturating_sub(before) >> 10,
    });
    drop(loaded);
    println!("{figures}");
    Ok(())
}

/// Reads every file of weights, and gives their bytes.
fn read_all(model: &Path) -> Result<u64, Box<dyn Error>> {
    let files: Vec<PathBuf> = if model.is_dir() {
        fs::read_dir(model)?.map(|entry| Ok(entry?.path())).collect::<Result<_, std::io::Error>>()?
    } else {
        vec![model.to_owned()]
    };
    let weights = |path: &&PathBuf| {
        path.extension().is_some_and(|extension| extension == "safetensors" || extension == "gguf")
    };
    let mut buffer = vec![0; 16 << 20];
    let mut bytes = 0;
    for path in files.iter().filter(weights) {
        let mut file = File::open(path)?;
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                read => bytes += read as u64,
            }
        }
    }
    Ok(bytes)
}

/// A line of the process' status, in kB; 0 where there is none.
fn memory(line: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let found = status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':'));
    found.and_then(|text| text.trim().strip_suffix("kB")?.trim().parse().ok()).unwrap_or(0)
}
