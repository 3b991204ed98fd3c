//! Every family against mlx-lm, in tiny models whose weights both sides make by one formula (`tests/goldens/families.py`).

use super::{Family, Spec, StepInput, decoder::Decoder, spec};
use crate::{
    checkpoint::{Mode, Packed, Packing, Tensors},
    kv::KvPool,
    layers::{Compute, Path, Wanted},
    products::Products,
    step::Ordered,
};
use engine::{BlockId, Input, SequenceId, Slice};
use mlx_rs::{Array, Dtype, transforms::eval};
use serde::Deserialize;
use serde_json::Value;
use std::{collections::BTreeMap, ops::Range};
use types::TokenId;

#[derive(Deserialize)]
pub(crate) struct Goldens {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) positions: Vec<usize>,
    pub(crate) cases: Vec<Case>,
}

#[derive(Deserialize)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) config: Value,
    /// Shape, center and scale of each.
    pub(crate) tensors: BTreeMap<String, (Vec<i32>, f64, f64)>,
    #[serde(default)]
    packed: BTreeMap<String, PackedAs>,
    pub(crate) logits: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct PackedAs {
    group_size: i32,
    bits: i32,
    mode: String,
}

pub(crate) fn goldens() -> Goldens {
    serde_json::from_str(include_str!("../../../../tests/goldens/families.json")).unwrap()
}

/// `center + scale · u`, as the script makes it.
pub(crate) fn weight(name: &str, (shape, center, scale): &(Vec<i32>, f64, f64)) -> Array {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |seed, byte| {
        (seed ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let element = |index: u64| {
        let z = seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        let u = ((z ^ z >> 31) >> 40) as f64 / f64::from(1 << 23) - 1.0;
        (center + scale * u) as f32
    };
    let count: i32 = shape.iter().product();
    let values: Vec<f32> = (0..count as u64).map(element).collect();
    Array::from_slice(&values, shape)
}

impl Case {
    fn packs_kv(&self) -> bool {
        self.config.get("kv_bits").is_some()
    }

    fn tensors(&self) -> Tensors {
        let mut arrays = Vec::new();
        for (name, description) in &self.tensors {
            let dense = weight(name, description);
            let prefix = name.strip_suffix(".weight").unwrap_or_default();
            let Some(PackedAs { group_size, bits, mode }) = self.packed.get(prefix) else {
                arrays.push((name.clone(), dense));
                continue;
            };
            let mode = Mode::ALL.into_iter().find(|known| known.name() == mode).unwrap();
            let packing = Packing { group_size: *group_size, bits: *bits, mode };
            let Packed { words, scales, biases, .. } = Packed::of(&dense, packing).unwrap();
            arrays.push((name.clone(), words));
            arrays.push((format!("{prefix}.scales"), scales));
            arrays.extend(biases.map(|biases| (format!("{prefix}.biases"), biases)));
        }
        Tensors::of_arrays(arrays, &self.config).unwrap()
    }

    fn model(&self, path: Path, dequantize: bool) -> Model {
        self.model_of(self.tensors(), path, dequantize)
    }

    fn model_of(&self, mut tensors: Tensors, path: Path, dequantize: bool) -> Model {
        let model = Model::new(&self.config, &mut tensors, path, dequantize);
        assert_eq!(tensors.leftovers().collect::<Vec<_>>(), Vec::<&str>::new(), "{}", self.name);
        model
    }
}

/// The decoder of a golden's configuration, which says how KV is packed, too.
fn spec_of(config: &Value) -> Spec {
    let kv_bits = config.get("kv_bits").and_then(Value::as_i64).map(|bits| bits as i32);
    spec(config).unwrap().with_kv_bits(kv_bits).unwrap()
}

/// Blocks of a test's KV.
const BLOCKS: u32 = 32;

/// A decoder in one or more parts and their KV, a step at a time.
pub(super) struct Model {
    parts: Vec<(Box<dyn Family>, KvPool)>,
    path: Path,
}

/// Blocks, tokens before, and tokens of one sequence in a step.
type Part<'a> = (&'a [u32], usize, &'a [TokenId]);

impl Model {
    pub(super) fn new(config: &Value, tensors: &mut Tensors, path: Path, dequantize: bool) -> Self {
        let whole = 0..spec_of(config).layers.len();
        Self { parts: vec![Self::part(config, tensors, path, dequantize, &whole)], path }
    }

    /// Those layers alone.
    fn part(
        config: &Value,
        tensors: &mut Tensors,
        path: Path,
        dequantize: bool,
        layers: &Range<usize>,
    ) -> (Box<dyn Family>, KvPool) {
        let dense = if path == Path::Native { 4 } else { 0 };
        let products = Products { dense: dense.min(crate::native::product_rows()), four_bits: 0 };
        let compute =
            Compute { path, activations: Dtype::Float32, dequantize, products, dense_rows: i32::MAX };
        let spec = spec_of(config);
        let part = super::Part::of(&spec, layers).unwrap();
        let family = Decoder::load(tensors, spec, compute, part).unwrap();
        let mut kv = KvPool::new(family.dims().kv, BLOCKS as usize, path).unwrap();
        if path == Path::Pure {
            kv.grow(BLOCKS as usize).unwrap();
        }
        (Box::new(family), kv)
    }

    /// One step; the logits of each token of each part.
    fn step(&mut self, parts: &[Part<'_>]) -> Vec<Vec<Vec<f32>>> {
        let blocks: Vec<Vec<BlockId>> =
            parts.iter().map(|part| part.0.iter().copied().map(BlockId).collect()).collect();
        let slices: Vec<_> = parts
            .iter()
            .zip(&blocks)
            .enumerate()
            .map(|(index, (&(_, start, tokens), blocks))| Slice {
                sequence: SequenceId(index as u64),
                blocks,
                start,
                input: Input::Tokens(tokens),
                sample: None,
                drafts: 0,
                score: None,
            })
            .collect();
        let ordered = Ordered::new(&slices);
        let order: Vec<usize> = ordered.slices.iter().map(|slice| slice.sequence.0 as usize).collect();
        let tokens: Vec<i32> =
            order.iter().flat_map(|&index| parts[index].2).map(|&token| token as i32).collect();
        let mut logits = Array::from_slice(&tokens, &[tokens.len() as i32]);
        for (family, kv) in &mut self.parts {
            let attention = ordered.attention(self.path, family.dims().scale);
            let input = StepInput {
                entering: logits,
                positions: &ordered.positions(self.path),
                attention: &attention,
                wanted: Wanted::All,
            };
            logits = family.forward(&input, kv).unwrap().unwrap();
            eval(kv.arrays().chain([&logits])).unwrap();
        }
        let width = logits.dim(1) as usize;
        let mut rows = logits.as_slice::<f32>().chunks(width).map(<[f32]>::to_vec);
        let mut result = vec![Vec::new(); parts.len()];
        for index in order {
            result[index] = rows.by_ref().take(parts[index].2.len()).collect();
        }
        result
    }

    /// The logits of a text read in slices of those lengths.
    pub(super) fn read(&mut self, blocks: &[u32], tokens: &[TokenId], lengths: &[usize]) -> Vec<Vec<f32>> {
        let mut logits = Vec::new();
        for &length in lengths {
            let start = logits.len();
            logits.extend(self.step(&[(blocks, start, &tokens[start..start + length])]).remove(0));
        }
        assert_eq!(logits.len(), tokens.len());
        logits
    }
}

/// How far logits may be from mlx-lm's.
const NEAR: f32 = 1e-4;
/// And where weights are quantized, since both multiply in another order.
const NEAR_QUANTIZED: f32 = 1e-3;
/// What a few codes of packed KV that differ by one may change, times the number of codes that there are.
const CODE_STEP: f32 = 1.5;

pub(super) fn assert_close(got: &[f32], wanted: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    let off = got.iter().zip(wanted).map(|(got, wanted)| (got - wanted).abs() / wanted.abs().max(1.0));
    let most = off.fold(0.0, |most: f32, off| if off > most || off.is_nan() { off } else { most });
    assert!(most <= tolerance, "{what}: off by {most}");
}

fn check(case: &Case, goldens: &Goldens, path: Path, dequantize: bool) {
    let Goldens { tokens, positions, .. } = goldens;
    let tolerance = if case.packed.is_empty() && !case.packs_kv() { NEAR } else { NEAR_QUANTIZED };
    // Sums in another order round some code of packed KV to its neighbour.
    let otherwise = match case.config.get("kv_bits").and_then(Value::as_i64) {
        Some(bits) => CODE_STEP / f32::powi(2.0, bits as i32),
        None => tolerance,
    };
    let named = |what: &str| format!("{}, {path:?}, dequantized: {dequantize}, {what}", case.name);
    let mut model = case.model(path, dequantize);
    let compare = |logits: &[Vec<f32>], from: usize, what: &str| {
        let tolerance = if what == "whole" { tolerance } else { otherwise };
        for (&at, wanted) in positions.iter().zip(&case.logits) {
            if let Some(got) = at.checked_sub(from).and_then(|at| logits.get(at)) {
                assert_close(got, wanted, tolerance, &named(&format!("{what} at {at}")));
            }
        }
    };
    let first = [9, 2, 12];
    compare(&model.read(&first, tokens, &[80]), 0, "whole");
    // Behind the first two blocks of what was just read.
    let found = model.step(&[(&[9, 2, 4], 64, &tokens[64..])]).remove(0);
    compare(&found, 64, "behind a cached prefix");
    // In other blocks, over borders of blocks and windows; what is there of others is not seen.
    let sliced = model.read(&[4, 9, 1], tokens, &[7, 1, 30, 1, 1, 40]);
    compare(&sliced, 0, "in slices");
    // Three texts of unequal lengths in one batch: read together, beside a row, then token by token.
    let tables: [&[u32]; 3] = [&[3, 5, 7], &[8, 6, 10], &[11, 0, 13]];
    let mut done = [0, 0, 0];
    let mut all: [Vec<Vec<f32>>; 3] = Default::default();
    let ends = [80, 41, 32];
    let wanted = |done: usize, row: usize| match (row, done) {
        (0, 0) => 31,
        (0, 31..=33) => 1,
        (0, 34) => 40,
        (1, 0) => 36,
        (2, 0) => 3,
        _ => 1,
    };
    while done.iter().zip(ends).any(|(&done, end)| done < end) {
        let rows: Vec<usize> = (0..3).filter(|&row| done[row] < ends[row]).collect();
        let parts: Vec<Part<'_>> = rows
            .iter()
            .map(|&row| {
                let end = ends[row].min(done[row] + wanted(done[row], row));
                (tables[row], done[row], &tokens[done[row]..end])
            })
            .collect();
        for (&row, logits) in rows.iter().zip(model.step(&parts)) {
            done[row] += logits.len();
            all[row].extend(logits);
        }
    }
    for (row, logits) in all.iter().enumerate() {
        compare(logits, 0, &format!("row {row} of a batch"));
    }
}

/// Runs every case whose weights are, or are not, quantized.
fn check_all(quantized: bool, path: Path, dequantize: bool) {
    let goldens = goldens();
    // Packed KV is of the pure path.
    let wanted =
        |case: &&Case| case.packed.is_empty() != quantized && (path == Path::Pure || !case.packs_kv());
    let cases: Vec<_> = goldens.cases.iter().filter(wanted).collect();
    assert!(cases.len() >= 13, "{} cases", cases.len());
    for case in cases {
        check(case, &goldens, path, dequantize);
    }
}

#[test]
fn families_compute_what_mlx_lm_computes() {
    check_all(false, Path::Pure, false);
}

#[cfg(native_cpu)]
#[test]
fn families_compute_what_mlx_lm_computes_by_our_operations() {
    check_all(false, Path::Native, false);
}

#[test]
fn quantized_families_compute_what_mlx_lm_computes() {
    check_all(true, Path::Pure, false);
}

#[cfg(native_cpu)]
#[test]
fn dequantized_families_compute_what_mlx_lm_computes() {
    check_all(true, Path::Native, true);
}

/// Each part by itself, with weights that hold all layers and gives up only its own, computes together what the whole does.
fn check_parts(path: Path) {
    let goldens = goldens();
    // Our CPU operations have no packed KV.
    let takes = |case: &&Case| case.packed.is_empty() && (path != Path::Native || !case.packs_kv());
    for case in goldens.cases.iter().filter(takes) {
        let layers = spec(&case.config).unwrap().layers.len();
        let expected = case.model(path, false).read(&[1, 2, 3], &goldens.tokens, &[33, 1, 46]);
        let every: Vec<_> = (0..layers).map(|layer| layer..layer + 1).collect();
        for ranges in [every, vec![0..1, 1..layers]] {
            let mut left: BTreeMap<String, usize> = BTreeMap::new();
            let part = |range: &Range<usize>| {
                let mut tensors = case.tensors();
                let part = Model::part(&case.config, &mut tensors, path, false, range);
                tensors.leftovers().for_each(|name| *left.entry(name.to_owned()).or_default() += 1);
                part
            };
            let mut parts = Model { parts: ranges.iter().map(part).collect(), path };
            // Each tensor was left by all parts but one, or, of what two of them need, but two.
            let shared = |name: &str| name.contains("embed_tokens") || name.contains("rope_freqs");
            for (name, count) in left {
                assert!(count < ranges.len(), "{}: nobody took {name}", case.name);
                assert!(count + 1 == ranges.len() || shared(&name), "{}: {name} left by {count}", case.name);
            }
            let got = parts.read(&[1, 2, 3], &goldens.tokens, &[33, 1, 46]);
            for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
                assert_close(got, expected, 1e-6, &format!("{} in {ranges:?} at {at}", case.name));
            }
        }
    }
}

#[test]
fn parts_compute_what_the_whole_computes() {
    check_parts(Path::Pure);
}

#[cfg(native_cpu)]
#[test]
fn parts_compute_what_the_whole_computes_by_our_operations() {
    check_parts(Path::Native);
}

#[test]
fn a_part_that_is_not_there_is_told() {
    let spec = spec(&goldens().cases[0].config).unwrap();
    let layers = spec.layers.len();
    for range in [0..0, 1..layers + 1] {
        let error = super::Part::of(&spec, &range).unwrap_err().to_string();
        assert!(error.contains(&format!("{range:?}")), "{error}");
    }
}

/// Experts of gpt-oss as OpenAI publishes them: bytes of two codes, rows of gate and up in turn.
#[test]
fn gpt_oss_loads_as_it_is_published() {
    let goldens = goldens();
    let case = goldens.cases.iter().find(|case| case.name == "gpt_oss in mxfp4").unwrap();
    let mut arrays: BTreeMap<String, Array> =
        case.tensors.iter().map(|(name, description)| (name.clone(), weight(name, description))).collect();
    let packing = Packing { group_size: 32, bits: 4, mode: Mode::Mxfp4 };
    for layer in 0..2 {
        let prefix = format!("model.layers.{layer}.mlp.experts.");
        let mut take = |part: &str| {
            let dense = arrays.remove(&format!("{prefix}{part}.weight")).unwrap();
            let bias = arrays.remove(&format!("{prefix}{part}.bias")).unwrap();
            (Packed::of(&dense, packing).unwrap(), bias)
        };
        let (gate, up, down) = (take("gate_proj"), take("up_proj"), take("down_proj"));
        let bytes = |words: &Array| {
            let bytes = words.view_dtype(Dtype::Uint8).unwrap();
            let (experts, rows, width) = (bytes.dim(0), bytes.dim(1), bytes.dim(2));
            bytes.reshape(&[experts, rows, width / 16, 16]).unwrap()
        };
        let in_turn = |one: &Array, two: &Array| {
            let both = mlx_rs::ops::stack(&[one, two], 2).unwrap();
            let mut shape = one.shape().to_vec();
            shape[1] *= 2;
            both.reshape(&shape).unwrap()
        };
        for (name, array) in [
            ("gate_up_proj_blocks", in_turn(&bytes(&gate.0.words), &bytes(&up.0.words))),
            ("gate_up_proj_scales", in_turn(&gate.0.scales, &up.0.scales)),
            ("gate_up_proj_bias", in_turn(&gate.1, &up.1)),
            ("down_proj_blocks", bytes(&down.0.words)),
            ("down_proj_scales", down.0.scales),
            ("down_proj_bias", down.1),
        ] {
            arrays.insert(format!("{prefix}{name}"), array);
        }
    }
    let mut config = case.config.clone();
    config.as_object_mut().unwrap().remove("quantization");
    config["quantization_config"] = serde_json::json!({ "quant_method": "mxfp4" });
    let published = Case { name: "published".to_owned(), config, ..case.clone_without_weights() };
    let tensors = Tensors::of_arrays(arrays.clone(), &published.config).unwrap();
    let mut model = published.model_of(tensors, Path::Pure, false);
    // The same with experts as MLX's tools write them, and everything else dense.
    let packed = case.packed.iter().filter(|(name, _)| name.contains("experts"));
    let mut config = published.config.clone();
    config.as_object_mut().unwrap().remove("quantization_config");
    config["quantization"] = serde_json::json!({ "group_size": 32, "bits": 4, "mode": "mxfp4" });
    let rewritten = Case {
        packed: packed.map(|(name, packed)| (name.clone(), packed.copy())).collect(),
        tensors: case.tensors.clone(),
        config,
        ..case.clone_without_weights()
    };
    let ours = model.read(&[1, 2, 3], &goldens.tokens, &[80]);
    let theirs = rewritten.model(Path::Pure, false).read(&[1, 2, 3], &goldens.tokens, &[80]);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_close(ours, theirs, 1e-6, "as published");
    }
}

impl Case {
    fn clone_without_weights(&self) -> Self {
        Self {
            name: self.name.clone(),
            config: self.config.clone(),
            tensors: BTreeMap::new(),
            packed: BTreeMap::new(),
            logits: Vec::new(),
        }
    }
}

impl PackedAs {
    fn copy(&self) -> Self {
        Self { group_size: self.group_size, bits: self.bits, mode: self.mode.clone() }
    }
}

/// Every family has a case, and an unknown one is told what there is.
#[test]
fn unknown_families_are_told_the_known_ones() {
    let goldens = goldens();
    for name in super::SUPPORTED {
        assert!(goldens.cases.iter().any(|case| case.config["model_type"] == name), "no case of {name}");
    }
    let error = spec(&serde_json::json!({ "model_type": "bloom" })).unwrap_err().to_string();
    assert!(error.contains("bloom"), "{error}");
    assert!(super::SUPPORTED.iter().all(|name| error.contains(name)), "{error}");
}
