//! `<tool_call>\n{"name": …, "arguments": …}\n</tool_call>`, one block for each call.

use super::{Body, CallGrammar, Syntax, object::ObjectCalls};

pub(super) const SYNTAX: Syntax = Syntax {
    open: &["<tool_call>"],
    around: &["</tool_call>"],
    inner: &[],
    bare: false,
    short_ids: false,
    example: "<tool_call>\n{\"name\": NAME, \"arguments\": ARGUMENTS}\n</tool_call>",
    body: |_| Body::Object(ObjectCalls::new(None)),
};

pub(super) fn grammar() -> CallGrammar {
    CallGrammar {
        trigger: "<tool_call>",
        before: "",
        call: |lark, tool| {
            lark.text("\n{\"name\": ")
                .json_text(&tool.name)
                .text(", \"arguments\": ")
                .schema(tool)
                .text("}\n");
            lark.text("</tool_call>");
        },
        between: "\n<tool_call>",
        after: "",
    }
}
