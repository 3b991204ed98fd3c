//! No step copies a pool of KV: what decoding takes at its peak stays far below one layer's keys. Alone in its program,
//! since MLX counts the memory of a whole process.
//!
//! `MLX_TEST_MODEL` names the `.gguf` file (`scripts/fetch-test-model`); without it this skips.
#![expect(clippy::unwrap_used, reason = "helpers of tests, outside #[test] functions")]

use engine::{BlockId, Input, Model, RowSampling, SequenceId, Slice};
use mlx::{Dequantize, DeviceChoice, LoadSettings};
use mlx_rs::{Array, memory, ops::zeros_dtype};
use std::path::PathBuf;
use types::SamplingParams;

/// Layers of SmolLM2-135M.
const LAYERS: usize = 30;
/// KV in all; rows take some 10 MiB of activations.
const KV_BYTES: usize = 4 << 30;
/// Rows that decode.
const ROWS: usize = 4;

#[test]
fn no_step_copies_a_pool() {
    let Some(path) = std::env::var_os("MLX_TEST_MODEL") else {
        println!("skipped: MLX_TEST_MODEL is not set (scripts/fetch-test-model)");
        return;
    };
    let copy = KV_BYTES / (2 * LAYERS);
    // The measurement sees a copy where there is one: of an array that somebody else holds.
    let array = zeros_dtype(&[1, copy as i32 / 4], mlx_rs::Dtype::Float32).unwrap();
    array.eval().unwrap();
    let put = |array: &Array| {
        let (at, value) = (Array::from_slice(&[5_i32], &[1, 1]), Array::from_slice(&[1.0_f32], &[1, 1]));
        array.put_along_axis(&at, &value, 1).unwrap().eval().unwrap();
    };
    let seen = peak_of(|| put(&array));
    assert!(seen >= copy, "{seen} bytes seen of {copy} copied");
    drop(array);

    let settings = LoadSettings {
        model: PathBuf::from(path),
        name: "small".to_owned(),
        slots: ROWS,
        context_tokens: None,
        kv_bytes: Some(KV_BYTES as u64),
        kv_bits: None,
        verify: false,
        dequantize: Dequantize::Auto,
        device: DeviceChoice::Auto,
    };
    let mut model = mlx::load(&settings, &mut |_, _| ()).unwrap().0;
    decode(model.as_mut(), 0, 4);
    let peak = peak_of(|| decode(model.as_mut(), 4, 8));
    println!("{ROWS} rows: {peak} bytes beside weights and KV; a layer's keys have {copy}");
    assert!(peak < copy / 2, "steps take {peak} bytes, a copy of one layer's keys takes {copy}");
}

/// Bytes in use at the peak beside what was in use before.
fn peak_of(action: impl FnOnce()) -> usize {
    let before = memory::active_memory().unwrap();
    memory::reset_peak_memory().unwrap();
    action();
    memory::peak_memory().unwrap().saturating_sub(before)
}

/// `count` steps of all rows from position `from` on, one always in flight.
fn decode(model: &mut dyn Model, from: usize, count: usize) {
    let params = SamplingParams::greedy();
    let blocks: Vec<Vec<BlockId>> =
        (0..ROWS).map(|row| (0..4).map(|at| BlockId((at * ROWS + row) as u32)).collect()).collect();
    for at in 0..count {
        let slices: Vec<_> = (0..ROWS)
            .map(|row| Slice {
                sequence: SequenceId(row as u64),
                blocks: &blocks[row],
                start: from + at,
                input: if at == 0 { Input::Tokens(&[7]) } else { Input::Drawn(row) },
                sample: Some(RowSampling::plain(&params, (from + at) as u32, &[7], &[])),
                drafts: 0,
                score: None,
            })
            .collect();
        model.submit(&slices).unwrap();
        if at > 0 {
            model.collect().unwrap();
        }
    }
    model.collect().unwrap();
}
