//! The KV of all blocks: for each layer one array of keys and one of values, written in place.
//!
//! Who uses which block is the engine's business; a step names blocks by table. In-place writes are invisible to MLX's
//! graph: the operations that write a pool take it as an input. On the CPU device a stream runs in order; on a GPU each
//! such operation also takes the `fence` that the one before it returned, which keeps their order. The pure path has no
//! such operations: there a write makes a new array, in place where nothing else holds the old one.
//!
//! Packed KV is codes with scales and biases of their own, packed when they are written and unpacked when they are copied
//! together; only the pure path has it.

use crate::{
    checkpoint::{Mode, Packed, Packing},
    layers::Path,
    native, raw,
};
use engine::ModelError;
use mlx_rs::{
    Array, Dtype,
    error::{Exception, Result},
    ops::{concatenate, zeros_dtype},
};
use types::BLOCK_TOKENS;

/// Tokens of a block, as shapes need it.
pub(crate) const BLOCK: i32 = BLOCK_TOKENS as i32;
/// Blocks that the pure path's pools begin with; they double when more are named.
const PURE_BLOCKS_MIN: usize = 64;

/// Shapes that all KV of a model shares.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvShape {
    pub(crate) layers: usize,
    pub(crate) heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) dtype: Dtype,
    /// How elements are packed; none where they are kept as they are computed.
    pub(crate) packing: Option<Packing>,
}

/// Bits of a packed key or value.
pub(crate) const KV_BITS: [i32; 2] = [4, 8];
/// Elements of a head that share a scale: the first of these that divides it.
const KV_GROUPS: [i32; 2] = [64, 32];

/// How keys and values of heads of `head_dim` are packed into `bits`.
///
/// # Errors
/// What is wrong with either, in words.
pub(crate) fn packing(bits: i32, head_dim: i32) -> std::result::Result<Packing, String> {
    if !KV_BITS.contains(&bits) {
        return Err(format!("kv_bits is {bits}; 4 and 8 are possible"));
    }
    match KV_GROUPS.into_iter().find(|group| head_dim % group == 0) {
        Some(group_size) => Ok(Packing { group_size, bits, mode: Mode::Affine }),
        None => Err(format!("kv_bits is {bits}, but heads of {head_dim} are no multiple of 32")),
    }
}

impl KvShape {
    /// Bytes of one token's keys and values in all layers.
    pub(crate) fn bytes_per_token(&self) -> u64 {
        let elements = 2 * self.layers as u64 * self.heads as u64 * self.head_dim as u64;
        let whole = if self.dtype == Dtype::Float32 { 4 } else { 2 };
        match self.packing {
            None => elements * whole,
            // A scale and a bias for each group.
            Some(Packing { group_size, bits, .. }) => {
                elements * u64::from(bits.unsigned_abs()) / 8
                    + elements / u64::from(group_size.unsigned_abs()) * 2 * whole
            }
        }
    }
}

/// Keys and values of one layer: `[blocks, heads, BLOCK, head_dim]`; on the native path keys are
/// `[blocks, heads, head_dim, BLOCK]`.
#[derive(Debug, Clone)]
pub(crate) struct LayerKv {
    /// Elements, or the words of their codes.
    pub(crate) keys: Array,
    /// The same.
    pub(crate) values: Array,
    /// Of packed keys, then of packed values: scales and biases.
    scales: Option<[[Array; 2]; 2]>,
}

impl LayerKv {
    fn of(keys: Array, values: Array) -> Self {
        Self { keys, values, scales: None }
    }

    fn arrays(&self) -> impl Iterator<Item = &Array> {
        [&self.keys, &self.values].into_iter().chain(self.scales.iter().flatten().flatten())
    }

    fn arrays_mut(&mut self) -> impl Iterator<Item = &mut Array> {
        [&mut self.keys, &mut self.values].into_iter().chain(self.scales.iter_mut().flatten().flatten())
    }
}

/// All blocks of a model. A clone names the same memory.
#[derive(Debug, Clone)]
pub(crate) struct KvPool {
    shape: KvShape,
    path: Path,
    /// Blocks that there are memory for.
    blocks: usize,
    /// Blocks that there may be.
    blocks_max: usize,
    pub(crate) layers: Vec<LayerKv>,
    /// What the last in-place operation returned.
    pub(crate) fence: Array,
    /// Results that nothing else asks for, to be evaluated with the step.
    pub(crate) pending: Vec<Array>,
}

impl KvPool {
    pub(crate) fn new(shape: KvShape, blocks: usize, path: Path) -> Result<Self> {
        let first = if path == Path::Pure { blocks.min(PURE_BLOCKS_MIN) } else { blocks };
        let mut pool = Self {
            shape,
            path,
            blocks: 0,
            blocks_max: blocks,
            layers: Vec::new(),
            fence: Array::from_slice(&[0_i32; 8], &[8]),
            pending: Vec::new(),
        };
        let layers = (0..shape.layers).map(|_| pool.layer(first));
        pool.layers = layers.collect::<Result<_>>()?;
        pool.blocks = first;
        mlx_rs::transforms::eval(pool.arrays().chain([&pool.fence]))?;
        if path == Path::Kernel {
            // Kernels compute addresses from the whole buffer's begin; an array of one block counts as small where MLX
            // adds up the bytes that a command buffer touches.
            for layer in &mut pool.layers {
                for array in layer.arrays_mut() {
                    let mut last = array.shape().to_vec();
                    last[0] = 1;
                    *array = raw::slice(array, &[0; 4], &last)?;
                }
            }
            mlx_rs::transforms::eval(pool.arrays())?;
        }
        Ok(pool)
    }

    /// The same memory behind another fence.
    pub(crate) fn behind(&self, fence: &Array) -> Self {
        Self { fence: fence.clone(), ..self.clone() }
    }

    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.layers.iter().flat_map(LayerKv::arrays)
    }

    /// Makes sure that the first `count` blocks have memory: only the pure path's pools grow.
    pub(crate) fn grow(&mut self, count: usize) -> Result<()> {
        if count <= self.blocks {
            return Ok(());
        }
        let wanted = count.next_power_of_two().min(self.blocks_max).max(count);
        let more = wanted - self.blocks;
        for index in 0..self.layers.len() {
            let added = self.layer(more)?;
            for (array, added) in self.layers[index].arrays_mut().zip(added.arrays()) {
                *array = concatenate(&[&*array, added], 0)?;
            }
        }
        self.blocks = wanted;
        mlx_rs::transforms::eval(self.arrays())
    }

    /// Writes `keys` and `values` `[tokens, heads, head_dim]`, each token at its block and offset, by MLX's own operations.
    pub(crate) fn write(
        &mut self,
        layer: usize,
        at: [&Array; 2],
        keys: &Array,
        values: &Array,
    ) -> Result<()> {
        let LayerKv { keys: of_keys, values: of_values, scales } = &mut self.layers[layer];
        let (Some(packing), Some([of_key_codes, of_value_codes])) = (self.shape.packing, scales) else {
            put(of_keys, keys, at)?;
            return put(of_values, values, at);
        };
        for (words, [scales, biases], new) in
            [(of_keys, of_key_codes, keys), (of_values, of_value_codes, values)]
        {
            let new = Packed::of(new, packing)?;
            put(words, &new.words, at)?;
            put(scales, &new.scales, at)?;
            new.biases.map_or(Ok(()), |new| put(biases, &new, at))?;
        }
        Ok(())
    }

    /// Keys and values `[rows, heads, tokens, head_dim]` of `rows` rows with the same number of blocks, copied together.
    pub(crate) fn gather(&self, layer: usize, blocks: &Array, rows: i32) -> Result<(Array, Array)> {
        let each = blocks.dim(0) / rows;
        let together = |pool: &Array| {
            let (heads, width) = (pool.dim(1), pool.dim(3));
            let taken = pool.take_axis(blocks, 0)?.reshape(&[rows, each, heads, BLOCK, width])?;
            taken.swap_axes(1, 2)?.reshape(&[rows, heads, each * BLOCK, width])
        };
        let LayerKv { keys, values, scales } = &self.layers[layer];
        let (Some(packing), Some([of_keys, of_values])) = (self.shape.packing, scales) else {
            return Ok((together(keys)?, together(values)?));
        };
        let unpacked = |words: &Array, [scales, biases]: &[Array; 2]| {
            let biases = Some(together(biases)?);
            Packed { words: together(words)?, scales: together(scales)?, biases, packing }
                .dense(self.shape.dtype)
        };
        Ok((unpacked(keys, of_keys)?, unpacked(values, of_values)?))
    }

    fn layer(&self, blocks: usize) -> Result<LayerKv> {
        let KvShape { heads, head_dim, dtype, packing, .. } = self.shape;
        let natural = [blocks as i32, heads, BLOCK, head_dim];
        Ok(match (self.path, packing) {
            (Path::Native, None) => {
                let keys = native::reserve(&[blocks as i32, heads, head_dim, BLOCK])?;
                LayerKv::of(keys, native::reserve(&natural)?)
            }
            (Path::Kernel, None) => {
                let reserve = || crate::kernels::reserve(&natural, dtype);
                LayerKv::of(reserve()?, reserve()?)
            }
            (Path::Pure, None) => LayerKv::of(zeros_dtype(&natural, dtype)?, zeros_dtype(&natural, dtype)?),
            (Path::Pure, Some(Packing { group_size, bits, .. })) => {
                let zeros = |width: i32, dtype| zeros_dtype(&[natural[0], heads, BLOCK, width], dtype);
                let words = || zeros(head_dim * bits / 32, Dtype::Uint32);
                let scales = || zeros(head_dim / group_size, dtype);
                let both = || -> Result<[Array; 2]> { Ok([scales()?, scales()?]) };
                LayerKv { keys: words()?, values: words()?, scales: Some([both()?, both()?]) }
            }
            (path, Some(packing)) => {
                return Err(Exception::custom(format!("KV in {packing} on the {path:?} path")));
            }
        })
    }
}

/// Writes `new [tokens, heads, width]` into a pool.
fn put(pool: &mut Array, new: &Array, [blocks, offsets]: [&Array; 2]) -> Result<()> {
    let updates = new.reshape(&[new.dim(0), 1, new.dim(1), 1, new.dim(2)])?;
    // Out of its place, so that nothing else holds its buffer when the write is evaluated.
    let old = std::mem::replace(pool, Array::from_int(0));
    *pool = raw::scatter(&old, &[blocks, offsets], &updates, &[0, 2])?;
    Ok(())
}

/// A backend error as the engine sees it.
pub(crate) fn backend(error: Exception) -> ModelError {
    ModelError::Backend(error.what().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_kv_takes_what_its_bits_say() {
        let check = |bits: Option<i32>, head_dim: i32, bytes: u64| {
            let packing = bits.map(|bits| packing(bits, head_dim).unwrap());
            let shape = KvShape { layers: 1, heads: 1, head_dim, dtype: Dtype::Float16, packing };
            assert_eq!(shape.bytes_per_token(), bytes, "{bits:?} bits of {head_dim}");
        };
        check(None, 128, 2 * 256);
        check(Some(8), 128, 2 * (128 + 2 * 4));
        check(Some(4), 128, 2 * (64 + 2 * 4));
        check(Some(4), 96, 2 * (48 + 3 * 4));
        assert!(packing(6, 128).unwrap_err().contains("kv_bits is 6"));
        assert!(packing(8, 80).unwrap_err().contains("heads of 80"));
    }
}
