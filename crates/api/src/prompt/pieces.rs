//! What a token of the vocabulary stands for, in bytes: vocabularies write them in one of two ways.

use std::collections::HashMap;
use tokenizers::{DecoderWrapper, Tokenizer};

/// How a vocabulary writes bytes.
#[derive(Debug)]
pub(crate) enum Pieces {
    /// Each byte as a character, as GPT-2 has it.
    ByteLevel(HashMap<char, u8>),
    /// As text with `▁` for a space, and `<0x0A>` for a byte.
    Text,
}

impl Pieces {
    /// By the tokenizer's decoder.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Self {
        match tokenizer.get_decoder() {
            Some(decoder) if is_byte_level(decoder) => Self::ByteLevel(byte_level()),
            _ => Self::Text,
        }
    }

    /// The bytes of a piece.
    pub(crate) fn bytes(&self, piece: String) -> Vec<u8> {
        match self {
            Self::ByteLevel(bytes) => {
                let known: Option<Vec<u8>> = piece.chars().map(|char| bytes.get(&char).copied()).collect();
                // An added token's text is written as it is.
                known.unwrap_or_else(|| piece.into_bytes())
            }
            Self::Text => {
                let byte = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => piece.replace('▁', " ").into_bytes(),
                }
            }
        }
    }
}

fn is_byte_level(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteLevel(_) => true,
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(is_byte_level),
        _ => false,
    }
}

/// Printable bytes stand for themselves, others for the characters from 256 on, in order.
fn byte_level() -> HashMap<char, u8> {
    let mut others = 0x100;
    let of_byte = |byte: u8| {
        let char = match byte {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
            _ => {
                others += 1;
                others - 1
            }
        };
        (char::from_u32(char).expect("below the surrogates"), byte)
    };
    (0..=255).map(of_byte).collect()
}
