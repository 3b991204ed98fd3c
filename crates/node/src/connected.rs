//! A connected node, as whoever feeds its reports holds it: what it says goes into the dispatch, and with it the node goes.

use crate::dispatch::{Dispatch, now};
use crate::target::Target;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use types::{CacheSnapshot, EngineState, ModelCard, NodeId, NodeLoad};
use wire::Control;

/// At most one snapshot of a node's cache is asked for in this time: one is on its way after the first.
const RESYNC_INTERVAL: Duration = Duration::from_secs(1);

/// Dropping it removes the node.
pub(crate) struct Connected {
    node: NodeId,
    connection: u64,
    dispatch: Arc<Dispatch>,
    /// A snapshot of which a part has come, and not the last one.
    snapshot: Option<(u64, u64)>,
    resynced: Option<Instant>,
}

impl Connected {
    pub(crate) fn new(node: NodeId, connection: u64, dispatch: Arc<Dispatch>) -> Self {
        Self { node, connection, dispatch, snapshot: None, resynced: None }
    }

    /// Takes in what the node says.
    pub(crate) fn take(&mut self, control: Control) {
        match control {
            Control::State { state, models } => self.state(state, models),
            Control::Load(load) => self.load(load),
            Control::Leaving => self.leaving(),
            Control::CacheSnapshot { epoch, seq, blocks, last } => {
                let part = CacheSnapshot { epoch, seq, blocks };
                // Part by part, so that nobody waits long for the lock.
                if self.snapshot == Some((epoch, seq)) {
                    self.dispatch.lock().router.cache_snapshot_more(self.node, &part);
                } else {
                    self.dispatch.lock().router.cache_snapshot(self.node, part, now());
                }
                self.snapshot = (!last).then_some((epoch, seq));
            }
            Control::CacheEvents { epoch, first_seq, events } => {
                let taken = {
                    let mut state = self.dispatch.lock();
                    state.router.cache_events(self.node, epoch, first_seq, &events, now())
                };
                if let Err(resync) = taken {
                    tracing::debug!(%resync, "a cache is not known any more");
                    self.resync();
                }
            }
            Control::Pipeline(report) => self.dispatch.change(|all| {
                if let Some(entry) = all.nodes.get_mut(&self.node) {
                    entry.pipeline = Some(report);
                }
            }),
            // The transport lets these through once only.
            Control::Hello(_) | Control::Welcome(_) => {}
        }
    }

    fn state(&self, state: EngineState, models: Vec<ModelCard>) {
        let ready = state == EngineState::Ready;
        let over = matches!(state, EngineState::Restarting(_) | EngineState::Pipeline(_));
        self.dispatch.change(|all| {
            if let Some(entry) = all.nodes.get_mut(&self.node).filter(|_| over) {
                all.serial += 1;
                entry.life = all.serial;
                entry.passes = 0;
            }
            if ready {
                all.works(self.node, now());
            }
            all.router.state(self.node, state, models);
        });
    }

    /// It takes nothing new.
    fn leaving(&self) {
        self.dispatch.change(|all| {
            let models = all.router.node(self.node).map(|known| known.models().to_vec());
            all.router.state(self.node, EngineState::Draining, models.unwrap_or_default());
        });
    }

    fn load(&self, load: NodeLoad) {
        self.dispatch.change(|all| {
            let now = now();
            let Some(entry) = all.nodes.get_mut(&self.node) else { return };
            let (rtt, before) = (entry.target.rtt(), entry.passes);
            entry.passes = load.passes;
            if load.passes != before {
                all.works(self.node, now);
            } else if load.running + load.waiting == 0 {
                // What it did not bring was taken elsewhere.
                all.hanging.remove(&self.node);
            }
            all.router.rtt(self.node, rtt);
            all.router.load(self.node, load, now);
        });
    }

    fn resync(&mut self) {
        let target = self.dispatch.lock().nodes.get(&self.node).map(|entry| entry.target.clone());
        let waits = self.resynced.is_some_and(|at| at.elapsed() < RESYNC_INTERVAL);
        // The node of this process misses nothing.
        if let (Some(Target::Remote(peer)), false) = (target, waits) {
            self.resynced = Some(Instant::now());
            tokio::spawn(async move {
                if let Err(error) = peer.resync().await {
                    tracing::debug!(%error, "no snapshot of a cache");
                }
            });
        }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.dispatch.change(|all| {
            if all.nodes.get(&self.node).is_some_and(|entry| entry.connection == self.connection) {
                all.remove(self.node);
            }
        });
    }
}
