//! The parts of an answer, and the parser that finds them: reasoning first, then content and calls.

use super::{HarmonyParser, ReasoningParser, tools::ToolParser};

/// A part of an answer, or a piece of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    Reasoning(String),
    Content(String),
    /// A call of this tool begins.
    Call(String),
    /// A piece of the arguments, as JSON text.
    Arguments(String),
    CallEnd,
}

/// Parts in order; neighbours of a kind are one.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Parts(pub(crate) Vec<Part>);

impl Parts {
    pub(crate) fn reasoning(&mut self, text: &str) {
        match self.0.last_mut() {
            Some(Part::Reasoning(last)) => last.push_str(text),
            _ if text.is_empty() => {}
            _ => self.0.push(Part::Reasoning(text.to_owned())),
        }
    }

    pub(crate) fn content(&mut self, text: &str) {
        match self.0.last_mut() {
            Some(Part::Content(last)) => last.push_str(text),
            _ if text.is_empty() => {}
            _ => self.0.push(Part::Content(text.to_owned())),
        }
    }

    pub(crate) fn call(&mut self, name: &str) {
        self.0.push(Part::Call(name.to_owned()));
    }

    pub(crate) fn arguments(&mut self, text: &str) {
        match self.0.last_mut() {
            Some(Part::Arguments(last)) => last.push_str(text),
            _ if text.is_empty() => {}
            _ => self.0.push(Part::Arguments(text.to_owned())),
        }
    }

    pub(crate) fn call_end(&mut self) {
        self.0.push(Part::CallEnd);
    }
}

/// Finds the parts of a text. Without parsers it is all content.
#[derive(Debug, Default)]
pub(crate) struct AnswerParser {
    /// Finds everything, where the model writes messages with headers; the others are none then.
    pub(crate) harmony: Option<HarmonyParser>,
    pub(crate) reasoning: Option<ReasoningParser>,
    pub(crate) tools: Option<ToolParser>,
}

impl AnswerParser {
    pub(crate) fn push(&mut self, text: &str, out: &mut Parts) {
        if let Some(harmony) = &mut self.harmony {
            return harmony.push(text, out);
        }
        match &mut self.reasoning {
            Some(reasoning) => {
                let rest = reasoning.push(text, out);
                Self::after_reasoning(&mut self.tools, &rest, out);
            }
            None => Self::after_reasoning(&mut self.tools, text, out),
        }
    }

    /// Gives out what is held back: nothing follows.
    pub(crate) fn finish(&mut self, out: &mut Parts) {
        if let Some(harmony) = &mut self.harmony {
            harmony.finish(out);
        }
        if let Some(reasoning) = &mut self.reasoning {
            let rest = reasoning.finish(out);
            Self::after_reasoning(&mut self.tools, &rest, out);
        }
        if let Some(tools) = &mut self.tools {
            tools.finish(out);
        }
    }

    /// Whether the text so far ends in the middle of reasoning.
    pub(crate) fn is_reasoning(&self) -> bool {
        self.harmony.as_ref().is_some_and(HarmonyParser::is_reasoning)
            || self.reasoning.as_ref().is_some_and(ReasoningParser::is_inside)
    }

    fn after_reasoning(tools: &mut Option<ToolParser>, text: &str, out: &mut Parts) {
        match tools {
            Some(tools) => tools.push(text, out),
            None => out.content(text),
        }
    }
}
