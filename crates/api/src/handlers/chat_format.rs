//! Answers as `/v1/chat/completions` writes them.

use super::stream::{Format, Frames};
use crate::{
    error::ApiError,
    job::Whole,
    openai::{
        logprobs::{ChatLogprobs, prompt_logprobs},
        response::{
            AssistantMessage, CallDelta, CallJson, ChatChoice, ChatDelta, ChatWhole, Delta, FinishReasonJson,
            FunctionDelta, FunctionJson, Head, UsageJson,
        },
    },
    prompt::ModelText,
    shape::Protocol,
    text::{AnswerEvent, EndReason, TextUsage, TokenInfo},
};
use axum::{
    Json,
    response::{IntoResponse, Response},
};
use std::sync::Arc;

/// Writes the chunks of a chat.
#[derive(Debug)]
pub(crate) struct ChatFormat {
    head: Head,
    text: Arc<ModelText>,
    include_usage: bool,
    choices: Vec<Choice>,
}

/// What is to be remembered of a choice.
#[derive(Debug, Clone, Default)]
struct Choice {
    /// Whether the role was told. The chunk with it is sent with the first text: sent earlier, it would pass for a token.
    opened: bool,
    /// Tokens that go into the next chunk.
    tokens: Vec<TokenInfo>,
}

impl ChatFormat {
    pub(crate) fn new(head: Head, text: Arc<ModelText>, choices: usize, include_usage: bool) -> Self {
        Self { head, text, include_usage, choices: vec![Choice::default(); choices] }
    }

    fn chunk(&mut self, index: usize, delta: Delta<'_>, reason: Option<EndReason>, out: &mut Frames) {
        let tokens = std::mem::take(&mut self.choices[index].tokens);
        let logprobs = (!tokens.is_empty()).then(|| ChatLogprobs::new(&tokens, &self.text));
        let choices = vec![ChatDelta { index, delta, logprobs, finish_reason: reason.map(reason_json) }];
        let usage = self.include_usage.then_some(None);
        out.json(&self.head.with("chat.completion.chunk", choices, usage));
    }

    fn open(&mut self, index: usize, content: Option<&str>, out: &mut Frames) {
        if !std::mem::replace(&mut self.choices[index].opened, true) {
            let tokens = std::mem::take(&mut self.choices[index].tokens);
            let delta = Delta { role: Some("assistant"), content: Some(content), ..Delta::default() };
            self.chunk(index, delta, None, out);
            self.choices[index].tokens = tokens;
        }
    }

    fn call(&mut self, choice: usize, call: CallDelta<'_>, out: &mut Frames) {
        self.open(choice, None, out);
        self.chunk(choice, Delta { tool_calls: Some([call]), ..Delta::default() }, None, out);
    }
}

impl Format for ChatFormat {
    fn event(&mut self, choice: usize, event: AnswerEvent, out: &mut Frames) {
        match event {
            // Refused in streams.
            AnswerEvent::Prompt(_) | AnswerEvent::ToolCallEnd { .. } => {}
            AnswerEvent::Tokens(tokens) => self.choices[choice].tokens.extend(tokens),
            AnswerEvent::Reasoning(text) => {
                self.open(choice, Some(""), out);
                self.chunk(choice, Delta { reasoning_content: Some(&text), ..Delta::default() }, None, out);
            }
            AnswerEvent::Content(text) => {
                self.open(choice, Some(""), out);
                self.chunk(choice, Delta { content: Some(Some(&text)), ..Delta::default() }, None, out);
            }
            AnswerEvent::ToolCall { call: index, id, name } => {
                let function = FunctionDelta { name: Some(&name), arguments: "" };
                self.call(choice, CallDelta { index, id: Some(&id), kind: Some("function"), function }, out);
            }
            AnswerEvent::Arguments { call: index, text } => {
                let function = FunctionDelta { name: None, arguments: &text };
                self.call(choice, CallDelta { index, id: None, kind: None, function }, out);
            }
            AnswerEvent::Ended(ending) => {
                self.open(choice, Some(""), out);
                self.chunk(choice, Delta::default(), Some(ending.reason), out);
            }
        }
    }

    fn finish(&mut self, usage: TextUsage, out: &mut Frames) {
        if self.include_usage {
            let choices: Vec<ChatDelta<'_>> = Vec::new();
            out.json(&self.head.with("chat.completion.chunk", choices, Some(Some(UsageJson::of(usage)))));
        }
        out.raw("data: [DONE]\n\n");
    }

    fn error(&mut self, error: &ApiError, out: &mut Frames) {
        out.json(&error.json(Protocol::OpenAi));
    }
}

/// The whole answer.
pub(crate) fn whole(
    head: &Head,
    text: &ModelText,
    answers: Vec<Whole>,
    usage: TextUsage,
    tell_prompt: bool,
) -> Response {
    let prompt = answers.first().filter(|_| tell_prompt).map(|answer| prompt_logprobs(&answer.prompt, text));
    let choice = |(index, answer): (usize, Whole)| {
        let calls = answer.calls.into_iter().map(|call| CallJson {
            id: call.id,
            kind: "function",
            function: FunctionJson { name: call.name, arguments: call.arguments },
        });
        let calls: Vec<CallJson> = calls.collect();
        ChatChoice {
            index,
            message: AssistantMessage {
                role: "assistant",
                content: (calls.is_empty() || !answer.content.is_empty()).then_some(answer.content),
                refusal: (),
                reasoning_content: (!answer.reasoning.is_empty()).then_some(answer.reasoning),
                tool_calls: calls,
            },
            logprobs: (!answer.tokens.is_empty()).then(|| ChatLogprobs::new(&answer.tokens, text)),
            finish_reason: reason_json(answer.ending.reason),
        }
    };
    let choices = answers.into_iter().enumerate().map(choice).collect();
    let completion = head.with("chat.completion", choices, Some(Some(UsageJson::of(usage))));
    Json(ChatWhole { completion, prompt_logprobs: prompt }).into_response()
}

pub(super) fn reason_json(reason: EndReason) -> FinishReasonJson {
    match reason {
        EndReason::Stop => FinishReasonJson::Stop,
        EndReason::Length => FinishReasonJson::Length,
        EndReason::ToolCalls => FinishReasonJson::ToolCalls,
    }
}
