//! Answers as `/v1/completions` writes them: a prompt that is echoed is a part of its choices' texts.

use super::{
    chat_format::reason_json,
    stream::{Format, Frames},
};
use crate::{
    error::ApiError,
    job::Whole,
    openai::{
        logprobs::{TextLogprobs, prompt_logprobs},
        response::{Head, TextChoice, UsageJson},
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

const TEXT_OBJECT: &str = "text_completion";

/// Prompts to be told before the answers.
#[derive(Debug)]
pub(super) struct Echo {
    pub(super) texts: Option<Vec<String>>,
    /// Choices of each prompt.
    pub(super) n: usize,
}

impl Echo {
    fn of(&self, choice: usize) -> Option<&str> {
        self.texts.as_ref().map(|texts| texts[choice / self.n].as_str())
    }
}

/// What is told beside text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Told {
    /// Log-probabilities, in OpenAI's way.
    pub(super) logprobs: bool,
    /// vLLM's `prompt_logprobs`.
    pub(super) prompt: bool,
}

/// Writes the chunks of a completion.
#[derive(Debug)]
pub(crate) struct TextFormat {
    head: Head,
    text: Arc<ModelText>,
    echo: Echo,
    include_usage: bool,
    choices: Vec<Choice>,
}

/// What is to be remembered of a choice.
#[derive(Debug, Clone, Default)]
struct Choice {
    /// Whether its prompt was echoed, or is not to be.
    echoed: bool,
    /// Tokens that go into the next chunk.
    tokens: Vec<TokenInfo>,
    /// Characters before those.
    offset: usize,
}

impl TextFormat {
    pub(super) fn new(
        head: Head,
        text: Arc<ModelText>,
        echo: Echo,
        choices: usize,
        include_usage: bool,
    ) -> Self {
        let choice = Choice { echoed: echo.texts.is_none(), ..Choice::default() };
        Self { head, text, echo, include_usage, choices: vec![choice; choices] }
    }

    fn chunk(&mut self, index: usize, text: &str, reason: Option<EndReason>, out: &mut Frames) {
        let choice = &mut self.choices[index];
        let tokens = std::mem::take(&mut choice.tokens);
        let logprobs = (!tokens.is_empty()).then(|| {
            let mut logprobs = TextLogprobs::default();
            logprobs.add(&tokens, &self.text, &mut choice.offset);
            logprobs
        });
        let finish_reason = reason.map(reason_json);
        let choices = vec![TextChoice { index, text, logprobs, finish_reason, prompt_logprobs: None }];
        let usage = self.include_usage.then_some(None);
        out.json(&self.head.with(TEXT_OBJECT, choices, usage));
    }

    /// Tells the prompt, once what there is to tell of its tokens has come.
    fn echo(&mut self, index: usize, out: &mut Frames) {
        if !std::mem::replace(&mut self.choices[index].echoed, true) {
            let text = self.echo.of(index).unwrap_or_default().to_owned();
            self.chunk(index, &text, None, out);
        }
    }
}

impl Format for TextFormat {
    fn event(&mut self, choice: usize, event: AnswerEvent, out: &mut Frames) {
        match event {
            AnswerEvent::Prompt(tokens) => self.choices[choice].tokens.extend(tokens),
            AnswerEvent::Tokens(tokens) => {
                self.echo(choice, out);
                self.choices[choice].tokens.extend(tokens);
            }
            AnswerEvent::Content(text) | AnswerEvent::Reasoning(text) => {
                self.echo(choice, out);
                self.chunk(choice, &text, None, out);
            }
            // Nobody looks for calls here.
            AnswerEvent::ToolCall { .. }
            | AnswerEvent::Arguments { .. }
            | AnswerEvent::ToolCallEnd { .. } => {}
            AnswerEvent::Ended(ending) => {
                self.echo(choice, out);
                self.chunk(choice, "", Some(ending.reason), out);
            }
        }
    }

    fn finish(&mut self, usage: TextUsage, out: &mut Frames) {
        if self.include_usage {
            let choices: Vec<TextChoice<'_>> = Vec::new();
            out.json(&self.head.with(TEXT_OBJECT, choices, Some(Some(UsageJson::of(usage)))));
        }
        out.raw("data: [DONE]\n\n");
    }

    fn error(&mut self, error: &ApiError, out: &mut Frames) {
        out.json(&error.json(Protocol::OpenAi));
    }
}

/// The whole answer.
pub(super) fn whole(
    head: &Head,
    text: &ModelText,
    mut answers: Vec<Whole>,
    echo: &Echo,
    told: Told,
    usage: TextUsage,
) -> Response {
    for (index, answer) in answers.iter_mut().enumerate() {
        if let Some(prompt) = echo.of(index) {
            answer.content.insert_str(0, prompt);
        }
    }
    let logprobs = |answer: &Whole| {
        let (mut logprobs, mut offset) = (TextLogprobs::default(), 0);
        if echo.texts.is_some() {
            logprobs.add(&answer.prompt, text, &mut offset);
        }
        logprobs.add(&answer.tokens, text, &mut offset);
        logprobs
    };
    let choices = answers.iter().enumerate().map(|(index, answer)| TextChoice {
        index,
        text: &answer.content,
        logprobs: told.logprobs.then(|| logprobs(answer)),
        finish_reason: Some(reason_json(answer.ending.reason)),
        prompt_logprobs: told.prompt.then(|| prompt_logprobs(&answer.prompt, text)),
    });
    Json(head.with(TEXT_OBJECT, choices.collect(), Some(Some(UsageJson::of(usage))))).into_response()
}
