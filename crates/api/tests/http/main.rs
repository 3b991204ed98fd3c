//! The endpoint as a client sees it, over a scripted cluster.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod disconnect;
mod errors;
mod latency;
mod limits;
mod ollama;
mod route;
mod sessions;
mod streams;
mod support;
mod tokenize;
