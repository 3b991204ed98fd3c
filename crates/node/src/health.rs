//! Whether nodes bring their requests on, and how much may be tried again; pure but for a number that tasks share.
//!
//! A [`Pulse`] is when a node was last seen to work: a token of any of its requests, or a load report with passes that it
//! had not told of. A node can answer and not work: its engine hangs in the middle of a pass.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use types::NodeLoad;

/// A pass that takes so many times what its engine expected does not end by itself in useful time.
const STEP_DEADLINE_STEPS: f64 = 4.0;
/// The least time without progress that counts as a stall: compiling a kernel, or a machine that swaps, takes as long. As
/// long as it takes to notice that a whole node is gone.
const STEP_DEADLINE_MIN: Duration = types::limits::NODE_SILENCE_MAX;
/// The most, whatever an engine says that it expects.
const STEP_DEADLINE_MAX: Duration = Duration::from_secs(30);
/// Tries that are at hand at first, and at most: what one node may have had in flight when it died.
const RETRIES_MAX: f64 = 1024.0;
/// Tries that each new request adds: further tries are at most this part of the traffic in the long run.
const RETRIES_PER_REQUEST: f64 = 0.25;
/// Tries that each second adds, so that a router with little traffic recovers too.
const RETRIES_PER_S: f64 = 5.0;
/// Hedges are tries that may turn out needless: they are not made once less than this part of the tries is left.
const HEDGE_SHARE: f64 = 0.5;

/// How long a request, or a whole node, may bring nothing before it counts as stalled.
pub(crate) fn step_deadline(load: Option<&NodeLoad>) -> Duration {
    let expected_s = load.map_or(0.0, |load| f64::from(load.step_s) * STEP_DEADLINE_STEPS);
    let expected = Duration::try_from_secs_f64(expected_s).unwrap_or(STEP_DEADLINE_MAX);
    expected.clamp(STEP_DEADLINE_MIN, STEP_DEADLINE_MAX)
}

/// When a node was last seen to work.
#[derive(Debug)]
pub(crate) struct Pulse {
    base: Instant,
    /// Milliseconds since `base`.
    last_ms: AtomicU64,
}

impl Pulse {
    pub(crate) fn new(now: Instant) -> Self {
        Self { base: now, last_ms: AtomicU64::new(0) }
    }

    pub(crate) fn beat(&self, now: Instant) {
        let ms = now.saturating_duration_since(self.base).as_millis() as u64;
        self.last_ms.fetch_max(ms, Ordering::Relaxed);
    }

    pub(crate) fn last(&self) -> Instant {
        self.base + Duration::from_millis(self.last_ms.load(Ordering::Relaxed))
    }
}

/// How many requests may yet be tried again.
#[derive(Debug)]
pub(crate) struct RetryBudget {
    left: f64,
    at: Instant,
}

impl RetryBudget {
    pub(crate) fn new(now: Instant) -> Self {
        Self { left: RETRIES_MAX, at: now }
    }

    /// A new request came.
    pub(crate) fn earn(&mut self) {
        self.left = (self.left + RETRIES_PER_REQUEST).min(RETRIES_MAX);
    }

    /// Takes a try, if there is one; for a hedge, if there are many.
    pub(crate) fn take(&mut self, hedge: bool, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * RETRIES_PER_S;
        self.at = self.at.max(now);
        self.left = (self.left + earned).min(RETRIES_MAX);
        let least = if hedge { RETRIES_MAX * HEDGE_SHARE } else { 1.0 };
        let taken = self.left >= least;
        if taken {
            self.left -= 1.0;
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_are_a_part_of_the_traffic() {
        let start = Instant::now();
        let mut budget = RetryBudget::new(start);
        let take = |budget: &mut RetryBudget, hedge, ms| {
            let now = start + Duration::from_millis(ms);
            (0..5000).take_while(|_| budget.take(hedge, now)).count()
        };
        assert_eq!(take(&mut budget, true, 0), 513);
        assert_eq!(take(&mut budget, false, 0), 511);
        assert_eq!(take(&mut budget, false, 1000), 5);
        (0..100).for_each(|_| budget.earn());
        assert_eq!((take(&mut budget, true, 1000), take(&mut budget, false, 1000)), (0, 25));
        assert_eq!(take(&mut budget, false, 10_000_000), 1024);
    }

    #[test]
    fn pulses_only_go_on() {
        let start = Instant::now();
        let pulse = Pulse::new(start);
        let at = |ms| start + Duration::from_millis(ms);
        pulse.beat(at(50));
        pulse.beat(at(20));
        assert_eq!(pulse.last(), at(50));
    }
}
