//! What is told of the endpoint's work: Prometheus' text at `/metrics`, and the figures behind the dashboard.
//!
//! [`Watched`] stands between the handlers and whoever generates, and tells a [`Board`] of every request; the board counts and
//! keeps the last requests, never their texts, tokens or keys. `expose` writes what the board has and what the directory
//! tells of the nodes. Names are vLLM's where it has one, with `mlx_` before them.

mod board;
mod expose;
mod histogram;
mod http;
mod life;
mod process;
mod rate;
mod text;
mod watched;

pub(crate) use board::{Board, Snapshot};
pub(crate) use expose::metrics;
pub(crate) use http::count;
pub(crate) use watched::Watched;
