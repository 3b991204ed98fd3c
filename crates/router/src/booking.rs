//! Requests that this router has in flight, and what of them a node's load reports cannot show yet.

use crate::affinity::EngineEpoch;
use std::collections::BTreeMap;
use types::NodeId;

/// A place taken at a node by [`crate::Router::book`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BookingId(u64);

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

#[derive(Debug, Clone)]
pub(crate) struct Booking {
    pub(crate) node: NodeId,
    pub(crate) engine: EngineEpoch,
    pub(crate) stage: BookingStage,
    /// Tokens still to be prefilled; 0 once the first token came.
    pub(crate) prefill_tokens: u64,
    pub(crate) decode_tokens: u64,
}

/// Work of a node that its last load report did not include.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct BookedWork {
    pub(crate) requests: u32,
    pub(crate) prefill_tokens: u64,
    pub(crate) decode_tokens: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Bookings {
    next: u64,
    open: BTreeMap<BookingId, Booking>,
}

impl Bookings {
    pub(crate) fn open(&mut self, booking: Booking, work: &mut BookedWork) -> BookingId {
        work.requests += 1;
        work.prefill_tokens += booking.prefill_tokens;
        work.decode_tokens += booking.decode_tokens;
        let id = BookingId(self.next);
        self.next += 1;
        self.open.insert(id, booking);
        id
    }

    pub(crate) fn get_mut(&mut self, id: BookingId) -> Option<&mut Booking> {
        self.open.get_mut(&id)
    }

    pub(crate) fn close(&mut self, id: BookingId) -> Option<Booking> {
        self.open.remove(&id)
    }

    pub(crate) fn len(&self) -> usize {
        self.open.len()
    }

    /// A load report of that node arrived: what it accepted before is in there.
    pub(crate) fn reported(&mut self, node: NodeId, work: &mut BookedWork) {
        for booking in self.open.values_mut().filter(|booking| booking.node == node) {
            if booking.stage == BookingStage::Accepted {
                booking.stage = BookingStage::Reported;
                work.remove(booking);
            }
        }
    }

    /// Forgets the bookings of an engine that is gone.
    pub(crate) fn drop_engine(&mut self, engine: EngineEpoch) {
        self.open.retain(|_, booking| booking.engine != engine);
    }
}

impl BookedWork {
    pub(crate) fn remove(&mut self, booking: &Booking) {
        debug_assert!(self.requests > 0 && self.prefill_tokens >= booking.prefill_tokens, "booked before");
        self.requests = self.requests.saturating_sub(1);
        self.prefill_tokens = self.prefill_tokens.saturating_sub(booking.prefill_tokens);
        self.decode_tokens = self.decode_tokens.saturating_sub(booking.decode_tokens);
    }
}
