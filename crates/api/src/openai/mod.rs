//! OpenAI's JSON, as types: what clients send ([`request`]) and what they get back ([`response`]).
//!
//! Nothing here knows tokens or nodes. Requests are parsed in one pass with bounded memory: unknown fields are skipped
//! without being kept; fields that are known but not supported yet are kept as a [`given::Given`] and refused by name.

pub(crate) mod given;
pub(crate) mod logprobs;
pub(crate) mod parameters;
pub(crate) mod request;
pub(crate) mod response;
mod schemas;
pub(crate) mod shape;
pub(crate) mod tools;
pub(crate) mod values;
