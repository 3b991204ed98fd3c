//! Pipelines: nodes that together hold one model and look like one node.
//!
//! [`Group`] is a member's view of its pipeline as a pure state machine. What members ask of each other is in
//! `transport` (`Peer::measure`, `stage`, `tunnel`, `probe`).

mod group;
mod settings;

pub use group::{Action, Event, Group, PipelineMembers, Seen, Stand, Unplanned};
pub use settings::{PipelineSettings, RankCommand};
