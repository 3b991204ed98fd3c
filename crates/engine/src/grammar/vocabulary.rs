//! [`Vocabulary`]: the bytes that a tokenizer's tokens stand for.

use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};
use serde::Deserialize;
use std::{collections::BTreeMap, sync::Arc};
use types::TokenId;

/// Bytes of one token at most: the depth of a trie that `llguidance` can walk.
const TOKEN_BYTES_MAX: usize = 1000;
/// Tokens that the trie has numbers for.
const TOKENS_MAX: u32 = (1 << 22) - 1;

/// Why a tokenizer cannot be used with grammars.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VocabularyError {
    /// Its file is not one.
    #[error("tokenizer.json cannot be read: {reason}")]
    Unreadable {
        /// What the parser said.
        reason: String,
    },
    /// Its tokens are not bytes of a text.
    #[error("this model's tokenizer cannot be used with grammars: {reason}")]
    Unusable {
        /// What is wrong.
        reason: String,
    },
}

/// The bytes that each token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary {
    /// Of each token; empty where it is never part of a text.
    words: Vec<Vec<u8>>,
    /// Tokens that end a text.
    ends: Vec<TokenId>,
}

/// What is read of `tokenizer.json`.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    decoder: Option<serde_json::Value>,
    pre_tokenizer: Option<serde_json::Value>,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: TokenId,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    vocab: Words,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    /// BPE.
    ByText(BTreeMap<String, TokenId>),
    /// Unigram, each with its score.
    InOrder(Vec<(String, f64)>),
}

/// How a token's text says what bytes it stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// A printable character for each byte, as GPT-2 began it.
    ByteLevel,
    /// Text in which `▁` is a space, and `<0x0A>` a byte.
    ByteFallback,
}

impl Vocabulary {
    /// Tokens of which `words` says the bytes; one without bytes is never part of a text, and tokens that end texts are
    /// not either.
    pub fn new(mut words: Vec<Vec<u8>>, ends: Vec<TokenId>) -> Self {
        let ends: Vec<TokenId> = ends.into_iter().filter(|&end| (end as usize) < words.len()).collect();
        for &end in &ends {
            words[end as usize].clear();
        }
        Self { words, ends }
    }

    /// That of a `tokenizer.json`, filled up or cut to the `size` of the model's vocabulary. Special tokens are part of a
    /// text only where a Lark grammar names them.
    ///
    /// # Errors
    /// [`VocabularyError`] where it is not a tokenizer, or one that does not say which bytes its tokens stand for.
    pub fn from_tokenizer_json(json: &str, size: u32, ends: &[TokenId]) -> Result<Self, VocabularyError> {
        let file: File = serde_json::from_str(json)
            .map_err(|error| VocabularyError::Unreadable { reason: error.to_string() })?;
        let has = |kind: &str| {
            let parts = file.decoder.iter().chain(&file.pre_tokenizer);
            parts.into_iter().any(|part| has_kind(part, kind))
        };
        let spelling = if has("ByteLevel") {
            Spelling::ByteLevel
        } else if has("ByteFallback") || has("Metaspace") {
            Spelling::ByteFallback
        } else {
            let reason = "it is neither byte-level nor has it tokens for single bytes".to_owned();
            return Err(VocabularyError::Unusable { reason });
        };
        let bytes = byte_of_char();
        let mut words = vec![Vec::new(); size as usize];
        let mut put = |token: TokenId, word: Vec<u8>| {
            if let Some(place) = words.get_mut(token as usize).filter(|_| word.len() <= TOKEN_BYTES_MAX) {
                *place = word;
            }
        };
        let mut put_text = |token: TokenId, text: &str| put(token, word_of(text, spelling, &bytes));
        match &file.model.vocab {
            Words::ByText(tokens) => tokens.iter().for_each(|(text, &token)| put_text(token, text)),
            Words::InOrder(tokens) => (0..).zip(tokens).for_each(|(token, (text, _))| put_text(token, text)),
        }
        for added in &file.added_tokens {
            let marker: &[u8] = if added.special { &[TokTrie::SPECIAL_TOKEN_MARKER] } else { &[] };
            put(added.id, [marker, added.content.as_bytes()].concat());
        }
        Ok(Self::new(words, ends.to_vec()))
    }

    /// Tokens.
    pub fn size(&self) -> u32 {
        self.words.len() as u32
    }

    /// Tokens that end a text.
    pub fn ends(&self) -> &[TokenId] {
        &self.ends
    }

    /// The bytes that a token stands for; none for one that is not part of a text.
    pub fn word(&self, token: TokenId) -> &[u8] {
        self.words.get(token as usize).map_or(&[], Vec::as_slice)
    }

    /// As `llguidance` takes it. Nothing is forced to be cut as a tokenizer would.
    pub(super) fn environment(&self) -> Result<TokEnv, VocabularyError> {
        let unusable = |reason: &str| Err(VocabularyError::Unusable { reason: reason.to_owned() });
        if self.words.iter().all(Vec::is_empty) {
            return unusable("it has no tokens");
        }
        if self.size() > TOKENS_MAX {
            return unusable("it has too many tokens");
        }
        let info = TokRxInfo::new(self.size(), self.ends.first().copied().unwrap_or(INVALID_TOKEN));
        let mut trie = TokTrie::from(&info, &self.words);
        if !self.ends.is_empty() {
            trie = trie.with_eos_tokens(&self.ends);
        }
        Ok(Arc::new(ApproximateTokEnv::new(trie)))
    }
}

fn has_kind(part: &serde_json::Value, kind: &str) -> bool {
    let own = part.get("type").and_then(|name| name.as_str()) == Some(kind);
    let parts = ["decoders", "pretokenizers"].into_iter().filter_map(|name| part.get(name)?.as_array());
    own || parts.flatten().any(|part| has_kind(part, kind))
}

fn word_of(text: &str, spelling: Spelling, bytes: &BTreeMap<char, u8>) -> Vec<u8> {
    match spelling {
        Spelling::ByteLevel => {
            let word: Option<Vec<u8>> = text.chars().map(|char| bytes.get(&char).copied()).collect();
            word.unwrap_or_default()
        }
        Spelling::ByteFallback => match byte_named(text) {
            Some(byte) => vec![byte],
            None => text.replace('▁', " ").into_bytes(),
        },
    }
}

/// `<0x0A>`: the byte that it names.
fn byte_named(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// GPT-2's printable character of each byte: itself where it is printable in Latin-1, else one from U+0100 on.
fn byte_of_char() -> BTreeMap<char, u8> {
    let mut next = 0x100;
    let of_byte = |byte: u8| {
        let char = match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap_or_default()
            }
        };
        (char, byte)
    };
    (0..=u8::MAX).map(of_byte).collect()
}
