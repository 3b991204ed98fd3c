//! The router's state at work: which node a request goes to now, and which requests wait for one.
//!
//! [`Dispatch`] owns the pure [`Router`], how to reach each node and how it has done, and the bounded [`Queue`] of requests
//! that found all nodes busy. It is one lock around plain state: peers report into it (`connected.rs`), requests ask it for a
//! place, and whatever frees a place serves the queue. Nothing waits while the lock is held, and no token passes through
//! here.

use crate::connected::Connected;
use crate::health::{Pulse, RetryBudget, step_deadline};
use crate::settings::{RETRY_AFTER_MIN, TRIES_MAX};
use crate::target::Target;
use router::{
    BookingId, Breaker, Excluded, Outcome, Plan, Queue, QueueId, RouteError, RouteQuery, Router,
    RouterSettings, Waiting,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use transport::Peer;
use types::{
    AssetsHash, BlockHash, ClusterView, EngineState, GenerateError, GenerateRequest, ModelCard, NodeId,
    NodePrediction, NodeView, RequestId, RouteInfo, RouteNode, RoutePlan, Service, block_hashes, limits,
};
use wire::Hello;

/// Requests of a model in the queue whose node is full and that are passed over in search of one whose node is not: bounds
/// what one report costs.
const PASSED_MAX: usize = 32;
/// Reports of many nodes do not serve the queue more often than this: a place that becomes free always does.
const SERVE_INTERVAL: Duration = Duration::from_millis(5);

/// What is asked for, prepared once for all tries until it has more of its answer.
pub(crate) struct Ask {
    id: RequestId,
    model: String,
    hashes: Vec<BlockHash>,
    /// Of prompt and answer so far.
    tokens: u32,
    /// Still to be generated, at most.
    max_tokens: u32,
    service: Service,
    /// A part of the answer was passed on.
    has_begun: bool,
}

/// A node that is not to have a request again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tried {
    pub(crate) node: NodeId,
    /// Only as long as its engine is the same; none: whatever becomes of it.
    pub(crate) life: Option<u32>,
}

/// A place at a node. Dropping it tells that the request ended there.
pub(crate) struct Place {
    pub(crate) target: Target,
    pub(crate) info: RouteInfo,
    /// Tells this life of the node's engine from the next.
    pub(crate) life: u32,
    pub(crate) pulse: Arc<Pulse>,
    /// Tokens that came from there.
    pub(crate) tokens: u32,
    booking: BookingId,
    dispatch: Arc<Dispatch>,
}

impl Place {
    pub(crate) fn accepted(&self) {
        self.dispatch.lock().router.accepted(self.booking, now());
    }

    pub(crate) fn first_token(&self) {
        let (mut state, now) = (self.dispatch.lock(), now());
        state.router.first_token(self.booking, now);
        state.outcome(self.info.node, Outcome::Answered, now);
    }

    /// The node said that it is full: it is left alone until it reports again.
    pub(crate) fn refused_busy(&self) {
        self.dispatch.lock().router.full(self.info.node);
    }

    /// Something became of the request that says something of the node.
    pub(crate) fn outcome(&self, outcome: Outcome) {
        self.dispatch.lock().outcome(self.info.node, outcome, now());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let now = now();
        self.dispatch.free(|state| {
            state.router.progress(self.booking, self.tokens, now);
            state.router.finished(self.booking, now);
        });
    }
}

/// Whether a request that has brought nothing for a while is to be given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Silence {
    /// It is to be looked at again after this long.
    Normal(Duration),
    /// Its node does not bring it on, while others work.
    Stalled,
}

/// tokio's clock, which stands still and jumps where time is simulated.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// How a router dispatches.
#[derive(Debug, Clone, PartialEq)]
pub struct DispatchSettings {
    /// By what rule nodes are chosen.
    pub router: RouterSettings,
    /// The longest that a request waits for a node; one that is expected to wait longer is refused at once.
    pub wait_max: Duration,
}

impl Default for DispatchSettings {
    fn default() -> Self {
        Self { router: RouterSettings::default(), wait_max: crate::settings::ROUTER_WAIT_MAX }
    }
}

pub(crate) struct Dispatch {
    cluster: String,
    wait_max: Duration,
    state: Mutex<State>,
}

pub(crate) struct State {
    pub(crate) router: Router,
    pub(crate) nodes: BTreeMap<NodeId, NodeEntry>,
    waiting: Queue<Waiter>,
    /// Nodes whose breaker is not closed.
    tripped: BTreeSet<NodeId>,
    retries: RetryBudget,
    /// When the queue was served last.
    served: Instant,
    serial: u64,
    draining: bool,
}

pub(crate) struct NodeEntry {
    pub(crate) connection: u64,
    pub(crate) hello: Hello,
    pub(crate) target: Target,
    /// Engines that it has had since it connected.
    pub(crate) life: u32,
    pub(crate) pulse: Arc<Pulse>,
    /// Passes that its engine has told of.
    pub(crate) passes: u64,
    breaker: Breaker,
}

struct Waiter {
    serial: u64,
    ask: Arc<Ask>,
    tried: Vec<Tried>,
    /// It had a place before: it also waits for nodes to come back.
    again: bool,
    reply: oneshot::Sender<Result<Booked, GenerateError>>,
}

struct Booked {
    booking: BookingId,
    target: Target,
    info: RouteInfo,
    life: u32,
    pulse: Arc<Pulse>,
}

impl Dispatch {
    pub(crate) fn new(cluster: String, settings: DispatchSettings) -> Self {
        let state = State {
            router: Router::new(settings.router),
            nodes: BTreeMap::new(),
            waiting: Queue::new(limits::ROUTER_WAITING_MAX),
            tripped: BTreeSet::new(),
            retries: RetryBudget::new(now()),
            served: now(),
            serial: 0,
            draining: false,
        };
        Self { cluster, wait_max: settings.wait_max, state: Mutex::new(state) }
    }

    /// A node is there. The first connection of a node stays; a second one is refused with a reason.
    pub(crate) fn connect(self: &Arc<Self>, hello: Hello, target: Target) -> Result<Connected, String> {
        let mut state = self.lock();
        let node = hello.node;
        if state.nodes.contains_key(&node) {
            return Err(format!("the node {node} is connected already"));
        }
        if !state.router.node_up(node) {
            return Err(format!("this router has {} nodes already, which is its limit", limits::NODES_MAX));
        }
        state.serial += 1;
        let connection = state.serial;
        let entry = NodeEntry {
            connection,
            hello,
            target,
            life: 0,
            pulse: Arc::new(Pulse::new(now())),
            passes: 0,
            breaker: Breaker::default(),
        };
        state.nodes.insert(node, entry);
        Ok(Connected::new(node, connection, self.clone()))
    }

    /// A new request came.
    pub(crate) fn arrived(&self) {
        self.lock().retries.earn();
    }

    /// Takes one of the tries that are left for requests that failed, or that are hedged.
    pub(crate) fn may_retry(&self, hedge: bool) -> bool {
        self.lock().retries.take(hedge, now())
    }

    /// Hashes a request's prompt and answer so far, outside of the lock.
    pub(crate) fn ask(&self, request: &GenerateRequest) -> Ask {
        let root = self.lock().router.card(&request.model).map(|card| card.root);
        let hashes = |root: BlockHash| {
            let root = request.cache.root(root);
            if request.output.is_empty() {
                block_hashes(root, &request.prompt)
            } else {
                block_hashes(root, &[request.prompt.as_slice(), &request.output].concat())
            }
        };
        let output = request.output.len() as u32;
        Ask {
            id: request.id,
            model: request.model.clone(),
            hashes: root.map(hashes).unwrap_or_default(),
            tokens: request.prompt.len() as u32 + output,
            max_tokens: request.max_tokens - output,
            service: request.service,
            has_begun: output > 0,
        }
    }

    /// A place for the request on none of the nodes that were tried: at once, or after a bounded wait in the queue. A
    /// request that had a place before (`again`) waits before all others, and for nodes to come back as well.
    pub(crate) async fn place(
        self: &Arc<Self>,
        ask: &Arc<Ask>,
        tried: &[Tried],
        again: bool,
    ) -> Result<Place, GenerateError> {
        let (id, receiver) = {
            let mut state = self.lock();
            if state.draining && !again {
                return Err(ask.unavailable("this process is leaving".to_owned()));
            }
            // Nobody is overtaken: where others wait, it takes its turn among them.
            let routed = state.waiting.is_empty().then(|| state.book(ask, tried, &mut Plan::default()));
            let free_after = match routed {
                Some(Ok(booked)) => return Ok(self.place_of(booked)),
                Some(Err(RouteError::AllBusy { retry_after })) => Some(retry_after),
                Some(Err(RouteError::NoNode { .. })) if again && state.has_hope(ask, tried) => None,
                Some(Err(error)) => return Err(ask.error(error)),
                None => None,
            };
            let waits = self.enqueue(&mut state, ask, tried, again, free_after)?;
            if free_after.is_none() {
                state.serve_queue();
            }
            waits
        };
        let mut wait = Wait { dispatch: self, id, receiver };
        match tokio::time::timeout(self.wait_max, &mut wait.receiver).await {
            Ok(Ok(booked)) => booked.map(|booked| self.place_of(booked)),
            Ok(Err(_)) => Err(ask.unavailable("the router has stopped".to_owned())),
            // Waiting as long again would be no better.
            Err(_) => Err(busy(self.lock().predicted_wait(ask).unwrap_or(RETRY_AFTER_MIN))),
        }
    }

    /// A place for the request at once, or none.
    pub(crate) fn place_now(self: &Arc<Self>, ask: &Arc<Ask>, tried: &[Tried]) -> Option<Place> {
        let booked = self.lock().book(ask, tried, &mut Plan::default()).ok()?;
        Some(self.place_of(booked))
    }

    fn enqueue(
        &self,
        state: &mut State,
        ask: &Arc<Ask>,
        tried: &[Tried],
        again: bool,
        free_after: Option<Duration>,
    ) -> Result<(QueueId, oneshot::Receiver<Result<Booked, GenerateError>>), GenerateError> {
        let wait = state.predicted_wait(ask).max(free_after).unwrap_or(RETRY_AFTER_MIN);
        // The first in the queue is let in whatever is predicted: predictions are of the pace of others.
        if !again && !state.waiting.is_empty() && wait > self.wait_max {
            return Err(busy(wait));
        }
        let waiting = Waiting {
            client: ask.service.client,
            priority: ask.service.priority,
            work_s: state.work_s(ask),
            again,
        };
        state.serial += 1;
        let (reply, receiver) = oneshot::channel();
        let waiter = Waiter { serial: state.serial, ask: ask.clone(), tried: tried.to_vec(), again, reply };
        let id = state.waiting.push(waiter, waiting, now()).map_err(|_| busy(wait))?;
        Ok((id, receiver))
    }

    /// Whether a request is to be given up that has brought nothing since `since`. One that waits for its first token is
    /// brought on by whatever its node does.
    pub(crate) fn silence(&self, place: &Place, model: &str, started: bool, since: Instant) -> Silence {
        let state = self.lock();
        let now = now();
        let load = state.router.node(place.info.node).and_then(router::KnownNode::load);
        let deadline = step_deadline(load);
        let last = if started { since } else { place.pulse.last().max(since) };
        let silent = now.saturating_duration_since(last);
        if silent < deadline {
            return Silence::Normal(deadline - silent);
        }
        // Where everybody has stopped, it is this process, or the network, that hangs.
        let works = state.nodes.iter().any(|(&node, entry)| {
            let known = state.router.node(node);
            let known = known.filter(|known| {
                let serves = known.models().iter().any(|card| card.name == model);
                serves && *known.state() == EngineState::Ready
            });
            let load = known.and_then(router::KnownNode::load);
            let idle = load.is_some_and(|load| load.running + load.waiting == 0);
            node != place.info.node
                && known.is_some()
                && (idle || now.saturating_duration_since(entry.pulse.last()) < deadline)
        });
        if works { Silence::Stalled } else { Silence::Normal(deadline) }
    }

    /// What would become of a request now, and why.
    pub(crate) fn plan(&self, ask: &Ask) -> Result<RoutePlan, GenerateError> {
        let state = self.lock();
        let nodes = state.considered(ask);
        let query = ask.query(&[]);
        let (route, wait) = match state.router.route(&query, now()) {
            Ok(route) => (state.info(&route), None),
            Err(RouteError::AllBusy { retry_after }) => {
                (None, state.predicted_wait(ask).max(Some(retry_after)))
            }
            Err(error) => return Err(ask.error(error)),
        };
        Ok(RoutePlan {
            model: ask.model.clone(),
            prompt_tokens: ask.tokens,
            max_tokens: ask.max_tokens,
            route,
            waiting: state.waiting.len() as u32,
            wait_s: wait.map(|wait| wait.as_secs_f64()),
            nodes,
        })
    }

    /// From now on requests that were not tried yet are refused.
    pub(crate) fn drain(&self) {
        self.lock().draining = true;
    }

    /// Requests at nodes and in the queue.
    pub(crate) fn open_requests(&self) -> usize {
        let state = self.lock();
        state.router.in_flight() + state.waiting.len()
    }

    /// Requests in the queue.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    pub(crate) fn models(&self) -> Vec<ModelCard> {
        self.lock().router.models()
    }

    /// Nodes that serve a model with these assets, this process first.
    pub(crate) fn holders(&self, hash: AssetsHash) -> Vec<Target> {
        let state = self.lock();
        let has = |node| {
            state.router.node(node).is_some_and(|known| known.models().iter().any(|card| card.assets == hash))
        };
        let holders =
            state.nodes.iter().filter(|(node, _)| has(**node)).map(|(_, entry)| entry.target.clone());
        let mut holders: Vec<Target> = holders.collect();
        holders.sort_by_key(|target| target.peer().is_some());
        holders.truncate(TRIES_MAX);
        holders
    }

    /// Nodes whose engine has a cache, and so may have sessions; with their names.
    pub(crate) fn session_holders(&self) -> Vec<(NodeId, String, Target)> {
        let state = self.lock();
        let holders = state.nodes.iter().filter(|(node, _)| {
            let known = state.router.node(**node).map(router::KnownNode::state);
            matches!(known, Some(EngineState::Ready | EngineState::Draining))
        });
        holders.map(|(&node, entry)| (node, entry.hello.name.clone(), entry.target.clone())).collect()
    }

    pub(crate) fn view(&self) -> ClusterView {
        let state = self.lock();
        let nodes = state.nodes.iter().filter_map(|(&id, entry)| {
            let known = state.router.node(id)?;
            let peer = entry.target.peer();
            Some(NodeView {
                id,
                name: entry.hello.name.clone(),
                local: peer.is_none(),
                address: peer.map(Peer::remote_address),
                hardware: entry.hello.hardware.clone(),
                version: entry.hello.program.clone(),
                engine: known.state().clone(),
                models: known.models().to_vec(),
                load: known.load().copied(),
                rtt_s: peer.map(|peer| peer.rtt().as_secs_f32()),
                cached_blocks: state.router.cached_blocks(id) as u64,
                prediction: state.router.learned(id).map(prediction).unwrap_or_default(),
                avoided: !entry.breaker.admits(now()),
            })
        });
        let mut nodes: Vec<NodeView> = nodes.collect();
        nodes.sort_by(|one, two| (&one.name, one.id).cmp(&(&two.name, two.id)));
        ClusterView {
            cluster: self.cluster.clone(),
            nodes,
            in_flight: state.router.in_flight() as u32,
            waiting: state.waiting.len() as u32,
        }
    }

    fn place_of(self: &Arc<Self>, booked: Booked) -> Place {
        let Booked { booking, target, info, life, pulse } = booked;
        Place { target, info, life, pulse, tokens: 0, booking, dispatch: self.clone() }
    }

    /// Changes what is known of a node, and serves the queue where that is not done all the time.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        if !state.waiting.is_empty() && now().saturating_duration_since(state.served) >= SERVE_INTERVAL {
            state.serve_queue();
        }
        result
    }

    /// The same where a place has become free.
    pub(crate) fn free(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        if !state.waiting.is_empty() {
            state.serve_queue();
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // Knowledge is soft: after a panic elsewhere it is at worst wrong.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Chooses a node and takes a place there. Those whose breaker is open are passed over, unless no other is left.
    fn book(&mut self, ask: &Ask, tried: &[Tried], plan: &mut Plan) -> Result<Booked, RouteError> {
        let now = now();
        let mut exclude: Vec<NodeId> =
            tried.iter().filter(|tried| self.is_same(tried)).map(|tried| tried.node).collect();
        let tried_nodes = exclude.len();
        let open = self
            .tripped
            .iter()
            .filter(|node| self.nodes.get(node).is_some_and(|entry| !entry.breaker.admits(now)));
        exclude.extend(open);
        let mut routed = self.router.route_after(&ask.query(&exclude), plan, now);
        if exclude.len() > tried_nodes && matches!(routed, Err(RouteError::NoNode { .. })) {
            exclude.truncate(tried_nodes);
            routed = self.router.route_after(&ask.query(&exclude), plan, now);
        }
        let route = routed?;
        let gone = || RouteError::NoNode { reason: "the node has just gone".to_owned() };
        if tracing::enabled!(tracing::Level::DEBUG) {
            tracing::debug!(request = %ask.id, node = %route.node, reason = %route.reason, considered = ?self.considered(ask), "routed");
        }
        let info = self.info(&route).ok_or_else(gone)?;
        let booking = self.router.book(&route, &ask.query(&exclude), now).ok_or_else(gone)?;
        let entry = self.nodes.get_mut(&route.node).ok_or_else(gone)?;
        entry.breaker.sent(now);
        let (target, life, pulse) = (entry.target.clone(), entry.life, entry.pulse.clone());
        Ok(Booked { booking, target, info, life, pulse })
    }

    /// Whether a node that was tried is still the one that was.
    fn is_same(&self, tried: &Tried) -> bool {
        let entry = self.nodes.get(&tried.node);
        entry.is_some_and(|entry| tried.life.is_none_or(|life| life == entry.life))
    }

    fn info(&self, route: &router::Route) -> Option<RouteInfo> {
        Some(RouteInfo {
            node: route.node,
            node_name: self.nodes.get(&route.node)?.hello.name.clone(),
            matched_tokens: route.matched_tokens,
            reason: route.reason.to_string(),
        })
    }

    /// All nodes with all that speaks for and against them.
    fn considered(&self, ask: &Ask) -> Vec<RouteNode> {
        let now = now();
        let considered = self.router.explain(&ask.query(&[]), now).into_iter().filter_map(|one| {
            let entry = self.nodes.get(&one.node)?;
            let broken = (!entry.breaker.admits(now)).then(|| "it failed lately".to_owned());
            Some(RouteNode {
                node: one.node,
                name: entry.hello.name.clone(),
                matched_tokens: one.matched_tokens,
                requests: one.requests,
                backlog_s: one.cost.backlog_s,
                slot_s: one.cost.slot_s,
                prefill_s: one.cost.prefill_s,
                rtt_s: one.cost.rtt_s,
                evict_s: one.cost.evict_s,
                decode_s: one.cost.decode_s,
                total_s: one.cost.total_s(),
                excluded: one.excluded.map(|excluded| excluded.to_string()).or(broken),
            })
        });
        considered.collect()
    }

    /// Seconds that reading its prompt would take where that is done soonest.
    fn work_s(&self, ask: &Ask) -> f64 {
        let considered = self.router.explain(&ask.query(&[]), now()).into_iter();
        let able = considered.filter(|one| one.excluded.is_none_or(|excluded| excluded == Excluded::Full));
        able.map(|one| one.cost.prefill_s).min_by(f64::total_cmp).unwrap_or(0.0)
    }

    fn predicted_wait(&self, ask: &Ask) -> Option<Duration> {
        self.waiting.predicted_wait(ask.service.priority)
    }

    pub(crate) fn outcome(&mut self, node: NodeId, outcome: Outcome, now: Instant) {
        let Some(entry) = self.nodes.get_mut(&node) else { return };
        entry.breaker.outcome(outcome, now);
        self.note_breaker(node);
    }

    /// A node showed that its engine works.
    pub(crate) fn works(&mut self, node: NodeId, now: Instant) {
        let Some(entry) = self.nodes.get_mut(&node) else { return };
        entry.pulse.beat(now);
        entry.breaker.heartbeat();
        self.tripped.remove(&node);
    }

    fn note_breaker(&mut self, node: NodeId) {
        let Some(entry) = self.nodes.get(&node) else { return };
        if entry.breaker.is_closed() {
            self.tripped.remove(&node);
        } else if self.tripped.insert(node) {
            tracing::info!(node = %entry.hello.name, "left alone for a while: it fails");
        }
    }

    /// Forgets a node that has gone.
    pub(crate) fn remove(&mut self, node: NodeId) {
        self.nodes.remove(&node);
        self.tripped.remove(&node);
        self.router.node_down(node);
    }

    /// Whether a node that it may have is expected to be ready in time, where none is. An answer that has begun may go on
    /// with the next engine of a node, and with a node that is not known yet.
    fn has_hope(&self, ask: &Ask, tried: &[Tried]) -> bool {
        let coming = self.router.nodes().filter(|(_, known)| {
            let loads = matches!(known.state(), EngineState::Loading | EngineState::Restarting(_));
            let serves =
                known.models().is_empty() || known.models().iter().any(|card| card.name == ask.model);
            loads && serves
        });
        let is_tried = |node| tried.iter().any(|tried| tried.node == node && self.is_same(tried));
        ask.has_begun || coming.into_iter().any(|(node, _)| !is_tried(node))
    }

    /// In the queue's order. Each is meant for the node that is best for it, by what those before it are meant for; one
    /// whose node is full holds nobody up that is meant for another.
    fn serve_queue(&mut self) {
        let now = now();
        self.served = now;
        let mut plan = Plan::default();
        let mut passed: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
        loop {
            let eligible = |waiter: &Waiter| {
                let passed = passed.get(&waiter.ask.model);
                passed.is_none_or(|passed| passed.len() < PASSED_MAX && !passed.contains(&waiter.serial))
            };
            let Some((id, waiter)) = self.waiting.first(now, eligible) else { return };
            if waiter.reply.is_closed() {
                self.waiting.remove(id);
                continue;
            }
            let (serial, again) = (waiter.serial, waiter.again);
            let (ask, tried) = (waiter.ask.clone(), waiter.tried.clone());
            match self.book(&ask, &tried, &mut plan) {
                Ok(booked) => {
                    let booking = booked.booking;
                    let sent =
                        self.waiting.serve(id, now).map(|waiter| waiter.reply.send(Ok(booked)).is_ok());
                    if sent != Some(true) {
                        self.router.finished(booking, now);
                    }
                }
                Err(RouteError::AllBusy { .. }) => {
                    passed.entry(ask.model.clone()).or_default().insert(serial);
                }
                Err(RouteError::NoNode { .. }) if again && self.has_hope(&ask, &tried) => {
                    passed.entry(ask.model.clone()).or_default().insert(serial);
                }
                Err(error) => {
                    if let Some(waiter) = self.waiting.remove(id) {
                        // Fails only where nobody waits any more.
                        let _ = waiter.reply.send(Err(ask.error(error)));
                    }
                }
            }
        }
    }
}

impl Ask {
    fn query<'a>(&'a self, exclude: &'a [NodeId]) -> RouteQuery<'a> {
        RouteQuery {
            model: &self.model,
            hashes: &self.hashes,
            prompt_tokens: self.tokens,
            max_tokens: self.max_tokens,
            exclude,
            session: self.service.affinity.map(|key| key.0),
            priority: self.service.priority,
        }
    }

    fn unavailable(&self, reason: String) -> GenerateError {
        GenerateError::Unavailable { model: self.model.clone(), reason }
    }

    fn error(&self, error: RouteError) -> GenerateError {
        match error {
            RouteError::UnknownModel { model, served } => GenerateError::UnknownModel { model, served },
            RouteError::NoNode { reason } => self.unavailable(reason),
            RouteError::AllBusy { retry_after } => busy(retry_after),
        }
    }
}

fn prediction(learned: router::Learned) -> NodePrediction {
    NodePrediction {
        requests: learned.requests,
        prefill_tokens_per_s: learned.prefill_tokens_per_s,
        decode_scale: learned.decode_scale,
        bias: learned.bias,
        error: learned.error,
    }
}

fn busy(retry_after: Duration) -> GenerateError {
    GenerateError::Busy { retry_after_ms: retry_after.max(RETRY_AFTER_MIN).as_millis() as u64 }
}

/// A request in the queue. Dropped, it leaves the queue, or the place that it was given just then.
struct Wait<'a> {
    dispatch: &'a Dispatch,
    id: QueueId,
    receiver: oneshot::Receiver<Result<Booked, GenerateError>>,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.receiver.close();
        match self.receiver.try_recv() {
            Ok(Ok(booked)) => self.dispatch.free(|state| state.router.finished(booked.booking, now())),
            _ => drop(self.dispatch.lock().waiting.remove(self.id)),
        }
    }
}
