//! Measurements: what an engine does step by step, as data for `docs/performance.md`.
//!
//! [`engine_steps`] drives an [`engine::Model`] directly, so its figures hold neither scheduling nor network;
//! [`engine_under_load`] and [`speculation_bench()`] drive an [`engine::Engine`]; [`router_bench()`] a [`router::Router`] over simulated nodes.

mod engine_bench;
mod load_bench;
mod router_bench;
mod speculation_bench;

pub use engine_bench::{EngineBenchSettings, EngineFigures, engine_steps};
pub use load_bench::{ChurnFigures, LoadBenchError, LoadBenchSettings, LoadFigures, engine_under_load};
pub use router_bench::{Figures, RouterBenchSettings, RouterReport, Source, TraceError, chart, router_bench};
pub use speculation_bench::{
    SpeculationBenchSettings, SpeculationFigures, SpeculationMeasurement, speculation_bench,
};
