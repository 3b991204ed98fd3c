//! What a client asks of an assistant, in no protocol's words, and what of it can be wrong.

use crate::{
    error::ApiError,
    limits::{TOOL_NAME_BYTES_MAX, TOOLS_MAX},
    openai::{parameters::RawParameters, request::Role},
};
use serde_json::{Map, Value, json};
use types::limits;

/// A conversation to be answered; `default()` is one without messages, which is refused.
#[derive(Debug, Clone)]
pub(crate) struct Conversation {
    /// None or empty: the only model that is served.
    pub(crate) model: Option<String>,
    pub(crate) messages: Vec<Message>,
    pub(crate) tools: Vec<Tool>,
    pub(crate) tool_choice: ToolChoice,
    /// Whether an answer may have several calls.
    pub(crate) parallel_tool_calls: bool,
    /// Whether the model is to reason, where its template has a choice.
    pub(crate) thinking: Option<bool>,
    /// How much, in the words of the template.
    pub(crate) reasoning_effort: Option<String>,
    /// Further variables of the template; these have the last word.
    pub(crate) template_kwargs: Map<String, Value>,
    pub(crate) add_generation_prompt: bool,
    /// The answer goes on where the last message ends.
    pub(crate) continue_final_message: bool,
    /// What the text of the answer must be like, where it has one: calls have their own form.
    pub(crate) shape: Shape,
    /// What the client calls that.
    pub(crate) shape_param: &'static str,
    /// Everything else.
    pub(crate) parameters: RawParameters,
}

impl Default for Conversation {
    fn default() -> Self {
        Self {
            model: None,
            messages: Vec::new(),
            tools: Vec::new(),
            tool_choice: ToolChoice::Auto,
            parallel_tool_calls: true,
            thinking: None,
            reasoning_effort: None,
            template_kwargs: Map::new(),
            add_generation_prompt: true,
            continue_final_message: false,
            shape: Shape::Free,
            shape_param: "response_format",
            parameters: RawParameters::default(),
        }
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Message {
    pub(crate) role: Role,
    /// Empty where an assistant only called tools.
    pub(crate) content: String,
    pub(crate) name: Option<String>,
    /// Of an assistant: what it thought before.
    pub(crate) reasoning: Option<String>,
    /// Of an assistant.
    pub(crate) tool_calls: Vec<ToolCall>,
    /// Of a tool's answer: the call that it answers.
    pub(crate) tool_call_id: Option<String>,
}

impl Message {
    /// A message that is only text.
    pub(crate) fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            name: None,
            reasoning: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
        }
    }
}

/// A call that an assistant made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ToolCall {
    pub(crate) id: String,
    pub(crate) name: String,
    /// JSON text.
    pub(crate) arguments: String,
}

/// A tool that may be called.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    /// A JSON schema of its arguments.
    pub(crate) parameters: Option<Value>,
    /// Whether arguments must be as the schema says, also where the model need not call the tool.
    pub(crate) strict: bool,
}

impl Tool {
    /// The schema of the arguments.
    pub(crate) fn schema(&self) -> Value {
        self.parameters.clone().unwrap_or_else(|| json!({"type": "object"}))
    }

    /// As templates are given it.
    pub(super) fn to_template(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".to_owned(), self.name.as_str().into());
        function.insert("description".to_owned(), self.description.as_deref().unwrap_or_default().into());
        let parameters = self.parameters.clone();
        function.insert(
            "parameters".to_owned(),
            parameters.unwrap_or_else(|| json!({"type": "object", "properties": {}})),
        );
        json!({"type": "function", "function": function})
    }
}

/// Whether tools may or must be called.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// They are not: the model does not hear of them.
    None,
    /// As the model likes.
    #[default]
    Auto,
    /// At least one.
    Required,
    /// This one, once.
    Named(String),
}

/// What a text must be like.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) enum Shape {
    #[default]
    Free,
    /// Any JSON object.
    JsonObject,
    /// What a JSON schema allows.
    JsonSchema(Value),
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// llguidance's dialect of Lark.
    Lark(String),
}

impl Shape {
    /// Refuses a schema nested deeper than may be; `param` is what the client calls the shape.
    pub(crate) fn check(&self, param: &str) -> Result<(), ApiError> {
        let Self::JsonSchema(schema) = self else { return Ok(()) };
        check_depth(schema, param, &format!("{param} has a schema that"))
    }
}

/// Refuses what is nested too deep; `what` begins the message.
fn check_depth(schema: &Value, param: &str, what: &str) -> Result<(), ApiError> {
    let (depth, max) = (depth(schema), limits::SCHEMA_DEPTH_MAX);
    if depth <= max {
        return Ok(());
    }
    let message = format!("{what} is nested {depth} levels deep; at most {max} are allowed");
    Err(ApiError::parameter(param, message))
}

/// How many arrays and objects are within one another; a body's parser has bounded that.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(entries) => 1 + entries.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

impl Conversation {
    /// Whether tools are to be told of and looked for.
    pub(super) fn has_tools(&self) -> bool {
        !self.tools.is_empty() && self.tool_choice != ToolChoice::None
    }

    /// Refuses what cannot be meant.
    pub(super) fn check(&self) -> Result<(), ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::parameter("messages", "messages is []; at least one message is needed"));
        }
        self.check_tools()?;
        self.shape.check(self.shape_param)?;
        if self.continue_final_message {
            let last = self.messages.last();
            let message = if self.add_generation_prompt {
                "continue_final_message is true; add_generation_prompt must be false then"
            } else if last.is_none_or(|last| last.content.is_empty() || !last.tool_calls.is_empty()) {
                "continue_final_message is true; the last message must have content and no tool_calls then"
            } else {
                return Ok(());
            };
            return Err(ApiError::parameter("continue_final_message", message));
        }
        Ok(())
    }

    fn check_tools(&self) -> Result<(), ApiError> {
        if self.tools.len() > TOOLS_MAX {
            let count = self.tools.len();
            return Err(ApiError::parameter(
                "tools",
                format!("tools has {count} entries; at most {TOOLS_MAX} are allowed"),
            ));
        }
        for (index, tool) in self.tools.iter().enumerate() {
            let name = &tool.name;
            let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:/".contains(&byte);
            if name.is_empty() || name.len() > TOOL_NAME_BYTES_MAX || !name.bytes().all(is_good) {
                let param = format!("tools[{index}].function.name");
                let message = format!(
                    "{param} is {name:?}; it must be of 1 to {TOOL_NAME_BYTES_MAX} letters, digits and _-.:/"
                );
                return Err(ApiError::Parameter { param, message });
            }
            if self.tools[..index].iter().any(|other| other.name == *name) {
                let param = format!("tools[{index}].function.name");
                let message = format!("{param} is {name:?}, as another tool's is");
                return Err(ApiError::Parameter { param, message });
            }
            if tool.parameters.as_ref().is_some_and(|parameters| !parameters.is_object()) {
                let param = format!("tools[{index}].function.parameters");
                let message = format!("{param} must be a JSON schema, an object");
                return Err(ApiError::Parameter { param, message });
            }
            if let Some(parameters) = &tool.parameters {
                let param = format!("tools[{index}].function.parameters");
                check_depth(parameters, &param, &param)?;
            }
        }
        let wrong = match &self.tool_choice {
            ToolChoice::None | ToolChoice::Auto => return Ok(()),
            ToolChoice::Required if self.tools.is_empty() => {
                "tool_choice asks for a call, and there are no tools".to_owned()
            }
            ToolChoice::Named(name) if self.tools.iter().all(|tool| tool.name != *name) => {
                let names: Vec<&str> = self.tools.iter().map(|tool| tool.name.as_str()).collect();
                format!("tool_choice names {name:?}; the tools are: {}", names.join(", "))
            }
            ToolChoice::Required | ToolChoice::Named(_) => return Ok(()),
        };
        Err(ApiError::parameter("tool_choice", wrong))
    }
}
