//! What `/v1` answers: whole completions, chunks of streams, lists of models.

use serde::Serialize;

/// A whole completion or one chunk of a stream.
#[derive(Debug, Serialize)]
pub(crate) struct Completion<'a, C> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) system_fingerprint: &'a str,
    pub(crate) choices: Vec<C>,
    /// Absent unless asked for; then `null` in all chunks of a stream but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Option<UsageJson>>,
}

/// A whole answer of an assistant.
#[derive(Debug, Serialize)]
pub(crate) struct ChatChoice {
    pub(crate) index: usize,
    pub(crate) message: AssistantMessage,
    pub(crate) logprobs: (),
    pub(crate) finish_reason: FinishReasonJson,
}

/// What an assistant said.
#[derive(Debug, Serialize)]
pub(crate) struct AssistantMessage {
    pub(crate) role: &'static str,
    pub(crate) content: String,
    pub(crate) refusal: (),
}

/// A piece of an assistant's answer.
#[derive(Debug, Serialize)]
pub(crate) struct ChatDelta<'a> {
    pub(crate) index: usize,
    pub(crate) delta: Delta<'a>,
    pub(crate) logprobs: (),
    pub(crate) finish_reason: Option<FinishReasonJson>,
}

/// What a chunk adds.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<&'a str>,
}

/// A continuation of a prompt, or a piece of it.
#[derive(Debug, Serialize)]
pub(crate) struct TextChoice<'a> {
    pub(crate) index: usize,
    pub(crate) text: &'a str,
    pub(crate) logprobs: (),
    pub(crate) finish_reason: Option<FinishReasonJson>,
}

/// Why a text ended, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FinishReasonJson {
    Stop,
    Length,
}

/// `usage`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct UsageJson {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) total_tokens: u32,
    /// Absent where nobody said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_tokens_details: Option<PromptTokensDetails>,
}

/// `usage.prompt_tokens_details`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct PromptTokensDetails {
    pub(crate) cached_tokens: u32,
}

/// `GET /v1/sessions`.
#[derive(Debug, Serialize)]
pub(crate) struct SessionList<'a> {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<Session<'a>>,
    /// Nodes that did not answer in time.
    pub(crate) incomplete: &'a [String],
}

/// `DELETE /v1/sessions/{id}`.
#[derive(Debug, Serialize)]
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
#[derive(Debug, Serialize)]
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
#[derive(Debug, Serialize)]
pub(crate) struct ModelList<'a> {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<Model<'a>>,
}

/// `GET /v1/models/{id}`.
#[derive(Debug, Serialize)]
pub(crate) struct Model<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) owned_by: &'a str,
    /// Tokens of prompt and output together, as vLLM names it.
    pub(crate) max_model_len: u32,
}
