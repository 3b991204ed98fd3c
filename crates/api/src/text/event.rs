//! What happens to one answer, in no protocol's words.

use types::{TokenId, TokenLogprobs};

/// One thing that became known of an answer. The texts of all events of a kind, joined, are the whole, wherever they are cut.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum AnswerEvent {
    /// What there is to tell of the prompt's tokens, in order, before everything else; where it was asked for.
    Prompt(Vec<TokenInfo>),
    /// What there is to tell of tokens of the answer, where it was asked for: of each one whose text is no longer held back.
    /// It comes before the text.
    Tokens(Vec<TokenInfo>),
    /// More of what the model thinks before it answers; not empty.
    Reasoning(String),
    /// More text; not empty.
    Content(String),
    /// A tool is called. Calls count from 0, and one ends before the next begins.
    ToolCall {
        /// Which one.
        call: usize,
        /// Names it in the conversation.
        id: String,
        /// The tool.
        name: String,
    },
    /// More of the arguments of the call that began last: JSON text, not empty.
    Arguments {
        /// Which one.
        call: usize,
        /// A piece of it.
        text: String,
    },
    /// The arguments are complete, or will never be.
    ToolCallEnd {
        /// Which one.
        call: usize,
    },
    /// The last event.
    Ended(Ending),
}

/// A token, and how probable it was.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TokenInfo {
    pub(crate) token: TokenId,
    /// None for the first token of a prompt.
    pub(crate) logprobs: Option<TokenLogprobs>,
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ending {
    pub(crate) reason: EndReason,
    /// The stop string that ended it, if one did.
    pub(crate) stop_string: Option<String>,
    pub(crate) usage: TextUsage,
}

/// Why an answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndReason {
    /// The model ended it, or a stop token or string did.
    Stop,
    /// It reached its length.
    Length,
    /// The model ended it, having called at least one tool.
    ToolCalls,
}

/// Tokens read and written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct TextUsage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    /// Tokens of the prompt found in a cache, if the node said so.
    pub(crate) cached_tokens: Option<u32>,
    /// Of the completion, tokens of reasoning; none where this model's reasoning is not told apart.
    pub(crate) reasoning_tokens: Option<u32>,
    /// Tokens that were guessed ahead and came true, and those that did not, if the node said so.
    pub(crate) drafts: Option<(u32, u32)>,
}

impl TextUsage {
    /// Together with an answer to another prompt; what is unknown of one is unknown of the sum.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens.saturating_add(other.prompt_tokens),
            cached_tokens: sum(self.cached_tokens, other.cached_tokens),
            ..self.with(other)
        }
    }

    /// Together with another answer to the same prompt, which counts once.
    pub(crate) fn with(self, other: Self) -> Self {
        Self {
            completion_tokens: self.completion_tokens.saturating_add(other.completion_tokens),
            reasoning_tokens: sum(self.reasoning_tokens, other.reasoning_tokens),
            drafts: self
                .drafts
                .zip(other.drafts)
                .map(|(a, b)| (a.0.saturating_add(b.0), a.1.saturating_add(b.1))),
            ..self
        }
    }
}

fn sum(a: Option<u32>, b: Option<u32>) -> Option<u32> {
    a.zip(b).map(|(a, b)| a.saturating_add(b))
}
