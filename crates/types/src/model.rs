//! What a cluster knows of a model without having its weights.

use crate::{BlockHash, GenerateError, TokenId, limits};
use serde::{Deserialize, Serialize};
use std::fmt;

/// BLAKE3 of a serialized [`ModelAssets`]: nodes that serve the same files agree on it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AssetsHash(pub [u8; 32]);

impl fmt::Display for AssetsHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for AssetsHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AssetsHash({self})")
    }
}

/// What routers need to know of a served model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    /// The name that clients ask for.
    pub name: String,
    /// Root of its block hashes: weights and KV format.
    pub root: BlockHash,
    /// Tokens of prompt and output together.
    pub context_tokens: u32,
    /// Tokens in its vocabulary.
    pub vocab_size: u32,
    /// Tokens that end a text.
    pub eos_tokens: Vec<TokenId>,
    /// Its tokenizer and template, to be asked for by this hash.
    pub assets: AssetsHash,
    /// Seconds since 1970 when its files were last changed, for `/v1/models`.
    pub created_s: u64,
    /// What it does.
    pub kind: ModelKind,
}

/// What a model does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelKind {
    /// It goes on with texts.
    #[default]
    Generator,
    /// It makes one vector of a text.
    Embedder {
        /// Numbers of a vector, at most [`limits::EMBED_DIMENSIONS_MAX`].
        dimensions: u32,
    },
}

impl ModelCard {
    /// Nothing for a generator, an error that names the mistake for any other model.
    ///
    /// # Errors
    /// [`GenerateError::Invalid`].
    pub fn must_generate(&self) -> Result<(), GenerateError> {
        match self.kind {
            ModelKind::Generator => Ok(()),
            ModelKind::Embedder { .. } => {
                Err(self.wrong("makes vectors of texts (/v1/embeddings); it does not generate"))
            }
        }
    }

    /// Numbers of a vector of an embedder; an error that names the mistake for any other model.
    ///
    /// # Errors
    /// [`GenerateError::Invalid`].
    pub fn must_embed(&self) -> Result<u32, GenerateError> {
        match self.kind {
            ModelKind::Embedder { dimensions } => Ok(dimensions),
            ModelKind::Generator => {
                Err(self.wrong("generates texts (/v1/chat/completions); it makes no vectors of them"))
            }
        }
    }

    fn wrong(&self, what: &str) -> GenerateError {
        let message = format!("the model {:?} {what}", self.name);
        GenerateError::Invalid { message, param: Some("model".to_owned()) }
    }
}

/// What turns text into tokens and back.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelAssets {
    /// The contents of a `tokenizer.json`.
    pub tokenizer_json: String,
    /// The chat template, in Jinja.
    pub chat_template: Option<String>,
    /// The `bos_token` that templates name.
    pub bos_token: Option<String>,
    /// The `eos_token` that templates name.
    pub eos_token: Option<String>,
}

impl ModelAssets {
    /// The hash of these assets.
    pub fn hash(&self) -> AssetsHash {
        let mut hasher = blake3::Hasher::new();
        let optional = [&self.chat_template, &self.bos_token, &self.eos_token];
        let parts = optional.map(|part| part.as_deref().map_or(&b"\0"[..], str::as_bytes));
        for part in [self.tokenizer_json.as_bytes()].into_iter().chain(parts) {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        AssetsHash(*hasher.finalize().as_bytes())
    }

    /// Bytes of all parts; at most [`limits::ASSETS_BYTES_MAX`] travel.
    pub fn bytes(&self) -> usize {
        let optional = [&self.chat_template, &self.bos_token, &self.eos_token];
        self.tokenizer_json.len()
            + optional.iter().map(|part| part.as_ref().map_or(0, String::len)).sum::<usize>()
    }

    /// Whether these may travel.
    pub fn fits(&self) -> bool {
        self.bytes() <= limits::ASSETS_BYTES_MAX
    }
}

impl fmt::Debug for ModelAssets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelAssets").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}
