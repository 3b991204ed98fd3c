//! What `/v1` answers: whole completions, chunks of streams, lists of models.

use super::logprobs::{ChatLogprobs, PromptToken, TextLogprobs};
use crate::{prompt::unix_seconds, text::TextUsage};
use schemars::JsonSchema;
use serde::Serialize;
use std::{collections::BTreeMap, time::SystemTime};
use types::{ModelCard, RequestId, TokenId};

/// What all chunks of an answer share.
#[derive(Debug)]
pub(crate) struct Head {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
}

impl Head {
    /// `prefix` is what the answer's id begins with.
    pub(crate) fn new(prefix: &str, id: RequestId, card: &ModelCard) -> Self {
        Self {
            id: format!("{prefix}-{id}"),
            created: unix_seconds(SystemTime::now()),
            model: card.name.clone(),
            // Weights and KV format: what decides whether a seed gives the same text again.
            fingerprint: format!("fp_{:012x}", card.root.0 >> 80),
        }
    }

    pub(crate) fn with<C>(
        &self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Option<UsageJson>>,
    ) -> Completion<'_, C> {
        Completion {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.fingerprint,
            choices,
            usage,
        }
    }
}

/// A whole completion or one chunk of a stream.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Completion<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<C>,
    /// Absent unless asked for; then `null` in all chunks of a stream but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageJson>>,
}

/// A whole chat, with what vLLM tells of the prompt beside OpenAI's fields.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChatWhole<'a> {
    #[serde(flatten)]
    pub(crate) completion: Completion<'a, ChatChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_logprobs: Option<Vec<Option<BTreeMap<TokenId, PromptToken>>>>,
}

/// A whole answer of an assistant.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChatChoice {
    pub(crate) index: usize,
    pub(crate) message: AssistantMessage,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: FinishReasonJson,
}

/// What an assistant said.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct AssistantMessage {
    pub(crate) role: &'static str,
    /// Null where it only called tools.
    pub(crate) content: Option<String>,
    pub(crate) refusal: (),
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<CallJson>,
}

/// A call of a tool.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct CallJson {
    pub(crate) id: String,
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    pub(crate) function: FunctionJson,
}

/// What is called.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct FunctionJson {
    pub(crate) name: String,
    pub(crate) arguments: String,
}

/// A piece of an assistant's answer.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChatDelta<'a> {
    pub(crate) index: usize,
    pub(crate) delta: Delta<'a>,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: Option<FinishReasonJson>,
}

/// What a chunk adds.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub(crate) struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<Option<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tool_calls: Option<[CallDelta<'a>; 1]>,
}

/// A piece of a call: the first one has id, type and name.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct CallDelta<'a> {
    pub(crate) index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<&'static str>,
    pub(crate) function: FunctionDelta<'a>,
}

/// A piece of what is called.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<&'a str>,
    pub(crate) arguments: &'a str,
}

/// A continuation of a prompt, or a piece of it.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TextChoice<'a> {
    pub(crate) index: usize,
    pub(crate) text: &'a str,
    pub(crate) logprobs: Option<TextLogprobs>,
    pub(crate) finish_reason: Option<FinishReasonJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_logprobs: Option<Vec<Option<BTreeMap<TokenId, PromptToken>>>>,
}

/// Why a text ended, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FinishReasonJson {
    Stop,
    Length,
    ToolCalls,
}

/// `usage`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct UsageJson {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    /// Absent where nobody said.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<PromptTokensDetails>,
    /// Absent where reasoning is not told apart and nothing was guessed ahead.
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionTokensDetails>,
}

/// `usage.prompt_tokens_details`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

/// `usage.completion_tokens_details`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
struct CompletionTokensDetails {
    /// Absent where reasoning is not told apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_tokens: Option<u32>,
    /// Tokens guessed ahead, by a `prediction` or otherwise, that came true.
    accepted_prediction_tokens: u32,
    /// Tokens guessed ahead that did not come true.
    rejected_prediction_tokens: u32,
}

impl UsageJson {
    pub(crate) fn of(usage: TextUsage) -> Self {
        let reasoning_tokens = usage.reasoning_tokens;
        let (accepted_prediction_tokens, rejected_prediction_tokens) = usage.drafts.unwrap_or((0, 0));
        let details = CompletionTokensDetails {
            reasoning_tokens,
            accepted_prediction_tokens,
            rejected_prediction_tokens,
        };
        let guessed = accepted_prediction_tokens > 0 || rejected_prediction_tokens > 0;
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            prompt_tokens_details: usage
                .cached_tokens
                .map(|cached_tokens| PromptTokensDetails { cached_tokens }),
            completion_tokens_details: (reasoning_tokens.is_some() || guessed).then_some(details),
        }
    }
}

/// `GET /v1/sessions`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SessionList<'a> {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<Session<'a>>,
    /// Nodes that did not answer in time.
    pub(crate) incomplete: &'a [String],
}

/// `DELETE /v1/sessions/{id}`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SessionDeletion<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) deleted: bool,
    /// What was deleted.
    pub(crate) data: Vec<Session<'a>>,
    /// Nodes that did not answer in time, and may have it still.
    pub(crate) incomplete: &'a [String],
}

/// A session on one node.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Session<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    /// The node's name.
    pub(crate) node: &'a str,
    pub(crate) tokens: u32,
    pub(crate) idle_s: f32,
    pub(crate) expires_in_s: f32,
}

/// `GET /v1/models`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ModelList<'a> {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<Model<'a>>,
}

/// `GET /v1/models/{id}`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Model<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) owned_by: &'a str,
    /// Tokens of prompt and output together, as vLLM names it.
    pub(crate) max_model_len: u32,
}
