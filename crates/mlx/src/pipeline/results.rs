//! What a pass brought, from the last stage to the head: the pass, the drawn tokens, and of those that are told more of,
//! and of prompts, log-probabilities and most probable tokens. Both sides know from the plan how many words that is, so
//! the last stage's device sends them without its host having read them. With them goes what ranks tell of their passes.

use super::frame::Clocked;
use crate::{logprobs::Logprobs, raw, runner::Flight, step::Ordered};
use mlx_rs::{Array, Dtype, error::Result, ops::concatenate};

/// What a pass is to bring.
#[derive(Debug, PartialEq)]
pub(crate) struct Layout {
    pub(crate) pass: u32,
    /// As in [`Flight`].
    order: Vec<usize>,
    told: Vec<(usize, u32)>,
    scored: Vec<(usize, u32)>,
    vocabulary: u32,
    /// Ranks, each of which may tell of a pass.
    ranks: usize,
}

impl Layout {
    pub(crate) fn new(pass: u32, ordered: &Ordered<'_>, vocabulary: u32, ranks: usize) -> Self {
        let (told, scored) = (ordered.told(), ordered.scored());
        Self { pass, order: ordered.order.clone(), told, scored, vocabulary, ranks }
    }

    /// Rows and alternatives of drawn tokens, and of prompts' tokens.
    fn logprobs(&self) -> [(usize, usize); 2] {
        let top = |tops: &[(usize, u32)]| tops.iter().map(|told| told.1).max().unwrap_or(0);
        let [drawn, scored] = [&self.told, &self.scored].map(|of| top(of).min(self.vocabulary) as usize);
        [(self.told.len(), drawn), (self.scored.iter().map(|scored| scored.0).sum(), scored)]
    }

    /// Words before those of tokens: the pass, and what ranks tell.
    fn head_words(&self) -> usize {
        1 + 2 * self.ranks
    }

    /// How many words there are.
    pub(crate) fn words(&self) -> usize {
        let of = |(rows, top): (usize, usize)| rows + 2 * rows * top;
        self.head_words() + self.order.len() + self.logprobs().map(of).iter().sum::<usize>()
    }

    /// The words of a pass that was drawn, on the device, and what each rank tells.
    pub(crate) fn sent(&self, flight: &Flight, clocked: &[Clocked]) -> Result<Array> {
        let told = clocked[..self.ranks].iter().flat_map(|clocked| clocked.words());
        let head: Vec<u32> = std::iter::once(self.pass).chain(told).collect();
        let mut words = vec![Array::from_slice(&head, &[head.len() as i32])];
        if let Some(tokens) = &flight.tokens {
            let count = self.order.len() as i32;
            let tokens =
                if tokens.dim(0) == count { tokens.clone() } else { raw::slice(tokens, &[0], &[count])? };
            words.push(tokens.as_dtype(Dtype::Uint32)?);
        }
        for logprobs in flight.of_drawn.iter().chain(&flight.of_prompts) {
            words.extend(logprobs.words()?);
        }
        let words = if words.len() == 1 { words.remove(0) } else { concatenate(&words, 0)? };
        // Where nothing was drawn, it is sent once all was written.
        if flight.written.is_empty() { Ok(words) } else { raw::depends(&words, &flight.written) }
    }

    /// What each rank tells, of words that came.
    pub(crate) fn clocked(&self, words: &[u32]) -> Vec<Clocked> {
        words[1..self.head_words()].chunks(2).map(Clocked::of).collect()
    }

    /// The pass of words that came.
    pub(crate) fn received(self, words: &[u32]) -> Result<Flight> {
        let (tokens, mut rest) = words[self.head_words()..].split_at(self.order.len());
        let tokens: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
        let mut logprobs = Vec::new();
        for (rows, top) in self.logprobs() {
            let (of_rows, after) = rest.split_at(rows + 2 * rows * top);
            rest = after;
            logprobs.push(if rows == 0 { None } else { Some(Logprobs::of_words(of_rows, rows, top)) });
        }
        let mut logprobs = logprobs.into_iter().flatten();
        let of_drawn = if self.told.is_empty() { None } else { logprobs.next() };
        let tokens = (!tokens.is_empty()).then(|| Array::from_slice(&tokens, &[tokens.len() as i32]));
        Ok(Flight::drawn_elsewhere(tokens, self.order, (self.told, of_drawn), (self.scored, logprobs.next())))
    }
}
