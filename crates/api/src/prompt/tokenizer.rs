//! A model's tokenizer and chat template, loaded.

use super::{
    ByteLevel, ChatTemplate, TemplateError,
    pieces::Pieces,
    segments::{SegmentCache, SegmentKey, Segments},
};
use std::{collections::HashSet, fmt, ops::Range, sync::Arc};
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
    /// Their texts, by id.
    special: Vec<(String, TokenId)>,
    special_ids: HashSet<TokenId>,
    template: Option<ChatTemplate>,
    segments: Option<Segments>,
    known: SegmentCache,
    pieces: Pieces,
}

/// A prompt of which a part is tokens already; see [`ModelText::known`].
#[derive(Debug)]
pub(crate) struct PromptTokens {
    text: String,
    /// In order.
    segments: Vec<Segment>,
}

/// A part of a text, and its tokens where these are known.
#[derive(Debug)]
struct Segment {
    bytes: Range<usize>,
    key: SegmentKey,
    tokens: Option<Arc<[TokenId]>>,
}

impl PromptTokens {
    /// Bytes that are still to be read.
    pub(crate) fn unread_bytes(&self) -> usize {
        if self.segments.is_empty() {
            return self.text.len();
        }
        let unread = self.segments.iter().filter(|segment| segment.tokens.is_none());
        unread.map(|segment| segment.bytes.len()).sum()
    }
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
        let special = added.iter().filter(|(_, token)| token.special && !token.content.is_empty());
        let mut special: Vec<(String, TokenId)> =
            special.map(|(&id, token)| (token.content.clone(), id)).collect();
        special.sort_by_key(|&(_, id)| id);
        let special_ids = special.iter().map(|&(_, id)| id).collect();
        let template = assets
            .chat_template
            .as_deref()
            .map(|source| ChatTemplate::new(source, assets.bos_token.as_deref(), assets.eos_token.as_deref()))
            .transpose()?;
        let byte_level = ByteLevel::of(&tokenizer);
        let segments = Segments::new(added.values());
        let pieces = Pieces::of(&tokenizer);
        let known = SegmentCache::default();
        Ok(Self { tokenizer, byte_level, special, special_ids, template, segments, known, pieces })
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

    /// What is known of a prompt by those before it. Takes little time: the prompt is hashed and looked up.
    pub(crate) fn known(&self, text: String) -> PromptTokens {
        let segments = self.segments.as_ref().map(|segments| segments.of(&text)).unwrap_or_default();
        let keys: Vec<SegmentKey> = segments.iter().map(|segment| SegmentKey::new(&text, segment)).collect();
        let known = self.known.get(&keys);
        let segments = segments.into_iter().zip(keys).zip(known);
        let segments = segments.map(|((bytes, key), tokens)| Segment { bytes, key, tokens }).collect();
        PromptTokens { text, segments }
    }

    /// The tokens of a prompt, without any around it: those of its whole text, as [`ModelText::encode`] gives them.
    pub(crate) fn read(&self, prompt: PromptTokens) -> Result<Vec<TokenId>, String> {
        let PromptTokens { text, segments } = prompt;
        if segments.is_empty() {
            return self.encode(&text, false);
        }
        let (mut all, mut new) = (Vec::new(), Vec::new());
        for Segment { bytes, key, tokens } in segments {
            let tokens = match tokens {
                Some(tokens) => tokens,
                None => {
                    let tokens: Arc<[TokenId]> = self.encode(&text[bytes], false)?.into();
                    new.push((key, tokens.clone()));
                    tokens
                }
            };
            all.extend_from_slice(&tokens);
        }
        self.known.insert(new);
        Ok(all)
    }

    /// The text of some tokens, with that of special ones.
    pub(crate) fn decode(&self, tokens: &[TokenId]) -> Result<String, String> {
        self.tokenizer.decode(tokens, false).map_err(|error| error.to_string())
    }

    /// The text of some tokens; special ones have none.
    pub(crate) fn plain(&self, tokens: &[TokenId]) -> Result<String, String> {
        self.tokenizer.decode(tokens, true).map_err(|error| error.to_string())
    }

    /// A token as the vocabulary spells it; none for an id that it leaves out.
    pub(crate) fn spelling(&self, token: TokenId) -> Option<String> {
        self.tokenizer.id_to_token(token)
    }

    /// Whether a token has text of its own: it is neither special nor outside of the vocabulary.
    pub(crate) fn has_text(&self, token: TokenId) -> bool {
        !self.is_special(token) && self.tokenizer.id_to_token(token).is_some()
    }

    pub(crate) fn is_special(&self, token: TokenId) -> bool {
        self.special_ids.contains(&token)
    }

    /// Special tokens and their texts, by id.
    pub(crate) fn special_tokens(&self) -> &[(String, TokenId)] {
        &self.special
    }

    /// The bytes that a token stands for, whatever is around it; none of one that is not in the vocabulary.
    pub(crate) fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        match self.tokenizer.id_to_token(token) {
            Some(piece) if self.is_special(token) => piece.into_bytes(),
            Some(piece) => self.pieces.bytes(piece),
            None => Vec::new(),
        }
    }
}

impl fmt::Debug for ModelText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelText").field("template", &self.template.is_some()).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
