//! Passes of an [`Engine`] in flight: how many there may be, and when one is waited for.

use super::{Engine, StepSummary};
use crate::{
    ModelError, Overlap, SequenceId,
    cost::StepShape,
    sequence::{Sequence, Submitted},
    settings::TARGET_MAX,
};
use std::time::{Duration, Instant};
use types::{RequestId, TokenEvent};

/// A pass that the model computes.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) parts: Vec<Submitted>,
    pub(super) shape: StepShape,
    pub(super) submitted: Instant,
    /// Whether fewer passes than fill a pipeline were in flight with it: how long it took then says how long its way is,
    /// and not how soon the next one follows.
    pub(super) filling: bool,
    pub(super) expected_s: f64,
    /// Whose tokens wait for masks to be drawn, in the order of their rows, and how many are guessed behind each.
    pub(super) masked: Vec<(SequenceId, usize)>,
    /// Guesses in it that came true.
    pub(super) accepted: usize,
}

impl Flight {
    /// Whether tokens were guessed ahead in it.
    pub(super) fn has_guesses(&self) -> bool {
        self.parts.iter().any(|part| part.drafts > 0)
    }
}

impl Engine {
    /// One pass beside the one in flight, whose tokens it takes in.
    pub(super) fn step_ahead(
        &mut self,
        now: Instant,
        events: &mut Vec<(RequestId, TokenEvent)>,
        summary: &mut StepSummary,
    ) -> Result<(), ModelError> {
        let mut before = self.flights.pop_front();
        // What is planned now begins when the pass in flight ends.
        let at = before.as_ref().map_or(now, |flight| self.end_of(flight).max(now));
        if let Some(mut flight) = before.take_if(|flight| self.is_awaited(flight)) {
            flight.shape.wait();
            self.collect(now, flight, events, summary)?;
        }
        self.admit(now, summary);
        self.begin(now, at, summary)?;
        if let Some(flight) = before {
            self.collect(now, flight, events, summary)?;
        }
        self.draw()
    }

    /// One more pass while stages are free; where they are not, or nobody can go on, waits for the oldest.
    pub(super) fn step_staged(
        &mut self,
        now: Instant,
        most: usize,
        events: &mut Vec<(RequestId, TokenEvent)>,
        summary: &mut StepSummary,
    ) -> Result<(), ModelError> {
        let before = self.flights.len();
        if before < most {
            self.begin(now, now, summary)?;
            self.draw()?;
        }
        let begun = self.flights.len() > before;
        if begun && self.flights.len() < most {
            return Ok(());
        }
        match self.flights.pop_front() {
            Some(flight) => self.collect(now, flight, events, summary),
            None => Ok(()),
        }
    }

    /// How passes follow one another now.
    pub(super) fn overlap(&self) -> Overlap {
        self.model.overlap(self.running.iter().filter(|sequence| sequence.decodes()).count())
    }

    /// Whether a pass that is planned now can do something for it: a pipeline's passes do not know what those before draw.
    pub(super) fn is_runnable(&self, sequence: &Sequence) -> bool {
        sequence.is_runnable() && (!self.is_staged() || !sequence.is_ahead())
    }

    pub(super) fn is_staged(&self) -> bool {
        matches!(self.model.overlap(0), Overlap::Stages { .. })
    }

    /// Seconds from a row's token to its next one, with so many rows.
    pub(super) fn decode_seconds(&self, rows: usize) -> f64 {
        let groups = self.model.overlap(rows).groups();
        groups as f64 * self.cost.decode_seconds(rows.div_ceil(groups))
    }

    /// What a pass that took so many seconds says of passes, and of guesses.
    pub(super) fn learn(&mut self, flight: &Flight, seconds: f64) {
        let shape = flight.shape;
        if shape.guesses() && shape.has_rows() {
            let plain_s = self.cost.seconds(shape.plain());
            // What a slice takes is known less well than what guesses gain.
            let took_s = if shape.has_slices() { self.cost.seconds(shape) } else { seconds };
            let saved_s =
                flight.accepted as f64 / shape.rows() as f64 * self.cost.seconds(shape.rows_alone());
            self.speculation.spend((took_s - saved_s) / plain_s - 1.0);
        } else if shape.has_rows() {
            self.speculation.earn();
        }
        self.cost.observe(shape, seconds);
    }

    pub(super) fn begin_of(&self, flight: &Flight) -> Instant {
        self.last_end.map_or(flight.submitted, |end| end.max(flight.submitted))
    }

    pub(super) fn end_of(&self, flight: &Flight) -> Instant {
        let expected = Duration::from_secs_f64(flight.expected_s.min(TARGET_MAX.as_secs_f64()));
        self.begin_of(flight) + expected
    }
}
