//! Measurements: what an engine does step by step, as data for `docs/performance.md`.
//!
//! [`engine_steps`] drives an [`engine::Model`] directly, so its figures hold neither scheduling nor network;
//! [`engine_under_load`] drives an [`engine::Engine`].

mod engine_bench;
mod load_bench;

pub use engine_bench::{EngineBenchSettings, EngineFigures, engine_steps};
pub use load_bench::{ChurnFigures, LoadBenchError, LoadBenchSettings, LoadFigures, engine_under_load};
