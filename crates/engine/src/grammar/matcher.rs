//! [`Matcher`]: where one sequence is in its grammar.

use super::{TokenMask, message_of};
use llguidance::TokenParser;
use std::{fmt, sync::Arc};
use types::TokenId;

/// Why a matcher cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MatcherError {
    /// What came is not in the grammar.
    #[error("token {token} is not allowed by the grammar there")]
    Token {
        /// What came.
        token: TokenId,
    },
    /// The grammar needs more than it may, or what no token of the vocabulary holds.
    #[error("the grammar cannot be followed further: {reason}")]
    Stuck {
        /// What the parser said.
        reason: String,
    },
}

/// Where one sequence is in its grammar: which tokens may come next, and whether the text may end. Its state is its own;
/// what is computed depends on the grammar and the tokens taken, on nothing else.
pub struct Matcher {
    /// Catches what goes wrong in it: a fault there is this sequence's, not the engine's.
    parser: llguidance::Matcher,
    /// Tokens of the model that end a text: none of them is ever taken.
    ends: Arc<[TokenId]>,
    vocab_size: u32,
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matcher").field("is_complete", &self.is_complete()).finish_non_exhaustive()
    }
}

impl Clone for Matcher {
    /// Shares nothing with the original, so that what one sequence uses up of the limits is not missed by another.
    fn clone(&self) -> Self {
        Self { parser: self.parser.deep_clone(), ends: self.ends.clone(), vocab_size: self.vocab_size }
    }
}

impl Matcher {
    pub(super) fn new(parser: TokenParser, ends: Arc<[TokenId]>, vocab_size: u32) -> Self {
        Self { parser: llguidance::Matcher::new(Ok(parser)), ends, vocab_size }
    }

    /// Which tokens may come next, with those that end a text where it may end here. Never empty.
    ///
    /// # Errors
    /// [`MatcherError::Stuck`], also once [`Matcher::is_complete`].
    pub fn mask(&mut self) -> Result<TokenMask, MatcherError> {
        let mask = self.parser.compute_mask().map_err(|error| stuck(&error))?;
        let mask = TokenMask::from_words(mask.as_slice(), self.vocab_size);
        if mask.is_empty() {
            return Err(MatcherError::Stuck { reason: "no token of the vocabulary fits".to_owned() });
        }
        Ok(mask)
    }

    /// Takes the next token, which is none of those that end a text.
    ///
    /// # Errors
    /// [`MatcherError::Token`] for one that may not come next, [`MatcherError::Stuck`].
    pub fn consume(&mut self, token: TokenId) -> Result<(), MatcherError> {
        if self.ends.contains(&token) || self.is_complete() {
            return Err(MatcherError::Token { token });
        }
        match self.parser.try_consume_tokens(&[token]) {
            Ok(1) => Ok(()),
            Ok(_) => Err(MatcherError::Token { token }),
            Err(error) => Err(stuck(&error)),
        }
    }

    /// Takes so many tokens back.
    ///
    /// # Errors
    /// [`MatcherError::Stuck`] where there are not so many.
    pub fn rollback(&mut self, tokens: usize) -> Result<(), MatcherError> {
        self.parser.rollback(tokens).map_err(|error| stuck(&error))
    }

    /// Whether the text may end here.
    pub fn may_end(&mut self) -> bool {
        self.is_complete() || self.parser.is_accepting().unwrap_or(false)
    }

    /// Whether the text is complete: nothing may follow.
    pub fn is_complete(&self) -> bool {
        self.parser.is_stopped() && self.parser.stop_reason().is_ok()
    }
}

fn stuck(error: &dyn fmt::Display) -> MatcherError {
    MatcherError::Stuck { reason: message_of(error) }
}
