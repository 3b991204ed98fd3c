//! [`Plan`]: which nodes the requests that wait at the router are meant for.

use std::collections::BTreeMap;
use types::NodeId;

/// Work of requests that wait, by the node that is best for each; made anew whenever the queue is gone through.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    seconds: BTreeMap<NodeId, f64>,
}

impl Plan {
    pub(crate) fn add(&mut self, node: NodeId, seconds: f64) {
        *self.seconds.entry(node).or_default() += seconds;
    }

    /// Seconds of prefill that will be sent there before the next request.
    pub(crate) fn planned_s(&self, node: NodeId) -> f64 {
        if self.seconds.is_empty() { 0.0 } else { self.seconds.get(&node).copied().unwrap_or(0.0) }
    }
}
