//! Byte-level BPE, as most models have it, without what makes the library's way of it slow: offsets and alignments that
//! nobody here asks for, built anew for every word.
//!
//! A text is cut where the library cuts it: at added tokens, then by the pre-tokenizer's steps into words. What is between
//! two added tokens is a *piece*, and its tokens depend on nothing else; nor do a word's. So words are kept with their
//! tokens (`segments.rs` keeps the long parts of texts). What a word becomes is always the library's answer. A tokenizer of another kind, or one that gives other tokens for [`SAMPLES`], is left to the library.

use super::words::{self, Words};
use aho_corasick::{AhoCorasick, MatchKind};
use std::{
    collections::HashMap,
    sync::{PoisonError, RwLock},
};
use tokenizers::{
    Model, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
    pre_tokenizers::split::SplitPattern, utils::SysRegex,
};
use types::TokenId;

/// Words kept with their tokens, about 6 MB; when there are more, all are forgotten. A language has fewer in common use.
const WORDS_MAX: usize = 1 << 16;
/// Bytes of a word that is kept: longer ones hardly come twice.
const WORD_BYTES_MAX: usize = 64;
/// What a tokenizer must encode here as the library does before this is used for it.
const SAMPLES: [&str; 8] = [
    "Hello, world! It's 12345.67 o'clock;  we're   here.\n\n\tfn main() { let x = \"ü\"; }\r\n",
    "Ünïcödé Straße naïve CAFÉ — “quotes” … ½ ² ③ Ⅷ",
    "日本語のテキスト、中文文本。 한국어 텍스트 ไทย العربية עברית हिन्दी",
    "emoji 😀👩‍👩‍👧‍👦 🇩🇪 e\u{301} \u{a0}nbsp\u{2003}em\u{200b}zero",
    "  leading and trailing   \n \n   ",
    "<html><!-- a --></html> http://x.y/z?a=1&b=2#c  __init__ snake_case camelCase HTTPServer2Go",
    "\u{0}\u{1}\u{7f}\u{fffd}",
    "",
];

/// The tokenizer's own way to cut a text, and what is known of words.
pub(crate) struct ByteLevel {
    /// Added tokens, those that are looked for in the text as it is before those in what is left.
    added: Vec<Added>,
    steps: Vec<Step>,
    /// The normalizer changes other characters than ASCII: pieces with such are the library's.
    ascii: bool,
    /// The character that stands for each byte.
    chars: [char; 256],
    words: RwLock<KnownWords>,
}

struct Added {
    matcher: AhoCorasick,
    tokens: Vec<TokenId>,
}

/// One way of cutting, applied to what the ones before it left.
enum Step {
    /// Each numeric character is a part of its own.
    Digits,
    /// Each match is, and what lies between two.
    Regex(SysRegex, Option<Words>),
}

impl Step {
    fn regex(pattern: &str) -> Option<Self> {
        Some(Self::Regex(SysRegex::new(pattern).ok()?, Words::of(pattern)))
    }
}

#[derive(Default)]
struct KnownWords {
    /// Where in `tokens` a word's are.
    known: HashMap<Box<str>, (u32, u32)>,
    tokens: Vec<TokenId>,
}

impl ByteLevel {
    /// None where the tokenizer is not of this kind.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
        if model.dropout.is_some() || tokenizer.get_encode_special_tokens() {
            return None;
        }
        let ascii = match tokenizer.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::NFC(_)) => true,
            Some(_) => return None,
        };
        let this = Self {
            added: added(tokenizer)?,
            steps: steps(tokenizer.get_pre_tokenizer()?)?,
            ascii,
            chars: chars(),
            words: RwLock::default(),
        };
        let same = |text: &str| {
            let expected = tokenizer.encode_fast(text, false).ok()?;
            (this.encode(tokenizer, text).ok()? == expected.get_ids()).then_some(())
        };
        let mixed: String = tokenizer
            .get_added_vocabulary()
            .get_vocab()
            .keys()
            .take(SAMPLES.len())
            .zip(SAMPLES)
            .map(|(token, sample)| format!("{token}{sample}"))
            .collect();
        SAMPLES.iter().copied().chain([mixed.as_str()]).try_for_each(same)?;
        Some(this)
    }

    /// The tokens of `text`, none put around it.
    pub(crate) fn encode(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<TokenId>, String> {
        let mut out = Vec::with_capacity(text.len() / 3);
        self.encode_from(0, tokenizer, text, &mut out)?;
        Ok(out)
    }

    /// Cuts at the added tokens of `self.added[level]` and later ones.
    fn encode_from(
        &self,
        level: usize,
        tokenizer: &Tokenizer,
        text: &str,
        out: &mut Vec<TokenId>,
    ) -> Result<(), String> {
        let Some(added) = self.added.get(level) else { return self.cut(tokenizer, text, out) };
        let mut rest = 0;
        for found in added.matcher.find_iter(text) {
            self.encode_from(level + 1, tokenizer, &text[rest..found.start()], out)?;
            out.push(added.tokens[found.pattern().as_usize()]);
            rest = found.end();
        }
        self.encode_from(level + 1, tokenizer, &text[rest..], out)
    }

    fn cut(&self, tokenizer: &Tokenizer, piece: &str, out: &mut Vec<TokenId>) -> Result<(), String> {
        if piece.is_empty() {
            return Ok(());
        }
        if self.ascii && !piece.is_ascii() {
            let encoding = tokenizer.encode_fast(piece, false).map_err(|error| error.to_string())?;
            out.extend_from_slice(encoding.get_ids());
            return Ok(());
        }
        let mut new: Vec<(&str, std::ops::Range<usize>)> = Vec::new();
        let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
        let mut failed = None;
        apply(&self.steps, piece, &mut |word| {
            if failed.is_some() {
                return;
            }
            if let Some(&(from, to)) = words.known.get(word) {
                out.extend_from_slice(&words.tokens[from as usize..to as usize]);
                return;
            }
            let from = out.len();
            match self.ask(tokenizer, word) {
                Ok(tokens) => out.extend(tokens.into_iter().map(|token| token.id)),
                Err(error) => failed = Some(error.to_string()),
            }
            if word.len() <= WORD_BYTES_MAX {
                new.push((word, from..out.len()));
            }
        });
        drop(words);
        if let Some(error) = failed {
            return Err(error);
        }
        if !new.is_empty() {
            let mut words = self.words.write().unwrap_or_else(PoisonError::into_inner);
            for (word, tokens) in new {
                words.keep(word, &out[tokens]);
            }
        }
        Ok(())
    }

    /// The library's tokens of a word.
    fn ask(&self, tokenizer: &Tokenizer, word: &str) -> tokenizers::Result<Vec<tokenizers::Token>> {
        let spelled: String = word.bytes().map(|byte| self.chars[usize::from(byte)]).collect();
        tokenizer.get_model().tokenize(&spelled)
    }
}

impl KnownWords {
    fn keep(&mut self, word: &str, tokens: &[TokenId]) {
        if self.known.len() >= WORDS_MAX {
            *self = Self::default();
        }
        if !self.known.contains_key(word) {
            let from = self.tokens.len() as u32;
            self.tokens.extend_from_slice(tokens);
            self.known.insert(word.into(), (from, self.tokens.len() as u32));
        }
    }
}

/// Cuts `text` by all steps in turn and gives out the words.
fn apply<'a>(steps: &[Step], text: &'a str, word: &mut impl FnMut(&'a str)) {
    let Some((step, steps)) = steps.split_first() else {
        if !text.is_empty() {
            word(text);
        }
        return;
    };
    let mut rest = 0;
    let mut part = |from: usize, to: usize| {
        if rest < from {
            apply(steps, &text[rest..from], word);
        }
        apply(steps, &text[from..to], word);
        rest = to;
    };
    match step {
        Step::Digits => {
            for (at, char) in text.char_indices().filter(|(_, char)| char.is_numeric()) {
                part(at, at + char.len_utf8());
            }
        }
        Step::Regex(_, Some(words)) if text.is_ascii() => {
            let mut at = 0;
            while at < text.len() {
                let end = words.end(text.as_bytes(), at);
                part(at, end);
                at = end;
            }
        }
        Step::Regex(regex, _) => regex.find_iter(text).for_each(|(from, to)| part(from, to)),
    }
    if rest < text.len() {
        apply(steps, &text[rest..], word);
    }
}

/// None where added tokens are more than their text.
fn added(tokenizer: &Tokenizer) -> Option<Vec<Added>> {
    let decoder = tokenizer.get_added_tokens_decoder();
    let normalizes = tokenizer.get_normalizer().is_some();
    if decoder.values().any(|token| {
        token.single_word
            || token.lstrip
            || token.rstrip
            || token.content.is_empty()
            || (normalizes && !token.content.is_ascii())
    }) {
        return None;
    }
    let mut levels = Vec::new();
    for normalized in [false, true] {
        let (tokens, contents): (Vec<TokenId>, Vec<&str>) = decoder
            .iter()
            .filter(|(_, token)| token.normalized == normalized)
            .map(|(&id, token)| (id, token.content.as_str()))
            .unzip();
        if !tokens.is_empty() {
            let matcher =
                AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(contents).ok()?;
            levels.push(Added { matcher, tokens });
        }
    }
    Some(levels)
}

/// The steps of a pre-tokenizer that ends with bytes; none where it does anything else.
fn steps(pre_tokenizer: &PreTokenizerWrapper) -> Option<Vec<Step>> {
    let parts = match pre_tokenizer {
        PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref(),
        one => std::slice::from_ref(one),
    };
    let (last, before) = parts.split_last()?;
    let mut steps = Vec::new();
    for part in before {
        steps.push(match part {
            PreTokenizerWrapper::Digits(digits) if digits.individual_digits => Step::Digits,
            PreTokenizerWrapper::Split(split)
                if split.behavior == SplitDelimiterBehavior::Isolated && !split.invert =>
            {
                let SplitPattern::Regex(pattern) = &split.pattern else { return None };
                Step::regex(pattern)?
            }
            _ => return None,
        });
    }
    match last {
        PreTokenizerWrapper::ByteLevel(bytes) if !bytes.add_prefix_space => {
            if bytes.use_regex {
                steps.push(Step::regex(words::GPT2)?);
            }
            Some(steps)
        }
        _ => None,
    }
}

/// GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on.
fn chars() -> [char; 256] {
    let mut others = '\u{100}'..;
    std::array::from_fn(|byte| match byte as u8 {
        byte @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => char::from(byte),
        _ => others.next().expect("there are more than 256 characters"),
    })
}

#[cfg(test)]
#[path = "byte_level_tests.rs"]
mod tests;
