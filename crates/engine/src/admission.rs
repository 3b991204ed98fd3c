//! Which waiting sequence goes next, and who makes room for it: pure, over what waits and what runs.
//!
//! The order: clients that are not in debt first ([`Shares`]); then higher priority; then clients that run less than their
//! share of the slots; then who is overdue, by arrival; then who has most of its prompt in the cache; then by arrival.
//! Every few admissions one goes by age instead, so that no stream of urgent requests keeps others waiting for ever. A
//! sequence whose next blocks another one is computing just now waits for them: it will find them in the cache. Nobody
//! overtakes a sequence that lacks memory, so that large ones do not starve.

use crate::{memory::Memory, sequence::Sequence, shares::Shares};
use std::{
    cmp::Reverse,
    collections::BTreeMap,
    time::{Duration, Instant},
};
use types::{BLOCK_TOKENS, ClientId};

/// Who waits longer than this may go by age, and is of the highest priority once admitted.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// One in so many admissions goes by age.
const BY_AGE_EVERY: u64 = 4;
/// Of the time to its deadline, how much a sequence waits for a slot before it takes one from a client that has too many.
const PATIENCE: f64 = 0.25;
/// Blocks in common with a prompt being read for which it is worth to wait: what is less cannot be shared.
const TWIN_BLOCKS_MIN: usize = 1;

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
    /// Admissions so far.
    pub(crate) admissions: u64,
}

impl Admission<'_> {
    /// Index of the waiting sequence to admit next, were there a slot; none where nobody can be admitted.
    pub(crate) fn next(&self) -> Option<usize> {
        let matched: Vec<(usize, usize)> =
            self.waiting.iter().map(|sequence| self.matched(sequence)).collect();
        let (slots_of, share) = (self.slots_of(), self.share());
        let able = (0..self.waiting.len()).filter(|&index| {
            let sequence = &self.waiting[index];
            !sequence.is_ahead() && !self.has_leader(sequence, matched[index].0)
        });
        let by_age = self.admissions % BY_AGE_EVERY == BY_AGE_EVERY - 1;
        let first = able.min_by_key(|&index| {
            let sequence = &self.waiting[index];
            let priority = match by_age && self.is_aged(sequence) {
                true => None,
                false => Some(Reverse(sequence.priority)),
            };
            let overdue = sequence.wait_left_s(self.now) < 0.0;
            let saved = if overdue { 0 } else { matched[index].0 };
            let in_debt = !self.shares.may_take(sequence.client);
            let has_share = slots_of.get(&sequence.client).is_some_and(|&count| count >= share);
            (in_debt, priority, has_share, !overdue, Reverse(saved), sequence.arrival())
        })?;
        let (cached, unused) = matched[first];
        let needed = self.waiting[first].expected_blocks() - (cached - unused);
        (needed <= self.blocks_left()).then_some(first)
    }

    /// Whether it has waited so long that others should wait for it.
    pub(crate) fn is_aged(&self, sequence: &Sequence) -> bool {
        self.now.saturating_duration_since(sequence.targets.arrived) >= WAIT_MAX
    }

    /// Index of the running sequence that should give up its slot for a waiting one: one of lower priority, of the same
    /// client or of one with more than its share of slots; one of a client with more than its share where the waiting
    /// one's client has less; or one that is still being read and due much later. What it gives up stays in the cache.
    pub(crate) fn yields(&self, candidate: &Sequence) -> Option<usize> {
        let youngest = |wanted: &dyn Fn(&Sequence) -> bool| {
            let yielding = (0..self.running.len()).filter(|&index| wanted(&self.running[index]));
            yielding.max_by_key(|&index| self.running[index].arrival())
        };
        let (slots_of, share) = (self.slots_of(), self.share());
        let count = |client: ClientId| slots_of.get(&client).copied().unwrap_or(0);
        let lower = |sequence: &Sequence| {
            let of_whom = sequence.client == candidate.client || count(sequence.client) > share;
            (of_whom && sequence.priority < candidate.priority).then_some(sequence.priority)
        };
        if let Some(lowest) = self.running.iter().filter_map(lower).min() {
            return youngest(&|sequence| lower(sequence) == Some(lowest));
        }
        let left_s = candidate.wait_left_s(self.now);
        // A slot that becomes free by itself saves the coming and going.
        let waited_s = self.now.saturating_duration_since(candidate.targets.arrived).as_secs_f64();
        let patient = waited_s < left_s * PATIENCE;
        let own = count(candidate.client);
        let greediest = slots_of.iter().max_by_key(|(_, count)| **count);
        let greediest = greediest.filter(|(_, count)| own < share && **count > share.max(own + 1));
        if let Some((&greedy, _)) = greediest.filter(|_| !patient) {
            return youngest(&|sequence| sequence.client == greedy);
        }
        // Twice as far off, so that two of the same kind never take turns.
        youngest(&|sequence| {
            let far = sequence.wait_left_s(self.now) > 2.0 * left_s.max(0.0) + 1.0;
            let read = sequence.decodes() || sequence.is_ahead();
            !read && far && sequence.priority == candidate.priority
        })
    }

    /// Running sequences, by client.
    fn slots_of(&self) -> BTreeMap<ClientId, usize> {
        let mut slots_of = BTreeMap::new();
        for sequence in self.running {
            *slots_of.entry(sequence.client).or_default() += 1;
        }
        slots_of
    }

    /// Slots that each client may have before those that have less come first.
    fn share(&self) -> usize {
        (self.slots / self.shares.clients().max(1)).max(1)
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
