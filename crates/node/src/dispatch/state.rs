//! What a router knows and who waits: the plain state behind the dispatch's lock, and the choice of places.

use super::ask::{Ask, Tried};
use super::moves::Moves;
use super::now;
use crate::health::{Pulse, RetryBudget};
use crate::target::Target;
use router::{BookingId, Breaker, Outcome, PASSED_MAX, Plan, Queue, RouteError, Router};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use types::{EngineState, GenerateError, NodeId, PipelinePhase, PipelineReport, RouteInfo, limits};
use wire::Hello;

/// A node without work that has told nothing for this long may have stopped as well: it reports twice as often.
const HEARD_TIME_MAX: Duration = limits::LOAD_INTERVAL_MAX.saturating_mul(2);

pub(crate) struct State {
    pub(crate) router: Router,
    pub(crate) nodes: BTreeMap<NodeId, NodeEntry>,
    pub(super) waiting: Queue<Waiter>,
    /// Nodes whose breaker is not closed.
    pub(super) tripped: BTreeSet<NodeId>,
    /// Nodes that have requests and were found to bring nothing, while others work.
    pub(crate) hanging: BTreeSet<NodeId>,
    pub(super) retries: RetryBudget,
    /// When the queue was served last.
    pub(super) served: Instant,
    pub(crate) serial: u64,
    pub(super) draining: bool,
    pub(super) moves: Moves,
}

pub(crate) struct NodeEntry {
    pub(crate) connection: u64,
    pub(crate) hello: Hello,
    pub(crate) target: Target,
    /// Tells its engine, on this connection, from any other.
    pub(crate) life: u64,
    pub(crate) pulse: Arc<Pulse>,
    /// Passes that its engine has told of.
    pub(crate) passes: u64,
    pub(super) breaker: Breaker,
    /// What it told of its pipeline.
    pub(crate) pipeline: Option<PipelineReport>,
}

pub(super) struct Waiter {
    pub(super) ask: Arc<Ask>,
    pub(super) tried: Vec<Tried>,
    /// It had a place before: it also waits for nodes to come back.
    pub(super) again: bool,
    pub(super) reply: oneshot::Sender<Result<Booked, GenerateError>>,
}

pub(super) struct Booked {
    pub(super) booking: BookingId,
    pub(super) target: Target,
    pub(super) info: RouteInfo,
    pub(super) life: u64,
    pub(super) pulse: Arc<Pulse>,
    pub(super) is_pipeline: bool,
    /// Its first token is expected after this.
    pub(super) expected: Duration,
}

impl State {
    /// Chooses a node and takes a place there. Those whose breaker is open, and those that hang, are passed over, unless no
    /// other is left.
    pub(super) fn book(&mut self, ask: &Ask, tried: &[Tried], plan: &mut Plan) -> Result<Booked, RouteError> {
        let now = now();
        let mut exclude: Vec<NodeId> =
            tried.iter().filter(|tried| self.is_same(tried)).map(|tried| tried.node).collect();
        let tried_nodes = exclude.len();
        let open = self
            .tripped
            .iter()
            .filter(|node| self.nodes.get(node).is_some_and(|entry| !entry.breaker.admits(now)));
        exclude.extend(open);
        exclude.extend(&self.hanging);
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
        let first = self.router.node(route.node).is_some_and(|known| known.in_flight() == 1);
        let entry = self.nodes.get_mut(&route.node).ok_or_else(gone)?;
        entry.breaker.sent(now);
        if first {
            // It had nothing to do; from now on it is expected to work.
            entry.pulse.beat(now);
        }
        let (target, life, pulse) = (entry.target.clone(), entry.life, entry.pulse.clone());
        let is_pipeline = entry.pipeline.is_some();
        let expected = Duration::try_from_secs_f64(route.cost.first_token_s()).unwrap_or(Duration::MAX);
        Ok(Booked { booking, target, info, life, pulse, is_pipeline, expected })
    }

    /// Whether a node that was tried is still the one that was.
    fn is_same(&self, tried: &Tried) -> bool {
        let entry = self.nodes.get(&tried.node);
        entry.is_some_and(|entry| tried.life.is_none_or(|life| life == entry.life))
    }

    pub(super) fn predicted_wait(&self, ask: &Ask) -> Option<Duration> {
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
        self.hanging.remove(&node);
    }

    /// A node with requests brings nothing.
    pub(super) fn hangs(&mut self, node: NodeId) {
        let Some(entry) = self.nodes.get(&node) else { return };
        if self.hanging.insert(node) {
            tracing::info!(node = %entry.hello.name, "left alone until it works: it brings nothing");
            if !self.waiting.is_empty() {
                self.serve_queue();
            }
        }
    }

    /// Whether another node that serves the model was seen to work, or to wait for work, lately.
    pub(super) fn others_work(&self, node: NodeId, model: &str, deadline: Duration, now: Instant) -> bool {
        self.nodes.iter().filter(|&(&other, _)| other != node).any(|(&other, entry)| {
            let known = self.router.node(other).filter(|known| {
                let serves = known.models().iter().any(|card| card.name == model);
                serves && *known.state() == EngineState::Ready
            });
            let Some(known) = known else { return false };
            let waits = known.load().is_some_and(|load| load.running + load.waiting == 0);
            let since = |at: Instant| now.saturating_duration_since(at);
            let heard = known.reported_at().is_some_and(|at| since(at) < HEARD_TIME_MAX);
            waits && heard || since(entry.pulse.last()) < deadline
        })
    }

    fn note_breaker(&mut self, node: NodeId) {
        let Some(entry) = self.nodes.get(&node) else { return };
        if entry.breaker.is_closed() {
            self.tripped.remove(&node);
        } else if self.tripped.insert(node) {
            self.moves.counts.tripped += 1;
            tracing::info!(node = %entry.hello.name, "left alone for a while: it fails");
        }
    }

    /// Forgets a node that has gone.
    pub(crate) fn remove(&mut self, node: NodeId) {
        self.nodes.remove(&node);
        self.tripped.remove(&node);
        self.hanging.remove(&node);
        self.router.node_down(node);
    }

    /// Whether a node that it may have is expected to be ready in time, where none is. An answer that has begun may go on
    /// with the next engine of a node, and with a node that is not known yet.
    pub(super) fn has_hope(&self, ask: &Ask, tried: &[Tried]) -> bool {
        let forms = |node: &NodeId| {
            let report = self.nodes.get(node).and_then(|entry| entry.pipeline.as_ref());
            report.is_some_and(|report| report.model == ask.model && report.phase != PipelinePhase::Refused)
        };
        let coming = self.router.nodes().filter(|(node, known)| {
            let loads = match known.state() {
                EngineState::Loading | EngineState::Restarting(_) => true,
                EngineState::Pipeline(_) => forms(node),
                EngineState::Ready | EngineState::Draining => false,
            };
            let serves =
                known.models().is_empty() || known.models().iter().any(|card| card.name == ask.model);
            loads && serves
        });
        let is_tried = |node| tried.iter().any(|tried| tried.node == node && self.is_same(tried));
        ask.has_begun || coming.into_iter().any(|(node, _)| !is_tried(node))
    }

    /// In the queue's order. Each is meant for the node that is best for it, by what those before it are meant for; one
    /// whose node is full holds nobody up that is meant for another.
    pub(super) fn serve_queue(&mut self) {
        let now = now();
        self.served = now;
        let mut passed: BTreeMap<String, usize> = BTreeMap::new();
        let mut pass = self.waiting.pass(now);
        while let Some((id, waiter)) = self.waiting.next_open(&mut pass, &self.router) {
            if passed.get(&waiter.ask.model).is_some_and(|&passed| passed >= PASSED_MAX) {
                continue;
            }
            if waiter.reply.is_closed() {
                self.waiting.remove(id);
                continue;
            }
            let again = waiter.again;
            let (ask, tried) = (waiter.ask.clone(), waiter.tried.clone());
            match self.book(&ask, &tried, pass.plan()) {
                Ok(booked) => {
                    let booking = booked.booking;
                    let sent =
                        self.waiting.serve(id, now).map(|waiter| waiter.reply.send(Ok(booked)).is_ok());
                    if sent != Some(true) {
                        self.router.finished(booking, now);
                    }
                }
                Err(RouteError::AllBusy { .. }) => {
                    self.waiting.passed(id, pass.plan());
                    *passed.entry(ask.model.clone()).or_default() += 1;
                }
                Err(RouteError::NoNode { .. }) if again && self.has_hope(&ask, &tried) => {
                    *passed.entry(ask.model.clone()).or_default() += 1;
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
