//! [`TokenMask`]: which tokens of a vocabulary may be drawn, a bit each.

use types::TokenId;

/// Which tokens of a vocabulary may be drawn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit `t % 32` of word `t / 32` is that of token `t`; bits past the vocabulary are 0.
    words: Vec<u32>,
    vocab_size: u32,
}

impl TokenMask {
    /// Every token.
    pub fn all(vocab_size: u32) -> Self {
        let mut words = vec![u32::MAX; vocab_size.div_ceil(32) as usize];
        let rest = vocab_size % 32;
        if let Some(last) = words.last_mut().filter(|_| rest > 0) {
            *last = (1 << rest) - 1;
        }
        Self { words, vocab_size }
    }

    /// No token.
    pub fn none(vocab_size: u32) -> Self {
        Self { words: vec![0; vocab_size.div_ceil(32) as usize], vocab_size }
    }

    /// From words of the same layout, of which some may be left out at the end, or have further bits.
    pub fn from_words(words: &[u32], vocab_size: u32) -> Self {
        let mut mask = Self::all(vocab_size);
        let given = words.iter().copied().chain(std::iter::repeat(0));
        mask.words.iter_mut().zip(given).for_each(|(word, given)| *word &= given);
        mask
    }

    /// Tokens of the vocabulary.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// 32 tokens a word, the lowest bit first; `vocab_size / 32` words, rounded up.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether a token may be drawn.
    pub fn allows(&self, token: TokenId) -> bool {
        token < self.vocab_size && self.words[token as usize / 32] & (1 << (token % 32)) != 0
    }

    /// Lets a token of the vocabulary be drawn; others stay out.
    pub fn allow(&mut self, token: TokenId) {
        if token < self.vocab_size {
            self.words[token as usize / 32] |= 1 << (token % 32);
        }
    }

    /// Keeps a token from being drawn.
    pub fn forbid(&mut self, token: TokenId) {
        if token < self.vocab_size {
            self.words[token as usize / 32] &= !(1 << (token % 32));
        }
    }

    /// Whether no token may be drawn.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// How many tokens may be drawn.
    pub fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_those_of_tokens_of_the_vocabulary() {
        for vocab_size in [1, 31, 32, 33, 1000] {
            let mut mask = TokenMask::all(vocab_size);
            assert_eq!(mask.count(), vocab_size);
            assert!(!mask.allows(vocab_size) && mask.allows(vocab_size - 1));
            mask.forbid(vocab_size - 1);
            mask.forbid(vocab_size);
            assert_eq!((mask.count(), mask.allows(vocab_size - 1)), (vocab_size - 1, false));
            mask.allow(vocab_size);
            assert_eq!(mask.count(), vocab_size - 1);
            mask.allow(vocab_size - 1);
            assert_eq!(mask, TokenMask::all(vocab_size));
            assert!(TokenMask::none(vocab_size).is_empty() && !mask.is_empty());
            assert_eq!(TokenMask::from_words(&[u32::MAX; 40], vocab_size), mask);
            assert_eq!(TokenMask::from_words(&[], vocab_size), TokenMask::none(vocab_size));
        }
    }
}
