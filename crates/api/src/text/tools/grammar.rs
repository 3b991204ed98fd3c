//! Calls as a grammar, in llguidance's dialect of Lark.

use crate::job::Tool;
use serde_json::{Value, json};
use std::{collections::BTreeMap, fmt::Write};
use types::TokenId;

/// How a format writes calls: `trigger before call (between call)* after`.
pub(crate) struct CallGrammar {
    /// What tells a call from other text.
    pub(crate) trigger: &'static str,
    pub(crate) before: &'static str,
    /// Writes one call.
    pub(crate) call: fn(&mut Lark<'_>, &Tool),
    pub(crate) between: &'static str,
    pub(crate) after: &'static str,
}

/// One rule's right side, being written.
#[derive(Debug)]
pub(crate) struct Lark<'a> {
    /// Special tokens: no text matches them, so they are named by number.
    special: &'a [(String, TokenId)],
    /// Whether arguments must be as the tool's schema says, or just an object.
    exact: bool,
    terms: String,
    /// Rules that the terms name.
    rules: BTreeMap<&'static str, String>,
}

impl<'a> Lark<'a> {
    pub(crate) fn new(special: &'a [(String, TokenId)], exact: bool) -> Self {
        Self { special, exact, terms: String::new(), rules: BTreeMap::new() }
    }

    /// The terms, and the rules that they name.
    pub(crate) fn finish(self) -> (String, BTreeMap<&'static str, String>) {
        (self.terms.trim_end().to_owned(), self.rules)
    }

    /// Adds a rule that terms may name; `head` is its name with its options.
    pub(crate) fn rule(&mut self, head: &'static str, terms: impl Into<String>) -> &mut Self {
        self.rules.insert(head, terms.into());
        self
    }

    /// Whether a text is one special token.
    pub(crate) fn special(&self, text: &str) -> Option<TokenId> {
        self.special.iter().find(|(content, _)| content == text).map(|&(_, id)| id)
    }

    /// A text as it stands, with its special tokens as such.
    pub(crate) fn text(&mut self, text: &str) -> &mut Self {
        let mut rest = text;
        while !rest.is_empty() {
            let found =
                self.special.iter().filter_map(|(content, id)| Some((rest.find(content)?, content, id)));
            let Some((at, content, id)) =
                found.min_by_key(|&(at, content, _)| (at, usize::MAX - content.len()))
            else {
                self.literal(rest);
                break;
            };
            self.literal(&rest[..at]);
            write!(self.terms, "<[{id}]> ").expect("a string");
            rest = &rest[at + content.len()..];
        }
        self
    }

    /// A text as a JSON string.
    pub(crate) fn json_text(&mut self, text: &str) -> &mut Self {
        self.text(&Value::from(text).to_string())
    }

    /// A tool's arguments.
    pub(crate) fn schema(&mut self, tool: &Tool) -> &mut Self {
        let schema = if self.exact { tool.schema() } else { json!({"type": "object"}) };
        self.json(&schema)
    }

    /// What a JSON schema allows.
    pub(crate) fn json(&mut self, schema: &Value) -> &mut Self {
        self.terms(&format!("%json {schema}"))
    }

    /// Terms in Lark.
    pub(crate) fn terms(&mut self, terms: &str) -> &mut Self {
        self.terms.push_str(terms);
        self.terms.push(' ');
        self
    }

    pub(crate) fn is_exact(&self) -> bool {
        self.exact
    }

    fn literal(&mut self, text: &str) {
        if !text.is_empty() {
            self.terms.push_str(&literal(text));
            self.terms.push(' ');
        }
    }
}

/// A text as Lark quotes it: as JSON does.
pub(crate) fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// Any text, in which no special token is.
pub(crate) const ANY_TEXT: &str = "/(?s:.*)/";

/// A text as a regular expression between slashes. Only what has a meaning is escaped: `\\<` would be a border of a word.
pub(crate) fn pattern(text: &str) -> String {
    let mut out = String::new();
    for char in text.chars() {
        match char {
            '\n' => out.push_str("\\n"),
            '\\' | '.' | '+' | '*' | '?' | '(' | ')' | '|' | '[' | ']' | '{' | '}' | '^' | '$' | '/'
            | '-' | '&' | '~' | '#' => {
                out.extend(['\\', char]);
            }
            _ => out.push(char),
        }
    }
    out
}
