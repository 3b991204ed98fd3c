//! What `/v1/messages` answers: a message, whole or as events.

use crate::{
    job::{ToolCall, Whole},
    text::{EndReason, Ending, TextUsage},
};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};
use types::{ModelCard, RequestId};

/// A message.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct MessageJson {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    role: &'static str,
    model: String,
    content: Vec<BlockJson>,
    /// `null` in the event that begins a stream.
    stop_reason: Option<&'static str>,
    stop_sequence: Option<String>,
    usage: UsageJson,
}

/// A part of a message.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum BlockJson {
    Thinking {
        thinking: String,
        /// Always empty.
        signature: String,
    },
    Text {
        text: String,
    },
    ToolUse {
        id: String,
        name: String,
        input: Value,
    },
}

/// What a message cost; the tokens of the prompt are the sum of the three kinds of input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct UsageJson {
    input_tokens: u32,
    cache_creation_input_tokens: u32,
    cache_read_input_tokens: u32,
    output_tokens: u32,
}

impl UsageJson {
    pub(super) fn new(usage: TextUsage) -> Self {
        let cached = usage.cached_tokens.unwrap_or(0);
        Self {
            input_tokens: usage.prompt_tokens.saturating_sub(cached),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: cached,
            output_tokens: usage.completion_tokens,
        }
    }
}

/// `POST /v1/messages/count_tokens`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TokenCount {
    pub(super) input_tokens: usize,
}

/// What begins all of a message's forms.
#[derive(Debug, Clone)]
pub(super) struct Head {
    id: String,
    model: String,
}

impl Head {
    pub(super) fn new(id: RequestId, card: &ModelCard) -> Self {
        Self { id: format!("msg_{id}"), model: card.name.clone() }
    }

    /// A message that is yet to come.
    pub(super) fn begun(&self, prompt_tokens: u32) -> MessageJson {
        let usage = TextUsage { prompt_tokens, ..TextUsage::default() };
        self.message(Vec::new(), None, None, usage)
    }

    /// A message that is complete.
    pub(super) fn ended(&self, content: Vec<BlockJson>, ending: Ending) -> MessageJson {
        let reason = stop_reason(&ending);
        self.message(content, Some(reason), ending.stop_string, ending.usage)
    }

    fn message(
        &self,
        content: Vec<BlockJson>,
        stop_reason: Option<&'static str>,
        stop_sequence: Option<String>,
        usage: TextUsage,
    ) -> MessageJson {
        MessageJson {
            id: self.id.clone(),
            kind: "message",
            role: "assistant",
            model: self.model.clone(),
            content,
            stop_reason,
            stop_sequence,
            usage: UsageJson::new(usage),
        }
    }
}

pub(super) fn stop_reason(ending: &Ending) -> &'static str {
    match ending.reason {
        EndReason::Length => "max_tokens",
        EndReason::ToolCalls => "tool_use",
        EndReason::Stop if ending.stop_string.is_some() => "stop_sequence",
        EndReason::Stop => "end_turn",
    }
}

/// The blocks of a whole answer.
pub(super) fn blocks(whole: Whole) -> (Vec<BlockJson>, Ending) {
    let Whole { reasoning, content, calls, ending, .. } = whole;
    let thinking = (!reasoning.is_empty())
        .then_some(BlockJson::Thinking { thinking: reasoning, signature: String::new() });
    let text = (!content.is_empty()).then_some(BlockJson::Text { text: content });
    let calls = calls.into_iter().map(|ToolCall { id, name, arguments }| {
        // An answer that was cut off may have half a call; a client gets what can be read of it: nothing.
        let input = serde_json::from_str(&arguments).unwrap_or_else(|_| json!({}));
        BlockJson::ToolUse { id, name, input }
    });
    (thinking.into_iter().chain(text).chain(calls).collect(), ending)
}
