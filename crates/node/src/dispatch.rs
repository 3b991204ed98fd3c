//! The router's state at work: which node a request goes to now, and which requests wait for one.
//!
//! [`Dispatch`] owns the pure [`Router`], how to reach each node, and the bounded queue of requests that found all nodes
//! busy. It is one lock around plain state: peers report into it, requests ask it for a place, and whatever frees a
//! place serves the queue in order. Nothing waits while the lock is held, and no token passes through here.

use crate::engine_handle::EngineHandle;
use crate::settings::{ROUTER_WAIT_MAX, TRIES_MAX};
use futures_util::FutureExt;
use router::{BookingId, RouteError, RouteQuery, Router, RouterSettings};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::oneshot;
use transport::Peer;
use types::{
    AssetsHash, BlockHash, BoxFuture, ClusterView, EngineState, GenerateError, GenerateRequest, ModelAssets,
    ModelCard, NodeId, NodeLoad, NodeView, Priority, RouteInfo, SessionInfo, SessionRequest, TokenStream,
    block_hashes, limits,
};
use wire::Hello;

/// What a client is told that waited for a node in vain: as long again would be no better.
const RETRY_AFTER_WAIT_MS: u64 = 5000;

/// How a node is reached.
#[derive(Clone)]
pub(crate) enum Target {
    Local(EngineHandle),
    Remote(Peer),
}

impl Target {
    pub(crate) fn generate(
        &self,
        request: GenerateRequest,
    ) -> BoxFuture<'_, Result<TokenStream, GenerateError>> {
        match self {
            Self::Local(engine) => {
                let events = engine.generate(request).map(|source| Box::pin(source) as TokenStream);
                std::future::ready(events).boxed()
            }
            Self::Remote(peer) => peer.generate(request).boxed(),
        }
    }

    pub(crate) async fn assets(&self, hash: AssetsHash) -> Result<Arc<ModelAssets>, GenerateError> {
        match self {
            Self::Local(engine) => engine.assets(hash).ok_or_else(|| GenerateError::Unavailable {
                model: hash.to_string(),
                reason: "the node does not have these assets any more".to_owned(),
            }),
            Self::Remote(peer) => peer.assets(hash).await.map(Arc::new),
        }
    }

    /// The sessions that `request` is about, or why the node did not say.
    pub(crate) async fn sessions(&self, request: SessionRequest) -> Result<Vec<SessionInfo>, String> {
        match self {
            Self::Local(engine) => engine.sessions(request).await.map_err(|error| error.to_string()),
            Self::Remote(peer) => peer.sessions(request).await.map_err(|error| error.to_string()),
        }
    }
}

/// What is asked for, prepared once for all tries.
pub(crate) struct Ask {
    pub(crate) model: String,
    pub(crate) hashes: Vec<BlockHash>,
    pub(crate) prompt_tokens: u32,
    pub(crate) max_tokens: u32,
}

/// A place at a node. Dropping it tells that the request ended there.
pub(crate) struct Place {
    pub(crate) target: Target,
    pub(crate) info: RouteInfo,
    booking: BookingId,
    dispatch: Arc<Dispatch>,
}

impl Place {
    pub(crate) fn accepted(&self) {
        self.dispatch.lock().router.accepted(self.booking, now());
    }

    pub(crate) fn first_token(&self) {
        self.dispatch.lock().router.first_token(self.booking, now());
    }

    /// The node said that it is full: it is left alone until it reports again.
    pub(crate) fn refused_busy(&self) {
        self.dispatch.lock().router.full(self.info.node);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.dispatch.change(|state| state.router.finished(self.booking, now()));
    }
}

/// A connected node, as whoever feeds its reports holds it. Dropping it removes the node.
pub(crate) struct Connected {
    node: NodeId,
    connection: u64,
    dispatch: Arc<Dispatch>,
}

impl Connected {
    pub(crate) fn state(&self, state: EngineState, models: Vec<ModelCard>) {
        self.dispatch.change(|all| all.router.state(self.node, state, models));
    }

    /// It takes nothing new.
    pub(crate) fn leaving(&self) {
        self.dispatch.change(|all| {
            let models = all.router.node(self.node).map(|known| known.models().to_vec());
            all.router.state(self.node, EngineState::Draining, models.unwrap_or_default());
        });
    }

    pub(crate) fn load(&self, load: NodeLoad) {
        self.dispatch.change(|all| {
            if let Some(NodeEntry { target: Target::Remote(peer), .. }) = all.nodes.get(&self.node) {
                all.router.rtt(self.node, peer.rtt());
            }
            all.router.load(self.node, load, now());
        });
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.dispatch.change(|all| {
            if all.nodes.get(&self.node).is_some_and(|entry| entry.connection == self.connection) {
                all.nodes.remove(&self.node);
                all.router.node_down(self.node);
            }
        });
    }
}

/// tokio's clock, which stands still and jumps where time is simulated.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

pub(crate) struct Dispatch {
    cluster: String,
    state: Mutex<State>,
}

struct State {
    router: Router,
    nodes: BTreeMap<NodeId, NodeEntry>,
    waiting: VecDeque<Waiter>,
    serial: u64,
    draining: bool,
}

struct NodeEntry {
    connection: u64,
    hello: Hello,
    target: Target,
}

struct Waiter {
    serial: u64,
    ask: Arc<Ask>,
    exclude: Vec<NodeId>,
    reply: oneshot::Sender<Result<Booked, GenerateError>>,
}

struct Booked {
    booking: BookingId,
    target: Target,
    info: RouteInfo,
}

impl Dispatch {
    pub(crate) fn new(cluster: String) -> Self {
        let state = State {
            router: Router::new(RouterSettings::default()),
            nodes: BTreeMap::new(),
            waiting: VecDeque::new(),
            serial: 0,
            draining: false,
        };
        Self { cluster, state: Mutex::new(state) }
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
        state.nodes.insert(node, NodeEntry { connection, hello, target });
        Ok(Connected { node, connection, dispatch: self.clone() })
    }

    /// Hashes a request's prompt, outside of the lock.
    pub(crate) fn ask(&self, request: &GenerateRequest) -> Ask {
        let root = self.lock().router.card(&request.model).map(|card| card.root);
        Ask {
            model: request.model.clone(),
            hashes: root
                .map(|root| block_hashes(request.cache.root(root), &request.prompt))
                .unwrap_or_default(),
            prompt_tokens: request.prompt.len() as u32,
            max_tokens: request.max_tokens,
        }
    }

    /// A place for the request on none of the nodes in `exclude`: at once, or after a bounded wait in the queue.
    /// A request that was tried before waits at the head of it.
    pub(crate) async fn place(
        self: &Arc<Self>,
        ask: &Arc<Ask>,
        exclude: &[NodeId],
        tried: bool,
    ) -> Result<Place, GenerateError> {
        let (serial, receiver) = {
            let mut state = self.lock();
            if state.draining && !tried {
                return Err(ask.unavailable("this process is leaving".to_owned()));
            }
            // One that may not go everywhere holds up nobody: the place that it lacks may be there for others.
            let same = |waiter: &Waiter| waiter.exclude.is_empty() && waiter.ask.model == ask.model;
            let overtakes = !tried && state.waiting.iter().any(same);
            let routed = if overtakes { None } else { Some(state.book(ask, exclude)) };
            match routed {
                Some(Ok(booked)) => return Ok(self.place_of(booked)),
                Some(Err(RouteError::AllBusy { .. })) | None => {}
                Some(Err(error)) => return Err(ask.error(error)),
            }
            if state.waiting.len() >= limits::ROUTER_WAITING_MAX {
                let busy = RouteError::AllBusy { retry_after: limits::LOAD_INTERVAL_MAX };
                return Err(ask.error(state.try_route(ask, exclude).err().unwrap_or(busy)));
            }
            state.serial += 1;
            let (reply, receiver) = oneshot::channel();
            let waiter = Waiter { serial: state.serial, ask: ask.clone(), exclude: exclude.to_vec(), reply };
            let serial = waiter.serial;
            if tried {
                state.waiting.push_front(waiter)
            } else {
                state.waiting.push_back(waiter)
            }
            (serial, receiver)
        };
        let mut wait = Wait { dispatch: self, serial, receiver };
        match tokio::time::timeout(ROUTER_WAIT_MAX, &mut wait.receiver).await {
            Ok(Ok(booked)) => booked.map(|booked| self.place_of(booked)),
            Ok(Err(_)) => Err(ask.unavailable("the router has stopped".to_owned())),
            Err(_) => Err(GenerateError::Busy { retry_after_ms: RETRY_AFTER_WAIT_MS }),
        }
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
        holders.sort_by_key(|target| matches!(target, Target::Remote(_)));
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
            let peer = match &entry.target {
                Target::Local(_) => None,
                Target::Remote(peer) => Some(peer),
            };
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
        let Booked { booking, target, info } = booked;
        Place { target, info, booking, dispatch: self.clone() }
    }

    /// Changes the state, and serves the queue from what that freed.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        state.serve_queue();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Knowledge is soft: after a panic elsewhere it is at worst wrong.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn try_route(&self, ask: &Ask, exclude: &[NodeId]) -> Result<router::Route, RouteError> {
        self.router.route(&ask.query(exclude), now())
    }

    fn book(&mut self, ask: &Ask, exclude: &[NodeId]) -> Result<Booked, RouteError> {
        let route = self.try_route(ask, exclude)?;
        let gone = || RouteError::NoNode { reason: "the node has just gone".to_owned() };
        let entry = self.nodes.get(&route.node).ok_or_else(gone)?;
        let (target, node_name) = (entry.target.clone(), entry.hello.name.clone());
        let booking = self.router.book(&route, &ask.query(exclude), now()).ok_or_else(gone)?;
        tracing::debug!(node = %node_name, cost = ?route.cost, matched = route.matched_tokens, reason = %route.reason, "routed");
        let info = RouteInfo {
            node: route.node,
            node_name,
            matched_tokens: route.matched_tokens,
            reason: route.reason.to_string(),
        };
        Ok(Booked { booking, target, info })
    }

    /// In order of arrival for each model; a model whose nodes are busy does not hold up the others.
    fn serve_queue(&mut self) {
        let mut busy: BTreeSet<String> = BTreeSet::new();
        let mut left = VecDeque::new();
        let mut waiting = std::mem::take(&mut self.waiting);
        while let Some(waiter) = waiting.pop_front() {
            if waiter.reply.is_closed() {
                continue;
            }
            if busy.contains(&waiter.ask.model) {
                left.push_back(waiter);
                continue;
            }
            match self.book(&waiter.ask, &waiter.exclude) {
                Ok(booked) => {
                    let booking = booked.booking;
                    if waiter.reply.send(Ok(booked)).is_err() {
                        self.router.finished(booking, now());
                    }
                }
                Err(RouteError::AllBusy { .. }) => {
                    if waiter.exclude.is_empty() {
                        busy.insert(waiter.ask.model.clone());
                    }
                    left.push_back(waiter);
                }
                Err(error) => {
                    let error = waiter.ask.error(error);
                    // Fails only where nobody waits any more.
                    let _ = waiter.reply.send(Err(error));
                }
            }
        }
        self.waiting = left;
    }
}

impl Ask {
    fn query<'a>(&'a self, exclude: &'a [NodeId]) -> RouteQuery<'a> {
        RouteQuery {
            model: &self.model,
            hashes: &self.hashes,
            prompt_tokens: self.prompt_tokens,
            max_tokens: self.max_tokens,
            exclude,
            session: None,
            priority: Priority::default(),
        }
    }

    fn unavailable(&self, reason: String) -> GenerateError {
        GenerateError::Unavailable { model: self.model.clone(), reason }
    }

    fn error(&self, error: RouteError) -> GenerateError {
        match error {
            RouteError::UnknownModel { model, served } => GenerateError::UnknownModel { model, served },
            RouteError::NoNode { reason } => self.unavailable(reason),
            RouteError::AllBusy { retry_after } => {
                GenerateError::Busy { retry_after_ms: retry_after.as_millis() as u64 }
            }
        }
    }
}

/// A request in the queue. Dropped, it leaves the queue, or the place that it was given just then.
struct Wait<'a> {
    dispatch: &'a Dispatch,
    serial: u64,
    receiver: oneshot::Receiver<Result<Booked, GenerateError>>,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.receiver.close();
        match self.receiver.try_recv() {
            Ok(Ok(booked)) => self.dispatch.change(|state| state.router.finished(booked.booking, now())),
            _ => self.dispatch.lock().waiting.retain(|waiter| waiter.serial != self.serial),
        }
    }
}
