//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with the matrices of keys and values moved to the queries
//! and outputs: what a token leaves in the cache is one latent vector and one rotated key for all heads.
//!
//! To attention that is one key-value head of `[rotated, latent]`, whose value is the same vector; of what it gives, the
//! rotated part is left out.

use super::spec::{LatentSpec, Spec};
use crate::{
    attention::Qkv,
    checkpoint::{LoadError, Tensors, Weight},
    layers::{Between, Compute, Linear, Norms, RmsNorm, joined_bias},
    raw,
};
use mlx_rs::{Array, error::Result, ops::concatenate};

/// Of the norms inside, whatever the configuration says of others.
const EPS: f32 = 1e-6;

/// The weights of one layer's attention.
#[derive(Debug)]
pub(super) struct Latent {
    queries: Queries,
    /// To the latent vector, then the rotated key.
    down: Linear,
    norm: RmsNorm,
    /// `[heads, unrotated, rank]`.
    absorbed: Array,
    /// `[heads, rank, value]`.
    unfold: Array,
    output: Linear,
    sizes: LatentSpec,
    heads: i32,
}

#[derive(Debug)]
enum Queries {
    Direct(Linear),
    /// Down, norm, up.
    Compressed(Linear, RmsNorm, Linear),
}

impl Latent {
    pub(super) fn load(
        tensors: &mut Tensors,
        prefix: &str,
        sizes: LatentSpec,
        spec: &Spec,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let LatentSpec { rank, rotated, unrotated, value, .. } = sizes;
        let heads = spec.heads.queries;
        let name = |part: &str| format!("{prefix}{part}");
        let norms = Norms { eps: EPS, one_more: false };
        // Rows of each head, the rotated ones first, and of those one half after the other.
        let each = unrotated + rotated;
        let turned = |from: i32| halves(from, rotated);
        let of_head = |head: i32| turned(head * each + unrotated).chain(head * each..head * each + unrotated);
        let query_rows: Vec<i32> = (0..heads).flat_map(of_head).collect();
        let queries = if sizes.query_rank.is_some() {
            let down = Linear::load(tensors, &[name("q_a_proj")], compute)?;
            let norm = RmsNorm::load(tensors, &name("q_a_layernorm"), norms, compute)?;
            Queries::Compressed(down, norm, reordered(tensors, &name("q_b_proj"), &query_rows, compute)?)
        } else {
            Queries::Direct(reordered(tensors, &name("q_proj"), &query_rows, compute)?)
        };
        let rows: Vec<i32> = (0..rank).chain(turned(rank)).collect();
        let down = reordered(tensors, &name("kv_a_proj_with_mqa"), &rows, compute)?;
        let norm = RmsNorm::load(tensors, &name("kv_a_layernorm"), norms, compute)?;
        let (absorbed, unfold) = if tensors.contains(&name("kv_b_proj.weight")) {
            let both = tensors.weight_shaped(&name("kv_b_proj"), [heads * (unrotated + value), rank])?;
            let both = both.dense(compute.activations)?.reshape(&[heads, unrotated + value, rank])?;
            let part = |from: i32, to: i32| raw::slice(&both, &[0, from, 0], &[heads, to, rank]);
            (part(0, unrotated)?, part(unrotated, unrotated + value)?.swap_axes(1, 2)?)
        } else {
            // As MLX's tools write it: both apart, the first one transposed.
            let mut dense = |part: &str| -> std::result::Result<Array, LoadError> {
                Ok(tensors.weight(&name(part))?.dense(compute.activations)?)
            };
            (dense("embed_q")?.swap_axes(1, 2)?, dense("unembed_out")?.swap_axes(1, 2)?)
        };
        let (absorbed, unfold) = (absorbed.contiguous()?, unfold.contiguous()?);
        let output = Linear::load(tensors, &[name("o_proj")], compute)?;
        Ok(Self { queries, down, norm, absorbed, unfold, output, sizes, heads })
    }

    pub(super) fn qkv(&self, x: &Array, norm: &RmsNorm) -> Result<Qkv> {
        let LatentSpec { rank, rotated, unrotated, .. } = self.sizes;
        let (count, heads) = (x.dim(0), self.heads);
        let x = norm.forward(x)?;
        let queries = match &self.queries {
            Queries::Direct(up) => up.forward(&x, Between::default())?,
            Queries::Compressed(down, norm, up) => {
                let normed = Between { norm: Some(norm), ..Between::default() };
                up.forward(&down.forward(&x, Between::default())?, normed)?
            }
        };
        let queries = queries.reshape(&[count, heads, rotated + unrotated])?;
        let part = |from: i32, to: i32| raw::slice(&queries, &[0, 0, from], &[count, heads, to]);
        let absorbed = part(rotated, rotated + unrotated)?.swap_axes(0, 1)?.matmul(&self.absorbed)?;
        let queries = concatenate(&[part(0, rotated)?, absorbed.swap_axes(0, 1)?], 2)?;

        let down = self.down.forward(&x, Between::default())?;
        let latent = self.norm.forward(&raw::slice(&down, &[0, 0], &[count, rank])?.contiguous()?)?;
        let key = raw::slice(&down, &[0, rank], &[count, rank + rotated])?;
        let key = concatenate(&[key, latent], 1)?.reshape(&[count, 1, rotated + rank])?;
        let product = concatenate(&[&queries, &key, &key], 1)?;
        Ok(Qkv { product, heads, kv_heads: 1 })
    }

    pub(super) fn output(&self, attended: &Array, between: Between<'_>) -> Result<Array> {
        let LatentSpec { rank, rotated, value, .. } = self.sizes;
        let (count, heads) = (attended.dim(0), self.heads);
        let attended = attended.reshape(&[count, heads, rotated + rank])?;
        let latent = raw::slice(&attended, &[0, 0, rotated], &[count, heads, rotated + rank])?;
        let values = latent.swap_axes(0, 1)?.matmul(&self.unfold)?;
        self.output.forward(&values.swap_axes(0, 1)?.reshape(&[count, heads * value])?, between)
    }

    pub(super) fn arrays(&self) -> Vec<&Array> {
        let (linears, norm) = match &self.queries {
            Queries::Direct(up) => (vec![up], None),
            Queries::Compressed(down, norm, up) => (vec![down, up], Some(norm.array())),
        };
        let linears = linears.into_iter().chain([&self.down, &self.output]).flat_map(Linear::arrays);
        linears.chain(norm).chain([self.norm.array(), &self.absorbed, &self.unfold]).collect()
    }
}

/// Of `count` rows from `from` on, which come in pairs: the first of each, then the second.
fn halves(from: i32, count: i32) -> impl Iterator<Item = i32> {
    (0..2).flat_map(move |half| (0..count / 2).map(move |pair| from + 2 * pair + half))
}

/// A layer with its rows in another order.
fn reordered(
    tensors: &mut Tensors,
    name: &str,
    rows: &[i32],
    compute: Compute,
) -> std::result::Result<Linear, LoadError> {
    let weight: Weight = tensors.weight(name)?;
    let found = weight.shape().first().copied().unwrap_or(0);
    if found != rows.len() as i32 {
        let reason = format!("has {found} rows; config.json asks for {}", rows.len());
        return Err(LoadError::Tensor { name: name.to_owned(), origin: "the model".to_owned(), reason });
    }
    let rows = Array::from_slice(rows, &[rows.len() as i32]);
    let bias = joined_bias(tensors, &[name.to_owned()], compute)?;
    let bias = bias.map(|bias| bias.take_axis(&rows, 0)).transpose()?;
    Linear::of(weight.rows(&rows)?, bias, compute)
}
