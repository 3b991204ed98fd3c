//! Packs a model's weights and writes it as a folder like mlx-community's, which mlx-lm loads too.
//!
//! Matrices of linear layers and embeddings are packed, experts as one tensor of three axes; routers, norms, biases and
//! what latent attention is unfolded with stay as they are. One shard at a time is in memory.

use super::{Checkpoint, LoadError, Packed, Packing, Tensors, Weight, directory};
use crate::models::{self, StackedName};
use mlx_rs::{Array, Dtype, error::Result as MlxResult, ops::stack, transforms::eval};
use serde_json::{Map, Value, json};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

/// Bytes of a file of weights, after the tensor that fills it: as hubs like them.
const SHARD_BYTES: u64 = 5 << 30;
/// Of each so many layers in the middle, one gets more bits where they are mixed.
const MIXED_EACH: usize = 3;

/// What to convert, and to what.
#[derive(Debug, Clone)]
pub struct ConvertSettings {
    /// A folder or a `.gguf` file.
    pub model: PathBuf,
    /// A folder that is not there yet, or empty.
    pub to: PathBuf,
    /// How weights are packed.
    pub packing: Packing,
    /// More bits for what matters most: the output layer, and values and the last product of some MLPs.
    pub mixed: bool,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Converted {
    /// Files of weights.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Elements of all weights.
    pub parameters: u64,
}

/// Packs the weights of a model; `progress` hears what is being done and how far it is, 0 to 1.
///
/// # Errors
/// [`LoadError`] where the model cannot be opened, is packed already, or the folder cannot be written.
pub fn convert(
    settings: &ConvertSettings,
    progress: &mut dyn FnMut(&str, f32),
) -> Result<Converted, LoadError> {
    let ConvertSettings { model, to, .. } = settings;
    let failed = |error| LoadError::io(to, error);
    fs::create_dir_all(to).map_err(failed)?;
    if fs::read_dir(to).map_err(failed)?.next().is_some() {
        return Err(LoadError::unsupported(to, "it is not empty; give a folder that is not there yet"));
    }
    let mut checkpoint = Checkpoint::open(model, progress)?;
    let spec = models::spec(&checkpoint.config)?;
    let from_gguf = model.is_file();
    if !from_gguf && checkpoint.tensors.quantized() {
        return Err(LoadError::unsupported(
            model,
            "its weights are quantized already; give the original ones",
        ));
    }
    let parameters = checkpoint.tensors.sizes().iter().map(|(_, size)| size.elements).sum();
    let plan = Plan::of(&checkpoint.tensors, &spec, settings);
    let mut writer = Writer { to, held: Vec::new(), held_bytes: 0, files: Vec::new(), bytes: 0 };
    let mut overrides = Map::new();
    let count = plan.items.len();
    for (at, item) in plan.items.into_iter().enumerate() {
        progress("packing", at as f32 / count as f32);
        item.write(&mut checkpoint.tensors, settings.packing, &mut overrides, &mut writer)?;
    }
    let (files, bytes) = writer.finish()?;
    let mut config = checkpoint.config.clone();
    let mut quantization = Map::new();
    for (key, value) in packing_fields(settings.packing) {
        quantization.insert(key.to_owned(), value);
    }
    quantization.extend(overrides);
    config["quantization"] = Value::Object(quantization.clone());
    config["quantization_config"] = Value::Object(quantization);
    write_json(&to.join("config.json"), &config)?;
    if from_gguf {
        write_tokenizer(&checkpoint, to)?
    } else {
        copy_others(model, to)?
    }
    Ok(Converted { files, bytes, parameters })
}

/// What becomes of a tensor, or of those of all experts.
enum Item {
    /// Nothing changes.
    Keep { name: String },
    /// One matrix.
    Pack { prefix: String, packing: Packing },
    /// A matrix of each expert, which become one tensor.
    Stack { prefixes: Vec<String>, to: String, packing: Option<Packing> },
}

struct Plan {
    items: Vec<Item>,
}

impl Plan {
    fn of(tensors: &Tensors, spec: &models::Spec, settings: &ConvertSettings) -> Self {
        let names = models::Names::of(tensors);
        let layers = spec.layers.len();
        let packing_of = |prefix: &str, columns: i32| {
            let packing = settings.packing;
            let ours = prefix.starts_with(&names.model) || prefix == names.head;
            let matrix = ["_proj", "embed_tokens", "lm_head"].iter().any(|end| prefix.ends_with(end));
            let kept = prefix.ends_with("kv_b_proj") || columns % packing.group_size != 0;
            let bits = if settings.mixed {
                mixed_bits(prefix, &names.model, layers, packing.bits)
            } else {
                packing.bits
            };
            (ours && matrix && !kept).then_some(Packing { bits, ..packing })
        };
        let columns = |prefix: &str| {
            tensors
                .shape(&format!("{prefix}.weight"))
                .and_then(|shape| (shape.len() >= 2).then(|| shape[shape.len() - 1]))
        };
        let mut items = Vec::new();
        let mut stacked = BTreeMap::new();
        for StackedName { singles, to } in names.stacked(tensors, spec) {
            let packing = singles.first().and_then(|first| packing_of(&to, columns(first)?));
            for single in &singles {
                stacked.insert(format!("{single}.weight"), ());
            }
            items.push(Item::Stack { prefixes: singles, to, packing });
        }
        for name in tensors.names().filter(|name| !stacked.contains_key(*name)) {
            let packing = name
                .strip_suffix(".weight")
                .and_then(|prefix| Some((prefix, packing_of(prefix, columns(prefix)?)?)));
            items.push(match packing {
                Some((prefix, packing)) => Item::Pack { prefix: prefix.to_owned(), packing },
                None => Item::Keep { name: name.to_owned() },
            });
        }
        Self { items }
    }
}

/// Bits where they are mixed: the next higher that MLX has for the output layer, and for values and the last product of
/// an MLP in the first and last eighth of the layers and in some between.
fn mixed_bits(prefix: &str, model: &str, layers: usize, bits: i32) -> i32 {
    let more = match bits {
        ..4 => 4,
        4 => 6,
        _ => 8,
    };
    if prefix.ends_with("lm_head") || prefix.ends_with("embed_tokens") {
        return more;
    }
    let layer = prefix.strip_prefix(model).and_then(|rest| rest.strip_prefix("layers."));
    let Some(layer) = layer.and_then(|rest| rest.split('.').next()?.parse::<usize>().ok()) else {
        return bits;
    };
    let matters = ["v_proj", "v_a_proj", "v_b_proj", "down_proj"].iter().any(|end| prefix.ends_with(end));
    let edge = layers / 8;
    let chosen = layer < edge || layer >= layers - edge || (layer - edge) % MIXED_EACH == 2;
    if matters && chosen { more } else { bits }
}

fn packing_fields(packing: Packing) -> [(&'static str, Value); 3] {
    let Packing { group_size, bits, mode } = packing;
    [("group_size", group_size.into()), ("bits", bits.into()), ("mode", mode.name().into())]
}

impl Item {
    fn write(
        self,
        tensors: &mut Tensors,
        default: Packing,
        overrides: &mut Map<String, Value>,
        writer: &mut Writer<'_>,
    ) -> Result<(), LoadError> {
        let (to, weight, packing) = match self {
            Self::Keep { name } => {
                let array = match name.strip_suffix(".weight") {
                    Some(prefix) => tensors.weight(prefix)?.dense_as_stored()?,
                    None => tensors.take(&name)?,
                };
                return writer.add(name, array);
            }
            Self::Pack { prefix, packing } => {
                let weight = tensors.weight(&prefix)?.dense_as_stored()?;
                (prefix, weight, Some(packing))
            }
            Self::Stack { prefixes, to, packing } => {
                let each = prefixes.iter().map(|prefix| Ok(tensors.weight(prefix)?.dense_as_stored()?));
                let each = each.collect::<Result<Vec<_>, LoadError>>()?;
                (to, stack(&each, 0)?, packing)
            }
        };
        let Some(packing) = packing else { return writer.add(format!("{to}.weight"), weight) };
        let Packed { words, scales, biases, .. } = Packed::of(&weight, packing)?;
        if packing != default {
            let fields = packing_fields(packing).map(|(key, value)| (key.to_owned(), value));
            overrides.insert(to.clone(), Value::Object(fields.into_iter().collect()));
        }
        writer.add(format!("{to}.weight"), words)?;
        writer.add(format!("{to}.scales"), scales)?;
        biases.map_or(Ok(()), |biases| writer.add(format!("{to}.biases"), biases))
    }
}

impl Weight {
    /// Dense: of a packed one in f16, the type of its scales.
    fn dense_as_stored(&self) -> MlxResult<Array> {
        match self {
            Self::Dense(array) => Ok(array.clone()),
            Self::Packed(_) => self.dense(Dtype::Float16),
        }
    }
}

/// Writes shards.
struct Writer<'a> {
    to: &'a Path,
    held: Vec<(String, Array)>,
    held_bytes: u64,
    /// The names of what is in each.
    files: Vec<Vec<String>>,
    bytes: u64,
}

impl Writer<'_> {
    fn add(&mut self, name: String, array: Array) -> Result<(), LoadError> {
        eval([&array])?;
        self.held_bytes += array.nbytes() as u64;
        self.held.push((name, array));
        if self.held_bytes >= SHARD_BYTES { self.flush() } else { Ok(()) }
    }

    fn shard(&self, index: usize) -> PathBuf {
        self.to.join(format!("model-{:05}.safetensors", index + 1))
    }

    fn flush(&mut self) -> Result<(), LoadError> {
        let path = self.shard(self.files.len());
        let held = std::mem::take(&mut self.held);
        let metadata = HashMap::from([("format".to_owned(), "mlx".to_owned())]);
        Array::save_safetensors(held.iter().map(|(name, array)| (name, array)), &metadata, &path).map_err(
            |error| LoadError::Mlx { what: path.display().to_string(), message: error.to_string() },
        )?;
        self.files.push(held.into_iter().map(|(name, _)| name).collect());
        self.bytes += std::mem::take(&mut self.held_bytes);
        Ok(())
    }

    /// Names the shards and says what is in each.
    fn finish(mut self) -> Result<(usize, u64), LoadError> {
        if !self.held.is_empty() {
            self.flush()?;
        }
        let count = self.files.len();
        let mut map = Map::new();
        for (index, names) in self.files.iter().enumerate() {
            let file = match count {
                1 => directory::SINGLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            let path = self.shard(index);
            fs::rename(&path, self.to.join(&file)).map_err(|error| LoadError::io(&path, error))?;
            map.extend(names.iter().map(|name| (name.clone(), Value::from(file.clone()))));
        }
        let index = json!({ "metadata": { "total_size": self.bytes }, "weight_map": map });
        write_json(&self.to.join(directory::INDEX), &index)?;
        Ok((count, self.bytes))
    }
}

fn write_json(path: &Path, value: &Value) -> Result<(), LoadError> {
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    fs::write(path, text).map_err(|error| LoadError::io(path, error))
}

/// What a folder has beside weights and configuration: tokenizer, template, settings of generation.
fn copy_others(from: &Path, to: &Path) -> Result<(), LoadError> {
    const WEIGHTS: [&str; 5] = ["safetensors", "bin", "gguf", "pth", "pt"];
    let failed = |error| LoadError::io(from, error);
    for entry in fs::read_dir(from).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_file()
            && !WEIGHTS.contains(&extension)
            && ![directory::INDEX, "config.json"].contains(&name)
        {
            fs::copy(&path, to.join(name)).map_err(|error| LoadError::io(&path, error))?;
        }
    }
    Ok(())
}

/// The same of a `.gguf` file.
fn write_tokenizer(checkpoint: &Checkpoint, to: &Path) -> Result<(), LoadError> {
    let assets = &checkpoint.assets;
    let path = to.join("tokenizer.json");
    fs::write(&path, &assets.tokenizer_json).map_err(|error| LoadError::io(&path, error))?;
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": assets.bos_token,
        "eos_token": assets.eos_token,
        "chat_template": assets.chat_template,
        "clean_up_tokenization_spaces": false,
    });
    write_json(&to.join("tokenizer_config.json"), &settings)?;
    write_json(&to.join("generation_config.json"), &json!({ "eos_token_id": checkpoint.eos_tokens }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixed_bits_go_where_they_matter() {
        let more = |prefix: &str| mixed_bits(prefix, "model.", 16, 4) > 4;
        assert!(more("lm_head") && more("model.embed_tokens"));
        assert!(more("model.layers.0.self_attn.v_proj") && more("model.layers.15.mlp.down_proj"));
        assert!(!more("model.layers.0.self_attn.q_proj") && !more("model.layers.2.mlp.down_proj"));
        assert!(more("model.layers.4.mlp.down_proj"));
        assert_eq!(
            [2, 3, 4, 5, 6, 8].map(|bits| mixed_bits("lm_head", "model.", 2, bits)),
            [4, 4, 6, 8, 8, 8]
        );
    }
}
