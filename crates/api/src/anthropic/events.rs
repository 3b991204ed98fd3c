//! A message as server-sent events: it begins, blocks begin, grow and end one after the other, and it ends.

use super::answer::{BlockJson, Head, MessageJson, UsageJson, stop_reason};
use crate::{
    error::ApiError,
    handlers::stream::{Format, Frames},
    shape,
    text::{AnswerEvent, TextUsage},
};
use serde::Serialize;
use serde_json::Value;
use types::RequestId;

/// An event; its name is its type.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event<'a> {
    MessageStart { message: MessageJson },
    ContentBlockStart { index: usize, content_block: BlockJson },
    ContentBlockDelta { index: usize, delta: DeltaJson<'a> },
    ContentBlockStop { index: usize },
    MessageDelta { delta: MessageDelta, usage: UsageJson },
    MessageStop {},
}

impl Event<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop {} => "message_stop",
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(tag = "type")]
enum DeltaJson<'a> {
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: &'a str },
    #[serde(rename = "text_delta")]
    Text { text: &'a str },
    #[serde(rename = "input_json_delta")]
    InputJson { partial_json: &'a str },
}

#[derive(Debug, Serialize)]
struct MessageDelta {
    stop_reason: &'static str,
    stop_sequence: Option<String>,
}

/// What kind of block is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
    ToolUse,
}

/// Writes the events of one message.
#[derive(Debug)]
pub(super) struct MessageEvents {
    id: RequestId,
    head: Head,
    prompt_tokens: u32,
    /// The block that grows.
    open: Option<Kind>,
    /// Its index, or the next one's.
    index: usize,
}

impl MessageEvents {
    pub(super) fn new(id: RequestId, head: Head, prompt_tokens: u32) -> Self {
        Self { id, head, prompt_tokens, open: None, index: 0 }
    }

    fn grow(&mut self, kind: Kind, empty: BlockJson, delta: DeltaJson<'_>, out: &mut Frames) {
        if self.open != Some(kind) {
            self.open(kind, empty, out);
        }
        write(&Event::ContentBlockDelta { index: self.index, delta }, out);
    }

    fn open(&mut self, kind: Kind, content_block: BlockJson, out: &mut Frames) {
        self.close(out);
        self.open = Some(kind);
        write(&Event::ContentBlockStart { index: self.index, content_block }, out);
    }

    fn close(&mut self, out: &mut Frames) {
        if self.open.take().is_some() {
            write(&Event::ContentBlockStop { index: self.index }, out);
            self.index += 1;
        }
    }
}

impl Format for MessageEvents {
    const KEEP_ALIVE: &'static str = "event: ping\ndata: {\"type\": \"ping\"}\n\n";

    fn begin(&mut self, out: &mut Frames) {
        write(&Event::MessageStart { message: self.head.begun(self.prompt_tokens) }, out);
    }

    fn event(&mut self, _choice: usize, event: AnswerEvent, out: &mut Frames) {
        match event {
            // Not asked for in this protocol.
            AnswerEvent::Prompt(_) | AnswerEvent::Tokens(_) => {}
            AnswerEvent::Reasoning(text) => {
                let empty = BlockJson::Thinking { thinking: String::new(), signature: String::new() };
                self.grow(Kind::Thinking, empty, DeltaJson::Thinking { thinking: &text }, out);
            }
            AnswerEvent::Content(text) => {
                let empty = BlockJson::Text { text: String::new() };
                self.grow(Kind::Text, empty, DeltaJson::Text { text: &text }, out);
            }
            AnswerEvent::ToolCall { call: _, id, name } => {
                let input = Value::Object(serde_json::Map::new());
                self.open(Kind::ToolUse, BlockJson::ToolUse { id, name, input }, out);
            }
            AnswerEvent::Arguments { call: _, text } => {
                let delta = DeltaJson::InputJson { partial_json: &text };
                write(&Event::ContentBlockDelta { index: self.index, delta }, out);
            }
            AnswerEvent::ToolCallEnd { .. } => self.close(out),
            AnswerEvent::Ended(ending) => {
                self.close(out);
                let (stop_reason, usage) = (stop_reason(&ending), UsageJson::new(ending.usage));
                let delta = MessageDelta { stop_reason, stop_sequence: ending.stop_string };
                write(&Event::MessageDelta { delta, usage }, out);
            }
        }
    }

    fn finish(&mut self, _usage: TextUsage, out: &mut Frames) {
        write(&Event::MessageStop {}, out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Frames) {
        out.named("error", &shape::anthropic(error, self.id));
    }
}

fn write(event: &Event<'_>, out: &mut Frames) {
    out.named(event.name(), event);
}
