//! The bodies of `/v1/chat/completions` and `/v1/completions`.
//!
//! Both share the fields of [`RawParameters`]. A field under `unsupported` would change the answer and is refused by
//! name unless its value asks for nothing; any other field that is not listed here is ignored.

use super::{
    given::Given,
    parameters::RawParameters,
    shape::{ResponseFormat, ShapeFields, StructuredOutputs},
    tools::{ToolCallJson, ToolChoiceJson, ToolJson},
    values::{Content, LogitBias, Object, PriorityValue, Prompts, Seed, SpeculationValue, Strings},
};
use crate::{
    error::ApiError,
    job::{Conversation, Message, Tool},
};
use schemars::JsonSchema;
use serde::{
    Deserialize, Serialize,
    de::{DeserializeOwned, IgnoredAny},
};
use serde_json::{Map, Value};
use types::{TokenId, limits};

/// Parses a body: one that cannot be read is an error that says where, or which field.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let parsed: Result<Object<T>, _> = serde_path_to_error::deserialize(&mut deserializer);
    let parsed = parsed.map_err(|error| {
        let mut path = error.path().to_string();
        let error = error.into_inner();
        if error.is_data() {
            let message = strip_position(&error);
            if let Some(missing) =
                message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`'))
            {
                path = if path == "." { missing.to_owned() } else { format!("{path}.{missing}") };
            }
            ApiError::Field { path, message }
        } else {
            ApiError::Syntax { message: syntax_message(&error) }
        }
    })?;
    deserializer.end().map_err(|error| ApiError::Syntax { message: syntax_message(&error) })?;
    Ok(parsed.0)
}

/// Why a text is not JSON, and where.
pub(super) fn syntax_message(error: &serde_json::Error) -> String {
    let message = error.to_string();
    match message.strip_prefix("recursion limit exceeded") {
        Some(place) => format!("it is nested more than {} levels deep{place}", limits::JSON_DEPTH_MAX),
        None => message,
    }
}

/// What tells the body of a chat from that of a text.
#[derive(Debug, Deserialize)]
pub(crate) struct Shape {
    #[serde(default)]
    pub(crate) messages: Option<IgnoredAny>,
}

/// A chat message.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct MessageJson {
    role: Role,
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    tool_call_id: Option<String>,
    #[serde(default)]
    reasoning_content: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<Object<ToolCallJson>>>,
    #[serde(default)]
    function_call: Given,
    #[serde(default)]
    audio: Given,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    System,
    /// OpenAI's newer name of `system`.
    Developer,
    User,
    Assistant,
    Tool,
}

/// `stream_options`.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
pub(crate) struct StreamOptions {
    #[serde(default)]
    pub(crate) include_usage: Option<bool>,
}

/// `prediction`: what the answer is expected to be like.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Prediction {
    #[serde(rename = "type")]
    _type: PredictionType,
    content: Content,
}

/// The only kind of a prediction.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum PredictionType {
    Content,
}

macro_rules! generation_request {
    (
        $(#[$meta:meta])*
        $name:ident { $($field:ident: $type:ty,)* }
        unsupported { $($other:ident: $accepts:expr,)* }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Deserialize, JsonSchema)]
        pub(crate) struct $name {
            $(pub(crate) $field: $type,)*
            #[serde(default)]
            pub(crate) model: Option<String>,
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
            #[schemars(range(min = 0.0, max = 1.0))]
            min_p: Option<f32>,
            #[serde(default)]
            #[schemars(range(min = 0.01, max = 10.0))]
            repetition_penalty: Option<f32>,
            #[serde(default)]
            #[schemars(range(min = -2.0, max = 2.0))]
            presence_penalty: Option<f32>,
            #[serde(default)]
            #[schemars(range(min = -2.0, max = 2.0))]
            frequency_penalty: Option<f32>,
            #[serde(default)]
            logit_bias: Option<LogitBias>,
            #[serde(default)]
            seed: Option<Seed>,
            #[serde(default)]
            stop: Option<Strings>,
            #[serde(default)]
            stop_token_ids: Option<Vec<TokenId>>,
            #[serde(default)]
            ignore_eos: Option<bool>,
            #[serde(default)]
            #[schemars(range(min = 0, max = 1_048_576))]
            max_tokens: Option<i64>,
            #[serde(default)]
            #[schemars(range(min = 1, max = 1_048_576))]
            max_completion_tokens: Option<i64>,
            #[serde(default)]
            #[schemars(regex(pattern = "^[!-~]{1,64}$"))]
            session_id: Option<String>,
            #[serde(default)]
            prompt_cache_key: Option<String>,
            #[serde(default)]
            user: Option<String>,
            #[serde(default)]
            cache_salt: Option<String>,
            #[serde(default)]
            priority: Option<PriorityValue>,
            #[serde(default)]
            #[schemars(range(min = 1, max = 3_600_000))]
            ttft_target_ms: Option<i64>,
            #[serde(default)]
            #[schemars(range(min = 1, max = 3_600_000))]
            tpot_target_ms: Option<i64>,
            #[serde(default)]
            #[schemars(range(min = 1, max = 128))]
            n: Option<i64>,
            #[serde(default)]
            #[schemars(range(min = 0, max = 20))]
            prompt_logprobs: Option<i64>,
            #[serde(default)]
            #[schemars(range(min = 0))]
            min_tokens: Option<i64>,
            #[serde(default)]
            prediction: Option<Object<Prediction>>,
            #[serde(default)]
            speculation: Option<SpeculationValue>,
            #[serde(default)]
            include_stop_str_in_output: Option<bool>,
            #[serde(default)]
            skip_special_tokens: Option<bool>,
            #[serde(default)]
            response_format: Option<Object<ResponseFormat>>,
            #[serde(default)]
            guided_json: Option<Value>,
            #[serde(default)]
            guided_regex: Option<String>,
            #[serde(default)]
            guided_choice: Option<Vec<String>>,
            #[serde(default)]
            guided_grammar: Option<String>,
            #[serde(default)]
            structured_outputs: Option<Object<StructuredOutputs>>,
            #[serde(default)]
            stream: Option<bool>,
            #[serde(default)]
            stream_options: Option<Object<StreamOptions>>,
            $(#[serde(default)] $other: Given,)*
        }

        impl $name {
            /// Refuses what would have to be dropped silently.
            fn refuse_unsupported(&self) -> Result<(), ApiError> {
                $({
                    let accepts: fn(&Given) -> bool = $accepts;
                    if !accepts(&self.$other) {
                        let value = self.$other.to_string();
                        return Err(ApiError::Unsupported { param: stringify!($other).to_owned(), value });
                    }
                })*
                Ok(())
            }

            /// Takes the fields that both requests share.
            fn take_parameters(&mut self) -> RawParameters {
                RawParameters {
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    repetition_penalty: self.repetition_penalty,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    logit_bias: self.logit_bias.take().unwrap_or_default(),
                    seed: self.seed,
                    stop: self.stop.take().unwrap_or_default(),
                    stop_token_ids: self.stop_token_ids.take().unwrap_or_default(),
                    ignore_eos: self.ignore_eos.unwrap_or(false),
                    max_tokens: self.max_tokens,
                    max_completion_tokens: self.max_completion_tokens,
                    session_id: self.session_id.take(),
                    prompt_cache_key: self.prompt_cache_key.take(),
                    user: self.user.take(),
                    cache_salt: self.cache_salt.take(),
                    priority: self.priority,
                    ttft_target_ms: self.ttft_target_ms,
                    tpot_target_ms: self.tpot_target_ms,
                    n: self.n,
                    prompt_logprobs: self.prompt_logprobs,
                    min_tokens: self.min_tokens,
                    prediction: self.prediction.take().map(|given| given.0.content.0).unwrap_or_default(),
                    speculation: self.speculation.unwrap_or_default(),
                    include_stop: self.include_stop_str_in_output.unwrap_or(false),
                    show_special: !self.skip_special_tokens.unwrap_or(true),
                    stream: self.stream.unwrap_or(false),
                    include_usage: self
                        .stream_options
                        .as_ref()
                        .and_then(|options| options.0.include_usage)
                        .unwrap_or(false),
                    ..RawParameters::default()
                }
            }

            /// Takes the fields that say what the answer must be like.
            pub(crate) fn take_shape(&mut self) -> ShapeFields {
                ShapeFields {
                    response_format: self.response_format.take(),
                    guided_json: self.guided_json.take(),
                    guided_regex: self.guided_regex.take(),
                    guided_choice: self.guided_choice.take(),
                    guided_grammar: self.guided_grammar.take(),
                    structured_outputs: self.structured_outputs.take(),
                }
            }
        }
    };
}

generation_request! {
    /// `POST /v1/chat/completions`.
    ChatCompletionRequest {
        messages: Vec<Object<MessageJson>>,
        tools: Option<Vec<Object<ToolJson>>>,
        tool_choice: Option<ToolChoiceJson>,
        parallel_tool_calls: Option<bool>,
        logprobs: Option<bool>,
        top_logprobs: Option<i64>,
        add_generation_prompt: Option<bool>,
        continue_final_message: Option<bool>,
        reasoning_effort: Option<String>,
        chat_template_kwargs: Option<Map<String, Value>>,
    }
    unsupported {
        functions: Given::is_nothing,
        function_call: |given| given.is_text(&["none", "auto"]),
        best_of: |given| given.is_number(1.0),
        audio: Given::is_nothing,
        modalities: |given| given.is_list_of("text"),
        web_search_options: Given::is_nothing,
        verbosity: |given| given.is_text(&["medium"]),
        documents: Given::is_nothing,
        chat_template: Given::is_nothing,
        add_special_tokens: Given::is_off,
        bad_words: Given::is_nothing,
        allowed_token_ids: Given::is_nothing,
        logits_processors: Given::is_nothing,
        typical_p: |given| given.is_number(1.0),
        length_penalty: |given| given.is_number(1.0),
        use_beam_search: Given::is_off,
        truncate_prompt_tokens: Given::is_nothing,
    }
}

generation_request! {
    /// `POST /v1/completions`.
    CompletionRequest {
        prompt: Prompts,
        echo: Option<bool>,
        best_of: Option<i64>,
        logprobs: Option<i64>,
    }
    unsupported {
        suffix: |given| given.is_text(&[""]),
        add_special_tokens: Given::is_on,
        bad_words: Given::is_nothing,
        allowed_token_ids: Given::is_nothing,
        logits_processors: Given::is_nothing,
        typical_p: |given| given.is_number(1.0),
        length_penalty: |given| given.is_number(1.0),
        use_beam_search: Given::is_off,
        truncate_prompt_tokens: Given::is_nothing,
    }
}

impl ChatCompletionRequest {
    /// Parses a body and refuses what would have to be dropped silently.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let request: Self = parse(body)?;
        request.refuse_unsupported()?;
        Ok(request)
    }

    /// What is asked, in no protocol's words.
    pub(crate) fn into_conversation(mut self) -> Result<Conversation, ApiError> {
        let (shape, shape_param) = self.take_shape().check()?;
        let mut parameters = self.take_parameters();
        parameters.logprobs_param = "top_logprobs";
        parameters.logprobs = match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, top) => Some(top.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, Some(top)) => {
                let message = format!("top_logprobs is {top}; logprobs must be true then");
                return Err(ApiError::parameter("top_logprobs", message));
            }
        };
        if parameters.stream && parameters.prompt_logprobs.is_some() {
            return Err(ApiError::parameter("prompt_logprobs", "prompt_logprobs cannot be streamed"));
        }
        let messages = self.messages.into_iter().enumerate();
        let messages = messages.map(|(index, Object(message))| message.check(index));
        let tools = self.tools.unwrap_or_default().into_iter().map(|Object(tool)| Tool::from(tool));
        Ok(Conversation {
            model: self.model,
            messages: messages.collect::<Result<_, _>>()?,
            tools: tools.collect(),
            tool_choice: self.tool_choice.map(|choice| choice.0).unwrap_or_default(),
            parallel_tool_calls: self.parallel_tool_calls.unwrap_or(true),
            thinking: None,
            reasoning_effort: self.reasoning_effort,
            template_kwargs: self.chat_template_kwargs.unwrap_or_default(),
            add_generation_prompt: self.add_generation_prompt.unwrap_or(true),
            continue_final_message: self.continue_final_message.unwrap_or(false),
            shape,
            shape_param,
            parameters,
        })
    }
}

impl MessageJson {
    fn check(self, index: usize) -> Result<Message, ApiError> {
        for (name, given) in [("function_call", &self.function_call), ("audio", &self.audio)] {
            if !given.is_nothing() {
                let param = format!("messages[{index}].{name}");
                return Err(ApiError::Unsupported { param, value: given.to_string() });
            }
        }
        if self.content.is_none() && self.role != Role::Assistant {
            let param = format!("messages[{index}].content");
            let message = format!("{param} is missing; only assistant messages may lack it");
            return Err(ApiError::Parameter { param, message });
        }
        let calls = self.tool_calls.unwrap_or_default();
        if !calls.is_empty() && self.role != Role::Assistant {
            let param = format!("messages[{index}].tool_calls");
            let message = format!("{param} is given; only assistant messages may have it");
            return Err(ApiError::Parameter { param, message });
        }
        let calls = calls.into_iter().enumerate();
        let calls =
            calls.map(|(call, Object(json))| json.check(&format!("messages[{index}].tool_calls[{call}]")));
        Ok(Message {
            role: self.role,
            content: self.content.unwrap_or_default().0,
            name: self.name,
            reasoning: self.reasoning_content,
            tool_calls: calls.collect::<Result<_, _>>()?,
            tool_call_id: self.tool_call_id,
        })
    }
}

impl CompletionRequest {
    /// Parses a body and refuses what would have to be dropped silently.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let request: Self = parse(body)?;
        request.refuse_unsupported()?;
        Ok(request)
    }

    /// Takes everything but the prompt, with what the answer must be like.
    pub(crate) fn take_checked(&mut self) -> Result<(RawParameters, ShapeFields), ApiError> {
        let echo = self.echo.unwrap_or(false);
        let parameters = RawParameters {
            best_of: self.best_of,
            logprobs: self.logprobs,
            logprobs_param: "logprobs",
            may_be_nothing: echo,
            ..self.take_parameters()
        };
        if parameters.stream && parameters.prompt_logprobs.is_some() {
            return Err(ApiError::parameter("prompt_logprobs", "prompt_logprobs cannot be streamed"));
        }
        Ok((parameters, self.take_shape()))
    }
}

/// serde_json's message without " at line … column …", which says little about a field that is named.
fn strip_position(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let position = format!(" at line {} column {}", error.line(), error.column());
    message.strip_suffix(&position).unwrap_or(&message).to_owned()
}
