//! The engine: requests in, token events out, one forward pass per [`Engine::step`].
//!
//! Pure: `now` is an argument, tensors are behind [`Model`], and nothing here waits but for the model. [`Engine`] owns the
//! sequences (`sequence.rs`). `admission.rs` says which of them run, by what each client has had (`shares.rs`);
//! `scheduler.rs` says which go into a pass, by how long passes take (`cost.rs`); `memory.rs` has the KV: blocks
//! (`block_pool.rs`), those worth keeping (`prefix_cache.rs`) and for whom (`sessions.rs`). [`grammar`] says what a text may
//! go on with, `speculation` what it is likely to.
#![warn(missing_docs)]

mod admission;
mod block_pool;
mod cost;
mod embedder;
mod engine;
pub mod grammar;
mod load;
mod memory;
mod model;
mod prefix_cache;
mod scheduler;
mod sequence;
mod sessions;
mod settings;
mod shares;
mod speculation;
mod stages;

pub use embedder::Embedder;
pub use engine::Engine;
pub use engine::StepSummary;
pub use model::{
    BlockId, DrawnToken, Input, Model, ModelError, ModelLimits, Overlap, RowSampling, Scoring, SequenceId,
    Slice, StepOutput,
};
pub use settings::EngineSettings;
pub use speculation::{Draft, DraftRow, DraftSource, Speculate};
pub use stages::StageTimes;
