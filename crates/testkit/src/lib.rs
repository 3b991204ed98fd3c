//! What tests need and programs must not have: a model without weights and oracles over token events.
//!
//! [`FakeModel`] stands where MLX would; it moves a [`VirtualClock`] instead of computing, holds the engine to the contract
//! of [`engine::Model`], and its text can be had without any engine, from [`FakeSettings::output`]. [`Streams`] checks what
//! comes out. [`UdpRelay`] is a longer way between nodes.
#![warn(missing_docs)]

mod clock;
mod embedder;
mod model;
mod oracles;
mod relay;

pub use clock::VirtualClock;
pub use embedder::FakeEmbedder;
pub use model::{FakeHandle, FakeModel, FakeSettings, Fault, Output, StepCost, StepRecord};
pub use oracles::{StreamFault, Streams, check_stream};
pub use relay::{Relayed, UdpRelay};
