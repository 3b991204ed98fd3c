//! Guessing tokens ahead: a pass draws at the places behind guessed tokens too, and those that come true are there at once.
//!
//! What is drawn at a place depends on its logits, its random number and the tokens before, never on whether it was guessed
//! there (`RowSampling`); so a guess costs or saves time, and changes nothing. [`DraftSource`]s say what may follow; here
//! is which of them a row follows, and how far: as it pays by what passes take (`cost.rs`) and by how often such
//! tokens came true (`gain.rs`). Where it does not pay nothing is guessed, but now and then a little, to see whether it does again.

mod gain;
mod index;
mod lookup;

use crate::SequenceId;
use gain::{Acceptance, RowRecord};
use lookup::{AnswersSource, ContextSource, PredictionSource};
use std::{collections::BTreeMap, fmt};
use types::{BlockHash, DraftCount, DraftOrigin, TokenId};

/// Tokens guessed ahead for a row in a pass: with the one before them, one block.
pub(crate) const DRAFT_TOKENS_MAX: usize = types::BLOCK_TOKENS - 1;
/// Tokens guessed ahead in a pass: each has logits of its own, which take half a megabyte with the largest vocabularies.
const PASS_TOKENS_MAX: usize = 128;
/// Passes in which something could have been guessed and was not, before a little is guessed all the same.
const PROBE_AFTER_MIN: u32 = 32;
/// The most that this becomes, twice as many each time that it did not pay.
const PROBE_AFTER_MAX: u32 = 2048;
/// Tokens of each row that are guessed then.
const PROBE_TOKENS: usize = 3;

/// A row for which tokens may be guessed.
#[derive(Debug, Clone, Copy)]
pub struct DraftRow<'a> {
    /// Whose.
    pub sequence: SequenceId,
    /// Requests that may learn of each other's text have the same.
    pub salt: BlockHash,
    /// Prompt and output so far.
    pub text: &'a [TokenId],
    /// So many of these are the prompt.
    pub prompt_tokens: usize,
    /// What the client expects of the output; empty where it said nothing.
    pub prediction: &'a [TokenId],
    /// Tokens that may be guessed; at least 1.
    pub most: usize,
}

impl<'a> DraftRow<'a> {
    /// The output so far.
    pub fn output(&self) -> &'a [TokenId] {
        &self.text[self.prompt_tokens..]
    }
}

/// Tokens that may follow a text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Draft {
    /// Which, at most [`DraftRow::most`]; none where nothing is known.
    pub tokens: Vec<TokenId>,
    /// What speaks for the first of them, in tokens that were the same elsewhere; drafts with as much for them are taken to
    /// come true as often.
    pub matched: usize,
}

/// Whoever guesses what texts go on with.
pub trait DraftSource: fmt::Debug {
    /// As what its tokens are counted.
    fn origin(&self) -> DraftOrigin;

    /// What may follow each row, in their order.
    fn propose(&mut self, rows: &[DraftRow<'_>]) -> Vec<Draft>;

    /// A row's text has ended, by itself or at its length.
    fn finish(&mut self, row: &DraftRow<'_>) {
        let _ = row;
    }

    /// A sequence is gone.
    fn forget(&mut self, sequence: SequenceId) {
        let _ = sequence;
    }
}

/// What a row may go on with.
#[derive(Debug, Clone)]
pub(crate) struct Proposal {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) why: Why,
    /// Of each token, that it and those before it come true.
    chances: Vec<f64>,
}

impl Proposal {
    /// Leaves its first tokens.
    pub(crate) fn truncate(&mut self, tokens: usize) {
        self.tokens.truncate(tokens);
        self.chances.truncate(tokens);
    }
}

/// Where a draft comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Why {
    origin: DraftOrigin,
    matched: usize,
}

/// When tokens are guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Speculate {
    /// Never.
    Off,
    /// Where it pays.
    #[default]
    Auto,
    /// Whatever there is to guess, for tests.
    Always,
}

/// What guesses would cost.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stakes {
    pub(crate) when: Speculate,
    /// Rows and slices for which nothing can be guessed.
    pub(crate) others: usize,
    /// Seconds of the pass without guesses.
    pub(crate) plain_s: f64,
    /// The first tokens of each draft are being drawn already, and only say whether the rest is worth anything.
    pub(crate) drawing: usize,
}

/// The sources and what was learned of them.
#[derive(Debug)]
pub(crate) struct Speculation {
    sources: Vec<Box<dyn DraftSource>>,
    acceptance: Acceptance,
    records: BTreeMap<SequenceId, [RowRecord; DraftOrigin::ALL.len()]>,
    counts: [DraftCount; DraftOrigin::ALL.len()],
    /// Passes in a row in which something could have been guessed and was not.
    idle: u32,
    probe_after: u32,
    /// Whether a little is to be guessed in the next pass that can.
    probing: bool,
}

impl Default for Speculation {
    /// With the sources that need nothing further, in the order in which they count where they are equal.
    fn default() -> Self {
        let sources: Vec<Box<dyn DraftSource>> = vec![
            Box::<ContextSource>::default(),
            Box::<PredictionSource>::default(),
            Box::<AnswersSource>::default(),
        ];
        Self {
            sources,
            acceptance: Acceptance::default(),
            records: BTreeMap::new(),
            counts: Default::default(),
            idle: 0,
            probe_after: PROBE_AFTER_MIN,
            probing: false,
        }
    }
}

impl Speculation {
    /// Asks one more source.
    pub(crate) fn add(&mut self, source: Box<dyn DraftSource>) {
        self.sources.push(source);
    }

    /// Tokens guessed so far.
    pub(crate) fn counts(&self) -> [DraftCount; DraftOrigin::ALL.len()] {
        self.counts
    }

    /// What each row may go on with: the most promising of what the sources say.
    pub(crate) fn propose(&mut self, rows: &[DraftRow<'_>]) -> Vec<Option<Proposal>> {
        let mut best: Vec<Option<(f64, Proposal)>> = rows.iter().map(|_| None).collect();
        for source in &mut self.sources {
            let origin = source.origin();
            for (at, (draft, row)) in source.propose(rows).into_iter().zip(rows).enumerate() {
                let Draft { mut tokens, matched } = draft;
                tokens.truncate(row.most.min(DRAFT_TOKENS_MAX));
                let record =
                    self.records.get(&row.sequence).map_or_else(RowRecord::default, |of| of[origin as usize]);
                let of = |at| self.acceptance.probability(origin, matched + at);
                let chances = gain::chances(tokens.len(), record.factor(), of);
                let promise: f64 = chances.iter().sum();
                if !tokens.is_empty() && best[at].as_ref().is_none_or(|best| promise > best.0) {
                    let why = Why { origin, matched };
                    best[at] = Some((promise, Proposal { tokens, why, chances }));
                }
            }
        }
        best.into_iter().map(|best| best.map(|(_, proposal)| proposal)).collect()
    }

    /// How many tokens of each proposal to guess; `seconds(n)` is how long the pass takes with `n` of them.
    pub(crate) fn choose(
        &mut self,
        proposals: &[Option<Proposal>],
        stakes: Stakes,
        seconds: impl Fn(usize) -> f64,
    ) -> Vec<usize> {
        let left = |proposal: &Option<Proposal>| {
            proposal.as_ref().map_or(0, |proposal| proposal.tokens.len().saturating_sub(stakes.drawing))
        };
        let all = |each: usize| {
            let mut room = PASS_TOKENS_MAX;
            let take = |proposal| {
                let tokens = left(proposal).min(each).min(room);
                room -= tokens;
                tokens
            };
            proposals.iter().map(take).collect::<Vec<_>>()
        };
        match stakes.when {
            Speculate::Off => return vec![0; proposals.len()],
            Speculate::Always => return all(usize::MAX),
            Speculate::Auto => {}
        }
        let of = |proposal: &'_ Option<Proposal>| match proposal {
            Some(proposal) => proposal.chances.get(stakes.drawing..).unwrap_or_default().to_vec(),
            None => Vec::new(),
        };
        let chances: Vec<Vec<f64>> = proposals.iter().map(of).collect();
        let chances: Vec<&[f64]> = chances.iter().map(Vec::as_slice).collect();
        let chosen = gain::choose(&chances, stakes.others, PASS_TOKENS_MAX, stakes.plain_s, seconds);
        let planned = stakes.drawing == 0;
        if chosen.iter().any(|&tokens| tokens > 0) {
            if planned {
                (self.idle, self.probe_after) = (0, PROBE_AFTER_MIN);
            }
            return chosen;
        }
        let little = all(PROBE_TOKENS);
        if little.iter().all(|&tokens| tokens == 0) {
            return chosen;
        }
        self.idle += 1;
        if self.idle >= self.probe_after {
            (self.idle, self.probing) = (0, true);
            self.probe_after = (2 * self.probe_after).min(PROBE_AFTER_MAX);
        }
        let probes = self.probing;
        self.probing &= !planned;
        if probes { little } else { chosen }
    }

    /// Learns whether the first token of a proposal came true, which was drawn without being guessed.
    pub(crate) fn watch(&mut self, sequence: SequenceId, Why { origin, matched }: Why, came_true: bool) {
        let probability = self.acceptance.probability(origin, matched);
        let record = &mut self.records.entry(sequence).or_default()[origin as usize];
        record.learn(std::iter::once(probability), usize::from(came_true));
        self.acceptance.learn(origin, matched, 1, usize::from(came_true));
    }

    /// Learns that of a row's `offered` tokens the first `accepted` came true.
    pub(crate) fn learn(&mut self, sequence: SequenceId, why: Why, offered: usize, accepted: usize) {
        let Why { origin, matched } = why;
        let count = &mut self.counts[origin as usize];
        count.accepted += accepted as u64;
        count.rejected += (offered - accepted) as u64;
        let probabilities = (0..offered).map(|at| self.acceptance.probability(origin, matched + at));
        self.records.entry(sequence).or_default()[origin as usize].learn(probabilities, accepted);
        self.acceptance.learn(origin, matched, offered, accepted);
    }

    /// A row's text has ended, by itself or at its length.
    pub(crate) fn finish(&mut self, row: &DraftRow<'_>) {
        self.sources.iter_mut().for_each(|source| source.finish(row));
    }

    /// A sequence is gone.
    pub(crate) fn forget(&mut self, sequence: SequenceId) {
        self.records.remove(&sequence);
        self.sources.iter_mut().for_each(|source| source.forget(sequence));
    }
}
