//! The patterns that nearly all byte-level tokenizers cut words with, matched by hand in ASCII.
//!
//! A regular expression takes a fifth of the time of a short request here; these take a fiftieth of that. Beyond ASCII,
//! where classes of characters are long lists, and for other patterns, the library's expressions decide.

/// What GPT-2 cuts words with, and every pre-tokenizer `ByteLevel` that brings no pattern of its own.
pub(crate) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// What Llama 3 and, with one digit at a time, Qwen 2 cut words with.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A pattern that is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Words {
    /// [`GPT2`].
    Gpt2,
    /// [`LLAMA3`] and [`QWEN2`].
    Llama3 {
        /// Digits of a word at most.
        digits_max: usize,
    },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Letter,
    Digit,
    Space,
    Other,
}

impl Words {
    pub(crate) fn of(pattern: &str) -> Option<Self> {
        match pattern {
            GPT2 => Some(Self::Gpt2),
            LLAMA3 => Some(Self::Llama3 { digits_max: 3 }),
            QWEN2 => Some(Self::Llama3 { digits_max: 1 }),
            _ => None,
        }
    }

    /// Where the word ends that starts at `at` in a text of ASCII; every byte of it is in one.
    pub(crate) fn end(self, text: &[u8], at: usize) -> usize {
        match self {
            Self::Gpt2 => gpt2(text, at),
            Self::Llama3 { digits_max } => llama3(text, at, digits_max),
        }
    }
}

fn gpt2(text: &[u8], at: usize) -> usize {
    if let Some(end) = contraction(text, at, |byte| byte) {
        return end;
    }
    let start = at + usize::from(text[at] == b' ');
    match text.get(start).map(|&byte| class(byte)) {
        None | Some(Class::Space) => spaces(text, at),
        Some(kind) => run(text, start, kind),
    }
}

fn llama3(text: &[u8], at: usize, digits_max: usize) -> usize {
    if let Some(end) = contraction(text, at, |byte| byte.to_ascii_lowercase()) {
        return end;
    }
    let first = class(text[at]);
    if first == Class::Letter {
        return run(text, at, Class::Letter);
    }
    let next = text.get(at + 1).map(|&byte| class(byte));
    if first != Class::Digit && !is_break(text[at]) && next == Some(Class::Letter) {
        return run(text, at + 1, Class::Letter);
    }
    if first == Class::Digit {
        return run(text, at, Class::Digit).min(at + digits_max);
    }
    let start = at + usize::from(text[at] == b' ');
    if text.get(start).is_some_and(|&byte| class(byte) == Class::Other) {
        let end = run(text, start, Class::Other);
        return end + text[end..].iter().take_while(|&&byte| is_break(byte)).count();
    }
    let end = run(text, at, Class::Space);
    match text[at..end].iter().rposition(|&byte| is_break(byte)) {
        Some(last) => at + last + 1,
        None => spaces(text, at),
    }
}

/// White space: all of it at the end of the text, else all but the last, which belongs to what follows, or alone.
fn spaces(text: &[u8], at: usize) -> usize {
    let end = run(text, at, Class::Space);
    if end == text.len() || end - at == 1 { end } else { end - 1 }
}

fn contraction(text: &[u8], at: usize, fold: impl Fn(u8) -> u8) -> Option<usize> {
    if text[at] != b'\'' {
        return None;
    }
    let [first, second] = [1, 2].map(|after| text.get(at + after).map_or(0, |&byte| fold(byte)));
    match [first, second] {
        [b's' | b't' | b'm' | b'd', _] => Some(at + 2),
        [b'r' | b'v', b'e'] | [b'l', b'l'] => Some(at + 3),
        _ => None,
    }
}

fn run(text: &[u8], at: usize, kind: Class) -> usize {
    at + text[at..].iter().take_while(|&&byte| class(byte) == kind).count()
}

fn class(byte: u8) -> Class {
    match byte {
        b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
        b'0'..=b'9' => Class::Digit,
        b'\t'..=b'\r' | b' ' => Class::Space,
        _ => Class::Other,
    }
}

fn is_break(byte: u8) -> bool {
    matches!(byte, b'\r' | b'\n')
}
