//! [`Sessions`]: which node had a session's last request.
//!
//! Bounded by two generations: when the young one is full it becomes the old one and the former old one is dropped.

use rustc_hash::FxHashMap;
use types::NodeId;

/// Sessions of each generation: about 5 MB together.
const GENERATION_MAX: usize = 1 << 16;

#[derive(Debug, Default)]
pub(crate) struct Sessions {
    young: FxHashMap<u64, NodeId>,
    old: FxHashMap<u64, NodeId>,
}

impl Sessions {
    pub(crate) fn node(&self, session: u64) -> Option<NodeId> {
        self.young.get(&session).or_else(|| self.old.get(&session)).copied()
    }

    pub(crate) fn sent(&mut self, session: u64, node: NodeId) {
        if self.young.len() >= GENERATION_MAX && !self.young.contains_key(&session) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(session, node);
    }
}
