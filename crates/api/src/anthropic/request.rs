//! The bodies of `/v1/messages` and `/v1/messages/count_tokens`, and the conversations that they are.

use super::content::{self, Block, Content, blocks};
use crate::{
    error::ApiError,
    job::{Conversation, Message, Shape, Tool, ToolCall, ToolChoice},
    openai::{
        given::Given,
        parameters::RawParameters,
        request::{self, Role},
        values::{Object, Strings},
    },
};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

/// `POST /v1/messages`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct MessagesRequest {
    #[serde(default)]
    model: Option<String>,
    #[schemars(length(min = 1))]
    messages: Vec<Object<InputMessage>>,
    #[serde(default)]
    system: Option<Content>,
    /// Not needed to count tokens.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1_048_576))]
    max_tokens: Option<i64>,
    #[serde(default)]
    stop_sequences: Option<Vec<String>>,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 2.0))]
    temperature: Option<f32>,
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    top_p: Option<f32>,
    #[serde(default)]
    #[schemars(range(min = -1))]
    top_k: Option<i64>,
    #[serde(default)]
    metadata: Option<Object<Metadata>>,
    #[serde(default)]
    tools: Option<Vec<Object<ToolParam>>>,
    #[serde(default)]
    tool_choice: Option<ToolChoiceParam>,
    #[serde(default)]
    thinking: Option<Thinking>,
    #[serde(default)]
    output_config: Option<Object<OutputConfig>>,
    /// The older place of `output_config.format`.
    #[serde(default)]
    output_format: Option<OutputFormat>,
    #[serde(default)]
    container: Given,
    #[serde(default)]
    mcp_servers: Given,
    #[serde(default)]
    context_management: Given,
}

/// A turn.
#[derive(Debug, Deserialize, JsonSchema)]
struct InputMessage {
    role: Speaker,
    content: Content,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Speaker {
    User,
    Assistant,
}

#[derive(Debug, Deserialize, JsonSchema)]
struct Metadata {
    /// Requests of one user go to the same node where others are no better.
    #[serde(default)]
    user_id: Option<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
struct ToolParam {
    /// `custom`, or absent; a tool that a server runs is refused.
    #[serde(default, rename = "type")]
    kind: Option<String>,
    name: String,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    input_schema: Option<Value>,
    #[serde(default)]
    strict: Option<bool>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
enum ToolChoiceParam {
    Auto {
        #[serde(default)]
        disable_parallel_tool_use: bool,
    },
    Any {
        #[serde(default)]
        disable_parallel_tool_use: bool,
    },
    Tool {
        name: String,
        #[serde(default)]
        #[expect(dead_code, reason = "one tool is called once in any case")]
        disable_parallel_tool_use: bool,
    },
    None {},
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Thinking {
    Enabled {
        /// Tokens that are meant for thinking. A model here does not know of it; `max_tokens` bounds both together.
        #[expect(dead_code, reason = "no model here can be told of it")]
        budget_tokens: u32,
    },
    Disabled {},
    Adaptive {},
}

#[derive(Debug, Deserialize, JsonSchema)]
struct OutputConfig {
    #[serde(default)]
    format: Option<OutputFormat>,
    #[serde(default)]
    effort: Option<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum OutputFormat {
    JsonSchema { schema: Value },
}

impl MessagesRequest {
    /// Parses the body of a message to be answered.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let request: Self = request::parse(body)?;
        if request.max_tokens.is_none() {
            return Err(ApiError::parameter("max_tokens", "max_tokens is missing"));
        }
        Ok(request)
    }

    /// Parses the body of a message whose tokens are to be counted.
    pub(crate) fn parse_to_count(body: &[u8]) -> Result<Self, ApiError> {
        request::parse(body)
    }

    pub(crate) fn stream(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// What is asked, in no protocol's words.
    pub(crate) fn conversation(self) -> Result<Conversation, ApiError> {
        for (name, given) in [
            ("container", &self.container),
            ("mcp_servers", &self.mcp_servers),
            ("context_management", &self.context_management),
        ] {
            if !given.is_nothing() {
                return Err(ApiError::Unsupported { param: name.to_owned(), value: given.to_string() });
            }
        }
        let mut messages = Vec::new();
        if let Some(system) = self.system {
            let mut texts = Vec::new();
            for (at, block) in blocks(system).into_iter().enumerate() {
                match block {
                    Block::Text { text } => texts.push(text),
                    other => return Err(misplaced(&format!("system[{at}]"), &other)),
                }
            }
            messages.push(Message::new(Role::System, texts.join("\n")));
        }
        let mut prefilled = false;
        let turns = self.messages.len();
        for (index, Object(message)) in self.messages.into_iter().enumerate() {
            prefilled = message.role == Speaker::Assistant;
            match message.role {
                Speaker::User => user(index, message.content, &mut messages)?,
                Speaker::Assistant => messages.push(assistant(index, message.content)?),
            }
        }
        let last = messages.last().filter(|_| prefilled);
        if last.is_some_and(|last| last.content.is_empty() || !last.tool_calls.is_empty()) {
            let param = format!("messages[{}].content", turns - 1);
            let message = format!(
                "{param}: a last turn of the assistant's is the beginning of the answer; it must have text and no tool_use"
            );
            return Err(ApiError::Parameter { param, message });
        }
        let (tool_choice, parallel_tool_calls) = match self.tool_choice {
            None => (ToolChoice::Auto, true),
            Some(ToolChoiceParam::None {}) => (ToolChoice::None, true),
            Some(ToolChoiceParam::Auto { disable_parallel_tool_use }) => {
                (ToolChoice::Auto, !disable_parallel_tool_use)
            }
            Some(ToolChoiceParam::Any { disable_parallel_tool_use }) => {
                (ToolChoice::Required, !disable_parallel_tool_use)
            }
            Some(ToolChoiceParam::Tool { name, .. }) => (ToolChoice::Named(name), false),
        };
        let tools = self.tools.unwrap_or_default().into_iter().enumerate();
        let tools = tools.map(|(index, Object(tool))| tool.into_tool(index)).collect::<Result<_, _>>()?;
        let OutputConfig { format, effort } =
            self.output_config.map_or(OutputConfig { format: None, effort: None }, |Object(config)| config);
        Ok(Conversation {
            model: self.model,
            messages,
            tools,
            tool_choice,
            parallel_tool_calls,
            thinking: match self.thinking {
                Some(Thinking::Enabled { .. }) => Some(true),
                Some(Thinking::Disabled {}) => Some(false),
                Some(Thinking::Adaptive {}) | None => None,
            },
            reasoning_effort: effort,
            // A turn of the assistant's at the end is the beginning of the answer.
            add_generation_prompt: !prefilled,
            continue_final_message: prefilled,
            shape_param: "output_config.format",
            shape: match format.or(self.output_format) {
                Some(OutputFormat::JsonSchema { schema }) => Shape::JsonSchema(schema),
                None => Shape::Free,
            },
            parameters: RawParameters {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                stop: Strings(self.stop_sequences.unwrap_or_default()),
                max_tokens: self.max_tokens,
                user: self.metadata.and_then(|Object(metadata)| metadata.user_id),
                ..RawParameters::default()
            },
            ..Conversation::default()
        })
    }
}

impl ToolParam {
    fn into_tool(self, index: usize) -> Result<Tool, ApiError> {
        if let Some(kind) = self.kind.filter(|kind| kind != "custom") {
            let param = format!("tools[{index}].type");
            return Err(ApiError::Unsupported { param, value: format!("{kind:?}") });
        }
        Ok(Tool {
            name: self.name,
            description: self.description,
            parameters: self.input_schema,
            strict: self.strict.unwrap_or(false),
        })
    }
}

/// A user's turn: answers of tools are messages of their own.
fn user(index: usize, content: Content, messages: &mut Vec<Message>) -> Result<(), ApiError> {
    let mut texts: Vec<String> = Vec::new();
    let mut said = false;
    for (at, block) in blocks(content).into_iter().enumerate() {
        let param = format!("messages[{index}].content[{at}]");
        match block {
            Block::Text { text } => texts.push(text),
            Block::ToolResult { tool_use_id, content, is_error } => {
                if !texts.is_empty() {
                    messages.push(Message::new(Role::User, std::mem::take(&mut texts).join("\n")));
                }
                let text =
                    content.map(|content| content::text(content, &param)).transpose()?.unwrap_or_default();
                let text = if is_error { format!("Error: {text}") } else { text };
                let message = Message::new(Role::Tool, text);
                messages.push(Message { tool_call_id: Some(tool_use_id), ..message });
                said = true;
            }
            other => return Err(misplaced(&param, &other)),
        }
    }
    if !texts.is_empty() || !said {
        messages.push(Message::new(Role::User, texts.join("\n")));
    }
    Ok(())
}

/// An assistant's turn.
fn assistant(index: usize, content: Content) -> Result<Message, ApiError> {
    let mut message = Message::new(Role::Assistant, "");
    let mut texts: Vec<String> = Vec::new();
    let mut thoughts: Vec<String> = Vec::new();
    for (at, block) in blocks(content).into_iter().enumerate() {
        let param = format!("messages[{index}].content[{at}]");
        match block {
            Block::Text { text } => texts.push(text),
            Block::Thinking { thinking, .. } => thoughts.push(thinking),
            Block::ToolUse { id, name, input } => {
                message.tool_calls.push(ToolCall { id, name, arguments: Value::Object(input).to_string() });
            }
            other => return Err(misplaced(&param, &other)),
        }
    }
    message.content = texts.join("\n");
    message.reasoning = (!thoughts.is_empty()).then(|| thoughts.join("\n"));
    Ok(message)
}

fn misplaced(param: &str, block: &Block) -> ApiError {
    let message = format!("{param} is a block of type {:?}, which is not for there", block.kind());
    ApiError::parameter(param, message)
}
