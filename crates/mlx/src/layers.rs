//! The parts that model families are made of: linear layers, embeddings, norms.

use crate::{
    checkpoint::{LoadError, Tensors, Weight},
    kernels, native,
    products::{self, Around, Products, Weights},
};
use mlx_rs::{
    Array, Dtype,
    error::Result,
    fast,
    ops::{addmm, concatenate, dequantize, quantized_matmul},
};

/// A matrix `[out, in]` as the forward pass uses it, and what is added to its product.
#[derive(Debug)]
enum Matrix {
    /// Also transposed, as a view, so that `x @ weight` is one call.
    Dense { weight: Array, transposed: Array, bias: Option<Array> },
    /// MLX's affine quantization.
    Quantized { words: Array, scales: Array, biases: Array, group_size: i32, bits: i32, bias: Option<Array> },
}

/// A linear layer and how it is computed.
#[derive(Debug)]
pub(crate) struct Linear {
    matrix: Matrix,
    compute: Compute,
}

/// What a linear layer stands between.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Between<'a> {
    /// Its input is normalized by this.
    pub(crate) norm: Option<&'a RmsNorm>,
    /// This is added to its output.
    pub(crate) added: Option<&'a Array>,
    /// Its output is gate and up side by side, of which `silu(gate) · up` is wanted.
    pub(crate) gated: bool,
}

impl Linear {
    /// `x [rows, in] → [rows, out]`, with what comes before and after.
    pub(crate) fn forward(&self, x: &Array, between: Between<'_>) -> Result<Array> {
        let Between { norm, added, gated } = between;
        if let Some(weights) = self.matrix.weights()
            && x.dim(0) <= self.compute.products.rows(weights)
            && products::fits(x.dim(0), weights, x.dtype())
        {
            let norm = norm.map(|norm| (&norm.weight, norm.eps));
            return products::product(x, weights, Around { norm, added, gated });
        }
        let normed = norm.map(|norm| norm.forward(x)).transpose()?;
        if let (Path::Kernel, Some(added), false, Matrix::Dense { transposed, bias: None, .. }) =
            (self.compute.path, added, gated, &self.matrix)
        {
            return addmm(added, normed.as_ref().unwrap_or(x), transposed, None, None);
        }
        let product = self.product(normed.as_ref().unwrap_or(x))?;
        let product = if gated { swiglu(&product, self.compute.path)? } else { product };
        match added {
            Some(added) => added.add(product),
            None => Ok(product),
        }
    }

    fn product(&self, x: &Array) -> Result<Array> {
        let Compute { path, products, .. } = self.compute;
        let (product, bias) = match &self.matrix {
            Matrix::Dense { weight, bias, .. }
                if path == Path::Native && x.dim(0) <= products.dense && native::product_fits(weight) =>
            {
                (native::product(x, weight)?, bias)
            }
            Matrix::Dense { transposed, bias, .. } => (x.matmul(transposed)?, bias),
            Matrix::Quantized { words, scales, biases, group_size, bits, bias } => {
                let product = if x.dim(0) < self.compute.dense_rows {
                    quantized_matmul(x, words, scales, biases, true, *group_size, *bits)?
                } else {
                    let whole = match self.matrix.weights() {
                        Some(weights) if products.four_bits > 0 && products::fits(1, weights, x.dtype()) => {
                            products::dequantize(words, scales, biases)?
                        }
                        _ => dequantize(words, scales, biases, *group_size, *bits)?,
                    };
                    x.matmul(whole.t())?
                };
                (product, bias)
            }
        };
        match bias {
            Some(bias) => product.add(bias),
            None => Ok(product),
        }
    }

    /// The layer of one weight, or of several side by side (fused: one product instead of several).
    pub(crate) fn load(
        tensors: &mut Tensors,
        prefixes: &[String],
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let weights = prefixes.iter().map(|prefix| tensors.weight(prefix));
        let weights: Vec<_> = weights.collect::<std::result::Result<_, _>>()?;
        let biases = prefixes.iter().map(|prefix| tensors.take_optional(&format!("{prefix}.bias")));
        let biases: Vec<_> = biases.collect::<std::result::Result<_, _>>()?;
        let bias = match biases.into_iter().collect::<Option<Vec<_>>>() {
            Some(parts) => Some(compute.cast(concatenate(&parts, 0)?)?),
            None => None,
        };
        Self::fuse(weights, bias, compute)
    }

    /// The layer of one weight that others share (a tied embedding).
    pub(crate) fn of(weight: Weight, compute: Compute) -> std::result::Result<Self, LoadError> {
        Self::fuse(vec![weight], None, compute)
    }

    fn fuse(
        weights: Vec<Weight>,
        bias: Option<Array>,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let weights: Vec<_> =
            weights.into_iter().map(|weight| compute.apply(weight)).collect::<Result<_>>()?;
        let formats: Vec<_> = weights.iter().map(format_of).collect();
        let alike = formats.iter().all(|format| *format == formats[0]);
        if let (true, Some((group_size, bits))) = (alike, formats[0]) {
            let mut parts = [Vec::new(), Vec::new(), Vec::new()];
            for weight in weights {
                if let Weight::Quantized { words, scales, biases, .. } = weight {
                    parts[0].push(words);
                    parts[1].push(scales);
                    parts[2].push(biases);
                }
            }
            let [words, scales, biases] = parts.map(|arrays| concatenate(&arrays, 0));
            let (words, scales, biases) = (words?, scales?, biases?);
            let matrix = Matrix::Quantized { words, scales, biases, group_size, bits, bias };
            return Ok(Self { matrix, compute });
        }
        // Layers quantized differently side by side cannot be one product; they are dense ones then.
        let dense: Vec<_> =
            weights.iter().map(|weight| dense_of(weight, compute.activations)).collect::<Result<_>>()?;
        let joined = if dense.len() == 1 { dense[0].clone() } else { concatenate(&dense, 0)? };
        let matrix = Matrix::Dense { transposed: joined.t(), weight: joined, bias };
        Ok(Self { matrix, compute })
    }

    /// Every array, to be evaluated at load; a view brings what it is of.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        match &self.matrix {
            Matrix::Dense { transposed, bias, .. } => {
                [Some(transposed), bias.as_ref()].into_iter().flatten().collect()
            }
            Matrix::Quantized { words, scales, biases, bias, .. } => {
                [Some(words), Some(scales), Some(biases), bias.as_ref()].into_iter().flatten().collect()
            }
        }
    }
}

impl Matrix {
    /// As our own products take it, if they do.
    fn weights(&self) -> Option<Weights<'_>> {
        match self {
            Self::Dense { weight, bias: None, .. } => Some(Weights::Dense(weight)),
            Self::Quantized { words, scales, biases, group_size, bits: 4, bias: None } => {
                Some(Weights::FourBits { words, scales, biases, group_size: *group_size })
            }
            _ => None,
        }
    }
}

/// Which operations compute what MLX has none for: above all attention over blocks, and writing to them in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    /// Our GPU kernels ([`crate::kernels`]), where they work.
    Kernel,
    /// Our CPU operations ([`crate::native`]), where they work.
    Native,
    /// MLX's operations alone: correct everywhere.
    Pure,
}

/// With which numbers and operations a model computes, and whether its weights stay quantized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Compute {
    pub(crate) path: Path,
    /// Of activations, KV and dense weights.
    pub(crate) activations: Dtype,
    /// Whether quantized weights are turned into dense ones at load.
    pub(crate) dequantize: bool,
    /// Which products are ours: [`crate::products`] on a GPU, [`native::product`] on a CPU.
    pub(crate) products: Products,
    /// From how many rows on a quantized product of MLX's is slower than turning its weight into a dense one first.
    pub(crate) dense_rows: i32,
}

impl Compute {
    pub(crate) fn cast(self, array: Array) -> Result<Array> {
        if array.dtype() == self.activations { Ok(array) } else { array.as_dtype(self.activations) }
    }

    fn apply(self, weight: Weight) -> Result<Weight> {
        match weight {
            Weight::Dense(array) => Ok(Weight::Dense(self.cast(array)?)),
            quantized if self.dequantize => Ok(Weight::Dense(dense_of(&quantized, self.activations)?)),
            // Products are computed in the type of the scales.
            Weight::Quantized { words, scales, biases, group_size, bits } => Ok(Weight::Quantized {
                words,
                scales: self.cast(scales)?,
                biases: self.cast(biases)?,
                group_size,
                bits,
            }),
        }
    }
}

fn format_of(weight: &Weight) -> Option<(i32, i32)> {
    match weight {
        Weight::Dense(_) => None,
        Weight::Quantized { group_size, bits, .. } => Some((*group_size, *bits)),
    }
}

fn dense_of(weight: &Weight, dtype: Dtype) -> Result<Array> {
    match weight {
        Weight::Dense(array) => Ok(array.clone()),
        Weight::Quantized { words, scales, biases, group_size, bits } => {
            // In f32, so that the only rounding is the one to `dtype`.
            let (scales, biases) = (scales.as_dtype(Dtype::Float32)?, biases.as_dtype(Dtype::Float32)?);
            dequantize(words, scales, &biases, *group_size, *bits)?.as_dtype(dtype)
        }
    }
}

/// A table of one vector a token.
#[derive(Debug)]
pub(crate) struct Embedding {
    table: Weight,
    path: Path,
}

impl Embedding {
    pub(crate) fn load(weight: &Weight, compute: Compute) -> Result<Self> {
        Ok(Self { table: compute.apply(weight.clone())?, path: compute.path })
    }

    /// `tokens [n] → [n, hidden]`.
    pub(crate) fn forward(&self, tokens: &Array, dtype: Dtype) -> Result<Array> {
        match &self.table {
            Weight::Dense(table) if self.path == Path::Kernel => kernels::embed(table, tokens),
            Weight::Dense(table) => table.take_axis(tokens, 0),
            Weight::Quantized { words, scales, biases, group_size, bits } => {
                let biases = biases.take_axis(tokens, 0)?;
                let rows = dequantize(
                    words.take_axis(tokens, 0)?,
                    scales.take_axis(tokens, 0)?,
                    &biases,
                    *group_size,
                    *bits,
                )?;
                rows.as_dtype(dtype)
            }
        }
    }

    pub(crate) fn arrays(&self) -> Vec<&Array> {
        match &self.table {
            Weight::Dense(table) => vec![table],
            Weight::Quantized { words, scales, biases, .. } => vec![words, scales, biases],
        }
    }

    /// The same matrix as an output layer.
    pub(crate) fn tied_head(&self, compute: Compute) -> std::result::Result<Linear, LoadError> {
        Linear::of(self.table.clone(), compute)
    }
}

/// Root-mean-square normalization with a learned scale.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    weight: Array,
    eps: f32,
    path: Path,
}

impl RmsNorm {
    pub(crate) fn load(
        tensors: &mut Tensors,
        prefix: &str,
        eps: f32,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let weight = compute.cast(tensors.take(&format!("{prefix}.weight"))?)?;
        Ok(Self { weight, eps, path: compute.path })
    }

    pub(crate) fn forward(&self, x: &Array) -> Result<Array> {
        match self.path {
            Path::Native => native::rms_norm(x, &self.weight, self.eps),
            Path::Kernel | Path::Pure => fast::rms_norm(x, Some(&self.weight), self.eps),
        }
    }

    pub(crate) fn array(&self) -> &Array {
        &self.weight
    }
}

/// `silu(gate) · up` of a fused product `[.., 2·n]` that holds gate and up side by side.
pub(crate) fn swiglu(gate_up: &Array, path: Path) -> Result<Array> {
    match path {
        Path::Native => native::swiglu(gate_up),
        Path::Kernel => kernels::swiglu(gate_up),
        Path::Pure => swiglu_of_parts(gate_up),
    }
}

/// The same in MLX's operations.
pub(crate) fn swiglu_of_parts(gate_up: &Array) -> Result<Array> {
    let parts = gate_up.split_equal(2, -1)?;
    let gate = &parts[0];
    gate.multiply(mlx_rs::ops::sigmoid(gate)?)?.multiply(&parts[1])
}

/// Which rows of a step are wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wanted<'a> {
    /// Every one.
    All,
    /// These.
    Rows(&'a [i32]),
    /// Those that an array `[wanted]` of i32 on a GPU names.
    At(&'a Array),
}

impl Wanted<'_> {
    pub(crate) fn is_empty(self) -> bool {
        matches!(self, Self::Rows([]))
    }

    /// The wanted rows of `x [n, ..]`; `x` itself where that is all of them in order.
    pub(crate) fn of(self, x: &Array) -> Result<Array> {
        match self {
            Self::Rows(at) if !at.iter().copied().eq(0..x.dim(0)) => {
                x.take_axis(Array::from_slice(at, &[at.len() as i32]), 0)
            }
            Self::At(at) => kernels::embed(x, at),
            _ => Ok(x.clone()),
        }
    }
}
