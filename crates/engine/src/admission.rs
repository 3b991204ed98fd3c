//! Which waiting sequence goes next, and who makes room for it: pure, over what waits and what runs.
//!
//! The order: higher priority first; among those, clients that are not in debt ([`Shares`]); then who is overdue, by
//! arrival; then who has most of its prompt in the cache; then by arrival. Whoever waits very long counts as of the
//! highest priority. A sequence whose next blocks another one is computing just now waits for them: it will find them in
//! the cache. Nobody overtakes a sequence that lacks memory, so that large ones do not starve.

use crate::{memory::Memory, sequence::Sequence, shares::Shares};
use std::{
    cmp::Reverse,
    collections::BTreeMap,
    time::{Duration, Instant},
};
use types::{BLOCK_TOKENS, ClientId, Priority};

/// Who waits longer than this goes before every priority.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Blocks in common with a prompt being read for which it is worth to wait: less is computed in one small slice.
const TWIN_BLOCKS_MIN: usize = 2;

/// What an admission decides on.
#[derive(Debug)]
pub(crate) struct Admission<'a> {
    pub(crate) now: Instant,
    pub(crate) waiting: &'a [Sequence],
    pub(crate) running: &'a [Sequence],
    pub(crate) memory: &'a Memory,
    pub(crate) shares: &'a Shares,
    /// Sequences that may run at once.
    pub(crate) slots: usize,
}

impl Admission<'_> {
    /// Index of the waiting sequence to admit next, were there a slot; none where nobody can be admitted.
    pub(crate) fn next(&self) -> Option<usize> {
        let matched: Vec<(usize, usize)> =
            self.waiting.iter().map(|sequence| self.matched(sequence)).collect();
        let able = (0..self.waiting.len()).filter(|&index| {
            let sequence = &self.waiting[index];
            !sequence.is_ahead() && !self.has_leader(sequence, matched[index].0)
        });
        let first = able.min_by_key(|&index| {
            let sequence = &self.waiting[index];
            let waited = self.now.saturating_duration_since(sequence.targets.arrived);
            let priority = if waited >= WAIT_MAX { Priority::High } else { sequence.priority };
            let overdue = sequence.wait_left_s(self.now) < 0.0;
            let saved = if overdue { 0 } else { matched[index].0 };
            let in_debt = !self.shares.may_take(sequence.client);
            (Reverse(priority), in_debt, !overdue, Reverse(saved), sequence.arrival())
        })?;
        let (cached, unused) = matched[first];
        let needed = self.waiting[first].expected_blocks() - (cached - unused);
        (needed <= self.blocks_left()).then_some(first)
    }

    /// Index of the running sequence that should give up its slot for a waiting one: one of lower priority, one of a
    /// client with more than its share of slots where the waiting one's client has less, or one that is still being read
    /// and due much later. What it gives up stays in the cache.
    pub(crate) fn yields(&self, candidate: &Sequence) -> Option<usize> {
        let left_s = candidate.wait_left_s(self.now);
        let youngest = |wanted: &dyn Fn(&Sequence) -> bool| {
            let yielding = (0..self.running.len()).filter(|&index| wanted(&self.running[index]));
            yielding.max_by_key(|&index| self.running[index].arrival())
        };
        let lower = self.running.iter().map(|sequence| sequence.priority).min()?;
        if lower < candidate.priority {
            return youngest(&|sequence| sequence.priority == lower);
        }
        let equal = |sequence: &Sequence| sequence.priority == candidate.priority;
        // A slot that becomes free in time saves the reading again.
        let patient = self.now.saturating_duration_since(candidate.targets.arrived).as_secs_f64() < left_s;
        if !patient {
            let mut slots_of = BTreeMap::<ClientId, usize>::new();
            for sequence in self.running {
                *slots_of.entry(sequence.client).or_default() += 1;
            }
            let share = (self.slots / self.shares.clients().max(1)).max(1);
            let own = slots_of.get(&candidate.client).copied().unwrap_or(0);
            let most =
                slots_of.iter().max_by_key(|(_, count)| **count).map(|(client, count)| (*client, *count));
            if let Some((greedy, count)) =
                most.filter(|(_, count)| own < share && *count > share.max(own + 1))
            {
                debug_assert!(greedy != candidate.client, "{count} slots of its own");
                let victim = youngest(&|sequence| sequence.client == greedy && equal(sequence));
                if victim.is_some() {
                    return victim;
                }
            }
        }
        // Twice as far off, so that two of the same kind never take turns.
        let later = |sequence: &Sequence| {
            let far = sequence.wait_left_s(self.now) > 2.0 * left_s.max(0.0) + 1.0;
            !sequence.decodes() && !sequence.is_ahead() && far && equal(sequence)
        };
        youngest(&later)
    }

    /// Blocks of a sequence that are cached, and how many of these nobody uses.
    fn matched(&self, sequence: &Sequence) -> (usize, usize) {
        self.memory.matched(sequence.held.reusable(sequence.tokens().len()))
    }

    /// Whether a running sequence is about to bring the blocks that this one, with `matched` cached, needs next.
    fn has_leader(&self, sequence: &Sequence, matched: usize) -> bool {
        let chain = sequence.held.reusable(sequence.tokens().len());
        let leads = |other: &Sequence| {
            other.priority >= sequence.priority
                && other.computed() < other.tokens().len()
                && other.held.leads(chain, matched, TWIN_BLOCKS_MIN)
        };
        self.running.iter().any(leads)
    }

    /// Blocks that are neither held nor promised to who runs.
    fn blocks_left(&self) -> usize {
        let promised = |sequence: &Sequence| {
            sequence.expected_blocks().saturating_sub(sequence.held.room() / BLOCK_TOKENS)
        };
        self.memory.available().saturating_sub(self.running.iter().map(promised).sum())
    }
}
