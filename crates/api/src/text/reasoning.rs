//! Reasoning before an answer: a block between two markers at its beginning. The prompt may have opened it already.

use super::{Hold, Parts};

/// The markers of a model's reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReasoningFormat {
    pub(crate) open: &'static str,
    pub(crate) close: &'static str,
}

const FORMATS: [ReasoningFormat; 4] = [
    ReasoningFormat { open: "<think>", close: "</think>" },
    ReasoningFormat { open: "[THINK]", close: "[/THINK]" },
    ReasoningFormat { open: "<|channel>thought", close: "<channel|>" },
    ReasoningFormat { open: "<longcat_think>", close: "</longcat_think>" },
];

/// White space that is held back at a border, which drops it; more than this is text.
const SPACE_BYTES_MAX: usize = 256;

impl ReasoningFormat {
    /// By what a chat template says.
    pub(crate) fn of_template(source: &str) -> Option<Self> {
        FORMATS.into_iter().find(|format| source.contains(format.open) || source.contains(format.close))
    }

    /// Where a prompt leaves the model: inside of a block that it opened, or before an answer that may begin with one. An
    /// answer that the prompt has begun already (`continued`) may have a block that is open.
    pub(crate) fn after_prompt(self, prompt: &str, continued: bool) -> Start {
        let prompt = prompt.trim_end();
        if continued {
            let inside = prompt.rfind(self.open) > prompt.rfind(self.close);
            return if inside { Start::Inside } else { Start::Over };
        }
        if prompt.ends_with(self.open) {
            Start::Inside
        } else if prompt.ends_with(self.close) {
            Start::Over
        } else {
            Start::Before
        }
    }
}

/// Where an answer begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// A block of reasoning may begin.
    Before,
    /// In one.
    Inside,
    /// After one: there is no other.
    Over,
}

/// Tells reasoning from what follows it.
#[derive(Debug)]
pub(crate) struct ReasoningParser {
    format: ReasoningFormat,
    at: At,
    hold: Hold,
    /// White space that is dropped if a border follows.
    space: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Before,
    /// Reasoning was opened; has anything been said?
    Inside {
        said: bool,
    },
    /// White space after it is dropped.
    Closed,
    Over,
}

impl ReasoningParser {
    pub(crate) fn new(format: ReasoningFormat, start: Start) -> Self {
        let at = match start {
            Start::Before => At::Before,
            Start::Inside => At::Inside { said: false },
            Start::Over => At::Over,
        };
        Self { format, at, hold: Hold::default(), space: String::new() }
    }

    pub(crate) fn is_inside(&self) -> bool {
        matches!(self.at, At::Inside { .. })
    }

    /// Takes a piece, gives reasoning to `out`, and returns the text that is none.
    pub(crate) fn push(&mut self, text: &str, out: &mut Parts) -> String {
        let mut rest = String::new();
        if self.at == At::Over && self.space.is_empty() {
            rest.push_str(text);
            return rest;
        }
        for char in text.chars() {
            self.feed(char, out, &mut rest);
        }
        rest
    }

    /// What was held back.
    pub(crate) fn finish(&mut self, out: &mut Parts) -> String {
        let held = self.hold.take();
        let space = std::mem::take(&mut self.space);
        match self.at {
            At::Inside { .. } => {
                if !held.is_empty() {
                    out.reasoning(&space);
                    out.reasoning(&held);
                }
                String::new()
            }
            At::Before | At::Closed | At::Over => space + &held,
        }
    }

    fn feed(&mut self, char: char, out: &mut Parts, rest: &mut String) {
        let Self { format, at, hold, space } = self;
        match at {
            At::Over => rest.push(char),
            At::Closed if char.is_whitespace() => {}
            At::Closed => {
                *at = At::Over;
                rest.push(char);
            }
            At::Before => {
                let mut said = false;
                let opened = hold.feed(char, &[&[format.open]], |plain| {
                    if plain.is_whitespace() && !said && space.len() < SPACE_BYTES_MAX {
                        space.push(plain);
                    } else {
                        said = true;
                        rest.push_str(space);
                        space.clear();
                        rest.push(plain);
                    }
                });
                if said {
                    *at = At::Over;
                    rest.push_str(&hold.take());
                } else if opened.is_some() {
                    space.clear();
                    *at = At::Inside { said: false };
                }
            }
            At::Inside { said } => {
                let closed = hold.feed(char, &[&[format.close]], |plain| {
                    if !plain.is_whitespace() || space.len() >= SPACE_BYTES_MAX {
                        if *said {
                            out.reasoning(space);
                        }
                        space.clear();
                        *said = true;
                        out.reasoning(plain.encode_utf8(&mut [0; 4]));
                    } else {
                        space.push(plain);
                    }
                });
                if closed.is_some() {
                    space.clear();
                    *at = At::Closed;
                }
            }
        }
    }
}
