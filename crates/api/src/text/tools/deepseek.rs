//! `<｜tool▁calls▁begin｜>`, then for each call `<｜tool▁call▁begin｜>`, a head and an object.
//!
//! V3 and R1 write `function<｜tool▁sep｜>name` and the object in a fence; V3.1 writes `name<｜tool▁sep｜>` and the object.

use super::{Body, CallGrammar, Syntax, named::NamedCall};

pub(super) const CALL_BEGIN: &str = "<｜tool▁call▁begin｜>";
const SEPARATOR: &str = "<｜tool▁sep｜>";
const FENCE: &str = "```";

pub(super) const SYNTAX: Syntax = Syntax {
    open: &["<｜tool▁calls▁begin｜>", CALL_BEGIN],
    around: &["<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", FENCE],
    inner: &[SEPARATOR],
    bare: false,
    short_ids: false,
    example: "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    body: |_| Body::Named(NamedCall::new(name_of)),
};

fn name_of(head: &str) -> Option<&str> {
    let head = head.trim_start();
    let head = head.strip_prefix(CALL_BEGIN).unwrap_or(head);
    let (before, after) = head.split_once(SEPARATOR)?;
    let after = after.split(FENCE).next().unwrap_or_default().trim();
    Some(if after.is_empty() { before } else { after })
}

pub(super) fn grammar(fenced: bool) -> CallGrammar {
    CallGrammar {
        trigger: "<｜tool▁calls▁begin｜>",
        before: CALL_BEGIN,
        call: if fenced {
            |lark, tool| {
                lark.text("function").text(SEPARATOR).text(&tool.name).text("\n```json\n").schema(tool);
                lark.text("\n```").text("<｜tool▁call▁end｜>");
            }
        } else {
            |lark, tool| {
                lark.text(&tool.name).text(SEPARATOR).schema(tool).text("<｜tool▁call▁end｜>");
            }
        },
        between: if fenced { "\n<｜tool▁call▁begin｜>" } else { CALL_BEGIN },
        after: "<｜tool▁calls▁end｜>",
    }
}
