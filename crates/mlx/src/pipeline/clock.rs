//! [`Clock`]: how long passes of rows take in a rank while it serves, from samples.
//!
//! A rank hands a pass to its device and goes on, so it does not see when that is done. Every few passes it waits for its
//! device before and after one of them, as it does where it measures itself at the start (`times`): what it took is the time
//! from its plan to what leaves, without that in which what enters was waited for.

use super::frame::Clocked;
use crate::runner::Flight;
use engine::Slice;
use mlx_rs::{Array, error::Result, transforms::eval};
use std::time::{Duration, Instant};

/// One pass in so many is measured: its device is idle while the host plans it. No multiple of the numbers of passes that
/// are commonly in flight, so that each of them has its turn.
const EVERY: u32 = 7;

#[derive(Debug)]
pub(super) struct Clock {
    rank: u32,
    /// The pass that is to be measured, for which the device was waited for.
    next: Option<u32>,
    sample: Clocked,
}

/// A pass that is being measured.
#[derive(Debug)]
pub(super) struct Sample {
    rows: u32,
    since: Instant,
    waited: Duration,
}

impl Sample {
    /// What enters was waited for.
    pub(super) fn waited(&mut self, time: Duration) {
        self.waited += time;
    }
}

impl Clock {
    pub(super) fn new(rank: usize) -> Self {
        Self { rank: rank as u32, next: None, sample: Clocked::default() }
    }

    /// The pass begins; it is measured where it is one of rows alone, and its turn.
    pub(super) fn begin(&mut self, pass: u32, slices: &[Slice<'_>]) -> Option<Sample> {
        let is_next = self.next.take() == Some(pass);
        let is_row = |slice: &Slice<'_>| {
            slice.input.count() == 1 && slice.sample.is_some_and(|row| !row.masked) && slice.score.is_none()
        };
        (is_next && slices.iter().all(is_row)).then(|| Sample {
            rows: slices.len() as u32,
            since: Instant::now(),
            waited: Duration::ZERO,
        })
    }

    /// The pass is on the device: waits for it where it is measured, or where the next one is to be.
    pub(super) fn end(&mut self, pass: u32, sample: Option<Sample>, flight: &Flight) -> Result<()> {
        let next = pass.wrapping_add(1);
        let is_due = next.wrapping_add(self.rank).is_multiple_of(EVERY);
        if sample.is_none() && !is_due {
            return Ok(());
        }
        let left: Vec<&Array> = flight.hidden.iter().chain(&flight.tokens).chain(&flight.written).collect();
        // What waits for masks is not over; nothing is measured after it.
        if left.is_empty() {
            return Ok(());
        }
        eval(left)?;
        if let Some(Sample { rows, since, waited }) = sample {
            let seconds = since.elapsed().saturating_sub(waited).as_secs_f32();
            self.sample = Clocked { rows, seconds };
        }
        self.next = is_due.then_some(next);
        Ok(())
    }

    /// What was measured since this was asked for.
    pub(super) fn take(&mut self) -> Clocked {
        std::mem::take(&mut self.sample)
    }
}
