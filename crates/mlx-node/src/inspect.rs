//! `mlx-node inspect` and `mlx-node convert`: what a model's files hold, and the same packed into fewer bits.
#![expect(clippy::print_stdout, reason = "what the commands print is their result")]

use crate::{EXIT_FAILED, EXIT_USAGE, config::Values, failed, logging, settings};
use mlx::checkpoint::{ConvertSettings, Inspection, Mode, Packing, convert as pack, inspect as read};
use serde::Serialize;
use std::{path::PathBuf, process::ExitCode};

/// What to tell.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct InspectArguments {
    /// List the families that can be served, and nothing else
    #[arg(long)]
    families: bool,
    /// Tokens of each conversation [default: the model's context]
    #[arg(long, value_name = "N")]
    context: Option<u64>,
    /// Conversations at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What to convert to.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ConvertArguments {
    /// The folder to write; it must not be there, or be empty
    #[arg(long, value_name = "FOLDER")]
    to: PathBuf,
    /// Bits of a weight: 2, 3, 4, 5, 6 or 8 [default: 4, or what the mode has]
    #[arg(long, value_name = "N")]
    bits: Option<i32>,
    /// Weights that share a scale: 32, 64 or 128 [default: 64, or what the mode has]
    #[arg(long, value_name = "N")]
    group_size: Option<i32>,
    /// How weights are packed: affine, mxfp4, nvfp4, mxfp8
    #[arg(long, default_value = "affine")]
    mode: String,
    /// More bits for what matters most
    #[arg(long)]
    mixed: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    #[serde(flatten)]
    inspection: &'a Inspection,
    context: u64,
    batch: u64,
    /// Weights, and KV of `batch` conversations of `context` tokens.
    memory_bytes: u64,
    /// Conversations of `context` tokens that this machine has room for.
    conversations: u64,
}

/// Prints what the model of `values` is and needs, or which families there are.
///
/// # Errors
/// The exit code; what was wrong has been said.
pub(crate) fn inspect(values: &Values, arguments: &InspectArguments) -> Result<(), ExitCode> {
    if arguments.families {
        if arguments.json {
            println!("{}", serde_json::to_string(&mlx::SUPPORTED).expect("plain data"));
        } else {
            mlx::SUPPORTED.iter().for_each(|family| println!("{family}"));
        }
        return Ok(());
    }
    logging::start(&values.log.0, values.log_format);
    let model = settings::model_settings(values).map_err(|error| failed(EXIT_USAGE, error))?;
    let path = mlx::hub::resolve(&model.source, model.offline, &mut |_, _| ())
        .map_err(|error| failed(EXIT_FAILED, error))?;
    let inspection = read(&path, model.engine.kv_bits).map_err(|error| failed(EXIT_FAILED, error))?;
    let (context, batch) = (arguments.context.unwrap_or(inspection.context_tokens as u64), arguments.batch);
    let report = Report {
        model: &model.source,
        inspection: &inspection,
        context,
        batch,
        memory_bytes: inspection.memory_bytes(context, batch),
        conversations: inspection.sequences(context),
    };
    if arguments.json {
        println!("{}", serde_json::to_string(&report).expect("plain data"));
    } else {
        print_report(&report);
    }
    Ok(())
}

fn print_report(report: &Report<'_>) {
    let Report { inspection, context, batch, .. } = report;
    let kernels = match (inspection.device, inspection.gpu_kernels) {
        ("gpu", true) => ", attention by our kernels",
        ("gpu", false) => ", attention by MLX's operations, which are slower",
        _ => "",
    };
    println!("{}", report.model);
    println!("  family       {}, {} layers", inspection.model_type, inspection.layers);
    println!("  parameters   {}", in_units(inspection.parameters, ["", " k", " M", " G"]));
    println!("  weights      {} in files, {}", bytes(inspection.file_bytes), inspection.packings.join("; "));
    println!("  in memory    {} on the {}{kernels}", bytes(inspection.weight_bytes), inspection.device);
    println!(
        "  context      {} tokens, {} of KV each",
        inspection.context_tokens,
        bytes(inspection.kv_bytes_per_token)
    );
    println!("  needed       {} for {batch} × {context} tokens", bytes(report.memory_bytes));
    let available = inspection.available_bytes.map_or_else(|| "unknown memory".to_owned(), bytes);
    println!("  this machine {available}: {} × {context} tokens at once", report.conversations);
}

fn bytes(bytes: u64) -> String {
    in_units(bytes, [" B", " kB", " MB", " GB"])
}

fn in_units(number: u64, units: [&str; 4]) -> String {
    let power = (0..3).rev().find(|power| number >= 1000_u64.pow(power + 1)).map_or(0, |power| power + 1);
    if power == 0 {
        return format!("{number}{}", units[0]);
    }
    format!("{:.1}{}", number as f64 / 1000_f64.powi(power as i32), units[power as usize])
}

/// Packs the model of `values` and writes it as a folder.
///
/// # Errors
/// The exit code; what was wrong has been said.
pub(crate) fn convert(values: &Values, arguments: &ConvertArguments) -> Result<(), ExitCode> {
    logging::start(&values.log.0, values.log_format);
    let packing = packing(arguments).map_err(|message| failed(EXIT_USAGE, message))?;
    let model = settings::model_settings(values).map_err(|error| failed(EXIT_USAGE, error))?;
    let path = mlx::hub::resolve(&model.source, model.offline, &mut |_, _| ())
        .map_err(|error| failed(EXIT_FAILED, error))?;
    let settings = ConvertSettings { model: path, to: arguments.to.clone(), packing, mixed: arguments.mixed };
    let converted = pack(&settings, &mut |_, _| ()).map_err(|error| failed(EXIT_FAILED, error))?;
    let each = 8.0 * converted.bytes as f64 / converted.parameters.max(1) as f64;
    println!(
        "{}: {} in {} files, {each:.2} bits for each of {} weights",
        arguments.to.display(),
        bytes(converted.bytes),
        converted.files,
        in_units(converted.parameters, ["", " k", " M", " G"])
    );
    Ok(())
}

fn packing(arguments: &ConvertArguments) -> Result<Packing, String> {
    let Some(mode) = Mode::named(&arguments.mode) else {
        return Err(format!("--mode is {:?}; affine, mxfp4, nvfp4 and mxfp8 are known", arguments.mode));
    };
    let (group_size, bits) = mode.fixed().unwrap_or((64, 4));
    let packing = Packing {
        group_size: arguments.group_size.unwrap_or(group_size),
        bits: arguments.bits.unwrap_or(bits),
        mode,
    };
    if packing.exists() {
        return Ok(packing);
    }
    let Packing { group_size, bits, .. } = packing;
    Err(format!(
        "--bits is {bits} and --group-size {group_size}, which {} does not have: affine has 2, 3, 4, 5, 6 or 8 bits \
         in groups of 32, 64 or 128, the others what they are named for",
        mode.name()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_told_in_units() {
        let check = |number: u64, text: &str| assert_eq!(bytes(number), text);
        check(0, "0 B");
        check(999, "999 B");
        check(1000, "1.0 kB");
        check(1_500_000, "1.5 MB");
        check(123_456_789_012, "123.5 GB");
    }

    #[test]
    fn packings_that_are_not_there_are_refused() {
        let check = |bits, group_size, mode: &str, right: bool| {
            let arguments = ConvertArguments {
                to: PathBuf::new(),
                bits,
                group_size,
                mode: mode.to_owned(),
                mixed: false,
            };
            assert_eq!(packing(&arguments).is_ok(), right, "{bits:?} {group_size:?} {mode}");
        };
        check(None, None, "affine", true);
        check(Some(3), Some(128), "affine", true);
        check(Some(7), None, "affine", false);
        check(None, Some(48), "affine", false);
        check(None, None, "nvfp4", true);
        check(Some(8), None, "nvfp4", false);
        check(None, None, "fp5", false);
    }
}
