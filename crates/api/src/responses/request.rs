//! The body of `/v1/responses`, and the conversation that it is.

use super::items::{Input, InputItem, items, messages};
use crate::{
    error::ApiError,
    job::{Conversation, Message, Shape, Tool, ToolChoice},
    openai::{
        given::Given,
        parameters::RawParameters,
        request::{self, Role},
        values::Object,
    },
};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de::Error};
use serde_json::{Map, Value, json};

/// What `include` may have: the log-probabilities of the text's tokens.
const TEXT_LOGPROBS: &str = "message.output_text.logprobs";
/// Characters of another name that an error repeats.
const SHOWN_CHARS_MAX: usize = 64;

/// `POST /v1/responses`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct ResponsesRequest {
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    input: Option<Input>,
    #[serde(default)]
    pub(super) instructions: Option<String>,
    #[serde(default)]
    pub(super) previous_response_id: Option<String>,
    /// Whether the response is kept to be retrieved and continued; true unless told otherwise.
    #[serde(default)]
    store: Option<bool>,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 2.0))]
    temperature: Option<f32>,
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    top_p: Option<f32>,
    #[serde(default)]
    #[schemars(range(min = 1, max = 1_048_576))]
    max_output_tokens: Option<i64>,
    #[serde(default)]
    tools: Option<Vec<Object<ToolParam>>>,
    #[serde(default)]
    tool_choice: Option<ToolChoiceParam>,
    #[serde(default)]
    parallel_tool_calls: Option<bool>,
    #[serde(default)]
    text: Option<Object<TextParam>>,
    #[serde(default)]
    reasoning: Option<Object<ReasoningParam>>,
    #[serde(default)]
    metadata: Option<Map<String, Value>>,
    #[serde(default)]
    user: Option<String>,
    #[serde(default)]
    prompt_cache_key: Option<String>,
    #[serde(default)]
    truncation: Given,
    /// What is told beside the usual.
    #[serde(default)]
    include: Option<Vec<String>>,
    #[serde(default)]
    background: Given,
    /// Alternatives to each token of the text, where `include` asks for its log-probabilities.
    #[serde(default)]
    #[schemars(range(min = 0, max = 20))]
    top_logprobs: Option<i64>,
    #[serde(default)]
    max_tool_calls: Given,
    #[serde(default)]
    prompt: Given,
    #[serde(default)]
    conversation: Given,
}

/// A tool. Those that OpenAI runs itself are refused by their type.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(super) struct ToolParam {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    parameters: Option<Value>,
    #[serde(default)]
    strict: Option<bool>,
}

/// A word, or a function by its name.
#[derive(Debug, Clone, Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum ToolChoiceParam {
    Word(ToolChoiceWord),
    Function(ToolChoiceFunction),
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum ToolChoiceWord {
    None,
    Auto,
    Required,
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(super) enum ToolChoiceFunction {
    Function { name: String },
}

#[derive(Debug, Deserialize, JsonSchema)]
struct TextParam {
    #[serde(default)]
    format: Option<TextFormat>,
    #[serde(default)]
    verbosity: Given,
}

/// What the text must be like.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum TextFormat {
    Text {},
    JsonObject {},
    JsonSchema {
        name: String,
        schema: Value,
        #[serde(default)]
        description: Option<String>,
        #[serde(default)]
        strict: Option<bool>,
    },
}

#[derive(Debug, Deserialize, JsonSchema)]
struct ReasoningParam {
    #[serde(default)]
    effort: Option<String>,
    #[serde(default)]
    summary: Given,
    #[serde(default)]
    generate_summary: Given,
}

/// What a response repeats of its request.
#[derive(Debug, Clone, Default, Serialize, JsonSchema)]
pub(super) struct Echo {
    instructions: Option<String>,
    max_output_tokens: Option<i64>,
    metadata: Map<String, Value>,
    parallel_tool_calls: bool,
    previous_response_id: Option<String>,
    reasoning: EchoReasoning,
    store: bool,
    temperature: f32,
    text: EchoText,
    tool_choice: ToolChoiceParam,
    tools: Vec<ToolParam>,
    top_logprobs: i64,
    top_p: f32,
    truncation: &'static str,
    user: Option<String>,
}

#[derive(Debug, Clone, Default, Serialize, JsonSchema)]
struct EchoReasoning {
    effort: Option<String>,
    summary: Option<String>,
}

#[derive(Debug, Clone, Default, Serialize, JsonSchema)]
struct EchoText {
    format: TextFormat,
}

/// A request, in its parts.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) stream: bool,
    pub(super) store: bool,
    pub(super) echo: Echo,
    /// What was said in this request.
    pub(super) input: Vec<InputItem>,
    /// The same, in no protocol's words, without instructions.
    pub(super) messages: Vec<Message>,
    /// All there is to do, but for the messages.
    pub(super) conversation: Conversation,
}

impl ResponsesRequest {
    /// Parses a body and refuses what would have to be dropped silently.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let request: Self = request::parse(body)?;
        let off = |param: &str, given: &Given, fits: bool| match fits {
            true => Ok(()),
            false => Err(ApiError::Unsupported { param: param.to_owned(), value: given.to_string() }),
        };
        off("truncation", &request.truncation, request.truncation.is_text(&["disabled"]))?;
        let included = request.include.iter().flatten().enumerate();
        if let Some((index, other)) = included.into_iter().find(|(_, name)| *name != TEXT_LOGPROBS) {
            let shown: String = other.chars().take(SHOWN_CHARS_MAX).collect();
            return Err(ApiError::Unsupported {
                param: format!("include[{index}]"),
                value: format!("{shown:?}"),
            });
        }
        off("background", &request.background, request.background.is_off())?;
        off("max_tool_calls", &request.max_tool_calls, request.max_tool_calls.is_nothing())?;
        off("prompt", &request.prompt, request.prompt.is_nothing())?;
        off("conversation", &request.conversation, request.conversation.is_nothing())?;
        if let Some(Object(text)) = &request.text {
            off("text.verbosity", &text.verbosity, text.verbosity.is_text(&["medium"]))?;
        }
        if let Some(Object(reasoning)) = &request.reasoning {
            // What a model thinks is told whole; there is nobody to sum it up.
            let auto = |given: &Given| given.is_text(&["auto"]);
            off("reasoning.summary", &reasoning.summary, auto(&reasoning.summary))?;
            let (older, name) = (&reasoning.generate_summary, "reasoning.generate_summary");
            off(name, older, auto(older))?;
        }
        Ok(request)
    }

    pub(super) fn into_parts(self) -> Result<Asked, ApiError> {
        let input = items(self.input.unwrap_or_default());
        if input.is_empty() && self.previous_response_id.is_none() {
            return Err(ApiError::parameter("input", "input is empty; at least one item is needed"));
        }
        let messages = messages(&input);
        let logprobs = match (self.include.is_some_and(|names| !names.is_empty()), self.top_logprobs) {
            (true, top) => Some(top.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, Some(top)) => {
                let message = format!("top_logprobs is {top}; include must have {TEXT_LOGPROBS:?} then");
                return Err(ApiError::parameter("top_logprobs", message));
            }
        };
        let params: Vec<ToolParam> =
            self.tools.unwrap_or_default().into_iter().map(|Object(tool)| tool).collect();
        let tools = params.iter().enumerate().map(|(index, tool)| tool.to_tool(index));
        let tools = tools.collect::<Result<Vec<_>, _>>()?;
        let tool_choice = self.tool_choice.unwrap_or_default();
        let format = self.text.and_then(|Object(text)| text.format).unwrap_or_default();
        let effort = self.reasoning.and_then(|Object(reasoning)| reasoning.effort);
        let parallel_tool_calls = self.parallel_tool_calls.unwrap_or(true);
        let store = self.store.unwrap_or(true);
        let echo = Echo {
            instructions: self.instructions,
            max_output_tokens: self.max_output_tokens,
            metadata: self.metadata.unwrap_or_default(),
            parallel_tool_calls,
            previous_response_id: self.previous_response_id,
            reasoning: EchoReasoning { effort: effort.clone(), summary: None },
            store,
            temperature: self.temperature.unwrap_or(1.0),
            text: EchoText { format: format.clone() },
            tool_choice: tool_choice.clone(),
            tools: params,
            top_logprobs: logprobs.unwrap_or(0),
            top_p: self.top_p.unwrap_or(1.0),
            truncation: "disabled",
            user: self.user.clone(),
        };
        let conversation = Conversation {
            model: self.model,
            tools,
            tool_choice: match tool_choice {
                ToolChoiceParam::Word(ToolChoiceWord::None) => ToolChoice::None,
                ToolChoiceParam::Word(ToolChoiceWord::Auto) => ToolChoice::Auto,
                ToolChoiceParam::Word(ToolChoiceWord::Required) => ToolChoice::Required,
                ToolChoiceParam::Function(ToolChoiceFunction::Function { name }) => ToolChoice::Named(name),
            },
            parallel_tool_calls,
            reasoning_effort: effort,
            shape_param: "text.format",
            shape: match format {
                TextFormat::Text {} => Shape::Free,
                TextFormat::JsonObject {} => Shape::JsonObject,
                TextFormat::JsonSchema { schema, .. } => Shape::JsonSchema(schema),
            },
            parameters: RawParameters {
                temperature: self.temperature,
                top_p: self.top_p,
                logprobs,
                logprobs_param: "top_logprobs",
                max_tokens: self.max_output_tokens,
                user: self.user,
                prompt_cache_key: self.prompt_cache_key,
                ..RawParameters::default()
            },
            ..Conversation::default()
        };
        Ok(Asked { stream: self.stream.unwrap_or(false), store, echo, input, messages, conversation })
    }
}

impl<'de> Deserialize<'de> for ToolChoiceParam {
    /// By its kind, so that an error says what is wrong with the one that was meant.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let choice = if value.is_string() {
            serde_json::from_value(value).map(Self::Word)
        } else {
            serde_json::from_value(value).map(Self::Function)
        };
        choice.map_err(D::Error::custom)
    }
}

impl Default for TextFormat {
    fn default() -> Self {
        Self::Text {}
    }
}

impl Default for ToolChoiceParam {
    fn default() -> Self {
        Self::Word(ToolChoiceWord::Auto)
    }
}

impl Echo {
    /// The message that instructions are; they hold for one response only.
    pub(super) fn instructions(&self) -> Option<Message> {
        self.instructions.as_ref().map(|text| Message::new(Role::System, text.as_str()))
    }

    pub(super) fn previous(&self) -> Option<&str> {
        self.previous_response_id.as_deref()
    }
}

impl ToolParam {
    fn to_tool(&self, index: usize) -> Result<Tool, ApiError> {
        if self.kind != "function" {
            let param = format!("tools[{index}].type");
            return Err(ApiError::Unsupported { param, value: format!("{:?}", self.kind) });
        }
        Ok(Tool {
            name: self.name.clone(),
            description: self.description.clone(),
            parameters: self.parameters.clone().or_else(|| Some(json!({"type": "object"}))),
            strict: self.strict.unwrap_or(false),
        })
    }
}
