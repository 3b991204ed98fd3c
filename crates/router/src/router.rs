//! The state machine: nodes, what was sent to them, and the choice between them.

use crate::affinity::{AffinityRecord, EngineEpoch, GENERATION_BLOCKS_MAX};
use crate::booking::{BookedWork, Booking, BookingId, BookingStage, Bookings};
use crate::cost::{Cost, SLOTS_UNKNOWN, Work};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use types::{BLOCK_TOKENS, BlockHash, EngineState, ModelCard, NodeId, NodeLoad, limits};

/// Requests that a router lets wait at a node beside those that run: enough that a freed slot is refilled without a
/// round trip, few enough that a request is bound to a node late.
pub const NODE_WAITING_MAX: u32 = 4;
/// Costs within this fraction of the least one are equal: no prediction is better than that.
const TIE_FRACTION: f64 = 0.05;
/// Costs within this of the least one are equal, in seconds: below what anybody notices.
const TIE_S: f64 = 0.005;
/// Names of models remembered after their last node left, so that asking for them is "not now" and not "unknown".
const MODELS_REMEMBERED_MAX: usize = limits::NODES_MAX;
/// The least time after which a refused client is asked to come back.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
/// The most: beyond it no prediction is worth much.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// What is to be routed.
#[derive(Debug, Clone, Copy)]
pub struct RouteQuery<'a> {
    /// The model's name.
    pub model: &'a str,
    /// Hashes of the prompt's full blocks, in order.
    pub hashes: &'a [BlockHash],
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens to generate at most.
    pub max_tokens: u32,
    /// Nodes not to be chosen: those that were tried.
    pub exclude: &'a [NodeId],
}

/// Where a request should go.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// The node.
    pub node: NodeId,
    /// Tokens of the prompt expected in its cache.
    pub matched_tokens: u32,
    /// What it is expected to cost there.
    pub cost: Cost,
    /// What decided.
    pub reason: RouteReason,
}

/// What decided a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteReason {
    /// No other node could take it.
    OnlyNode,
    /// Part of the prompt is expected in the node's cache, and that outweighs all else.
    Affinity,
    /// The node would be done first, whatever caches hold.
    LeastWork,
}

impl std::fmt::Display for RouteReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::OnlyNode => "only node",
            Self::Affinity => "affinity",
            Self::LeastWork => "least work",
        })
    }
}

/// Why there is no route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// No node serves or served that model.
    #[error("no node serves the model {model:?}")]
    UnknownModel {
        /// The model asked for.
        model: String,
        /// The models that are served.
        served: Vec<String>,
    },
    /// Nodes are missing, not ready or tried already.
    #[error("{reason}")]
    NoNode {
        /// What the nodes lack.
        reason: String,
    },
    /// Every node that could serve it has as many requests as it may.
    #[error("all nodes are busy for {retry_after:?}")]
    AllBusy {
        /// When a place is expected.
        retry_after: Duration,
    },
}

/// A node as the router knows it.
#[derive(Debug, Clone)]
pub struct KnownNode {
    engine: EngineEpoch,
    state: EngineState,
    models: Vec<ModelCard>,
    load: Option<(NodeLoad, Instant)>,
    rtt: Duration,
    /// Not in the last load report.
    booked: BookedWork,
    /// Requests that ended since the last load report, which still counts them.
    ended: u32,
    /// It refused a request as busy since the last load report.
    full: bool,
}

impl KnownNode {
    /// Its engine's state.
    pub fn state(&self) -> &EngineState {
        &self.state
    }

    /// What it serves.
    pub fn models(&self) -> &[ModelCard] {
        &self.models
    }

    /// Its last load report.
    pub fn load(&self) -> Option<&NodeLoad> {
        self.load.as_ref().map(|(load, _)| load)
    }

    /// Round-trip time; zero for the local node.
    pub fn rtt(&self) -> Duration {
        self.rtt
    }

    /// Requests sent to it that its last load report did not include.
    pub fn booked_requests(&self) -> u32 {
        self.booked.requests
    }

    /// Their tokens, to be read and to be written.
    pub fn booked_tokens(&self) -> u64 {
        self.booked.prefill_tokens + self.booked.decode_tokens
    }

    fn is_ready(&self) -> bool {
        self.state == EngineState::Ready
    }

    fn serves(&self, model: &str) -> bool {
        self.models.iter().any(|card| card.name == model)
    }

    /// Whether it serves the model with a context that holds the request: machines with less memory have a smaller one.
    fn fits(&self, query: &RouteQuery<'_>) -> bool {
        let tokens = u64::from(query.prompt_tokens) + u64::from(query.max_tokens);
        let holds = |card: &ModelCard| card.name == query.model && tokens <= u64::from(card.context_tokens);
        self.models.iter().any(holds)
    }

    fn work(&self, now: Instant) -> Work {
        let load = self.load();
        let since = self.load.map_or(Duration::ZERO, |(_, at)| now.saturating_duration_since(at));
        let reported = load.map_or(0, |load| load.running.saturating_add(load.waiting));
        Work {
            rates: Work::rates(load),
            slots: load.map_or(SLOTS_UNKNOWN, |load| load.slots),
            requests: reported.saturating_sub(self.ended).saturating_add(self.booked.requests),
            backlog_s: Work::backlog_s(load, since),
            booked_tokens: self.booked.prefill_tokens,
            decode_tokens: load
                .map_or(0, |load| load.decode_backlog_tokens)
                .saturating_add(self.booked.decode_tokens),
            rtt: self.rtt,
        }
    }
}

/// Everything one router knows, and the choice that follows from it.
#[derive(Debug)]
pub struct Router {
    nodes: BTreeMap<NodeId, KnownNode>,
    affinity: AffinityRecord,
    bookings: Bookings,
    engines: u32,
    models_seen: BTreeSet<String>,
}

impl Default for Router {
    fn default() -> Self {
        Self::new()
    }
}

impl Router {
    /// Knows no nodes.
    pub fn new() -> Self {
        Self {
            nodes: BTreeMap::new(),
            affinity: AffinityRecord::new(GENERATION_BLOCKS_MAX),
            bookings: Bookings::default(),
            engines: 0,
            models_seen: BTreeSet::new(),
        }
    }

    /// A node connected. Returns false, and changes nothing, where [`limits::NODES_MAX`] are known already.
    /// One that was known is known afresh.
    pub fn node_up(&mut self, node: NodeId) -> bool {
        self.node_down(node);
        if self.nodes.len() >= limits::NODES_MAX {
            return false;
        }
        let engine = self.next_engine();
        self.nodes.insert(
            node,
            KnownNode {
                engine,
                state: EngineState::Loading,
                models: Vec::new(),
                load: None,
                rtt: Duration::ZERO,
                booked: BookedWork::default(),
                ended: 0,
                full: false,
            },
        );
        true
    }

    /// A node told its engine's state and what it serves. One that loads or restarts has an empty cache.
    pub fn state(&mut self, node: NodeId, state: EngineState, models: Vec<ModelCard>) {
        let fresh = matches!(state, EngineState::Loading | EngineState::Restarting(_));
        let engine = if fresh { Some(self.next_engine()) } else { None };
        let Some(known) = self.nodes.get_mut(&node) else { return };
        if let Some(engine) = engine {
            self.bookings.drop_engine(known.engine);
            known.engine = engine;
            known.load = None;
            known.booked = BookedWork::default();
            known.ended = 0;
            known.full = false;
        }
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
            known.load = Some((load, now));
            known.ended = 0;
            known.full = false;
            self.bookings.reported(node, &mut known.booked);
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
            self.bookings.drop_engine(known.engine);
        }
    }

    /// Where the request should go, or why nowhere.
    ///
    /// # Errors
    /// [`RouteError`], which tells "never heard of it", "not now" and "busy" apart.
    pub fn route(&self, query: &RouteQuery<'_>, now: Instant) -> Result<Route, RouteError> {
        let matches = self.affinity.matches(query.hashes);
        let serving = || self.nodes.values().filter(|known| known.is_ready() && known.serves(query.model));
        // Where it fits nowhere, a node says so, with the numbers.
        let fits_somewhere = serving().any(|known| known.fits(query));
        let mut candidates = Vec::new();
        let mut free_s = None::<f64>;
        for (&node, known) in &self.nodes {
            if !known.is_ready() || !known.serves(query.model) || query.exclude.contains(&node) {
                continue;
            }
            if fits_somewhere && !known.fits(query) {
                continue;
            }
            let work = known.work(now);
            if known.full || work.requests >= work.slots.saturating_add(NODE_WAITING_MAX) {
                free_s = Some(free_s.unwrap_or(f64::INFINITY).min(work.slot_s()));
                continue;
            }
            let blocks =
                matches.iter().find(|(engine, _)| *engine == known.engine).map_or(0, |found| found.1);
            // The last token is always computed: its logits are the answer.
            let matched_tokens =
                (blocks * BLOCK_TOKENS).min(query.prompt_tokens.saturating_sub(1) as usize) as u32;
            let uncached = u64::from(query.prompt_tokens - matched_tokens);
            let cost = work.cost(uncached, query.max_tokens);
            candidates.push(Candidate { node, matched_tokens, work, cost });
        }
        let best_s =
            candidates.iter().map(|candidate| candidate.cost.total_s()).fold(f64::INFINITY, f64::min);
        let tie_s = best_s + TIE_S.max(best_s * TIE_FRACTION);
        let best = candidates
            .iter()
            .filter(|candidate| candidate.cost.total_s() <= tie_s)
            .min_by(|one, two| one.tie_order(two));
        match (best, free_s) {
            (Some(best), _) => Ok(best.route(&candidates, query)),
            (None, Some(free_s)) => Err(RouteError::AllBusy {
                retry_after: Duration::try_from_secs_f64(free_s)
                    .unwrap_or(RETRY_AFTER_MAX)
                    .clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX),
            }),
            (None, None) => Err(self.no_node(query)),
        }
    }

    /// Commits to a route just given: counts its work as the node's until the node's reports do.
    pub fn book(&mut self, route: &Route, query: &RouteQuery<'_>) -> Option<BookingId> {
        let known = self.nodes.get_mut(&route.node)?;
        self.affinity.record(known.engine, query.hashes);
        let booking = Booking {
            node: route.node,
            engine: known.engine,
            stage: BookingStage::Sent,
            prefill_tokens: u64::from(query.prompt_tokens.saturating_sub(route.matched_tokens)),
            decode_tokens: u64::from(query.max_tokens),
        };
        Some(self.bookings.open(booking, &mut known.booked))
    }

    /// The node took the request: its next load report includes it.
    pub fn accepted(&mut self, booking: BookingId) {
        if let Some(booking) = self.bookings.get_mut(booking).filter(|one| one.stage == BookingStage::Sent) {
            booking.stage = BookingStage::Accepted;
        }
    }

    /// The first token came: its prompt is read.
    pub fn first_token(&mut self, booking: BookingId) {
        let Some(booking) = self.bookings.get_mut(booking) else { return };
        let tokens = std::mem::take(&mut booking.prefill_tokens);
        if booking.stage != BookingStage::Reported
            && let Some(known) = self.nodes.get_mut(&booking.node)
        {
            known.booked.prefill_tokens = known.booked.prefill_tokens.saturating_sub(tokens);
        }
    }

    /// The request ended, was refused or was given up. Once for each booking; more do nothing.
    pub fn finished(&mut self, booking: BookingId) {
        let Some(booking) = self.bookings.close(booking) else { return };
        let Some(known) = self.nodes.get_mut(&booking.node).filter(|known| known.engine == booking.engine)
        else {
            return;
        };
        match booking.stage {
            BookingStage::Sent | BookingStage::Accepted => known.booked.remove(&booking),
            BookingStage::Reported => known.ended = known.ended.saturating_add(1),
        }
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
        self.bookings.len()
    }

    fn next_engine(&mut self) -> EngineEpoch {
        self.engines = self.engines.wrapping_add(1);
        EngineEpoch(self.engines)
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

struct Candidate {
    node: NodeId,
    matched_tokens: u32,
    work: Work,
    cost: Cost,
}

impl Candidate {
    /// Between equal costs: lower load, then more of the prompt cached, then id.
    fn tie_order(&self, other: &Self) -> std::cmp::Ordering {
        let load = |work: &Work, slots: u32| u64::from(work.requests) * u64::from(slots.max(1));
        load(&self.work, other.work.slots)
            .cmp(&load(&other.work, self.work.slots))
            .then(other.matched_tokens.cmp(&self.matched_tokens))
            .then(self.node.cmp(&other.node))
    }

    fn route(&self, candidates: &[Self], query: &RouteQuery<'_>) -> Route {
        // It was the cache if without it another node would have been cheaper, or as cheap as makes no difference.
        let cold_s = self.work.cost(u64::from(query.prompt_tokens), query.max_tokens).total_s();
        let others = candidates.iter().filter(|other| other.node != self.node);
        let cheaper = |other: &Self| other.cost.total_s() <= cold_s + TIE_S;
        let reason = if candidates.len() == 1 {
            RouteReason::OnlyNode
        } else if self.matched_tokens > 0 && others.into_iter().any(cheaper) {
            RouteReason::Affinity
        } else {
            RouteReason::LeastWork
        };
        Route { node: self.node, matched_tokens: self.matched_tokens, cost: self.cost, reason }
    }
}
