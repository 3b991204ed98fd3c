//! Tokens to text, one token at a time, in constant time each.
//!
//! A token's text depends on its neighbours: a character may be spread over several tokens, and some decoders drop the
//! space before the first word. So a short window of the latest tokens is decoded anew each time, and what is new is
//! given out, except for replacement characters at the end, which the next tokens may turn into a real one. When the
//! window grows it is cut where the cut changes nothing of what is yet to come.

use crate::prompt::ModelText;
use std::sync::Arc;
use types::TokenId;

/// A character takes at most 4 bytes, so at most 3 tokens of one byte can be unfinished.
const UNFINISHED_MAX: usize = 3;
/// Tokens to keep at a cut: enough to hold an unfinished character whole, with something before it.
const KEPT_MIN: usize = UNFINISHED_MAX + 2;
/// Cuts are tried this many tokens apart: one of them is between two characters, as a character has 4 bytes at most.
const CUTS_TRIED: usize = 4;
/// The window is cut when it has this many tokens and ends with a whole character.
const WINDOW_TOKENS: usize = 16;
/// A window that offers no good cut, as only garbage does, is cut anyhow at this many tokens.
const WINDOW_TOKENS_MAX: usize = 64;

/// Which special tokens show as text; others have none.
#[derive(Debug, Clone, Default)]
pub(crate) enum Shown {
    #[default]
    None,
    /// Those that a parser looks for.
    Some(Arc<[TokenId]>),
    All,
}

/// The text of a growing list of tokens.
#[derive(Debug)]
pub(crate) struct Detokenizer {
    text: Arc<ModelText>,
    shown: Shown,
    window: Vec<TokenId>,
    /// Bytes of the window's text that were given out, or came before the start.
    given: usize,
    /// Bytes of the window's text.
    length: usize,
    /// Tokens since the window's text last ended with a whole character.
    unfinished: usize,
}

impl Detokenizer {
    /// Starts a text of its own: what a decoder drops at the start of a text is dropped.
    pub(crate) fn new(text: Arc<ModelText>, shown: Shown) -> Self {
        Self { text, shown, window: Vec::new(), given: 0, length: 0, unfinished: 0 }
    }

    /// Continues a prompt: a space between it and what follows is kept.
    pub(crate) fn continuing(text: Arc<ModelText>, shown: Shown, prompt: &[TokenId]) -> Result<Self, String> {
        let with_text = prompt.iter().rev().copied().filter(|&token| text.has_text(token));
        let mut window: Vec<TokenId> = with_text.take(KEPT_MIN).collect();
        window.reverse();
        let given = text.decode(&window)?;
        if given.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(Self::new(text, shown));
        }
        Ok(Self { text, shown, window, given: given.len(), length: given.len(), unfinished: 0 })
    }

    /// Takes a token and appends the text that is now certain to `out`.
    pub(crate) fn push(&mut self, token: TokenId, out: &mut String) -> Result<(), String> {
        if !self.shows(token) {
            return Ok(());
        }
        self.window.push(token);
        let decoded = self.text.decode(&self.window)?;
        let broken = |char: &char| *char == char::REPLACEMENT_CHARACTER;
        let broken = decoded.chars().rev().take_while(broken).count();
        self.unfinished = if broken == 0 { 0 } else { self.unfinished + 1 };
        // While a character is unfinished, some decoders show all bytes in a row as broken, given out or not. Once it
        // cannot be one any more, only what may be the next one is held back.
        let held = if self.unfinished <= UNFINISHED_MAX { broken } else { broken.min(UNFINISHED_MAX) };
        let certain = decoded.len() - held * char::REPLACEMENT_CHARACTER.len_utf8();
        self.give(&decoded, certain, out);
        self.length = decoded.len();
        let whole = self.unfinished == 0 && self.window.len() >= WINDOW_TOKENS;
        if whole || self.window.len() >= WINDOW_TOKENS_MAX {
            self.cut(&decoded)?;
        }
        Ok(())
    }

    /// Appends what was held back to `out`: nothing follows that could complete it.
    pub(crate) fn finish(&mut self, out: &mut String) -> Result<(), String> {
        if self.given < self.length {
            let decoded = self.text.decode(&self.window)?;
            self.give(&decoded, decoded.len(), out);
        }
        Ok(())
    }

    fn shows(&self, token: TokenId) -> bool {
        let is_shown = match &self.shown {
            Shown::None => false,
            Shown::Some(tokens) => tokens.contains(&token),
            Shown::All => self.text.is_special(token),
        };
        is_shown || self.text.has_text(token)
    }

    fn give(&mut self, decoded: &str, certain: usize, out: &mut String) {
        // A run of bytes that turns out to be no text is decoded as such as a whole, so borders may have moved.
        let from = (self.given..certain).find(|&at| decoded.is_char_boundary(at));
        if let Some(from) = from {
            out.push_str(&decoded[from..certain]);
            self.given = certain;
        }
    }

    fn cut(&mut self, decoded: &str) -> Result<(), String> {
        for kept in KEPT_MIN..KEPT_MIN + CUTS_TRIED {
            let tail = self.text.decode(&self.window[self.window.len() - kept..])?;
            if decoded.ends_with(&tail) && decoded.len() - tail.len() <= self.given {
                self.given -= decoded.len() - tail.len();
                self.keep(kept, tail.len());
                return Ok(());
            }
        }
        if self.window.len() >= WINDOW_TOKENS_MAX {
            let tail = self.text.decode(&self.window[self.window.len() - KEPT_MIN..])?;
            let pending = self.length.saturating_sub(self.given);
            self.given = tail.len().saturating_sub(pending);
            self.keep(KEPT_MIN, tail.len());
        }
        Ok(())
    }

    fn keep(&mut self, kept: usize, length: usize) {
        self.window.drain(..self.window.len() - kept);
        self.length = length;
    }
}

#[cfg(test)]
#[path = "detokenizer_tests.rs"]
mod tests;
