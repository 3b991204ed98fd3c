//! The bodies of `/v1/chat/completions` and `/v1/completions`.
//!
//! Both share the fields of [`RawParameters`]. A field under `unsupported` would change the answer and is refused by
//! name unless its value asks for nothing; any other field that is not listed here is ignored.

use super::{
    given::Given,
    parameters::RawParameters,
    values::{Content, LogitBias, Object, PriorityValue, Prompts, Seed, Strings},
};
use crate::error::ApiError;
use serde::{
    Deserialize, Serialize,
    de::{DeserializeOwned, IgnoredAny},
};
use types::TokenId;

/// Parses a body: one that cannot be read is an error that says where, or which field.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let parsed: Result<Object<T>, _> = serde_path_to_error::deserialize(&mut deserializer);
    let parsed = parsed.map_err(|error| {
        let path = error.path().to_string();
        let error = error.into_inner();
        if error.is_data() {
            ApiError::Field { path, message: strip_position(&error) }
        } else {
            ApiError::Syntax { message: error.to_string() }
        }
    })?;
    deserializer.end().map_err(|error| ApiError::Syntax { message: error.to_string() })?;
    Ok(parsed.0)
}

/// What tells the body of a chat from that of a text.
#[derive(Debug, Deserialize)]
pub(crate) struct Shape {
    #[serde(default)]
    pub(crate) messages: Option<IgnoredAny>,
}

/// A chat message.
#[derive(Debug, Deserialize)]
pub(crate) struct Message {
    pub(crate) role: Role,
    #[serde(default)]
    pub(crate) content: Option<Content>,
    #[serde(default)]
    pub(crate) name: Option<String>,
    #[serde(default)]
    pub(crate) tool_call_id: Option<String>,
    #[serde(default)]
    pub(crate) reasoning_content: Option<String>,
    #[serde(default)]
    tool_calls: Given,
    #[serde(default)]
    function_call: Given,
    #[serde(default)]
    audio: Given,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct StreamOptions {
    #[serde(default)]
    pub(crate) include_usage: Option<bool>,
}

macro_rules! generation_request {
    (
        $(#[$meta:meta])*
        $name:ident { $($field:ident: $type:ty,)* }
        unsupported { $($other:ident: $accepts:expr,)* }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Deserialize)]
        pub(crate) struct $name {
            $(pub(crate) $field: $type,)*
            #[serde(default)]
            pub(crate) model: Option<String>,
            #[serde(default)]
            temperature: Option<f32>,
            #[serde(default)]
            top_p: Option<f32>,
            #[serde(default)]
            top_k: Option<i64>,
            #[serde(default)]
            min_p: Option<f32>,
            #[serde(default)]
            repetition_penalty: Option<f32>,
            #[serde(default)]
            presence_penalty: Option<f32>,
            #[serde(default)]
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
            max_tokens: Option<i64>,
            #[serde(default)]
            max_completion_tokens: Option<i64>,
            #[serde(default)]
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
            ttft_target_ms: Option<i64>,
            #[serde(default)]
            tpot_target_ms: Option<i64>,
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
            pub(crate) fn take_parameters(&mut self) -> RawParameters {
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
                    stream: self.stream.unwrap_or(false),
                    include_usage: self
                        .stream_options
                        .as_ref()
                        .and_then(|options| options.0.include_usage)
                        .unwrap_or(false),
                }
            }
        }
    };
}

generation_request! {
    /// `POST /v1/chat/completions`.
    ChatCompletionRequest {
        messages: Vec<Object<Message>>,
        add_generation_prompt: Option<bool>,
        reasoning_effort: Option<String>,
        chat_template_kwargs: Option<serde_json::Map<String, serde_json::Value>>,
    }
    unsupported {
        tools: Given::is_nothing,
        tool_choice: |given| given.is_text(&["none", "auto"]),
        functions: Given::is_nothing,
        function_call: |given| given.is_text(&["none", "auto"]),
        response_format: |given| given.is_object_of("text"),
        n: |given| given.is_number(1.0),
        best_of: |given| given.is_number(1.0),
        logprobs: Given::is_off,
        top_logprobs: |given| given.is_number(0.0),
        prompt_logprobs: Given::is_nothing,
        audio: Given::is_nothing,
        modalities: |given| given.is_list_of("text"),
        web_search_options: Given::is_nothing,
        verbosity: |given| given.is_text(&["medium"]),
        documents: Given::is_nothing,
        chat_template: Given::is_nothing,
        continue_final_message: Given::is_off,
        add_special_tokens: Given::is_off,
        guided_json: Given::is_nothing,
        guided_regex: Given::is_nothing,
        guided_choice: Given::is_nothing,
        guided_grammar: Given::is_nothing,
        structured_outputs: Given::is_nothing,
        min_tokens: |given| given.is_number(0.0),
        bad_words: Given::is_nothing,
        allowed_token_ids: Given::is_nothing,
        logits_processors: Given::is_nothing,
        typical_p: |given| given.is_number(1.0),
        length_penalty: |given| given.is_number(1.0),
        use_beam_search: Given::is_off,
        include_stop_str_in_output: Given::is_off,
        skip_special_tokens: Given::is_on,
        truncate_prompt_tokens: Given::is_nothing,
    }
}

generation_request! {
    /// `POST /v1/completions`.
    CompletionRequest {
        prompt: Prompts,
    }
    unsupported {
        suffix: |given| given.is_text(&[""]),
        echo: Given::is_off,
        n: |given| given.is_number(1.0),
        best_of: |given| given.is_number(1.0),
        logprobs: Given::is_nothing,
        prompt_logprobs: Given::is_nothing,
        response_format: |given| given.is_object_of("text"),
        add_special_tokens: Given::is_on,
        guided_json: Given::is_nothing,
        guided_regex: Given::is_nothing,
        guided_choice: Given::is_nothing,
        guided_grammar: Given::is_nothing,
        structured_outputs: Given::is_nothing,
        min_tokens: |given| given.is_number(0.0),
        bad_words: Given::is_nothing,
        allowed_token_ids: Given::is_nothing,
        logits_processors: Given::is_nothing,
        typical_p: |given| given.is_number(1.0),
        length_penalty: |given| given.is_number(1.0),
        use_beam_search: Given::is_off,
        include_stop_str_in_output: Given::is_off,
        skip_special_tokens: Given::is_on,
        truncate_prompt_tokens: Given::is_nothing,
    }
}

impl ChatCompletionRequest {
    /// Parses a body and refuses what would have to be dropped silently.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let request: Self = parse(body)?;
        request.refuse_unsupported()?;
        if request.messages.is_empty() {
            return Err(ApiError::parameter("messages", "messages is []; at least one message is needed"));
        }
        for (index, Object(message)) in request.messages.iter().enumerate() {
            let fields = [
                ("tool_calls", &message.tool_calls),
                ("function_call", &message.function_call),
                ("audio", &message.audio),
            ];
            for (name, given) in fields {
                if !given.is_nothing() {
                    let param = format!("messages[{index}].{name}");
                    return Err(ApiError::Unsupported { param, value: given.to_string() });
                }
            }
            if message.content.is_none() && message.role != Role::Assistant {
                let param = format!("messages[{index}].content");
                let message = format!("{param} is missing; only assistant messages may lack it");
                return Err(ApiError::Parameter { param, message });
            }
        }
        Ok(request)
    }
}

impl CompletionRequest {
    /// Parses a body and refuses what would have to be dropped silently.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let request: Self = parse(body)?;
        request.refuse_unsupported()?;
        Ok(request)
    }
}

/// serde_json's message without " at line … column …", which says little about a field that is named.
fn strip_position(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let position = format!(" at line {} column {}", error.line(), error.column());
    message.strip_suffix(&position).unwrap_or(&message).to_owned()
}
