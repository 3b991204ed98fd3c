//! Requests that this router has in flight, and what of them a node's load reports cannot show yet.

use crate::learned::Features;
use crate::speculation::Guess;
use std::time::{Duration, Instant};
use types::NodeId;

/// A place taken at a node by [`crate::Router::book`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BookingId {
    pub(crate) node: NodeId,
    pub(crate) number: u64,
}

/// How far a booked request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BookingStage {
    /// On its way; the node has not answered.
    Sent,
    /// The node took it; its next load report includes it.
    Accepted,
    /// A load report includes it.
    Reported,
}

/// One request at a node.
#[derive(Debug)]
pub(crate) struct Booking {
    pub(crate) stage: BookingStage,
    /// Tokens still to be prefilled; 0 once the first token came.
    pub(crate) prefill_tokens: u64,
    /// Tokens still to be written, at most.
    pub(crate) decode_tokens: u64,
    /// Its blocks, as what the node is to have.
    pub(crate) guess: Guess,
    pub(crate) sent: Instant,
    pub(crate) rtt: Duration,
    /// What its time to the first token was predicted from.
    pub(crate) features: Features,
    pub(crate) first_token: Option<Instant>,
    /// Tokens written so far.
    pub(crate) tokens: u32,
    /// Seconds of a decode step when it was sent.
    pub(crate) step_s: f64,
}

/// Work of a node that its last load report did not include.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct BookedWork {
    pub(crate) requests: u32,
    pub(crate) prefill_tokens: u64,
    pub(crate) decode_tokens: u64,
}

impl BookedWork {
    pub(crate) fn add(&mut self, booking: &Booking) {
        self.requests += 1;
        self.prefill_tokens += booking.prefill_tokens;
        self.decode_tokens += booking.decode_tokens;
    }

    pub(crate) fn remove(&mut self, booking: &Booking) {
        debug_assert!(self.requests > 0 && self.prefill_tokens >= booking.prefill_tokens, "booked before");
        self.requests = self.requests.saturating_sub(1);
        self.prefill_tokens = self.prefill_tokens.saturating_sub(booking.prefill_tokens);
        self.decode_tokens = self.decode_tokens.saturating_sub(booking.decode_tokens);
    }
}
