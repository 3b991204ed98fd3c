//! From tokens to text: detokenizing, stop strings, and the stream of texts that both kinds of answers are made of.

mod detokenizer;
mod output;
mod stop;

pub(crate) use detokenizer::Detokenizer;
pub(crate) use output::{EndReason, Ending, Output, TextEvent, TextUsage};
pub(crate) use stop::StopMatcher;
