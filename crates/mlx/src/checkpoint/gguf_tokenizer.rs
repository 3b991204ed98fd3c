//! Turns the tokenizer in a `.gguf` file's metadata into a `tokenizer.json`.
//!
//! Two kinds exist for the supported models. `gpt2` is byte-level BPE with a merge list; how text is cut up first is
//! only named (`tokenizer.ggml.pre`), and the patterns behind the names are those of the models' own tokenizers.
//! `llama` is SentencePiece BPE: no merges but scores, and a higher score merges first.

use super::{LoadError, gguf::Header, gguf_config::Metadata};
use serde_json::{Map, Value, json};
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};
use types::{ModelAssets, TokenId};

/// `tokenizer.ggml.token_type`: what becomes of a token in text.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// A whole tokenizer.
#[derive(Debug)]
pub(crate) struct GgufTokenizer {
    pub(crate) assets: ModelAssets,
    pub(crate) bos_token: Option<TokenId>,
    pub(crate) eos_tokens: Vec<TokenId>,
}

/// Builds the tokenizer of the file at `path`.
pub(crate) fn build(header: &Header, path: &Path) -> Result<GgufTokenizer, LoadError> {
    let metadata = Metadata::new(header, path);
    let vocabulary = Vocabulary::read(metadata)?;
    let model = metadata.needed("tokenizer.ggml.model", metadata.text("tokenizer.ggml.model"))?;
    let kind = match model {
        "gpt2" => byte_level(metadata, &vocabulary)?,
        "llama" => sentence_piece(metadata, &vocabulary)?,
        other => {
            return Err(metadata
                .unsupported(format!("the tokenizer {other:?}; \"gpt2\" and \"llama\" are supported")));
        }
    };
    let bos_token = vocabulary.special(metadata, "bos")?;
    let eos_token = vocabulary.special(metadata, "eos")?;
    let add_bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(kind.add_bos);
    let add_eos = metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": kind.normalizer,
        "pre_tokenizer": kind.pre_tokenizer,
        "post_processor": vocabulary.post_processor(bos_token.filter(|_| add_bos), eos_token.filter(|_| add_eos)),
        "decoder": kind.decoder,
        "model": kind.model,
    });
    // A chat turn may end with a token of its own.
    let turn_ends = ["eot", "eom"].map(|name| vocabulary.special(metadata, name));
    let mut eos_tokens = Vec::from_iter(eos_token);
    for token in turn_ends {
        eos_tokens.extend(token?.filter(|token| !eos_tokens.contains(token)));
    }
    let text = |token: Option<TokenId>| token.map(|token| vocabulary.tokens[token as usize].clone());
    let assets = ModelAssets {
        tokenizer_json: tokenizer.to_string(),
        chat_template: metadata.text("tokenizer.chat_template")?.map(str::to_owned),
        bos_token: text(bos_token),
        eos_token: text(eos_token),
    };
    Ok(GgufTokenizer { assets, bos_token, eos_tokens })
}

/// What the two kinds of tokenizer differ in.
struct Kind {
    model: Value,
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    /// Whether such models start a text with BOS unless their file says otherwise.
    add_bos: bool,
}

/// Tokens with their types.
struct Vocabulary<'a> {
    tokens: &'a [String],
    types: Vec<i64>,
    ids: HashMap<&'a str, usize>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: Metadata<'a>) -> Result<Self, LoadError> {
        let tokens = metadata.needed("tokenizer.ggml.tokens", metadata.texts("tokenizer.ggml.tokens"))?;
        let types = metadata.ints("tokenizer.ggml.token_type")?;
        let types = types.map_or_else(|| vec![NORMAL; tokens.len()], <[i64]>::to_vec);
        if types.len() != tokens.len() {
            let reason = format!("it has {} tokens but types of {}", tokens.len(), types.len());
            return Err(metadata.damaged(reason));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        // Of equal tokens the first counts: text cannot tell them apart.
        tokens.iter().enumerate().for_each(|(id, token)| {
            ids.entry(token.as_str()).or_insert(id);
        });
        Ok(Self { tokens, types, ids })
    }

    /// The token that `tokenizer.ggml.<name>_token_id` names.
    fn special(&self, metadata: Metadata<'_>, name: &str) -> Result<Option<TokenId>, LoadError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match metadata.int(&key)? {
            // What some converters write for "none".
            None | Some(u32::MAX) => Ok(None),
            Some(id) if (id as usize) < self.tokens.len() => Ok(Some(id)),
            Some(id) => {
                Err(metadata.damaged(format!("{key:?} is {id}, but there are {} tokens", self.tokens.len())))
            }
        }
    }

    fn vocab(&self) -> Value {
        let mut ids: Vec<_> = self.ids.iter().map(|(token, id)| (*id, *token)).collect();
        ids.sort_unstable();
        Value::Object(Map::from_iter(ids.into_iter().map(|(id, token)| (token.to_owned(), id.into()))))
    }

    /// Tokens that are matched whole: special ones, which decoding can leave out, and others.
    fn added_tokens(&self) -> Value {
        let added =
            self.types.iter().enumerate().filter(|(_, kind)| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind));
        let added = added.map(|(id, &kind)| {
            json!({
                "id": id,
                "content": self.tokens[id],
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": kind != USER_DEFINED,
            })
        });
        added.collect()
    }

    fn post_processor(&self, before: Option<TokenId>, after: Option<TokenId>) -> Value {
        if before.or(after).is_none() {
            return Value::Null;
        }
        let special = |id: TokenId| json!({"SpecialToken": {"id": self.tokens[id as usize], "type_id": 0}});
        let sequence = |name: &str| {
            let text = json!({"Sequence": {"id": name, "type_id": 0}});
            before.map(special).into_iter().chain([text]).chain(after.map(special)).collect::<Vec<_>>()
        };
        let tokens: BTreeMap<&str, Value> = [before, after]
            .into_iter()
            .flatten()
            .map(|id| {
                let token = self.tokens[id as usize].as_str();
                (token, json!({"id": token, "ids": [id], "tokens": [token]}))
            })
            .collect();
        let pair = [sequence("A"), sequence("B")].concat();
        json!({
            "type": "TemplateProcessing",
            "single": sequence("A"),
            "pair": pair,
            "special_tokens": tokens,
        })
    }
}

fn bpe(vocabulary: &Vocabulary<'_>, merges: Value) -> Value {
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": null,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": false,
        "byte_fallback": false,
        "ignore_merges": false,
        "vocab": vocabulary.vocab(),
        "merges": merges,
    })
}

fn byte_level(metadata: Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Kind, LoadError> {
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let first = |step: Value, then: Value| json!({"type": "Sequence", "pretokenizers": [step, then]});
    let split = |pattern: &str| {
        let step =
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        first(step, bytes(false))
    };
    let merges = metadata.needed("tokenizer.ggml.merges", metadata.texts("tokenizer.ggml.merges"))?;
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in merges {
        // Byte-level tokens hold no spaces: the one there is parts the two.
        let pair = merge.split_once(' ').filter(|(left, right)| {
            let known = |token: &str| vocabulary.ids.contains_key(token);
            known(left) && known(right) && known(&format!("{left}{right}"))
        });
        let Some((left, right)) = pair else {
            return Err(metadata.damaged(format!("the merge {merge:?} is not of two tokens into a third")));
        };
        pairs.push(json!([left, right]));
    }
    let mut model = bpe(vocabulary, pairs.into());
    let pre = metadata.needed("tokenizer.ggml.pre", metadata.text("tokenizer.ggml.pre"))?;
    let mut normalizer = Value::Null;
    let mut add_bos = false;
    let pre_tokenizer = match pre {
        "gpt-2" => bytes(true),
        "smollm" => first(json!({"type": "Digits", "individual_digits": true}), bytes(true)),
        "llama-bpe" | "llama3" | "llama-v3" => {
            (add_bos, model["ignore_merges"]) = (true, true.into());
            split(LLAMA3)
        }
        "qwen2" => {
            normalizer = json!({"type": "NFC"});
            split(QWEN2)
        }
        other => {
            let known = "gpt-2, smollm, llama-bpe, qwen2";
            return Err(metadata.unsupported(format!("the pre-tokenizer {other:?}; supported: {known}")));
        }
    };
    Ok(Kind { model, normalizer, pre_tokenizer, decoder: bytes(true), add_bos })
}

fn sentence_piece(metadata: Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Kind, LoadError> {
    let scores = metadata.needed("tokenizer.ggml.scores", metadata.floats("tokenizer.ggml.scores"))?;
    if scores.len() != vocabulary.tokens.len() {
        let reason = format!("it has {} tokens but scores of {}", vocabulary.tokens.len(), scores.len());
        return Err(metadata.damaged(reason));
    }
    let mut model = bpe(vocabulary, merges_of_scores(vocabulary, scores).into());
    let unknown = vocabulary.special(metadata, "unknown")?;
    let unknown =
        unknown.or_else(|| vocabulary.types.iter().position(|&kind| kind == UNKNOWN).map(|id| id as u32));
    model["unk_token"] = unknown.map(|id| vocabulary.tokens[id as usize].as_str()).into();
    (model["fuse_unk"], model["byte_fallback"]) = (true.into(), true.into());

    let replace =
        |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", "▁")];
    let mut decoders = vec![replace("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(Kind {
        model,
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        add_bos: true,
    })
}

/// Every way to make a token of two others, in the order in which SentencePiece would take them.
fn merges_of_scores(vocabulary: &Vocabulary<'_>, scores: &[f64]) -> Vec<Value> {
    let mut merges = Vec::new();
    let normal = vocabulary.ids.iter().filter(|&(_, &id)| vocabulary.types[id] == NORMAL);
    for (token, &id) in normal {
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(&one), Some(&two)) = (vocabulary.ids.get(left), vocabulary.ids.get(right)) {
                merges.push((scores[id], id, one, two));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    let texts = |(_, _, left, right)| json!([vocabulary.tokens[left], vocabulary.tokens[right]]);
    merges.into_iter().map(texts).collect()
}
