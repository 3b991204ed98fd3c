//! From messages and texts to tokens: chat template, tokenizer, a cache of both by assets hash, and of what was read before.
//!
//! [`TextCache`] owns the loaded [`ModelText`]s; a handler borrows one for as long as its request lives.

mod byte_level;
mod cache;
mod clock;
mod json;
mod pieces;
mod python;
mod segments;
mod template;
mod tokenizer;
mod words;

pub(crate) use byte_level::ByteLevel;
pub(crate) use cache::TextCache;
pub(crate) use clock::{strftime, unix_seconds};
pub(crate) use template::{
    ArgumentsAs, ChatTemplate, TemplateCall, TemplateError, TemplateInput, TemplateMessage, ToolsAs,
};
pub(crate) use tokenizer::ModelText;
