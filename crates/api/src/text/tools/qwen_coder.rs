//! `<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call>`.
//!
//! Values are bare text: what is JSON of them, the tool's schema says.

use super::{
    Body, CALL_HELD_BYTES_MAX, CallGrammar, Context, Lark, Step, Syntax, grammar::literal, json::escape,
};
use crate::{
    job::Tool,
    text::{Hold, Parts},
};
use serde_json::Value;
use std::sync::Arc;

const FUNCTION: &str = "<function=";

pub(super) const SYNTAX: Syntax = Syntax {
    open: &["<tool_call>", FUNCTION],
    around: &["</tool_call>"],
    inner: &[],
    bare: false,
    short_ids: false,
    example: "<tool_call>\n<function=NAME>\n<parameter=ARGUMENT>\nVALUE\n</parameter>\n</function>\n</tool_call>",
    body: |context| Body::Xml(XmlCall::new(context)),
};

/// Bytes of a name in a tag.
const NAME_BYTES_MAX: usize = 256;

/// Reads one call.
#[derive(Debug)]
pub(crate) struct XmlCall {
    tools: Arc<[Tool]>,
    /// Once it is known.
    name: Option<String>,
    parameters: usize,
    at: At,
    hold: Hold,
}

#[derive(Debug)]
enum At {
    /// Before a tag.
    Tag,
    FunctionName(String),
    Key(String),
    /// Before the line break that begins a value.
    Value(Kind),
    Text(Kind),
}

/// What a value is.
#[derive(Debug)]
enum Kind {
    String,
    /// JSON, if it can be read as such.
    Json(String),
}

impl XmlCall {
    pub(super) fn new(context: &Context<'_>) -> Self {
        let at = if context.open == FUNCTION { At::FunctionName(String::new()) } else { At::Tag };
        Self { tools: context.tools.clone(), name: None, parameters: 0, at, hold: Hold::default() }
    }

    pub(super) fn is_begun(&self) -> bool {
        self.name.is_some()
    }

    pub(super) fn feed(&mut self, char: char, out: &mut Parts) -> Step {
        match &mut self.at {
            At::Tag => {
                let mut stray = false;
                let found = match self.name {
                    None => self.hold.feed(char, &[&[FUNCTION]], |char| stray |= !char.is_whitespace()),
                    Some(_) => self.hold.feed(char, &[&["<parameter=", "</function>"]], |char| {
                        stray |= !char.is_whitespace();
                    }),
                };
                match found {
                    _ if stray => Step::Broken,
                    Some(FUNCTION) => self.go(At::FunctionName(String::new())),
                    Some("</function>") => {
                        out.arguments(if self.parameters == 0 { "{}" } else { "}" });
                        out.call_end();
                        self.name = None;
                        Step::Done
                    }
                    Some(_) => self.go(At::Key(String::new())),
                    None => Step::More,
                }
            }
            At::FunctionName(name) if char == '>' => {
                let name = name.trim().to_owned();
                if name.is_empty() {
                    return Step::Broken;
                }
                out.call(&name);
                self.name = Some(name);
                self.go(At::Tag)
            }
            At::Key(key) if char == '>' => {
                let key = key.trim().to_owned();
                let kind = self.kind(&key);
                out.arguments(if self.parameters == 0 { "{" } else { ", " });
                out.arguments(&format!("{}: ", Value::from(key)));
                if matches!(kind, Kind::String) {
                    out.arguments("\"");
                }
                self.parameters += 1;
                self.go(At::Value(kind))
            }
            At::FunctionName(name) | At::Key(name) => {
                name.push(char);
                if name.len() > NAME_BYTES_MAX || char == '<' { Step::Broken } else { Step::More }
            }
            At::Value(kind) => {
                let kind = std::mem::replace(kind, Kind::String);
                self.at = At::Text(kind);
                if char == '\n' { Step::More } else { self.feed(char, out) }
            }
            At::Text(kind) => {
                let ends: &[&str] = &["\n</parameter>", "</parameter>"];
                let ended = self.hold.feed(char, &[ends], |char| kind.push(char, out));
                match ended {
                    None => Step::More,
                    Some(_) => {
                        kind.end(out);
                        self.go(At::Tag)
                    }
                }
            }
        }
    }

    fn go(&mut self, at: At) -> Step {
        self.at = at;
        Step::More
    }

    /// What the schema says of a parameter; text, where it says nothing.
    fn kind(&self, key: &str) -> Kind {
        let tool = self.tools.iter().find(|tool| Some(&tool.name) == self.name.as_ref());
        let property = tool.and_then(|tool| tool.parameters.as_ref()?.get("properties")?.get(key));
        match property.and_then(|property| property.get("type")) {
            Some(Value::String(kind)) if kind == "string" => Kind::String,
            None if property.is_none_or(|property| !property.is_object()) => Kind::String,
            _ => Kind::Json(String::new()),
        }
    }
}

impl Kind {
    fn push(&mut self, char: char, out: &mut Parts) {
        match self {
            Self::Json(text) if text.len() < CALL_HELD_BYTES_MAX => text.push(char),
            Self::Json(text) => {
                // Too long to wait for its end: a text.
                out.arguments(&format!("\"{}{}", escape(text), escape(char.encode_utf8(&mut [0; 4]))));
                *self = Self::String;
            }
            Self::String => out.arguments(&escape(char.encode_utf8(&mut [0; 4]))),
        }
    }

    fn end(&mut self, out: &mut Parts) {
        let Self::Json(text) = self else { return out.arguments("\"") };
        let value = match text.trim() {
            "True" => Value::from(true),
            "False" => Value::from(false),
            "None" => Value::Null,
            trimmed => serde_json::from_str(trimmed).unwrap_or_else(|_| Value::from(text.as_str())),
        };
        out.arguments(&value.to_string());
    }
}

pub(super) fn grammar() -> CallGrammar {
    CallGrammar {
        trigger: "<tool_call>",
        before: "",
        call: |lark, tool| {
            lark.text(&format!("\n<function={}>\n", tool.name));
            let schema = if lark.is_exact() { tool.schema() } else { Value::Null };
            match schema.get("properties").and_then(Value::as_object) {
                Some(properties) => {
                    let required = schema.get("required").and_then(Value::as_array);
                    for (key, property) in properties {
                        let needed = required.is_some_and(|all| all.iter().any(|name| name == key));
                        parameter(lark, key, property, &schema, needed);
                    }
                }
                None => {
                    lark.rule(VALUE_RULE, VALUE_TERMS).terms(r"(/<parameter=[^>\n]{1,128}>\n/ mlx_value)*");
                }
            }
            lark.text("</function>\n</tool_call>");
        },
        between: "\n<tool_call>",
        after: "",
    }
}

/// Any text up to a value's end.
const VALUE_RULE: &str = "mlx_value[lazy]";
const VALUE_TERMS: &str = r"/(?s:.*)\n<\/parameter>\n/";

/// One parameter.
fn parameter(lark: &mut Lark<'_>, key: &str, property: &Value, schema: &Value, needed: bool) {
    lark.terms("(").text(&format!("<parameter={key}>\n"));
    let texts = property.get("enum").and_then(Value::as_array);
    let texts = texts.and_then(|all| all.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
    let is_text = property.get("type").is_none_or(|kind| kind == "string");
    match texts {
        Some(texts) => {
            let texts: Vec<String> = texts.into_iter().map(literal).collect();
            lark.terms(&format!("({})", texts.join(" | "))).text("\n</parameter>\n");
        }
        None if is_text => {
            lark.rule(VALUE_RULE, VALUE_TERMS).terms("mlx_value");
        }
        None => {
            let mut property = property.clone();
            if let (Some(property), Some(definitions)) = (property.as_object_mut(), schema.get("$defs")) {
                property.insert("$defs".to_owned(), definitions.clone());
            }
            lark.json(&property).text("\n</parameter>\n");
        }
    }
    lark.terms(if needed { ")" } else { ")?" });
}
