//! Converted models compute what the originals do, as far as their bits go, and what mlx-lm's own conversion does.

use super::tests::{Model, assert_close, goldens, weight};
use crate::{
    checkpoint::{Checkpoint, ConvertSettings, Mode, Packing, convert},
    layers::Path,
};
use mlx_rs::Array;
use serde::Deserialize;
use std::{fs, path::PathBuf};
use types::TokenId;

fn affine(bits: i32) -> Packing {
    Packing { group_size: 32, bits, mode: Mode::Affine }
}

/// A folder with the tiny model of that golden, as its authors would publish it.
fn published(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let goldens = goldens();
    let case = goldens.cases.iter().find(|case| case.name == name).unwrap();
    let arrays: Vec<_> =
        case.tensors.iter().map(|(name, recipe)| (name.clone(), weight(name, recipe))).collect();
    Array::save_safetensors(arrays, None, folder.path().join("model.safetensors")).unwrap();
    fs::write(folder.path().join("config.json"), case.config.to_string()).unwrap();
    fs::write(folder.path().join("tokenizer.json"), r#"{"model":{}}"#).unwrap();
    fs::write(folder.path().join("notes.txt"), "kept").unwrap();
    folder
}

#[test]
fn converted_models_compute_nearly_the_same() {
    let goldens = goldens();
    // With 8 bits the logits are near, with fewer the same place only in the middle of it.
    for (name, packing, mixed, tolerance) in [
        ("llama", affine(8), false, 0.1),
        ("llama", affine(4), true, 1.5),
        ("qwen3_moe", affine(8), false, 0.1),
        ("mixtral", affine(8), true, 0.1),
        ("gemma2", affine(8), false, 0.1),
        ("deepseek_v2", affine(8), false, 0.1),
        ("deepseek_v3", affine(8), false, 0.1),
        ("qwen3", Packing { group_size: 32, bits: 8, mode: Mode::Mxfp8 }, false, 0.5),
    ] {
        let from = published(name);
        let to = from.path().join("converted");
        let settings = ConvertSettings { model: from.path().to_owned(), to: to.clone(), packing, mixed };
        let converted = convert(&settings, &mut |_, _| ()).unwrap();
        assert_eq!(converted.files, 1, "{name}");
        assert_eq!(fs::read_to_string(to.join("notes.txt")).unwrap(), "kept");
        let mut checkpoint = Checkpoint::open(&to, &mut |_, _| ()).unwrap();
        assert!(checkpoint.tensors.quantized(), "{name}");
        assert!(!checkpoint.tensors.names().any(|name| name.contains(".experts.0.")), "{name}");
        let mut model = Model::new(&checkpoint.config, &mut checkpoint.tensors, Path::Pure, false);
        let logits = model.read(&[1, 2, 3], &goldens.tokens, &[80]);
        let case = goldens.cases.iter().find(|case| case.name == name).unwrap();
        for (&at, wanted) in goldens.positions.iter().zip(&case.logits) {
            assert_close(&logits[at], wanted, tolerance, &format!("{name} {packing:?} at {at}"));
        }
        // Never over what is there, nor from what is packed.
        let again = convert(&settings, &mut |_, _| ()).unwrap_err().to_string();
        assert!(again.contains("not empty"), "{again}");
        let twice = ConvertSettings { model: to, to: from.path().join("twice"), ..settings };
        let twice = convert(&twice, &mut |_, _| ()).unwrap_err().to_string();
        assert!(twice.contains("quantized already"), "{twice}");
    }
}

#[derive(Deserialize)]
struct Perplexity {
    tokens: Vec<TokenId>,
    /// Of mlx-lm: in f32, and in 8 and 4 bits with groups of 64.
    f32: f64,
    bits8: f64,
    bits4: f64,
}

/// SmolLM2's perplexity of a fixed text, within half a percent of mlx-lm's.
#[test]
fn perplexity_equals_mlx_lm() {
    let Some(path) = std::env::var_os("MLX_TEST_MODEL") else {
        println!("skipped: MLX_TEST_MODEL is not set (scripts/fetch-test-model)");
        return;
    };
    let path = PathBuf::from(path);
    let golden: Perplexity =
        serde_json::from_str(include_str!("../../../../tests/goldens/perplexity.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let of = |model: &std::path::Path, dequantize: bool| {
        let mut checkpoint = Checkpoint::open(model, &mut |_, _| ()).unwrap();
        let mut model = Model::new(&checkpoint.config, &mut checkpoint.tensors, Path::Pure, dequantize);
        perplexity(&mut model, &golden.tokens)
    };
    let mut found = vec![("f32", of(&path, true), golden.f32)];
    for (bits, wanted) in [(8, golden.bits8), (4, golden.bits4)] {
        let to = folder.path().join(bits.to_string());
        let packing = Packing { group_size: 64, bits, mode: Mode::Affine };
        let settings = ConvertSettings { model: path.clone(), to: to.clone(), packing, mixed: false };
        convert(&settings, &mut |_, _| ()).unwrap();
        found.push((if bits == 8 { "8 bits" } else { "4 bits" }, of(&to, true), wanted));
    }
    for (name, got, wanted) in found {
        println!("{name}: perplexity {got:.4}, mlx-lm's {wanted:.4}");
        assert!((got / wanted - 1.0).abs() < 0.005, "{name}: {got} is not {wanted}");
    }
}

fn perplexity(model: &mut Model, tokens: &[TokenId]) -> f64 {
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(32) as u32).collect();
    let logits = model.read(&blocks, tokens, &[tokens.len()]);
    let surprise = |(logits, &next): (&Vec<f32>, &TokenId)| {
        let largest = logits.iter().fold(f32::NEG_INFINITY, |most, &logit| most.max(logit));
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
        sum.ln() - f64::from(logits[next as usize] - largest)
    };
    let all: f64 = logits.iter().zip(&tokens[1..]).map(surprise).sum();
    (all / (tokens.len() - 1) as f64).exp()
}
