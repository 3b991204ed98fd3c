//! Which node serves a request: a pure state machine of everything one router knows.
//!
//! Nodes are fed in by [`Router::node_up`], [`Router::state`], [`Router::load`], [`Router::rtt`], [`Router::node_down`],
//! and what their caches hold by [`Router::cache_snapshot`] and [`Router::cache_events`]. [`Router::route`] answers a
//! [`RouteQuery`] from that and from what the router itself has sent; [`Router::book`] commits to the answer, and
//! [`Router::accepted`], [`Router::first_token`], [`Router::progress`] and [`Router::finished`] tell how it went, from
//! which it learns how fast nodes are. All knowledge is soft: a wrong view costs time, never correctness.
//! No clock is read, nothing blocks, and the same inputs give the same routes.
#![warn(missing_docs)]

mod booking;
mod breaker;
mod choice;
mod cost;
mod decide;
mod index;
mod learned;
mod node;
pub mod placement;
mod plan;
mod query;
mod queue;
mod router;
mod sessions;
mod settings;
mod speculation;

pub use booking::BookingId;
pub use breaker::{Breaker, Outcome};
pub use cost::Cost;
pub use index::{INDEX_BLOCKS_MAX, NODE_BLOCKS_MAX};
pub use learned::Learned;
pub use node::KnownNode;
pub use plan::{Meant, PASSED_MAX, Plan};
pub use query::{Considered, Excluded, Resync, Route, RouteError, RouteQuery, RouteReason};
pub use queue::{Pass, Queue, QueueFull, QueueId, Waiting};
pub use router::Router;
pub use settings::{CostWeights, NODE_WAITING_MAX, Policy, PolicyError, RivalSettings, RouterSettings};
