//! A model's tokenizer and chat template, loaded.

use super::{ByteLevel, ChatTemplate, TemplateError};
use std::{collections::HashSet, fmt};
use tokenizers::Tokenizer;
use types::{ModelAssets, TokenId};

/// Why a model's assets cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LoadError {
    #[error("tokenizer.json: {0}")]
    Tokenizer(String),
    #[error(transparent)]
    Template(#[from] TemplateError),
}

/// What turns a model's messages into tokens and its tokens into text.
pub(crate) struct ModelText {
    tokenizer: Tokenizer,
    /// The fast way to the same tokens, where the tokenizer is of its kind.
    byte_level: Option<ByteLevel>,
    special: HashSet<TokenId>,
    template: Option<ChatTemplate>,
}

impl ModelText {
    /// Parses a model's assets: up to a second for a large vocabulary, so not for a thread that serves others.
    pub(crate) fn load(assets: &ModelAssets) -> Result<Self, LoadError> {
        let mut tokenizer = Tokenizer::from_bytes(assets.tokenizer_json.as_bytes())
            .map_err(|error| LoadError::Tokenizer(error.to_string()))?;
        // Left over from training in some files; a prompt is never to be cut or filled up silently.
        tokenizer.with_truncation(None).map_err(|error| LoadError::Tokenizer(error.to_string()))?;
        tokenizer.with_padding(None);
        let added = tokenizer.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let template = assets
            .chat_template
            .as_deref()
            .map(|source| ChatTemplate::new(source, assets.bos_token.as_deref(), assets.eos_token.as_deref()))
            .transpose()?;
        let byte_level = ByteLevel::of(&tokenizer);
        Ok(Self { tokenizer, byte_level, special, template })
    }

    /// Whether texts are encoded the fast way.
    pub(crate) fn is_byte_level(&self) -> bool {
        self.byte_level.is_some()
    }

    pub(crate) fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The tokens of a text, with those that the tokenizer puts around every text if `special`.
    pub(crate) fn encode(&self, text: &str, special: bool) -> Result<Vec<TokenId>, String> {
        if let (Some(byte_level), false) = (&self.byte_level, special) {
            return byte_level.encode(&self.tokenizer, text);
        }
        let encoding = self.tokenizer.encode_fast(text, special).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of some tokens; special ones have none.
    pub(crate) fn decode(&self, tokens: &[TokenId]) -> Result<String, String> {
        self.tokenizer.decode(tokens, true).map_err(|error| error.to_string())
    }

    /// Whether a token has text at all: it is neither special nor outside of the vocabulary.
    pub(crate) fn has_text(&self, token: TokenId) -> bool {
        !self.special.contains(&token) && self.tokenizer.id_to_token(token).is_some()
    }
}

impl fmt::Debug for ModelText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelText").field("template", &self.template.is_some()).finish_non_exhaustive()
    }
}
