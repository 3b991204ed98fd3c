//! `<|tool_call|>` and an array of objects.

use super::{Body, CallGrammar, Syntax, object::ObjectCalls};

pub(super) const SYNTAX: Syntax = Syntax {
    open: &["<|tool_call|>", "functools"],
    around: &["<|/tool_call|>"],
    inner: &[],
    bare: false,
    short_ids: false,
    example: "<|tool_call|>[{\"name\": NAME, \"arguments\": ARGUMENTS}]<|/tool_call|>",
    body: |_| Body::Object(ObjectCalls::new(None)),
};

pub(super) fn grammar() -> CallGrammar {
    CallGrammar {
        trigger: "<|tool_call|>",
        before: "[",
        call: |lark, tool| {
            lark.text("{\"name\": ").json_text(&tool.name).text(", \"arguments\": ").schema(tool).text("}");
        },
        between: ", ",
        after: "]<|/tool_call|>",
    }
}
