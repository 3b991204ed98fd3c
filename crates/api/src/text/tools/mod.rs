//! Calls of tools in a text, in the formats of the models that were trained to write them.
//!
//! [`ToolParser`] passes text on until a format's marker, then a [`Body`] reads one call (or a list of them) character by
//! character, so that it does not matter how the text is cut. What turns out to be no call is content. Once a call's name
//! was given out, its arguments are passed on as they come, and what breaks them ends the call.
//!
//! Each format has a file, which says how its calls look to the parser ([`Syntax`]) and as a grammar; the shared parts are
//! `json` (scanning), `object` (`{"name": …}`), `named` (a name, then an object).

mod deepseek;
mod gemma;
mod grammar;
mod hermes;
mod json;
mod llama;
mod mistral;
mod named;
mod object;
mod parser;
mod phi;
mod qwen_coder;

pub(crate) use grammar::{ANY_TEXT, CallGrammar, Lark, literal, pattern};
pub(crate) use parser::ToolParser;

use gemma::GemmaCall;
use mistral::MistralCalls;
use named::NamedCall;
use object::ObjectCalls;
use qwen_coder::XmlCall;
use std::sync::Arc;

use super::Parts;
use crate::job::Tool;

/// Bytes of a text that are kept until it is clear whether they are a call: a name and what is around it, or arguments that
/// come before it.
const CALL_HELD_BYTES_MAX: usize = 64 << 10;

/// How a model writes calls of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`: Hermes, Qwen 2.5 and 3, and many others.
    Hermes,
    /// `<tool_call><function=…><parameter=…>…`: Qwen3-Coder.
    QwenCoder,
    /// `{"name": …, "parameters": …}`, perhaps after `<|python_tag|>`: Llama 3.x.
    Llama,
    /// `[TOOL_CALLS][{"name": …}]`.
    Mistral,
    /// `[TOOL_CALLS]name[ARGS]{…}`: Mistral's since 2025.
    MistralArgs,
    /// `<|tool_call|>[{"name": …, "arguments": …}]<|/tool_call|>`: Phi-4.
    Phi,
    /// `<｜tool▁calls▁begin｜>…` with a type and a fence: DeepSeek V3 and R1.
    DeepSeek,
    /// The same with name and arguments only: DeepSeek V3.1.
    DeepSeekPlain,
    /// `<start_function_call>call:name{…}`: FunctionGemma.
    FunctionGemma,
    /// `<|tool_call>call:name{…}<tool_call|>`: Gemma 4.
    Gemma,
}

/// How a format's calls look from outside.
pub(crate) struct Syntax {
    /// What a call begins with.
    open: &'static [&'static str],
    /// What is around calls and says nothing.
    around: &'static [&'static str],
    /// Markers within calls.
    inner: &'static [&'static str],
    /// A call may also be a bare object, at the beginning of the answer.
    bare: bool,
    /// Ids of calls are nine letters and digits.
    pub(crate) short_ids: bool,
    /// A call, for models that are to be told.
    pub(crate) example: &'static str,
    body: fn(&Context<'_>) -> Body,
}

/// What a body may need to know.
struct Context<'a> {
    /// The marker that was found; empty for a bare object.
    open: &'a str,
    tools: &'a Arc<[Tool]>,
}

/// Reads what follows a marker.
#[derive(Debug)]
enum Body {
    Object(ObjectCalls),
    Named(NamedCall),
    Mistral(MistralCalls),
    Xml(XmlCall),
    Gemma(GemmaCall),
}

/// What a character did to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It belongs to it.
    More,
    /// It was the last one.
    Done,
    /// It does not belong to a call that can be read.
    Broken,
}

impl Body {
    fn feed(&mut self, char: char, out: &mut Parts) -> Step {
        match self {
            Self::Object(body) => body.feed(char, out),
            Self::Named(body) => body.feed(char, out),
            Self::Mistral(body) => body.feed(char, out),
            Self::Xml(body) => body.feed(char, out),
            Self::Gemma(body) => body.feed(char, out),
        }
    }

    /// Whether a call was begun and not ended.
    fn is_begun(&self) -> bool {
        match self {
            Self::Object(body) => body.is_begun(),
            Self::Named(body) => body.is_begun(),
            Self::Mistral(body) => body.is_begun(),
            Self::Xml(body) => body.is_begun(),
            Self::Gemma(body) => body.is_begun(),
        }
    }
}

impl ToolFormat {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Hermes,
        Self::QwenCoder,
        Self::Llama,
        Self::Mistral,
        Self::MistralArgs,
        Self::Phi,
        Self::DeepSeek,
        Self::DeepSeekPlain,
        Self::FunctionGemma,
        Self::Gemma,
    ];

    /// What it is called in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::QwenCoder => "qwen_coder",
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::MistralArgs => "mistral_args",
            Self::Phi => "phi",
            Self::DeepSeek => "deepseek",
            Self::DeepSeekPlain => "deepseek_plain",
            Self::FunctionGemma => "function_gemma",
            Self::Gemma => "gemma",
        }
    }

    /// By what a chat template says; none where it says nothing of calls.
    pub(crate) fn of_template(source: &str) -> Option<Self> {
        let has = |text: &str| source.contains(text);
        Some(match () {
            () if has("[TOOL_CALLS]") && has("[ARGS]") => Self::MistralArgs,
            () if has("[TOOL_CALLS]") => Self::Mistral,
            () if has("<function=") => Self::QwenCoder,
            () if has(deepseek::CALL_BEGIN) && has("```json") => Self::DeepSeek,
            () if has(deepseek::CALL_BEGIN) => Self::DeepSeekPlain,
            () if has("<start_function_call>") => Self::FunctionGemma,
            () if has("<|tool_call>") => Self::Gemma,
            () if has("<|tool_call|>") => Self::Phi,
            () if has("<tool_call>") => Self::Hermes,
            () if has("<|python_tag|>") || has("ipython") => Self::Llama,
            () => return None,
        })
    }

    pub(crate) fn syntax(self) -> &'static Syntax {
        match self {
            Self::Hermes => &hermes::SYNTAX,
            Self::QwenCoder => &qwen_coder::SYNTAX,
            Self::Llama => &llama::SYNTAX,
            Self::Mistral | Self::MistralArgs => &mistral::SYNTAX,
            Self::Phi => &phi::SYNTAX,
            Self::DeepSeek | Self::DeepSeekPlain => &deepseek::SYNTAX,
            Self::FunctionGemma => &gemma::FUNCTION_SYNTAX,
            Self::Gemma => &gemma::SYNTAX,
        }
    }

    /// How calls of these tools are written, for a grammar.
    pub(crate) fn grammar(self) -> CallGrammar {
        match self {
            Self::Hermes => hermes::grammar(),
            Self::QwenCoder => qwen_coder::grammar(),
            Self::Llama => llama::grammar(),
            Self::Mistral => mistral::grammar(false),
            Self::MistralArgs => mistral::grammar(true),
            Self::Phi => phi::grammar(),
            Self::DeepSeek => deepseek::grammar(true),
            Self::DeepSeekPlain => deepseek::grammar(false),
            Self::FunctionGemma => gemma::grammar(gemma::FUNCTION_MARKS),
            Self::Gemma => gemma::grammar(gemma::MARKS),
        }
    }
}

impl Syntax {
    /// Whether a call may be a bare object, at the beginning of the answer.
    pub(crate) fn is_bare(&self) -> bool {
        self.bare
    }

    /// Everything that must be visible in the text for calls to be found.
    pub(crate) fn shown(&self) -> impl Iterator<Item = &'static str> {
        self.open.iter().chain(self.around).chain(self.inner).copied()
    }
}

#[cfg(test)]
mod tests;
