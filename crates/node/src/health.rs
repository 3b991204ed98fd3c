//! Whether nodes bring their requests on, and how much may be tried again; pure but for a number that tasks share.
//!
//! A [`Pulse`] is when a node was last seen to work: a token of any of its requests, or a load report with passes that it
//! had not told of. A node can answer and not work: its engine hangs in the middle of a pass. It can also do neither, and
//! that shows long before its connection counts as lost.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A pass that takes so many times what its engine expected does not end by itself in useful time.
const STEP_DEADLINE_STEPS: f64 = 4.0;
/// The least time without progress that counts as a stall: compiling a kernel, or a machine that swaps, takes as long. As
/// long as it takes to notice that a whole node is gone.
const STEP_DEADLINE_MIN: Duration = types::limits::NODE_SILENCE_MAX;
/// The most, whatever an engine says that it expects.
const STEP_DEADLINE_MAX: Duration = Duration::from_secs(30);
/// A request that has not begun is tried elsewhere as well once its node brought nothing for so many times what the
/// router expected until its first token: predictions are rarely wrong by more while a node works.
const START_DEADLINE_TTFTS: u32 = 3;
/// The least time for that, and before a node is left alone that brings nothing: beyond what reports of a busy node come
/// late by, and a small part of the seconds in which a connection is lost.
pub(crate) const START_DEADLINE_MIN: Duration = Duration::from_millis(400);
/// Tries that are at hand at first, and at most: what one node may have had in flight when it died.
const RETRIES_MAX: f64 = 1024.0;
/// Tries that each new request adds: further tries are at most this part of the traffic in the long run.
const RETRIES_PER_REQUEST: f64 = 0.25;
/// Tries that each second adds, so that a router with little traffic recovers too.
const RETRIES_PER_S: f64 = 5.0;
/// Hedges are tries that may turn out needless: they are not made once less than this part of the tries is left.
const HEDGE_SHARE: f64 = 0.5;

/// How far a request has come at its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Its first token is due.
    Waits,
    /// The same, and its grammar may have to be compiled before: no pass of a node that does nothing else shows that.
    Compiles,
    /// Tokens came.
    Writes,
}

/// How long a request, or a whole node, may bring nothing before it counts as stalled.
pub(crate) fn step_deadline(pass_s: Option<f32>) -> Duration {
    passes(pass_s).clamp(STEP_DEADLINE_MIN, STEP_DEADLINE_MAX)
}

/// How long the node of a request that has not begun may bring nothing, where its first token was expected after
/// `expected`; at most what a request that has begun is given.
pub(crate) fn start_deadline(pass_s: Option<f32>, expected: Duration) -> Duration {
    let least = passes(pass_s).max(expected.saturating_mul(START_DEADLINE_TTFTS));
    least.clamp(START_DEADLINE_MIN, step_deadline(pass_s))
}

/// So many times the seconds that an engine expects its pass to take.
fn passes(pass_s: Option<f32>) -> Duration {
    let seconds = f64::from(pass_s.unwrap_or(0.0)) * STEP_DEADLINE_STEPS;
    Duration::try_from_secs_f64(seconds).unwrap_or(STEP_DEADLINE_MAX)
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
    fn what_has_not_begun_is_given_less_time() {
        let check = |pass_s: Option<f32>, expected_ms: u64, ms: (u128, u128)| {
            let start = start_deadline(pass_s, Duration::from_millis(expected_ms));
            let got = (start.as_millis(), step_deadline(pass_s).as_millis());
            assert_eq!(got, ms, "{pass_s:?} {expected_ms}");
        };
        check(None, 0, (400, 2000));
        check(Some(0.02), 100, (400, 2000));
        check(Some(0.02), 300, (900, 2000));
        check(Some(0.25), 100, (1000, 2000));
        check(Some(0.02), 9000, (2000, 2000));
        check(Some(1.0), 100, (4000, 4000));
        check(Some(f32::NAN), 0, (30_000, 30_000));
        check(Some(1e9), 0, (30_000, 30_000));
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
