//! What goes into the next step: FairBatching in seconds (arXiv 2510.14392), pure and without any tensor or queue.
//!
//! Each token has a deadline; slack is the time left until it. A step may take `T = max(least slack of a decode row,
//! TPOT target)` and is filled with 1. decode rows that cannot wait for another step, 2. slices of prompts, by deadline,
//! as many tokens as the time left allows, 3. the other decode rows. While rows decode, slack is bounded by the TPOT target
//! plus one smallest slice (see `Sequence::slack_s`), which bounds the pause that any reader sees.
//!
//! The paper fills a step up to `T` whenever there is something to read. Here a step stays below a multiple of what its
//! rows alone take as long as all prompts are in good time so: who reads an answer then hardly notices others' prompts.

use crate::cost::{CostModel, StepShape};
use std::{cmp::Reverse, time::Instant};
use types::Priority;

/// Smallest part of a prompt, and what larger ones are a multiple of, in tokens: half a block. On a CPU a step over eight
/// rows and so many tokens behind 4,000 others takes three times what the rows alone take already (`docs/performance.md`).
pub(crate) const SLICE_TOKENS_MIN: usize = 16;
/// Part of a prompt that is read where steps over the rows alone take longer than they should: one block.
const OVERDUE_SLICE_TOKENS: usize = 2 * SLICE_TOKENS_MIN;
/// Factor between the lengths of steps that are tried, from the gentlest to the longest.
const GENTLE_STEP: f64 = 1.4;
/// Most prompt tokens in a step: bounds the memory of activations, and gains nothing further on any device.
pub(crate) const STEP_PREFILL_TOKENS_MAX: usize = 2048;

const _: () = assert!(STEP_PREFILL_TOKENS_MAX.is_multiple_of(SLICE_TOKENS_MIN));

/// A running sequence as the scheduler sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    /// Whether it needs just its next token; else it has a prompt to read.
    pub(crate) decodes: bool,
    /// Tokens in its KV once the steps in flight have run.
    pub(crate) start: usize,
    /// Tokens that follow, known or being drawn; at least one.
    pub(crate) pending: usize,
    /// Seconds until its next token is due.
    pub(crate) slack_s: f64,
    /// Of a prompt: seconds within which it is read in good time.
    pub(crate) good_time_s: f64,
    /// Prompts of a higher one are read first.
    pub(crate) priority: Priority,
}

/// The time a step may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budgets {
    /// While rows decode, at least this long: the TPOT target in seconds.
    pub(crate) tpot_s: f64,
    /// While none does, in seconds.
    pub(crate) prefill_only_s: f64,
    /// While rows decode, in seconds: as little more than this as keeps all prompts in good time, all rows in every step.
    pub(crate) gentle_s: f64,
    /// While rows decode, at most this long, in seconds.
    pub(crate) calm_s: f64,
}

/// A candidate's share of the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// Index of the candidate.
    pub(crate) index: usize,
    /// How many of its pending tokens.
    pub(crate) tokens: usize,
}

/// What a step with these parts has to do.
pub(crate) fn shape_of(candidates: &[Candidate], parts: &[Part]) -> StepShape {
    let mut shape = StepShape::default();
    for part in parts {
        let Candidate { decodes, start, .. } = candidates[part.index];
        if decodes {
            shape.add_row(start + 1);
        } else {
            shape.add_slice(start, part.tokens);
        }
    }
    shape
}

/// The scheduler; all it remembers is since when prompts got nothing.
#[derive(Debug, Default)]
pub(crate) struct Scheduler {
    blocked_since: Option<Instant>,
}

impl Scheduler {
    /// Fills the next step: decode rows in the candidates' order, then slices of prompts, the most urgent first.
    pub(crate) fn plan(
        &mut self,
        now: Instant,
        candidates: &[Candidate],
        cost: &CostModel,
        budgets: Budgets,
    ) -> Vec<Part> {
        let by_slack = |decodes: bool| {
            let mut indexes: Vec<usize> =
                (0..candidates.len()).filter(|&index| candidates[index].decodes == decodes).collect();
            indexes.sort_by(|&a, &b| candidates[a].slack_s.total_cmp(&candidates[b].slack_s));
            indexes
        };
        let (rows, mut prompts) = (by_slack(true), by_slack(false));
        prompts.sort_by_key(|&index| Reverse(candidates[index].priority));
        let most_s = match rows.first() {
            Some(&least) => candidates[least].slack_s.max(budgets.tpot_s),
            None => budgets.prefill_only_s,
        };
        let longest_s = if rows.is_empty() { most_s } else { most_s.min(budgets.calm_s) };
        let mut budget_s = longest_s;
        if !rows.is_empty() && !prompts.is_empty() && budgets.gentle_s > 0.0 {
            budget_s = budgets.gentle_s.min(longest_s);
            while budget_s < longest_s && !in_time(&rows, &prompts, candidates, cost, budget_s) {
                budget_s = (budget_s * GENTLE_STEP).min(longest_s);
            }
        }
        let gentle = budget_s < most_s;
        // A row that is not in this step is in one that ends, at the latest, at its deadline.
        let is_urgent = |&&index: &&usize| gentle || candidates[index].slack_s < budget_s + budgets.tpot_s;
        let urgent = rows.iter().take_while(is_urgent).count();
        let (urgent, others) = rows.split_at(urgent);

        let mut shape = StepShape::default();
        let mut decoding = Vec::with_capacity(rows.len());
        for &index in urgent {
            shape.add_row(candidates[index].start + 1);
            decoding.push(index);
        }
        let mut slices = fill(&prompts, candidates, cost, budget_s, &mut shape);
        // Others yield only to slices that fit; without one there is nothing to yield to.
        let others_yield = !slices.is_empty();
        if !slices.is_empty() || prompts.is_empty() {
            self.blocked_since = None;
        } else if let Some(slice) = self.overdue(now, prompts[0], candidates, cost, rows.is_empty()) {
            shape.add_slice(candidates[slice.index].start, slice.tokens);
            slices.push(slice);
        }
        for &index in others {
            let mut with_row = shape;
            with_row.add_row(candidates[index].start + 1);
            if others_yield && cost.seconds(with_row) > budget_s {
                break;
            }
            shape = with_row;
            decoding.push(index);
        }
        decoding.sort_unstable();
        let decoding = decoding.into_iter().map(|index| Part { index, tokens: 1 });
        decoding.chain(slices).collect()
    }

    /// A small slice of the most urgent prompt, once decode rows have had as much time to themselves as it takes.
    ///
    /// Where the rows alone take longer than their targets, prompts thus still get half of the time.
    fn overdue(
        &mut self,
        now: Instant,
        index: usize,
        candidates: &[Candidate],
        cost: &CostModel,
        alone: bool,
    ) -> Option<Part> {
        let tokens = candidates[index].pending.min(OVERDUE_SLICE_TOKENS);
        let since = *self.blocked_since.get_or_insert(now);
        let waited_s = now.saturating_duration_since(since).as_secs_f64();
        let slice_s = cost.first_slice_seconds() + cost.slice_seconds(candidates[index].start, tokens);
        let due = alone || (since < now && waited_s >= slice_s);
        due.then(|| {
            self.blocked_since = None;
            Part { index, tokens }
        })
    }
}

/// Whether all prompts are read in good time by steps of `step_s` seconds with all rows in each.
fn in_time(
    rows: &[usize],
    prompts: &[usize],
    candidates: &[Candidate],
    cost: &CostModel,
    step_s: f64,
) -> bool {
    let mut shape = StepShape::default();
    rows.iter().for_each(|&index| shape.add_row(candidates[index].start + 1));
    let room_s = step_s - cost.seconds(shape) - cost.first_slice_seconds();
    // Each prompt takes its own part of that, more the longer it is already.
    let mut needed_s = 0.0;
    prompts.iter().all(|&index| {
        let Candidate { start, pending, good_time_s, .. } = candidates[index];
        needed_s += cost.slice_seconds(start, pending) / room_s * step_s;
        room_s > 0.0 && needed_s <= good_time_s
    })
}

/// Slices of prompts, the most urgent first, that fit into what `shape` leaves of the budget.
fn fill(
    prompts: &[usize],
    candidates: &[Candidate],
    cost: &CostModel,
    budget_s: f64,
    shape: &mut StepShape,
) -> Vec<Part> {
    let mut slices = Vec::new();
    let mut tokens_left = STEP_PREFILL_TOKENS_MAX.min(cost.trusted_tokens().max(SLICE_TOKENS_MIN));
    for &index in prompts {
        let Candidate { start, pending, .. } = candidates[index];
        let first_s = if slices.is_empty() { cost.first_slice_seconds() } else { 0.0 };
        let fitting = cost.slice_tokens(budget_s - cost.seconds(*shape) - first_s, start).min(tokens_left);
        let tokens = if pending <= fitting { pending } else { fitting - fitting % SLICE_TOKENS_MIN };
        if tokens == 0 {
            // No smaller prompt overtakes: it could do so for ever.
            break;
        }
        shape.add_slice(start, tokens);
        tokens_left -= tokens;
        slices.push(Part { index, tokens });
    }
    slices
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use types::NodeRates;

    /// 20 ms a step and 1 ms a row or prompt token.
    const RATES: NodeRates =
        NodeRates { prefill_tokens_per_s: 1000.0, decode_step_s: 0.021, decode_row_s: 0.001 };
    const BUDGETS: Budgets =
        Budgets { tpot_s: 0.1, prefill_only_s: 0.5, gentle_s: 0.0, calm_s: f64::INFINITY };

    fn row(slack_s: f64) -> Candidate {
        let priority = Priority::Normal;
        Candidate { decodes: true, start: 100, pending: 1, slack_s, good_time_s: 0.0, priority }
    }

    fn prompt(pending: usize, slack_s: f64) -> Candidate {
        let (good_time_s, priority) = (slack_s / 2.0, Priority::Normal);
        Candidate { decodes: false, start: 0, pending, slack_s, good_time_s, priority }
    }

    fn parts(plan: &[Part]) -> Vec<(usize, usize)> {
        plan.iter().map(|part| (part.index, part.tokens)).collect()
    }

    #[test]
    fn steps_are_filled_by_urgency_and_time() {
        let cost = CostModel::new(&RATES, &[], &RATES);
        let check = |what: &str, candidates: &[Candidate], expected: &[(usize, usize)]| {
            let plan = Scheduler::default().plan(Instant::now(), candidates, &cost, BUDGETS);
            assert_eq!(parts(&plan), expected, "{what}");
        };
        check("nothing", &[], &[]);
        check("rows", &[row(0.1), row(-3.0), row(9.0)], &[(0, 1), (1, 1), (2, 1)]);
        check("a short prompt", &[prompt(10, 1.0)], &[(0, 10)]);
        check("a long prompt alone takes the long budget", &[prompt(5000, 1.0)], &[(0, 480)]);
        check(
            "a late row leaves the rest of its target",
            &[row(-1.0), prompt(5000, 1.0)],
            &[(0, 1), (1, 64)],
        );
        check("an early row leaves its slack", &[row(0.3), prompt(5000, 1.0)], &[(0, 1), (1, 272)]);
        check("by deadline", &[prompt(300, 2.0), prompt(100, 1.0)], &[(1, 100), (0, 300)]);
        let urgent = Candidate { priority: Priority::High, ..prompt(300, 9.0) };
        check("by priority", &[prompt(100, 1.0), urgent], &[(1, 300), (0, 100)]);
        check(
            "several at once, and what is left of the time for the last",
            &[prompt(300, 2.0), prompt(100, 1.0), prompt(300, 3.0)],
            &[(1, 100), (0, 300), (2, 80)],
        );
        let mut full = vec![row(-1.0); 68];
        let rows: Vec<_> = (0..68).map(|index| (index, 1)).collect();
        full.extend([prompt(70, 1.0), prompt(5, 2.0)]);
        check("no small prompt overtakes one that does not fit", &full, &rows);
        check(
            "a row with time to spare yields to a prompt",
            &[row(0.0), row(0.3), prompt(5000, 1.0)],
            &[(0, 1), (1, 1), (2, 64)],
        );
        let mut fast = CostModel::new(&NodeRates { prefill_tokens_per_s: 1e6, ..RATES }, &[], &RATES);
        for expected in [512, 1024, STEP_PREFILL_TOKENS_MAX] {
            let plan = Scheduler::default().plan(Instant::now(), &[prompt(50_000, 1.0)], &fast, BUDGETS);
            assert_eq!(
                parts(&plan),
                [(0, expected)],
                "a fast machine is trusted step by step, up to its memory"
            );
            let shape = shape_of(&[prompt(50_000, 1.0)], &plan);
            fast.observe(shape, fast.seconds(shape));
        }
        let slow = CostModel::new(&NodeRates { prefill_tokens_per_s: 10.0, ..RATES }, &[], &RATES);
        let plan = Scheduler::default().plan(Instant::now(), &[prompt(500, 1.0)], &slow, BUDGETS);
        assert_eq!(parts(&plan), [(0, OVERDUE_SLICE_TOKENS)], "a slow one still gets on");
    }

    #[test]
    fn steps_stay_short_where_all_prompts_are_in_good_time() {
        let cost = CostModel::new(&RATES, &[], &RATES);
        // Two rows alone take 22 ms.
        let budgets = Budgets { gentle_s: 0.06, ..BUDGETS };
        let check = |what: &str, candidates: &[Candidate], expected: &[(usize, usize)]| {
            let plan = Scheduler::default().plan(Instant::now(), candidates, &cost, budgets);
            assert_eq!(parts(&plan), expected, "{what}");
        };
        let rows = [row(0.3), row(0.3)];
        let with = |prompts: &[Candidate]| [&rows[..], prompts].concat();
        // 32 tokens a step of 60 ms: 600 tokens take 0.95 s, with what the rows take; 0.8 s in steps of 84 ms.
        check("time enough", &with(&[prompt(600, 2.6)]), &[(0, 1), (1, 1), (2, 32)]);
        check("a little less", &with(&[prompt(600, 1.7)]), &[(0, 1), (1, 1), (2, 48)]);
        check("less", &with(&[prompt(600, 1.5)]), &[(0, 1), (1, 1), (2, 80)]);
        check("too little", &with(&[prompt(600, 1.0)]), &[(0, 1), (1, 1), (2, 272)]);
        check(
            "too little for the second",
            &with(&[prompt(600, 3.0), prompt(600, 2.6)]),
            &[(0, 1), (1, 1), (3, 80)],
        );
        check("late already", &with(&[prompt(10, -0.1)]), &[(0, 1), (1, 1), (2, 10)]);
        check("rows with much time are in every step", &[row(9.0), prompt(600, 4.0)], &[(0, 1), (1, 32)]);
    }

    #[test]
    fn a_full_slice_lets_rows_with_time_wait() {
        // 79.5 ms are left: 64 tokens, then 15 rows of the 20 that could wait.
        let cost = CostModel::new(&RATES, &[], &RATES);
        let mut candidates = vec![row(0.0), prompt(5000, 1.0)];
        candidates.extend([row(0.4); 20]);
        let budgets = Budgets { tpot_s: 0.1005, ..BUDGETS };
        let plan = Scheduler::default().plan(Instant::now(), &candidates, &cost, budgets);
        assert_eq!(plan.iter().filter(|part| part.index > 1).count(), 15, "{plan:?}");
        assert!(plan.contains(&Part { index: 1, tokens: 64 }));
    }

    #[test]
    fn prompts_get_half_of_the_time_where_rows_need_all_of_it() {
        let cost = CostModel::new(&RATES, &[], &RATES);
        let mut scheduler = Scheduler::default();
        let mut candidates = vec![row(-1.0); 100];
        candidates.push(prompt(100_000, -1.0));
        let mut now = Instant::now();
        let (mut slices, mut seconds) = (0, 0.0);
        for _ in 0..100 {
            let plan = scheduler.plan(now, &candidates, &cost, BUDGETS);
            assert!(plan.len() >= 100, "every row is late and in every step");
            slices += plan.len() - 100;
            seconds += cost.seconds(shape_of(&candidates, &plan));
            now += Duration::from_secs_f64(cost.seconds(shape_of(&candidates, &plan)));
        }
        // 0.12 s of rows are longer than a slice: every second step holds one.
        assert_eq!(slices, 50);
        assert!((seconds - (100.0 * 0.12 + 50.0 * 0.032)).abs() < 0.01, "{seconds}");
    }
}
