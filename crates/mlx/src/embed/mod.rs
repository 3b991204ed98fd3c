//! Vectors of texts: an encoder ([`bert`]) or one of the decoders without its output layer, pooled, and of length 1.
//!
//! A folder is of an embedder if its `model_type` is an encoder's, or if it has the `modules.json` of sentence-transformers.
//! What a text's vector is made of says its `1_Pooling/config.json`; without one it is the mean of an encoder's tokens, the
//! last token of a decoder's.

mod bert;
#[cfg(test)]
mod tests;

use crate::{
    checkpoint::{Checkpoint, LoadError},
    kv::{KvPool, backend},
    layers::{Path as ComputePath, Wanted},
    load::{LoadSettings, Opened, load, open_encoder},
    models::{Family, Part, StepInput, spec_error},
    step::Ordered,
};
use bert::Bert;
use engine::{BlockId, Embedder, Input, Model, ModelError, SequenceId, Slice};
use mlx_rs::{Array, Dtype, error::Result, transforms::eval};
use serde_json::Value;
use std::{fs, path::Path};
use types::{BLOCK_TOKENS, ModelAssets, ModelCard, ModelKind, TokenId, limits};

/// Blocks of a decoder's KV for texts that are computed together, at least: 128 short ones.
const BLOCKS_MIN: usize = 640;
/// Texts are computed together whose lengths differ by no more than this factor: filling up costs attention.
const LENGTHS_FACTOR: usize = 2;
/// Below so many tokens lengths do not matter.
const SHORT_TOKENS: usize = 16;

/// A model of either kind.
#[derive(Debug)]
pub enum AnyModel {
    /// One that generates.
    Generator(Box<dyn Model>),
    /// One that makes vectors.
    Embedder(Box<dyn Embedder>),
}

/// Loads a model of either kind onto the calling thread, which must be the one that uses it.
///
/// # Errors
/// [`LoadError`], as [`load()`].
pub fn load_any(
    settings: &LoadSettings,
    progress: &mut dyn FnMut(&str, f32),
) -> std::result::Result<(AnyModel, ModelAssets), LoadError> {
    let model_type = model_type(&settings.model);
    let is_encoder = bert::SUPPORTED.contains(&model_type.as_str());
    if !is_encoder && !settings.model.join("modules.json").exists() {
        let (model, assets) = load(settings, progress)?;
        return Ok((AnyModel::Generator(model), assets));
    }
    check_modules(&settings.model)?;
    let pooling = Pooling::of(&settings.model, is_encoder)?;
    let (encoder, card, assets) =
        if is_encoder { encoder(settings, progress)? } else { decoder(settings, progress)? };
    tracing::info!(model = card.name, ?pooling, kind = ?card.kind, context = card.context_tokens, "it makes vectors");
    Ok((AnyModel::Embedder(Box::new(TextEmbedder { card, encoder, pooling })), assets))
}

type Opening = (Encoder, ModelCard, ModelAssets);

fn encoder(
    settings: &LoadSettings,
    progress: &mut dyn FnMut(&str, f32),
) -> std::result::Result<Opening, LoadError> {
    let (mut checkpoint, compute) = open_encoder(settings, progress)?;
    let bert = Bert::load(&mut checkpoint.tensors, &checkpoint.config, compute)?;
    progress("weights", 0.5);
    eval(bert.arrays())?;
    progress("weights", 1.0);
    let Checkpoint { assets, eos_tokens, fingerprint, created_s, .. } = checkpoint;
    let context = bert.context.min(longest(settings)?);
    if context == 0 {
        return Err(spec_error("the model has room for no tokens".to_owned()));
    }
    let card = ModelCard {
        name: settings.name.clone(),
        root: fingerprint,
        context_tokens: context as u32,
        vocab_size: bert.vocabulary,
        eos_tokens,
        assets: assets.hash(),
        created_s,
        kind: kind(bert.hidden)?,
    };
    Ok((Encoder::Bert(Box::new(bert)), card, assets))
}

fn decoder(
    settings: &LoadSettings,
    progress: &mut dyn FnMut(&str, f32),
) -> std::result::Result<Opening, LoadError> {
    let mut opened = Opened::new(settings, None, progress)?;
    opened.spec.headless = true;
    let longest = longest(settings)?;
    opened.spec = opened.spec.within(longest);
    let part = Part::of(&opened.spec, &(0..opened.spec.layers.len()))?;
    let loaded = opened.load(part, settings, progress)?;
    let dims = loaded.family.dims();
    let blocks = loaded.blocks.min(dims.context.div_ceil(BLOCK_TOKENS).max(BLOCKS_MIN));
    let card = ModelCard { kind: kind(dims.hidden)?, ..loaded.card(settings, blocks) };
    let kv = KvPool::new(dims.kv, blocks, loaded.path)?;
    let (family, path, assets) = (loaded.family, loaded.path, loaded.assets);
    Ok((Encoder::Decoder(Box::new(Headless { family, kv, path, blocks })), card, assets))
}

fn kind(hidden: i32) -> std::result::Result<ModelKind, LoadError> {
    match u32::try_from(hidden) {
        Ok(dimensions) if dimensions as usize <= limits::EMBED_DIMENSIONS_MAX => {
            Ok(ModelKind::Embedder { dimensions })
        }
        _ => {
            let most = limits::EMBED_DIMENSIONS_MAX;
            Err(spec_error(format!("hidden_size is {hidden}; vectors may have up to {most} numbers")))
        }
    }
}

/// A JSON file of the model's folder, if it is there.
fn optional_json(path: &Path) -> std::result::Result<Option<Value>, LoadError> {
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).map_err(|error| LoadError::io(path, error))?;
    let parsed = serde_json::from_str(&text);
    parsed.map(Some).map_err(|error| LoadError::damaged(path, format!("it is not JSON: {error}")))
}

fn model_type(model: &Path) -> String {
    // What is wrong with the file is said by whoever needs it.
    let config = optional_json(&model.join("config.json")).ok().flatten().unwrap_or_default();
    config["model_type"].as_str().unwrap_or_default().to_owned()
}

/// Tokens of a text at most, as the model's authors and the settings say.
fn longest(settings: &LoadSettings) -> std::result::Result<usize, LoadError> {
    let told = optional_json(&settings.model.join("sentence_bert_config.json"))?.unwrap_or_default();
    let told = told["max_seq_length"].as_u64().and_then(|tokens| usize::try_from(tokens).ok());
    Ok(told.unwrap_or(usize::MAX).min(settings.context_tokens.unwrap_or(usize::MAX)))
}

/// Modules that follow the pooling and compute something are not supported.
fn check_modules(model: &Path) -> std::result::Result<(), LoadError> {
    const KNOWN: [&str; 3] = ["Transformer", "Pooling", "Normalize"];
    let path = model.join("modules.json");
    let modules = optional_json(&path)?.unwrap_or_default();
    let kinds = modules.as_array().into_iter().flatten().filter_map(|module| module["type"].as_str());
    match kinds.map(|kind| kind.rsplit('.').next().unwrap_or(kind)).find(|kind| !KNOWN.contains(kind)) {
        Some(kind) => {
            let reason = format!("the module {kind:?}; supported: {}", KNOWN.join(", "));
            Err(LoadError::unsupported(&path, reason))
        }
        None => Ok(()),
    }
}

/// Which of a text's tokens its vector is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pooling {
    First,
    Last,
    Mean,
}

impl Pooling {
    fn of(model: &Path, is_encoder: bool) -> std::result::Result<Self, LoadError> {
        let path = model.join("1_Pooling").join("config.json");
        let Some(config) = optional_json(&path)? else {
            return Ok(if is_encoder { Self::Mean } else { Self::Last });
        };
        const MODES: [(&str, &str, Pooling); 3] = [
            ("pooling_mode_cls_token", "cls", Pooling::First),
            ("pooling_mode_lasttoken", "lasttoken", Pooling::Last),
            ("pooling_mode_mean_tokens", "mean", Pooling::Mean),
        ];
        let on = config
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, value)| name.starts_with("pooling_mode_") && value.as_bool() == Some(true));
        let on: Vec<&str> = on.map(|(name, _)| name.as_str()).collect();
        let named = config["pooling_mode"].as_str();
        let found =
            MODES.into_iter().find(|(flag, name, _)| on == [*flag] || on.is_empty() && named == Some(name));
        found.map(|(_, _, pooling)| pooling).ok_or_else(|| {
            let reason =
                format!("pooling by {on:?}; supported: one of {}", MODES.map(|(flag, ..)| flag).join(", "));
            LoadError::unsupported(&path, reason)
        })
    }
}

/// What makes something of each token.
#[derive(Debug)]
enum Encoder {
    Bert(Box<Bert>),
    Decoder(Box<Headless>),
}

/// A decoder without output layer, and KV for the texts of one pass.
#[derive(Debug)]
struct Headless {
    family: Box<dyn Family>,
    kv: KvPool,
    path: ComputePath,
    blocks: usize,
}

/// A loaded embedder.
#[derive(Debug)]
struct TextEmbedder {
    card: ModelCard,
    encoder: Encoder,
    pooling: Pooling,
}

impl Embedder for TextEmbedder {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn embed(&mut self, texts: &[&[TokenId]]) -> std::result::Result<Vec<Vec<f32>>, ModelError> {
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&index| texts[index].len());
        let mut vectors = vec![Vec::new(); texts.len()];
        let mut rest = &order[..];
        while let Some(&shortest) = rest.first() {
            let most = texts[shortest].len().max(SHORT_TOKENS) * LENGTHS_FACTOR;
            let alike = rest.iter().take_while(|&&index| texts[index].len() <= most).count();
            let fits = match &self.encoder {
                Encoder::Bert(_) => alike,
                Encoder::Decoder(decoder) => decoder.fits(rest.iter().map(|&index| texts[index].len())),
            };
            let (now, later) = rest.split_at(fits.clamp(1, alike));
            let together: Vec<&[TokenId]> = now.iter().map(|&index| texts[index]).collect();
            let made = self.together(&together).map_err(backend)?;
            for (&index, vector) in now.iter().zip(made) {
                vectors[index] = vector;
            }
            rest = later;
        }
        Ok(vectors)
    }
}

impl TextEmbedder {
    fn together(&mut self, texts: &[&[TokenId]]) -> Result<Vec<Vec<f32>>> {
        let states = match &mut self.encoder {
            Encoder::Bert(bert) => bert.forward(texts)?,
            Encoder::Decoder(decoder) => decoder.forward(texts)?,
        };
        let pooled = self.pooling.pool(&states, texts)?;
        eval([&pooled])?;
        let width = pooled.dim(1) as usize;
        Ok(pooled.as_slice::<f32>().chunks(width).map(of_length_1).collect())
    }
}

impl Pooling {
    /// `[tokens, hidden]` of all texts to `[texts, hidden]`, in f32.
    fn pool(self, states: &Array, texts: &[&[TokenId]]) -> Result<Array> {
        let states = states.as_dtype(Dtype::Float32)?;
        let ends = texts.iter().scan(0, |end, text| {
            *end += text.len();
            Some(*end)
        });
        let row = |at: usize| at as i32;
        let rows: Vec<i32> = match self {
            Self::First => ends.zip(texts).map(|(end, text)| row(end - text.len())).collect(),
            Self::Last => ends.map(|end| row(end - 1)).collect(),
            Self::Mean => {
                let all = states.dim(0) as usize;
                let mut shares = vec![0.0_f32; texts.len() * all];
                for ((end, text), shares) in ends.zip(texts).zip(shares.chunks_mut(all)) {
                    shares[end - text.len()..end].fill(1.0 / text.len() as f32);
                }
                return Array::from_slice(&shares, &[texts.len() as i32, all as i32]).matmul(&states);
            }
        };
        states.take_axis(Array::from_slice(&rows, &[rows.len() as i32]), 0)
    }
}

fn of_length_1(vector: &[f32]) -> Vec<f32> {
    let length = vector.iter().map(|&number| f64::from(number).powi(2)).sum::<f64>().sqrt().max(1e-12);
    vector.iter().map(|&number| (f64::from(number) / length) as f32).collect()
}

impl Headless {
    /// How many of these texts fit one pass.
    fn fits(&self, lengths: impl Iterator<Item = usize>) -> usize {
        let mut left = self.blocks;
        let fits = lengths.take_while(|length| {
            let blocks = length.div_ceil(BLOCK_TOKENS);
            let fits = blocks <= left;
            left = left.saturating_sub(blocks);
            fits
        });
        fits.count()
    }

    /// What the last norm makes of each token, one text after another.
    fn forward(&mut self, texts: &[&[TokenId]]) -> Result<Array> {
        let mut next = 0;
        let blocks: Vec<Vec<BlockId>> = texts
            .iter()
            .map(|text| {
                let first = next;
                next += text.len().div_ceil(BLOCK_TOKENS) as u32;
                (first..next).map(BlockId).collect()
            })
            .collect();
        let slices: Vec<_> = texts
            .iter()
            .zip(&blocks)
            .enumerate()
            .map(|(index, (&text, blocks))| Slice {
                sequence: SequenceId(index as u64),
                blocks,
                start: 0,
                input: Input::Tokens(text),
                sample: None,
                drafts: 0,
                score: None,
            })
            .collect();
        if self.path == ComputePath::Pure {
            self.kv.grow(next as usize)?;
        }
        let ordered = Ordered::new(&slices);
        // Texts of one token come first there; `given` is where each text's tokens are.
        let order: Vec<usize> = ordered.slices.iter().map(|slice| slice.sequence.0 as usize).collect();
        let (mut tokens, mut given) = (Vec::new(), vec![0; texts.len()]);
        for &index in &order {
            given[index] = tokens.len();
            tokens.extend(texts[index].iter().map(|&token| token as i32));
        }
        let rows: Vec<i32> = texts
            .iter()
            .zip(&given)
            .flat_map(|(text, &begin)| (begin..begin + text.len()).map(|row| row as i32))
            .collect();
        let attention = ordered.attention(self.path, self.family.dims().scale);
        let input = StepInput {
            entering: Array::from_slice(&tokens, &[tokens.len() as i32]),
            positions: &ordered.positions(self.path),
            attention: &attention,
            wanted: Wanted::All,
        };
        let states = self.family.forward(&input, &mut self.kv)?;
        let pending = std::mem::take(&mut self.kv.pending);
        eval(states.iter().chain(&pending).chain([&self.kv.fence]))?;
        let states = states.ok_or_else(|| mlx_rs::error::Exception::custom("the pass gave nothing"))?;
        states.take_axis(Array::from_slice(&rows, &[rows.len() as i32]), 0)
    }
}
