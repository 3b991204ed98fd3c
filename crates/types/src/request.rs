//! What a client wants generated, checked once where it enters.

use crate::{CacheScope, RequestId, SamplingParams, Service, TokenId, limits};
use serde::{Deserialize, Serialize};

/// The parts of a [`GenerateRequest`], unchecked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateDraft {
    /// Names the request in every log line, frame and span.
    pub id: RequestId,
    /// A served model's name.
    pub model: String,
    /// The prompt; not empty.
    pub prompt: Vec<TokenId>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Tokens to generate at most; at least 1.
    pub max_tokens: u32,
    /// Tokens that end the text, beside the model's own.
    pub stop_tokens: Vec<TokenId>,
    /// Go on past the model's end-of-text tokens.
    pub ignore_eos: bool,
    /// How it is to be served among others.
    pub service: Service,
    /// Which cached prefixes it may use, and who keeps its own.
    pub cache: CacheScope,
    /// Tokens of the answer that there are already, fewer than `max_tokens`, which counts them: another node drew them and
    /// was lost. What is generated follows them, as if they had been drawn here.
    pub output: Vec<TokenId>,
    /// What the answer must be like.
    pub rules: OutputRules,
    /// What is told of tokens beside the tokens themselves.
    pub report: TokenReport,
    /// How its tokens may be guessed ahead; never changes which they are.
    pub speculation: Speculation,
}

/// What an answer must be like.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OutputRules {
    /// The whole text is a sentence of this grammar; it ends where nothing may follow.
    pub grammar: Option<Grammar>,
    /// Tokens of the answer before one that ends it may be drawn; at most `max_tokens`.
    pub min_tokens: u32,
}

/// A set of texts, of at most [`limits::GRAMMAR_BYTES_MAX`] bytes. Whether it means anything, and is not too large, is said by
/// the engine that compiles it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Grammar {
    /// JSON that is valid under a schema, itself as JSON.
    JsonSchema(String),
    /// What a regular expression matches as a whole, in the syntax of Rust's crate `regex`.
    Regex(String),
    /// A Lark grammar, as `llguidance` reads it.
    Lark(String),
}

impl Grammar {
    /// Its text.
    pub fn text(&self) -> &str {
        match self {
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text,
        }
    }
}

/// How many arrays and objects of a JSON text are within one another: 0 where it is only a word, a number or a string.
fn json_depth(json: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut in_string, mut escaped) = (false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// What is told of tokens beside the tokens themselves: log-probabilities, each with so many of the most probable
/// alternatives, at most [`limits::LOGPROBS_MAX`]; none: no log-probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TokenReport {
    /// Of the tokens of the answer.
    pub logprobs: Option<u32>,
    /// Of the tokens of the prompt, which is read without a cache then.
    pub prompt_logprobs: Option<u32>,
}

/// How the tokens of an answer may be guessed ahead: guesses that come true save time, and no guess changes the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Speculation {
    /// Whether they are guessed at all.
    pub enabled: bool,
    /// What the answer is expected to be like, at most [`limits::PREDICTION_TOKENS_MAX`] tokens; empty where nothing is
    /// known.
    pub prediction: Vec<TokenId>,
}

impl Default for Speculation {
    /// Guessed wherever it pays.
    fn default() -> Self {
        Self { enabled: true, prediction: Vec::new() }
    }
}

/// A request that is valid by itself; whether it fits a model's context is the engine's to say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "GenerateDraft", into = "GenerateDraft")]
pub struct GenerateRequest(GenerateDraft);

/// Why a request is invalid by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GenerateRequestError {
    /// Nothing to go on from.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// Longer than any frame may be.
    #[error("the prompt has {tokens} tokens; at most {} are allowed", limits::PROMPT_TOKENS_MAX)]
    PromptTooLong {
        /// Tokens given.
        tokens: usize,
    },
    /// Nothing, or too much, to generate.
    #[error("max_tokens is {value}; it must be from 1 to {}", limits::NEW_TOKENS_MAX)]
    MaxTokens {
        /// The value given.
        value: u32,
    },
    /// A latency target that cannot be meant.
    #[error("{name} is {value}; it must be from 1 to {}", limits::TARGET_MS_MAX)]
    Target {
        /// `ttft_target_ms` or `tpot_target_ms`.
        name: &'static str,
        /// The value given.
        value: u32,
    },
    /// A salt of no use to anyone.
    #[error("cache_salt has {bytes} bytes; at most {} are allowed", limits::CACHE_SALT_BYTES_MAX)]
    CacheSaltTooLong {
        /// Bytes given.
        bytes: usize,
    },
    /// Nothing is left to generate.
    #[error("the answer has {tokens} tokens already, and max_tokens is {max_tokens}")]
    Output {
        /// Tokens that there are.
        tokens: usize,
        /// Tokens asked for.
        max_tokens: u32,
    },
    /// A grammar larger than anybody writes.
    #[error("the grammar has {bytes} bytes; at most {} are allowed", limits::GRAMMAR_BYTES_MAX)]
    GrammarTooLong {
        /// Bytes given.
        bytes: usize,
    },
    /// A schema of more levels than anybody writes.
    #[error("the schema is nested {depth} levels deep; at most {} are allowed", limits::SCHEMA_DEPTH_MAX)]
    SchemaTooDeep {
        /// Levels given.
        depth: usize,
    },
    /// More tokens at least than at most.
    #[error("min_tokens is {value}; it must be at most max_tokens, which is {max_tokens}")]
    MinTokens {
        /// The value given.
        value: u32,
        /// Tokens at most.
        max_tokens: u32,
    },
    /// More alternatives than are told.
    #[error("{name} is {value}; it must be at most {}", limits::LOGPROBS_MAX)]
    Logprobs {
        /// `logprobs` or `prompt_logprobs`.
        name: &'static str,
        /// The value given.
        value: u32,
    },
    /// More log-probabilities than are kept.
    #[error(
        "prompt_logprobs of a prompt of {tokens} tokens; at most {} are allowed",
        limits::PROMPT_LOGPROB_TOKENS_MAX
    )]
    PromptLogprobs {
        /// Tokens given.
        tokens: usize,
    },
    /// A prediction longer than any frame may be.
    #[error("the prediction has {tokens} tokens; at most {} are allowed", limits::PREDICTION_TOKENS_MAX)]
    PredictionTooLong {
        /// Tokens given.
        tokens: usize,
    },
    /// Too many stop tokens.
    #[error("{count} stop tokens; at most {} are allowed", limits::STOP_TOKENS_MAX)]
    StopTokens {
        /// Tokens given.
        count: usize,
    },
}

impl TryFrom<GenerateDraft> for GenerateRequest {
    type Error = GenerateRequestError;

    fn try_from(draft: GenerateDraft) -> Result<Self, GenerateRequestError> {
        if draft.prompt.is_empty() {
            return Err(GenerateRequestError::EmptyPrompt);
        }
        if draft.prompt.len() > limits::PROMPT_TOKENS_MAX {
            return Err(GenerateRequestError::PromptTooLong { tokens: draft.prompt.len() });
        }
        if draft.max_tokens == 0 || draft.max_tokens > limits::NEW_TOKENS_MAX {
            return Err(GenerateRequestError::MaxTokens { value: draft.max_tokens });
        }
        if draft.output.len() >= draft.max_tokens as usize {
            let (tokens, max_tokens) = (draft.output.len(), draft.max_tokens);
            return Err(GenerateRequestError::Output { tokens, max_tokens });
        }
        if draft.stop_tokens.len() > limits::STOP_TOKENS_MAX {
            return Err(GenerateRequestError::StopTokens { count: draft.stop_tokens.len() });
        }
        if let Some(grammar) = &draft.rules.grammar
            && grammar.text().len() > limits::GRAMMAR_BYTES_MAX
        {
            return Err(GenerateRequestError::GrammarTooLong { bytes: grammar.text().len() });
        }
        if let Some(Grammar::JsonSchema(schema)) = &draft.rules.grammar {
            let depth = json_depth(schema);
            if depth > limits::SCHEMA_DEPTH_MAX {
                return Err(GenerateRequestError::SchemaTooDeep { depth });
            }
        }
        if draft.speculation.prediction.len() > limits::PREDICTION_TOKENS_MAX {
            return Err(GenerateRequestError::PredictionTooLong {
                tokens: draft.speculation.prediction.len(),
            });
        }
        if draft.rules.min_tokens > draft.max_tokens {
            let (value, max_tokens) = (draft.rules.min_tokens, draft.max_tokens);
            return Err(GenerateRequestError::MinTokens { value, max_tokens });
        }
        let TokenReport { logprobs, prompt_logprobs } = draft.report;
        for (name, count) in [("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)] {
            if let Some(value) = count.filter(|count| *count > limits::LOGPROBS_MAX) {
                return Err(GenerateRequestError::Logprobs { name, value });
            }
        }
        if prompt_logprobs.is_some() && draft.prompt.len() > limits::PROMPT_LOGPROB_TOKENS_MAX {
            return Err(GenerateRequestError::PromptLogprobs { tokens: draft.prompt.len() });
        }
        let targets = [
            ("ttft_target_ms", draft.service.ttft_target_ms),
            ("tpot_target_ms", draft.service.tpot_target_ms),
        ];
        for (name, target) in targets {
            if let Some(value) = target.filter(|value| !(1..=limits::TARGET_MS_MAX).contains(value)) {
                return Err(GenerateRequestError::Target { name, value });
            }
        }
        if let Some(salt) = draft.cache.salt.as_ref().filter(|salt| salt.len() > limits::CACHE_SALT_BYTES_MAX)
        {
            return Err(GenerateRequestError::CacheSaltTooLong { bytes: salt.len() });
        }
        Ok(Self(draft))
    }
}

impl From<GenerateRequest> for GenerateDraft {
    fn from(request: GenerateRequest) -> Self {
        request.0
    }
}

impl std::ops::Deref for GenerateRequest {
    type Target = GenerateDraft;

    fn deref(&self) -> &GenerateDraft {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_of_json_are_counted_outside_of_strings() {
        for (json, depth) in [
            ("1", 0),
            ("[]", 1),
            (r#"{"a": [1, {"b": []}], "c": {}}"#, 4),
            (r#"{"[[[": "{{\"{{", "b\\": [1]}"#, 2),
            (r#"["\\", [["]"]]]"#, 3),
            ("]]}}[[", 2),
            ("", 0),
        ] {
            assert_eq!(json_depth(json), depth, "{json}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let check = |change: fn(&mut GenerateDraft), expected: &str| {
            let mut draft = GenerateDraft {
                id: RequestId(1),
                model: "m".to_owned(),
                prompt: vec![1],
                sampling: SamplingParams::greedy(),
                max_tokens: 1,
                stop_tokens: Vec::new(),
                ignore_eos: false,
                service: Service::default(),
                cache: CacheScope::default(),
                output: Vec::new(),
                rules: OutputRules::default(),
                report: TokenReport::default(),
                speculation: Speculation::default(),
            };
            assert!(GenerateRequest::try_from(draft.clone()).is_ok());
            change(&mut draft);
            let error = GenerateRequest::try_from(draft).expect_err(expected).to_string();
            assert_eq!(error, expected);
        };
        check(|d| d.prompt.clear(), "the prompt is empty");
        check(|d| d.max_tokens = 0, "max_tokens is 0; it must be from 1 to 1048576");
        check(|d| d.output = vec![1], "the answer has 1 tokens already, and max_tokens is 1");
        check(|d| d.stop_tokens = vec![0; 65], "65 stop tokens; at most 64 are allowed");
        let expected = "ttft_target_ms is 0; it must be from 1 to 3600000";
        check(|d| d.service.ttft_target_ms = Some(0), expected);
        let expected = "tpot_target_ms is 3600001; it must be from 1 to 3600000";
        check(|d| d.service.tpot_target_ms = Some(3_600_001), expected);
        let expected = "cache_salt has 257 bytes; at most 256 are allowed";
        check(|d| d.cache.salt = Some("x".repeat(257)), expected);
        let expected = "the grammar has 262145 bytes; at most 262144 are allowed";
        check(|d| d.rules.grammar = Some(Grammar::Regex("x".repeat(262_145))), expected);
        let expected = "the schema is nested 65 levels deep; at most 64 are allowed";
        check(|d| d.rules.grammar = Some(Grammar::JsonSchema("[".repeat(65) + &"]".repeat(65))), expected);
        let expected = "the prediction has 131073 tokens; at most 131072 are allowed";
        check(|d| d.speculation.prediction = vec![1; 131_073], expected);
        let expected = "min_tokens is 2; it must be at most max_tokens, which is 1";
        check(|d| d.rules.min_tokens = 2, expected);
        check(|d| d.report.logprobs = Some(21), "logprobs is 21; it must be at most 20");
        check(|d| d.report.prompt_logprobs = Some(30), "prompt_logprobs is 30; it must be at most 20");
        let expected = "prompt_logprobs of a prompt of 32769 tokens; at most 32768 are allowed";
        let long = |d: &mut GenerateDraft| {
            (d.prompt, d.report.prompt_logprobs) = (vec![1; 32_769], Some(0));
        };
        check(long, expected);
    }
}
