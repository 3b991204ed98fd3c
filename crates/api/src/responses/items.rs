//! Items: what was said, called and answered, as `/v1/responses` takes and gives it.

use crate::{
    job::{Message, ToolCall, Whole},
    openai::{
        logprobs::{ChatToken, chat_tokens},
        request::Role,
    },
    prompt::ModelText,
    text_or::TextOr,
};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de::Error};
use serde_json::{Map, Value};
use types::RequestId;

/// `input`: a text of the user's, or items.
pub(super) type Input = TextOr<InputItem>;

/// An item of a request.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum InputItem {
    Typed(TypedItem),
    /// A message without a type.
    Plain(MessageItem),
}

/// An item with its type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum TypedItem {
    Message(MessageItem),
    FunctionCall {
        call_id: String,
        name: String,
        arguments: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<String>,
    },
    FunctionCallOutput {
        call_id: String,
        output: ItemContent,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<String>,
    },
    Reasoning {
        #[serde(default)]
        summary: Vec<ContentPart>,
        #[serde(default)]
        content: Option<Vec<ContentPart>>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<String>,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub(super) struct MessageItem {
    role: Role,
    content: ItemContent,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status: Option<String>,
}

/// A text, or parts.
pub(super) type ItemContent = TextOr<ContentPart>;

/// A part; images and files are refused by their type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum ContentPart {
    InputText { text: String },
    OutputText { text: String },
    Text { text: String },
    Refusal { refusal: String },
    SummaryText { text: String },
    ReasoningText { text: String },
}

impl ContentPart {
    fn text(&self) -> &str {
        match self {
            Self::InputText { text }
            | Self::OutputText { text }
            | Self::Text { text }
            | Self::SummaryText { text }
            | Self::ReasoningText { text } => text,
            Self::Refusal { refusal } => refusal,
        }
    }
}

fn joined(parts: &[ContentPart]) -> String {
    parts.iter().map(ContentPart::text).collect::<Vec<_>>().join("\n")
}

/// The text of a message or of a function's output.
fn text(content: &ItemContent) -> String {
    match content {
        TextOr::Text(text) => text.clone(),
        TextOr::Many(parts) => joined(parts),
    }
}

/// The items of an input.
pub(super) fn items(input: Input) -> Vec<InputItem> {
    input.many(|text| {
        let content = TextOr::Many(vec![ContentPart::InputText { text }]);
        InputItem::Typed(TypedItem::Message(MessageItem {
            role: Role::User,
            content,
            id: None,
            status: None,
        }))
    })
}

impl<'de> Deserialize<'de> for InputItem {
    /// By whether there is a type, so that an error says what is wrong with the one that was meant.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields: Map<String, Value> = Deserialize::deserialize(deserializer)?;
        let typed = fields.contains_key("type");
        let value = Value::Object(fields);
        let item = if typed {
            serde_json::from_value(value).map(Self::Typed)
        } else {
            serde_json::from_value(value).map(Self::Plain)
        };
        item.map_err(D::Error::custom)
    }
}

/// The messages that items are: what an assistant thought, said and called in a row is one.
pub(super) fn messages(items: &[InputItem]) -> Vec<Message> {
    let mut messages: Vec<Message> = Vec::new();
    // Whether the last message is an assistant's and may have more.
    let mut open = false;
    for item in items {
        let message = match item {
            InputItem::Plain(message) | InputItem::Typed(TypedItem::Message(message)) => {
                Message::new(message.role, text(&message.content))
            }
            InputItem::Typed(TypedItem::FunctionCallOutput { call_id, output, .. }) => {
                let message = Message::new(Role::Tool, text(output));
                Message { tool_call_id: Some(call_id.clone()), ..message }
            }
            InputItem::Typed(TypedItem::FunctionCall { call_id, name, arguments, .. }) => {
                let call = ToolCall { id: call_id.clone(), name: name.clone(), arguments: arguments.clone() };
                Message { tool_calls: vec![call], ..Message::new(Role::Assistant, "") }
            }
            InputItem::Typed(TypedItem::Reasoning { summary, content, .. }) => {
                let text = joined(content.as_deref().unwrap_or(summary));
                Message { reasoning: Some(text), ..Message::new(Role::Assistant, "") }
            }
        };
        let assistant = message.role == Role::Assistant;
        match messages.last_mut().filter(|_| assistant && open && message.reasoning.is_none()) {
            Some(last) => {
                if !last.content.is_empty() && !message.content.is_empty() {
                    last.content.push('\n');
                }
                last.content.push_str(&message.content);
                last.tool_calls.extend(message.tool_calls);
            }
            None => messages.push(message),
        }
        open = assistant;
    }
    messages
}

/// An item of a response.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum OutputItem {
    Reasoning {
        id: String,
        /// Always empty: all there is is in the content.
        summary: Vec<ContentPart>,
        content: Vec<ContentPart>,
        status: &'static str,
    },
    Message {
        id: String,
        role: &'static str,
        content: Vec<OutputPart>,
        status: &'static str,
    },
    FunctionCall {
        id: String,
        call_id: String,
        name: String,
        arguments: String,
        status: &'static str,
    },
}

/// A part of what was said.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum OutputPart {
    OutputText {
        text: String,
        /// Always empty.
        annotations: [(); 0],
        /// Of the text's tokens, where `include` asked for them.
        logprobs: Vec<ChatToken>,
    },
}

impl OutputPart {
    pub(super) fn new(text: impl Into<String>, logprobs: Vec<ChatToken>) -> Self {
        Self::OutputText { text: text.into(), annotations: [], logprobs }
    }
}

/// The id of an item: by its kind, the request and its place in the output.
pub(super) fn item_id(prefix: &str, request: RequestId, index: usize) -> String {
    format!("{prefix}_{request}{index:02x}")
}

pub(super) fn reasoning_item(id: String, text: &str, status: &'static str) -> OutputItem {
    let content = match text {
        "" => Vec::new(),
        text => vec![ContentPart::ReasoningText { text: text.to_owned() }],
    };
    OutputItem::Reasoning { id, summary: Vec::new(), content, status }
}

pub(super) fn message_item(id: String, content: Vec<OutputPart>, status: &'static str) -> OutputItem {
    OutputItem::Message { id, role: "assistant", content, status }
}

/// The items of a whole answer.
pub(super) fn output(
    request: RequestId,
    whole: &Whole,
    text: &ModelText,
    status: &'static str,
) -> Vec<OutputItem> {
    let mut items = Vec::new();
    if !whole.reasoning.is_empty() {
        items.push(reasoning_item(item_id("rs", request, 0), &whole.reasoning, status));
    }
    if !whole.content.is_empty() || whole.reasoning.is_empty() && whole.calls.is_empty() {
        let logprobs = whole.content_tokens().flat_map(|tokens| chat_tokens(tokens, text)).collect();
        let content = vec![OutputPart::new(whole.content.as_str(), logprobs)];
        items.push(message_item(item_id("msg", request, items.len()), content, status));
    }
    for ToolCall { id, name, arguments } in &whole.calls {
        items.push(OutputItem::FunctionCall {
            id: item_id("fc", request, items.len()),
            call_id: id.clone(),
            name: name.clone(),
            arguments: arguments.clone(),
            status,
        });
    }
    items
}

/// About how much memory the log-probabilities of these items take.
pub(super) fn logprobs_memory(items: &[OutputItem]) -> usize {
    let parts = items.iter().flat_map(|item| match item {
        OutputItem::Message { content, .. } => content.as_slice(),
        _ => &[],
    });
    parts.flat_map(|OutputPart::OutputText { logprobs, .. }| logprobs).map(ChatToken::memory).sum()
}

/// The message that an answer is to whoever goes on from it.
pub(super) fn said(items: &[OutputItem]) -> Message {
    let mut message = Message::new(Role::Assistant, "");
    for item in items {
        match item {
            OutputItem::Reasoning { content, .. } => message.reasoning = Some(joined(content)),
            OutputItem::Message { content, .. } => {
                for OutputPart::OutputText { text, .. } in content {
                    message.content.push_str(text);
                }
            }
            OutputItem::FunctionCall { call_id, name, arguments, .. } => {
                let (id, name, arguments) = (call_id.clone(), name.clone(), arguments.clone());
                message.tool_calls.push(ToolCall { id, name, arguments });
            }
        }
    }
    message
}
