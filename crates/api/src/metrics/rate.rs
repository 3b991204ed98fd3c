//! Tokens of each of the last seconds, for charts: a ring that nobody has to turn.

use serde::Serialize;
use std::collections::VecDeque;

/// Seconds that are remembered: what a chart of a few hundred pixels shows.
pub(super) const SECONDS_MAX: usize = 240;

/// What happened in one second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Second {
    /// Tokens generated.
    pub(super) tokens: u32,
    /// Tokens of the prompts that were read.
    pub(super) prompt: u32,
    /// Of those, tokens found in a cache.
    pub(super) cached: u32,
}

/// The last seconds as columns, the oldest first; the one that is not over yet is not among them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(crate) struct History {
    /// The number of the second after the last one, counted from the start of the process.
    pub(crate) end: u64,
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt: Vec<u32>,
    pub(crate) cached: Vec<u32>,
}

#[derive(Debug, Default)]
pub(super) struct Rates {
    /// The last is that of `current`.
    seconds: VecDeque<Second>,
    current: u64,
}

impl Rates {
    /// The second `at`, which is never before those that were asked for earlier.
    pub(super) fn second(&mut self, at: u64) -> &mut Second {
        let missing = at.saturating_sub(self.current).min(SECONDS_MAX as u64 + 1);
        self.seconds.extend(std::iter::repeat_n(Second::default(), missing as usize));
        self.current = self.current.max(at);
        let surplus = self.seconds.len().saturating_sub(SECONDS_MAX + 1);
        self.seconds.drain(..surplus);
        if self.seconds.is_empty() {
            self.seconds.push_back(Second::default());
        }
        let last = self.seconds.len() - 1;
        &mut self.seconds[last]
    }

    pub(super) fn history(&mut self, at: u64) -> History {
        self.second(at);
        let past = || self.seconds.range(..self.seconds.len() - 1);
        History {
            end: self.current,
            tokens: past().map(|second| second.tokens).collect(),
            prompt: past().map(|second| second.prompt).collect(),
            cached: past().map(|second| second.cached).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_without_tokens_are_there() {
        let mut rates = Rates::default();
        rates.second(2).tokens += 5;
        rates.second(2).tokens += 1;
        rates.second(4).prompt += 7;
        let history = rates.history(6);
        assert_eq!(
            (history.end, history.tokens, history.prompt),
            (6, vec![0, 6, 0, 0, 0], vec![0, 0, 0, 7, 0])
        );
        let history = rates.history(1_000_000);
        assert_eq!((history.end, history.tokens), (1_000_000, vec![0; SECONDS_MAX]));
        rates.second(1_000_000).cached += 1;
        assert_eq!(rates.history(1_000_001).cached[SECONDS_MAX - 1], 1);
    }
}
