//! One handler for each route, and what they share: the body, the model, the start of generations.
//!
//! Data flows one way: body → request (`openai`) → tokens (`prompt`) → [`start::start`] → outputs (`text`) → an answer
//! written by a [`answer::Format`].

pub(crate) mod answer;
pub(crate) mod body;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod models;
pub(crate) mod route;
pub(crate) mod sessions;
pub(crate) mod start;
pub(crate) mod status;
pub(crate) mod tokenize;
