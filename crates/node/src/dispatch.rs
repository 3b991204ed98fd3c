//! The router's state at work: which node a request goes to now, and which requests wait for one.
//!
//! [`Dispatch`] owns the pure [`Router`], how to reach each node and how it has done, and the bounded [`Queue`] of requests
//! that found all nodes busy. It is one lock around plain state: peers report into it (`connected.rs`), requests ask it for a
//! place, and whatever frees a place serves the queue. Nothing waits while the lock is held, and no token passes through
//! here.

mod ask;
mod moves;
mod state;
mod view;

pub(crate) use ask::{Ask, Tried};
pub(crate) use state::State;

use crate::connected::Connected;
use crate::health::{Pulse, RetryBudget, Stage, start_deadline, step_deadline};
use crate::settings::RETRY_AFTER_MIN;
use crate::target::Target;
use ask::busy;
use moves::Moves;
use router::{
    BookingId, Breaker, Outcome, Plan, Queue, QueueId, RouteError, Router, RouterSettings, Waiting,
};
use state::{Booked, NodeEntry, Waiter};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use types::{EmbedRequest, GenerateError, GenerateRequest, RequestMove, RouteInfo, limits};
use wire::Hello;

/// Reports of many nodes do not serve the queue more often than this: a place that becomes free always does.
const SERVE_INTERVAL: Duration = Duration::from_millis(5);

/// A place at a node. Dropping it tells that the request ended there.
pub(crate) struct Place {
    pub(crate) target: Target,
    pub(crate) info: RouteInfo,
    /// Tells this life of the node's engine, and of its connection, from the next.
    pub(crate) life: u64,
    pub(crate) pulse: Arc<Pulse>,
    /// It is a pipeline, which comes back by itself where a member was lost.
    pub(crate) is_pipeline: bool,
    /// Its first token was expected after this.
    expected: Duration,
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
        let now = now();
        // Its prompt is read: that is room for another one.
        self.dispatch.free(|state| {
            state.router.first_token(self.booking, now);
            state.hanging.remove(&self.info.node);
            state.outcome(self.info.node, Outcome::Answered, now);
        });
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
            // Of a probe that was given up nothing is known.
            state.outcome(self.info.node, Outcome::Refused, now);
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

impl Dispatch {
    pub(crate) fn new(cluster: String, settings: DispatchSettings) -> Self {
        let state = State {
            router: Router::new(settings.router),
            nodes: BTreeMap::new(),
            waiting: Queue::new(limits::ROUTER_WAITING_MAX),
            tripped: BTreeSet::new(),
            hanging: BTreeSet::new(),
            retries: RetryBudget::new(now()),
            served: now(),
            serial: 0,
            draining: false,
            moves: Moves::default(),
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
            life: connection,
            pulse: Arc::new(Pulse::new(now())),
            passes: 0,
            breaker: Breaker::default(),
            pipeline: None,
        };
        state.nodes.insert(node, entry);
        Ok(Connected::new(node, connection, self.clone()))
    }

    /// A new request came.
    pub(crate) fn arrived(&self) {
        self.lock().retries.earn();
    }

    /// A request did not stay where it was sent.
    pub(crate) fn moved(&self, moved: RequestMove) {
        self.lock().moves.note(moved, now());
    }

    /// Takes one of the tries that are left for requests that failed, or that are hedged.
    pub(crate) fn may_retry(&self, hedge: bool) -> bool {
        self.lock().retries.take(hedge, now())
    }

    /// Hashes a request's prompt and answer so far, outside of the lock.
    pub(crate) fn ask(&self, request: &GenerateRequest) -> Ask {
        let root = self.lock().router.card(&request.model).map(|card| card.root);
        Ask::new(request, root)
    }

    /// The same of texts that become vectors.
    pub(crate) fn ask_embed(&self, request: &EmbedRequest) -> Ask {
        Ask::of_embed(request)
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
            work_s: state.router.work_s(&ask.query(&[]), now()),
            again,
        };
        let (reply, receiver) = oneshot::channel();
        let waiter = Waiter { ask: ask.clone(), tried: tried.to_vec(), again, reply };
        let id = state.waiting.push(waiter, waiting, now()).map_err(|_| busy(wait))?;
        Ok((id, receiver))
    }

    /// Whether a request is to be tried elsewhere that has brought nothing since `since`. One that waits for its first token
    /// is brought on by whatever its node does, and is given less time where that does nothing at all, unless there is a
    /// grammar to be compiled, which takes as long on another node.
    pub(crate) fn silence(&self, place: &Place, model: &str, stage: Stage, since: Instant) -> Silence {
        let mut state = self.lock();
        let (node, now) = (place.info.node, now());
        let pass_s = state.router.node(node).and_then(|known| Some(known.load()?.step_s));
        let working = place.pulse.last().max(since);
        let (deadline, last) = match stage {
            Stage::Waits => (start_deadline(pass_s, place.expected), working),
            Stage::Compiles => (step_deadline(pass_s), working),
            Stage::Writes => (step_deadline(pass_s), since),
        };
        let hanging = match stage {
            Stage::Waits | Stage::Writes => start_deadline(pass_s, Duration::ZERO),
            Stage::Compiles => deadline,
        };
        let (silent, idle) = (now.saturating_duration_since(last), now.saturating_duration_since(working));
        // Where everybody has stopped, it is this process, or the network, that hangs.
        if idle >= hanging && state.others_work(node, model, hanging, now) {
            state.hangs(node);
        }
        if silent < deadline {
            return Silence::Normal((deadline - silent).min(hanging));
        }
        if state.others_work(node, model, deadline, now) {
            Silence::Stalled
        } else {
            Silence::Normal(hanging)
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

    fn place_of(self: &Arc<Self>, booked: Booked) -> Place {
        let Booked { booking, target, info, life, pulse, is_pipeline, expected } = booked;
        let dispatch = self.clone();
        Place { target, info, life, pulse, is_pipeline, expected, tokens: 0, booking, dispatch }
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
            Ok(Ok(booked)) => self.dispatch.free(|state| {
                state.router.finished(booked.booking, now());
                state.outcome(booked.info.node, Outcome::Refused, now());
            }),
            _ => drop(self.dispatch.lock().waiting.remove(self.id)),
        }
    }
}
