//! `[TOOL_CALLS]` and an array of objects, or a name, `[ARGS]` and an object for each call.

use super::{Body, CallGrammar, Step, Syntax, named::NamedCall, object::ObjectCalls};

pub(super) const SYNTAX: Syntax = Syntax {
    open: &["[TOOL_CALLS]"],
    around: &["</s>"],
    inner: &["[ARGS]", "[CALL_ID]"],
    bare: false,
    short_ids: true,
    example: "[TOOL_CALLS][{\"name\": NAME, \"arguments\": ARGUMENTS}]",
    body: |_| Body::Mistral(MistralCalls::default()),
};

/// Which of both forms it is shows with the first character.
#[derive(Debug, Default)]
pub(crate) enum MistralCalls {
    #[default]
    Unknown,
    Array(ObjectCalls),
    Named(NamedCall),
}

impl MistralCalls {
    pub(super) fn is_begun(&self) -> bool {
        match self {
            Self::Unknown => false,
            Self::Array(body) => body.is_begun(),
            Self::Named(body) => body.is_begun(),
        }
    }

    pub(super) fn feed(&mut self, char: char, out: &mut crate::text::Parts) -> Step {
        if matches!(self, Self::Unknown) {
            match char {
                _ if char.is_whitespace() => return Step::More,
                '[' | '{' => *self = Self::Array(ObjectCalls::new(None)),
                _ => *self = Self::Named(NamedCall::new(name_of)),
            }
        }
        match self {
            Self::Unknown => Step::Broken,
            Self::Array(body) => body.feed(char, out),
            Self::Named(body) => body.feed(char, out),
        }
    }
}

/// `name[ARGS]`, or `name[CALL_ID]…[ARGS]`.
fn name_of(head: &str) -> Option<&str> {
    head.split('[').next()
}

pub(super) fn grammar(named: bool) -> CallGrammar {
    if named {
        return CallGrammar {
            trigger: "[TOOL_CALLS]",
            before: "",
            call: |lark, tool| {
                lark.text(&tool.name).text("[ARGS]").schema(tool);
            },
            between: "[TOOL_CALLS]",
            after: "",
        };
    }
    CallGrammar {
        trigger: "[TOOL_CALLS]",
        before: "[",
        call: |lark, tool| {
            lark.text("{\"name\": ").json_text(&tool.name).text(", \"arguments\": ").schema(tool).text("}");
        },
        between: ", ",
        after: "]",
    }
}
