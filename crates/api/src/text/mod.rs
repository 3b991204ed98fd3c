//! From tokens to an answer: detokenizing, stop strings, and what of the text is reasoning, content or a tool's call.
//!
//! [`Output`] is one answer: token events in, [`AnswerEvent`]s out. Everything it is made of takes a text in pieces and gives
//! the same wherever the text was cut.

mod detokenizer;
mod event;
mod harmony;
mod hold;
mod output;
mod parts;
mod reasoning;
mod stop;
pub(crate) mod tools;

pub(crate) use detokenizer::{Detokenizer, Shown};
pub(crate) use event::{AnswerEvent, EndReason, Ending, TextUsage, TokenInfo};
pub(crate) use harmony::HarmonyParser;
pub(crate) use hold::Hold;
pub(crate) use output::{AnswerFormat, Output, OutputSettings, short_id};
pub(crate) use parts::{AnswerParser, Part, Parts};
pub(crate) use reasoning::{ReasoningFormat, ReasoningParser, Start};
pub(crate) use stop::StopMatcher;
