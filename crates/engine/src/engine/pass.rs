//! One pass of an [`Engine`]: what goes into it, and what comes of it.

use super::{CALM_STEP_STRETCH, Engine, GENTLE_STRETCH, StepSummary, flight::Flight};
use crate::{
    DrawnToken, ModelError, Overlap, SequenceId, Slice, Speculate, StepOutput,
    cost::StepShape,
    grammar::{MatcherError, TokenMask},
    scheduler::{self, Budgets, Candidate, Part},
    sequence::{Sequence, Submitted},
    settings::TARGET_MAX,
};
use std::{
    thread,
    time::{Duration, Instant},
};
use types::{FinishReason, GenerateError, RequestId, TokenEvent};

/// Masks that one thread computes, at about 0.1 ms each: fewer are not worth another thread.
const MASKS_PER_THREAD: usize = 4;
/// Threads that compute masks while the device computes logits.
const MASK_THREADS_MAX: usize = 4;

impl Engine {
    /// Plans the pass that begins at `at` and submits it, if there is anything to compute.
    pub(super) fn begin(
        &mut self,
        now: Instant,
        at: Instant,
        summary: &mut StepSummary,
    ) -> Result<(), ModelError> {
        let (parts, shape) = self.plan(now, at, summary);
        if parts.is_empty() {
            return Ok(());
        }
        let shape = self.guess(&parts, shape);
        let slices: Vec<_> = parts.iter().map(|part| self.running[part.index].slice(part.tokens)).collect();
        match self.model.submit(&slices) {
            Ok(()) => {}
            Err(ModelError::Sequence { sequence, message }) => {
                parts.iter().for_each(|part| self.running[part.index].unguess());
                return self.fail_one(sequence, message);
            }
            Err(error @ ModelError::Backend(_)) => return Err(error),
        }
        let is_masked = |slice: &&Slice<'_>| slice.sample.is_some_and(|sample| sample.masked);
        let masked = slices.iter().filter(is_masked).map(|slice| (slice.sequence, slice.drafts)).collect();
        let guessed: usize = slices.iter().map(|slice| slice.drafts).sum();
        let expected_s = self.cost.seconds(shape);
        let mut drawn = 0;
        let mut submitted = Vec::with_capacity(parts.len());
        for part in parts {
            let sequence = &mut self.running[part.index];
            if sequence.decodes() {
                summary.rows += 1;
            } else {
                summary.slices += 1;
                summary.prefill_tokens += part.tokens as u32;
            }
            let part = sequence.submit(part.tokens, drawn);
            drawn += part.draws();
            submitted.push(part);
        }
        summary.drafts = guessed as u32;
        summary.expected_s = expected_s;
        // Of a device's passes each begins when the one before ends; of a pipeline's, those that wait behind others do.
        let filling = match self.overlap() {
            Overlap::Lookahead => false,
            overlap if summary.slices > 0 => self.flights.len() + 1 < overlap.flights(),
            overlap => self.flights.len() + 1 < overlap.groups(),
        };
        let flight =
            Flight { parts: submitted, shape, submitted: now, filling, expected_s, masked, accepted: 0 };
        self.flights.push_back(flight);
        Ok(())
    }

    /// What goes into the next pass, each part with its blocks. Where blocks run out, slices are cut, and then the
    /// youngest sequences give theirs up until something can go on: the oldest always can, since no request is taken that
    /// does not fit alone.
    fn plan(&mut self, now: Instant, at: Instant, summary: &mut StepSummary) -> (Vec<Part>, StepShape) {
        loop {
            let rows_short = self.blocks_for_rows() > self.memory.available();
            if rows_short && self.preempt_youngest(summary) {
                continue;
            }
            let (candidates, indexes) = self.candidates(at);
            let plan = self.scheduler.plan(now, &candidates, &self.cost, self.budgets(&candidates));
            let mut parts = Vec::with_capacity(plan.len());
            for &part in &plan {
                let start = candidates[part.index].start;
                let held = &mut self.running[indexes[part.index]].held;
                let tokens = self.memory.grow(held, start + part.tokens) - start;
                if tokens > 0 {
                    parts.push(Part { tokens, ..part });
                }
            }
            if !plan.is_empty() && parts.is_empty() && self.preempt_youngest(summary) {
                continue;
            }
            let shape = scheduler::shape_of(&candidates, &parts);
            parts.iter_mut().for_each(|part| part.index = indexes[part.index]);
            return (parts, shape);
        }
    }

    /// Blocks that rows need for the tokens they append next.
    fn blocks_for_rows(&self) -> usize {
        let needs = |sequence: &&Sequence| {
            self.is_runnable(sequence)
                && sequence.decodes()
                && sequence.submitted() + 1 > sequence.held.room()
        };
        self.running.iter().filter(needs).count()
    }

    fn candidates(&self, at: Instant) -> (Vec<Candidate>, Vec<usize>) {
        let slice_s =
            self.cost.first_slice_seconds() + self.cost.slice_seconds(0, scheduler::SLICE_TOKENS_MIN);
        let slice = Duration::from_secs_f64(slice_s.min(TARGET_MAX.as_secs_f64()));
        let runnable = self.running.iter().enumerate().filter(|(_, sequence)| self.is_runnable(sequence));
        let candidate = |(index, sequence): (usize, &Sequence)| {
            let candidate = Candidate {
                decodes: sequence.decodes(),
                start: sequence.submitted(),
                pending: sequence.pending().min(sequence.slice_tokens_max()),
                // Where a slice takes longer than the target, steps are no longer than they must be.
                slack_s: sequence.slack_s(at, sequence.targets.tpot + slice.min(sequence.targets.tpot)),
                good_time_s: sequence.good_time_s(at, !self.waiting.is_empty()),
                priority: sequence.priority,
            };
            (candidate, index)
        };
        let mut candidates: Vec<(Candidate, usize)> = runnable.map(candidate).collect();
        let groups = self.overlap().groups();
        if groups > 1 {
            // Rows that are in flight are none of these; of the others the most urgent go now.
            let rows = self.running.iter().filter(|sequence| sequence.decodes()).count();
            let mut waiting: Vec<_> = candidates.iter().filter(|(row, _)| row.decodes).copied().collect();
            waiting.sort_by(|(a, _), (b, _)| a.slack_s.total_cmp(&b.slack_s));
            let left: Vec<usize> =
                waiting.iter().skip(rows.div_ceil(groups)).map(|&(_, index)| index).collect();
            candidates.retain(|(_, index)| !left.contains(index));
        }
        candidates.into_iter().unzip()
    }

    fn budgets(&self, candidates: &[Candidate]) -> Budgets {
        // A target below what a pass over all rows and one slice takes cannot be met while prompts wait; keeping to it
        // would only run more passes over the weights, with less in each.
        let mut least = StepShape::default();
        for candidate in candidates.iter().filter(|candidate| candidate.decodes) {
            least.add_row(candidate.start + 1);
        }
        let rows_s = self.cost.seconds(least);
        least.add_slice(0, scheduler::SLICE_TOKENS_MIN);
        let least_s = self.cost.seconds(least);
        let rows = self.running.iter().filter(|row| self.is_runnable(row) && row.decodes());
        let tpot = rows.map(|row| row.targets.tpot).min().unwrap_or(self.settings.tpot_target);
        // A row is in one pass of so many.
        let tpot = tpot / self.overlap().groups() as u32;
        Budgets {
            tpot_s: tpot.as_secs_f64().max(least_s),
            gentle_s: (GENTLE_STRETCH * rows_s).max(least_s),
            calm_s: if self.waiting.is_empty() {
                // Where any slice costs much, at least as much again is for its tokens.
                (CALM_STEP_STRETCH * rows_s).max(least_s + self.cost.first_slice_seconds())
            } else {
                f64::INFINITY
            },
            // A request that arrives just after such a step began can still meet its target.
            prefill_only_s: self.settings.ttft_target.as_secs_f64() / 2.0,
        }
    }

    /// Waits for a pass and takes in what it drew.
    pub(super) fn collect(
        &mut self,
        now: Instant,
        mut flight: Flight,
        events: &mut Vec<(RequestId, TokenEvent)>,
        summary: &mut StepSummary,
    ) -> Result<(), ModelError> {
        let sampling: usize = flight.parts.iter().map(Submitted::draws).sum();
        let scored = flight.parts.iter().filter(|part| part.scores).count();
        let StepOutput { drawn, scores } = self.model.collect()?;
        if (drawn.len(), scores.len()) != (sampling, scored) {
            let (tokens, told) = (drawn.len(), scores.len());
            let message =
                format!("{tokens} tokens of {sampling} rows, and scores of {told} of {scored} slices");
            return Err(ModelError::Backend(message));
        }
        let (mut drawn, mut scores) = (drawn.into_iter(), scores.into_iter());
        for part in &flight.parts {
            let tokens: Vec<DrawnToken> = drawn.by_ref().take(part.draws()).collect();
            let scores = part.scores.then(|| scores.next().expect("counted above"));
            // Whoever was cancelled since is not here any more; whoever was preempted waits.
            let by_id = |sequence: &Sequence| sequence.id == part.id;
            let (index, queue) = match self.running.iter().position(by_id) {
                Some(index) => (index, &mut self.running),
                None => match self.waiting.iter().position(by_id) {
                    Some(index) => (index, &mut self.waiting),
                    None => continue,
                },
            };
            let sequence = &mut queue[index];
            let current = sequence.compute(part);
            if current && let Some(event) = sequence.tell(part, scores.unwrap_or_default()) {
                events.push((sequence.request, event));
            }
            if let Some((why, came_true)) = tokens.first().and_then(|drawn| sequence.judge(drawn.token)) {
                self.speculation.watch(sequence.id, why, came_true);
            }
            let outcome = part.samples.then(|| sequence.draw(part, tokens));
            if current {
                let (held, tokens, computed) = sequence.kv();
                self.memory.store(held, tokens, computed);
            }
            let Some((outcome, guessed)) = outcome else { continue };
            if let Some((why, accepted)) = guessed {
                self.speculation.learn(sequence.id, why, part.drafts, accepted);
                flight.accepted += accepted;
            }
            if let Some(cached_tokens) = outcome.started {
                events.push((sequence.request, TokenEvent::Started { cached_tokens }));
            }
            if let Some((index, tokens, logprobs)) = outcome.tokens {
                summary.tokens += tokens.len() as u32;
                tokens.iter().for_each(|_| self.shares.charge_output(sequence.client));
                events.push((sequence.request, TokenEvent::Tokens { index, tokens, logprobs }));
            }
            if let Some(finish) = outcome.end {
                if self.settings.speculation != Speculate::Off {
                    self.speculation.finish(&sequence.ended_row());
                }
                events.push((sequence.request, TokenEvent::Finished(finish)));
                summary.finished += 1;
                let mut sequence = queue.remove(index);
                if let Some(session) = sequence.session.take() {
                    self.memory.keep(session, &sequence.held, now);
                }
                self.forget(sequence);
            }
        }
        self.passes += 1;
        self.passed = Some(flight);
        Ok(())
    }

    /// Starts drawing the tokens of the pass in flight that wait for masks: what they may be depends on what the pass before
    /// drew, and the device has computed logits meanwhile.
    pub(super) fn draw(&mut self) -> Result<(), ModelError> {
        let newest = self.flights.back_mut();
        let masked = newest.map(|flight| std::mem::take(&mut flight.masked)).unwrap_or_default();
        if masked.is_empty() {
            return Ok(());
        }
        let vocab_size = self.model.card().vocab_size;
        let mut rows: Vec<Option<&mut Sequence>> = masked.iter().map(|_| None).collect();
        for sequence in self.running.iter_mut().chain(&mut self.waiting) {
            if let Some(at) = masked.iter().position(|&(id, _)| id == sequence.id) {
                rows[at] = Some(sequence);
            }
        }
        let mut masks = Vec::with_capacity(masked.len());
        for (&(id, guesses), of_row) in masked.iter().zip(masks_of(rows, vocab_size)) {
            masks.extend(match of_row {
                Ok(Some(masks)) => masks,
                // Whoever has ended since may draw anything.
                Ok(None) => vec![TokenMask::all(vocab_size); guesses + 1],
                Err(error) => {
                    self.stop(id, &error);
                    vec![TokenMask::all(vocab_size); guesses + 1]
                }
            });
        }
        self.model.draw(&masks)
    }

    /// Ends a sequence whose grammar cannot be followed further: its row in flight is of no use.
    fn stop(&mut self, id: SequenceId, error: &MatcherError) {
        let by_id = |sequence: &Sequence| sequence.id == id;
        let sequence = if let Some(index) = self.running.iter().position(by_id) {
            self.running.remove(index)
        } else if let Some(index) = self.waiting.iter().position(by_id) {
            self.waiting.remove(index)
        } else {
            return;
        };
        let invalid =
            GenerateError::Invalid { message: error.to_string(), param: Some("grammar".to_owned()) };
        let finish = sequence.finish(FinishReason::Failed(invalid));
        self.ended.push((sequence.request, TokenEvent::Finished(finish)));
        self.forget(sequence);
    }
}

/// What a row may draw, and behind each of its guesses; none of one that has ended since.
type RowMasks = Result<Option<Vec<TokenMask>>, MatcherError>;

fn masks_of(rows: Vec<Option<&mut Sequence>>, vocab_size: u32) -> Vec<RowMasks> {
    let mask = |row: Option<&mut Sequence>| row.map(|sequence| sequence.masks(vocab_size)).transpose();
    let threads = (rows.len() / MASKS_PER_THREAD).clamp(1, MASK_THREADS_MAX);
    let each = rows.len().div_ceil(threads);
    let mut rows = rows.into_iter();
    let first: Vec<_> = rows.by_ref().take(each).collect();
    let mut rest = Vec::new();
    while rows.len() > 0 {
        rest.push(rows.by_ref().take(each).collect::<Vec<_>>());
    }
    thread::scope(|scope| {
        let begun: Vec<_> = rest
            .into_iter()
            .map(|part| {
                let count = part.len();
                (count, scope.spawn(move || part.into_iter().map(mask).collect::<Vec<_>>()))
            })
            .collect();
        let mut masks: Vec<_> = first.into_iter().map(mask).collect();
        for (count, part) in begun {
            let lost = || MatcherError::Stuck { reason: "its thread panicked".to_owned() };
            masks.extend(part.join().unwrap_or_else(|_| vec![Err(lost()); count]));
        }
        masks
    })
}
