//! The decoder that a [`Spec`] describes: layers of attention and MLP between an embedding and an output layer.

use super::{
    Dims, Family, Part, StepInput,
    experts::Experts,
    hand_over,
    latent::Latent,
    names::Names,
    spec::{MlpSpec, Projection, Spec},
};
use crate::{
    attention::{self, Attention, Look, Qkv},
    checkpoint::{LoadError, Tensors},
    kv::{KvPool, KvShape},
    layers::{Between, Compute, Embedding, Gate, Linear, RmsNorm, Wanted},
    raw,
    rope::Rope,
};
use mlx_rs::{
    Array,
    error::Result,
    ops::{concatenate, tanh},
};

/// The weights of one model, or of a part of its layers.
#[derive(Debug)]
pub(super) struct Decoder {
    compute: Compute,
    dims: Dims,
    /// Of the part that begins with the first layer.
    embedding: Option<Embedding>,
    embedding_scale: Option<Array>,
    layers: Vec<Layer>,
    /// Of the part that ends with the last layer.
    output: Option<Output>,
    ropes: Vec<Rope>,
}

/// What follows the last layer.
#[derive(Debug)]
struct Output {
    norm: RmsNorm,
    /// None where what the norm gives is wanted.
    head: Option<Linear>,
    /// Whether the output layer's arrays are the embedding's, and this is here too.
    tied: bool,
    logit_cap: Option<f32>,
}

#[derive(Debug)]
struct Layer {
    attention_norm: RmsNorm,
    attention: SelfAttention,
    after_attention: Option<RmsNorm>,
    mlp_norm: RmsNorm,
    mlp: Mlp,
    after_mlp: Option<RmsNorm>,
    rope: usize,
    look: Look,
}

#[derive(Debug)]
enum SelfAttention {
    Plain {
        /// Queries, keys and values side by side.
        qkv: Linear,
        /// Of each head of queries and of keys.
        norms: Option<(RmsNorm, RmsNorm)>,
        output: Linear,
    },
    Latent(Box<Latent>),
}

#[derive(Debug)]
enum Mlp {
    Dense {
        /// Gate and up side by side.
        gate_up: Linear,
        down: Linear,
        gate: Gate,
    },
    Experts(Box<Experts>),
}

impl Decoder {
    /// The layers of `part`; what others need is not touched.
    pub(super) fn load(
        tensors: &mut Tensors,
        mut spec: Spec,
        compute: Compute,
        part: Part,
    ) -> std::result::Result<Self, LoadError> {
        // Llama 3 GGUF files carry the scaling as a tensor of factors.
        if let Some(factors) = tensors.take_optional("rope_freqs.weight")? {
            let factors = factors.as_dtype(mlx_rs::Dtype::Float32)?;
            for waves in &mut spec.ropes {
                for (length, factor) in waves.lengths.iter_mut().zip(factors.as_slice::<f32>()) {
                    *length *= factor;
                }
            }
        }
        let names = Names::of(tensors);
        let tied = spec.tied.unwrap_or_else(|| !tensors.contains(&format!("{}.weight", names.head)));
        let embedding = if part.is_first() || (part.is_last() && tied) {
            let table = tensors.weight(&format!("{}embed_tokens", names.model))?;
            let rows = table.shape().first().copied().unwrap_or(0);
            if i64::from(spec.vocabulary) > i64::from(rows) {
                let reason = format!("vocab_size is {}, but the embedding has {rows} rows", spec.vocabulary);
                return Err(LoadError::Config { reason });
            }
            Some(Embedding::load(&table, compute)?)
        } else {
            None
        };
        let layers = part.layers();
        let layers = layers.map(|index| Layer::load(tensors, &names.layer(index), index, &spec, compute));
        let mut layers = layers.collect::<std::result::Result<Vec<_>, _>>()?;
        let output = if part.is_last() {
            let norm = RmsNorm::load(tensors, &format!("{}norm", names.model), spec.norms, compute)?;
            let head = match &embedding {
                _ if spec.headless => None,
                Some(embedding) if tied => Some(embedding.tied_head(compute)?),
                _ => Some(Linear::load(tensors, &[names.head], compute)?),
            };
            Some(Output { norm, head, tied: tied && part.is_first(), logit_cap: spec.logit_cap })
        } else {
            None
        };
        let embedding = embedding.filter(|_| part.is_first());
        let heads = spec.heads;
        let kv = KvShape {
            layers: layers.len(),
            heads: heads.keys,
            head_dim: heads.dim,
            dtype: compute.activations,
            packing: spec.kv_packing,
        };
        let dims = Dims {
            kv,
            heads: heads.queries,
            vocabulary: spec.vocabulary,
            context: spec.context,
            scale: spec.scale,
            plain: spec.plain_attention(),
            hidden: spec.hidden,
            part,
        };
        let rope = |waves| Rope::new(compute.path, waves, heads.dim, spec.scale);
        let ropes: Vec<_> = spec.ropes.iter().map(rope).collect();
        for layer in layers.iter_mut().filter(|layer| !layer.look.is_plain()) {
            layer.look.numbers = Some(ropes[layer.rope].numbers_with(&layer.look, heads.queries)?);
        }
        let embedding_scale = spec.embedding_scale.map(|scale| compute.number(scale)).transpose()?;
        Ok(Self { compute, dims, embedding, embedding_scale, layers, output, ropes })
    }
}

impl Layer {
    fn load(
        tensors: &mut Tensors,
        prefix: &str,
        index: usize,
        spec: &Spec,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let layer = &spec.layers[index];
        let attention = SelfAttention::load(tensors, prefix, spec, compute)?;
        let mlp = Mlp::load(tensors, prefix, &layer.mlp, compute)?;
        let sinks = spec.sinks.then(|| tensors.take(&format!("{prefix}self_attn.sinks"))).transpose()?;
        let sinks = sinks.map(|sinks| compute.cast(sinks)).transpose()?;
        let mut norm = |part: &str| RmsNorm::load(tensors, &format!("{prefix}{part}"), spec.norms, compute);
        let attention_norm = norm("input_layernorm")?;
        let (after_attention, mlp_norm, after_mlp) = if spec.normed_outputs {
            let after_attention = norm("post_attention_layernorm")?;
            let mlp_norm = norm("pre_feedforward_layernorm")?;
            (Some(after_attention), mlp_norm, Some(norm("post_feedforward_layernorm")?))
        } else {
            (None, norm("post_attention_layernorm")?, None)
        };
        let window = layer.window.map(|window| i32::try_from(window).unwrap_or(i32::MAX));
        let look = Look { window, cap: spec.score_cap, sinks, numbers: None };
        let rope = layer.rope;
        Ok(Self { attention_norm, attention, after_attention, mlp_norm, mlp, after_mlp, rope, look })
    }

    /// Adds what attention and the MLP make of the wanted rows.
    fn after(&self, attended: &Array, residual: &Array, compute: Compute) -> Result<Array> {
        let onto = |x, norm: &Option<RmsNorm>| Between {
            added: Some(x).filter(|_| norm.is_none()),
            ..Between::default()
        };
        let attended = self.attention.output(attended, onto(residual, &self.after_attention))?;
        let x = added(attended, residual, self.after_attention.as_ref())?;
        let made = self.mlp.forward(&x, &self.mlp_norm, onto(&x, &self.after_mlp), compute)?;
        added(made, &x, self.after_mlp.as_ref())
    }

    fn arrays(&self) -> Vec<&Array> {
        let norms = [&self.attention_norm, &self.mlp_norm];
        let after = self.after_attention.iter().chain(&self.after_mlp);
        let norms = norms.into_iter().chain(after).map(RmsNorm::array);
        self.attention
            .arrays()
            .into_iter()
            .chain(self.mlp.arrays())
            .chain(norms)
            .chain(&self.look.sinks)
            .chain(&self.look.numbers)
            .collect()
    }
}

/// What was made of `x`, normalized and added to it where that was not done yet.
fn added(made: Array, x: &Array, norm: Option<&RmsNorm>) -> Result<Array> {
    match norm {
        Some(norm) => x.add(norm.forward(&made)?),
        None => Ok(made),
    }
}

impl SelfAttention {
    fn load(
        tensors: &mut Tensors,
        prefix: &str,
        spec: &Spec,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let names = match spec.projection {
            Projection::Linear(names) => names,
            Projection::Latent(sizes) => {
                let latent = Latent::load(tensors, &format!("{prefix}self_attn."), sizes, spec, compute)?;
                return Ok(Self::Latent(Box::new(latent)));
            }
        };
        let names: Vec<_> = names.iter().map(|name| format!("{prefix}{name}")).collect();
        let qkv = Linear::load(tensors, &names, compute)?;
        let output = Linear::load(tensors, &[format!("{prefix}self_attn.o_proj")], compute)?;
        let mut norm =
            |name: &str| RmsNorm::load(tensors, &format!("{prefix}self_attn.{name}"), spec.norms, compute);
        let norms = if spec.normed_heads { Some((norm("q_norm")?, norm("k_norm")?)) } else { None };
        Ok(Self::Plain { qkv, norms, output })
    }

    fn qkv(&self, x: &Array, norm: &RmsNorm, dims: Dims) -> Result<Qkv> {
        let Dims { heads, kv: KvShape { heads: kv_heads, head_dim, .. }, .. } = dims;
        let (qkv, norms) = match self {
            Self::Plain { qkv, norms, .. } => (qkv, norms),
            Self::Latent(latent) => return latent.qkv(x, norm),
        };
        let product = qkv.forward(x, Between { norm: Some(norm), ..Between::default() })?;
        let product = product.reshape(&[x.dim(0), heads + 2 * kv_heads, head_dim])?;
        let Some((of_queries, of_keys)) = norms else { return Ok(Qkv { product, heads, kv_heads }) };
        let part =
            |from: i32, to: i32| raw::slice(&product, &[0, from, 0], &[x.dim(0), to, head_dim])?.contiguous();
        let values = heads + kv_heads;
        let parts = [
            of_queries.forward(&part(0, heads)?)?,
            of_keys.forward(&part(heads, values)?)?,
            part(values, values + kv_heads)?,
        ];
        Ok(Qkv { product: concatenate(&parts, 1)?, heads, kv_heads })
    }

    fn output(&self, attended: &Array, between: Between<'_>) -> Result<Array> {
        match self {
            Self::Plain { output, .. } => output.forward(attended, between),
            Self::Latent(latent) => latent.output(attended, between),
        }
    }

    fn arrays(&self) -> Vec<&Array> {
        match self {
            Self::Plain { qkv, norms, output } => {
                let norms = norms.iter().flat_map(|(queries, keys)| [queries.array(), keys.array()]);
                qkv.arrays().into_iter().chain(output.arrays()).chain(norms).collect()
            }
            Self::Latent(latent) => latent.arrays(),
        }
    }
}

impl Mlp {
    fn load(
        tensors: &mut Tensors,
        prefix: &str,
        spec: &MlpSpec,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        match spec {
            MlpSpec::Dense { gate_up, gate } => {
                let names: Vec<_> = gate_up.iter().map(|name| format!("{prefix}{name}")).collect();
                let gate_up = Linear::load(tensors, &names, compute)?;
                let down = Linear::load(tensors, &[format!("{prefix}mlp.down_proj")], compute)?;
                Ok(Self::Dense { gate_up, down, gate: *gate })
            }
            MlpSpec::Experts(spec) => {
                Experts::load(tensors, prefix, spec, compute).map(|experts| Self::Experts(Box::new(experts)))
            }
        }
    }

    fn forward(&self, x: &Array, norm: &RmsNorm, onto: Between<'_>, compute: Compute) -> Result<Array> {
        match self {
            Self::Dense { gate_up, down, gate } => {
                let gated = Between { norm: Some(norm), gated: Some(*gate), ..Between::default() };
                down.forward(&gate_up.forward(x, gated)?, onto)
            }
            Self::Experts(experts) => {
                let made = experts.forward(&norm.forward(x)?, compute)?;
                onto.added.map_or(Ok(made.clone()), |x| x.add(&made))
            }
        }
    }

    fn arrays(&self) -> Vec<&Array> {
        match self {
            Self::Dense { gate_up, down, .. } => gate_up.arrays().into_iter().chain(down.arrays()).collect(),
            Self::Experts(experts) => experts.arrays(),
        }
    }
}

impl Family for Decoder {
    fn dims(&self) -> Dims {
        self.dims
    }

    fn forward(&self, input: &StepInput<'_>, kv: &mut KvPool) -> Result<Option<Array>> {
        let ropes = self.ropes.iter().map(|rope| rope.at(input.positions)).collect::<Result<Vec<_>>>()?;
        let mut x = input.entering.clone();
        if let Some(embedding) = &self.embedding {
            x = embedding.forward(&x, self.compute.activations)?;
        }
        if let Some(scale) = self.embedding_scale.as_ref().filter(|_| self.embedding.is_some()) {
            x = x.multiply(scale)?;
        }
        let attention: &Attention = input.attention;
        // What follows another part needs all rows.
        let wanted_of = if self.output.is_some() { input.wanted } else { Wanted::All };
        for (index, layer) in self.layers.iter().enumerate() {
            let qkv = layer.attention.qkv(&x, &layer.attention_norm, self.dims)?;
            let last = index + 1 == self.layers.len();
            // Nothing after the last layer's keys and values is needed in the middle of a prompt.
            let wanted = !(last && wanted_of.is_empty());
            let at = attention::Layer { index, rope: &ropes[layer.rope], look: &layer.look };
            let Some(attended) = attention.forward(at, qkv, kv, wanted)? else {
                return Ok(None);
            };
            let (attended, residual) =
                if last { (wanted_of.of(&attended)?, wanted_of.of(&x)?) } else { (attended, x) };
            x = layer.after(&attended, &residual, self.compute)?;
            if self.embedding.is_some() {
                // What enters elsewhere is still on its way: nobody shall wait for it before all is built.
                hand_over(index, &x, self.compute.path)?;
            }
        }
        let Some(output) = &self.output else { return Ok(Some(x)) };
        let Some(head) = &output.head else { return output.norm.forward(&x).map(Some) };
        let normed = Between { norm: Some(&output.norm), ..Between::default() };
        let logits = head.forward(&x, normed)?;
        match output.logit_cap {
            Some(cap) => {
                let cap = self.compute.number(cap)?;
                tanh(logits.divide(&cap)?)?.multiply(&cap).map(Some)
            }
            None => Ok(Some(logits)),
        }
    }

    fn arrays(&self) -> Vec<&Array> {
        let mut arrays: Vec<&Array> = self.layers.iter().flat_map(Layer::arrays).collect();
        if let Some(output) = &self.output {
            arrays.push(output.norm.array());
            if !output.tied {
                arrays.extend(output.head.iter().flat_map(Linear::arrays));
            }
        }
        arrays.extend(self.embedding.iter().flat_map(Embedding::arrays));
        arrays
    }
}
