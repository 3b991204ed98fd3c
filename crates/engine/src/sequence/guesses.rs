//! What a [`Sequence`] may be guessed from, and the guesses that lie behind its text.

use super::Sequence;
use crate::speculation::{DRAFT_TOKENS_MAX, DraftRow, Why};
use types::TokenId;

impl Sequence {
    /// What tokens may be guessed for it from, where any may: as many as it may still generate before its last one. With
    /// `drawing`, while its next token is being drawn.
    pub(crate) fn draft_row(&self, drawing: bool) -> Option<DraftRow<'_>> {
        let most =
            (self.output_left() as usize + usize::from(drawing)).saturating_sub(1).min(DRAFT_TOKENS_MAX);
        let ready =
            self.speculation.enabled && self.is_runnable() && self.decodes() && self.is_ahead() == drawing;
        (ready && most > 0 && self.ahead <= 1).then(|| self.row_of(most))
    }

    /// The same once its text has ended.
    pub(crate) fn ended_row(&self) -> DraftRow<'_> {
        self.row_of(0)
    }

    fn row_of(&self, most: usize) -> DraftRow<'_> {
        DraftRow {
            sequence: self.id,
            salt: self.salt,
            text: self.tokens(),
            prompt_tokens: self.prompt_tokens,
            prediction: &self.speculation.prediction,
            most,
        }
    }

    /// How many of these tokens it may go on with one after another, with one more drawn behind them.
    pub(crate) fn fitting(&mut self, tokens: &[TokenId], vocab_size: u32) -> usize {
        let open = |token: &&TokenId| **token < vocab_size && !self.ends.contains(token);
        let open = tokens.iter().take_while(open).count();
        let Some(matcher) = &mut self.matcher else { return open };
        let mut taken = 0_usize;
        for &token in &tokens[..open] {
            if matcher.consume(token).is_err() {
                break;
            }
            taken += 1;
        }
        // Nothing is drawn behind a text that is complete.
        let fitting = if matcher.is_complete() { taken.saturating_sub(1) } else { taken };
        match matcher.rollback(taken) {
            Ok(()) => fitting,
            // Whatever is wrong with it will be said when its mask is computed.
            Err(_) => 0,
        }
    }

    /// Notes what a source says of the token that is being drawn.
    pub(crate) fn expect(&mut self, token: Option<(TokenId, Why)>) {
        self.expected = token;
    }

    /// Whether that has come true, if anything was said.
    pub(crate) fn judge(&mut self, drawn: TokenId) -> Option<(Why, bool)> {
        self.expected.take().map(|(token, why)| (why, token == drawn))
    }

    /// Guesses these tokens in its next slice, which is to be of its last token.
    pub(crate) fn guess(&mut self, tokens: &[TokenId], why: Why) {
        self.tokens.extend_from_slice(tokens);
        (self.drafts, self.why) = (tokens.len(), Some(why));
    }

    /// Guesses nothing, since its slice was not submitted.
    pub(crate) fn unguess(&mut self) {
        self.tokens.truncate(self.known());
        (self.drafts, self.why) = (0, None);
    }
}
