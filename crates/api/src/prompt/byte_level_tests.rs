//! The same tokens as the library's, whatever the text, the first time and every time after it.

use super::*;
use crate::tokenizers_for_tests::{byte_fallback, byte_level};
use proptest::prelude::*;
use serde_json::{Value, json};

/// As Qwen 2 has it.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words that some merges of the test's tokenizer make longer than a byte.
const MERGES: [(&str, &str); 6] = [("a", "b"), ("Ġ", "a"), ("Ġa", "b"), ("ab", "c"), ("1", "2"), ("Ã", "©")];

/// The tests' byte-level tokenizer with other steps, and merges so that borders of words show.
fn tokenizer(pre_tokenizer: Value, change: impl FnOnce(&mut Value)) -> Tokenizer {
    let mut json: Value = serde_json::from_str(&byte_level()).unwrap();
    json["pre_tokenizer"] = pre_tokenizer;
    json["truncation"] = Value::Null;
    let model = &mut json["model"];
    for (index, (left, right)) in MERGES.iter().enumerate() {
        model["vocab"][format!("{left}{right}")] = json!(300 + index);
    }
    model["merges"] = MERGES.iter().map(|(left, right)| json!([left, right])).collect();
    change(&mut json);
    Tokenizer::from_bytes(json.to_string()).unwrap()
}

fn bytes(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn after(step: Value, use_regex: bool) -> Value {
    json!({"type": "Sequence", "pretokenizers": [step, bytes(use_regex)]})
}

fn kinds() -> Vec<Tokenizer> {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let llama3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|");
    // Leaves gaps between its matches, and is not known by hand.
    let other = r"[a-c]+|\d\d|<\|";
    let digits = json!({"type": "Digits", "individual_digits": true});
    vec![
        tokenizer(bytes(false), |_| ()),
        tokenizer(bytes(true), |_| ()),
        tokenizer(after(digits, true), |_| ()),
        tokenizer(after(split(QWEN2), false), |json| json["normalizer"] = json!({"type": "NFC"})),
        tokenizer(after(split(&llama3), false), |_| ()),
        tokenizer(after(split(other), true), |json| json["added_tokens"][1]["normalized"] = json!(true)),
    ]
}

fn check(tokenizer: &Tokenizer, ours: &ByteLevel, text: &str) {
    let expected = tokenizer.encode_fast(text, false).unwrap();
    assert_eq!(ours.encode(tokenizer, text).unwrap(), expected.get_ids(), "{text:?}");
}

thread_local! {
    static KINDS: Vec<(Tokenizer, ByteLevel)> = kinds()
        .into_iter()
        .map(|tokenizer| { let ours = ByteLevel::of(&tokenizer).expect("of this kind"); (tokenizer, ours) })
        .collect();
}

proptest! {
    /// Cut differently, the words would.
    #[test]
    fn words_as_the_expressions(text in r"([ abcstmdrevlRVLS'0-9.,!<>\n\r\t\x0b\x00]|'re|'LL){0,24}") {
        for pattern in [words::GPT2, QWEN2, &QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")] {
            let words = Words::of(pattern).expect("known");
            let regex = SysRegex::new(pattern).unwrap();
            let mut at = 0;
            let ends = std::iter::from_fn(|| (at < text.len()).then(|| { at = words.end(text.as_bytes(), at); at }));
            let expected: Vec<usize> = regex.find_iter(&text).map(|(_, end)| end).collect();
            prop_assert_eq!(ends.collect::<Vec<_>>(), expected, "{:?}", pattern);
        }
    }

    /// With a word's tokens taken for another's, or cut elsewhere, the merges would differ.
    #[test]
    fn as_the_library(text in r"([ abcAé0-9'\n\t.½😀]|<\|im_start\|>|<\|im_end\|>|<s>|'re|\PC){0,40}", times in 1..40_usize) {
        KINDS.with(|kinds| for (tokenizer, ours) in kinds {
            check(tokenizer, ours, &text);
            check(tokenizer, ours, &text.repeat(times));
        });
    }
}

#[test]
fn other_kinds_are_left_to_the_library() {
    let none = |what: &str, tokenizer: Tokenizer| assert!(ByteLevel::of(&tokenizer).is_none(), "{what}");
    none("pieces with ▁", Tokenizer::from_bytes(byte_fallback()).unwrap());
    let prefixed =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    none("a space before the text", tokenizer(prefixed, |_| ()));
    none(
        "digits in groups",
        tokenizer(after(json!({"type": "Digits", "individual_digits": false}), true), |_| ()),
    );
    let stripping = |json: &mut Value| json["added_tokens"][0]["lstrip"] = json!(true);
    none("added tokens with spaces", tokenizer(bytes(true), stripping));
    none("lower case", tokenizer(bytes(true), |json| json["normalizer"] = json!({"type": "Lowercase"})));
    none("dropout", tokenizer(bytes(true), |json| json["model"]["dropout"] = json!(0.5)));
}

#[test]
fn what_is_kept_is_bounded() {
    let tokenizer = tokenizer(bytes(true), |_| ());
    let ours = ByteLevel::of(&tokenizer).unwrap();
    for number in 0..WORDS_MAX + 10 {
        ours.words.write().unwrap().keep(&number.to_string(), &[1]);
    }
    assert!(ours.words.read().unwrap().known.len() < 1000);
    check(&tokenizer, &ours, "ab 12 ab");
}
