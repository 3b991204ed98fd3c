//! [`Breaker`]: whether a node that failed lately is asked again, pure.
//!
//! Closed, it lets everything through; after a few failures in a row it is open for a while and lets nothing through; then
//! one request is let through as a probe, whose outcome closes it, or opens it for twice as long. A node that shows that it
//! works ([`Breaker::heartbeat`]) is readmitted at once. What a node refuses because it has enough to do is no failure, and
//! no success either ([`Outcome::Refused`]).

use std::time::{Duration, Instant};

/// Failures in a row that open it: one may be the request's, two an accident, and requests that fail go on elsewhere anyway.
const FAILURES_MAX: u32 = 3;
/// For how long it is open at first: about what an engine needs to come back without loading.
const OPEN_TIME: Duration = Duration::from_secs(1);
/// The longest: a machine that needs repair is still tried now and then.
const OPEN_TIME_MAX: Duration = Duration::from_secs(30);
/// A probe that has no outcome after this long counts as failed: whoever sent it has given up.
const PROBE_TIME_MAX: Duration = Duration::from_secs(30);

/// What became of a request at a node, as far as it says something of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It answered, if only that the request is wrong.
    Answered,
    /// It has enough to do, or is leaving.
    Refused,
    /// It was lost, did not answer in time, or its engine failed.
    Failed,
}

/// What is known of one node's failures.
#[derive(Debug, Clone, Default)]
pub struct Breaker {
    state: State,
    /// In a row.
    failures: u32,
    /// Times that it opened since it was closed.
    opened: u32,
}

#[derive(Debug, Clone, Copy, Default)]
enum State {
    #[default]
    Closed,
    Open {
        until: Instant,
    },
    /// A probe was let through.
    Probing {
        since: Instant,
    },
}

impl Breaker {
    /// Whether a request may go to the node at `now`.
    pub fn admits(&self, now: Instant) -> bool {
        match self.state {
            State::Closed => true,
            State::Open { until } => now >= until,
            State::Probing { since } => now.saturating_duration_since(since) >= PROBE_TIME_MAX,
        }
    }

    /// Whether it lets everything through.
    pub fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }

    /// A request goes to the node: where it is not closed, this is the one probe.
    pub fn sent(&mut self, now: Instant) {
        if !self.is_closed() {
            self.state = State::Probing { since: now };
        }
    }

    /// Something became of a request at the node.
    pub fn outcome(&mut self, outcome: Outcome, now: Instant) {
        match outcome {
            Outcome::Answered => *self = Self::default(),
            // The next one is a probe as well.
            Outcome::Refused => {
                if let State::Probing { .. } = self.state {
                    self.state = State::Open { until: now };
                }
            }
            Outcome::Failed => {
                self.failures = self.failures.saturating_add(1);
                let open = matches!(self.state, State::Open { .. });
                if self.failures >= FAILURES_MAX && !open {
                    let time = OPEN_TIME.saturating_mul(1 << self.opened.min(16)).min(OPEN_TIME_MAX);
                    self.state = State::Open { until: now + time };
                    self.opened = self.opened.saturating_add(1);
                }
            }
        }
    }

    /// The node showed that its engine works.
    pub fn heartbeat(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    /// `F`ailed, `A`nswered, `R`efused, `H`eartbeat, `S`ent, digits: seconds pass; after each, whether it admits.
    fn check(steps: &str, admits: &str) {
        let mut now = Instant::now();
        let mut breaker = Breaker::default();
        let seen = steps.chars().map(|step| {
            match step {
                'F' => breaker.outcome(Outcome::Failed, now),
                'A' => breaker.outcome(Outcome::Answered, now),
                'R' => breaker.outcome(Outcome::Refused, now),
                'H' => breaker.heartbeat(),
                'S' => breaker.sent(now),
                digit => now += Duration::from_secs(u64::from(digit.to_digit(10).expect("a digit"))),
            }
            if breaker.admits(now) { '+' } else { '-' }
        });
        assert_eq!(seen.collect::<String>(), admits, "{steps}");
    }

    #[test]
    fn three_failures_in_a_row_open_it_and_a_probe_decides() {
        check("FFAFF", "+++++");
        check("RRRRF", "+++++");
        check("FFF", "++-");
        check("FFF1", "++-+");
        check("FFF1S", "++-+-");
        check("FFF1SA", "++-+-+");
        check("FFF1SF1", "++-+---");
        check("FFF1SF2SF4", "++-+--+--+");
        check("FFF1SR", "++-+-+");
        check("FFFH", "++-+");
        check("FFF1SHFF", "++-+-+++");
        // Requests that were on their way when it opened change nothing.
        check("FFFFFF1", "++----+");
        // A probe of which nothing is heard.
        check("FFF1S9999", "++-+----+");
    }

    proptest! {
        /// Whatever happens, a node is tried again within the longest time.
        #[test]
        fn nobody_is_shut_out_for_ever(steps in vec(0..6u8, 0..200)) {
            let mut now = Instant::now();
            let mut breaker = Breaker::default();
            for step in steps {
                match step {
                    0 => breaker.outcome(Outcome::Failed, now),
                    1 => breaker.outcome(Outcome::Refused, now),
                    2 => now += Duration::from_secs(3),
                    3 if breaker.admits(now) => breaker.sent(now),
                    4 => breaker.outcome(Outcome::Failed, now),
                    _ => {}
                }
                prop_assert!(breaker.admits(now + OPEN_TIME_MAX.max(PROBE_TIME_MAX)));
            }
        }
    }
}
