//! The state machine: nodes, what was sent to them, and the choice between them.

use crate::booking::{Booking, BookingId, BookingStage};
use crate::choice::{Candidate, Occasion, TIE_S};
use crate::cost::Job;
use crate::index::{CacheIndex, Matches, Slot};
use crate::learned::Learned;
use crate::node::KnownNode;
use crate::plan::Plan;
use crate::query::{Considered, Excluded, Resync, Route, RouteError, RouteQuery, RouteReason};
use crate::sessions::Sessions;
use crate::settings::RouterSettings;
use crate::speculation::Speculation;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use types::{BLOCK_TOKENS, CacheEvent, CacheSnapshot, EngineState, ModelCard, NodeId, NodeLoad, limits};

/// Names of models remembered after their last node left, so that asking for them is "not now" and not "unknown".
const MODELS_REMEMBERED_MAX: usize = limits::NODES_MAX;
/// The least time after which a refused client is asked to come back.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
/// The most: beyond it no prediction is worth much.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// Tokens that answers are taken to have until some were seen: clients allow far more than they use.
const ANSWER_TOKENS: f64 = 200.0;
/// Weight of one more answer in their mean.
const ANSWER_WEIGHT: f64 = 1.0 / 128.0;
/// Tokens of a text from which the time of a step is learned.
const STEP_TOKENS_MIN: u32 = 8;

/// Everything one router knows, and the choice that follows from it.
#[derive(Debug)]
pub struct Router {
    settings: RouterSettings,
    nodes: BTreeMap<NodeId, KnownNode>,
    index: CacheIndex,
    speculation: Speculation,
    sessions: Sessions,
    /// Requests booked so far.
    booked: u64,
    models_seen: BTreeSet<String>,
    /// Mean tokens of an answer.
    answer_tokens: f64,
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
        self.nodes.insert(node, KnownNode::new(slot));
        true
    }

    /// A node told its engine's state and what it serves. One that loads or restarts has an empty cache.
    pub fn state(&mut self, node: NodeId, state: EngineState, models: Vec<ModelCard>) {
        let fresh = matches!(state, EngineState::Loading | EngineState::Restarting(_));
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
            known.reported(load, now);
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

    /// Where the request should go, or why nowhere.
    ///
    /// # Errors
    /// [`RouteError`], which tells "never heard of it", "not now" and "busy" apart.
    pub fn route(&self, query: &RouteQuery<'_>, now: Instant) -> Result<Route, RouteError> {
        self.route_after(query, &mut Plan::default(), now)
    }

    /// The same for one that waits behind others: for which of them which node is meant, `plan` knows. Where the node that
    /// is best for this one is full, that is [`RouteError::AllBusy`], and `plan` knows it from then on.
    ///
    /// # Errors
    /// See [`Self::route`].
    pub fn route_after(
        &self,
        query: &RouteQuery<'_>,
        plan: &mut Plan,
        now: Instant,
    ) -> Result<Route, RouteError> {
        let waits = self.settings.policy.waits();
        let usable =
            |excluded: Option<Excluded>| excluded.is_none() || waits && excluded == Some(Excluded::Full);
        let (mut free, mut full, mut free_s) = (Vec::new(), Vec::new(), None::<f64>);
        for (one, excluded) in self.candidates(query, plan, now) {
            if matches!(excluded, Some(Excluded::Full | Excluded::Refused)) {
                let wait_s = one.cost.backlog_s + one.work.slot_s();
                free_s = Some(free_s.map_or(wait_s, |least| least.min(wait_s)));
            }
            if usable(excluded) {
                free.push(one);
                full.push(excluded.is_some());
            }
        }
        let occasion = Occasion {
            settings: &self.settings,
            hashes: query.hashes,
            prompt_tokens: query.prompt_tokens,
            session: query.session.and_then(|session| self.sessions.node(session)),
            turn: self.booked,
        };
        match (occasion.choose(&free), free_s) {
            (Some(best), Some(wait_s)) if full[best] => {
                plan.add(free[best].node, free[best].cost.prefill_s);
                Err(busy(wait_s))
            }
            (Some(best), _) => Ok(self.chosen(&free, best, query)),
            (None, Some(wait_s)) => Err(busy(wait_s)),
            (None, None) => Err(self.no_node(query)),
        }
    }

    /// What each node would cost, and why it cannot be chosen; in order of id.
    pub fn explain(&self, query: &RouteQuery<'_>, now: Instant) -> Vec<Considered> {
        let all = self.candidates(query, &Plan::default(), now).into_iter();
        let considered = all.map(|(one, excluded)| Considered {
            node: one.node,
            matched_tokens: one.matched_tokens,
            cost: one.cost,
            requests: one.work.requests,
            excluded,
        });
        considered.collect()
    }

    /// Commits to a route just given: counts its work as the node's until the node's reports do.
    pub fn book(&mut self, route: &Route, query: &RouteQuery<'_>, now: Instant) -> Option<BookingId> {
        let known = self.nodes.get_mut(&route.node)?;
        let uncached_tokens = u64::from(query.prompt_tokens.saturating_sub(route.matched_tokens));
        let job = Job {
            matched_tokens: u64::from(route.matched_tokens),
            uncached_tokens,
            answer_tokens: self.answer_tokens.min(f64::from(query.max_tokens)),
        };
        let work = known.work(self.answer_tokens, now);
        let booking = Booking {
            stage: BookingStage::Sent,
            prefill_tokens: uncached_tokens,
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
        let id = BookingId { node: route.node, number: self.booked };
        known.bookings.insert(id.number, booking);
        self.booked += 1;
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
            known.predictor.observe(&booking.features, took.as_secs_f64());
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
            self.answer_tokens += (f64::from(booking.tokens) - self.answer_tokens) * ANSWER_WEIGHT;
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

    /// Tokens of the prompt that no node's cache is expected to hold.
    pub fn uncached_tokens(&self, query: &RouteQuery<'_>) -> u32 {
        let matches = self.matches(query);
        let longest = self.nodes.values().map(|known| matches.blocks(known.slot)).max().unwrap_or(0);
        query.prompt_tokens.saturating_sub((longest * BLOCK_TOKENS) as u32)
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

    fn forget(&mut self, slot: Slot) {
        self.index.close(slot);
        self.speculation.forget(slot);
    }

    fn booking(&mut self, id: BookingId) -> Option<&mut Booking> {
        self.nodes.get_mut(&id.node)?.bookings.get_mut(&id.number)
    }

    fn matches(&self, query: &RouteQuery<'_>) -> Matches {
        let mut matches = self.index.matches(query.hashes);
        self.speculation.matches(query.hashes, &mut matches);
        matches
    }

    /// All nodes as candidates, in order of id, with what excludes them.
    fn candidates<'a>(
        &'a self,
        query: &RouteQuery<'_>,
        plan: &Plan,
        now: Instant,
    ) -> Vec<(Candidate<'a>, Option<Excluded>)> {
        let matches = self.matches(query);
        let serving = || self.nodes.values().filter(|known| known.is_ready() && known.serves(query.model));
        // Where it fits nowhere, a node says so, with the numbers.
        let fits_somewhere = serving().any(|known| known.fits(query));
        let (nodes, read_s) = serving()
            .fold((0.0, 0.0), |(nodes, seconds), known| (nodes + 1.0, seconds + known.predictor.read_s(1.0)));
        let token_s = if nodes > 0.0 { read_s / nodes } else { 0.0 };
        let answer_tokens = self.answer_tokens.min(f64::from(query.max_tokens));
        let all = self.nodes.iter().map(|(&node, known)| {
            let mut work = known.work(self.answer_tokens, now);
            work.planned_s = plan.planned_s(node);
            let blocks = matches.blocks(known.slot);
            // The last token is always computed: its logits are the answer.
            let matched_tokens =
                (blocks * BLOCK_TOKENS).min(query.prompt_tokens.saturating_sub(1) as usize) as u32;
            let job = Job {
                matched_tokens: u64::from(matched_tokens),
                uncached_tokens: u64::from(query.prompt_tokens - matched_tokens),
                answer_tokens,
            };
            let cost = work.cost(&job, &self.settings.cost, token_s);
            let excluded = if !known.is_ready() {
                Some(Excluded::NotReady)
            } else if !known.serves(query.model) {
                Some(Excluded::OtherModel)
            } else if query.exclude.contains(&node) {
                Some(Excluded::Tried)
            } else if fits_somewhere && !known.fits(query) {
                Some(Excluded::SmallContext)
            } else if known.full {
                Some(Excluded::Refused)
            } else {
                let room = known.has_room(&work, cost.backlog_s, &self.settings);
                (!room).then_some(Excluded::Full)
            };
            (Candidate { node, matched_tokens, work, cost, given: known.given }, excluded)
        });
        all.collect()
    }

    fn chosen(&self, all: &[Candidate<'_>], best: usize, query: &RouteQuery<'_>) -> Route {
        let Candidate { node, matched_tokens, ref work, cost, .. } = all[best];
        // It was the cache if without it another node would have been cheaper, or as cheap as makes no difference.
        let uncached_tokens = u64::from(query.prompt_tokens);
        let answer_tokens = self.answer_tokens.min(f64::from(query.max_tokens));
        let cold = Job { matched_tokens: 0, uncached_tokens, answer_tokens };
        let cold_s = work.cost(&cold, &self.settings.cost, 0.0).total_s();
        let mut others = all.iter().filter(|other| other.node != node);
        let reason = if all.len() == 1 {
            RouteReason::OnlyNode
        } else if matched_tokens > 0 && others.any(|other| other.cost.total_s() <= cold_s + TIE_S) {
            RouteReason::Affinity
        } else {
            RouteReason::LeastWork
        };
        Route { node, matched_tokens, cost, reason }
    }

    fn no_node(&self, query: &RouteQuery<'_>) -> RouteError {
        let serving = || self.nodes.iter().filter(|(_, known)| known.serves(query.model));
        let unfinished = self.nodes.values().any(|known| known.models.is_empty() && !known.is_ready());
        let reason = if self.nodes.is_empty() {
            "no node is connected".to_owned()
        } else if serving().next().is_none() && unfinished {
            "nodes are still loading their models".to_owned()
        } else if serving().next().is_none() && self.models_seen.contains(query.model) {
            "no connected node serves it any more".to_owned()
        } else if serving().next().is_none() {
            let served = self.models().into_iter().map(|card| card.name).collect();
            return RouteError::UnknownModel { model: query.model.to_owned(), served };
        } else {
            let states = serving().map(|(id, known)| match &known.state {
                EngineState::Loading => "a node is loading it".to_owned(),
                EngineState::Ready if query.exclude.contains(id) => {
                    "a node failed on this request".to_owned()
                }
                EngineState::Ready => "a node is ready".to_owned(),
                EngineState::Draining => "a node is leaving".to_owned(),
                EngineState::Restarting(seen) => format!("a node is restarting ({seen})"),
            });
            let states: BTreeSet<String> = states.collect();
            states.into_iter().collect::<Vec<_>>().join(", ")
        };
        RouteError::NoNode { reason }
    }
}

fn busy(wait_s: f64) -> RouteError {
    let wait = Duration::try_from_secs_f64(wait_s).unwrap_or(RETRY_AFTER_MAX);
    RouteError::AllBusy { retry_after: wait.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX) }
}
