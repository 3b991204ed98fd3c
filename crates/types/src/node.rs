//! A node as others see it.

use crate::{ModelCard, NodeId, PipelineReport, RequestId};
use serde::{Deserialize, Serialize};

/// What an `mlx-node` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Hosts an engine.
    Node,
    /// Routes and serves HTTP.
    Router,
}

/// Whether a node's engine can answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "detail")]
pub enum EngineState {
    /// Weights are being loaded.
    Loading,
    /// It answers.
    Ready,
    /// It finishes what it has and takes nothing new.
    Draining,
    /// It died and comes back; the text says what was seen.
    Restarting(String),
    /// It is a part of a pipeline, or is to become one; the text says how that stands.
    Pipeline(String),
}

/// How fast an engine is, measured at its start and corrected as it runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NodeRates {
    /// Prompt tokens a second when nothing else runs.
    pub prefill_tokens_per_s: f32,
    /// Seconds of a decode step with one row.
    pub decode_step_s: f32,
    /// Seconds that each further row adds to a decode step.
    pub decode_row_s: f32,
}

/// Where tokens that are guessed ahead come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DraftOrigin {
    /// The request's own prompt and output.
    Context,
    /// What its client expects the answer to be like.
    Prediction,
    /// Answers to earlier requests.
    Answers,
    /// A smaller model, or another source that the engine was given.
    Model,
}

impl DraftOrigin {
    /// All of them, in the order of [`NodeLoad::drafts`].
    pub const ALL: [Self; 4] = [Self::Context, Self::Prediction, Self::Answers, Self::Model];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Context => "context",
            Self::Prediction => "prediction",
            Self::Answers => "answers",
            Self::Model => "model",
        }
    }
}

/// Tokens that were guessed ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DraftCount {
    /// Those that came true.
    pub accepted: u64,
    /// Those that did not.
    pub rejected: u64,
}

/// How much an engine has to do.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NodeLoad {
    /// Requests being decoded or prefilled.
    pub running: u32,
    /// Requests waiting for a slot.
    pub waiting: u32,
    /// Requests that can run at once.
    pub slots: u32,
    /// Prompt tokens not yet prefilled, of running and waiting requests.
    pub prefill_backlog_tokens: u64,
    /// Tokens still to be generated at most, of running and waiting requests.
    pub decode_backlog_tokens: u64,
    /// Tokens of KV that running requests hold, and in total; what only the prefix cache holds counts as free.
    pub kv_tokens: (u64, u64),
    /// Tokens of KV that the prefix cache holds, those in use by requests included.
    pub cached_kv_tokens: u64,
    /// Seconds of prefill that running and waiting requests still need, as far as not cached.
    pub prefill_backlog_s: f32,
    /// Prompt tokens that a new request may bring and still see its first token in time (FairBatching's prefill
    /// admission budget).
    pub prefill_budget_tokens: u64,
    /// Seconds of a decode step with 1, 2, 4, 8, 16, 32, 64 and 128 rows of usual length.
    pub decode_step_s: [f32; 8],
    /// Seconds since the block that would be evicted next was last used; 0 where there is none.
    pub cache_tail_age_s: f32,
    /// Seconds after which cached blocks that nobody uses were used again, on average; 0 until one was.
    pub cache_reuse_s: f32,
    /// Passes that have ended since the engine started: where this does not grow though requests run, it hangs.
    pub passes: u64,
    /// Seconds that the pass in flight is expected to take; 0 where there is none.
    pub step_s: f32,
    /// Tokens guessed ahead since the engine started, by [`DraftOrigin::ALL`].
    pub drafts: [DraftCount; DraftOrigin::ALL.len()],
    /// Speed.
    pub rates: NodeRates,
}

/// One node in `/v1/cluster`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NodeView {
    /// Its id.
    pub id: NodeId,
    /// Its name for people: the host's, unless configured.
    pub name: String,
    /// Whether it is this process.
    pub local: bool,
    /// Where it was reached; none for the local one.
    pub address: Option<std::net::SocketAddr>,
    /// What it runs on, such as `Apple M4 Max, 64 GiB` or `CPU x86_64, 2 cores`.
    pub hardware: String,
    /// The program's version.
    pub version: String,
    /// Its engine.
    pub engine: EngineState,
    /// What it serves.
    pub models: Vec<ModelCard>,
    /// What it has to do; none until it has told.
    pub load: Option<NodeLoad>,
    /// Round-trip time in seconds; none for the local one.
    pub rtt_s: Option<f32>,
    /// Blocks of its cache that this router knows of.
    pub cached_blocks: u64,
    /// How well this router predicts it.
    pub prediction: NodePrediction,
    /// Whether this router leaves it alone, since it failed lately.
    pub avoided: bool,
    /// What it tells of its pipeline, where it belongs to one.
    pub pipeline: Option<PipelineReport>,
}

/// What a router has learned of a node from the requests that it sent there.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct NodePrediction {
    /// Requests learned from.
    pub requests: u64,
    /// Prompt tokens a second when nothing else runs, before attention.
    pub prefill_tokens_per_s: f64,
    /// How long a decode step takes, relative to what the node says.
    pub decode_scale: f64,
    /// Mean relative error of the predicted time to the first token: above 0 where it was predicted too long.
    pub bias: f64,
    /// Mean of its magnitude.
    pub error: f64,
}

/// `/v1/cluster`.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ClusterView {
    /// The cluster's name.
    pub cluster: String,
    /// Nodes, by name and then id.
    pub nodes: Vec<NodeView>,
    /// Requests that this router has in flight.
    pub in_flight: u32,
    /// Requests that wait at this router.
    pub waiting: u32,
    /// Whether this router is leaving: it finishes what it has.
    pub draining: bool,
    /// How often requests did not stay where they were sent.
    pub moves: MoveCounts,
    /// The last of these moves, the newest last.
    pub recent_moves: Vec<RequestMove>,
}

/// What this router did about nodes that failed, since it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct MoveCounts {
    /// Requests that another node got before their first token.
    pub retried: u64,
    /// Requests that went on elsewhere in the middle of their answer.
    pub resumed: u64,
    /// Requests that a second node got beside a silent one.
    pub hedged: u64,
    /// Of those, requests that the second node brought on first.
    pub hedge_won: u64,
    /// Times that a node was left alone for a while, since it failed.
    pub tripped: u64,
}

/// One of the ways in which a request does not stay where it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveKind {
    /// [`MoveCounts::retried`].
    Retried,
    /// [`MoveCounts::resumed`].
    Resumed,
    /// [`MoveCounts::hedged`].
    Hedged,
    /// [`MoveCounts::hedge_won`].
    HedgeWon,
}

/// A request that did not stay where it was sent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RequestMove {
    /// Which.
    pub request: RequestId,
    /// How.
    pub kind: MoveKind,
    /// Name of the node that had it.
    pub from: String,
    /// Name of the node that has it then, or has it too.
    pub to: String,
    /// Tokens of its answer that there were.
    pub tokens: u32,
    /// What the first node failed with.
    pub why: String,
    /// Seconds since then.
    pub age_s: f32,
}
