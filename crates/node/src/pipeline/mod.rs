//! Pipelines: nodes that together hold one model and look like one node.
//!
//! [`Group`] is a member's view of its pipeline as a pure state machine; `actor.rs` carries out what it says, with
//! rounds and epochs of `head.rs`; `host.rs` is what a member does for the others. Ranks are processes (`child.rs`,
//! the head's by `engine_child.rs`) whose ring (`ring.rs`) runs through tunnels between the nodes, or, where
//! the configuration says that a network is to be trusted, straight from one to the next. What members ask of each
//! other is in `transport` (`Peer::measure`, `stage`, `tunnel`, `probe`).

mod actor;
mod child;
mod group;
mod head;
mod host;
mod ring;
mod settings;

pub(crate) use actor::PipelineActor;
pub use group::{Action, Event, Group, PipelineMembers, Seen, Stand, Unplanned};
pub(crate) use head::EngineTimes;
pub(crate) use host::PipelineHost;
pub use settings::{Links, PipelineSettings, RankCommand, RdmaLink};
