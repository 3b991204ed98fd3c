//! The endpoint as a client sees it, over a scripted cluster.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod access;
mod choices;
mod disconnect;
mod embeddings;
mod errors;
mod hostile;
mod latency;
mod limits;
mod messages;
mod metrics;
mod ollama;
mod reasoning;
mod responses;
mod route;
mod sessions;
mod streams;
mod structured;
mod support;
mod tls;
mod tokenize;
mod tools;
