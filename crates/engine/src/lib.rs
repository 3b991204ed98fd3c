//! The engine: requests in, token events out, one forward pass per [`Engine::step`].
//!
//! Pure: `now` is an argument, tensors are behind [`Model`], and nothing here blocks.
#![warn(missing_docs)]

mod model;

pub use model::{Model, ModelError, ModelLimits, RowSampling, SequenceId, Slice};
