//! [`Head`]: the first rank, as an engine's model.

use super::{
    Joined, PipelineError,
    clock::Clock,
    frame::{Frame, Kind},
    link::Link,
    plan::{self, PLAN_WORDS_MAX},
    results::Layout,
};
use crate::{runner::Runner, step::Ordered};
use engine::{
    Input, Model, ModelError, ModelLimits, Overlap, Slice, StageTimes, StepOutput, grammar::TokenMask,
};
use std::{collections::VecDeque, time::Instant};
use types::{ModelAssets, ModelCard};

/// Times around that are measured; the shortest counts.
const PINGS: u32 = 8;

/// The first rank of a pipeline, which stands for all of them.
#[derive(Debug)]
pub struct Head {
    link: Link,
    runner: Runner,
    limits: ModelLimits,
    times: StageTimes,
    clock: Clock,
    /// Of the passes in flight, the oldest first.
    awaited: VecDeque<Awaited>,
    /// Number of the next pass.
    pass: u32,
    /// After an error nobody hears the other ranks any more.
    broken: bool,
}

/// A pass in flight.
#[derive(Debug)]
struct Awaited {
    layout: Layout,
    /// Rows whose masks were not sent yet.
    masked: usize,
}

impl Head {
    pub(super) fn new(joined: Joined) -> Result<(Self, ModelAssets), PipelineError> {
        let Joined { link, runner, assets, ready, layers } = joined;
        let own = runner.part().layers().len() as u64;
        let limits = runner.limits();
        let limits =
            ModelLimits { kv_bytes_per_token: limits.kv_bytes_per_token / own * layers as u64, ..limits };
        let stages = ready.into_iter().map(|ready| ready.times).collect();
        let times = StageTimes { stages, links_s: around(&link)? };
        tracing::info!(
            ranks = link.size(),
            around_ms = times.links_s * 1e3,
            row_ms = ?times.stages.iter().map(|stage| stage.first().map_or(0.0, |of| of.1 * 1e3)).collect::<Vec<_>>(),
            groups_of_16 = times.groups(16),
            "pipeline ready"
        );
        let awaited = VecDeque::new();
        let clock = Clock::new(link.rank());
        Ok((Self { link, runner, limits, times, clock, awaited, pass: 0, broken: false }, assets))
    }

    /// How long stages and links take: measured at the start, and followed since.
    pub fn times(&self) -> &StageTimes {
        &self.times
    }

    fn begin(&mut self, slices: &[Slice<'_>]) -> Result<(), PipelineError> {
        if slices.iter().any(|slice| matches!(slice.input, Input::Drawn(_))) {
            let what = "a pipeline's pass was to take in what another one draws".to_owned();
            return Err(PipelineError::Unexpected(what));
        }
        let words = plan::encode(slices);
        if words.len() > PLAN_WORDS_MAX {
            let what = format!("a plan of {} words; at most {PLAN_WORDS_MAX}", words.len());
            return Err(PipelineError::Unexpected(what));
        }
        let pass = self.pass;
        self.pass = pass.wrapping_add(1);
        let mut frame = Frame::new(Kind::Plan, pass, words);
        frame.clocked[self.link.rank()] = self.clock.take();
        let sample = self.clock.begin(pass, slices);
        self.link.send_frame(&frame)?;
        let lost = |error| PipelineError::lost("a pass", &error);
        let flight = self.runner.forward(slices, None).map_err(lost)?;
        self.clock.end(pass, sample, &flight).map_err(lost)?;
        let Some(hidden) = flight.hidden else {
            return Err(PipelineError::Unexpected("nothing leaves the first rank".to_owned()));
        };
        self.link.send(&hidden)?;
        let ordered = Ordered::new(slices);
        let layout = Layout::new(pass, &ordered, self.runner.dims().vocabulary, self.link.size());
        let masked = ordered.sampling.iter().filter(|row| row.masked).count();
        self.awaited.push_back(Awaited { layout, masked });
        Ok(())
    }

    fn send_masks(&mut self, masks: &[TokenMask]) -> Result<(), PipelineError> {
        let waiting = self.awaited.back_mut().map_or(0, |awaited| std::mem::take(&mut awaited.masked));
        if waiting != masks.len() || waiting == 0 {
            return Err(PipelineError::Unexpected(format!("{} masks for {waiting} rows", masks.len())));
        }
        let words = masks.iter().flat_map(|mask| mask.words().iter().copied()).collect();
        let pass = self.pass.wrapping_sub(1);
        self.link.send_frame(&Frame::new(Kind::Masks, pass, words))
    }

    fn end(&mut self) -> Result<StepOutput, PipelineError> {
        let Some(Awaited { layout, masked }) = self.awaited.pop_front() else {
            return Err(PipelineError::Unexpected("no step is in flight".to_owned()));
        };
        if masked > 0 {
            let what = "a step is collected before it was drawn".to_owned();
            return Err(PipelineError::Unexpected(what));
        }
        let words = self.link.words(layout.words())?;
        if words.first() != Some(&layout.pass) {
            let what = format!("the result of pass {:?} instead of {}", words.first(), layout.pass);
            return Err(PipelineError::Unexpected(what));
        }
        for (rank, clocked) in layout.clocked(&words).into_iter().enumerate() {
            // Of 0 rows where there is nothing new.
            self.times.observe(rank, clocked.rows, clocked.seconds.into());
        }
        let lost = |error| PipelineError::lost("reading a result", &error);
        layout.received(&words).and_then(|flight| flight.read()).map_err(lost)
    }

    /// Nothing is known of the other ranks after an error: whoever started them ends them.
    fn failed<T>(&mut self, result: Result<T, PipelineError>) -> Result<T, ModelError> {
        result.map_err(|error| {
            self.broken = true;
            ModelError::Backend(error.to_string())
        })
    }
}

/// Seconds of a frame once around.
fn around(link: &Link) -> Result<f64, PipelineError> {
    let mut least = f64::INFINITY;
    for pass in 0..PINGS {
        let begin = Instant::now();
        link.send_frame(&Frame::new(Kind::Ping, pass, Vec::new()))?;
        let answer = link.words(1)?;
        if answer != [pass] {
            return Err(PipelineError::Unexpected(format!("{answer:?} was the answer to ping {pass}")));
        }
        least = least.min(begin.elapsed().as_secs_f64());
    }
    Ok(least)
}

impl Model for Head {
    fn card(&self) -> &ModelCard {
        self.runner.card()
    }

    fn limits(&self) -> ModelLimits {
        self.limits
    }

    fn overlap(&self, rows: usize) -> Overlap {
        let groups = self.times.groups(u32::try_from(rows).unwrap_or(u32::MAX)) as usize;
        // One more than there are stages: while a result is on its way, none of them waits.
        Overlap::Stages { flights: groups.max(self.link.size() + 1), groups }
    }

    fn submit(&mut self, slices: &[Slice<'_>]) -> Result<(), ModelError> {
        let begun = self.begin(slices);
        self.failed(begun)
    }

    fn draw(&mut self, masks: &[TokenMask]) -> Result<(), ModelError> {
        let sent = self.send_masks(masks);
        self.failed(sent)
    }

    fn collect(&mut self) -> Result<StepOutput, ModelError> {
        let ended = self.end();
        self.failed(ended)
    }

    fn prepare(&mut self) -> Result<bool, ModelError> {
        self.runner.prepare()
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        if !self.broken {
            let frame = Frame::new(Kind::Stop, self.pass, Vec::new());
            if let Err(error) = self.link.send_last(&frame) {
                tracing::warn!(%error, "the other ranks were not told that it is over");
            }
        }
    }
}
