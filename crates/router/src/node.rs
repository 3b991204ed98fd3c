//! [`KnownNode`]: one node as a router knows it.

use crate::booking::{BookedWork, Booking, BookingStage};
use crate::cost::Work;
use crate::index::Slot;
use crate::learned::{Learned, Predictor, RATES_UNKNOWN};
use crate::query::RouteQuery;
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
    /// Requests that ended since the last load report, which still counts them.
    pub(crate) ended: u32,
    /// It refused a request as busy since the last load report.
    pub(crate) full: bool,
    /// Requests that it was given so far.
    pub(crate) given: u64,
    pub(crate) predictor: Predictor,
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
            ended: 0,
            full: false,
            given: 0,
            predictor: Predictor::new(&RATES_UNKNOWN),
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
        self.models.iter().any(|card| card.name == model)
    }

    /// Whether it serves the model with a context that holds the request: machines with less memory have a smaller one.
    pub(crate) fn fits(&self, query: &RouteQuery<'_>) -> bool {
        let tokens = u64::from(query.prompt_tokens) + u64::from(query.max_tokens);
        let holds = |card: &ModelCard| card.name == query.model && tokens <= u64::from(card.context_tokens);
        self.models.iter().any(holds)
    }

    pub(crate) fn work(&self, now: Instant) -> Work<'_> {
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
            rtt: self.rtt,
        }
    }

    /// Its load arrived: what it accepted before is in there.
    pub(crate) fn reported(&mut self, load: NodeLoad, now: Instant) {
        if self.load.is_none() {
            self.predictor = Predictor::new(&load.rates);
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
