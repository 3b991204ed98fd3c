//! The bodies of `/api/chat` and `/api/generate`, and what they ask for.

use crate::{
    error::ApiError,
    job::{Conversation, Message, Shape, Tool, ToolCall},
    openai::{
        given::Given,
        parameters::RawParameters,
        request::{self, Role},
        values::{Object, Seed, Strings},
    },
};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

/// A body, with the fields that both have beside its own. They are no struct of their own in it, since errors inside such a
/// one would not say where they are.
macro_rules! ollama_request {
    ($(#[$meta:meta])* $name:ident { $($field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Deserialize, JsonSchema)]
        pub(crate) struct $name {
            $(#[serde(default)] $field: $type,)*
            /// True unless told otherwise.
            #[serde(default)]
            stream: Option<bool>,
            /// `json`, or a JSON schema.
            #[serde(default)]
            format: Option<Value>,
            /// Whether the model is to think, or how much, in a word.
            #[serde(default)]
            think: Option<Value>,
            #[serde(default)]
            options: Option<Object<Options>>,
            #[serde(default)]
            logprobs: Given,
            #[serde(default)]
            top_logprobs: Given,
        }

        impl $name {
            fn take_common(&mut self) -> Common {
                Common {
                    format: self.format.take(),
                    think: self.think.take(),
                    options: self.options.take().map(|Object(options)| options).unwrap_or_default(),
                    logprobs: std::mem::take(&mut self.logprobs),
                    top_logprobs: std::mem::take(&mut self.top_logprobs),
                }
            }
        }
    };
}

ollama_request! {
    /// `POST /api/chat`. A chat without messages only asks for the model to be there.
    ChatRequest {
        model: Option<String>,
        messages: Option<Vec<Object<ChatMessage>>>,
        tools: Option<Vec<Object<ToolParam>>>,
    }
}

ollama_request! {
    /// `POST /api/generate`. One without a prompt only asks for the model to be there. A `raw` prompt is given to the model
    /// as it is, without its template.
    TextRequest {
        model: Option<String>,
        prompt: Option<String>,
        system: Option<String>,
        raw: Option<bool>,
        suffix: Given,
        images: Given,
        template: Given,
        context: Given,
    }
}

/// What both have.
#[derive(Debug)]
struct Common {
    format: Option<Value>,
    think: Option<Value>,
    options: Options,
    logprobs: Given,
    top_logprobs: Given,
}

/// A message.
#[derive(Debug, Deserialize, JsonSchema)]
struct ChatMessage {
    role: Role,
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    thinking: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<Object<CallParam>>>,
    #[serde(default)]
    tool_name: Option<String>,
    #[serde(default)]
    tool_call_id: Option<String>,
    #[serde(default)]
    images: Given,
}

#[derive(Debug, Deserialize, JsonSchema)]
struct CallParam {
    #[serde(default)]
    id: Option<String>,
    function: Object<FunctionCall>,
}

#[derive(Debug, Deserialize, JsonSchema)]
struct FunctionCall {
    name: String,
    #[serde(default)]
    arguments: Option<Map<String, Value>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
struct ToolParam {
    function: Object<FunctionParam>,
}

#[derive(Debug, Deserialize, JsonSchema)]
struct FunctionParam {
    name: String,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    parameters: Option<Value>,
}

/// How tokens are drawn. What says how a model is loaded (`num_ctx`, `num_gpu` and such) is for whoever runs a node.
#[derive(Debug, Default, Deserialize, JsonSchema)]
struct Options {
    /// Tokens at most; negative ones: as many as the context allows.
    #[serde(default)]
    num_predict: Option<i64>,
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 2.0))]
    temperature: Option<f32>,
    #[serde(default)]
    #[schemars(range(min = -1))]
    top_k: Option<i64>,
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    top_p: Option<f32>,
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    min_p: Option<f32>,
    #[serde(default)]
    seed: Option<Seed>,
    #[serde(default)]
    stop: Option<Strings>,
    #[serde(default)]
    #[schemars(range(min = 0.01, max = 10.0))]
    repeat_penalty: Option<f32>,
    #[serde(default)]
    #[schemars(range(min = -2.0, max = 2.0))]
    presence_penalty: Option<f32>,
    #[serde(default)]
    #[schemars(range(min = -2.0, max = 2.0))]
    frequency_penalty: Option<f32>,
    #[serde(default)]
    typical_p: Given,
    #[serde(default)]
    tfs_z: Given,
    #[serde(default)]
    mirostat: Given,
}

/// What a body asks for.
#[derive(Debug)]
pub(super) enum Asked {
    /// Whether the model is there.
    Nothing { model: Option<String> },
    /// An answer.
    Conversation(Box<Conversation>),
    /// A text to go on with.
    Raw { model: Option<String>, prompt: String, shape: Shape, parameters: Box<RawParameters> },
}

impl ChatRequest {
    /// Whether the answer is streamed, and what is asked.
    pub(super) fn parse(body: &[u8]) -> Result<(bool, Asked), ApiError> {
        let mut request: Self = request::parse(body)?;
        let common = request.take_common();
        let Self { model, messages, tools, stream, .. } = request;
        let stream = stream.unwrap_or(true);
        let Some(messages) = messages.filter(|messages| !messages.is_empty()) else {
            return Ok((stream, Asked::Nothing { model }));
        };
        let messages = messages.into_iter().enumerate();
        let messages = messages.map(|(index, Object(message))| message.into_message(index));
        let tools = tools.unwrap_or_default().into_iter().map(|Object(ToolParam { function })| {
            let Object(FunctionParam { name, description, parameters }) = function;
            Tool { name, description, parameters, strict: false }
        });
        let conversation = Conversation {
            model,
            messages: messages.collect::<Result<_, _>>()?,
            tools: tools.collect(),
            ..common.conversation()?
        };
        Ok((stream, Asked::Conversation(Box::new(conversation))))
    }
}

impl TextRequest {
    /// Whether the answer is streamed, and what is asked.
    pub(super) fn parse(body: &[u8]) -> Result<(bool, Asked), ApiError> {
        let mut request: Self = request::parse(body)?;
        let common = request.take_common();
        for (name, given, off) in [
            ("suffix", &request.suffix, request.suffix.is_text(&[""])),
            ("images", &request.images, request.images.is_nothing()),
            ("template", &request.template, request.template.is_text(&[""])),
            ("context", &request.context, request.context.is_nothing()),
        ] {
            if !off {
                return Err(ApiError::Unsupported { param: name.to_owned(), value: given.to_string() });
            }
        }
        let Self { model, prompt, system, raw, stream, .. } = request;
        let stream = stream.unwrap_or(true);
        let Some(prompt) = prompt.filter(|prompt| !prompt.is_empty()) else {
            return Ok((stream, Asked::Nothing { model }));
        };
        let conversation = common.conversation()?;
        if raw.unwrap_or(false) {
            let Conversation { shape, parameters, .. } = conversation;
            return Ok((stream, Asked::Raw { model, prompt, shape, parameters: Box::new(parameters) }));
        }
        let system = system.filter(|system| !system.is_empty());
        let system = system.map(|system| Message::new(Role::System, system));
        let messages = system.into_iter().chain([Message::new(Role::User, prompt)]).collect();
        Ok((stream, Asked::Conversation(Box::new(Conversation { model, messages, ..conversation }))))
    }
}

impl ChatMessage {
    fn into_message(self, index: usize) -> Result<Message, ApiError> {
        if !self.images.is_nothing() {
            let (param, value) = (format!("messages[{index}].images"), self.images.to_string());
            return Err(ApiError::Unsupported { param, value });
        }
        let calls = self.tool_calls.unwrap_or_default().into_iter().enumerate();
        let calls = calls.map(|(call, Object(CallParam { id, function }))| {
            let Object(FunctionCall { name, arguments }) = function;
            // Ollama's clients name no calls; templates want names.
            let id = id.unwrap_or_else(|| format!("call_{index}_{call}"));
            ToolCall { id, name, arguments: Value::Object(arguments.unwrap_or_default()).to_string() }
        });
        Ok(Message {
            name: self.tool_name,
            reasoning: self.thinking.filter(|thinking| !thinking.is_empty()),
            tool_calls: calls.collect(),
            tool_call_id: self.tool_call_id,
            ..Message::new(self.role, self.content.unwrap_or_default())
        })
    }
}

impl Common {
    /// All but model, messages and tools.
    fn conversation(self) -> Result<Conversation, ApiError> {
        let options = self.options;
        for (name, given, off) in [
            ("logprobs", &self.logprobs, self.logprobs.is_off()),
            ("top_logprobs", &self.top_logprobs, self.top_logprobs.is_number(0.0)),
            ("options.typical_p", &options.typical_p, options.typical_p.is_number(1.0)),
            ("options.tfs_z", &options.tfs_z, options.tfs_z.is_number(1.0)),
            ("options.mirostat", &options.mirostat, options.mirostat.is_number(0.0)),
        ] {
            if !off {
                return Err(ApiError::Unsupported { param: name.to_owned(), value: given.to_string() });
            }
        }
        let shape = match self.format {
            None | Some(Value::Null) => Shape::Free,
            Some(Value::String(text)) if text.is_empty() => Shape::Free,
            Some(Value::String(text)) if text == "json" => Shape::JsonObject,
            Some(Value::Object(schema)) => Shape::JsonSchema(Value::Object(schema)),
            Some(other) => {
                let message = format!("format is {other}; it must be \"json\" or a JSON schema");
                return Err(ApiError::parameter("format", message));
            }
        };
        let (thinking, reasoning_effort) = match self.think {
            None | Some(Value::Null) => (None, None),
            Some(Value::Bool(think)) => (Some(think), None),
            Some(Value::String(effort)) => (Some(true), Some(effort)),
            Some(other) => {
                let message = format!("think is {other}; it must be true, false or a word such as \"high\"");
                return Err(ApiError::parameter("think", message));
            }
        };
        Ok(Conversation {
            shape,
            shape_param: "format",
            thinking,
            reasoning_effort,
            parameters: RawParameters {
                temperature: options.temperature,
                top_k: options.top_k,
                top_p: options.top_p,
                min_p: options.min_p,
                seed: options.seed,
                stop: options.stop.unwrap_or_default(),
                repetition_penalty: options.repeat_penalty,
                presence_penalty: options.presence_penalty,
                frequency_penalty: options.frequency_penalty,
                max_tokens: options.num_predict.filter(|&tokens| tokens >= 0),
                ..RawParameters::default()
            },
            ..Conversation::default()
        })
    }
}
