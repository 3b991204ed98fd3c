//! Writes outputs as OpenAI's JSON: whole, or as server-sent events.

use super::start::Started;
use crate::{
    error::ApiError,
    openai::response::{
        AssistantMessage, ChatChoice, ChatDelta, Completion, Delta, FinishReasonJson, PromptTokensDetails,
        TextChoice, UsageJson,
    },
    prompt::unix_seconds,
    text::{EndReason, Ending, Output, TextEvent, TextUsage},
};
use axum::{
    Json,
    body::Body,
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::{
    StreamExt,
    stream::{self, BoxStream, SelectAll},
};
use serde::Serialize;
use std::{
    convert::Infallible,
    time::{Duration, SystemTime},
};
use types::{ModelCard, RequestId};

/// Where a request went and why.
const ROUTE_HEADER: HeaderName = HeaderName::from_static("x-mlx-route");
/// A comment is sent into a stream that is silent this long: proxies and clients give up on silent ones after a minute.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(15);

/// How an endpoint writes its answers.
pub(crate) trait Format: Send + 'static {
    /// One choice gets more text.
    fn text(&mut self, index: usize, text: &str, events: &mut Events);
    /// One choice is complete.
    fn end(&mut self, index: usize, reason: EndReason, events: &mut Events);
    /// The cost of all choices, after the last one.
    fn usage(&mut self, usage: UsageJson, events: &mut Events);
    /// The whole answer, a text and its ending for each choice.
    fn whole(&self, choices: Vec<(String, EndReason)>, usage: UsageJson) -> Response;
}

/// Server-sent events, written one after the other.
#[derive(Debug)]
pub(crate) struct Events {
    text: String,
    /// Whether every event has a `usage`.
    with_usage: bool,
}

impl Events {
    fn json(&mut self, value: &impl Serialize) {
        let json = serde_json::to_string(value).expect("numbers, strings and arrays of them");
        self.text.push_str("data: ");
        self.text.push_str(&json);
        self.text.push_str("\n\n");
    }

    fn take(&mut self) -> Bytes {
        Bytes::from(std::mem::take(&mut self.text))
    }
}

/// Waits for all outputs and answers at once.
pub(crate) async fn whole(started: Started, format: impl Format) -> Result<Response, ApiError> {
    let mut choices = vec![(String::new(), EndReason::Stop); started.outputs.len()];
    let mut usage = None;
    let mut events = merge(started.outputs);
    while let Some((index, event)) = events.next().await {
        match event? {
            TextEvent::Text(text) => choices[index].0.push_str(&text),
            TextEvent::Ended(ending) => {
                choices[index].0.push_str(&ending.text);
                choices[index].1 = ending.reason;
                add(&mut usage, ending.usage);
            }
        }
    }
    let mut response = format.whole(choices, usage.map_or(NO_USAGE, to_json));
    response.headers_mut().insert(ROUTE_HEADER, started.route);
    Ok(response)
}

/// Answers with a stream that goes on while the outputs do; dropping it drops them.
pub(crate) fn stream(started: Started, format: impl Format, include_usage: bool) -> Response {
    let streaming = Streaming {
        left: started.outputs.len(),
        outputs: Some(merge(started.outputs)),
        format,
        events: Events { text: String::new(), with_usage: include_usage },
        usage: None,
    };
    let frames = stream::unfold(streaming, |mut streaming| async move {
        let frame = streaming.next().await?;
        Some((Ok::<_, Infallible>(frame), streaming))
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // Or a proxy may collect the events.
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
        (ROUTE_HEADER, started.route),
    ];
    (headers, Body::from_stream(frames)).into_response()
}

type Outputs = SelectAll<BoxStream<'static, (usize, Result<TextEvent, ApiError>)>>;

/// The events of all outputs as they come, each with its output's index.
fn merge(outputs: Vec<Output>) -> Outputs {
    let streams = outputs.into_iter().enumerate().map(|(index, output)| {
        stream::unfold(output, move |mut output| async move {
            let event = output.next().await?;
            Some(((index, event), output))
        })
        .boxed()
    });
    stream::select_all(streams)
}

struct Streaming<F> {
    /// None after the last event.
    outputs: Option<Outputs>,
    /// Outputs that have not ended.
    left: usize,
    format: F,
    events: Events,
    usage: Option<TextUsage>,
}

impl<F: Format> Streaming<F> {
    async fn next(&mut self) -> Option<Bytes> {
        let outputs = self.outputs.as_mut()?;
        let Ok(next) = tokio::time::timeout(KEEP_ALIVE_EVERY, outputs.next()).await else {
            return Some(Bytes::from_static(b": keep-alive\n\n"));
        };
        match next? {
            (index, Ok(TextEvent::Text(text))) => self.format.text(index, &text, &mut self.events),
            (index, Ok(TextEvent::Ended(ending))) => self.end(index, ending),
            (_, Err(error)) => {
                self.outputs = None;
                self.events.json(&error.json());
            }
        }
        Some(self.events.take())
    }

    fn end(&mut self, index: usize, ending: Ending) {
        if !ending.text.is_empty() {
            self.format.text(index, &ending.text, &mut self.events);
        }
        self.format.end(index, ending.reason, &mut self.events);
        add(&mut self.usage, ending.usage);
        self.left -= 1;
        if self.left == 0 {
            self.outputs = None;
            if self.events.with_usage {
                self.format.usage(self.usage.map_or(NO_USAGE, to_json), &mut self.events);
            }
            self.events.text.push_str("data: [DONE]\n\n");
        }
    }
}

const NO_USAGE: UsageJson =
    UsageJson { prompt_tokens: 0, completion_tokens: 0, total_tokens: 0, prompt_tokens_details: None };

/// Adds up; what is unknown of one is unknown of the sum.
fn add(sum: &mut Option<TextUsage>, usage: TextUsage) {
    let before = sum.unwrap_or(TextUsage { prompt_tokens: 0, completion_tokens: 0, cached_tokens: Some(0) });
    *sum = Some(TextUsage {
        prompt_tokens: before.prompt_tokens.saturating_add(usage.prompt_tokens),
        completion_tokens: before.completion_tokens.saturating_add(usage.completion_tokens),
        cached_tokens: before.cached_tokens.zip(usage.cached_tokens).map(|(a, b)| a.saturating_add(b)),
    });
}

fn to_json(usage: TextUsage) -> UsageJson {
    UsageJson {
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
        prompt_tokens_details: usage.cached_tokens.map(|cached_tokens| PromptTokensDetails { cached_tokens }),
    }
}

fn reason_json(reason: EndReason) -> FinishReasonJson {
    match reason {
        EndReason::Stop => FinishReasonJson::Stop,
        EndReason::Length => FinishReasonJson::Length,
    }
}

/// What all chunks of an answer share.
#[derive(Debug)]
struct Head {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
}

impl Head {
    fn new(prefix: &str, id: RequestId, card: &ModelCard) -> Self {
        Self {
            id: format!("{prefix}-{id}"),
            created: unix_seconds(SystemTime::now()),
            model: card.name.clone(),
            // Weights and KV format: what decides whether a seed gives the same text again.
            fingerprint: format!("fp_{:012x}", card.root.0 >> 80),
        }
    }

    fn with<C>(
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

/// `/v1/chat/completions`.
#[derive(Debug)]
pub(crate) struct ChatFormat {
    head: Head,
    /// Whether the role was told. The chunk with it is sent with the first text: sent earlier, it would pass for a token.
    opened: bool,
}

impl ChatFormat {
    pub(crate) fn new(id: RequestId, card: &ModelCard) -> Self {
        Self { head: Head::new("chatcmpl", id, card), opened: false }
    }

    fn chunk(
        &self,
        index: usize,
        delta: Delta<'_>,
        finish_reason: Option<FinishReasonJson>,
        events: &mut Events,
    ) {
        let choices = vec![ChatDelta { index, delta, logprobs: (), finish_reason }];
        let usage = events.with_usage.then_some(None);
        events.json(&self.head.with("chat.completion.chunk", choices, usage));
    }

    fn open(&mut self, index: usize, events: &mut Events) {
        if !self.opened {
            self.opened = true;
            self.chunk(index, Delta { role: Some("assistant"), content: Some("") }, None, events);
        }
    }
}

impl Format for ChatFormat {
    fn text(&mut self, index: usize, text: &str, events: &mut Events) {
        self.open(index, events);
        self.chunk(index, Delta { content: Some(text), ..Delta::default() }, None, events);
    }

    fn end(&mut self, index: usize, reason: EndReason, events: &mut Events) {
        self.open(index, events);
        self.chunk(index, Delta::default(), Some(reason_json(reason)), events);
    }

    fn usage(&mut self, usage: UsageJson, events: &mut Events) {
        let choices: Vec<ChatDelta<'_>> = Vec::new();
        events.json(&self.head.with("chat.completion.chunk", choices, Some(Some(usage))));
    }

    fn whole(&self, choices: Vec<(String, EndReason)>, usage: UsageJson) -> Response {
        let choices = choices.into_iter().enumerate().map(|(index, (content, reason))| ChatChoice {
            index,
            message: AssistantMessage { role: "assistant", content, refusal: () },
            logprobs: (),
            finish_reason: reason_json(reason),
        });
        Json(self.head.with("chat.completion", choices.collect(), Some(Some(usage)))).into_response()
    }
}

/// `/v1/completions`.
#[derive(Debug)]
pub(crate) struct TextFormat {
    head: Head,
}

const TEXT_OBJECT: &str = "text_completion";

impl TextFormat {
    pub(crate) fn new(id: RequestId, card: &ModelCard) -> Self {
        Self { head: Head::new("cmpl", id, card) }
    }

    fn chunk(&self, index: usize, text: &str, finish_reason: Option<FinishReasonJson>, events: &mut Events) {
        let choices = vec![TextChoice { index, text, logprobs: (), finish_reason }];
        let usage = events.with_usage.then_some(None);
        events.json(&self.head.with(TEXT_OBJECT, choices, usage));
    }
}

impl Format for TextFormat {
    fn text(&mut self, index: usize, text: &str, events: &mut Events) {
        self.chunk(index, text, None, events);
    }

    fn end(&mut self, index: usize, reason: EndReason, events: &mut Events) {
        self.chunk(index, "", Some(reason_json(reason)), events);
    }

    fn usage(&mut self, usage: UsageJson, events: &mut Events) {
        let choices: Vec<TextChoice<'_>> = Vec::new();
        events.json(&self.head.with(TEXT_OBJECT, choices, Some(Some(usage))));
    }

    fn whole(&self, choices: Vec<(String, EndReason)>, usage: UsageJson) -> Response {
        let choices = choices.iter().enumerate().map(|(index, (text, reason))| TextChoice {
            index,
            text,
            logprobs: (),
            finish_reason: Some(reason_json(*reason)),
        });
        Json(self.head.with(TEXT_OBJECT, choices.collect(), Some(Some(usage)))).into_response()
    }
}
