//! Products with few rows, each one kernel with what comes before and after it (`gpu/product.h`), and 4-bit weights as
//! dense ones (`gpu/dequantize.h`).
//!
//! For CUDA, where MLX asks cuBLAS for a plan at every product, which takes the host longer than the device computes, and
//! where its quantized products are slow from a second row on. On Metal neither is so: there MLX's own are used.

use crate::{
    checkpoint::{Mode, Packed},
    kernels::{self, Constant, Launch, Source},
};
use mlx_rs::{Array, Dtype, error::Result};

const PRODUCT: Source = Source {
    name: c"product",
    inputs: &[c"x", c"weight", c"scales", c"biases", c"norm", c"settings", c"added", c"experts"],
    outputs: &[c"out"],
    body: include_str!("../gpu/product.h"),
    contiguous: true,
};
const DEQUANTIZE: Source = Source {
    name: c"dequantize",
    inputs: &[c"weight", c"scales", c"biases"],
    outputs: &[c"out"],
    body: include_str!("../gpu/dequantize.h"),
    contiguous: true,
};

/// Rows of a tile of the matrix units.
const TILE_ROWS: i32 = 8;
/// More rows than this need more registers than there are.
const ROWS_MAX: i32 = 64;
/// Warps of a group at most.
const WARPS_MAX: i32 = 16;
/// Threads of a group that dequantizes; `gpu/dequantize.h` has the same.
const DEQUANTIZE_THREADS: i32 = 256;

/// A weight `[out, in]`, or several in a stack.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Weights<'a> {
    Dense(&'a Array),
    /// Words `[out, in / 8]`, scales and biases `[out, in / group_size]`.
    FourBits {
        words: &'a Array,
        scales: &'a Array,
        biases: &'a Array,
        group_size: i32,
    },
}

impl<'a> Weights<'a> {
    /// A packed weight, if it is in 4 bits of the kind that is taken.
    pub(crate) fn of_packed(packed: &'a Packed) -> Option<Self> {
        let Packed { words, scales, biases, packing } = packed;
        let four_bits = packing.mode == Mode::Affine && packing.bits == 4;
        let biases = biases.as_ref().filter(|_| four_bits)?;
        Some(Self::FourBits { words, scales, biases, group_size: packing.group_size })
    }
}

/// Up to how many rows products are ours, by the kind of weight; 0 where none is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Products {
    pub(crate) dense: i32,
    pub(crate) four_bits: i32,
}

impl Products {
    pub(crate) fn rows(self, weights: Weights<'_>) -> i32 {
        match weights {
            Weights::Dense(_) => self.dense,
            Weights::FourBits { .. } => self.four_bits,
        }
    }
}

/// What is computed together with a product.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Around<'a> {
    /// Weight and epsilon of the norm that the input goes through.
    pub(crate) norm: Option<(&'a Array, f32)>,
    /// What is added to the product.
    pub(crate) added: Option<&'a Array>,
    /// The product is gate and up side by side, of which `silu(gate) · up` is wanted.
    pub(crate) gated: bool,
}

/// Whether [`product`] takes this weight with `rows` rows of `dtype`.
pub(crate) fn fits(rows: i32, weights: Weights<'_>, dtype: Dtype) -> bool {
    let half = matches!(dtype, Dtype::Bfloat16 | Dtype::Float16);
    let (out, width) = shape(weights);
    let grouped = match weights {
        Weights::Dense(weight) => weight.dtype() == dtype,
        Weights::FourBits { scales, group_size, .. } => {
            scales.dtype() == dtype && matches!(group_size, 32 | 64 | 128)
        }
    };
    cfg!(target_os = "linux") && half && grouped && rows <= ROWS_MAX && out % 16 == 0 && width % 64 == 0
}

/// `x [rows, in] → [rows, out]`, or half as wide where it is gated.
pub(crate) fn product(x: &Array, weights: Weights<'_>, around: Around<'_>) -> Result<Array> {
    let tiles = (x.dim(0) + TILE_ROWS - 1) / TILE_ROWS;
    let tiles = tiles.max(1).unsigned_abs().next_power_of_two().cast_signed();
    launch(x, weights, around, x.dim(0), tiles, None)
}

/// The same of stacked weights `[count, out, in]`: `x [rows, in] → [experts, out]`, where each row of `x` goes through the
/// weights of as many of `experts`, one row after another. Rows of one expert beside each other read its weight once.
pub(crate) fn gathered(x: &Array, experts: &Array, weights: Weights<'_>, gated: bool) -> Result<Array> {
    let experts = experts.reshape(&[-1])?;
    let around = Around { gated, ..Around::default() };
    launch(x, weights, around, experts.dim(0), 1, Some(&experts))
}

fn launch(
    x: &Array,
    weights: Weights<'_>,
    around: Around<'_>,
    rows: i32,
    tiles: i32,
    experts: Option<&Array>,
) -> Result<Array> {
    let dtype = x.dtype();
    let (out, width) = shape(weights);
    // Long sums are shared by more warps, as far as there are registers and memory for their partial sums.
    let warps_max = if tiles <= 2 { WARPS_MAX } else { WARPS_MAX / 2 };
    let warps = if width >= 4096 { warps_max } else { WARPS_MAX / 2 };
    let (weight, scales, biases) = match weights {
        Weights::Dense(weight) => (weight, x, x),
        Weights::FourBits { words, scales, biases, .. } => (words, scales, biases),
    };
    let out = if around.gated { out / 2 } else { out };
    let groups = out / if around.gated { 8 } else { 16 };
    let threads = warps * kernels::WARP;
    let launch = Launch {
        grid: [groups * threads, if experts.is_some() { rows } else { 1 }, 1],
        group: [threads, 1, 1],
        constants: &[
            (c"T", Constant::Type(dtype)),
            (c"GATHERED", Constant::Int(i32::from(experts.is_some()))),
            (c"DENSE", Constant::Int(i32::from(matches!(weights, Weights::Dense(_))))),
            (c"TILES", Constant::Int(tiles)),
            (c"WARPS_MAX", Constant::Int(warps_max)),
            (c"WORDS", Constant::Int(if width % 128 == 0 { 4 } else { 2 })),
        ],
        outputs: &[(&[rows, out], dtype)],
    };
    let (norm, eps) = around.norm.unwrap_or((x, 0.0));
    let flags = [(around.norm.is_some(), 1), (around.added.is_some(), 2), (around.gated, 4)];
    let mut settings = [0; 8];
    settings[0] = flags.iter().map(|(set, flag)| if *set { *flag } else { 0 }).sum();
    settings[1] = eps.to_bits().cast_signed();
    settings[2] = rows / x.dim(0).max(1);
    let settings = Array::from_slice(&settings, &[8]);
    let (added, experts) = (around.added.unwrap_or(x), experts.unwrap_or(&settings));
    let inputs = [x, weight, scales, biases, norm, &settings, added, experts];
    kernels::first(kernels::run(&PRODUCT, &inputs, &launch)?)
}

/// A 4-bit weight as a dense one `[out, in]`.
pub(crate) fn dequantize(words: &Array, scales: &Array, biases: &Array) -> Result<Array> {
    let (out, each) = (words.dim(0), words.dim(1));
    let groups = (i64::from(out) * i64::from(each)).div_euclid(i64::from(DEQUANTIZE_THREADS)) as i32 + 1;
    let launch = Launch {
        grid: [groups * DEQUANTIZE_THREADS, 1, 1],
        group: [DEQUANTIZE_THREADS, 1, 1],
        constants: &[(c"T", Constant::Type(scales.dtype()))],
        outputs: &[(&[out, each * 8], scales.dtype())],
    };
    kernels::first(kernels::run(&DEQUANTIZE, &[words, scales, biases], &launch)?)
}

/// Output and input width.
fn shape(weights: Weights<'_>) -> (i32, i32) {
    match weights {
        Weights::Dense(weight) => (weight.dim(-2), weight.dim(-1)),
        Weights::FourBits { words, .. } => (words.dim(-2), words.dim(-1) * 8),
    }
}
