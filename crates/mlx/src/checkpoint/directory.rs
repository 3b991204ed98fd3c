//! Opens a model's folder as Hugging Face and MLX's tools lay it out.

use super::{
    Checkpoint, LoadError, Parts, fingerprint::WeightFile, quantization::Quantization, safetensors,
    tensors::Tensors,
};
use serde::Deserialize;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};
use types::{ModelAssets, TokenId, limits};

/// The list of shards of a model in several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The weights of a model in one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Bytes of one JSON file; the largest, tokenizers, must fit what may travel between nodes.
const JSON_BYTES_MAX: u64 = limits::ASSETS_BYTES_MAX as u64;

/// Opens the model in `folder`.
pub(crate) fn open(folder: &Path, progress: &mut dyn FnMut(&str, f32)) -> Result<Checkpoint, LoadError> {
    progress("configuration", 0.0);
    let config_path = folder.join("config.json");
    let config = json(&config_path, "it describes the model")?;
    if !config.is_object() {
        return Err(LoadError::damaged(&config_path, "it is not a JSON object"));
    }
    let quantization = Quantization::parse(&config, &config_path)?;
    let files = weight_files(folder)?;

    progress("tokenizer", 0.1);
    let tokenizer = tokenizer_files(folder)?;
    let generation = optional_json(&folder.join("generation_config.json"))?.unwrap_or_default();
    let mut eos_tokens = token_ids(&generation, "eos_token_id");
    eos_tokens.extend(token_ids(&config, "eos_token_id"));
    eos_tokens.extend(tokenizer.eos_token);

    let mut entries = BTreeMap::new();
    let mut described = Vec::new();
    for (done, path) in files.paths.iter().enumerate() {
        progress("weights", 0.5 + 0.5 * done as f32 / files.paths.len() as f32);
        let headers = safetensors::read_header(path)?;
        files.check_listed(path, &headers)?;
        safetensors::open_tensors(path, &mut entries)?;
        let tensors =
            headers.iter().map(|(name, header)| format!("{name} {} {:?}", header.dtype, header.shape));
        described.push(WeightFile { path, tensors: tensors.collect() });
    }
    let origin = files.origin.display().to_string();
    Checkpoint::from_parts(Parts {
        tensors: Tensors::new(entries, quantization, origin),
        assets: tokenizer.assets,
        eos_tokens,
        config,
        files: &described,
    })
}

/// The files that hold a folder's weights, all known to be there.
#[derive(Debug)]
struct WeightFiles {
    /// What says so: the single file or the index.
    origin: PathBuf,
    /// In the order of their names.
    paths: Vec<PathBuf>,
    /// For each tensor of an index the file that should hold it.
    listed: BTreeMap<String, String>,
}

impl WeightFiles {
    fn check_listed<T>(&self, path: &Path, headers: &BTreeMap<String, T>) -> Result<(), LoadError> {
        let Some(file) = path.file_name().and_then(|name| name.to_str()) else { return Ok(()) };
        let missing =
            self.listed.iter().find(|(name, holder)| *holder == file && !headers.contains_key(*name));
        match missing {
            None => Ok(()),
            Some((name, _)) => {
                let origin = format!("{} ({INDEX} says it is there)", path.display());
                Err(LoadError::MissingTensor { name: name.clone(), origin })
            }
        }
    }
}

/// Names of the shards in the text of an index, or why it is not one. Only plain file names are let through.
pub(crate) fn shards_of_index(text: &str) -> Result<BTreeMap<String, String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_str(text).map_err(|error| format!("it is not an index: {error}"))?;
    let plain = |name: &str| !name.contains(['/', '\\']) && name.ends_with(".safetensors");
    match index.weight_map.values().find(|name| !plain(name)) {
        Some(name) => Err(format!("it names the file {name:?}, which is not a .safetensors file beside it")),
        None if index.weight_map.is_empty() => Err("its weight_map is empty".to_owned()),
        None => Ok(index.weight_map),
    }
}

fn weight_files(folder: &Path) -> Result<WeightFiles, LoadError> {
    let (index, single) = (folder.join(INDEX), folder.join(SINGLE));
    if !index.exists() {
        if !single.exists() {
            return Err(LoadError::MissingFile { path: single, needed_for: no_weights_hint(folder) });
        }
        return Ok(WeightFiles { paths: vec![single.clone()], origin: single, listed: BTreeMap::new() });
    }
    let text = text(&index, "it lists the weights")?;
    let listed = shards_of_index(&text).map_err(|reason| LoadError::damaged(&index, reason))?;
    let names: BTreeSet<&String> = listed.values().collect();
    let paths: Vec<_> = names.into_iter().map(|name| folder.join(name)).collect();
    if let Some(path) = paths.iter().find(|path| !path.exists()) {
        let needed_for = format!("{INDEX} says it holds a part of the weights");
        return Err(LoadError::MissingFile { path: path.clone(), needed_for });
    }
    Ok(WeightFiles { origin: index, paths, listed })
}

/// What to say where a folder has no weights of ours.
fn no_weights_hint(folder: &Path) -> String {
    let names = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut names: Vec<String> = names.filter_map(|name| name.into_string().ok()).collect();
    names.sort();
    let find = |end: &str| names.iter().find(|name| name.ends_with(end));
    match (find(".gguf"), find(".bin")) {
        (Some(name), _) => {
            format!("it should hold the weights; the folder has {name:?}: give the path of that file")
        }
        (None, Some(name)) => {
            format!("it should hold the weights; {name:?} is a PyTorch file, convert it to safetensors")
        }
        (None, None) => format!("it or {INDEX} should hold the weights"),
    }
}

/// What a folder says of text and tokens.
struct TokenizerFiles {
    assets: ModelAssets,
    eos_token: Option<TokenId>,
}

fn tokenizer_files(folder: &Path) -> Result<TokenizerFiles, LoadError> {
    #[derive(Deserialize)]
    struct Added {
        id: TokenId,
        content: String,
    }
    #[derive(Deserialize)]
    struct Tokenizer {
        #[serde(default)]
        added_tokens: Vec<Added>,
        #[expect(dead_code, reason = "must be there")]
        model: serde::de::IgnoredAny,
    }
    let path = folder.join("tokenizer.json");
    let needed_for = if folder.join("tokenizer.model").exists() {
        "it holds the tokenizer; tokenizer.model alone is not enough, convert it with transformers' AutoTokenizer"
    } else {
        "it holds the tokenizer"
    };
    let tokenizer_json = text(&path, needed_for)?;
    let tokenizer: Tokenizer = serde_json::from_str(&tokenizer_json)
        .map_err(|error| LoadError::damaged(&path, format!("it is not a tokenizer: {error}")))?;

    let settings = optional_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let eos_token = special_token(&settings, "eos_token");
    let eos_id = tokenizer.added_tokens.iter().find(|added| Some(&added.content) == eos_token.as_ref());
    let assets = ModelAssets {
        chat_template: chat_template(folder, &settings)?,
        bos_token: special_token(&settings, "bos_token"),
        eos_token,
        tokenizer_json,
    };
    Ok(TokenizerFiles { eos_token: eos_id.map(|added| added.id), assets })
}

/// A token given as a text or as `{"content": text}`.
fn special_token(settings: &Value, key: &str) -> Option<String> {
    let value = settings.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// The template, where it may stand: a file of its own overrides the tokenizer's settings.
fn chat_template(folder: &Path, settings: &Value) -> Result<Option<String>, LoadError> {
    let file = folder.join("chat_template.jinja");
    if file.exists() {
        return text(&file, "it holds the chat template").map(Some);
    }
    let own = settings.get("chat_template").and_then(template_of);
    if own.is_some() {
        return Ok(own);
    }
    let file = optional_json(&folder.join("chat_template.json"))?;
    Ok(file.and_then(|file| template_of(file.get("chat_template")?)))
}

/// A template as text, or the one named "default" of a list.
fn template_of(value: &Value) -> Option<String> {
    let named = |name: &str| {
        let entry =
            value.as_array()?.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))?;
        entry.get("template")?.as_str()
    };
    value.as_str().or_else(|| named("default")).map(str::to_owned)
}

/// One token id, or a list of them.
pub(crate) fn token_ids(config: &Value, key: &str) -> Vec<TokenId> {
    let id = |value: &Value| value.as_u64().and_then(|id| TokenId::try_from(id).ok());
    match config.get(key) {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

fn text(path: &Path, needed_for: &str) -> Result<String, LoadError> {
    if !path.exists() {
        return Err(LoadError::MissingFile { path: path.to_owned(), needed_for: needed_for.to_owned() });
    }
    let size = fs::metadata(path).map_err(|error| LoadError::io(path, error))?.len();
    if size > JSON_BYTES_MAX {
        return Err(LoadError::damaged(path, format!("it has {size} bytes, over {JSON_BYTES_MAX}")));
    }
    let bytes = fs::read(path).map_err(|error| LoadError::io(path, error))?;
    String::from_utf8(bytes).map_err(|_| LoadError::damaged(path, "it is not UTF-8 text"))
}

fn json(path: &Path, needed_for: &str) -> Result<Value, LoadError> {
    let text = text(path, needed_for)?;
    serde_json::from_str(&text).map_err(|error| LoadError::damaged(path, format!("it is not JSON: {error}")))
}

fn optional_json(path: &Path) -> Result<Option<Value>, LoadError> {
    if path.exists() { json(path, "").map(Some) } else { Ok(None) }
}
