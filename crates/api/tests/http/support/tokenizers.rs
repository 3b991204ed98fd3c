//! Small tokenizers of the two kinds that models have, made here: no file of a model is needed.

use serde_json::{Map, Value, json};

/// Special tokens of [`byte_level`], from id 256 on.
pub(crate) const SPECIAL: [&str; 3] = ["<|im_start|>", "<|im_end|>", "<s>"];

/// A byte-level BPE without merges, as GPT-2 has it: the token of a byte has the byte's value as its id.
pub(crate) fn byte_level() -> String {
    byte_level_with(&[])
}

/// The same with further special tokens, from id 259 on.
pub(crate) fn byte_level_with(more: &[&str]) -> String {
    let mut vocab = Map::new();
    let mut others = 0x100;
    for byte in 0..=255_u32 {
        let char = match byte {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => byte,
            _ => {
                others += 1;
                others - 1
            }
        };
        vocab.insert(char::from_u32(char).unwrap().to_string(), json!(byte));
    }
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let special = [&SPECIAL, more].concat();
    tokenizer(&special, 256, byte_level.clone(), Value::Null, byte_level, vocab, false)
}

/// A tokenizer of Llama 2's kind: pieces with `▁` for a space, and bytes where no piece fits. Ids: 0–2 special,
/// 3–258 bytes, then [`PIECES`].
pub(crate) fn byte_fallback() -> String {
    let mut vocab = Map::new();
    for (id, token) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
        vocab.insert(token.to_owned(), json!(id));
    }
    for byte in 0..=255_u32 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(byte + 3));
    }
    for (index, piece) in PIECES.into_iter().enumerate() {
        vocab.insert(piece.to_owned(), json!(index + 259));
    }
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]});
    let normalizer = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]});
    tokenizer(&["<unk>", "<s>", "</s>"], 0, Value::Null, normalizer, decoder, vocab, true)
}

/// Pieces of [`byte_fallback`] that are no bytes.
pub(crate) const PIECES: [&str; 8] = ["▁", "▁a", "a", "b", "é", "▁é", "▁▁", "."];

/// Special tokens of [`words`].
pub(crate) const WORDS_SPECIAL: [&str; 5] = ["<|im_start|>", "<|im_end|>", "<l>", "<r>", "<|im"];

/// A tokenizer whose parts all look around them: `Metaspace`, at the beginning of a text only or before every piece,
/// special tokens that take in the spaces on their left (`<l>`) or right (`<r>`), one that begins as others do, and one that
/// is looked for in normalized text (`ab a`).
pub(crate) fn words(first: bool) -> String {
    let mut vocab = Map::new();
    for (id, token) in
        ["<unk>", "▁", "a", "b", ".", "é", "▁a", "▁ab", "ab", "\n", "<", "|"].into_iter().enumerate()
    {
        vocab.insert(token.to_owned(), json!(id));
    }
    let scheme = if first { "first" } else { "always" };
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
    let normalizer = json!({"type": "Replace", "pattern": {"String": "b."}, "content": "."});
    let json = tokenizer(&WORDS_SPECIAL, 12, metaspace.clone(), normalizer, metaspace, vocab, true);
    let mut json: Value = serde_json::from_str(&json).unwrap();
    json["model"]["byte_fallback"] = json!(false);
    json["model"]["merges"] = json!([["a", "b"], ["▁", "a"], ["▁", "ab"]]);
    json["added_tokens"][2]["lstrip"] = json!(true);
    json["added_tokens"][3]["rstrip"] = json!(true);
    let normalized = json!({
        "id": 17, "content": "ab a", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": true, "special": false,
    });
    json["added_tokens"].as_array_mut().unwrap().push(normalized);
    json.to_string()
}

fn tokenizer(
    special: &[&str],
    special_from: usize,
    pre_tokenizer: Value,
    normalizer: Value,
    decoder: Value,
    vocab: Map<String, Value>,
    byte_fallback: bool,
) -> String {
    let added = special.iter().enumerate().map(|(index, content)| {
        json!({
            "id": special_from + index, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        })
    });
    // Truncation as training leaves it behind in some files: it must not shorten prompts.
    let truncation = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    json!({
        "version": "1.0",
        "truncation": truncation,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": decoder,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": byte_fallback.then_some("<unk>"),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": byte_fallback,
            "byte_fallback": byte_fallback, "vocab": vocab, "merges": [],
        },
    })
    .to_string()
}
