//! What a request would cost on a node, in seconds, so that unlike machines compare.

use std::time::Duration;
use types::{NodeLoad, NodeRates};

/// Weight of the time to write the answer, relative to the time until it starts. The wait for the first token is what a
/// choice of node can change most; without any weight end-to-end time got 7–11 % worse in simulation.
const DECODE_WEIGHT: f64 = 0.2;
/// Tokens that an answer is expected to have where `max_tokens` allows more: clients ask for far more than they use.
const DECODE_TOKENS_EXPECTED_MAX: u64 = 256;
/// Prompt tokens that an engine prefills in one step beside its decode rows; each such step also costs a decode step.
const PREFILL_SLICE_TOKENS: f64 = 256.0;
/// Assumed of a node that has not told its speed: a slow one, so that measured ones come first.
const RATES_UNKNOWN: NodeRates =
    NodeRates { prefill_tokens_per_s: 200.0, decode_step_s: 0.05, decode_row_s: 0.01 };
/// Assumed of a node that has not told its slots.
pub(crate) const SLOTS_UNKNOWN: u32 = 1;
/// The longest backlog believed, in seconds: past it nothing is told apart.
const BACKLOG_S_MAX: f64 = 86_400.0;
/// The least prefill rate believed, tokens a second: keeps a cost finite whatever a node reports.
const PREFILL_RATE_MIN: f64 = 1.0;

/// The terms of a node's cost for one request, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cost {
    /// Until the prompts ahead of it are read.
    pub backlog_s: f64,
    /// Until a slot is free, where all are taken.
    pub slot_s: f64,
    /// Until its own uncached prompt is read beside the rows that run.
    pub prefill_s: f64,
    /// There and back.
    pub rtt_s: f64,
    /// Writing the answer, already weighted.
    pub decode_s: f64,
}

impl Cost {
    /// The sum of all terms.
    pub fn total_s(&self) -> f64 {
        self.backlog_s + self.slot_s + self.prefill_s + self.rtt_s + self.decode_s
    }
}

/// A node's work as seen now, booked requests included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    pub(crate) rates: NodeRates,
    pub(crate) slots: u32,
    /// Requests at the node or on their way to it.
    pub(crate) requests: u32,
    /// Seconds of prefill that the node told of and that should be left now.
    pub(crate) backlog_s: f64,
    /// Prompt tokens beyond that.
    pub(crate) booked_tokens: u64,
    pub(crate) decode_tokens: u64,
    pub(crate) rtt: Duration,
}

impl Work {
    pub(crate) fn rates(load: Option<&NodeLoad>) -> NodeRates {
        load.map_or(RATES_UNKNOWN, |load| load.rates)
    }

    fn prefill_rate(rates: &NodeRates) -> f64 {
        // `max` also replaces NaN.
        f64::from(rates.prefill_tokens_per_s).max(PREFILL_RATE_MIN)
    }

    /// What is left of the prefill of a load report after `since`: the node has been working meanwhile.
    pub(crate) fn backlog_s(load: Option<&NodeLoad>, since: Duration) -> f64 {
        let told_s = load.map_or(0.0, |load| f64::from(load.prefill_backlog_s));
        // `max` also replaces NaN.
        let left_s = (told_s - since.as_secs_f64()).max(0.0);
        left_s.min(BACKLOG_S_MAX)
    }

    fn step_s(&self, rows: u32) -> f64 {
        let (step, row) =
            (f64::from(self.rates.decode_step_s).max(0.0), f64::from(self.rates.decode_row_s).max(0.0));
        step + row * f64::from(rows.saturating_sub(1))
    }

    fn rows(&self) -> u32 {
        self.requests.min(self.slots)
    }

    /// Seconds until a slot is free for one more request: mean work left per row, times turns to wait.
    pub(crate) fn slot_s(&self) -> f64 {
        if self.requests < self.slots {
            return 0.0;
        }
        let tokens_left =
            self.decode_tokens.min(u64::from(self.requests) * DECODE_TOKENS_EXPECTED_MAX) as f64;
        // Rows end one after the other, so the first of `slots` ends after a fraction of a row's mean.
        let turns = f64::from(self.requests - self.slots + 1) / f64::from(self.slots.max(1));
        tokens_left / f64::from(self.requests.max(1)) * self.step_s(self.rows()) * turns
    }

    pub(crate) fn cost(&self, uncached_tokens: u64, max_tokens: u32) -> Cost {
        let rate = Self::prefill_rate(&self.rates);
        let decode_step_s = if self.requests == 0 { 0.0 } else { self.step_s(self.rows()) };
        let interference = 1.0 + decode_step_s * rate / PREFILL_SLICE_TOKENS;
        let expected = u64::from(max_tokens).min(DECODE_TOKENS_EXPECTED_MAX) as f64;
        Cost {
            backlog_s: self.backlog_s + self.booked_tokens as f64 / rate,
            slot_s: self.slot_s(),
            prefill_s: uncached_tokens as f64 / rate * interference,
            rtt_s: self.rtt.as_secs_f64(),
            decode_s: DECODE_WEIGHT * expected * self.step_s((self.requests + 1).min(self.slots.max(1))),
        }
    }
}
