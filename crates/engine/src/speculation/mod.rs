//! Guessing tokens ahead: a pass draws at the places behind guessed tokens too, and those that come true are there at once.
//!
//! What is drawn at a place depends on its logits, its random number and the tokens before, never on whether it was guessed
//! there (`RowSampling`); so a guess costs or saves time, and changes nothing. [`DraftSource`]s say what may follow; here
//! is which of them a row follows, and how far: as it pays by what passes take (`cost.rs`) and by how often such
//! tokens came true (`gain.rs`), and as what was lost by it allows (`allowance.rs`). A row whose guesses are wrong rests, each
//! time twice as long. Where it does not pay nothing is guessed, but now and then a little for a row, to see whether it does
//! again.

mod allowance;
mod gain;
mod index;
mod lookup;

use crate::SequenceId;
use allowance::Allowance;
use gain::{Acceptance, RowRecord};
use lookup::{AnswersSource, ContextSource, PredictionSource};
use std::{collections::BTreeMap, fmt};
use types::{BlockHash, DraftCount, DraftOrigin, TokenId};

/// Tokens guessed ahead for a row in a pass: with the one before them, one block.
pub(crate) const DRAFT_TOKENS_MAX: usize = types::BLOCK_TOKENS - 1;
/// Tokens guessed ahead in a pass: each has logits of its own, which take half a megabyte with the largest vocabularies.
const PASS_TOKENS_MAX: usize = 128;
/// Passes in which something could have been guessed for a row and was not, before a little is guessed all the same.
const PROBE_AFTER_MIN: u32 = 32;
/// The most that this becomes, twice as many each time.
const PROBE_AFTER_MAX: u32 = 2048;
/// Tokens that are guessed then, of one row.
const PROBE_TOKENS: usize = 3;
/// Of tokens that are less likely nothing is tried: how often they come true is seen without, and nowhere would they pay.
const PROBE_CHANCE_MIN: f64 = 0.25;
/// Passes for which a row rests whose guesses were all wrong, twice as many each time in a row: at once tried again, then not.
const REST_MAX: u32 = 64;

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
    sequence: SequenceId,
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
    /// Most tokens of which it is known what guessing them costs, or nearly so.
    pub(crate) trusted: usize,
}

/// The sources and what was learned of them.
#[derive(Debug)]
pub(crate) struct Speculation {
    sources: Vec<Box<dyn DraftSource>>,
    acceptance: Acceptance,
    rows: BTreeMap<SequenceId, RowState>,
    counts: [DraftCount; DraftOrigin::ALL.len()],
    allowance: Allowance,
}

/// What is known of a row.
#[derive(Debug)]
struct RowState {
    records: [RowRecord; DraftOrigin::ALL.len()],
    /// Passes for which nothing is guessed for it, and how many these are after its next wrong guess.
    rest: u32,
    rest_next: u32,
    /// Passes in a row in which something could have been guessed and was not, and how many are let go by.
    idle: u32,
    probe_after: u32,
    /// Whether a little is to be guessed as soon as what is being drawn is known.
    probing: bool,
}

impl Default for RowState {
    fn default() -> Self {
        let records = Default::default();
        Self { records, rest: 0, rest_next: 0, idle: 0, probe_after: PROBE_AFTER_MIN, probing: false }
    }
}

impl RowState {
    /// Of its guesses some came true, or none.
    fn learn(&mut self, accepted: bool) {
        if accepted {
            (self.rest, self.rest_next, self.probe_after) = (0, 0, PROBE_AFTER_MIN);
        } else {
            self.rest = self.rest_next;
            self.rest_next = (2 * self.rest_next).clamp(1, REST_MAX);
        }
    }
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
            rows: BTreeMap::new(),
            counts: Default::default(),
            allowance: Allowance::default(),
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
                let known = self.rows.get(&row.sequence);
                let record = known.map_or_else(RowRecord::default, |known| known.records[origin as usize]);
                let of = |at| self.acceptance.probability(origin, matched + at);
                let chances = gain::chances(tokens.len(), record.factor(), of);
                let promise: f64 = chances.iter().sum();
                if !tokens.is_empty() && best[at].as_ref().is_none_or(|best| promise > best.0) {
                    let why = Why { origin, matched };
                    let sequence = row.sequence;
                    best[at] = Some((promise, Proposal { sequence, tokens, why, chances }));
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
        let planned = stakes.drawing == 0;
        let resting: Vec<bool> = proposals.iter().map(|proposal| self.rests(proposal.as_ref())).collect();
        let of = |(proposal, &rests): (&'_ Option<Proposal>, &bool)| match proposal {
            Some(proposal) if !rests => proposal.chances.get(stakes.drawing..).unwrap_or_default().to_vec(),
            _ => Vec::new(),
        };
        let chances: Vec<Vec<f64>> = proposals.iter().zip(&resting).map(of).collect();
        let chances: Vec<&[f64]> = chances.iter().map(Vec::as_slice).collect();
        let gain_min = self.allowance.gain_min();
        let mut chosen =
            gain::choose(&chances, stakes.others, PASS_TOKENS_MAX, gain_min, stakes.plain_s, seconds);
        // A part of what seems to pay shows whether it will.
        let mut room = stakes.trusted;
        for tokens in &mut chosen {
            *tokens = room.min(*tokens);
            room -= *tokens;
        }
        if chosen.iter().all(|&tokens| tokens == 0)
            && let Some((at, tokens)) = self.probe(proposals, &chances, planned)
        {
            chosen[at] = tokens;
        }
        chosen
    }

    /// Whether nothing is guessed for a row now, since its guesses were wrong of late.
    fn rests(&mut self, proposal: Option<&Proposal>) -> bool {
        let Some(row) = proposal.and_then(|proposal| self.rows.get_mut(&proposal.sequence)) else {
            return false;
        };
        let rests = row.rest > 0;
        row.rest = row.rest.saturating_sub(1);
        rests
    }

    /// A row for which a little is guessed although it does not seem to pay, and how many tokens.
    fn probe(
        &mut self,
        proposals: &[Option<Proposal>],
        chances: &[&[f64]],
        planned: bool,
    ) -> Option<(usize, usize)> {
        let allowed = self.allowance.allows_probes();
        let mut probe = None;
        for (at, (proposal, chances)) in proposals.iter().zip(chances).enumerate() {
            let Some(proposal) = proposal else { continue };
            if chances.first().is_none_or(|&chance| chance < PROBE_CHANCE_MIN) {
                continue;
            }
            let row = self.rows.entry(proposal.sequence).or_default();
            // Whatever was waited for: if it has not come by the next pass, nothing is waited for again.
            let waited = std::mem::take(&mut row.probing);
            if planned {
                if waited && probe.is_none() {
                    probe = Some((at, chances.len().min(PROBE_TOKENS)));
                }
                continue;
            }
            row.idle = row.idle.saturating_add(1);
            if allowed && probe.is_none() && row.idle >= row.probe_after {
                (row.idle, row.probing) = (0, true);
                row.probe_after = (2 * row.probe_after).min(PROBE_AFTER_MAX);
                probe = Some((at, chances.len().min(PROBE_TOKENS)));
            }
        }
        probe
    }

    /// A pass of rows in which nothing was guessed, and none was waited for.
    pub(crate) fn earn(&mut self) {
        self.allowance.earn();
    }

    /// A pass with guesses, or one that was waited for in order to guess, lost so many passes without guesses, or gained.
    pub(crate) fn spend(&mut self, passes: f64) {
        self.allowance.spend(passes);
    }

    /// Learns whether the first token of a proposal came true, which was drawn without being guessed.
    pub(crate) fn watch(&mut self, sequence: SequenceId, Why { origin, matched }: Why, came_true: bool) {
        let probability = self.acceptance.probability(origin, matched);
        let record = &mut self.rows.entry(sequence).or_default().records[origin as usize];
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
        let row = self.rows.entry(sequence).or_default();
        row.records[origin as usize].learn(probabilities, accepted);
        row.learn(accepted > 0);
        self.acceptance.learn(origin, matched, offered, accepted);
    }

    /// A row's text has ended, by itself or at its length.
    pub(crate) fn finish(&mut self, row: &DraftRow<'_>) {
        self.sources.iter_mut().for_each(|source| source.finish(row));
    }

    /// A sequence is gone.
    pub(crate) fn forget(&mut self, sequence: SequenceId) {
        self.rows.remove(&sequence);
        self.sources.iter_mut().for_each(|source| source.forget(sequence));
    }
}
