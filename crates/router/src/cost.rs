//! What a request would cost on a node, in seconds, so that unlike machines compare.

use crate::learned::{Features, Predictor};
use crate::query::RouteQuery;
use crate::settings::CostWeights;
use std::time::Duration;
use types::{NodeLoad, Priority};

/// The most of a node's time that is taken for spoken for: beyond it the room for more is not told apart.
const UTILIZATION_MAX: f64 = 0.9;
/// Assumed of a node that has not told its slots.
const SLOTS_UNKNOWN: u32 = 1;
/// The longest backlog believed, in seconds: past it nothing is told apart.
const BACKLOG_S_MAX: f64 = 86_400.0;
/// The most tokens believed, of anything: past it sums lose digits.
const TOKENS_MAX: u64 = 1 << 48;
/// What others' seconds weigh for a request of low priority, relative to one of normal priority; for an urgent one it is the
/// inverse. Two classes apart, who is in a hurry goes to a free node where who is not waits for the one with its prefix.
const LOW_OTHERS: f64 = 2.0;

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
    /// Reading again what it would evict, as far as that is likely to be needed; already weighted.
    pub evict_s: f64,
    /// Writing the answer, already weighted.
    pub decode_s: f64,
    /// By how much others are expected to wait longer for their first tokens, together, already weighted.
    pub others_s: f64,
}

impl Cost {
    /// The sum of all terms.
    pub fn total_s(&self) -> f64 {
        self.first_token_s() + self.evict_s + self.decode_s + self.others_s
    }

    /// Until the first token is here.
    pub fn first_token_s(&self) -> f64 {
        self.backlog_s + self.slot_s + self.prefill_s + self.rtt_s
    }
}

/// What is to be done for one request on one node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job {
    pub(crate) matched_tokens: u64,
    pub(crate) uncached_tokens: u64,
    /// Of these, those that are not of a prefix which many use: that may as well be on one node more.
    pub(crate) own_tokens: u64,
    /// Tokens that the answer is expected to have.
    pub(crate) answer_tokens: f64,
    /// What a second that it costs others weighs against one of its own.
    pub(crate) others: f64,
}

impl Job {
    /// Of a request of which a node has so many tokens, many use so many, and answers are usually so long.
    pub(crate) fn new(
        query: &RouteQuery<'_>,
        matched_tokens: u32,
        shared_tokens: u32,
        answer_tokens: f64,
    ) -> Self {
        let known = matched_tokens.max(shared_tokens);
        Self {
            own_tokens: u64::from(query.prompt_tokens.saturating_sub(known)),
            matched_tokens: u64::from(matched_tokens),
            uncached_tokens: u64::from(query.prompt_tokens.saturating_sub(matched_tokens)),
            answer_tokens: answer_tokens.min(f64::from(query.max_tokens)),
            others: match query.priority {
                Priority::Low => LOW_OTHERS,
                Priority::Normal => 1.0,
                Priority::High => 1.0 / LOW_OTHERS,
            },
        }
    }
}

/// What is usual, of all nodes together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usual {
    /// Tokens of an answer.
    pub(crate) answer_tokens: f64,
    /// How long decode steps turn out to take, relative to what engines measure before their first pass: what disturbs that
    /// (machines that start together, clocks that are not up yet) disturbs it on all. At most 1: a node that seems too fast
    /// gets a request and learns, one that seems too slow gets none and never would.
    pub(crate) correction: f64,
    /// What blocks in caches are worth, from 0 where prompts find nothing there to 1 where they find enough.
    pub(crate) reuse: f64,
}

/// A node's work as seen now, booked requests included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work<'a> {
    pub(crate) predictor: &'a Predictor,
    pub(crate) load: Option<&'a NodeLoad>,
    /// Since the load was told.
    pub(crate) since: Duration,
    /// Requests at the node or on their way to it.
    pub(crate) requests: u32,
    /// Of these, those that the node did not report yet.
    pub(crate) booked_requests: u32,
    /// Their tokens.
    pub(crate) booked_prefill: u64,
    pub(crate) booked_decode: u64,
    /// Seconds of prefill of requests that wait at the router, are meant for it and come first.
    pub(crate) planned_s: f64,
    /// Requests a second that it gets, and the share of its time that their prompts take.
    pub(crate) arrivals_per_s: f64,
    pub(crate) utilization: f64,
    pub(crate) usual: Usual,
    pub(crate) rtt: Duration,
}

impl Work<'_> {
    pub(crate) fn slots(&self) -> u32 {
        self.load.map_or(SLOTS_UNKNOWN, |load| load.slots)
    }

    /// Requests that wait at the node or are on their way.
    pub(crate) fn waiting(&self) -> u32 {
        self.load.map_or(0, |load| load.waiting).saturating_add(self.booked_requests)
    }

    /// Prompt tokens to be read before a new request's.
    pub(crate) fn prefill_tokens(&self) -> u64 {
        let told = self.load.map_or(0, |load| load.prefill_backlog_tokens.min(TOKENS_MAX));
        told.saturating_add(self.booked_prefill)
    }

    /// Tokens of KV in use by requests, and in total.
    pub(crate) fn kv_tokens(&self) -> (u64, u64) {
        let (held, total) = self.load.map_or((0, 0), |load| load.kv_tokens);
        (held.min(TOKENS_MAX).saturating_add(self.booked_prefill), total)
    }

    /// Seconds until the prompts that are at the node or on their way to it are read.
    pub(crate) fn backlog_s(&self) -> f64 {
        let ahead = Features::new(self.told_backlog_s(), self.booked_prefill, 0, 0, 0.0);
        self.predictor.seconds(&ahead)
    }

    /// What is left of the prefill of the load report: the node has been working since.
    fn told_backlog_s(&self) -> f64 {
        let told_s = self.load.map_or(0.0, |load| f64::from(load.prefill_backlog_s));
        let left_s = told_s - self.since.as_secs_f64();
        if left_s.is_nan() { 0.0 } else { left_s.clamp(0.0, BACKLOG_S_MAX) }
    }

    /// Seconds of a decode step with so many rows.
    pub(crate) fn step_s(&self, rows: u32) -> f64 {
        let Some(load) = self.load else { return self.predictor.step_s(0.05) };
        let correction = if load.passes == 0 { self.usual.correction } else { 1.0 };
        let told = told_step_s(load, rows) * correction;
        self.predictor.step_s(if told.is_finite() { told.max(0.0) } else { 0.0 })
    }

    fn rows(&self) -> u32 {
        self.requests.min(self.slots())
    }

    /// Seconds until a slot is free for one more request: mean work left per row, times turns to wait.
    pub(crate) fn slot_s(&self) -> f64 {
        let slots = self.slots();
        if self.requests < slots {
            return 0.0;
        }
        let told = self.load.map_or(0, |load| load.decode_backlog_tokens.min(TOKENS_MAX));
        let tokens_left = told.saturating_add(self.booked_decode);
        let tokens_left = (tokens_left as f64).min(f64::from(self.requests) * self.usual.answer_tokens);
        // Rows end one after the other, so the first of `slots` ends after a fraction of a row's mean.
        let turns = f64::from(self.requests - slots + 1) / f64::from(slots.max(1));
        tokens_left / f64::from(self.requests.max(1)) * self.step_s(self.rows()) * turns
    }

    /// What the time to the first token is predicted from.
    pub(crate) fn features(&self, job: &Job) -> Features {
        let step_s = if self.requests == 0 { 0.0 } else { self.step_s(self.rows()) };
        let ahead = self.booked_prefill;
        Features::new(self.told_backlog_s(), ahead, job.uncached_tokens, job.matched_tokens, step_s)
    }

    /// Seconds to read again what the request takes from others in the cache, as far as that will be used again.
    fn evict_s(&self, job: &Job, weights: &CostWeights, token_s: f64) -> f64 {
        let Some(load) = self.load else { return 0.0 };
        let used = load.cached_kv_tokens.max(load.kv_tokens.0).min(TOKENS_MAX) + self.booked_prefill;
        let free = load.kv_tokens.1.saturating_sub(used);
        let tokens = job.uncached_tokens as f64 + job.answer_tokens - free as f64;
        if tokens <= 0.0 {
            return 0.0;
        }
        let measured = f64::from(load.cache_reuse_s);
        let reuse_s = if measured > 0.0 { measured } else { weights.reuse_s };
        let age_s = f64::from(load.cache_tail_age_s).max(0.0) + self.since.as_secs_f64();
        self.usual.reuse * tokens * token_s * (-age_s / reuse_s).exp()
    }

    /// The cost, where reading a token that was evicted takes `token_s` on a usual node.
    pub(crate) fn cost(&self, job: &Job, weights: &CostWeights, token_s: f64) -> Cost {
        let features = self.features(job);
        let node_s = self.backlog_s();
        let backlog_s = node_s + self.planned_s;
        let rows = (self.requests + 1).min(self.slots().max(1));
        let prefill_s = self.predictor.seconds(&features) - node_s;
        // Work delays by its own length all who come until the node is idle again: until what is there and this is done,
        // and what comes meanwhile (the busy period of an M/G/1 queue).
        let busy_s = (backlog_s + prefill_s) / (1.0 - self.utilization.min(UTILIZATION_MAX));
        let delayed = self.arrivals_per_s * busy_s;
        let step_s = self.step_s(rows);
        let read_s = weights.work * job.own_tokens as f64 * token_s;
        let slower_s = f64::from(rows - 1) * (self.step_s(rows + 1) - step_s).max(0.0);
        Cost {
            backlog_s,
            slot_s: self.slot_s(),
            prefill_s,
            rtt_s: self.rtt.as_secs_f64(),
            evict_s: job.others * weights.eviction * self.evict_s(job, weights, token_s),
            decode_s: weights.decode * job.answer_tokens * (step_s + slower_s),
            others_s: job.others * (weights.others * delayed * prefill_s + read_s),
        }
    }
}

/// Seconds of a decode step with so many rows, as a node tells.
pub(crate) fn told_step_s(load: &NodeLoad, rows: u32) -> f64 {
    if load.decode_step_s[0] > 0.0 { table_s(load, rows) } else { rates_s(load, rows) }
}

fn rates_s(load: &NodeLoad, rows: u32) -> f64 {
    let rates = &load.rates;
    f64::from(rates.decode_step_s) + f64::from(rates.decode_row_s) * f64::from(rows.saturating_sub(1))
}

/// From the table, in a straight line between its places and beyond the last.
fn table_s(load: &NodeLoad, rows: u32) -> f64 {
    // Its places are the powers of two.
    let above = (rows.max(2) - 1).ilog2() as usize + 1;
    let above = above.min(load.decode_step_s.len() - 1);
    let (low, high) = (f64::from(1u32 << (above - 1)), f64::from(1u32 << above));
    let (low_s, high_s) = (f64::from(load.decode_step_s[above - 1]), f64::from(load.decode_step_s[above]));
    low_s + (high_s - low_s) * (f64::from(rows.max(1)) - low) / (high - low)
}
