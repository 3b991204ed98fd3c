//! From checked parameters and prompts in tokens to generations that run.

use crate::{
    AppState,
    error::ApiError,
    openai::parameters::Parameters,
    prompt::ModelText,
    text::{Detokenizer, Output},
};
use axum::http::HeaderValue;
use futures_util::future::try_join_all;
use std::sync::Arc;
use types::{
    ClusterView, EngineState, GenerateDraft, GenerateError, GenerateRequest, ModelCard, OutputRules,
    RequestId, RouteInfo, TokenId, TokenReport, limits,
};

/// What one request wants generated.
pub(crate) struct Job {
    pub(crate) id: RequestId,
    pub(crate) card: ModelCard,
    pub(crate) text: Arc<ModelText>,
    pub(crate) prompts: Vec<Vec<TokenId>>,
    pub(crate) kind: PromptKind,
    pub(crate) parameters: Parameters,
}

/// What a prompt is, and so what its continuation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PromptKind {
    /// The answer is a text of its own, as long as the context allows.
    Messages,
    /// The answer goes on where the prompt ends, and has this many tokens at most unless told otherwise.
    Text { max_tokens_default: u32 },
}

/// Generations that were accepted.
pub(crate) struct Started {
    /// One for each prompt, in order.
    pub(crate) outputs: Vec<Output>,
    /// The value of `x-mlx-route`.
    pub(crate) route: HeaderValue,
}

/// The card of the model that a request names, or of the only one that is served.
pub(crate) fn resolve(state: &AppState, name: Option<&str>) -> Result<ModelCard, ApiError> {
    let models = state.directory.models();
    let name = name.unwrap_or_default();
    let found = match (name, models.as_slice()) {
        ("", [only]) => Some(only),
        (_, []) => {
            let model = if name.is_empty() { "any model" } else { name }.to_owned();
            let reason = why_not_ready(&state.directory.view());
            return Err(GenerateError::Unavailable { model, reason }.into());
        }
        ("", many) => {
            return Err(ApiError::ModelNotNamed {
                served: many.iter().map(|card| card.name.clone()).collect(),
            });
        }
        _ => models.iter().find(|card| card.name == name),
    };
    if let Some(card) = found {
        return Ok(card.clone());
    }
    let view = state.directory.view();
    if view.nodes.iter().any(|node| node.models.iter().any(|card| card.name == name)) {
        return Err(
            GenerateError::Unavailable { model: name.to_owned(), reason: why_not_ready(&view) }.into()
        );
    }
    let served = models.into_iter().map(|card| card.name).collect();
    Err(GenerateError::UnknownModel { model: name.to_owned(), served }.into())
}

/// What the nodes lack, each in a few words.
pub(crate) fn why_not_ready(view: &ClusterView) -> String {
    let states = view.nodes.iter().map(|node| {
        let state = match &node.engine {
            EngineState::Loading => "is loading its model",
            EngineState::Ready => "is ready",
            EngineState::Draining => "is draining",
            EngineState::Restarting(why) => return format!("{} is restarting its engine ({why})", node.name),
        };
        format!("{} {state}", node.name)
    });
    let states: Vec<String> = states.collect();
    if states.is_empty() { "no node has joined the cluster".to_owned() } else { states.join(", ") }
}

/// Starts all generations of a job, or none.
pub(crate) async fn start(state: &AppState, job: Job) -> Result<Started, ApiError> {
    let (text, kind) = (job.text.clone(), job.kind);
    let stop_strings = job.parameters.stop_strings.clone();
    let starting = requests(state, job)?.into_iter().map(|request| {
        let (id, prompt_tokens) = (request.id, request.prompt.len() as u32);
        let max_tokens = request.max_tokens;
        let detokenizer = match kind {
            PromptKind::Messages => Ok(Detokenizer::new(text.clone())),
            PromptKind::Text { .. } => Detokenizer::continuing(text.clone(), &request.prompt)
                .map_err(|message| ApiError::Tokenizer { message }),
        };
        let stop_strings = &stop_strings;
        async move {
            let detokenizer = detokenizer?;
            let generation = state.generate.generate(request).await?;
            tracing::info!(%id, prompt_tokens, max_tokens, node = generation.route.node_name, "routed");
            let output = Output::new(id, generation.events, detokenizer, stop_strings, prompt_tokens);
            Ok::<_, ApiError>((output, generation.route))
        }
    });
    let (outputs, routes): (Vec<_>, Vec<_>) = try_join_all(starting).await?.into_iter().unzip();
    Ok(Started { outputs, route: route_header(&routes) })
}

/// The requests of a job, one for each prompt.
pub(crate) fn requests(state: &AppState, job: Job) -> Result<Vec<GenerateRequest>, ApiError> {
    let Job { id, card, text: _, prompts, kind, parameters } = job;
    let mut cache = parameters.cache.clone();
    if state.settings.cache_per_key {
        cache = cache.of_client(parameters.service.client);
    }
    let request = |(index, prompt): (usize, Vec<TokenId>)| {
        let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        let max_tokens = max_tokens(&card, prompt_tokens, parameters.max_tokens, kind)?;
        // Fixed here, so that whichever nodes draw the answer draw the same.
        let seed = getrandom::u64().map_err(|error| ApiError::Internal { what: error.to_string() })?;
        let draft = GenerateDraft {
            id: RequestId(id.0.wrapping_add(index as u128)),
            model: card.name.clone(),
            prompt,
            sampling: parameters.sampling(seed),
            max_tokens,
            stop_tokens: parameters.stop_tokens.clone(),
            ignore_eos: parameters.ignore_eos,
            service: parameters.service,
            cache: cache.clone(),
            output: Vec::new(),
            rules: OutputRules::default(),
            report: TokenReport::default(),
        };
        let prompt_param = if kind == PromptKind::Messages { "messages" } else { "prompt" };
        GenerateRequest::try_from(draft).map_err(|error| ApiError::from_request(&error, prompt_param))
    };
    prompts.into_iter().enumerate().map(request).collect()
}

/// The tokens to generate at most; a prompt or a demand that does not fit is an error with the numbers.
fn max_tokens(
    card: &ModelCard,
    prompt_tokens: u32,
    wanted: Option<u32>,
    kind: PromptKind,
) -> Result<u32, ApiError> {
    let context_tokens = card.context_tokens;
    let left = context_tokens.saturating_sub(prompt_tokens);
    let max_tokens = wanted.unwrap_or(1);
    if max_tokens > left {
        return Err(GenerateError::ContextExceeded { prompt_tokens, max_tokens, context_tokens }.into());
    }
    let unless_told = match kind {
        PromptKind::Messages => limits::NEW_TOKENS_MAX,
        PromptKind::Text { max_tokens_default } => max_tokens_default,
    };
    Ok(wanted.unwrap_or(unless_told).min(left))
}

/// `<node name>; <reason>; matched=<tokens>` of each generation; what a header cannot hold becomes `?`.
fn route_header(routes: &[RouteInfo]) -> HeaderValue {
    let shown = routes.iter().map(|route| {
        let clean = |text: &str| {
            text.chars()
                .map(|char| if char.is_ascii_graphic() || char == ' ' { char } else { '?' })
                .collect::<String>()
        };
        format!("{}; {}; matched={}", clean(&route.node_name), clean(&route.reason), route.matched_tokens)
    });
    let text = shown.collect::<Vec<_>>().join(", ");
    HeaderValue::from_str(&text).expect("only printable ASCII")
}
