//! The state machine: nodes, what was sent to them, and the choice between them.

use crate::booking::{Booking, BookingId, BookingStage};
use crate::cost::{Job, Usual};
use crate::index::{CacheIndex, Slot};
use crate::learned::Learned;
use crate::node::KnownNode;
use crate::query::{Resync, Route, RouteQuery, RouteReason};
use crate::sessions::Sessions;
use crate::settings::RouterSettings;
use crate::speculation::Speculation;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use types::{CacheEvent, CacheSnapshot, EngineState, ModelCard, NodeId, NodeLoad, limits};

/// After so many load reports the mean speed of nodes is looked at again: it changes slowly.
const REPORTS_LOOKED_AT: u64 = 256;
/// Names of models remembered after their last node left, so that asking for them is "not now" and not "unknown".
const MODELS_REMEMBERED_MAX: usize = limits::NODES_MAX;
/// Tokens that answers are taken to have until some were seen: clients allow far more than they use.
const ANSWER_TOKENS: f64 = 200.0;
/// The share of prompts found in caches from which on what a request evicts counts in full; below, in proportion: where no
/// prompt has a beginning in common with another, nothing is lost.
const FOUND_SHARE: f64 = 0.1;
/// Weight of one more answer, or prompt, in their mean.
const ANSWER_WEIGHT: f64 = 1.0 / 128.0;
/// A first token after less than this share of the time predicted: the node may be faster than what is known by now.
const SURPRISE: f64 = 0.8;
/// So many trials are forgotten then: a node that surprises at every trial is tried soon again, one that does so by chance
/// ever more rarely all the same.
const SURPRISE_TRIALS: u32 = 2;
/// Tokens of a text from which the time of a step is learned.
const STEP_TOKENS_MIN: u32 = 8;

/// Everything one router knows, and the choice that follows from it.
#[derive(Debug)]
pub struct Router {
    pub(crate) settings: RouterSettings,
    pub(crate) nodes: BTreeMap<NodeId, KnownNode>,
    pub(crate) index: CacheIndex,
    pub(crate) speculation: Speculation,
    pub(crate) sessions: Sessions,
    /// Requests booked so far.
    pub(crate) booked: u64,
    pub(crate) models_seen: BTreeSet<String>,
    /// Mean tokens of an answer.
    pub(crate) answer_tokens: f64,
    /// Mean share of a prompt that its node is expected to have in its cache; all of it until some were seen.
    found_share: f64,
    /// Sum and number of what nodes' decode steps turned out to take ([`KnownNode::correction`]).
    corrections: (f64, u32),
    /// Seconds in which a usual node reads a token.
    pub(crate) token_s: f64,
    /// Load reports so far.
    reports: u64,
}

impl Router {
    /// Knows no nodes.
    pub fn new(settings: RouterSettings) -> Self {
        Self {
            settings,
            nodes: BTreeMap::new(),
            index: CacheIndex::default(),
            speculation: Speculation::default(),
            sessions: Sessions::default(),
            booked: 0,
            models_seen: BTreeSet::new(),
            answer_tokens: ANSWER_TOKENS,
            found_share: 1.0,
            corrections: (0.0, 0),
            token_s: 0.0,
            reports: 0,
        }
    }

    /// A node connected. Returns false, and changes nothing, where [`limits::NODES_MAX`] are known already.
    /// One that was known is known afresh.
    pub fn node_up(&mut self, node: NodeId) -> bool {
        self.node_down(node);
        if self.nodes.len() >= limits::NODES_MAX {
            return false;
        }
        let Some(slot) = self.index.open() else { return false };
        self.nodes.insert(node, KnownNode { last_turn: self.booked, ..KnownNode::new(slot) });
        true
    }

    /// A node told its engine's state and what it serves. One that loads or restarts has an empty cache.
    pub fn state(&mut self, node: NodeId, state: EngineState, models: Vec<ModelCard>) {
        let fresh =
            matches!(state, EngineState::Loading | EngineState::Restarting(_) | EngineState::Pipeline(_));
        if fresh && self.nodes.contains_key(&node) {
            let rtt = self.nodes.get(&node).map_or(Duration::ZERO, KnownNode::rtt);
            self.node_up(node);
            self.rtt(node, rtt);
        }
        let Some(known) = self.nodes.get_mut(&node) else { return };
        known.state = state;
        known.models = models;
        known.models.truncate(limits::NODE_MODELS_MAX);
        for card in &known.models {
            if self.models_seen.len() < MODELS_REMEMBERED_MAX {
                self.models_seen.insert(card.name.clone());
            }
        }
    }

    /// A node told its load: it includes every request that the node had accepted before.
    pub fn load(&mut self, node: NodeId, load: NodeLoad, now: Instant) {
        if let Some(known) = self.nodes.get_mut(&node) {
            let first = known.load.is_none();
            let before = known.correction();
            known.reported(load, now);
            let after = known.correction();
            self.corrected(before, after);
            self.reports += 1;
            if first || self.reports.is_multiple_of(REPORTS_LOOKED_AT) {
                let told = || self.nodes.values().filter(|known| known.load.is_some());
                let sum: f64 = told().map(|known| known.predictor.read_s(1.0)).sum();
                self.token_s = sum / told().count().max(1) as f64;
            }
        }
    }

    /// A node refused a request as busy: it gets none until it reports its load again.
    pub fn full(&mut self, node: NodeId) {
        if let Some(known) = self.nodes.get_mut(&node) {
            known.full = true;
        }
    }

    /// The round-trip time to a node was measured.
    pub fn rtt(&mut self, node: NodeId, rtt: Duration) {
        if let Some(known) = self.nodes.get_mut(&node) {
            known.rtt = rtt;
        }
    }

    /// A node is gone.
    pub fn node_down(&mut self, node: NodeId) {
        if let Some(known) = self.nodes.remove(&node) {
            self.corrected(known.correction(), None);
            self.forget(known.slot);
            for booking in known.bookings.into_values() {
                self.speculation.dropped(booking.guess);
            }
        }
    }

    /// A node told all that its cache holds.
    pub fn cache_snapshot(&mut self, node: NodeId, snapshot: CacheSnapshot, now: Instant) {
        let Some(known) = self.nodes.get_mut(&node) else { return };
        self.index.replace(known.slot, &snapshot.blocks);
        known.cache = Some((snapshot.epoch, snapshot.seq));
        self.speculation.forget(known.slot);
        self.speculation.expire(now);
    }

    /// A node told more of what its cache holds, as of the snapshot begun with [`Self::cache_snapshot`]. A large one that
    /// comes in parts never takes long.
    pub fn cache_snapshot_more(&mut self, node: NodeId, part: &CacheSnapshot) {
        let Some(known) = self.nodes.get(&node) else { return };
        if known.cache == Some((part.epoch, part.seq)) {
            self.index.store(known.slot, &part.blocks);
        }
    }

    /// A node told what changed in its cache since its engine, the one of `epoch`, had told `first_seq` events.
    /// What is known already is passed over.
    ///
    /// # Errors
    /// [`Resync`] where events are missing before these or the engine is not the one known: nothing changes, and the
    /// node is to be asked for a snapshot.
    pub fn cache_events(
        &mut self,
        node: NodeId,
        epoch: u64,
        first_seq: u64,
        events: &[CacheEvent],
        now: Instant,
    ) -> Result<(), Resync> {
        let Some(known) = self.nodes.get_mut(&node) else { return Ok(()) };
        let next = match known.cache {
            Some((known_epoch, next)) if known_epoch == epoch && first_seq <= next => next,
            known => return Err(Resync { node, epoch, first_seq, known }),
        };
        let seen = usize::try_from(next - first_seq).unwrap_or(usize::MAX);
        for event in events.iter().skip(seen) {
            match event {
                CacheEvent::Stored { blocks, .. } => self.index.store(known.slot, blocks),
                CacheEvent::Removed { blocks } => self.index.remove(known.slot, blocks),
            }
        }
        known.cache = Some((epoch, next.max(first_seq.saturating_add(events.len() as u64))));
        self.speculation.expire(now);
        Ok(())
    }

    /// Commits to a route just given: counts its work as the node's until the node's reports do.
    pub fn book(&mut self, route: &Route, query: &RouteQuery<'_>, now: Instant) -> Option<BookingId> {
        let usual = self.usual();
        let known = self.nodes.get_mut(&route.node)?;
        let job = Job::new(query, route.matched_tokens, 0, usual.answer_tokens);
        let work = known.work(usual, 0.0, now);
        let booking = Booking {
            stage: BookingStage::Sent,
            prefill_tokens: job.uncached_tokens,
            decode_tokens: u64::from(query.max_tokens),
            guess: self.speculation.sent(known.slot, query.hashes),
            sent: now,
            rtt: known.rtt,
            features: work.features(&job),
            first_token: None,
            tokens: 0,
            step_s: work.step_s((work.requests + 1).min(work.slots().max(1))),
        };
        known.flow.add(route.cost.prefill_s, now);
        known.booked.add(&booking);
        known.unread += 1;
        known.given += 1;
        known.last_turn = self.booked;
        known.trials += u32::from(route.reason == RouteReason::Trial);
        let id = BookingId { node: route.node, number: self.booked };
        known.bookings.insert(id.number, booking);
        self.booked += 1;
        let found = f64::from(route.matched_tokens) / f64::from(query.prompt_tokens.max(1));
        self.found_share += (found.min(1.0) - self.found_share) * ANSWER_WEIGHT;
        if let Some(session) = query.session {
            self.sessions.sent(session, route.node);
        }
        Some(id)
    }

    /// The node took the request: its next load report includes it.
    pub fn accepted(&mut self, booking: BookingId, _now: Instant) {
        if let Some(booking) = self.booking(booking)
            && booking.stage == BookingStage::Sent
        {
            booking.stage = BookingStage::Accepted;
        }
    }

    /// The first token came: its prompt is read.
    pub fn first_token(&mut self, booking: BookingId, now: Instant) {
        let Some(known) = self.nodes.get_mut(&booking.node) else { return };
        let Some(booking) = known.bookings.get_mut(&booking.number) else { return };
        let tokens = std::mem::take(&mut booking.prefill_tokens);
        if booking.stage != BookingStage::Reported {
            known.booked.prefill_tokens = known.booked.prefill_tokens.saturating_sub(tokens);
        }
        if booking.first_token.is_none() {
            booking.first_token = Some(now);
            known.unread -= 1;
            booking.tokens = 1;
            let took = now.saturating_duration_since(booking.sent).saturating_sub(booking.rtt);
            let took_s = took.as_secs_f64();
            if took_s < known.predictor.seconds(&booking.features) * SURPRISE {
                known.trials = known.trials.saturating_sub(SURPRISE_TRIALS);
            }
            known.predictor.observe(&booking.features, took_s);
        }
    }

    /// So many tokens came by now.
    pub fn progress(&mut self, booking: BookingId, tokens: u32, _now: Instant) {
        if let Some(booking) = self.booking(booking) {
            booking.tokens = booking.tokens.max(tokens);
        }
    }

    /// The request ended, was refused or was given up. Once for each booking; more do nothing.
    pub fn finished(&mut self, booking: BookingId, now: Instant) {
        let Some(known) = self.nodes.get_mut(&booking.node) else { return };
        let Some(booking) = known.bookings.remove(&booking.number) else { return };
        match booking.stage {
            BookingStage::Sent | BookingStage::Accepted => known.booked.remove(&booking),
            BookingStage::Reported => known.ended = known.ended.saturating_add(1),
        }
        if let Some(first) = booking.first_token {
            // One that may have a token only says nothing of how long answers are.
            if booking.decode_tokens > 1 {
                self.answer_tokens += (f64::from(booking.tokens) - self.answer_tokens) * ANSWER_WEIGHT;
            }
            if booking.tokens >= STEP_TOKENS_MIN {
                let seconds = now.saturating_duration_since(first).as_secs_f64();
                known.predictor.observe_step(booking.step_s, seconds / f64::from(booking.tokens - 1));
            }
            self.speculation.ended(booking.guess, known.cache.is_some(), now);
        } else {
            known.unread -= 1;
            self.speculation.dropped(booking.guess);
        }
    }

    /// What was learned of a node from the requests it had.
    pub fn learned(&self, node: NodeId) -> Option<Learned> {
        self.nodes.get(&node).map(KnownNode::learned)
    }

    /// Nodes, in order of id.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &KnownNode)> {
        self.nodes.iter().map(|(&id, known)| (id, known))
    }

    /// One node.
    pub fn node(&self, id: NodeId) -> Option<&KnownNode> {
        self.nodes.get(&id)
    }

    /// The card of a model that some node serves, ready or not; the one with the largest context.
    pub fn card(&self, model: &str) -> Option<&ModelCard> {
        let cards = self.nodes.values().flat_map(|known| &known.models).filter(|card| card.name == model);
        cards.max_by_key(|card| card.context_tokens)
    }

    /// Models that at least one ready node serves, by name, each once: with the largest context that is to be had.
    pub fn models(&self) -> Vec<ModelCard> {
        let ready = self.nodes.values().filter(|known| known.is_ready());
        let mut by_name: BTreeMap<&str, &ModelCard> = BTreeMap::new();
        for card in ready.flat_map(|known| &known.models) {
            let largest = by_name.entry(&card.name).or_insert(card);
            if card.context_tokens > largest.context_tokens {
                *largest = card;
            }
        }
        by_name.into_values().cloned().collect()
    }

    /// Requests booked and not finished.
    pub fn in_flight(&self) -> usize {
        self.nodes.values().map(|known| known.bookings.len()).sum()
    }

    /// Blocks known to be in a node's cache.
    pub fn cached_blocks(&self, node: NodeId) -> usize {
        self.nodes.get(&node).map_or(0, |known| self.index.blocks(known.slot))
    }

    /// Blocks known to be in nodes' caches, each as often as nodes have it.
    pub fn index_blocks(&self) -> usize {
        self.index.held()
    }

    /// Blocks that nodes were sent and have not told of yet.
    pub fn expected_blocks(&self) -> usize {
        self.speculation.noted()
    }

    pub(crate) fn usual(&self) -> Usual {
        let (sum, count) = self.corrections;
        let correction = if count == 0 { 1.0 } else { (sum / f64::from(count)).min(1.0) };
        let reuse = (self.found_share / FOUND_SHARE).min(1.0);
        Usual { answer_tokens: self.answer_tokens, correction, reuse }
    }

    /// A node's correction is another one now.
    fn corrected(&mut self, before: Option<f64>, after: Option<f64>) {
        let (sum, count) = &mut self.corrections;
        *sum += after.unwrap_or(0.0) - before.unwrap_or(0.0);
        *count = *count + u32::from(after.is_some()) - u32::from(before.is_some());
    }

    fn forget(&mut self, slot: Slot) {
        self.index.close(slot);
        self.speculation.forget(slot);
    }

    fn booking(&mut self, id: BookingId) -> Option<&mut Booking> {
        self.nodes.get_mut(&id.node)?.bookings.get_mut(&id.number)
    }
}
