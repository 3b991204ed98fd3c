//! The parts that model families are made of: linear layers, embeddings, norms.

use crate::{
    checkpoint::{LoadError, Packed, Tensors, Weight},
    kernels, native,
    products::{self, Around, Products, Weights},
};
use mlx_rs::{
    Array, Dtype,
    error::Result,
    fast,
    ops::{addmm, concatenate, maximum, minimum, sigmoid, tanh},
};

/// A matrix `[out, in]` as the forward pass uses it.
#[derive(Debug)]
enum Matrix {
    /// Also transposed, as a view, so that `x @ weight` is one call.
    Dense {
        weight: Array,
        transposed: Array,
    },
    Packed(Packed),
}

/// A linear layer and how it is computed.
#[derive(Debug)]
pub(crate) struct Linear {
    /// One, or several side by side where they are not packed alike.
    parts: Vec<Matrix>,
    /// What is added to the product.
    bias: Option<Array>,
    compute: Compute,
}

/// What a linear layer stands between.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Between<'a> {
    /// Its input is normalized by this.
    pub(crate) norm: Option<&'a RmsNorm>,
    /// This is added to its output.
    pub(crate) added: Option<&'a Array>,
    /// Its output is gate and up side by side, of which the gated part is wanted.
    pub(crate) gated: Option<Gate>,
}

/// How a gate opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    /// `silu(gate) · up`.
    Silu,
    /// `gelu(gate) · up`, by its approximation with tanh.
    Gelu,
    /// gpt-oss: `gate · sigmoid(1.702 · gate) · (up + 1)`, both held below 7.
    Clamped,
}

impl Linear {
    /// `x [rows, in] → [rows, out]`, with what comes before and after.
    pub(crate) fn forward(&self, x: &Array, between: Between<'_>) -> Result<Array> {
        let Between { norm, added, gated } = between;
        if matches!(gated, None | Some(Gate::Silu))
            && let Some(weights) = self.weights()
            && x.dim(0) <= self.compute.products.rows(weights)
            && products::fits(x.dim(0), weights, x.dtype())
        {
            let norm = norm.map(|norm| (&norm.weight, norm.eps));
            return products::product(x, weights, Around { norm, added, gated: gated.is_some() });
        }
        let normed = norm.map(|norm| norm.forward(x)).transpose()?;
        if let (Path::Kernel, Some(added), None, [Matrix::Dense { transposed, .. }], None) =
            (self.compute.path, added, gated, &self.parts[..], &self.bias)
        {
            return addmm(added, normed.as_ref().unwrap_or(x), transposed, None, None);
        }
        let product = self.product(normed.as_ref().unwrap_or(x))?;
        let product = match gated {
            Some(gate) => gate.of(&product, self.compute.path)?,
            None => product,
        };
        match added {
            Some(added) => added.add(product),
            None => Ok(product),
        }
    }

    fn product(&self, x: &Array) -> Result<Array> {
        let product = match &self.parts[..] {
            [one] => one.product(x, self.compute)?,
            several => {
                let products = several.iter().map(|part| part.product(x, self.compute));
                concatenate(&products.collect::<Result<Vec<_>>>()?, -1)?
            }
        };
        match &self.bias {
            Some(bias) => product.add(bias),
            None => Ok(product),
        }
    }

    /// As our own products take it, if they do.
    fn weights(&self) -> Option<Weights<'_>> {
        match (&self.parts[..], &self.bias) {
            ([one], None) => one.weights(),
            _ => None,
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
        let bias = joined_bias(tensors, prefixes, compute)?;
        Self::fuse(weights, bias, compute)
    }

    /// The layer of one weight: of a tied embedding, or with its rows in another order.
    pub(crate) fn of(
        weight: Weight,
        bias: Option<Array>,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        Self::fuse(vec![weight], bias, compute)
    }

    fn fuse(
        weights: Vec<Weight>,
        bias: Option<Array>,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let weights = weights.into_iter().map(|weight| compute.apply(weight)).collect::<Result<Vec<_>>>()?;
        let packed = weights.iter().all(|weight| matches!(weight, Weight::Packed(_)));
        let parts =
            if packed && alike(&weights).is_none() { weights } else { vec![compute.joined(weights, 0)?] };
        let matrix = |weight| match weight {
            Weight::Packed(packed) => Matrix::Packed(packed),
            Weight::Dense(weight) => Matrix::Dense { transposed: weight.t(), weight },
        };
        Ok(Self { parts: parts.into_iter().map(matrix).collect(), bias, compute })
    }

    /// Every array, to be evaluated at load; a view brings what it is of.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        self.parts.iter().flat_map(Matrix::arrays).chain(&self.bias).collect()
    }
}

impl Matrix {
    fn arrays(&self) -> Vec<&Array> {
        match self {
            Self::Dense { transposed, .. } => vec![transposed],
            Self::Packed(packed) => packed.arrays().collect(),
        }
    }

    fn product(&self, x: &Array, compute: Compute) -> Result<Array> {
        let Compute { path, products, dense_rows, .. } = compute;
        match self {
            Self::Dense { weight, .. }
                if path == Path::Native && x.dim(0) <= products.dense && native::product_fits(weight) =>
            {
                native::product(x, weight)
            }
            Self::Dense { transposed, .. } => x.matmul(transposed),
            Self::Packed(packed) if x.dim(0) < dense_rows => packed.product(x),
            Self::Packed(packed) => {
                let ours = self
                    .weights()
                    .filter(|&weights| products.four_bits > 0 && products::fits(1, weights, x.dtype()));
                let whole = match ours {
                    Some(Weights::FourBits { words, scales, biases, .. }) => {
                        products::dequantize(words, scales, biases)?
                    }
                    _ => packed.dense(x.dtype())?,
                };
                x.matmul(whole.t())
            }
        }
    }

    fn weights(&self) -> Option<Weights<'_>> {
        match self {
            Self::Dense { weight, .. } => Some(Weights::Dense(weight)),
            Self::Packed(packed) => Weights::of_packed(packed),
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

    /// A weight as it is computed with.
    pub(crate) fn apply(self, weight: Weight) -> Result<Weight> {
        match weight {
            Weight::Dense(array) => Ok(Weight::Dense(self.cast(array)?)),
            Weight::Packed(packed) if self.dequantize => Ok(Weight::Dense(packed.dense(self.activations)?)),
            // Products are computed in the type of the scales.
            Weight::Packed(packed) => Ok(Weight::Packed(packed.cast(self.activations)?)),
        }
    }

    /// Weights side by side along `axis`, as they are computed with.
    pub(crate) fn joined(self, weights: Vec<Weight>, axis: i32) -> Result<Weight> {
        let weights: Vec<_> = weights.into_iter().map(|weight| self.apply(weight)).collect::<Result<_>>()?;
        if let [only] = &weights[..] {
            return Ok(only.clone());
        }
        if let Some(packed) = alike(&weights) {
            return Packed::joined(&packed, axis).map(Weight::Packed);
        }
        // Layers quantized differently side by side cannot be one product; they are dense ones then.
        let dense =
            weights.iter().map(|weight| weight.dense(self.activations)).collect::<Result<Vec<_>>>()?;
        concatenate(&dense, axis).map(Weight::Dense)
    }

    /// A number that does not change the type of what it is multiplied with.
    pub(crate) fn number(self, value: f32) -> Result<Array> {
        self.cast(Array::from_f32(value))
    }
}

/// The weights, if all are packed alike.
fn alike(weights: &[Weight]) -> Option<Vec<Packed>> {
    let packed = weights.iter().map(|weight| match weight {
        Weight::Packed(packed) => Some(packed.clone()),
        Weight::Dense(_) => None,
    });
    let packed = packed.collect::<Option<Vec<_>>>()?;
    packed.windows(2).all(|two| two[0].packing == two[1].packing).then_some(packed)
}

/// The biases of some layers side by side; none where none has any.
pub(crate) fn joined_bias(
    tensors: &mut Tensors,
    prefixes: &[String],
    compute: Compute,
) -> std::result::Result<Option<Array>, LoadError> {
    let names: Vec<_> = prefixes.iter().map(|prefix| format!("{prefix}.bias")).collect();
    if !names.iter().any(|name| tensors.contains(name)) {
        return Ok(None);
    }
    let parts = names.iter().map(|name| tensors.take(name)).collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(Some(compute.cast(concatenate(&parts, 0)?)?))
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
            Weight::Packed(packed) => packed.rows(tokens)?.dense(dtype),
        }
    }

    pub(crate) fn arrays(&self) -> Vec<&Array> {
        match &self.table {
            Weight::Dense(table) => vec![table],
            Weight::Packed(packed) => packed.arrays().collect(),
        }
    }

    /// The same matrix as an output layer.
    pub(crate) fn tied_head(&self, compute: Compute) -> std::result::Result<Linear, LoadError> {
        Linear::of(self.table.clone(), None, compute)
    }
}

/// What all norms of a model share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norms {
    pub(crate) eps: f32,
    /// Scales are stored as what they are above 1 (Gemma).
    pub(crate) one_more: bool,
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
        norms: Norms,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let Norms { eps, one_more } = norms;
        let mut weight = tensors.take(&format!("{prefix}.weight"))?;
        if one_more {
            // In f32, so that the only rounding is the one of the sum.
            weight = weight.as_dtype(Dtype::Float32)?.add(Array::from_f32(1.0))?;
        }
        Ok(Self { weight: compute.cast(weight)?, eps, path: compute.path })
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

impl Gate {
    /// The gated part of a fused product `[rows, 2·n]` that holds gate and up side by side.
    pub(crate) fn of(self, gate_up: &Array, path: Path) -> Result<Array> {
        match (self, path) {
            (Self::Silu, Path::Native) => native::swiglu(gate_up),
            (Self::Silu, Path::Kernel) => kernels::swiglu(gate_up),
            (Self::Silu, Path::Pure) => swiglu_of_parts(gate_up),
            (Self::Gelu, _) => {
                let parts = gate_up.split_equal(2, -1)?;
                gelu(&parts[0])?.multiply(&parts[1])
            }
            (Self::Clamped, _) => {
                let parts = gate_up.split_equal(2, -1)?;
                let number = |value: f32| Array::from_f32(value).as_dtype(gate_up.dtype());
                let limit = number(7.0)?;
                let gate = minimum(&parts[0], &limit)?;
                let up = maximum(minimum(&parts[1], &limit)?, number(-7.0)?)?;
                let opened = gate.multiply(sigmoid(gate.multiply(number(1.702)?)?)?)?;
                opened.multiply(up.add(number(1.0)?)?)
            }
        }
    }
}

/// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))`.
pub(crate) fn gelu(x: &Array) -> Result<Array> {
    let number = |value: f32| Array::from_f32(value).as_dtype(x.dtype());
    let cubed = x.multiply(x)?.multiply(x)?.multiply(number(0.044_715)?)?;
    let inner = x.add(cubed)?.multiply(number((2.0 / std::f32::consts::PI).sqrt())?)?;
    x.multiply(number(0.5)?)?.multiply(tanh(inner)?.add(number(1.0)?)?)
}

/// `silu(gate) · up` in MLX's operations.
pub(crate) fn swiglu_of_parts(gate_up: &Array) -> Result<Array> {
    let parts = gate_up.split_equal(2, -1)?;
    let gate = &parts[0];
    gate.multiply(sigmoid(gate)?)?.multiply(&parts[1])
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
