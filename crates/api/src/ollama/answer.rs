//! What `/api/chat` and `/api/generate` answer: lines of JSON, of which the last one says what it cost; or one for all.

use crate::{
    error::ApiError,
    handlers::stream::{Format, Frames},
    job::{ToolCall, Whole},
    prompt::{strftime, unix_seconds},
    shape,
    text::{AnswerEvent, EndReason, TextUsage},
};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};
use std::time::{Instant, SystemTime};

/// A line.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Line {
    model: String,
    created_at: String,
    #[serde(flatten)]
    said: Said,
    done: bool,
    #[serde(flatten)]
    end: Option<End>,
}

/// What was said: a message in a chat, a text otherwise.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
enum Said {
    Chat {
        message: MessageJson,
    },
    Text {
        response: String,
        #[serde(skip_serializing_if = "String::is_empty")]
        thinking: String,
    },
}

#[derive(Debug, Serialize, JsonSchema)]
struct MessageJson {
    role: &'static str,
    content: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    thinking: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallJson>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct CallJson {
    id: String,
    function: FunctionJson,
}

#[derive(Debug, Serialize, JsonSchema)]
struct FunctionJson {
    name: String,
    arguments: Value,
}

/// What the last line has: times in nanoseconds.
#[derive(Debug, Serialize, JsonSchema)]
struct End {
    done_reason: &'static str,
    total_duration: u64,
    /// Models are loaded when nodes start.
    load_duration: u64,
    prompt_eval_count: u32,
    prompt_eval_duration: u64,
    eval_count: u32,
    eval_duration: u64,
}

/// Whose lines they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Text,
}

/// Writes one answer.
#[derive(Debug)]
pub(super) struct Lines {
    kind: Kind,
    model: String,
    started: Instant,
    /// When the first token was there.
    first: Option<Instant>,
    /// The call that is being written: clients want it whole.
    call: Option<ToolCall>,
    reason: EndReason,
}

impl Lines {
    pub(super) fn new(kind: Kind, model: String, started: Instant) -> Self {
        Self { kind, model, started, first: None, call: None, reason: EndReason::Stop }
    }

    /// The whole answer.
    pub(super) fn whole(&self, whole: Whole) -> Line {
        let Whole { reasoning, content, calls, ending, .. } = whole;
        let end = self.end(ending.reason, ending.usage);
        self.line(content, reasoning, calls.into_iter().map(call_json).collect(), Some(end))
    }

    /// What is told of a model that is there.
    pub(super) fn loaded(&self) -> Line {
        let end = End { done_reason: "load", ..self.end(EndReason::Stop, TextUsage::default()) };
        self.line(String::new(), String::new(), Vec::new(), Some(end))
    }

    fn line(&self, content: String, thinking: String, tool_calls: Vec<CallJson>, end: Option<End>) -> Line {
        let said = match self.kind {
            Kind::Chat => {
                Said::Chat { message: MessageJson { role: "assistant", content, thinking, tool_calls } }
            }
            Kind::Text => Said::Text { response: content, thinking },
        };
        let created_at =
            strftime("%FT%TZ", unix_seconds(SystemTime::now())).expect("it knows these directives");
        Line { model: self.model.clone(), created_at, said, done: end.is_some(), end }
    }

    fn end(&self, reason: EndReason, usage: TextUsage) -> End {
        let now = Instant::now();
        let first = self.first.unwrap_or(now);
        let nanoseconds = |from: Instant, to: Instant| (to - from).as_nanos() as u64;
        End {
            done_reason: if reason == EndReason::Length { "length" } else { "stop" },
            total_duration: nanoseconds(self.started, now),
            load_duration: 0,
            prompt_eval_count: usage.prompt_tokens,
            prompt_eval_duration: nanoseconds(self.started, first),
            eval_count: usage.completion_tokens,
            eval_duration: nanoseconds(first, now),
        }
    }
}

fn call_json(call: ToolCall) -> CallJson {
    let ToolCall { id, name, arguments } = call;
    // An answer that was cut off may have half a call: nothing can be read of it.
    let arguments = serde_json::from_str(&arguments).unwrap_or_else(|_| Value::Object(Map::new()));
    CallJson { id, function: FunctionJson { name, arguments } }
}

impl Format for Lines {
    const CONTENT_TYPE: &'static str = "application/x-ndjson";
    const KEEP_ALIVE: &'static str = "";

    fn event(&mut self, _choice: usize, event: AnswerEvent, out: &mut Frames) {
        self.first.get_or_insert_with(Instant::now);
        match event {
            // Not asked for in this protocol.
            AnswerEvent::Prompt(_) | AnswerEvent::Tokens(_) => {}
            AnswerEvent::Reasoning(text) => out.line(&self.line(String::new(), text, Vec::new(), None)),
            AnswerEvent::Content(text) => out.line(&self.line(text, String::new(), Vec::new(), None)),
            AnswerEvent::ToolCall { call: _, id, name } => {
                self.call = Some(ToolCall { id, name, arguments: String::new() });
            }
            AnswerEvent::Arguments { call: _, text } => {
                if let Some(call) = &mut self.call {
                    call.arguments.push_str(&text);
                }
            }
            AnswerEvent::ToolCallEnd { .. } => {
                if let Some(call) = self.call.take() {
                    out.line(&self.line(String::new(), String::new(), vec![call_json(call)], None));
                }
            }
            AnswerEvent::Ended(ending) => self.reason = ending.reason,
        }
    }

    fn finish(&mut self, usage: TextUsage, out: &mut Frames) {
        let end = self.end(self.reason, usage);
        out.line(&self.line(String::new(), String::new(), Vec::new(), Some(end)));
    }

    fn error(&mut self, error: &ApiError, out: &mut Frames) {
        out.line(&shape::ollama(error));
    }
}
