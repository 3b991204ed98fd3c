//! Log-probabilities, as OpenAI's two endpoints and vLLM write them.

use crate::{prompt::ModelText, text::TokenInfo};
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;
use types::TokenId;

/// In place of minus infinity, which JSON has not: OpenAI's number for "very unlikely".
const LOGPROB_MIN: f32 = -9999.0;

/// `logprobs` of a chat's choice.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: (),
}

/// One token of an answer; `/v1/responses` writes it in the same words.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub(crate) struct ChatToken {
    #[serde(flatten)]
    token: ChatAlternative,
    top_logprobs: Vec<ChatAlternative>,
}

#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
struct ChatAlternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub(crate) fn new(tokens: &[TokenInfo], text: &ModelText) -> Self {
        Self { content: chat_tokens(tokens, text), refusal: () }
    }
}

impl ChatToken {
    /// About how much memory it takes.
    pub(crate) fn memory(&self) -> usize {
        let all = self.top_logprobs.iter().chain([&self.token]);
        all.map(|one| size_of::<ChatAlternative>() + one.token.len() + one.bytes.len()).sum()
    }
}

/// Each of these tokens, with its alternatives.
pub(crate) fn chat_tokens(tokens: &[TokenInfo], text: &ModelText) -> Vec<ChatToken> {
    let alternative = |token: TokenId, logprob: f32| {
        let bytes = text.token_bytes(token);
        let token = String::from_utf8_lossy(&bytes).into_owned();
        ChatAlternative { token, logprob: logprob.max(LOGPROB_MIN), bytes }
    };
    let told = tokens.iter().filter_map(|info| {
        let logprobs = info.logprobs.as_ref()?;
        let top = logprobs.top.iter().map(|&(token, logprob)| alternative(token, logprob));
        Some(ChatToken { token: alternative(info.token, logprobs.logprob), top_logprobs: top.collect() })
    });
    told.collect()
}

/// `logprobs` of a completion's choice.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub(crate) struct TextLogprobs {
    tokens: Vec<String>,
    /// None for the first token of a prompt.
    token_logprobs: Vec<Option<f32>>,
    /// The most probable tokens, and the one that it is.
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Characters of the choice's text before each token.
    text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// Adds tokens that begin at `offset`, which is moved past them.
    pub(crate) fn add(&mut self, tokens: &[TokenInfo], text: &ModelText, offset: &mut usize) {
        for info in tokens {
            let token = token_text(text, info.token);
            self.text_offset.push(*offset);
            if !text.is_special(info.token) {
                *offset += token.chars().count();
            }
            let logprobs = info.logprobs.as_ref();
            self.token_logprobs.push(logprobs.map(|logprobs| logprobs.logprob.max(LOGPROB_MIN)));
            self.top_logprobs.push(logprobs.map(|logprobs| {
                // The less probable first, so that of two tokens that read the same the other one stays.
                let top = logprobs.top.iter().rev();
                let top = top.map(|&(token, logprob)| (token_text(text, token), logprob.max(LOGPROB_MIN)));
                let mut top: BTreeMap<String, f32> = top.collect();
                top.entry(token.clone()).or_insert_with(|| logprobs.logprob.max(LOGPROB_MIN));
                top
            }));
            self.tokens.push(token);
        }
    }
}

/// A token's text, or its bytes where they are none.
fn token_text(text: &ModelText, token: TokenId) -> String {
    let bytes = text.token_bytes(token);
    String::from_utf8(bytes).unwrap_or_else(|error| {
        let bytes = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}"));
        format!("bytes:{}", bytes.collect::<String>())
    })
}

/// A token in vLLM's `prompt_logprobs`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct PromptToken {
    logprob: f32,
    /// Among the tokens that are told, from 1.
    rank: Option<usize>,
    decoded_token: String,
}

/// vLLM's `prompt_logprobs`: of each token of the prompt but the first, it and the most probable ones by id.
pub(crate) fn prompt_logprobs(
    tokens: &[TokenInfo],
    text: &ModelText,
) -> Vec<Option<BTreeMap<TokenId, PromptToken>>> {
    let of = |info: &TokenInfo| {
        let logprobs = info.logprobs.as_ref()?;
        let told = |token, logprob: f32, rank| {
            let decoded_token = String::from_utf8_lossy(&text.token_bytes(token)).into_owned();
            (token, PromptToken { logprob: logprob.max(LOGPROB_MIN), rank, decoded_token })
        };
        let top = logprobs.top.iter().enumerate();
        let mut all: BTreeMap<TokenId, PromptToken> =
            top.map(|(index, &(token, logprob))| told(token, logprob, Some(index + 1))).collect();
        let (token, own) = told(info.token, logprobs.logprob, None);
        all.entry(token).or_insert(own);
        Some(all)
    };
    tokens.iter().map(of).collect()
}
