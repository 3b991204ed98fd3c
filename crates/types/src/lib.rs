//! The vocabulary of the project: ids, requests, token events, block hashes, limits and the traits at its seams.
//!
//! Data flows one way: `api` parses JSON into a [`GenerateRequest`], a [`Generate`] answers with a [`Generation`]
//! whose [`TokenEvent`]s end with exactly one [`TokenEvent::Finished`]. No I/O happens here, and no clock is read.
#![warn(missing_docs)]

mod block;
mod cache;
mod embed;
mod error;
mod generate;
mod id;
pub mod limits;
mod model;
mod node;
mod pipeline;
mod request;
mod sampling;
mod sessions;

pub use block::{BLOCK_TOKENS, BlockHash, block_hashes};
pub use cache::{
    AffinityKey, CacheEvent, CacheScope, CacheSnapshot, ClientId, Priority, Service, SessionId,
    SessionIdError, SessionInfo,
};
pub use embed::{Embed, EmbedDraft, EmbedRequest, EmbedRequestError, Embeddings};
pub use error::GenerateError;
pub use generate::{
    BoxFuture, Directory, Finish, FinishReason, Generate, Generation, RouteInfo, RouteNode, RoutePlan,
    TokenEvent, TokenLogprobs, TokenStream, Usage,
};
pub use id::{NodeId, ParseIdError, RequestId};
pub use model::{AssetsHash, ModelAssets, ModelCard, ModelKind};
pub use node::{
    ClusterView, DraftCount, DraftOrigin, EngineState, MoveCounts, MoveKind, NodeLoad, NodePrediction,
    NodeRates, NodeView, RequestMove, Role,
};
pub use pipeline::{
    EpochId, LinkProfile, MeasureQuery, MemberProfile, PipelinePhase, PipelinePlan, PipelineReport,
    PlannedStage, StageNews, StageOrder, StageOrderError, StageProfile, TunnelOrder,
};
pub use request::{
    GenerateDraft, GenerateRequest, GenerateRequestError, Grammar, OutputRules, Speculation, TokenReport,
};
pub use sampling::{SamplingDraft, SamplingError, SamplingParams};
pub use sessions::{NodeSession, SessionAnswers, SessionRequest, Sessions};

/// A token's index in its model's vocabulary.
pub type TokenId = u32;
