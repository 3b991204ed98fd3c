//! A rank behind the head: takes passes as they come, and gives them on.

use super::{
    Joined, PipelineError,
    clock::Clock,
    frame::{Clocked, Frame, Kind},
    link::Link,
    plan::Plan,
    results::Layout,
};
use crate::{
    distributed::{Group, MEMBERS_MAX},
    load::LoadSettings,
    runner::{Entering, Flight, Runner},
    step::Ordered,
};
use engine::{Model, grammar::TokenMask};
use mlx_rs::Array;
use std::{
    ops::Range,
    time::{Duration, Instant},
};

/// Without a frame for so long, a stage prepares for shapes of passes that are sure to come.
const IDLE_AFTER: Duration = Duration::from_millis(100);

/// What a stage tells of itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StageEvent<'a> {
    /// It reads its part of the model.
    Loading {
        /// What.
        what: &'a str,
        /// How far, 0 to 1.
        fraction: f32,
    },
    /// All ranks have loaded.
    Ready,
    /// A pass was begun.
    Pass,
}

/// Loads a range of layers onto the calling thread and computes them for the head, until that says that it is over.
/// `ranges` and `kv_tokens` as [`super::load_head`] has them.
///
/// # Errors
/// [`PipelineError`] names the rank, file or setting that is wrong, or says that a neighbour was lost; the process should
/// end then.
pub fn run_stage(
    settings: &LoadSettings,
    group: Group,
    ranges: &[Range<usize>],
    kv_tokens: Option<u64>,
    on: &mut dyn FnMut(StageEvent<'_>),
) -> Result<(), PipelineError> {
    if group.rank() == 0 {
        let reason = "rank 0 is the head, no stage".to_owned();
        return Err(PipelineError::Place { reason });
    }
    let mut progress = |what: &str, fraction: f32| on(StageEvent::Loading { what, fraction });
    let Joined { link, runner, .. } = Joined::new(settings, group, ranges, kv_tokens, &mut progress)?;
    on(StageEvent::Ready);
    let clock = Clock::new(link.rank());
    let mut stage = Stage { link, runner, clock, undrawn: None };
    loop {
        stage.idle()?;
        let mut frame = stage.link.frame()?;
        if frame.kind == Kind::Plan {
            frame.clocked[stage.link.rank()] = stage.clock.take();
        }
        if !stage.link.is_last() {
            match frame.kind {
                Kind::Stop => stage.link.send_last(&frame)?,
                _ => stage.link.send_frame(&frame)?,
            }
        }
        match frame.kind {
            Kind::Plan => {
                on(StageEvent::Pass);
                stage.pass(&frame)?;
            }
            Kind::Masks => stage.masks(&frame)?,
            Kind::Ping if stage.link.is_last() => {
                stage.link.send(&Array::from_slice(&[frame.pass], &[1]))?;
            }
            Kind::Ping => {}
            Kind::Stop => return Ok(()),
        }
    }
}

struct Stage {
    link: Link,
    runner: Runner,
    clock: Clock,
    /// Of the last stage: a pass that waits for masks.
    undrawn: Option<Undrawn>,
}

#[derive(Debug)]
struct Undrawn {
    layout: Layout,
    flight: Flight,
    /// Rows with masks.
    masked: usize,
    clocked: [Clocked; MEMBERS_MAX],
}

impl Stage {
    /// Waits for a frame, and makes use of a long wait.
    fn idle(&mut self) -> Result<(), PipelineError> {
        while !self.link.wait(Some(IDLE_AFTER))? {
            let more = self.runner.prepare();
            if !more.map_err(|error| PipelineError::Unexpected(error.to_string()))? {
                break;
            }
        }
        Ok(())
    }

    fn pass(&mut self, frame: &Frame) -> Result<(), PipelineError> {
        if let Some(Undrawn { layout, .. }) = &self.undrawn {
            let what = format!("pass {} came before the masks of pass {}", frame.pass, layout.pass);
            return Err(PipelineError::Unexpected(what));
        }
        let plan = Plan::decode(&frame.words)?;
        let slices = plan.slices();
        let blocks = self.runner.limits().blocks;
        let named = slices.iter().flat_map(|slice| slice.blocks).map(|block| block.0 as usize).max();
        if named.is_some_and(|named| named >= blocks) {
            return Err(PipelineError::Unexpected(format!("block {named:?} of {blocks}")));
        }
        let lost = |error| PipelineError::lost("a pass", &error);
        let dims = self.runner.dims();
        let hidden = self.link.recv(&[plan.tokens() as i32, dims.hidden], dims.kv.dtype)?;
        let mut sample = self.clock.begin(frame.pass, &slices);
        let mut arrival = || {
            let since = Instant::now();
            self.link.arrived()?;
            if let Some(sample) = &mut sample {
                sample.waited(since.elapsed());
            }
            Ok(())
        };
        let entering = Entering { hidden: hidden.clone(), arrival: &mut arrival };
        let flight = self.runner.forward(&slices, Some(entering)).map_err(lost)?;
        // What is waited for next must not be what is still being received here.
        hidden.eval().map_err(lost)?;
        self.clock.end(frame.pass, sample, &flight).map_err(lost)?;
        if let Some(hidden) = &flight.hidden {
            return self.link.send(hidden);
        }
        let ordered = Ordered::new(&slices);
        let layout = Layout::new(frame.pass, &ordered, dims.vocabulary, self.link.size());
        if flight.waits_for_masks() {
            let masked = ordered.sampling.iter().filter(|row| row.masked).count();
            self.undrawn = Some(Undrawn { layout, flight, masked, clocked: frame.clocked });
            return Ok(());
        }
        self.link.send(&layout.sent(&flight, &frame.clocked).map_err(lost)?)
    }

    /// Draws what waits for these masks, at the last stage.
    fn masks(&mut self, frame: &Frame) -> Result<(), PipelineError> {
        if !self.link.is_last() {
            return Ok(());
        }
        let Some(Undrawn { layout, mut flight, masked, clocked }) = self.undrawn.take() else {
            return Err(PipelineError::Unexpected("masks came, and no pass waits for them".to_owned()));
        };
        let vocabulary = self.runner.card().vocab_size;
        let width = vocabulary.div_ceil(u32::BITS) as usize;
        if frame.pass != layout.pass || frame.words.len() != masked * width {
            let (words, pass) = (frame.words.len(), frame.pass);
            let what =
                format!("{words} words of masks of pass {pass} for {masked} rows of pass {}", layout.pass);
            return Err(PipelineError::Unexpected(what));
        }
        let mask = |words: &[u32]| TokenMask::from_words(words, vocabulary);
        let masks: Vec<TokenMask> = frame.words.chunks(width).map(mask).collect();
        let lost = |error| PipelineError::lost("drawing a pass's tokens", &error);
        self.runner.draw_apart(&mut flight, &masks).map_err(lost)?;
        self.link.send(&layout.sent(&flight, &clocked).map_err(lost)?)
    }
}
