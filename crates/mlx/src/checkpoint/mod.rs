//! A model's files, opened: a folder of safetensors or a `.gguf` file becomes a [`Checkpoint`].
//!
//! Both kinds end in the same shape: a configuration and tensors under Hugging Face's names, a `tokenizer.json`.
//! `directory` and `gguf_model` open them; below them `safetensors` and `gguf` read headers without trusting them,
//! `gguf_blocks` reads tensors, `gguf_config` and `gguf_tokenizer` translate metadata. Nothing of the weights is read
//! here but headers and samples for the fingerprint: tensors are read when the model takes and evaluates them.

mod convert;
mod directory;
mod error;
mod fingerprint;
mod gguf;
mod gguf_blocks;
mod gguf_config;
mod gguf_groups;
mod gguf_model;
mod gguf_tokenizer;
#[cfg(test)]
mod gguf_writer;
mod memory;
mod packed;
mod quantization;
mod safetensors;
mod tensors;
#[cfg(test)]
mod tests;
mod verify;

pub use crate::load::inspect::{Inspection, inspect};
pub use convert::{ConvertSettings, Converted, convert};
pub(crate) use directory::{INDEX, SINGLE, shards_of_index};
pub use error::LoadError;
pub(crate) use memory::available as available_memory;
pub use memory::memory_check;
pub use packed::{Mode, Packed, Packing};
pub use tensors::{Tensors, Weight};
pub use verify::verify;

use fingerprint::{Fingerprint, WeightFile};
use std::path::Path;
use types::{BlockHash, ModelAssets, TokenId};

/// A model's files, opened.
#[derive(Debug)]
pub struct Checkpoint {
    /// A `config.json`; of a `.gguf` file the same made from its metadata.
    pub config: serde_json::Value,
    /// The weights, lazily.
    pub tensors: Tensors,
    /// Tokenizer, chat template and the tokens that it names.
    pub assets: ModelAssets,
    /// Every token that ends a text, each once.
    pub eos_tokens: Vec<TokenId>,
    /// Equal for equal weights, wherever they lie: a hash over the configuration and, of each file, its size, its
    /// tensors' names, types and shapes, and 32 samples of 64 KiB spread over its bytes.
    pub fingerprint: BlockHash,
    /// Size of the files that hold the weights.
    pub bytes: u64,
    /// When the newest of them was changed, in seconds since 1970.
    pub created_s: u64,
}

impl Checkpoint {
    /// Opens the folder or `.gguf` file at `path`; `progress` hears what is being read and how far it is, 0 to 1.
    ///
    /// # Errors
    /// [`LoadError`] naming the file that is missing, damaged or not supported.
    pub fn open(path: &Path, progress: &mut dyn FnMut(&str, f32)) -> Result<Self, LoadError> {
        if path.is_dir() {
            return directory::open(path, progress);
        }
        if !path.exists() {
            let needed_for = "it should be the model: a folder or a .gguf file".to_owned();
            return Err(LoadError::MissingFile { path: path.to_owned(), needed_for });
        }
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            return gguf_model::open(path, progress);
        }
        Err(LoadError::unsupported(
            path,
            "a model is a folder with config.json and safetensors, or a .gguf file",
        ))
    }

    fn from_parts(parts: Parts<'_>) -> Result<Self, LoadError> {
        let Parts { config, tensors, assets, mut eos_tokens, files } = parts;
        let place = files.first().map_or_else(|| Path::new(""), |file| file.path);
        if !assets.fits() {
            let reason = format!("its tokenizer and chat template have {} bytes together", assets.bytes());
            return Err(LoadError::unsupported(place, reason));
        }
        let Fingerprint { hash, bytes, created_s } = Fingerprint::of(&config.to_string(), files)?;
        let mut seen = std::collections::BTreeSet::new();
        eos_tokens.retain(|token| seen.insert(*token));
        Ok(Self { config, tensors, assets, eos_tokens, fingerprint: hash, bytes, created_s })
    }
}

/// What both kinds of file come down to.
struct Parts<'a> {
    config: serde_json::Value,
    tensors: Tensors,
    assets: ModelAssets,
    eos_tokens: Vec<TokenId>,
    files: &'a [WeightFile<'a>],
}
