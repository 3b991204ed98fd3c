//! A response as server-sent events, numbered: it begins, items and their parts begin, grow and end, and it ends.

use super::{
    answer::{ResponseJson, Status, item_status},
    items::{ContentPart, OutputItem, OutputPart, item_id, message_item, reasoning_item},
    store::Keep,
};
use crate::{
    error::ApiError,
    handlers::stream::{Format, Frames},
    openai::logprobs::{ChatToken, chat_tokens},
    prompt::ModelText,
    text::{AnswerEvent, Ending, TextUsage, TokenInfo},
};
use serde::Serialize;
use serde_json::{Value, json};
use std::sync::Arc;
use types::RequestId;

/// The item that grows.
#[derive(Debug)]
enum Open {
    Reasoning { id: String, text: String },
    Message { id: String, text: String, logprobs: Vec<ChatToken> },
    Call { id: String, call_id: String, name: String, arguments: String },
}

/// Writes the events of one response.
#[derive(Debug)]
pub(super) struct ResponseEvents {
    request: RequestId,
    response: ResponseJson,
    text: Arc<ModelText>,
    /// Tokens whose text is told next; none where nobody asked for them.
    tokens: Vec<TokenInfo>,
    /// Where the response goes once it is over; none where it is not stored.
    keep: Option<Keep>,
    sequence_number: u64,
    open: Option<Open>,
    output: Vec<OutputItem>,
}

impl ResponseEvents {
    pub(super) fn new(
        request: RequestId,
        response: ResponseJson,
        text: Arc<ModelText>,
        keep: Option<Keep>,
    ) -> Self {
        let (tokens, output) = (Vec::new(), Vec::new());
        Self { request, response, text, tokens, keep, sequence_number: 0, open: None, output }
    }

    fn reasoning(&mut self, piece: &str, out: &mut Frames) {
        if !matches!(self.open, Some(Open::Reasoning { .. })) {
            self.close("completed", out);
            let id = item_id("rs", self.request, self.output.len());
            self.add(Open::Reasoning { id, text: String::new() }, out);
        }
        let index = self.output.len();
        let Some(Open::Reasoning { id, text }) = &mut self.open else { return };
        text.push_str(piece);
        let fields = json!({"item_id": id, "output_index": index, "content_index": 0, "delta": piece});
        self.write("response.reasoning_text.delta", fields, out);
    }

    fn content(&mut self, piece: &str, out: &mut Frames) {
        if !matches!(self.open, Some(Open::Message { .. })) {
            self.close("completed", out);
            let id = item_id("msg", self.request, self.output.len());
            self.add(Open::Message { id, text: String::new(), logprobs: Vec::new() }, out);
        }
        let told = chat_tokens(&std::mem::take(&mut self.tokens), &self.text);
        let index = self.output.len();
        let Some(Open::Message { id, text, logprobs }) = &mut self.open else { return };
        text.push_str(piece);
        let fields = json!({
            "item_id": id, "output_index": index, "content_index": 0, "delta": piece, "logprobs": told,
        });
        logprobs.extend(told);
        self.write("response.output_text.delta", fields, out);
    }

    fn arguments(&mut self, piece: &str, out: &mut Frames) {
        let index = self.output.len();
        let Some(Open::Call { id, arguments, .. }) = &mut self.open else { return };
        arguments.push_str(piece);
        let fields = json!({"item_id": id, "output_index": index, "delta": piece});
        self.write("response.function_call_arguments.delta", fields, out);
    }

    /// Begins an item.
    fn add(&mut self, open: Open, out: &mut Frames) {
        const GROWING: &str = "in_progress";
        let index = self.output.len();
        let (id, item, part) = match &open {
            Open::Reasoning { id, .. } => {
                let part = ContentPart::ReasoningText { text: String::new() };
                (id, reasoning_item(id.clone(), "", GROWING), Some(to_value(&part)))
            }
            Open::Message { id, .. } => {
                let part = OutputPart::new("", Vec::new());
                (id, message_item(id.clone(), Vec::new(), GROWING), Some(to_value(&part)))
            }
            Open::Call { id, call_id, name, .. } => {
                let (call_id, name, arguments) = (call_id.clone(), name.clone(), String::new());
                (
                    id,
                    OutputItem::FunctionCall { id: id.clone(), call_id, name, arguments, status: GROWING },
                    None,
                )
            }
        };
        self.write("response.output_item.added", json!({"output_index": index, "item": item}), out);
        if let Some(part) = part {
            let fields = json!({"item_id": id, "output_index": index, "content_index": 0, "part": part});
            self.write("response.content_part.added", fields, out);
        }
        self.open = Some(open);
    }

    /// Ends the item that grows.
    fn close(&mut self, status: &'static str, out: &mut Frames) {
        let Some(open) = self.open.take() else { return };
        let index = self.output.len();
        let item = match open {
            Open::Reasoning { id, text } => {
                let at = json!({"item_id": id, "output_index": index, "content_index": 0});
                self.write("response.reasoning_text.done", with(&at, "text", text.as_str()), out);
                let part = ContentPart::ReasoningText { text: text.clone() };
                self.write("response.content_part.done", with(&at, "part", to_value(&part)), out);
                reasoning_item(id, &text, status)
            }
            Open::Message { id, text, logprobs } => {
                let at = json!({"item_id": id, "output_index": index, "content_index": 0});
                let done = with(&with(&at, "text", text.as_str()), "logprobs", to_value(&logprobs));
                self.write("response.output_text.done", done, out);
                let part = OutputPart::new(text, logprobs);
                self.write("response.content_part.done", with(&at, "part", to_value(&part)), out);
                message_item(id, vec![part], status)
            }
            Open::Call { id, call_id, name, arguments } => {
                let fields =
                    json!({"item_id": id, "output_index": index, "name": name, "arguments": arguments});
                self.write("response.function_call_arguments.done", fields, out);
                OutputItem::FunctionCall { id, call_id, name, arguments, status }
            }
        };
        self.write("response.output_item.done", json!({"output_index": index, "item": item}), out);
        self.output.push(item);
    }

    fn end(&mut self, ending: Ending, out: &mut Frames) {
        let status = item_status(ending.reason);
        // An answer without anything is an empty text.
        if self.open.is_none() && self.output.is_empty() {
            let id = item_id("msg", self.request, 0);
            self.add(Open::Message { id, text: String::new(), logprobs: Vec::new() }, out);
        }
        self.close(status, out);
        let output = std::mem::take(&mut self.output);
        let response = self.response.clone().ended(output, ending.reason, ending.usage);
        let name = match response.status() {
            Status::Incomplete => "response.incomplete",
            _ => "response.completed",
        };
        self.write(name, json!({ "response": response }), out);
        if let Some(keep) = self.keep.take() {
            keep.keep(response);
        }
    }

    fn write(&mut self, name: &str, fields: Value, out: &mut Frames) {
        let mut event = json!({"type": name, "sequence_number": self.sequence_number});
        self.sequence_number += 1;
        if let (Value::Object(event), Value::Object(fields)) = (&mut event, fields) {
            event.extend(fields);
        }
        out.named(name, &event);
    }
}

impl Format for ResponseEvents {
    fn begin(&mut self, out: &mut Frames) {
        let response = to_value(&self.response);
        self.write("response.created", json!({ "response": response }), out);
        self.write("response.in_progress", json!({ "response": response }), out);
    }

    fn event(&mut self, _choice: usize, event: AnswerEvent, out: &mut Frames) {
        // Tokens go with the text that they are; those of anything else are not told in this protocol.
        if !matches!(event, AnswerEvent::Content(_) | AnswerEvent::Tokens(_)) {
            self.tokens.clear();
        }
        match event {
            // Not asked for in this protocol.
            AnswerEvent::Prompt(_) => {}
            AnswerEvent::Tokens(tokens) => self.tokens.extend(tokens),
            AnswerEvent::Reasoning(text) => self.reasoning(&text, out),
            AnswerEvent::Content(text) => self.content(&text, out),
            AnswerEvent::ToolCall { call: _, id: call_id, name } => {
                self.close("completed", out);
                let id = item_id("fc", self.request, self.output.len());
                self.add(Open::Call { id, call_id, name, arguments: String::new() }, out);
            }
            AnswerEvent::Arguments { call: _, text } => self.arguments(&text, out),
            AnswerEvent::ToolCallEnd { .. } => {}
            AnswerEvent::Ended(ending) => self.end(ending, out),
        }
    }

    fn finish(&mut self, _usage: TextUsage, _out: &mut Frames) {}

    fn error(&mut self, error: &ApiError, out: &mut Frames) {
        let failed = self.response.clone().failed(error);
        self.write("response.failed", json!({ "response": failed }), out);
    }
}

fn to_value(value: &impl Serialize) -> Value {
    serde_json::to_value(value).expect("numbers, strings and arrays of them")
}

fn with(at: &Value, name: &str, value: impl Into<Value>) -> Value {
    let mut fields = at.clone();
    fields[name] = value.into();
    fields
}
