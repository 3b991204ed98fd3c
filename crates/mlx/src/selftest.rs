//! Whether our own operations work on the device at hand: the same few steps as by MLX's operations, compared.
//!
//! Runs at every start. The steps are built one upon another before any is evaluated, as they are when one is always in
//! flight, so that a write which is not kept in order shows.

use crate::{
    attention::{Layer, Look, Qkv},
    kernels::{self, Tile},
    kv::{KvPool, KvShape},
    layers::{Path, swiglu_of_parts},
    logprobs,
    models::{Heads, Spec},
    products::{self, Around, Weights},
    rope::{Rope, Waves},
    sampler::{self, Draws},
    step::{Ordered, Places},
};
use engine::{BlockId, Input, RowSampling, SequenceId, Slice, grammar::TokenMask};
use mlx_rs::{
    Array, Dtype,
    error::Result,
    ops::{abs, all_close, max},
    transforms::{async_eval, eval},
};
use types::{SamplingDraft, SamplingParams, TokenId};

/// Blocks of the test's pools.
const BLOCKS: usize = 16;
/// Layers of the test, each on its own pools.
const LAYERS: usize = 2;
/// Tokens that windowed layers of the test see.
const WINDOW: i32 = 37;
/// Output width of the test's products.
const OUTPUTS: i32 = 64;
/// Vocabulary of the test.
const VOCABULARY: i32 = 3000;

/// Whether `path` computes what the pure path does for such attention, and what went wrong in the log if not.
pub(crate) fn works(path: Path, dtype: Dtype, spec: &Spec) -> bool {
    let plain = spec.plain_attention();
    let found = sample_look(spec, dtype).and_then(|look| {
        let mut found = differences(path, dtype, spec.heads, &Look::default(), plain)?;
        if !look.is_plain() {
            found.extend(differences(path, dtype, spec.heads, &look, plain)?);
        }
        Ok(found)
    });
    agree(&format!("{path:?}"), found)
}

/// A look of the kind that a model's layers have, narrow enough to hide something of the test's texts.
fn sample_look(spec: &Spec, dtype: Dtype) -> Result<Look> {
    let sinks = if spec.sinks {
        let key = mlx_rs::random::key(11)?;
        Some(mlx_rs::random::normal::<f32>(&[spec.heads.queries], None, None, &key)?.as_dtype(dtype)?)
    } else {
        None
    };
    let window = spec.layers.iter().any(|layer| layer.window.is_some()).then_some(WINDOW);
    Ok(Look { window, cap: spec.score_cap, sinks, numbers: None })
}

/// Whether our products of dense weights, or of those in 4 bits, compute what MLX's do.
pub(crate) fn products_work(dtype: Dtype, dense: bool) -> bool {
    agree("products", product_differences(dtype, dense))
}

fn agree(what: &str, differences: Result<Vec<String>>) -> bool {
    match differences {
        Ok(differences) if differences.is_empty() => true,
        Ok(differences) => {
            tracing::warn!(what, ?differences, "an operation of ours is wrong here: MLX's are used");
            false
        }
        Err(error) => {
            tracing::warn!(what, %error, "our operations do not run here: MLX's are used");
            false
        }
    }
}

/// What `path` computes differently for layers that look so, in a model whose layers are, or are not, all plain.
pub(crate) fn differences(
    path: Path,
    dtype: Dtype,
    heads: Heads,
    look: &Look,
    plain: bool,
) -> Result<Vec<String>> {
    let theirs = attended(Path::Pure, dtype, heads, look, Runs::Alone)?;
    let mut ways = vec![("attention", Runs::Alone)];
    if path == Path::Kernel {
        ways.push(("attention in rows", Runs::InRows));
        ways.extend(
            kernels::tile(heads, dtype, plain).map(|tile| ("attention in tiles", Runs::InTiles(tile))),
        );
    }
    let mut found = Vec::new();
    for (name, runs) in ways {
        let ours = attended(path, dtype, heads, look, runs)?;
        for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            found.extend(off(&format!("{name} {index}"), ours, theirs, tolerance(path, dtype))?);
        }
    }
    let (ours, theirs) = (drawn(path)?, drawn(Path::Pure)?);
    if ours != theirs {
        found.push(format!("tokens {ours:?} instead of {theirs:?}"));
    }
    Ok(found)
}

/// How far numbers around 1 may be apart: half precision carries 8 or 11 bits, and sums are taken in another order. On a
/// GPU products of f32 are computed with 10 bits.
fn tolerance(path: Path, dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Float32 if path == Path::Kernel => 5e-3,
        Dtype::Float32 => 1e-4,
        _ => 3e-2,
    }
}

fn off(what: &str, ours: &Array, theirs: &Array, tolerance: f64) -> Result<Option<String>> {
    let (ours, theirs) = (ours.as_dtype(Dtype::Float32)?, theirs.as_dtype(Dtype::Float32)?);
    if all_close(&ours, &theirs, tolerance, tolerance, false)? {
        return Ok(None);
    }
    let most = max(abs(ours.subtract(&theirs)?)?, false)?;
    most.eval()?;
    Ok(Some(format!("{what} is off by {}", most.as_slice::<f32>()[0])))
}

/// What our products compute differently from MLX's, for some numbers of rows and widths.
pub(crate) fn product_differences(dtype: Dtype, dense: bool) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut seed = 0;
    let mut normal = |shape: &[i32]| {
        seed += 1;
        mlx_rs::random::normal::<f32>(shape, None, None, &mlx_rs::random::key(seed)?)?.as_dtype(dtype)
    };
    for (rows, width, group_size) in [(1, 256, 64), (5, 4096, 32), (16, 256, 128)] {
        let (x, added) = (normal(&[rows, width])?, normal(&[rows, OUTPUTS])?);
        let shrunk = Array::from_f32((width as f32).powf(-0.5)).as_dtype(dtype)?;
        let (weight, norm) = (normal(&[OUTPUTS, width])?.multiply(shrunk)?, normal(&[width])?);
        let (words, scales, biases) = mlx_rs::ops::quantize(&weight, group_size, 4)?;
        let (weights, whole) = if dense {
            (Weights::Dense(&weight), weight.clone())
        } else {
            let whole = mlx_rs::ops::dequantize(&words, &scales, &biases, group_size, 4)?;
            let ours = products::dequantize(&words, &scales, &biases)?;
            found.extend(off("a dense weight", &ours, &whole, tolerance(Path::Kernel, dtype))?);
            (Weights::FourBits { words: &words, scales: &scales, biases: &biases, group_size }, whole)
        };
        if !products::fits(rows, weights, dtype) {
            return Err(mlx_rs::error::Exception::custom("this type is not for products of ours"));
        }
        let normed = mlx_rs::fast::rms_norm(&x, Some(&norm), 1e-5)?;
        let plain = Around { added: Some(&added), ..Around::default() };
        let gated = Around { norm: Some((&norm, 1e-5)), gated: true, ..Around::default() };
        let theirs = [x.matmul(whole.t())?.add(&added)?, swiglu_of_parts(&normed.matmul(whole.t())?)?];
        for (around, theirs) in [plain, gated].into_iter().zip(&theirs) {
            let ours = products::product(&x, weights, around)?;
            let what = format!("a product of {rows} rows, {width} wide, gated: {}", around.gated);
            found.extend(off(&what, &ours, theirs, tolerance(Path::Kernel, dtype))?);
        }
    }
    found.extend(gathered_differences(dtype, dense)?);
    Ok(found)
}

/// The same of products through experts: some have no row, some one, one more than the kernel looks at.
fn gathered_differences(dtype: Dtype, dense: bool) -> Result<Vec<String>> {
    const EXPERTS: i32 = 5;
    let mut taken = [4_u32; 72];
    taken[..4].copy_from_slice(&[3, 3, 0, 3]);
    let rows = taken.len() as i32;
    let experts = Array::from_slice(&taken, &[rows]);
    let mut found = Vec::new();
    for (each, width) in [(1, 256), (2, 4096)] {
        let normal = |shape: &[i32], seed| {
            mlx_rs::random::normal::<f32>(shape, None, None, &mlx_rs::random::key(seed)?)?.as_dtype(dtype)
        };
        let shrunk = Array::from_f32((width as f32).powf(-0.5)).as_dtype(dtype)?;
        let stack = normal(&[EXPERTS, OUTPUTS, width], 21)?.multiply(shrunk)?;
        let x = normal(&[rows / each, width], 22)?;
        let (words, scales, biases) = mlx_rs::ops::quantize(&stack, 64, 4)?;
        let (weights, whole) = if dense {
            (Weights::Dense(&stack), stack.clone())
        } else {
            let whole = mlx_rs::ops::dequantize(&words, &scales, &biases, 64, 4)?;
            (Weights::FourBits { words: &words, scales: &scales, biases: &biases, group_size: 64 }, whole)
        };
        let repeated: Vec<i32> = (0..rows).map(|row| row / each).collect();
        let of_row = x.take_axis(Array::from_slice(&repeated, &[rows]), 0)?.expand_dims(1)?;
        let theirs =
            of_row.matmul(whole.take_axis(&experts, 0)?.swap_axes(1, 2)?)?.reshape(&[rows, OUTPUTS])?;
        for gated in [false, true] {
            let theirs = if gated { swiglu_of_parts(&theirs)? } else { theirs.clone() };
            let ours = products::gathered(&x, &experts, weights, gated)?;
            let what = format!("a product of experts, {width} wide, gated: {gated}");
            found.extend(off(&what, &ours, &theirs, tolerance(Path::Kernel, dtype))?);
        }
    }
    Ok(found)
}

/// How runs attend.
#[derive(Debug, Clone, Copy)]
enum Runs {
    Alone,
    InTiles(Tile),
    /// Each token as a row, as guesses do.
    InRows,
}

/// Outputs of some steps: a run, a run behind it with other rows beside it, then rows that go on.
fn attended(path: Path, dtype: Dtype, heads: Heads, look: &Look, runs: Runs) -> Result<Vec<Array>> {
    let Heads { queries, keys, dim } = heads;
    let shape = KvShape { layers: LAYERS, heads: keys, head_dim: dim, dtype, packing: None };
    let mut kv = KvPool::new(shape, BLOCKS, path)?;
    if path == Path::Pure {
        kv.grow(BLOCKS)?;
    }
    let scale = (dim as f32).powf(-0.5);
    let waves = Waves::new(dim as usize, 10_000.0, None, 0)
        .map_err(|error| mlx_rs::error::Exception::custom(error.to_string()))?;
    let rope = Rope::new(path, &waves, dim, scale);
    let numbers = if look.is_plain() { None } else { Some(rope.numbers_with(look, queries)?) };
    let look = &Look { numbers, ..look.clone() };
    let one = [7, 2, 9, 11].map(BlockId);
    let two = [7, 4, 5, 6].map(BlockId);
    // (blocks, start, tokens): the second sequence shares the first block of the first.
    let steps: [&[(&[BlockId], usize, usize)]; 5] = [
        &[(&one, 0, 45)],
        &[(&one, 45, 1), (&two, 32, 20)],
        &[(&two, 52, 1), (&one, 46, 18)],
        &[(&one, 64, 1), (&two, 53, 1)],
        &[(&one, 65, 1), (&two, 54, 1)],
    ];
    let mut outputs = Vec::new();
    for (at, step) in steps.iter().enumerate() {
        let tokens: Vec<TokenId> = vec![1; 64];
        let slices: Vec<_> = step
            .iter()
            .enumerate()
            .map(|(index, &(blocks, start, count))| Slice {
                sequence: SequenceId(index as u64),
                blocks,
                start,
                input: Input::Tokens(&tokens[..count]),
                sample: None,
                drafts: 0,
                score: None,
            })
            .collect();
        let ordered = Ordered::new(&slices);
        let positions = ordered.positions(path);
        let rope = rope.at(&positions)?;
        let count: usize = step.iter().map(|slice| slice.2).sum();
        // In tiles there are tokens in between, which are only there to fill: copies of the first.
        let mut from: Vec<i32> = (0..count as i32).collect();
        let mut placed: Vec<usize> = (0..count).collect();
        let attention = match runs {
            Runs::InRows => {
                let places = Places { rows: count, tile: 1, count, blocks: one.len(), guesses: true };
                ordered.attention_in_rows(&places, scale)?
            }
            Runs::InTiles(tile) if !ordered.runs().is_empty() => {
                let each = tile.tokens as usize;
                let (rows, blocks) = (ordered.singles, one.len());
                let room = rows + ordered.tokens_in_tiles(each) + each;
                let places = Places { rows, tile: each, count: room, blocks, guesses: false };
                placed = ordered.placed(&places);
                from = vec![0; room];
                (0..).zip(&placed).for_each(|(token, &at)| from[at] = token);
                ordered.attention_in_tiles(&places, tile, scale)
            }
            _ => ordered.attention(path, scale),
        };
        let indexes = |of: &[i32]| Array::from_slice(of, &[of.len() as i32]);
        let placed: Vec<i32> = placed.into_iter().map(|at| at as i32).collect();
        for layer in 0..LAYERS {
            let shape = [count as i32, queries + 2 * keys, dim];
            let seed = mlx_rs::random::key((at * LAYERS + layer) as u64)?;
            let product = mlx_rs::random::normal::<f32>(&shape, None, None, &seed)?.as_dtype(dtype)?;
            let product = product.take_axis(indexes(&from), 0)?;
            let qkv = Qkv { product, heads: queries, kv_heads: keys };
            let attended =
                attention.forward(Layer { index: layer, rope: &rope, look }, qkv, &mut kv, true)?;
            outputs.extend(attended.map(|attended| attended.take_axis(indexes(&placed), 0)).transpose()?);
        }
        if path == Path::Pure {
            eval(kv.arrays())?;
        }
        async_eval(outputs.iter().chain([&kv.fence]))?;
    }
    eval(&outputs)?;
    Ok(outputs)
}

/// Tokens drawn in many ways from the same logits: from all, from some, and from one.
fn drawn(path: Path) -> Result<Vec<TokenId>> {
    let draft = |change: &dyn Fn(&mut SamplingDraft)| {
        let mut draft = SamplingDraft { seed: 5, ..SamplingDraft::default() };
        change(&mut draft);
        SamplingParams::try_from(draft).unwrap_or_else(|_| SamplingParams::greedy())
    };
    let kinds = [
        draft(&|draft| draft.temperature = 0.0),
        draft(&|_| ()),
        draft(&|draft| draft.top_k = 20),
        draft(&|draft| draft.top_p = 0.7),
        draft(&|draft| draft.min_p = 0.2),
        draft(&|draft| (draft.temperature, draft.repetition_penalty) = (0.0, 1.9)),
        draft(&|draft| (draft.temperature, draft.presence_penalty) = (0.0, 1.5)),
        draft(&|draft| (draft.temperature, draft.frequency_penalty) = (0.0, 0.8)),
        draft(&|draft| (draft.temperature, draft.logit_bias) = (0.0, vec![(17, 50.0)])),
    ];
    let rows = kinds.len() as i32;
    let key = mlx_rs::random::key(3)?;
    let logits = mlx_rs::random::normal::<f32>(&[rows, VOCABULARY], None, None, &key)?
        .multiply(Array::from_f32(3.0))?;
    // The row's most probable token was drawn just now, so that penalties of late tokens show.
    let late: Vec<TokenId> =
        mlx_rs::ops::indexing::argmax_axis(&logits, -1, false)?.as_slice::<u32>().to_vec();
    let outputs: Vec<[TokenId; 3]> = late.iter().map(|&token| [3, 3, token]).collect();
    let known = if path == Path::Pure { 3 } else { 2 };
    let sampling: Vec<_> = kinds
        .iter()
        .zip(&outputs)
        .map(|(params, output)| RowSampling::plain(params, 3, &[1, 2], &output[..known]))
        .collect();
    let masks: Vec<TokenMask> = (0..kinds.len() as u32)
        .map(|row| {
            let mut mask = TokenMask::none(VOCABULARY as u32);
            let each = if row == 1 { VOCABULARY as usize } else { 37 };
            (row..VOCABULARY as u32).step_by(each).for_each(|token| mask.allow(token));
            mask
        })
        .collect();
    let masks: Vec<_> = masks.iter().map(Some).collect();
    let allowed = logprobs::masked(&logits, &masks)?;
    if path == Path::Pure {
        return Ok([sampler::sample(&logits, &sampling)?, sampler::sample(&allowed, &sampling)?].concat());
    }
    let indexes: Vec<Option<usize>> = (0..kinds.len()).map(Some).collect();
    let draws = Draws::new(&sampling, &indexes, kinds.len(), VOCABULARY as u32);
    let late: Vec<i32> = late.into_iter().map(|token| token as i32).collect();
    let late = Array::from_slice(&late, &[rows]);
    let mut drawn = Vec::new();
    for logits in [logits.add(Array::from_f32(0.0))?, allowed] {
        let tokens = sampler::draw_on_device(&logits, &draws, &late, path)?;
        tokens.eval()?;
        drawn.extend(tokens.as_slice::<i32>().iter().map(|&token| token as TokenId));
    }
    Ok(drawn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(native_cpu)]
    #[test]
    fn native_operations_attend_and_draw_like_mlx() {
        let sinks = mlx_rs::random::normal::<f32>(&[8], None, None, None).unwrap();
        let looks = [
            Look::default(),
            Look { window: Some(WINDOW), ..Look::default() },
            Look { window: Some(1), ..Look::default() },
            Look { cap: Some(2.0), ..Look::default() },
            Look { cap: Some(2.0), window: Some(WINDOW), ..Look::default() },
            Look { sinks: Some(sinks.clone()), ..Look::default() },
            Look { sinks: Some(sinks), window: Some(WINDOW), ..Look::default() },
        ];
        for look in looks {
            for (queries, keys, dim) in [(8, 2, 64), (8, 8, 24), (8, 1, 80)] {
                let heads = Heads { queries, keys, dim };
                let found = differences(Path::Native, Dtype::Float32, heads, &look, look.is_plain()).unwrap();
                assert_eq!(found, Vec::<String>::new(), "{look:?} {heads:?}");
            }
        }
    }

    #[test]
    fn gpu_kernels_compute_like_mlx() {
        if !has_gpu() {
            return;
        }
        for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
            for (queries, keys, dim) in [(8, 2, 64), (9, 3, 64), (4, 4, 128), (8, 4, 256)] {
                let key = mlx_rs::random::key(1).unwrap();
                let sinks = mlx_rs::random::normal::<f32>(&[queries], None, None, &key).unwrap();
                let sinks = Some(sinks.as_dtype(dtype).unwrap());
                for look in [
                    Look::default(),
                    Look { window: Some(WINDOW), ..Look::default() },
                    Look { cap: Some(2.0), window: Some(WINDOW), ..Look::default() },
                    Look { sinks, window: Some(WINDOW), ..Look::default() },
                ] {
                    let heads = Heads { queries, keys, dim };
                    let found = differences(Path::Kernel, dtype, heads, &look, look.is_plain()).unwrap();
                    assert_eq!(found, Vec::<String>::new(), "{dtype:?} {heads:?} {look:?}");
                }
            }
        }
    }

    #[test]
    fn gpu_products_compute_like_mlx() {
        if cfg!(target_os = "macos") || !has_gpu() {
            return;
        }
        for (dtype, dense) in [
            (Dtype::Float16, false),
            (Dtype::Bfloat16, false),
            (Dtype::Float16, true),
            (Dtype::Bfloat16, true),
        ] {
            let found = product_differences(dtype, dense).unwrap();
            assert_eq!(found, Vec::<String>::new(), "{dtype:?}, dense: {dense}");
        }
    }

    fn has_gpu() -> bool {
        let gpu = mlx_rs::Device::try_default().and_then(|device| device.get_type());
        let has = matches!(gpu, Ok(mlx_rs::DeviceType::Gpu));
        if !has {
            println!("skipped: MLX finds no GPU here");
        }
        has
    }
}
