//! What is given out token by token is what the tokenizer makes of all tokens at once.

use super::*;
use crate::tokenizers_for_tests::{byte_fallback, byte_level};
use proptest::{collection::vec, prelude::*};
use types::ModelAssets;

fn load(tokenizer_json: String) -> Arc<ModelText> {
    let assets = ModelAssets { tokenizer_json, chat_template: None, bos_token: None, eos_token: None };
    Arc::new(ModelText::load(&assets).unwrap())
}

/// The text after each token, and at the end; the window stays small.
fn pieces(mut detokenizer: Detokenizer, tokens: &[TokenId]) -> Vec<String> {
    let mut pieces = Vec::new();
    for &token in tokens {
        let mut piece = String::new();
        detokenizer.push(token, &mut piece).unwrap();
        assert!(detokenizer.window.len() <= WINDOW_TOKENS_MAX);
        pieces.push(piece);
    }
    let mut piece = String::new();
    detokenizer.finish(&mut piece).unwrap();
    pieces.push(piece);
    pieces
}

thread_local! {
    static BYTE_LEVEL: Arc<ModelText> = load(byte_level());
    static BYTE_FALLBACK: Arc<ModelText> = load(byte_fallback());
}

proptest! {
    /// Whatever the bytes, valid or not, and with special and unknown tokens between them.
    #[test]
    fn byte_level_is_exact(tokens in vec(prop_oneof![0..260_u32, 0xc2..0xf8_u32, 0x80..0xc0_u32, 0x61..0x64_u32], 0..80)) {
        let text = BYTE_LEVEL.with(Clone::clone);
        let joined = pieces(Detokenizer::new(text.clone(), Shown::None), &tokens).concat();
        prop_assert_eq!(joined, text.plain(&tokens).unwrap());
    }

    #[test]
    fn byte_fallback_is_exact_for_text(input in "[ abcé€😀.]{0,60}") {
        let text = BYTE_FALLBACK.with(Clone::clone);
        let tokens = text.encode(&input, false).unwrap();
        let joined = pieces(Detokenizer::new(text.clone(), Shown::None), &tokens).concat();
        prop_assert_eq!(&joined, &text.plain(&tokens).unwrap());
        prop_assert_eq!(joined, input);
    }

    /// Bytes that are no text give something, in bounded memory, and what follows them is whole again.
    #[test]
    fn byte_fallback_survives_garbage(garbage in vec(0..267_u32, 0..200)) {
        let text = BYTE_FALLBACK.with(Clone::clone);
        let mut tokens = garbage;
        tokens.extend(text.encode("ab. ab. ab. ab. ab.", false).unwrap());
        let joined = pieces(Detokenizer::new(text, Shown::None), &tokens).concat();
        prop_assert!(joined.ends_with("ab. ab. ab. ab."), "{joined:?}");
    }

    /// A continuation is what decoding prompt and continuation together adds to the prompt.
    #[test]
    fn continuations_keep_their_space(prompt in "[ abé.]{1,30}", more in "[ abé€.]{0,30}") {
        let text = BYTE_FALLBACK.with(Clone::clone);
        let prompt_tokens = text.encode(&prompt, false).unwrap();
        let all = text.encode(&format!("{prompt}{more}"), false).unwrap();
        prop_assert_eq!(&all[..prompt_tokens.len()], &prompt_tokens[..]);
        let detokenizer = Detokenizer::continuing(text, Shown::None, &prompt_tokens).unwrap();
        prop_assert_eq!(pieces(detokenizer, &all[prompt_tokens.len()..]).concat(), more);
    }
}

#[test]
fn characters_come_whole_and_at_once() {
    let text = load(byte_level());
    let tokens: Vec<TokenId> = "a€b".bytes().map(TokenId::from).collect();
    assert_eq!(pieces(Detokenizer::new(text.clone(), Shown::None), &tokens), ["a", "", "", "€", "b", ""]);
    // Unfinished at the end: shown as what it is, a broken character.
    assert_eq!(pieces(Detokenizer::new(text, Shown::None), &tokens[..3]), ["a", "", "", "\u{fffd}"]);
}
