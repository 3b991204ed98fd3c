//! The messages. Their order and the order of their fields are part of the format: new things go to the end, and any
//! change bumps [`crate::VERSION`].

use serde::{Deserialize, Serialize};
use types::{
    AssetsHash, BlockHash, CacheEvent, EmbedRequest, EngineState, Finish, GenerateError, GenerateRequest,
    MeasureQuery, MemberProfile, ModelAssets, ModelCard, NodeId, NodeLoad, NodeRates, PipelineReport,
    RequestId, Role, SessionInfo, SessionRequest, StageNews, StageOrder, StageProfile, TokenEvent, TokenId,
    TokenLogprobs, TunnelOrder,
};

/// Who one end of a connection is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The program's version, such as `0.1.0`; for people.
    pub program: String,
    /// The process.
    pub node: NodeId,
    /// Its name for people.
    pub name: String,
    /// The cluster it belongs to; both ends must agree.
    pub cluster: String,
    /// What it does.
    pub roles: Vec<Role>,
    /// What it runs on, for people.
    pub hardware: String,
}

/// On a connection's first stream: `Hello` from the node, `Welcome` from the router, then reports from the node.
///
/// A router that will not have a node closes the connection with its reason, which any version can read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Control {
    /// The node names itself.
    Hello(Hello),
    /// The router names itself: the node belongs to the cluster now.
    Welcome(Hello),
    /// The node's engine changed, or what it serves.
    State {
        /// Whether it can answer.
        #[serde(with = "engine_state")]
        state: EngineState,
        /// What it serves.
        models: Vec<ModelCard>,
    },
    /// How much the node has to do.
    Load(NodeLoad),
    /// The node takes nothing new and will go once it has finished.
    Leaving,
    /// A part of what the engine's cache holds, parents before children: what was told of it before is void. Only parts
    /// of the same snapshot come between its first and its last one.
    CacheSnapshot {
        /// The engine's life.
        epoch: u64,
        /// Number of the first event that it does not include.
        seq: u64,
        /// Up to [`types::limits::CACHE_BLOCKS_SENT_MAX`] blocks.
        blocks: Vec<BlockHash>,
        /// Whether the snapshot is complete with this part.
        last: bool,
    },
    /// What changed in the engine's cache, in order.
    CacheEvents {
        /// The engine's life.
        epoch: u64,
        /// Number of the first of them; the others follow it.
        first_seq: u64,
        /// At least one, with up to [`types::limits::CACHE_BLOCKS_SENT_MAX`] blocks together.
        events: Vec<CacheEvent>,
    },
    /// How the node's pipeline stands.
    Pipeline(PipelineReport),
}

/// The first frame from a router on a request's stream; the only one but for [`Request::Tunnel`] and [`Request::Probe`],
/// after which come bytes that are none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Generate tokens.
    Generate(Box<GenerateRequest>),
    /// Send a model's tokenizer and template.
    Assets(AssetsHash),
    /// Name or end sessions.
    Sessions(SessionRequest),
    /// Send a snapshot of the cache on the control stream: something that came does not fit what came before.
    Resync,
    /// Make vectors of texts.
    Embed(Box<EmbedRequest>),
    /// Measure the node and a pipeline's model.
    Measure(MeasureQuery),
    /// Host a stage of a pipeline, for as long as this stream is open.
    Stage(StageOrder),
    /// Lead what follows on this stream, in both directions, to a stage's process.
    Tunnel(TunnelOrder),
    /// Take so many bytes, which follow on this stream: it is measured how long that takes.
    Probe {
        /// How many.
        bytes: u64,
    },
}

/// A node's frames on a request's stream.
///
/// `Generate`: `Rejected`, or `Accepted`, where asked for `Prompt`…, `Started`, `Tokens`…, `Done`; without tokens, without
/// `Started`. `Assets`: `Rejected` or `Assets`. `Sessions`: `Rejected` or `Sessions`. `Resync`: `Resyncing`.
/// `Embed`: `Rejected` or `Embedded`. `Measure`: `Rejected` or `Measured`. `Stage`: `Stage`…. `Tunnel`: `Rejected`, or `Tunnel`
/// and then bytes. `Probe`: `Probed`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// The engine has the request.
    Accepted,
    /// It will not be served here.
    Rejected(GenerateError),
    /// Tokens were generated.
    Tokens {
        /// Index in the output of the first of them.
        index: u32,
        /// The tokens, at least one.
        tokens: Vec<TokenId>,
        /// Of each token, where asked for.
        logprobs: Vec<TokenLogprobs>,
    },
    /// The last frame.
    Done(Finish),
    /// What was asked for; the last frame.
    Assets(ModelAssets),
    /// The sessions that were asked about; the last frame.
    Sessions(Vec<SessionInfo>),
    /// The prompt was read; the first token follows.
    Started {
        /// Tokens of the prompt whose KV was found in a cache.
        cached_tokens: u32,
    },
    /// A snapshot follows on the control stream; the last frame.
    Resyncing,
    /// Tokens of the prompt were read.
    Prompt {
        /// Index in the prompt of the first of them.
        index: u32,
        /// Of each token, at least one.
        logprobs: Vec<Option<TokenLogprobs>>,
    },
    /// The vector of each text; the last frame.
    Embedded(Vec<Vec<f32>>),
    /// What was measured; the last frame.
    Measured(MemberProfile),
    /// How the stage does; after [`StageNews::Failed`] comes nothing.
    Stage(StageNews),
    /// The way is open; what follows is no frame.
    Tunnel,
    /// All bytes came; the last frame.
    Probed,
}

/// To an engine child, over its standard input. The end of the input means `Shutdown`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum EngineCommand {
    /// Take a request.
    Submit(Box<GenerateRequest>),
    /// Forget a request.
    Cancel(RequestId),
    /// Exit.
    Shutdown,
    /// Name or end sessions.
    Sessions {
        /// Names the answer, one [`EngineReport::Sessions`].
        call: u64,
        /// What is asked.
        request: SessionRequest,
    },
    /// Take a request of an embedder, as `Submit` for any other model; `Cancel` names it, too.
    Embed(Box<EmbedRequest>),
}

/// From an engine child, over its standard output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum EngineReport {
    /// It is getting ready.
    Loading {
        /// What is being loaded.
        what: String,
        /// From 0 to 1.
        fraction: f32,
    },
    /// It can take requests.
    Ready {
        /// What it serves.
        card: ModelCard,
        /// The tokenizer and template.
        assets: ModelAssets,
        /// How fast it is.
        rates: NodeRates,
        /// Requests that can run at once.
        slots: u32,
    },
    /// A submitted request was not taken.
    Rejected {
        /// Which.
        id: RequestId,
        /// Why.
        error: GenerateError,
    },
    /// Something happened to a request.
    Event {
        /// Which.
        id: RequestId,
        /// What.
        event: TokenEvent,
    },
    /// How much it has to do.
    Load(NodeLoad),
    /// It cannot go on and exits.
    Failed {
        /// Why.
        message: String,
    },
    /// The answer to one [`EngineCommand::Sessions`].
    Sessions {
        /// Which.
        call: u64,
        /// The sessions that it was about.
        sessions: Vec<SessionInfo>,
    },
    /// What changed in its cache, in order; at its start there is nothing in it.
    Cache(Vec<CacheEvent>),
    /// The vectors of a request of an embedder.
    Embedded {
        /// Which.
        id: RequestId,
        /// Of each of its texts.
        vectors: Vec<Vec<f32>>,
    },
    /// A rank of a pipeline has found its neighbours.
    Joined,
    /// A rank after the first one computes.
    StageReady,
    /// A rank lives; the first one tells of its passes by its load.
    Beat {
        /// Passes that it has done.
        passes: u64,
    },
    /// What a process measured that was started for that.
    Profile(StageProfile),
}

/// [`EngineState`] is tagged for JSON, which bincode cannot read back; here it is an ordinary enum.
mod engine_state {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use types::EngineState;

    #[derive(Serialize, Deserialize)]
    enum Plain {
        Loading,
        Ready,
        Draining,
        Restarting(String),
        Pipeline(String),
    }

    pub(super) fn serialize<S: Serializer>(state: &EngineState, serializer: S) -> Result<S::Ok, S::Error> {
        let plain = match state {
            EngineState::Loading => Plain::Loading,
            EngineState::Ready => Plain::Ready,
            EngineState::Draining => Plain::Draining,
            EngineState::Restarting(seen) => Plain::Restarting(seen.clone()),
            EngineState::Pipeline(how) => Plain::Pipeline(how.clone()),
        };
        plain.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<EngineState, D::Error> {
        Ok(match Plain::deserialize(deserializer)? {
            Plain::Loading => EngineState::Loading,
            Plain::Ready => EngineState::Ready,
            Plain::Draining => EngineState::Draining,
            Plain::Restarting(seen) => EngineState::Restarting(seen),
            Plain::Pipeline(how) => EngineState::Pipeline(how),
        })
    }
}
