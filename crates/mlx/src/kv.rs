//! The KV of all blocks: for each layer one array of keys and one of values, written in place.
//!
//! Who uses which block is the engine's business; a step names blocks by table. In-place writes are invisible to MLX's
//! graph: the operations that write a pool take it as an input. On the CPU device a stream runs in order; on a GPU each
//! such operation also takes the `fence` that the one before it returned, which keeps their order. The pure path has no
//! such operations: there a write makes a new array, in place where nothing else holds the old one.

use crate::{layers::Path, native};
use engine::ModelError;
use mlx_rs::{
    Array, Dtype,
    error::Result,
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
}

impl KvShape {
    /// Bytes of one token's keys and values in all layers.
    pub(crate) fn bytes_per_token(&self) -> u64 {
        let elements = 2 * self.layers as u64 * self.heads as u64 * self.head_dim as u64;
        elements * if self.dtype == Dtype::Float32 { 4 } else { 2 }
    }
}

/// Keys and values of one layer: `[blocks, heads, BLOCK, head_dim]`; on the native path keys are
/// `[blocks, heads, head_dim, BLOCK]`.
#[derive(Debug, Clone)]
pub(crate) struct LayerKv {
    pub(crate) keys: Array,
    pub(crate) values: Array,
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
                for array in [&mut layer.keys, &mut layer.values] {
                    let mut last = array.shape().to_vec();
                    last[0] = 1;
                    *array = crate::raw::slice(array, &[0; 4], &last)?;
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
        self.layers.iter().flat_map(|layer| [&layer.keys, &layer.values])
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
            let layer = &mut self.layers[index];
            layer.keys = concatenate(&[&layer.keys, &added.keys], 0)?;
            layer.values = concatenate(&[&layer.values, &added.values], 0)?;
        }
        self.blocks = wanted;
        mlx_rs::transforms::eval(self.arrays())
    }

    fn layer(&self, blocks: usize) -> Result<LayerKv> {
        let KvShape { heads, head_dim, dtype, .. } = self.shape;
        let natural = [blocks as i32, heads, BLOCK, head_dim];
        Ok(match self.path {
            Path::Native => {
                let keys = native::reserve(&[blocks as i32, heads, head_dim, BLOCK])?;
                LayerKv { keys, values: native::reserve(&natural)? }
            }
            Path::Kernel => {
                let reserve = || crate::kernels::reserve(&natural, dtype);
                LayerKv { keys: reserve()?, values: reserve()? }
            }
            Path::Pure => {
                LayerKv { keys: zeros_dtype(&natural, dtype)?, values: zeros_dtype(&natural, dtype)? }
            }
        })
    }
}

/// A backend error as the engine sees it.
pub(crate) fn backend(error: mlx_rs::error::Exception) -> ModelError {
    ModelError::Backend(error.what().to_owned())
}
