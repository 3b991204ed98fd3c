//! Calls as JSON objects that name a tool: `{"name": …, "arguments": {…}}`, one, or several in an array.

use super::{
    CALL_HELD_BYTES_MAX, Step,
    json::{JsonValue, Place, unquote},
};
use crate::{job::Tool, text::Parts};
use std::sync::Arc;

/// What arguments are called, by one model or another.
const ARGUMENTS: [&str; 2] = ["arguments", "parameters"];

/// Reads one object or an array of them.
#[derive(Debug)]
pub(crate) struct ObjectCalls {
    /// Tools that may be named; none: any.
    known: Option<Arc<[Tool]>>,
    at: At,
    in_array: bool,
    /// The call being read.
    key: String,
    name: Option<String>,
    /// Arguments that came before the name, or that are a string.
    early: String,
    begun: bool,
    /// Whether the call has arguments.
    argued: bool,
}

#[derive(Debug)]
enum At {
    /// Before an object, or an array of them.
    Before,
    /// Before an element of the array.
    Element,
    /// Before a key, or the end of the object.
    Key,
    /// In a key.
    KeyText(String),
    Colon,
    /// In the value of `name`.
    Name(JsonValue, String),
    Arguments(JsonValue, Kind),
    /// In a value that says nothing to us.
    Other(JsonValue),
    /// After a value.
    Comma,
    /// After an element.
    Separator,
}

/// What arguments are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Unknown,
    /// Passed on as they are.
    Value,
    /// A string with JSON in it, as OpenAI has it.
    Text,
}

impl ObjectCalls {
    pub(super) fn new(known: Option<Arc<[Tool]>>) -> Self {
        Self {
            known,
            at: At::Before,
            in_array: false,
            key: String::new(),
            name: None,
            early: String::new(),
            begun: false,
            argued: false,
        }
    }

    pub(super) fn is_begun(&self) -> bool {
        self.begun
    }

    pub(super) fn feed(&mut self, char: char, out: &mut Parts) -> Step {
        match &mut self.at {
            At::KeyText(text) => {
                text.push(char);
                let escaped = text[..text.len() - char.len_utf8()].ends_with('\\');
                if char == '"' && !escaped {
                    let Some(key) = unquote(text) else { return Step::Broken };
                    self.key = key;
                    self.at = At::Colon;
                }
                Step::More
            }
            At::Name(value, text) => match value.feed(char) {
                Place::Before => Step::More,
                Place::Inside => {
                    text.push(char);
                    Step::More
                }
                Place::Last => {
                    text.push(char);
                    match unquote(text) {
                        Some(name) => self.named(name, out),
                        None => Step::Broken,
                    }
                }
                Place::Past | Place::Nowhere => Step::Broken,
            },
            At::Arguments(value, _) => match value.feed(char) {
                Place::Before => Step::More,
                Place::Inside => self.argument(char, out),
                Place::Last => {
                    let step = self.argument(char, out);
                    self.arguments_end(out);
                    step
                }
                Place::Past => {
                    self.arguments_end(out);
                    self.feed(char, out)
                }
                Place::Nowhere => Step::Broken,
            },
            At::Other(value) => match value.feed(char) {
                Place::Before | Place::Inside => Step::More,
                Place::Last => {
                    self.at = At::Comma;
                    Step::More
                }
                Place::Past => {
                    self.at = At::Comma;
                    self.feed(char, out)
                }
                Place::Nowhere => Step::Broken,
            },
            _ if char.is_whitespace() => Step::More,
            At::Before if char == '[' && !self.in_array => {
                self.in_array = true;
                self.at = At::Element;
                Step::More
            }
            At::Before | At::Element if char == '{' => self.open(),
            At::Key if char == '"' => {
                self.at = At::KeyText("\"".to_owned());
                Step::More
            }
            At::Colon if char == ':' => self.value(),
            At::Comma if char == ',' => {
                self.at = At::Key;
                Step::More
            }
            At::Key | At::Comma if char == '}' => self.close(out),
            At::Separator if char == ',' => {
                self.at = At::Element;
                Step::More
            }
            At::Separator if char == ']' => Step::Done,
            _ => Step::Broken,
        }
    }

    fn open(&mut self) -> Step {
        self.at = At::Key;
        self.name = None;
        self.early.clear();
        self.argued = false;
        Step::More
    }

    /// A key's value begins.
    fn value(&mut self) -> Step {
        let value = JsonValue::default();
        self.at = match self.key.as_str() {
            "name" if self.name.is_none() => At::Name(value, String::new()),
            key if ARGUMENTS.contains(&key) && !self.argued => {
                self.argued = true;
                At::Arguments(value, Kind::Unknown)
            }
            _ => At::Other(value),
        };
        Step::More
    }

    fn named(&mut self, name: String, out: &mut Parts) -> Step {
        if self.known.as_ref().is_some_and(|tools| tools.iter().all(|tool| tool.name != name)) {
            return Step::Broken;
        }
        out.call(&name);
        out.arguments(&std::mem::take(&mut self.early));
        self.name = Some(name);
        self.begun = true;
        self.at = At::Comma;
        Step::More
    }

    fn argument(&mut self, char: char, out: &mut Parts) -> Step {
        let At::Arguments(_, kind) = &mut self.at else { return Step::Broken };
        if *kind == Kind::Unknown {
            *kind = if char == '"' { Kind::Text } else { Kind::Value };
        }
        if *kind == Kind::Value && self.begun {
            out.arguments(char.encode_utf8(&mut [0; 4]));
            return Step::More;
        }
        self.early.push(char);
        if self.early.len() > CALL_HELD_BYTES_MAX { Step::Broken } else { Step::More }
    }

    fn arguments_end(&mut self, out: &mut Parts) {
        if let At::Arguments(_, Kind::Text) = self.at {
            self.early = unquote(&self.early).unwrap_or_else(|| std::mem::take(&mut self.early));
        }
        if self.begun {
            out.arguments(&std::mem::take(&mut self.early));
        }
        self.at = At::Comma;
    }

    /// The object ends.
    fn close(&mut self, out: &mut Parts) -> Step {
        if !self.begun {
            return Step::Broken;
        }
        if !self.argued {
            out.arguments("{}");
        }
        out.call_end();
        self.begun = false;
        if self.in_array {
            self.at = At::Separator;
            Step::More
        } else {
            Step::Done
        }
    }
}
