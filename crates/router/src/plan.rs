//! [`Plan`]: which nodes the requests that wait at the router are meant for.

use crate::query::Excluded;
use crate::router::Router;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use types::{NodeId, limits};

/// For so long a request that was found to wait for a node waits for that one while it has no room, and is not decided on
/// again: as long as a busy node's load report is the last one. Several passes take place within it, each of which gets
/// [`PASSED_MAX`] further into the queue.
const MEANT_TIME_MAX: Duration = limits::LOAD_INTERVAL_MIN;
/// Requests of a model that are decided on in one pass through the queue and have to wait: bounds what one report costs.
/// Those behind them are decided on in the next passes.
pub const PASSED_MAX: usize = 32;

/// Work of requests that wait, by the node that is best for each; made anew whenever the queue is gone through.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    seconds: BTreeMap<NodeId, f64>,
    last: Option<Meant>,
}

/// The node that a request waits for, and since when that is known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Meant {
    node: NodeId,
    prefill_s: f64,
    at: Instant,
}

impl Plan {
    /// The node that the request routed last has to wait for.
    pub fn meant(&self) -> Option<Meant> {
        self.last
    }

    pub(crate) fn begin(&mut self) {
        self.last = None;
    }

    pub(crate) fn waits(&mut self, node: NodeId, prefill_s: f64, at: Instant) {
        self.last = Some(Meant { node, prefill_s, at });
        *self.seconds.entry(node).or_default() += prefill_s;
    }

    /// Seconds of prefill that will be sent there before the next request.
    pub(crate) fn planned_s(&self, node: NodeId) -> f64 {
        if self.seconds.is_empty() { 0.0 } else { self.seconds.get(&node).copied().unwrap_or(0.0) }
    }
}

impl Router {
    /// Whether a request still waits for the node that it was meant for a moment ago: then `plan` knows, and nothing is to be
    /// decided.
    pub(crate) fn still_waits(&self, meant: &Meant, plan: &mut Plan, now: Instant) -> bool {
        let waits = now.saturating_duration_since(meant.at) < MEANT_TIME_MAX
            && self.nodes.get(&meant.node).is_some_and(|known| {
                let work = known.work(self.usual(), 0.0, now);
                known.is_ready() && known.lacks_room(&work, &self.settings) == Some(Excluded::Full)
            });
        if waits {
            *plan.seconds.entry(meant.node).or_default() += meant.prefill_s;
        }
        waits
    }
}
