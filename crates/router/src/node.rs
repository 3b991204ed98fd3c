//! [`KnownNode`]: one node as a router knows it.

use crate::booking::{BookedWork, Booking, BookingStage};
use crate::cost::{Usual, Work, told_step_s};
use crate::index::Slot;
use crate::learned::{DRIFT_MAX, Learned, Predictor, RATES_UNKNOWN};
use crate::query::Excluded;
use crate::settings::RouterSettings;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use types::{EngineState, ModelCard, NodeLoad};

/// A node as known.
#[derive(Debug)]
pub struct KnownNode {
    pub(crate) slot: Slot,
    pub(crate) state: EngineState,
    pub(crate) models: Vec<ModelCard>,
    pub(crate) load: Option<(NodeLoad, Instant)>,
    pub(crate) rtt: Duration,
    /// Epoch of its cache and number of the next event; none until it told.
    pub(crate) cache: Option<(u64, u64)>,
    pub(crate) bookings: BTreeMap<u64, Booking>,
    /// Not in the last load report.
    pub(crate) booked: BookedWork,
    /// Requests whose first token did not come yet.
    pub(crate) unread: u32,
    /// Requests that ended since the last load report, which still counts them.
    pub(crate) ended: u32,
    /// It refused a request as busy since the last load report.
    pub(crate) full: bool,
    /// Requests that it was given so far.
    pub(crate) given: u64,
    /// Requests that all nodes had been given when it came, or was given its last one.
    pub(crate) last_turn: u64,
    /// Trials that it had: each makes the time to the next one twice as long.
    pub(crate) trials: u32,
    pub(crate) predictor: Predictor,
    /// Seconds of a decode step with one row, as told before its engine had done a pass.
    pub(crate) untried_step_s: Option<f64>,
    pub(crate) flow: Flow,
}

/// What is read within this time is as good as being read: short prompts share a step.
const READ_SOON_S: f64 = 0.05;
/// A node is tried that was given nothing while it would have had so many requests by an equal share: by chance that happens
/// to hardly any (1 in 55) that is chosen as often as others.
const TRIAL_SHARES: u64 = 4;
/// The time to the next trial is doubled no more often: a node that is slow gets a request in a million.
const TRIAL_DOUBLINGS_MAX: u32 = 16;
/// Over so many seconds requests and their work are counted to see how busy a node is.
const FLOW_S: f64 = 20.0;

/// What a node was given lately: sums that fade.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Flow {
    requests: f64,
    work_s: f64,
    at: Option<Instant>,
}

impl Flow {
    fn fade(&self, now: Instant) -> f64 {
        self.at.map_or(0.0, |at| (-now.saturating_duration_since(at).as_secs_f64() / FLOW_S).exp())
    }

    pub(crate) fn add(&mut self, work_s: f64, now: Instant) {
        let fade = self.fade(now);
        self.requests = self.requests * fade + 1.0;
        self.work_s = self.work_s * fade + work_s;
        self.at = Some(now);
    }

    /// Requests a second, and seconds of work a second.
    fn rates(&self, now: Instant) -> (f64, f64) {
        let fade = self.fade(now) / FLOW_S;
        (self.requests * fade, self.work_s * fade)
    }
}

impl KnownNode {
    pub(crate) fn new(slot: Slot) -> Self {
        Self {
            slot,
            state: EngineState::Loading,
            models: Vec::new(),
            load: None,
            rtt: Duration::ZERO,
            cache: None,
            bookings: BTreeMap::new(),
            booked: BookedWork::default(),
            unread: 0,
            ended: 0,
            full: false,
            given: 0,
            last_turn: 0,
            trials: 0,
            predictor: Predictor::new(&RATES_UNKNOWN),
            untried_step_s: None,
            flow: Flow::default(),
        }
    }

    /// Its engine's state.
    pub fn state(&self) -> &EngineState {
        &self.state
    }

    /// What it serves.
    pub fn models(&self) -> &[ModelCard] {
        &self.models
    }

    /// When that came.
    pub fn reported_at(&self) -> Option<Instant> {
        self.load.as_ref().map(|(_, at)| *at)
    }

    /// Requests of this router that are there or on their way.
    pub fn in_flight(&self) -> usize {
        self.bookings.len()
    }

    /// Its last load report.
    pub fn load(&self) -> Option<&NodeLoad> {
        self.load.as_ref().map(|(load, _)| load)
    }

    /// Round-trip time; zero for the local node.
    pub fn rtt(&self) -> Duration {
        self.rtt
    }

    /// Whether its cache is known: its epoch and the number of the next event.
    pub fn cache(&self) -> Option<(u64, u64)> {
        self.cache
    }

    /// Requests sent to it that its last load report did not include.
    pub fn booked_requests(&self) -> u32 {
        self.booked.requests
    }

    /// Their tokens, to be read and to be written.
    pub fn booked_tokens(&self) -> u64 {
        self.booked.prefill_tokens + self.booked.decode_tokens
    }

    /// What was learned of it.
    pub fn learned(&self) -> Learned {
        self.predictor.learned()
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.state == EngineState::Ready
    }

    pub(crate) fn serves(&self, model: &str) -> bool {
        self.card(model).is_some()
    }

    pub(crate) fn card(&self, model: &str) -> Option<&ModelCard> {
        self.models.iter().find(|card| card.name == model)
    }

    /// How long its decode steps take by what its engine learned from passes, relative to what that measured before its
    /// first one; none where either is not known.
    pub(crate) fn correction(&self) -> Option<f64> {
        let (load, untried_s) = (self.load()?, self.untried_step_s?);
        let ratio = told_step_s(load, 1) / untried_s;
        (load.passes > 0 && ratio.is_finite()).then(|| ratio.clamp(1.0 / DRIFT_MAX, DRIFT_MAX))
    }

    /// Its work at `now`, where `planned_s` of what waits at the router comes before the next request.
    pub(crate) fn work(&self, usual: Usual, planned_s: f64, now: Instant) -> Work<'_> {
        let (arrivals_per_s, utilization) = self.flow.rates(now);
        let load = self.load();
        let reported = load.map_or(0, |load| load.running.saturating_add(load.waiting));
        Work {
            predictor: &self.predictor,
            load,
            since: self.load.map_or(Duration::ZERO, |(_, at)| now.saturating_duration_since(at)),
            requests: reported.saturating_sub(self.ended).saturating_add(self.booked.requests),
            booked_requests: self.booked.requests,
            booked_prefill: self.booked.prefill_tokens,
            booked_decode: self.booked.decode_tokens,
            planned_s,
            arrivals_per_s,
            utilization,
            usual,
            rtt: self.rtt,
        }
    }

    /// Whether it has nothing to do and many requests went past it: what it is taken to need may be wrong for good, since
    /// only requests tell. `turn` counts requests given to all `nodes`.
    pub(crate) fn is_due(&self, turn: u64, nodes: usize) -> bool {
        let patience = (TRIAL_SHARES * nodes as u64) << self.trials.min(TRIAL_DOUBLINGS_MAX);
        self.bookings.is_empty() && turn.saturating_sub(self.last_turn) >= patience
    }

    /// Why it has no room for one more request now: that would not be read soon, so it can still be sent later, to where
    /// that is best then.
    pub(crate) fn lacks_room(&self, work: &Work<'_>, settings: &RouterSettings) -> Option<Excluded> {
        let slots = work.slots().saturating_add(settings.node_waiting_max);
        let soon = || self.unread < settings.node_waiting_max || work.backlog_s() < READ_SOON_S;
        if self.full {
            Some(Excluded::Refused)
        } else if work.requests < slots && soon() {
            None
        } else {
            Some(Excluded::Full)
        }
    }

    /// Its load arrived: what it accepted before is in there.
    pub(crate) fn reported(&mut self, load: NodeLoad, now: Instant) {
        if self.load.is_none() {
            self.predictor = Predictor::new(&load.rates);
        }
        if load.passes == 0 {
            self.untried_step_s = Some(told_step_s(&load, 1));
        }
        self.load = Some((load, now));
        self.ended = 0;
        self.full = false;
        for booking in self.bookings.values_mut() {
            if booking.stage == BookingStage::Accepted {
                booking.stage = BookingStage::Reported;
                self.booked.remove(booking);
            }
        }
    }
}
