//! Ollama's API, for programs that know no other: its names for what [`crate::handlers`] does.

pub(crate) mod models;
