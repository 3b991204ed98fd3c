//! From checked parameters and prompts in tokens to generations that run.

use crate::{
    AppState,
    error::ApiError,
    limits::CHOICES_MAX,
    openai::parameters::Parameters,
    prompt::ModelText,
    text::{AnswerFormat, Detokenizer, Output, OutputSettings, Shown},
};
use axum::http::HeaderValue;
use futures_util::future::try_join_all;
use std::{sync::Arc, time::Duration};
use types::{
    ClusterView, EngineState, GenerateDraft, GenerateError, GenerateRequest, ModelCard, RequestId, RouteInfo,
    SamplingParams, Speculation, TokenId, limits,
};

/// How long a grammar is given to turn out to be none, before an answer begins with a status that says all is well. Nodes
/// compile in a fraction of it; where one is busy, the error is the stream's first event.
const GRAMMAR_TIME_MAX: Duration = Duration::from_secs(2);

/// What one request wants generated.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: RequestId,
    pub(crate) card: ModelCard,
    pub(crate) text: Arc<ModelText>,
    pub(crate) prompts: Vec<Vec<TokenId>>,
    /// What the client calls the prompt.
    pub(crate) prompt_param: &'static str,
    /// The answer goes on where the prompt ends; otherwise it is a text of its own.
    pub(crate) continues: bool,
    /// Tokens at most, unless told otherwise; none: as many as the context allows.
    pub(crate) max_tokens_default: Option<u32>,
    pub(crate) format: AnswerFormat,
    /// What the client calls the grammar.
    pub(crate) grammar_param: &'static str,
    pub(crate) parameters: Parameters,
}

/// Generations that were accepted.
pub(crate) struct Started {
    /// By choice: all of the first prompt, then all of the second one, and so on.
    pub(crate) outputs: Vec<Output>,
    pub(crate) text: Arc<ModelText>,
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
            EngineState::Pipeline(how) => return format!("{}: {how}", node.name),
            EngineState::Restarting(why) => return format!("{} is restarting its engine ({why})", node.name),
        };
        format!("{} {state}", node.name)
    });
    let states: Vec<String> = states.collect();
    if states.is_empty() { "no node has joined the cluster".to_owned() } else { states.join(", ") }
}

/// Starts all generations of a job, or none.
pub(crate) async fn start(state: &AppState, job: Job) -> Result<Started, ApiError> {
    let text = job.text.clone();
    let settings = OutputSettings {
        format: job.format.clone(),
        stop_strings: job.parameters.stop_strings.clone(),
        include_stop: job.parameters.include_stop,
        logprobs: job.parameters.report.logprobs.is_some(),
        prompt_only: job.parameters.max_tokens == Some(0),
        grammar_param: job.grammar_param,
        board: state.board.clone(),
    };
    let shown = if job.parameters.show_special { Shown::All } else { settings.format.shown(&text) };
    let continues = job.continues;
    let prediction = prediction(state, &job).await?;
    let starting = requests(state, job, prediction)?.into_iter().map(|request| {
        let (id, max_tokens, has_grammar) = (request.id, request.max_tokens, request.rules.grammar.is_some());
        let prompt: Arc<[TokenId]> = request.prompt.as_slice().into();
        let detokenizer = if continues {
            Detokenizer::continuing(text.clone(), shown.clone(), &prompt)
                .map_err(|message| ApiError::Tokenizer { message })
        } else {
            Ok(Detokenizer::new(text.clone(), shown.clone()))
        };
        let settings = settings.clone();
        async move {
            let detokenizer = detokenizer?;
            let generation = state.generate.generate(request).await;
            let generation = generation.map_err(|error| in_client_words(error, settings.grammar_param))?;
            let (prompt_tokens, node) = (prompt.len(), &generation.route.node_name);
            tracing::info!(%id, prompt_tokens, max_tokens, node, "routed");
            let mut output = Output::new(id, generation.events, detokenizer, settings, prompt);
            if has_grammar {
                output.await_first(GRAMMAR_TIME_MAX).await?;
            }
            Ok::<_, ApiError>((output, generation.route))
        }
    });
    let (outputs, routes): (Vec<_>, Vec<_>) = try_join_all(starting).await?.into_iter().unzip();
    Ok(Started { outputs, text, route: route_header(&routes) })
}

/// An error of the cluster, with the name that the client has for the grammar.
pub(crate) fn in_client_words(error: GenerateError, grammar_param: &str) -> ApiError {
    match error {
        GenerateError::Invalid { message, param: Some(param) } if param == "grammar" => {
            let message = message.strip_prefix("grammar: ").unwrap_or(&message);
            ApiError::parameter(grammar_param, format!("{grammar_param}: {message}"))
        }
        error => error.into(),
    }
}

/// The tokens of what the answer is expected to be like: where they are cut otherwise than the answer's are, fewer come true.
async fn prediction(state: &AppState, job: &Job) -> Result<Vec<TokenId>, ApiError> {
    let prediction = job.parameters.prediction.clone();
    let encode = move |text: &ModelText| {
        let tokens = text.encode(&prediction, false);
        tokens.map_err(|message| ApiError::Tokenizer { message })
    };
    state.texts.run(&job.text, job.parameters.prediction.len(), encode).await
}

/// The requests of a job, so many for each prompt as the parameters say, with the tokens of what is expected.
pub(crate) fn requests(
    state: &AppState,
    job: Job,
    prediction: Vec<TokenId>,
) -> Result<Vec<GenerateRequest>, ApiError> {
    let Job { id, card, prompts, prompt_param, max_tokens_default, grammar_param, parameters, .. } = job;
    let drawn = parameters.drawn();
    if prompts.len() * drawn > CHOICES_MAX {
        let (param, count) = (parameters.drawn_param(), prompts.len());
        let message = format!(
            "{param} is {drawn} for {count} prompts; at most {CHOICES_MAX} answers may be asked for at once"
        );
        return Err(ApiError::parameter(param, message));
    }
    let mut cache = parameters.cache.clone();
    if state.settings.cache_per_key {
        cache = cache.of_client(parameters.service.client);
    }
    let request = |prompt: Vec<TokenId>, choice: usize, index: usize| {
        let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        // One token is drawn and dropped where none is wanted.
        let wanted = parameters.max_tokens.map(|wanted| wanted.max(1));
        let max_tokens =
            max_tokens(&card, prompt_tokens, wanted, parameters.max_tokens_param, max_tokens_default)?;
        check_min_tokens(&parameters, max_tokens)?;
        let draft = GenerateDraft {
            id: RequestId(id.0.wrapping_add(index as u128)),
            model: card.name.clone(),
            prompt,
            sampling: sampling(&parameters, choice)?,
            max_tokens,
            stop_tokens: parameters.stop_tokens.clone(),
            ignore_eos: parameters.ignore_eos,
            service: parameters.service,
            cache: cache.clone(),
            output: Vec::new(),
            rules: parameters.rules.clone(),
            report: parameters.report,
            speculation: Speculation { enabled: parameters.speculates, prediction: prediction.clone() },
        };
        GenerateRequest::try_from(draft)
            .map_err(|error| ApiError::from_request(&error, prompt_param, grammar_param))
    };
    let mut requests = Vec::with_capacity(prompts.len() * drawn);
    for prompt in prompts {
        for choice in 1..drawn {
            requests.push(request(prompt.clone(), choice - 1, requests.len())?);
        }
        requests.push(request(prompt, drawn - 1, requests.len())?);
    }
    Ok(requests)
}

/// Whether there may be as many tokens as there are to be at least; told in the client's own name for the former.
fn check_min_tokens(parameters: &Parameters, max_tokens: u32) -> Result<(), ApiError> {
    let (min_tokens, param) = (parameters.rules.min_tokens, parameters.max_tokens_param);
    if min_tokens <= max_tokens {
        return Ok(());
    }
    let message = match parameters.max_tokens {
        Some(_) => format!("min_tokens is {min_tokens}; it must be at most {param}, which is {max_tokens}"),
        None => {
            format!("min_tokens is {min_tokens}; without {param} the answer has at most {max_tokens} tokens")
        }
    };
    Err(ApiError::parameter("min_tokens", message))
}

/// How the tokens of one choice are drawn: fixed here, so that whichever nodes draw the answer draw the same.
fn sampling(parameters: &Parameters, choice: usize) -> Result<SamplingParams, ApiError> {
    let random = getrandom::u64().map_err(|error| ApiError::Internal { what: error.to_string() })?;
    Ok(parameters.sampling(random, choice))
}

/// The tokens to generate at most; a prompt or a demand that does not fit is an error with the numbers.
fn max_tokens(
    card: &ModelCard,
    prompt_tokens: u32,
    wanted: Option<u32>,
    wanted_param: &str,
    unless_told: Option<u32>,
) -> Result<u32, ApiError> {
    let context_tokens = card.context_tokens;
    let left = context_tokens.saturating_sub(prompt_tokens);
    if wanted.unwrap_or(1) > left {
        let wanted = wanted.map(|wanted| (wanted_param.to_owned(), wanted));
        return Err(ApiError::ContextExceeded { prompt_tokens, wanted, context_tokens });
    }
    Ok(wanted.or(unless_told).unwrap_or(limits::NEW_TOKENS_MAX).min(left))
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
