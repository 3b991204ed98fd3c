//! A real model by every path: the same text, no graph built twice.
//!
//! Tests whose names begin with `gpu` skip where MLX has no GPU.

use super::*;
use engine::{BlockId, Input, RowSampling, SequenceId, Slice};
use serde::Deserialize;
use types::{SamplingParams, TokenId};

#[derive(Deserialize)]
struct Golden {
    prompt: Vec<TokenId>,
    tokens: Vec<TokenId>,
    gaps: Vec<f32>,
}

fn goldens() -> Vec<Golden> {
    serde_json::from_str(include_str!("../../../../tests/goldens/smollm2.json")).unwrap()
}

fn small(path: Path, dequantize: Dequantize, device: DeviceChoice) -> Option<Runner> {
    let Some(model) = std::env::var_os("MLX_TEST_MODEL") else {
        println!("skipped: MLX_TEST_MODEL is not set (scripts/fetch-test-model)");
        return None;
    };
    let settings = LoadSettings {
        model: PathBuf::from(model),
        name: "small".to_owned(),
        slots: 16,
        context_tokens: None,
        kv_bytes: Some(1 << 30),
        kv_bits: None,
        verify: false,
        dequantize,
        device,
    };
    Some(load_with(&settings, Some(path), &mut |_, _| ()).unwrap().0)
}

fn has_gpu() -> bool {
    let gpu = Device::try_default().and_then(|device| device.get_type());
    let has = matches!(gpu, Ok(DeviceType::Gpu));
    if !has {
        println!("skipped: MLX finds no GPU here");
    }
    has
}

/// Rows that decode greedily, each on blocks of its own.
struct Rows {
    prompts: Vec<Vec<TokenId>>,
    outputs: Vec<Vec<TokenId>>,
    params: SamplingParams,
    /// Whether a step is in flight.
    ahead: bool,
}

/// Rows that never share a block.
const LANES: u32 = 16;

impl Rows {
    fn new(prompts: Vec<Vec<TokenId>>) -> Self {
        let outputs = vec![Vec::new(); prompts.len()];
        Self { prompts, outputs, params: SamplingParams::greedy(), ahead: false }
    }

    fn submit(&mut self, model: &mut Runner) {
        let blocks: Vec<Vec<BlockId>> = (0..self.prompts.len() as u32)
            .map(|row| (0..48).map(|at| BlockId(at * LANES + row)).collect())
            .collect();
        let slices: Vec<_> = self
            .prompts
            .iter()
            .zip(&self.outputs)
            .enumerate()
            .map(|(id, (prompt, output))| {
                let ahead = usize::from(self.ahead);
                let first = output.is_empty() && !self.ahead;
                let input = match output.last() {
                    _ if self.ahead => Input::Drawn(id),
                    Some(last) => Input::Tokens(std::slice::from_ref(last)),
                    None => Input::Tokens(prompt),
                };
                Slice {
                    sequence: SequenceId(id as u64),
                    blocks: &blocks[id],
                    start: if first { 0 } else { prompt.len() + output.len() + ahead - 1 },
                    input,
                    sample: Some(RowSampling::plain(
                        &self.params,
                        (output.len() + ahead) as u32,
                        prompt,
                        output,
                    )),
                    drafts: 0,
                    score: None,
                }
            })
            .collect();
        model.submit(&slices).unwrap();
    }

    fn collect(&mut self, model: &mut Runner) {
        let drawn = model.collect().unwrap();
        self.outputs.iter_mut().zip(drawn.tokens()).for_each(|(output, token)| output.push(token));
    }

    /// `count` more tokens of each row, one step always in flight.
    fn run(&mut self, model: &mut Runner, count: usize) {
        for at in 0..count {
            if !self.ahead {
                self.submit(model);
                self.ahead = true;
            }
            if at + 1 < count {
                self.submit(model);
            } else {
                self.ahead = false;
            }
            self.collect(model);
        }
    }
}

/// Twelve tokens of two prompts as mlx-lm's, but for ties below `tie`.
fn same_as_goldens(path: Path, dequantize: Dequantize, device: DeviceChoice, tie: f32) {
    let Some(mut model) = small(path, dequantize, device) else { return };
    let goldens = goldens();
    let mut rows = Rows::new(vec![goldens[0].prompt.clone()]);
    // The second row joins two steps late, so that a run and single tokens meet in a step.
    rows.run(&mut model, 2);
    rows.prompts.push(goldens[1].prompt.clone());
    rows.outputs.push(Vec::new());
    rows.run(&mut model, 10);
    for (row, golden) in rows.outputs.iter().zip(&goldens) {
        let differs = row.iter().zip(&golden.tokens).position(|(one, two)| one != two);
        let tied = differs.is_none_or(|at| golden.gaps[at] < tie);
        assert!(tied, "{path:?} {dequantize:?}: {row:?} is not {:?}", &golden.tokens[..row.len()]);
    }
}

/// What a Mac runs (weights kept quantized) gives the same text as what runs here, on the CPU device.
#[test]
fn every_path_generates_the_same() {
    let cpu = |path, dequantize| same_as_goldens(path, dequantize, DeviceChoice::Cpu, 1e-3);
    if cfg!(native_cpu) {
        cpu(Path::Native, Dequantize::Always);
    }
    cpu(Path::Pure, Dequantize::Always);
    cpu(Path::Pure, Dequantize::Never);
}

#[test]
fn gpu_paths_generate_the_same() {
    if has_gpu() {
        for (path, dequantize) in [
            (Path::Kernel, Dequantize::Never),
            (Path::Kernel, Dequantize::Always),
            (Path::Pure, Dequantize::Never),
            (Path::Pure, Dequantize::Always),
        ] {
            // In half precision logits around 20 are off by up to 0.02, and the goldens were computed in f32.
            same_as_goldens(path, dequantize, DeviceChoice::Gpu, 0.1);
        }
    }
}

/// Once every shape has been seen nothing is traced again, whatever rows come and go.
#[test]
fn gpu_passes_are_traced_once() {
    if !has_gpu() {
        return;
    }
    let Some(mut model) = small(Path::Kernel, Dequantize::Never, DeviceChoice::Gpu) else { return };
    let prompts: Vec<_> = goldens().iter().take(5).map(|golden| golden.prompt[..20].to_vec()).collect();
    while model.prepare().unwrap() {}
    let warmed = model.traced();
    assert!(warmed > 0);
    let mut rows = Rows::new(prompts.clone());
    rows.run(&mut model, 200);
    assert_eq!(model.traced(), warmed, "within the shapes of the warm-up");
    // Past 256 tokens tables are wider.
    rows.run(&mut model, 100);
    let seen = model.traced();
    rows.run(&mut model, 100);
    let mut rows = Rows::new(prompts[..3].to_vec());
    rows.run(&mut model, 50);
    assert_eq!(model.traced(), seen);
}
