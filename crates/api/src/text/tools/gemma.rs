//! `call:name{key:value,…}` between two markers; texts stand between marks of their own, keys are bare.

use super::{
    Body, CallGrammar, Lark, Step, Syntax,
    grammar::{ANY_TEXT, pattern},
    json::escape,
};
use crate::{
    job::Tool,
    text::{Hold, Parts},
};
use serde_json::Value;

/// The markers of one kind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marks {
    open: &'static str,
    close: &'static str,
    quote: &'static str,
}

pub(super) const FUNCTION_MARKS: Marks =
    Marks { open: "<start_function_call>", close: "<end_function_call>", quote: "<escape>" };
pub(super) const MARKS: Marks = Marks { open: "<|tool_call>", close: "<tool_call|>", quote: "<|\"|>" };

pub(super) const FUNCTION_SYNTAX: Syntax = Syntax {
    open: &[FUNCTION_MARKS.open],
    around: &[FUNCTION_MARKS.close, FUNCTION_MARKS.quote, "<start_function_response>"],
    inner: &[],
    bare: false,
    short_ids: false,
    example: "<start_function_call>call:NAME{ARGUMENT:VALUE}<end_function_call>",
    body: |_| Body::Gemma(GemmaCall::new(FUNCTION_MARKS)),
};

pub(super) const SYNTAX: Syntax = Syntax {
    open: &[MARKS.open],
    around: &[MARKS.close, MARKS.quote, "<|tool_response>"],
    inner: &[],
    bare: false,
    short_ids: false,
    example: "<|tool_call>call:NAME{ARGUMENT:VALUE}<tool_call|>",
    body: |_| Body::Gemma(GemmaCall::new(MARKS)),
};

/// Bytes of a name, a key or a bare value.
const WORD_BYTES_MAX: usize = 256;

/// Reads one call.
#[derive(Debug)]
pub(crate) struct GemmaCall {
    quote: &'static str,
    /// Opening brackets, of which the first one is the arguments'.
    open: Vec<char>,
    word: String,
    in_text: bool,
    /// Whether the next word in an object is a key.
    at_key: bool,
    begun: bool,
    hold: Hold,
}

impl GemmaCall {
    fn new(marks: Marks) -> Self {
        Self {
            quote: marks.quote,
            open: Vec::new(),
            word: String::new(),
            in_text: false,
            at_key: false,
            begun: false,
            hold: Hold::default(),
        }
    }

    pub(super) fn is_begun(&self) -> bool {
        self.begun
    }

    pub(super) fn feed(&mut self, char: char, out: &mut Parts) -> Step {
        if !self.begun {
            return self.feed_head(char, out);
        }
        let mut plain = String::new();
        let quote = self.hold.feed(char, &[&[self.quote]], |char| plain.push(char));
        if self.in_text {
            out.arguments(&escape(&plain));
        } else {
            for char in plain.chars() {
                let step = self.feed_value(char, out);
                if step != Step::More {
                    return step;
                }
            }
        }
        if quote.is_some() {
            self.in_text = !self.in_text;
            out.arguments("\"");
        }
        Step::More
    }

    fn feed_head(&mut self, char: char, out: &mut Parts) -> Step {
        if char != '{' {
            self.word.push(char);
            return if self.word.len() > WORD_BYTES_MAX { Step::Broken } else { Step::More };
        }
        let name = self.word.trim().strip_prefix("call:").unwrap_or_default().to_owned();
        if name.is_empty() {
            return Step::Broken;
        }
        out.call(&name);
        out.arguments("{");
        self.begun = true;
        self.word.clear();
        self.open.push('{');
        self.at_key = true;
        Step::More
    }

    fn feed_value(&mut self, char: char, out: &mut Parts) -> Step {
        match char {
            ':' if self.at_key => {
                out.arguments(&format!("{}:", Value::from(self.word.trim())));
                self.word.clear();
                self.at_key = false;
            }
            '{' | '[' if self.word.trim().is_empty() => {
                self.word.clear();
                out.arguments(char.encode_utf8(&mut [0; 4]));
                self.open.push(char);
                self.at_key = char == '{';
            }
            ',' => {
                self.value(out);
                out.arguments(",");
                self.at_key = self.open.last() == Some(&'{');
            }
            '}' | ']' => {
                self.value(out);
                self.at_key = false;
                let opened = if char == '}' { '{' } else { '[' };
                if self.open.pop() != Some(opened) {
                    return Step::Broken;
                }
                out.arguments(char.encode_utf8(&mut [0; 4]));
                if self.open.is_empty() {
                    out.call_end();
                    self.begun = false;
                    return Step::Done;
                }
            }
            _ => {
                self.word.push(char);
                if self.word.len() > WORD_BYTES_MAX {
                    return Step::Broken;
                }
            }
        }
        Step::More
    }

    /// A bare value ends: a number or a word of JSON, or else a text.
    fn value(&mut self, out: &mut Parts) {
        let word = std::mem::take(&mut self.word);
        let word = word.trim();
        if !word.is_empty() {
            let value: Value = serde_json::from_str(word).unwrap_or_else(|_| Value::from(word));
            out.arguments(&value.to_string());
        }
    }
}

pub(super) fn grammar(marks: Marks) -> CallGrammar {
    if marks.quote == MARKS.quote {
        CallGrammar {
            trigger: MARKS.open,
            before: "",
            call: |lark, tool| call(lark, tool, MARKS),
            between: MARKS.open,
            after: "",
        }
    } else {
        CallGrammar {
            trigger: FUNCTION_MARKS.open,
            before: "",
            call: |lark, tool| call(lark, tool, FUNCTION_MARKS),
            between: FUNCTION_MARKS.open,
            after: "",
        }
    }
}

/// Names and types of the arguments, in the schema's order; of what is nested, that it is well-formed.
fn call(lark: &mut Lark<'_>, tool: &Tool, marks: Marks) {
    lark.text(&format!("call:{}{{", tool.name));
    let schema = if lark.is_exact() { tool.schema() } else { Value::Null };
    let properties = schema.get("properties").and_then(Value::as_object);
    let required = schema.get("required").and_then(Value::as_array);
    let is_needed = |key: &str| required.is_some_and(|all| all.iter().any(|name| name == key));
    // Those that must be there first, so that a comma stands before each of the others.
    let (needed, others): (Vec<_>, Vec<_>) =
        properties.into_iter().flatten().partition(|(key, _)| is_needed(key));
    for (index, (key, property)) in needed.iter().enumerate() {
        lark.text(&format!("{}{key}:", if index == 0 { "" } else { "," }));
        value(lark, property, marks);
    }
    if properties.is_none() {
        any(lark, marks).terms("(mlx_entry (\",\" mlx_entry)*)?");
    }
    for (index, (key, property)) in others.into_iter().enumerate() {
        // Of several optional ones and none before them, only the first may stand alone.
        let comma = if needed.is_empty() && index == 0 { "" } else { "," };
        lark.terms("(").text(&format!("{comma}{key}:"));
        value(lark, property, marks);
    }
    let others = properties.map_or(0, |all| all.len()) - needed.len();
    lark.terms(&")?".repeat(others)).text("}").text(marks.close);
}

fn value(lark: &mut Lark<'_>, property: &Value, marks: Marks) {
    let texts = property.get("enum").and_then(Value::as_array);
    let texts = texts.and_then(|all| all.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
    match (texts, property.get("type").and_then(Value::as_str)) {
        (Some(texts), _) => {
            lark.text(marks.quote).terms("(");
            for (index, text) in texts.into_iter().enumerate() {
                lark.terms(if index == 0 { "" } else { "|" }).text(text);
            }
            lark.terms(")").text(marks.quote);
        }
        (None, Some("number" | "integer" | "boolean" | "null")) => {
            lark.json(property);
        }
        (None, Some("string")) => {
            quoted(lark, marks).terms("mlx_quoted");
        }
        (None, _) => {
            any(lark, marks).terms("mlx_any");
        }
    }
}

/// A text between its marks.
fn quoted<'a, 'b>(lark: &'a mut Lark<'b>, marks: Marks) -> &'a mut Lark<'b> {
    match lark.special(marks.quote) {
        Some(id) => lark.rule("mlx_quoted", format!("<[{id}]> {ANY_TEXT} <[{id}]>")),
        None => {
            let quote = pattern(marks.quote);
            lark.rule("mlx_quoted[lazy]", format!("/{quote}(?s:.*){quote}/"))
        }
    }
}

/// Any value.
fn any<'a, 'b>(lark: &'a mut Lark<'b>, marks: Marks) -> &'a mut Lark<'b> {
    quoted(lark, marks)
        .rule("MLX_KEY", r"/[A-Za-z0-9_.\-]{1,128}/")
        .rule("MLX_WORD", r"/-?[0-9]{1,20}(\.[0-9]{1,20})?|true|false|null/")
        .rule("mlx_entry", "MLX_KEY \":\" mlx_any")
        .rule(
            "mlx_any",
            "mlx_quoted | MLX_WORD | \"[\" (mlx_any (\",\" mlx_any)*)? \"]\" | \"{\" (mlx_entry (\",\" mlx_entry)*)? \"}\"",
        )
}
