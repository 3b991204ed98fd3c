//! Blocks of content, as requests have them: a text, or an array of blocks.

use crate::{error::ApiError, text_or::TextOr};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

/// What is said in one turn.
pub(super) type Content = TextOr<Block>;

/// A part of it. Others (images, documents, what servers' tools find) are refused by their type.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Block {
    Text {
        text: String,
    },
    Thinking {
        thinking: String,
        /// Whatever was told; there is nothing to sign here.
        #[serde(default)]
        signature: Option<String>,
    },
    ToolUse {
        id: String,
        name: String,
        input: Map<String, Value>,
    },
    ToolResult {
        tool_use_id: String,
        #[serde(default)]
        content: Option<Content>,
        #[serde(default)]
        is_error: bool,
    },
}

impl Block {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Text { .. } => "text",
            Self::Thinking { .. } => "thinking",
            Self::ToolUse { .. } => "tool_use",
            Self::ToolResult { .. } => "tool_result",
        }
    }
}

/// The blocks of a turn.
pub(super) fn blocks(content: Content) -> Vec<Block> {
    content.many(|text| Block::Text { text })
}

/// The text of a tool's answer, which is this block.
pub(super) fn text(content: Content, param: &str) -> Result<String, ApiError> {
    let texts = blocks(content).into_iter().enumerate().map(|(at, block)| match block {
        Block::Text { text } => Ok(text),
        other => {
            let (param, kind) = (format!("{param}.content[{at}]"), other.kind());
            let message = format!("{param} is a block of type {kind:?}; a tool's answer can only be text");
            Err(ApiError::Parameter { param, message })
        }
    });
    texts.collect::<Result<Vec<_>, _>>().map(|texts| texts.join("\n"))
}
