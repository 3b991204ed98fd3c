//! What an engine tells routers of its load.

use crate::{cost::CostModel, memory::Memory, sequence::Sequence};
use std::time::{Duration, Instant};
use types::{BLOCK_TOKENS, DraftCount, DraftOrigin, NodeLoad};

/// Rows of [`NodeLoad::decode_step_s`].
const TABLE_ROWS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 128];

/// What an engine's load is made of.
pub(crate) struct LoadView<'a> {
    pub(crate) now: Instant,
    pub(crate) waiting: &'a [Sequence],
    pub(crate) running: &'a [Sequence],
    pub(crate) memory: &'a Memory,
    pub(crate) cost: &'a CostModel,
    /// Seconds from a row's token to its next one, by rows.
    pub(crate) decode_s: &'a dyn Fn(usize) -> f64,
    pub(crate) slots: usize,
    pub(crate) ttft_target: Duration,
    /// Passes collected.
    pub(crate) passes: u64,
    /// Expected of the passes in flight.
    pub(crate) step_s: f64,
    /// Tokens guessed ahead so far.
    pub(crate) drafts: [DraftCount; DraftOrigin::ALL.len()],
}

/// An age to within a fifth: what grows every moment would else be news every moment.
fn told_s(age_s: f64) -> f32 {
    if age_s < 1.0 { 0.0 } else { ((age_s.log2() * 4.0).floor() / 4.0).exp2() as f32 }
}

impl LoadView<'_> {
    pub(crate) fn load(&self) -> NodeLoad {
        let running: Vec<(usize, usize)> =
            self.running.iter().map(|sequence| (sequence.submitted(), sequence.prefill_left())).collect();
        // Of those that wait, what a cache has is not to be read.
        let waiting: Vec<(usize, usize)> =
            self.waiting.iter().map(|sequence| self.unread(sequence)).collect();
        let all = || running.iter().chain(&waiting);
        let prefill_s: f64 = all().map(|&(start, left)| self.cost.slice_seconds(start, left)).sum();
        let sequences = || self.running.iter().chain(self.waiting);
        let (held, total) = (self.memory.in_use() as u64, self.memory.total() as u64);
        let tokens = BLOCK_TOKENS as u64;
        let (tail_age_s, reuse_s) = self.memory.ages_s(self.now);
        NodeLoad {
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            slots: self.slots as u32,
            prefill_backlog_tokens: all().map(|&(_, left)| left as u64).sum(),
            decode_backlog_tokens: sequences().map(|sequence| u64::from(sequence.output_left())).sum(),
            kv_tokens: (held * tokens, total * tokens),
            cached_kv_tokens: self.memory.cached() as u64 * tokens,
            prefill_backlog_s: prefill_s as f32,
            prefill_budget_tokens: self.prefill_budget(prefill_s),
            cache_tail_age_s: told_s(tail_age_s),
            cache_reuse_s: told_s(reuse_s),
            passes: self.passes,
            step_s: self.step_s as f32,
            drafts: self.drafts,
            decode_step_s: TABLE_ROWS.map(|rows| (self.decode_s)(rows) as f32),
            rates: self.cost.rates(),
        }
    }

    /// Where the reading of a waiting sequence would begin, and how many tokens there are from there on.
    fn unread(&self, sequence: &Sequence) -> (usize, usize) {
        let tokens = sequence.tokens().len();
        let cached = self.memory.matched(sequence.held.reusable(tokens)).0 * BLOCK_TOKENS;
        (cached, tokens - cached)
    }

    /// FairBatching's prefill admission budget (arXiv 2510.14392): prompt tokens that can still be promised within a TTFT
    /// target, after the tokens that rows must draw by then and the prompts that are here already.
    ///
    /// The paper names the budget without its formula; this is ours: row `i` with slack `s_i` must draw
    /// `max(0, (H - s_i) / tpot_i)` tokens within the target `H`; the most of any row is the number of steps forced.
    fn prefill_budget(&self, prefill_s: f64) -> u64 {
        let target_s = self.ttft_target.as_secs_f64();
        let rows: Vec<_> = self.running.iter().filter(|sequence| sequence.decodes()).collect();
        let forced = rows.iter().map(|sequence| {
            let tpot_s = sequence.targets.tpot.as_secs_f64().max(1e-3);
            let left = sequence.slack_s(self.now, Duration::from_secs_f64(tpot_s));
            let steps = ((target_s - left) / tpot_s).ceil().clamp(0.0, target_s / tpot_s + 1.0);
            steps.min(f64::from(sequence.output_left()))
        });
        let decode_s = forced.fold(0.0, f64::max) * (self.decode_s)(rows.len());
        let left_s = (target_s - decode_s - prefill_s).max(0.0);
        self.cost.slice_tokens(left_s, 0) as u64
    }
}
