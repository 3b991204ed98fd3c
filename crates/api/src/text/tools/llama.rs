//! `{"name": …, "parameters": …}` as the whole answer, perhaps after `<|python_tag|>`; several are separated by `;`.
//!
//! An object that names no tool of the request is content: a bare object may also be an answer.

use super::{Body, CallGrammar, Syntax, object::ObjectCalls};

pub(super) const SYNTAX: Syntax = Syntax {
    open: &["<|python_tag|>"],
    around: &["<|eom_id|>", "<|eot_id|>"],
    inner: &[],
    bare: true,
    short_ids: false,
    example: "{\"name\": NAME, \"parameters\": ARGUMENTS}",
    body: |context| {
        let known = context.open.is_empty().then(|| context.tools.clone());
        Body::Object(ObjectCalls::new(known))
    },
};

pub(super) fn grammar() -> CallGrammar {
    CallGrammar {
        trigger: "{",
        before: "",
        call: |lark, tool| {
            lark.text("\"name\": ").json_text(&tool.name).text(", \"parameters\": ").schema(tool).text("}");
        },
        between: "; {",
        after: "",
    }
}
