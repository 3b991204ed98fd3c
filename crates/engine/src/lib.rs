//! The engine: requests in, token events out, one forward pass per [`Engine::step`].
//!
//! Pure: `now` is an argument, tensors are behind [`Model`], and nothing here blocks. [`Engine`] owns the sequences
//! (`sequence.rs`) and asks the scheduler (`scheduler.rs`) which of them go into a step; the scheduler asks the step-time
//! model (`cost.rs`) how much fits.
#![warn(missing_docs)]

mod cost;
mod engine;
mod model;
mod scheduler;
mod sequence;

pub use engine::{Engine, EngineSettings, StepSummary};
pub use model::{Model, ModelError, ModelLimits, RowSampling, SequenceId, Slice};
