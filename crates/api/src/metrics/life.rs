//! One request as the board remembers it: times and numbers, never what it says.

use serde::Serialize;
use tokio::time::Instant;
use types::{FinishReason, GenerateError, GenerateRequest, Priority, RequestId, RouteInfo};

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum End {
    /// Its text is complete.
    Stop,
    /// It reached its length.
    Length,
    /// It was not answered, or not to the end, for this reason.
    Failed(&'static str),
}

/// The client went away.
pub(super) const ABORTED: End = End::Failed("abort");

impl End {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Failed(reason) => reason,
        }
    }
}

impl From<&FinishReason> for End {
    fn from(reason: &FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
            FinishReason::Cancelled => Self::Failed("cancelled"),
            FinishReason::Failed(error) => error.into(),
        }
    }
}

impl From<&GenerateError> for End {
    fn from(error: &GenerateError) -> Self {
        Self::Failed(match error {
            GenerateError::Invalid { .. } => "invalid",
            GenerateError::UnknownModel { .. } => "unknown_model",
            GenerateError::ContextExceeded { .. } => "context_exceeded",
            GenerateError::Busy { .. } => "busy",
            GenerateError::Unavailable { .. } => "unavailable",
            GenerateError::NodeLost { .. } => "node_lost",
            GenerateError::Engine { .. } => "engine_failed",
        })
    }
}

/// A request, from when it was asked for.
#[derive(Debug, Clone)]
pub(super) struct Life {
    pub(super) id: RequestId,
    pub(super) model: String,
    priority: Priority,
    pub(super) prompt_tokens: u32,
    max_tokens: u32,
    pub(super) arrived: Instant,
    /// When a node accepted it.
    pub(super) accepted: Option<Instant>,
    pub(super) route: Option<RouteInfo>,
    /// Tokens of the prompt found in a cache, once it was read.
    pub(super) cached_tokens: Option<u32>,
    pub(super) first_token: Option<Instant>,
    pub(super) last_token: Option<Instant>,
    pub(super) tokens: u32,
    pub(super) ended: Option<(Instant, End)>,
}

impl Life {
    pub(super) fn new(request: &GenerateRequest, now: Instant) -> Self {
        Self {
            id: request.id,
            model: request.model.clone(),
            priority: request.service.priority,
            prompt_tokens: request.prompt.len() as u32,
            max_tokens: request.max_tokens,
            arrived: now,
            accepted: None,
            route: None,
            cached_tokens: None,
            first_token: None,
            last_token: None,
            tokens: 0,
            ended: None,
        }
    }

    fn state(&self) -> &'static str {
        match self {
            Self { ended: Some((_, end)), .. } => end.label(),
            Self { first_token: Some(_), .. } => "writing",
            Self { accepted: Some(_), .. } => "reading",
            _ => "waiting",
        }
    }

    pub(super) fn shown(&self, now: Instant) -> Shown {
        let until = |at: Instant| at.saturating_duration_since(self.arrived).as_secs_f32();
        let end = self.ended.map_or(now, |(at, _)| at);
        let route = self.route.as_ref();
        Shown {
            id: self.id,
            model: self.model.clone(),
            priority: self.priority,
            state: self.state(),
            ended: self.ended.is_some(),
            node: route.map(|route| route.node_name.clone()),
            reason: route.map(|route| route.reason.clone()),
            matched_tokens: route.map_or(0, |route| route.matched_tokens),
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            tokens: self.tokens,
            max_tokens: self.max_tokens,
            age_s: until(end),
            since_end_s: self.ended.map(|(at, _)| now.saturating_duration_since(at).as_secs_f32()),
            queue_s: self.accepted.map(until),
            first_token_s: self.first_token.map(until),
            tokens_per_s: self.tokens_per_s(),
        }
    }

    /// While writing, from the first token to the last one.
    fn tokens_per_s(&self) -> Option<f32> {
        let seconds = self.last_token?.saturating_duration_since(self.first_token?).as_secs_f32();
        (self.tokens > 1 && seconds > 0.0).then(|| (self.tokens - 1) as f32 / seconds)
    }
}

/// A request for people to see.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Shown {
    id: RequestId,
    model: String,
    priority: Priority,
    /// `waiting`, `reading`, `writing`, or how it ended.
    state: &'static str,
    ended: bool,
    /// Where it was sent first.
    node: Option<String>,
    /// Why there.
    reason: Option<String>,
    matched_tokens: u32,
    prompt_tokens: u32,
    cached_tokens: Option<u32>,
    tokens: u32,
    max_tokens: u32,
    /// Seconds from its arrival until now, or until its end.
    age_s: f32,
    since_end_s: Option<f32>,
    queue_s: Option<f32>,
    first_token_s: Option<f32>,
    tokens_per_s: Option<f32>,
}
