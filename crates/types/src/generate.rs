//! The one verb of the project, and the events that answer it.

use crate::{
    AssetsHash, ClusterView, GenerateError, GenerateRequest, ModelAssets, ModelCard, NodeId, TokenId,
};
use futures_core::Stream;
use serde::{Deserialize, Serialize};
use std::{fmt, future::Future, pin::Pin, sync::Arc};

/// A boxed future, so that the traits below can be used as objects.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Where asked for, [`TokenEvent::Prompt`] with gapless indexes; perhaps one [`TokenEvent::Started`], any number of [`TokenEvent::Tokens`] with gapless indexes, then exactly one
/// [`TokenEvent::Finished`], then the end. Dropping it cancels the request.
pub type TokenStream = Pin<Box<dyn Stream<Item = TokenEvent> + Send>>;

/// One thing that happened to an accepted request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum TokenEvent {
    /// The prompt was read; the first token comes at once. Where a request ended without one, this does not come.
    Started {
        /// Tokens of the prompt whose KV was found in a cache.
        cached_tokens: u32,
    },
    /// Tokens were generated.
    Tokens {
        /// Index in the output of the first of them; gapless, counts from the tokens that came with the request
        /// ([`crate::GenerateDraft::output`]), and so commonly from 0.
        index: u32,
        /// The tokens, at least one. An end-of-text token is not among them.
        tokens: Vec<TokenId>,
        /// Of each token, where the request asks for them; else none.
        logprobs: Vec<TokenLogprobs>,
    },
    /// The last event.
    Finished(Finish),
    /// Tokens of the prompt were read whose log-probabilities the request asks for.
    Prompt {
        /// Index in the prompt of the first of them; gapless, from 0.
        index: u32,
        /// Of each token, at least one; the first token of a prompt has none.
        logprobs: Vec<Option<TokenLogprobs>>,
    },
}

/// How probable a token was: natural logarithms of the model's own distribution, before penalties, temperature, grammar and
/// cuts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprobs {
    /// Of the token itself.
    pub logprob: f32,
    /// The most probable tokens, as many as asked for, the most probable first.
    pub top: Vec<(TokenId, f32)>,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// What it cost.
    pub usage: Usage,
}

/// Why a request ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FinishReason {
    /// An end-of-text or stop token was drawn.
    Stop,
    /// `max_tokens` or the model's context was reached.
    Length,
    /// The consumer went away.
    Cancelled,
    /// It broke off.
    Failed(GenerateError),
}

/// Tokens read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of those, tokens whose KV was found in a cache.
    pub cached_tokens: u32,
    /// Tokens generated, an end-of-text token included.
    pub completion_tokens: u32,
    /// Tokens that were guessed ahead and came true; all of them are among the generated ones.
    pub accepted_drafts: u32,
    /// Tokens that were guessed ahead and did not come true.
    pub rejected_drafts: u32,
}

/// Where a request went and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RouteInfo {
    /// The node that serves it.
    pub node: NodeId,
    /// That node's name for people.
    pub node_name: String,
    /// Tokens of the prompt that the router expected in the node's cache.
    pub matched_tokens: u32,
    /// The deciding term in a word or two, such as `affinity` or `least work`.
    pub reason: String,
}

/// What would become of a request, were it made now: nothing is sent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoutePlan {
    /// The model.
    pub model: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens to generate at most.
    pub max_tokens: u32,
    /// Where it would go; none where it would wait.
    pub route: Option<RouteInfo>,
    /// Requests that wait at this router.
    pub waiting: u32,
    /// Seconds that it is expected to wait for a node, where it would.
    pub wait_s: Option<f64>,
    /// All nodes, by id.
    pub nodes: Vec<RouteNode>,
}

/// What speaks for and against a node, for one request.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RouteNode {
    /// The node.
    pub node: NodeId,
    /// Its name for people.
    pub name: String,
    /// Tokens of the prompt expected in its cache.
    pub matched_tokens: u32,
    /// Requests there, or on their way to it.
    pub requests: u32,
    /// Seconds until the prompts ahead are read.
    pub backlog_s: f64,
    /// Seconds until a slot is free.
    pub slot_s: f64,
    /// Seconds until the request's own prompt is read.
    pub prefill_s: f64,
    /// Seconds there and back.
    pub rtt_s: f64,
    /// Seconds to read again what the request would evict, weighted.
    pub evict_s: f64,
    /// By how much others would wait longer for their first tokens, and what is read that could be read once; weighted.
    pub others_s: f64,
    /// Seconds of writing the answer, weighted.
    pub decode_s: f64,
    /// Their sum: the least is chosen, by the policy `cost`.
    pub total_s: f64,
    /// Why it cannot be chosen, where it cannot.
    pub excluded: Option<String>,
}

/// An accepted request.
pub struct Generation {
    /// Where it went.
    pub route: RouteInfo,
    /// What happens to it.
    pub events: TokenStream,
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generation").field("route", &self.route).finish_non_exhaustive()
    }
}

/// Whoever can generate: a router, a peer over the network, a local engine.
pub trait Generate: Send + Sync + 'static {
    /// Accepts a request or says why not. After `Ok`, whatever happens is an event.
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Generation, GenerateError>>;
}

/// Whoever knows the cluster: what is served, with which tokenizer, and how the nodes are.
pub trait Directory: Send + Sync + 'static {
    /// Models that at least one ready node serves, by name, each once.
    fn models(&self) -> Vec<ModelCard>;

    /// A model's tokenizer and template, from a cache or from a node that serves it.
    fn assets(&self, hash: AssetsHash) -> BoxFuture<'_, Result<Arc<ModelAssets>, GenerateError>>;

    /// What would become of a request now, and why; nothing is sent.
    fn plan(&self, request: &GenerateRequest) -> Result<RoutePlan, GenerateError>;

    /// Everything there is to show.
    fn view(&self) -> ClusterView;
}
