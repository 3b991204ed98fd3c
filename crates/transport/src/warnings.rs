//! Warnings that strangers can cause, at a bounded rate.

use crate::{
    JoinError,
    limits::{WARNINGS_INTERVAL, WARNINGS_MAX},
};
use std::{
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};
use tokio::time::Instant;

/// Logs who was refused and why, and counts those it does not log.
#[derive(Debug, Default)]
pub(crate) struct Warnings(Mutex<Window>);

#[derive(Debug, Default)]
struct Window {
    start: Option<Instant>,
    logged: u32,
    silent: u32,
}

impl Warnings {
    /// A peer came and was sent away.
    pub(crate) fn refused(&self, peer: SocketAddr, reason: &str) {
        if self.admit() {
            tracing::warn!(%peer, reason, "refused a peer");
        }
    }

    /// This process came and was sent away.
    pub(crate) fn not_joined(&self, error: &JoinError) {
        if self.admit() {
            tracing::warn!(%error, "could not join a router");
        }
    }

    fn admit(&self) -> bool {
        let now = Instant::now();
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if window.start.is_none_or(|start| now - start >= WARNINGS_INTERVAL) {
            if window.silent > 0 {
                tracing::warn!(refusals = window.silent, "more refusals than are logged one by one");
            }
            *window = Window { start: Some(now), logged: 0, silent: 0 };
        }
        if window.logged < WARNINGS_MAX {
            window.logged += 1;
            true
        } else {
            window.silent += 1;
            false
        }
    }
}
