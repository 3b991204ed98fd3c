//! One handler for each route, and what they share: the body, and how answers are streamed.
//!
//! Data flows one way: body → request (`openai`) → [`crate::job`] → outputs (`text`) → an answer, whole or written event by
//! event by a [`stream::Format`].

pub(crate) mod admin;
pub(crate) mod body;
pub(crate) mod chat;
mod chat_format;
pub(crate) mod completions;
mod completions_format;
pub(crate) mod embeddings;
pub(crate) mod models;
pub(crate) mod route;
pub(crate) mod sessions;
pub(crate) mod status;
pub(crate) mod stream;
pub(crate) mod tokenize;
