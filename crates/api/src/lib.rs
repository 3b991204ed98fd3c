//! The HTTP endpoint: OpenAI's JSON in, token requests to a [`types::Generate`], text out, whole or as server-sent events.
//!
//! `openai` has the JSON as types, `job` is the middle that knows no protocol, `prompt` turns messages into tokens, `text`
//! turns tokens into text and its parts, `handlers` has a file for each route, and `error` is the one place that knows
//! statuses. Nothing here knows nodes or sockets behind the three traits. A client that goes away drops its
//! [`types::Generation`], which cancels it. Around the handlers lie layers, each in a file: `tag` (ids, log), `metrics`, `cors`, `shape`
//! (errors of other protocols), `head` (sizes), `auth` and `rates`.

mod access;
mod anthropic;
mod auth;
mod caller;
mod cors;
mod dashboard;
mod error;
mod handlers;
mod head;
mod held;
mod job;
mod limits;
mod metrics;
mod names;
mod ollama;
mod openai;
mod openapi;
mod patience;
mod prompt;
mod rates;
mod responses;
mod seats;
mod server;
mod shape;
mod tag;
mod text;
mod text_or;
mod tls;
#[cfg(test)]
#[path = "../tests/http/support/tokenizers.rs"]
mod tokenizers_for_tests;

pub use access::{Access, ApiKey, KeyHash, ParseHashError, Scopes, SharedAccess};
pub use handlers::admin::{Operate, Reloaded};
pub use rates::RateLimits;
pub use server::{ServeSettings, serve};
pub use text::tools::ToolFormat;
pub use tls::{Certificate, CertificateError};

use axum::{
    Router,
    http::{Method, Uri},
    middleware::{from_fn, from_fn_with_state},
    routing::{delete, get, post},
};
use dashboard::Readers;
use error::ApiError;
use handlers::{admin, chat, completions, embeddings, models, route, sessions, status, tokenize};
use metrics::{Board, Watched};
use prompt::TextCache;
use rates::{Metered, Rates};
use responses::ResponseStore;
use std::{collections::BTreeMap, fmt, sync::Arc};
use tag::RequestTag;
use types::{Directory, Embed, Generate, Sessions};

/// What the endpoint serves, and with what.
#[derive(Clone)]
pub struct ApiState {
    /// Who generates.
    pub generate: Arc<dyn Generate>,
    /// Who makes vectors of texts.
    pub embed: Arc<dyn Embed>,
    /// Who knows the models and nodes.
    pub directory: Arc<dyn Directory>,
    /// Who reaches the sessions.
    pub sessions: Arc<dyn Sessions>,
    /// Who runs this process.
    pub operate: Arc<dyn Operate>,
    /// How.
    pub settings: ApiSettings,
}

/// What can be chosen about the endpoint.
#[derive(Debug, Clone)]
pub struct ApiSettings {
    /// Who may do what.
    pub access: SharedAccess,
    /// `owned_by` of the models.
    pub owned_by: String,
    /// No key's requests use what those of another key left in the prefix caches.
    pub cache_per_key: bool,
    /// Origins whose pages may read answers, as browsers send them; `*` is every one.
    pub cors_origins: Vec<String>,
    /// How models write calls of tools, by name, where that is not as their chat templates say.
    pub tool_formats: BTreeMap<String, ToolFormat>,
}

impl Default for ApiSettings {
    fn default() -> Self {
        Self {
            access: SharedAccess::default(),
            owned_by: "mlx-cluster".to_owned(),
            cache_per_key: false,
            cors_origins: Vec::new(),
            tool_formats: BTreeMap::new(),
        }
    }
}

/// The endpoint as an axum app, for [`serve`] or a larger one.
pub fn app(state: ApiState) -> Router {
    let rates = Arc::<Rates>::default();
    let board = Arc::new(Board::new());
    let watched = Arc::new(Watched::new(state.generate, board.clone()));
    let state = Arc::new(App {
        texts: TextCache::new(state.directory.clone()),
        generate: Arc::new(Metered::new(watched, rates.clone())),
        rates,
        responses: Arc::default(),
        board: board.clone(),
        readers: Readers::new(),
        directory: state.directory,
        embed: state.embed,
        sessions: state.sessions,
        operate: state.operate,
        settings: state.settings,
    });
    Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/models", get(models::list))
        // Names of models may have slashes.
        .route("/v1/models/{*id}", get(models::get))
        .route("/v1/sessions", get(sessions::list))
        // So may names of sessions.
        .route("/v1/sessions/{*id}", delete(sessions::delete))
        .route("/v1/cluster", get(status::cluster))
        .route("/v1/cluster/route", post(route::plan))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/{id}", get(responses::retrieve).delete(responses::delete))
        .route("/v1/responses/{id}/input_items", get(responses::input_items))
        .route("/v1/messages", post(anthropic::create))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/api/chat", post(ollama::chat))
        .route("/api/generate", post(ollama::generate))
        .route("/api/embed", post(ollama::embed::embed))
        .route("/api/tags", get(ollama::models::tags))
        .route("/api/show", post(ollama::models::show))
        .route("/api/version", get(ollama::models::version))
        .route("/v1/admin/reload", post(admin::reload))
        .route("/v1/admin/drain", post(admin::drain))
        .route("/openapi.json", get(openapi::document))
        .route("/v1/cluster/events", get(dashboard::events))
        .route("/metrics", get(metrics::metrics))
        .route("/health", get(status::health))
        .route("/ready", get(status::ready))
        .merge(dashboard::page())
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(state.clone(), rates::limit))
        .layer(from_fn_with_state(state.clone(), auth::check))
        .layer(from_fn(head::check))
        .layer(from_fn(shape::shape))
        .layer(from_fn_with_state(state.clone(), cors::allow))
        .layer(from_fn_with_state(board, metrics::count))
        .layer(from_fn(tag::tag))
        .with_state(state)
}

type AppState = Arc<App>;

struct App {
    generate: Arc<dyn Generate>,
    embed: Arc<dyn Embed>,
    directory: Arc<dyn Directory>,
    sessions: Arc<dyn Sessions>,
    operate: Arc<dyn Operate>,
    settings: ApiSettings,
    texts: TextCache,
    rates: Arc<Rates>,
    responses: Arc<ResponseStore>,
    board: Arc<Board>,
    readers: Readers,
}

async fn no_route(uri: Uri) -> ApiError {
    ApiError::NoRoute { path: uri.path().to_owned() }
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::WrongMethod { method: method.to_string(), path: uri.path().to_owned() }
}

impl fmt::Debug for ApiState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiState").field("settings", &self.settings).finish_non_exhaustive()
    }
}
