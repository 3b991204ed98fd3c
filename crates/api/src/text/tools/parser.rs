//! Content and calls, told apart.

use super::{Body, CALL_HELD_BYTES_MAX, Context, Step, Syntax, ToolFormat};
use crate::{
    job::Tool,
    text::{Hold, Parts},
};
use std::sync::Arc;

/// White space that is held back because a call may follow, which drops it; more than this is content.
const SPACE_BYTES_MAX: usize = 256;

/// Finds calls in a text.
#[derive(Debug)]
pub(crate) struct ToolParser {
    syntax: &'static Syntax,
    tools: Arc<[Tool]>,
    state: State,
    hold: Hold,
    space: String,
    /// The call's text while it is not begun: content, if it is none.
    raw: String,
}

#[derive(Debug)]
enum State {
    /// Nothing was said yet.
    Start,
    /// In content.
    Text,
    /// After a call: white space and what is around calls is dropped.
    Gap,
    Call(Body),
}

impl std::fmt::Debug for Syntax {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Syntax").field("open", &self.open).finish_non_exhaustive()
    }
}

impl ToolParser {
    pub(crate) fn new(format: ToolFormat, tools: Arc<[Tool]>) -> Self {
        let (hold, space, raw) = (Hold::default(), String::new(), String::new());
        Self { syntax: format.syntax(), tools, state: State::Start, hold, space, raw }
    }

    pub(crate) fn push(&mut self, text: &str, out: &mut Parts) {
        for char in text.chars() {
            self.feed(char, out);
        }
    }

    /// Gives out what is held back: nothing follows.
    pub(crate) fn finish(&mut self, out: &mut Parts) {
        let held = self.hold.take();
        match &self.state {
            State::Call(body) if body.is_begun() => out.call_end(),
            // Nothing but what separates calls.
            State::Call(_) if self.raw.trim_matches([',', ' ', '\n']).is_empty() => {}
            State::Call(_) => out.content(&self.raw),
            // What closes the last call may be cut off.
            State::Gap if self.syntax.around.iter().any(|marker| marker.starts_with(&held)) => {}
            State::Start | State::Text | State::Gap => {
                out.content(&self.space);
                out.content(&held);
            }
        }
        self.space.clear();
        self.raw.clear();
        self.state = State::Text;
    }

    fn feed(&mut self, char: char, out: &mut Parts) {
        let State::Call(body) = &mut self.state else {
            return self.feed_text(char, out);
        };
        let was_begun = body.is_begun();
        let step = body.feed(char, out);
        let begun = body.is_begun();
        match step {
            Step::More if begun || was_begun => self.raw.clear(),
            Step::More => {
                self.raw.push(char);
                if self.raw.len() > CALL_HELD_BYTES_MAX {
                    out.content(&std::mem::take(&mut self.raw));
                    self.state = State::Text;
                }
            }
            Step::Done => {
                self.raw.clear();
                self.state = State::Gap;
            }
            Step::Broken if begun => {
                out.call_end();
                self.raw.clear();
                self.state = State::Gap;
                self.feed_text(char, out);
            }
            Step::Broken => {
                self.raw.push(char);
                out.content(&std::mem::take(&mut self.raw));
                self.state = State::Text;
            }
        }
    }

    fn feed_text(&mut self, char: char, out: &mut Parts) {
        let gap = matches!(self.state, State::Gap);
        let around: &[&str] = if gap { self.syntax.around } else { &[] };
        let mut plain = String::new();
        let found = self.hold.feed(char, &[self.syntax.open, around], |char| plain.push(char));
        for char in plain.chars() {
            self.feed_plain(char, out);
        }
        match found {
            Some(marker) if self.syntax.open.contains(&marker) => {
                self.raw = std::mem::take(&mut self.space) + marker;
                self.begin(marker);
            }
            Some(_) => self.space.clear(),
            None => {}
        }
    }

    /// A character that belongs to no marker.
    fn feed_plain(&mut self, char: char, out: &mut Parts) {
        let bare = self.syntax.bare && matches!(self.state, State::Start | State::Gap);
        if char.is_whitespace() && self.space.len() < SPACE_BYTES_MAX {
            self.space.push(char);
        } else if bare && char == '{' {
            self.begin("");
            let space = std::mem::take(&mut self.space);
            self.feed(char, out);
            self.raw.insert_str(0, &space);
        } else if bare && matches!((&self.state, char), (State::Gap, ';' | ',')) {
            self.space.clear();
        } else {
            out.content(&self.space);
            self.space.clear();
            out.content(char.encode_utf8(&mut [0; 4]));
            self.state = State::Text;
        }
    }

    fn begin(&mut self, open: &str) {
        let context = Context { open, tools: &self.tools };
        self.state = State::Call((self.syntax.body)(&context));
    }
}
