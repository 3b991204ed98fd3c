//! Which node serves a request: a pure state machine of everything one router knows.
//!
//! Nodes are fed in by [`Router::node_up`], [`Router::state`], [`Router::load`], [`Router::rtt`] and
//! [`Router::node_down`]. [`Router::route`] answers a [`RouteQuery`] from that and from the router's own record of what
//! it sent where; [`Router::book`] commits to the answer, and [`Router::accepted`], [`Router::first_token`] and
//! [`Router::finished`] tell how it went. All knowledge is soft: a wrong view costs time, never correctness.
//! No clock is read, nothing blocks, and the same inputs give the same routes.
#![warn(missing_docs)]

mod affinity;
mod booking;
mod cost;
mod router;

pub use booking::BookingId;
pub use cost::Cost;
pub use router::{KnownNode, NODE_WAITING_MAX, Route, RouteError, RouteQuery, RouteReason, Router};
