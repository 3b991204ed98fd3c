//! Measurements: what an engine does step by step, as data for `docs/performance.md`.
//!
//! [`engine_steps`] drives an [`engine::Model`] directly, so its figures hold neither scheduling nor network.

mod engine_bench;

pub use engine_bench::{EngineBenchSettings, EngineFigures, engine_steps};
