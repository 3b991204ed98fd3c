//! A clock that only moves when told.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Virtual time: clones share it. Differences between its times are the same in every run.
#[derive(Debug, Clone)]
pub struct VirtualClock {
    start: Instant,
    elapsed_ns: Arc<AtomicU64>,
}

impl VirtualClock {
    /// A clock at 0.
    pub fn new() -> Self {
        Self { start: Instant::now(), elapsed_ns: Arc::default() }
    }

    /// The time as the project's pure parts take it.
    pub fn now(&self) -> Instant {
        self.start + self.elapsed()
    }

    /// The time since its start.
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.elapsed_ns.load(Ordering::Relaxed))
    }

    /// Lets time pass.
    pub fn advance(&self, by: Duration) {
        let by_ns = u64::try_from(by.as_nanos()).expect("a test's time fits 64 bits of nanoseconds");
        self.elapsed_ns.fetch_add(by_ns, Ordering::Relaxed);
    }
}

impl Default for VirtualClock {
    fn default() -> Self {
        Self::new()
    }
}
