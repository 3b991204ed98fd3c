//! `mlx-node bench` on the small model; `MLX_TEST_MODEL` names it (`scripts/fetch-test-model`), else these skip.

use std::process::{Command, Output};

fn bench(arguments: &[&str], model: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mlx-node"))
        .args(["bench", "engine", "--log", "error", "--model", model])
        .args(arguments)
        .output()
        .expect("the program runs")
}

#[test]
fn engine_figures_are_one_json_object() {
    let Ok(model) = std::env::var("MLX_TEST_MODEL") else {
        println!("skipped: MLX_TEST_MODEL is not set");
        return;
    };
    let output = bench(
        &["--batches", "1,3", "--prompt-tokens", "16", "--new-tokens", "4", "--sampled", "--json"],
        &model,
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let figures = report["figures"].as_array().expect("figures");
    assert_eq!(figures.iter().map(|row| row["batch"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(3)]);
    for row in figures {
        for name in ["prefill_tokens_per_s", "decode_tokens_per_s", "decode_step_ms_p50"] {
            assert!(row[name].as_f64().is_some_and(|value| value > 0.0), "{name} in {row}");
        }
    }
}

#[test]
fn what_guesses_gain_is_one_json_object() {
    let Ok(model) = std::env::var("MLX_TEST_MODEL") else {
        println!("skipped: MLX_TEST_MODEL is not set");
        return;
    };
    let output = bench(&["--speculation", "--batches", "1,4", "--new-tokens", "12", "--json"], &model);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["same_text"], true, "{report}");
    for name in ["copy_heavy_ratio_1", "copy_heavy_ratio_4", "plain_ratio_min"] {
        assert!(report[name].as_f64().is_some_and(|value| value > 0.0), "{name} in {report}");
    }
    assert!(report["copy_heavy_ratio_16"].is_null(), "not measured: {report}");
    let guessed = report["measurements"].as_array().expect("measurements").iter();
    let accepted = guessed.map(|of| of["guesses"][0].as_u64().unwrap_or(0)).sum::<u64>();
    assert!(accepted > 0, "nothing was guessed: {report}");
}

#[test]
fn what_cannot_be_measured_is_said() {
    let check = |arguments: &[&str], expected: &str| {
        let output = bench(arguments, "./missing");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(expected), "{arguments:?}: {said}");
    };
    check(&["--batches", "0"], "--batches has a 0");
    check(&["--new-tokens", "1"], "--new-tokens 1");
    check(&["--speculation", "--under-load"], "--under-load");
    check(&[], "./missing");
}
