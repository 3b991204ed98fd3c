//! Encoders of BERT's kind (arXiv 1810.04805): each token sees all of its text, norms follow what they normalize.
//!
//! Products are over the tokens of all texts, one text after another; only attention tells texts apart, and fills the shorter
//! ones up.

use crate::{
    checkpoint::{LoadError, Tensors},
    layers::{Between, Compute, Embedding, Linear, gelu},
    models::spec_error,
};
use mlx_rs::{
    Array,
    error::Result,
    fast::{layer_norm, scaled_dot_product_attention},
    ops::{erf, maximum},
};
use serde::Deserialize;
use serde_json::Value;

/// `model_type`s of encoders.
pub(super) const SUPPORTED: [&str; 3] = ["bert", "roberta", "xlm-roberta"];
/// Under which name a checkpoint may have it.
const PREFIXES: [&str; 4] = ["", "bert.", "roberta.", "model."];

#[derive(Debug, Deserialize)]
struct Config {
    model_type: String,
    hidden_size: i32,
    num_hidden_layers: usize,
    num_attention_heads: i32,
    vocab_size: u32,
    max_position_embeddings: usize,
    #[serde(default = "eps")]
    layer_norm_eps: f32,
    #[serde(default = "act")]
    hidden_act: String,
    #[serde(default)]
    pad_token_id: Option<usize>,
    #[serde(default)]
    position_embedding_type: Option<String>,
}

fn eps() -> f32 {
    1e-12
}

fn act() -> String {
    "gelu".to_owned()
}

/// Between the two products of a layer.
#[derive(Debug, Clone, Copy)]
enum Activation {
    Gelu,
    /// By its approximation with tanh.
    GeluTanh,
    Relu,
}

#[derive(Debug)]
struct LayerNorm {
    weight: Array,
    bias: Array,
    eps: f32,
}

#[derive(Debug)]
struct Layer {
    /// Queries, keys and values side by side.
    qkv: Linear,
    attended: Linear,
    attended_norm: LayerNorm,
    inner: Linear,
    outer: Linear,
    outer_norm: LayerNorm,
}

/// The weights of one model.
#[derive(Debug)]
pub(super) struct Bert {
    words: Embedding,
    positions: Array,
    /// Added to all tokens: every text is a first one.
    kind: Array,
    norm: LayerNorm,
    layers: Vec<Layer>,
    heads: i32,
    activation: Activation,
    /// Position of a text's first token.
    first: usize,
    compute: Compute,
    pub(super) hidden: i32,
    pub(super) vocabulary: u32,
    pub(super) context: usize,
}

impl Bert {
    pub(super) fn load(
        tensors: &mut Tensors,
        config: &Value,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let config = Config::deserialize(config).map_err(|error| spec_error(error.to_string()))?;
        let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
        if heads <= 0 || hidden <= 0 || hidden % heads != 0 {
            return Err(spec_error(format!("{heads} attention heads cannot share hidden_size {hidden}")));
        }
        if let Some(kind) = config.position_embedding_type.filter(|kind| kind != "absolute") {
            return Err(spec_error(format!("position_embedding_type is {kind:?}; supported: absolute")));
        }
        let activation = match config.hidden_act.as_str() {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => {
                let supported = "gelu, gelu_new, gelu_pytorch_tanh, relu";
                return Err(spec_error(format!("hidden_act is {other:?}; supported: {supported}")));
            }
        };
        let table = "embeddings.word_embeddings";
        let prefix = PREFIXES.into_iter().find(|prefix| tensors.contains(&format!("{prefix}{table}.weight")));
        let prefix = prefix.unwrap_or_default();
        // RoBERTa's count from behind the padding's.
        let first = if config.model_type == "bert" { 0 } else { config.pad_token_id.unwrap_or(1) + 1 };
        let words = Embedding::load(&tensors.weight(&format!("{prefix}{table}"))?, compute)?;
        let mut dense = |name: &str| -> std::result::Result<Array, LoadError> {
            Ok(compute.cast(tensors.take(&format!("{prefix}embeddings.{name}.weight"))?)?)
        };
        let positions = dense("position_embeddings")?;
        let kind = dense("token_type_embeddings")?.take_axis(Array::from_slice(&[0_i32], &[1]), 0)?;
        let context = config.max_position_embeddings.min(positions.dim(0) as usize).saturating_sub(first);
        let eps = config.layer_norm_eps;
        let norm = LayerNorm::load(tensors, &format!("{prefix}embeddings.LayerNorm"), eps, compute)?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for index in 0..config.num_hidden_layers {
            layers.push(Layer::load(tensors, &format!("{prefix}encoder.layer.{index}."), eps, compute)?);
        }
        let vocabulary = config.vocab_size;
        Ok(Self {
            words,
            positions,
            kind,
            norm,
            layers,
            heads,
            activation,
            first,
            compute,
            hidden,
            vocabulary,
            context,
        })
    }

    /// What the last layer makes of each token, `[tokens, hidden]`, one text after another.
    pub(super) fn forward(&self, texts: &[&[u32]]) -> Result<Array> {
        let indexes = |values: Vec<i32>| Array::from_slice(&values, &[values.len() as i32]);
        let tokens = indexes(texts.iter().copied().flatten().map(|&token| token as i32).collect());
        let places = texts.iter().flat_map(|text| self.first..self.first + text.len());
        let places = indexes(places.map(|place| place as i32).collect());
        let x = self.words.forward(&tokens, self.compute.activations)?;
        let x = x.add(self.positions.take_axis(&places, 0)?)?.add(&self.kind)?;
        let mut x = self.norm.forward(&x)?;
        let filled = Filled::new(texts);
        for layer in &self.layers {
            x = layer.forward(&x, &filled, self)?;
        }
        Ok(x)
    }

    pub(super) fn arrays(&self) -> Vec<&Array> {
        let mut arrays = self.words.arrays();
        arrays.extend([&self.positions, &self.kind, &self.norm.weight, &self.norm.bias]);
        for layer in &self.layers {
            for linear in [&layer.qkv, &layer.attended, &layer.inner, &layer.outer] {
                arrays.extend(linear.arrays());
            }
            for norm in [&layer.attended_norm, &layer.outer_norm] {
                arrays.extend([&norm.weight, &norm.bias]);
            }
        }
        arrays
    }
}

/// Texts as rows of equal length.
struct Filled {
    rows: i32,
    length: i32,
    /// Where texts differ in length.
    uneven: Option<Uneven>,
}

struct Uneven {
    /// For each place of each row the token that is there, or the row's first one.
    places: Array,
    /// For each token its place.
    tokens: Array,
    /// `[rows, 1, 1, length]`: whether a token is there.
    mask: Array,
}

impl Filled {
    fn new(texts: &[&[u32]]) -> Self {
        let rows = texts.len() as i32;
        let length = texts.iter().map(|text| text.len()).max().unwrap_or(0);
        if texts.iter().all(|text| text.len() == length) {
            return Self { rows, length: length as i32, uneven: None };
        }
        let (mut places, mut tokens, mut mask) = (Vec::new(), Vec::new(), Vec::new());
        let mut begin = 0;
        for (row, text) in texts.iter().enumerate() {
            let here = (0..length).map(|place| place < text.len());
            places.extend(
                here.clone().enumerate().map(
                    |(place, here)| {
                        if here { (begin + place) as i32 } else { begin as i32 }
                    },
                ),
            );
            mask.extend(here);
            tokens.extend((0..text.len()).map(|place| (row * length + place) as i32));
            begin += text.len();
        }
        let length = length as i32;
        let uneven = Uneven {
            places: Array::from_slice(&places, &[rows * length]),
            tokens: Array::from_slice(&tokens, &[tokens.len() as i32]),
            mask: Array::from_slice(&mask, &[rows, 1, 1, length]),
        };
        Self { rows, length, uneven: Some(uneven) }
    }
}

impl Layer {
    fn load(
        tensors: &mut Tensors,
        prefix: &str,
        eps: f32,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        let name = |part: &str| format!("{prefix}{part}");
        let parts = ["query", "key", "value"].map(|part| name(&format!("attention.self.{part}")));
        let qkv = Linear::load(tensors, &parts, compute)?;
        let mut linear = |part: &str| Linear::load(tensors, &[name(part)], compute);
        let (attended, inner) = (linear("attention.output.dense")?, linear("intermediate.dense")?);
        let outer = linear("output.dense")?;
        let mut norm = |part: &str| LayerNorm::load(tensors, &name(part), eps, compute);
        let attended_norm = norm("attention.output.LayerNorm")?;
        Ok(Self { qkv, attended, attended_norm, inner, outer, outer_norm: norm("output.LayerNorm")? })
    }

    fn forward(&self, x: &Array, filled: &Filled, bert: &Bert) -> Result<Array> {
        let plain = Between::default();
        let qkv = self.qkv.forward(x, plain)?;
        let qkv = match &filled.uneven {
            Some(uneven) => qkv.take_axis(&uneven.places, 0)?,
            None => qkv,
        };
        let dim = bert.hidden / bert.heads;
        let shape = [filled.rows, filled.length, bert.heads, dim];
        let mut parts = Vec::with_capacity(3);
        for part in qkv.split_equal(3, -1)? {
            parts.push(part.reshape(&shape)?.transpose_axes(&[0, 2, 1, 3])?);
        }
        let scale = (dim as f32).powf(-0.5);
        let mask = filled.uneven.as_ref().map(|uneven| &uneven.mask);
        let attended = match mask {
            Some(mask) => scaled_dot_product_attention(&parts[0], &parts[1], &parts[2], scale, mask, None)?,
            None => scaled_dot_product_attention(&parts[0], &parts[1], &parts[2], scale, None, None)?,
        };
        let attended = attended.transpose_axes(&[0, 2, 1, 3])?;
        let attended = attended.reshape(&[filled.rows * filled.length, bert.hidden])?;
        let attended = match &filled.uneven {
            Some(uneven) => attended.take_axis(&uneven.tokens, 0)?,
            None => attended,
        };
        let onto = |x| Between { added: Some(x), ..Between::default() };
        let x = self.attended_norm.forward(&self.attended.forward(&attended, onto(x))?)?;
        let inner = bert.activation.of(&self.inner.forward(&x, plain)?)?;
        self.outer_norm.forward(&self.outer.forward(&inner, onto(&x))?)
    }
}

impl LayerNorm {
    fn load(
        tensors: &mut Tensors,
        prefix: &str,
        eps: f32,
        compute: Compute,
    ) -> std::result::Result<Self, LoadError> {
        // The names that TensorFlow gave them are in old files.
        let mut part = |name: &str, old: &str| {
            let found = if tensors.contains(&format!("{prefix}.{name}")) { name } else { old };
            tensors.take(&format!("{prefix}.{found}"))
        };
        let (weight, bias) = (part("weight", "gamma")?, part("bias", "beta")?);
        Ok(Self { weight: compute.cast(weight)?, bias: compute.cast(bias)?, eps })
    }

    fn forward(&self, x: &Array) -> Result<Array> {
        layer_norm(x, Some(&self.weight), Some(&self.bias), self.eps)
    }
}

impl Activation {
    fn of(self, x: &Array) -> Result<Array> {
        let number = |value: f32| Array::from_f32(value).as_dtype(x.dtype());
        match self {
            Self::Gelu => {
                let curve = erf(x.multiply(number(std::f32::consts::FRAC_1_SQRT_2)?)?)?.add(number(1.0)?)?;
                x.multiply(number(0.5)?)?.multiply(curve)
            }
            Self::GeluTanh => gelu(x),
            Self::Relu => maximum(x, number(0.0)?),
        }
    }
}
