use super::*;
use crate::tokenizers_for_tests as tokenizers;
use proptest::{collection::vec, prelude::*};

fn load(tokenizer_json: String) -> ModelText {
    let assets = ModelAssets { tokenizer_json, chat_template: None, bos_token: None, eos_token: None };
    ModelText::load(&assets).expect("a valid tokenizer")
}

/// Texts of words, spaces, special tokens and pieces of these, long enough to have several segments.
fn texts(special: &'static [&'static str]) -> impl Strategy<Value = String> {
    let words = prop_oneof![
        Just(String::new()),
        "[ab é.]{1,30}",
        "[ \n]{1,3}",
        (1..40usize).prop_map(|count| "ab a. ".repeat(count)),
        Just("<|im".to_owned()),
        Just("_start|>".to_owned()),
        Just("<".to_owned()),
    ];
    let word = prop_oneof![3 => words, 2 => prop::sample::select(special).prop_map(str::to_owned)];
    vec(word, 0..60).prop_map(|words| words.concat())
}

/// Each text is that of the one before and more: the tokens of all are those of the whole texts.
fn check(text: &ModelText, parts: &[String]) -> Result<usize, TestCaseError> {
    let mut whole = String::new();
    let mut saved = 0;
    for part in parts {
        whole.push_str(part);
        let prompt = text.known(whole.clone());
        saved += whole.len() - prompt.unread_bytes();
        let tokens = text.read(prompt).expect("tokens");
        let expected = text.tokenizer.encode_fast(whole.as_str(), false).expect("tokens");
        prop_assert_eq!(&tokens, expected.get_ids(), "of {:?}", whole);
    }
    Ok(saved)
}

proptest! {
    #[test]
    fn segments_have_the_tokens_of_the_whole_text(
        byte_level in vec(texts(&["<|im_start|>", "<|im_end|>", "<s>"]), 1..4),
        byte_fallback in vec(texts(&["<s>", "</s>", "<unk>"]), 1..4),
        words in vec(texts(&tokenizers::WORDS_SPECIAL), 1..4),
    ) {
        check(&load(tokenizers::byte_level()), &byte_level)?;
        check(&load(tokenizers::byte_fallback()), &byte_fallback)?;
        for first in [false, true] {
            check(&load(tokenizers::words(first)), &words)?;
        }
    }
}

#[test]
fn the_next_turn_costs_its_new_part() {
    let text = load(tokenizers::byte_level());
    let turn = |number: usize| format!("<|im_start|>user\n{number} {}<|im_end|>\n", "hello ".repeat(200));
    let parts: Vec<String> = (0..50).map(turn).collect();
    let saved = check(&text, &parts).expect("equal");
    let all: usize = (1..=50).map(|turns| parts[..turns].concat().len()).sum();
    assert!(saved as f64 > all as f64 * 0.9, "{saved} of {all} bytes");
    let next = text.known(parts.concat() + "<|im_start|>assistant\n");
    assert!(next.unread_bytes() < 1500, "{}", next.unread_bytes());
}
