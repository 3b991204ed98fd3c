//! Whether our own operations work on the device at hand: the same few steps as by MLX's operations, compared.
//!
//! Runs at every start. The steps are built one upon another before any is evaluated, as they are when one is always in
//! flight, so that a write which is not kept in order shows.

use crate::{
    attention::Qkv,
    kv::{KvPool, KvShape},
    layers::Path,
    rope::{Rope, wavelengths},
    sampler::{self, Draws},
    step::Ordered,
};
use engine::{BlockId, Input, RowSampling, SequenceId, Slice};
use mlx_rs::{
    Array, Dtype,
    error::Result,
    ops::{abs, all_close, max},
    transforms::{async_eval, eval},
};
use types::{SamplingDraft, SamplingParams, TokenId};

/// Heads of the test: four query heads share a key.
const HEADS: i32 = 8;
const KV_HEADS: i32 = 2;
const HEAD_DIM: i32 = 64;
/// Blocks of the test's pools.
const BLOCKS: usize = 16;
/// Layers of the test, each on its own pools.
const LAYERS: usize = 2;
/// Vocabulary of the test.
const VOCABULARY: i32 = 3000;

/// Whether `path` computes what the pure path does, and what went wrong in the log if not.
pub(crate) fn works(path: Path, dtype: Dtype) -> bool {
    match differences(path, dtype) {
        Ok(differences) if differences.is_empty() => true,
        Ok(differences) => {
            tracing::warn!(?path, ?differences, "an operation of ours is wrong here: MLX's are used");
            false
        }
        Err(error) => {
            tracing::warn!(?path, %error, "our operations do not run here: MLX's are used");
            false
        }
    }
}

/// What `path` computes differently.
pub(crate) fn differences(path: Path, dtype: Dtype) -> Result<Vec<String>> {
    let (ours, theirs) = (attended(path, dtype)?, attended(Path::Pure, dtype)?);
    // Of numbers around 1: half precision carries 8 or 11 bits, and sums are taken in another order.
    let tolerance = if dtype == Dtype::Float32 { 1e-4 } else { 3e-2 };
    let mut found = Vec::new();
    for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        let (ours, theirs) = (ours.as_dtype(Dtype::Float32)?, theirs.as_dtype(Dtype::Float32)?);
        if !all_close(&ours, &theirs, tolerance, tolerance, false)? {
            let most = max(abs(ours.subtract(&theirs)?)?, false)?;
            most.eval()?;
            let most = most.as_slice::<f32>()[0];
            found.push(format!("attention {index} is off by {most}"));
        }
    }
    let (ours, theirs) = (drawn(path)?, drawn(Path::Pure)?);
    if ours != theirs {
        found.push(format!("tokens {ours:?} instead of {theirs:?}"));
    }
    Ok(found)
}

/// Outputs of some steps: a run, a run behind it with other rows beside it, then rows that go on.
fn attended(path: Path, dtype: Dtype) -> Result<Vec<Array>> {
    let shape = KvShape { layers: LAYERS, heads: KV_HEADS, head_dim: HEAD_DIM, dtype };
    let mut kv = KvPool::new(shape, BLOCKS, path)?;
    if path == Path::Pure {
        kv.grow(BLOCKS)?;
    }
    let scale = (HEAD_DIM as f32).powf(-0.5);
    let lengths = wavelengths(HEAD_DIM as usize, 10_000.0, None)
        .map_err(|error| mlx_rs::error::Exception::custom(error.to_string()))?;
    let rope = Rope::new(path, &lengths, scale);
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
            })
            .collect();
        let ordered = Ordered::new(&slices);
        let attention = ordered.attention(path, scale);
        let positions = ordered.positions(path);
        let rope = rope.at(&positions)?;
        let count: usize = step.iter().map(|slice| slice.2).sum();
        for layer in 0..LAYERS {
            let shape = [count as i32, HEADS + 2 * KV_HEADS, HEAD_DIM];
            let seed = mlx_rs::random::key((at * LAYERS + layer) as u64)?;
            let product = mlx_rs::random::normal::<f32>(&shape, None, None, &seed)?.as_dtype(dtype)?;
            let qkv = Qkv::of(&product, HEADS, KV_HEADS)?;
            outputs.extend(attention.forward(layer, &rope, qkv, &mut kv, true)?);
        }
        if path == Path::Pure {
            eval(kv.arrays())?;
        }
        async_eval(outputs.iter().chain([&kv.fence]))?;
    }
    eval(&outputs)?;
    Ok(outputs)
}

/// Tokens drawn in many ways from the same logits.
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
        .map(|(params, output)| RowSampling {
            params,
            position: 3,
            prompt: &[1, 2],
            output: &output[..known],
        })
        .collect();
    if path == Path::Pure {
        return sampler::sample(&logits, &sampling);
    }
    let indexes: Vec<Option<usize>> = (0..kinds.len()).map(Some).collect();
    let draws = Draws::new(&sampling, &indexes, kinds.len(), VOCABULARY as u32);
    let late: Vec<i32> = late.into_iter().map(|token| token as i32).collect();
    let tokens = sampler::draw_on_device(
        &logits.add(Array::from_f32(0.0))?,
        &draws,
        &Array::from_slice(&late, &[rows]),
        path,
    )?;
    tokens.eval()?;
    Ok(tokens.as_slice::<i32>().iter().map(|&token| token as TokenId).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(native_cpu)]
    #[test]
    fn native_operations_attend_and_draw_like_mlx() {
        assert_eq!(differences(Path::Native, Dtype::Float32).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn gpu_kernels_attend_and_draw_like_mlx() {
        let gpu = mlx_rs::Device::try_default().and_then(|device| device.get_type());
        if !matches!(gpu, Ok(mlx_rs::DeviceType::Gpu)) {
            println!("skipped: MLX finds no GPU here");
            return;
        }
        for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
            assert_eq!(differences(Path::Kernel, dtype).unwrap(), Vec::<String>::new(), "{dtype:?}");
        }
    }
}
