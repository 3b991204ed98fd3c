//! One `mlx-node` process: its actors, its engine child, and the way of a request through both.
//!
//! [`start`] makes the parts that the roles ask for and gives a [`NodeHandle`], which is the router to its process
//! ([`types::Generate`], [`types::Directory`], [`types::Sessions`]). The actors:
//!
//! - the node actor (`node_actor.rs`) hosts the engine supervisor, or the pipeline actor, and reports state and load;
//! - the engine supervisor (`engine_actor.rs`) starts the engine child (`engine_child.rs`) again and again;
//! - the pipeline actor (`pipeline/actor.rs`) hosts a round of measurements or an epoch of ranks, where this node is the head;
//! - the discovery actor (`discovery_actor.rs`) hosts one uplink (`uplink.rs`) per router that was found;
//! - the router actor (`router_actor.rs`) hosts one peer (`peer.rs`) per node that connected.
//!
//! Actors own lives: connections, processes, tasks. Requests do not pass through mailboxes, which have no bound: they
//! are admitted by tables with one (`engine_handle.rs`, `dispatch.rs`), and their tokens flow from the child's pipe or
//! the peer's stream straight to the consumer (`sink.rs`, `generate.rs`).
//! [`engine_process`] is the other side of the pipe: what runs inside the child.

mod assets;
mod cache_mirror;
mod connected;
mod course;
mod discovery_actor;
mod dispatch;
mod embedding;
mod engine_actor;
mod engine_child;
mod engine_handle;
pub mod engine_process;
mod engine_start;
mod generate;
mod handle;
mod health;
mod node_actor;
mod peer;
pub mod pipeline;
mod reports;
mod router_actor;
mod settings;
mod sink;
mod target;
mod uplink;

pub use dispatch::DispatchSettings;
pub use engine_start::{EngineCommandLine, EngineLife, StartEngine, StartedEngine};
pub use handle::{NodeHandle, start, start_on};
pub use settings::{ENGINE_SILENCE_MAX, MODEL_LOAD_TIME_MAX, NodeSettings, StartError};
