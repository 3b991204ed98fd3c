//! [`simulate`]: the router at work over simulated nodes, in virtual time.
//!
//! Everything that travels takes a while: requests to nodes, first tokens and ends back, and what nodes tell of their load
//! and cache, at most every 50 ms. The router sees nothing else.

use super::node::{NodeSpec, SimNode, StepResult, Told};
use super::workload::Request;
use router::{BookingId, PASSED_MAX, Plan, Queue, RouteError, RouteQuery, Router, RouterSettings, Waiting};
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};
use types::{
    AssetsHash, BlockHash, CacheEvent, CacheSnapshot, ClientId, EngineState, ModelCard, NodeId, NodeLoad,
    Priority, limits,
};

const MODEL: &str = "simulated";
/// Seconds from router to node or back.
const WAY_S: f64 = 0.001;
/// Tokens of every node's context: more than any request has.
const CONTEXT_TOKENS: u32 = 1 << 24;
/// Reports of many nodes do not serve the queue more often than this; a place that becomes free does: as there.
const SERVE_INTERVAL_S: f64 = 0.005;

/// How it went for one request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) first_token_s: f64,
    pub(crate) end_s: f64,
    pub(crate) node: usize,
}

/// How it went for all.
#[derive(Debug)]
pub(crate) struct Outcomes {
    /// None for those that were refused.
    pub(crate) requests: Vec<Option<Outcome>>,
    pub(crate) matched_tokens: u64,
    pub(crate) busy_s: Vec<f64>,
    pub(crate) per_node: Vec<u64>,
    pub(crate) end_s: f64,
    /// Mean relative error and bias of predicted times to the first token.
    pub(crate) predicted: (f64, f64),
}

#[derive(Debug)]
enum Event {
    Arrives(usize),
    Delivered { node: usize, request: usize },
    StepEnds { node: usize, version: u64 },
    Told { request: usize, told: Told },
    ReportDue(usize),
    Reported { node: usize, load: Box<NodeLoad>, first_seq: u64, events: Vec<CacheEvent> },
}

#[derive(Debug)]
struct Scheduled {
    at_s: f64,
    number: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    /// The soonest is the greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        other.at_s.total_cmp(&self.at_s).then(other.number.cmp(&self.number))
    }
}

struct Sim<'a> {
    all: &'a [Request],
    arrivals: &'a [f64],
    epoch: Instant,
    now_s: f64,
    events: BinaryHeap<Scheduled>,
    number: u64,
    router: Router,
    nodes: Vec<SimNode>,
    /// When each node reported last, and whether a report is due.
    reports: Vec<(f64, bool)>,
    queue: Queue<usize>,
    /// When that was served last.
    served_s: f64,
    bookings: Vec<Option<BookingId>>,
    outcomes: Vec<Option<Outcome>>,
    first_token: Vec<f64>,
    sent_to: Vec<usize>,
}

fn query(request: &Request) -> RouteQuery<'_> {
    RouteQuery {
        model: MODEL,
        hashes: &request.hashes,
        prompt_tokens: request.prompt_tokens,
        max_tokens: request.max_tokens,
        exclude: &[],
        session: request.session,
        priority: Priority::default(),
    }
}

fn node_id(index: usize) -> NodeId {
    NodeId(index as u128 + 1)
}

/// Runs all requests, which arrive at `arrivals`, through a router over these nodes.
pub(crate) fn simulate(
    all: &[Request],
    arrivals: &[f64],
    nodes: &[NodeSpec],
    node_blocks: usize,
    settings: RouterSettings,
    epoch: Instant,
) -> Outcomes {
    let mut sim = Sim {
        all,
        arrivals,
        epoch,
        now_s: 0.0,
        events: BinaryHeap::new(),
        number: 0,
        router: Router::new(settings),
        nodes: nodes.iter().map(|&spec| SimNode::new(spec, node_blocks)).collect(),
        reports: vec![(f64::NEG_INFINITY, false); nodes.len()],
        queue: Queue::new(limits::ROUTER_WAITING_MAX),
        served_s: f64::NEG_INFINITY,
        bookings: vec![None; all.len()],
        outcomes: vec![None; all.len()],
        first_token: vec![0.0; all.len()],
        sent_to: vec![0; all.len()],
    };
    sim.start();
    while let Some(Scheduled { at_s, event, .. }) = sim.events.pop() {
        sim.now_s = at_s;
        sim.handle(event);
    }
    sim.end()
}

impl Sim<'_> {
    fn start(&mut self) {
        let card = ModelCard {
            name: MODEL.to_owned(),
            root: BlockHash(0),
            context_tokens: CONTEXT_TOKENS,
            vocab_size: 1,
            eos_tokens: Vec::new(),
            assets: AssetsHash([0; 32]),
            created_s: 0,
            kind: types::ModelKind::Generator,
        };
        let now = self.now();
        for index in 0..self.nodes.len() {
            let node = node_id(index);
            assert!(self.router.node_up(node), "at most {} nodes", limits::NODES_MAX);
            self.router.state(node, EngineState::Ready, vec![card.clone()]);
            self.router.load(node, self.nodes[index].load(0.0, self.all), now);
            let nothing = CacheSnapshot { epoch: 0, seq: 0, blocks: Vec::new() };
            self.router.cache_snapshot(node, nothing, now);
            self.router.rtt(node, Duration::from_secs_f64(2.0 * WAY_S));
        }
        for (request, &at_s) in self.arrivals.iter().enumerate() {
            self.at(at_s, Event::Arrives(request));
        }
    }

    fn now(&self) -> Instant {
        self.epoch + Duration::from_secs_f64(self.now_s)
    }

    fn at(&mut self, at_s: f64, event: Event) {
        self.events.push(Scheduled { at_s, number: self.number, event });
        self.number += 1;
    }

    fn handle(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Arrives(request) => {
                // Nobody is overtaken: where others wait, it takes its turn among them.
                let waits = !self.queue.is_empty();
                if !waits && self.send(request, &mut Plan::default()) {
                    return;
                }
                let work_s = self.router.work_s(&query(&self.all[request]), now);
                // One client, so that nothing but the order in which work is done shows.
                let (client, priority) = (ClientId(0), Priority::default());
                let waiting = Waiting { client, priority, work_s, again: false };
                // Where there is no room it is refused.
                let queued = self.queue.push(request, waiting, now).is_ok();
                if queued && waits {
                    self.serve();
                }
            }
            Event::Delivered { node, request } => {
                if let Some(booking) = self.bookings[request] {
                    // Its answer is on its way back; nothing that depends on it is sooner.
                    self.router.accepted(booking, now);
                }
                let ends = self.nodes[node].submit(self.now_s, request, self.all);
                self.step(node, ends);
                self.changed(node);
            }
            Event::StepEnds { node, version } => {
                if self.nodes[node].version != version {
                    return;
                }
                let mut result = StepResult::default();
                let ends = self.nodes[node].step_end(self.now_s, self.all, &mut result);
                for (request, told) in result.told {
                    self.at(self.now_s + WAY_S, Event::Told { request, told });
                }
                self.step(node, ends);
                self.changed(node);
            }
            Event::Told { request, told: Told::FirstToken } => {
                self.first_token[request] = self.now_s;
                if let Some(booking) = self.bookings[request] {
                    self.router.first_token(booking, now);
                }
                self.serve();
            }
            Event::Told { request, told: Told::Finished { written } } => {
                if let Some(booking) = self.bookings[request] {
                    self.router.progress(booking, written, now);
                    self.router.finished(booking, now);
                }
                let (first_token_s, node) = (self.first_token[request], self.sent_to[request]);
                self.outcomes[request] = Some(Outcome { first_token_s, end_s: self.now_s, node });
                self.serve();
            }
            Event::ReportDue(node) => self.report(node),
            Event::Reported { node, load, first_seq, events } => {
                self.router.load(node_id(node), *load, now);
                let known = self.router.cache_events(node_id(node), 0, first_seq, &events, now);
                known.expect("no event is lost");
                if self.now_s - self.served_s >= SERVE_INTERVAL_S {
                    self.serve();
                }
            }
        }
    }

    fn step(&mut self, node: usize, ends: Option<f64>) {
        if let Some(at_s) = ends {
            let version = self.nodes[node].version;
            self.at(at_s, Event::StepEnds { node, version });
        }
    }

    /// A node has something to tell: at once, unless it did a moment ago.
    fn changed(&mut self, node: usize) {
        let (last_s, due) = self.reports[node];
        if due {
            return;
        }
        let next_s = last_s + limits::LOAD_INTERVAL_MIN.as_secs_f64();
        if next_s <= self.now_s {
            self.report(node);
        } else {
            self.reports[node].1 = true;
            self.at(next_s, Event::ReportDue(node));
        }
    }

    fn report(&mut self, node: usize) {
        self.reports[node] = (self.now_s, false);
        let (stored, removed) = self.nodes[node].take_events();
        let mut events = Vec::new();
        if !removed.is_empty() {
            events.push(CacheEvent::Removed { blocks: removed });
        }
        if !stored.is_empty() {
            events.push(CacheEvent::Stored { parent: BlockHash(0), blocks: stored });
        }
        let first_seq = self.nodes[node].seq;
        self.nodes[node].seq += events.len() as u64;
        let load = Box::new(self.nodes[node].load(self.now_s, self.all));
        self.at(self.now_s + WAY_S, Event::Reported { node, load, first_seq, events });
    }

    /// Sends what can be sent, in the queue's order.
    fn serve(&mut self) {
        let now = self.now();
        self.served_s = self.now_s;
        if self.queue.is_empty() || !self.router.has_room(MODEL, now) {
            return;
        }
        let mut passed = 0;
        let mut pass = self.queue.pass(now);
        while passed < PASSED_MAX
            && let Some((id, &request)) = self.queue.next_open(&mut pass, &self.router)
        {
            if self.send(request, pass.plan()) {
                self.queue.serve(id, now);
            } else {
                self.queue.passed(id, pass.plan());
                passed += 1;
            }
        }
    }

    /// Sends a request to the node that is best for it, if that has room.
    fn send(&mut self, request: usize, plan: &mut Plan) -> bool {
        let (now, query) = (self.now(), query(&self.all[request]));
        match self.router.route_after(&query, plan, now) {
            Ok(route) => {
                self.bookings[request] = self.router.book(&route, &query, now);
                let node = (route.node.0 - 1) as usize;
                self.sent_to[request] = node;
                self.at(self.now_s + WAY_S, Event::Delivered { node, request });
                true
            }
            Err(RouteError::AllBusy { .. }) => false,
            Err(error) => panic!("{error}"),
        }
    }

    fn end(self) -> Outcomes {
        assert!(self.queue.is_empty(), "{} requests were never sent", self.queue.len());
        assert!(self.nodes.iter().all(SimNode::is_idle), "a node did not end");
        let learned: Vec<_> =
            (0..self.nodes.len()).filter_map(|index| self.router.learned(node_id(index))).collect();
        let requests: f64 = learned.iter().map(|one| one.requests as f64).sum();
        let mean = |part: fn(&router::Learned) -> f64| {
            learned.iter().map(|one| part(one) * one.requests as f64).sum::<f64>() / requests.max(1.0)
        };
        Outcomes {
            requests: self.outcomes,
            matched_tokens: self.nodes.iter().map(|node| node.matched_tokens).sum(),
            busy_s: self.nodes.iter().map(|node| node.busy_s).collect(),
            per_node: self.nodes.iter().map(|node| node.requests).collect(),
            end_s: self.now_s,
            predicted: (mean(|one| one.error), mean(|one| one.bias)),
        }
    }
}
