//! What a node is told at its start, why it may not start, and every timeout of this crate.

use crate::dispatch::DispatchSettings;
use crate::engine_start::StartEngine;
use crate::pipeline::PipelineSettings;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use transport::ClusterKeys;
use types::{NodeId, Role};

/// From the start of an engine child to its `Ready`: the largest checkpoints over a slow external disk.
pub const MODEL_LOAD_TIME_MAX: Duration = Duration::from_secs(1800);
/// An engine that says nothing for this long hangs: it reports at least every [`types::limits::LOAD_INTERVAL_MAX`] but
/// during a step, and the longest step compiles kernels or reads 2048 tokens on a slow machine.
pub const ENGINE_SILENCE_MAX: Duration = Duration::from_secs(120);
/// How long an engine child may take to exit when asked, before it is killed.
pub(crate) const ENGINE_EXIT_TIME_MAX: Duration = Duration::from_secs(5);
/// How long the system may take to tell how a process ended whose output has ended or that was killed.
pub(crate) const ENGINE_REAP_TIME_MAX: Duration = Duration::from_secs(2);
/// The second restart of an engine in a row waits this long, each further one twice as long; the first not at all.
pub(crate) const RESTART_DELAY: Duration = Duration::from_secs(1);
/// The longest wait before a restart: a machine that needs repair should still come back by itself.
pub(crate) const RESTART_DELAY_MAX: Duration = Duration::from_secs(30);
/// An engine that was ready for this long and then dies had a new accident, not the same one again.
pub(crate) const STABLE_AFTER: Duration = Duration::from_secs(60);
/// Slots believed of an engine child, whatever it reports: bounds everything sized by them.
pub(crate) const ENGINE_SLOTS_MAX: u32 = 1024;
/// A rank of a pipeline tells every 250 ms that it lives; one that does not for this long hangs or is stopped, and the others
/// wait for it.
pub(crate) const RANK_SILENCE_MAX: Duration = Duration::from_millis(1800);
/// From the start of a rank's process to its first word: it is loaded by the system, on a machine that may be busy.
pub(crate) const RANK_START_TIME_MAX: Duration = Duration::from_secs(10);
/// First wait before a router is dialled again.
pub(crate) const REDIAL_DELAY: Duration = Duration::from_millis(200);
/// The longest: a router that returns should have its nodes back within 2 s.
pub(crate) const REDIAL_DELAY_MAX: Duration = Duration::from_secs(1);
/// Wait before a router is dialled again that has another key or refused us: somebody has to change something first.
pub(crate) const REDIAL_DELAY_REFUSED: Duration = Duration::from_secs(10);
/// Routers one node dials; a cluster has a few, and configured addresses may be double.
pub(crate) const UPLINKS_MAX: usize = 256;
/// How long a node may keep back that it has accepted a request: a first token that is there by then shares its packet.
pub(crate) const ACCEPT_HELD_MAX: Duration = Duration::from_millis(2);
/// How long a request waits at a router for a node with room; OpenAI's clients give up after minutes, people sooner.
pub(crate) const ROUTER_WAIT_MAX: Duration = Duration::from_secs(30);
/// Nodes that a request is tried on before one of them brings it a token: the first, and three more.
pub(crate) const TRIES_MAX: usize = 4;
/// Engines that may fail under a request since its last token before it is not tried again: it may be what they fail of,
/// and every failure holds all others there up.
pub(crate) const ENGINE_FAILURES_MAX: usize = 2;
/// Times that an answer may go on elsewhere: more than a long one can meet with in a cluster that loses a node every few
/// seconds, and an end to what would go round for ever.
pub(crate) const RESUMES_MAX: usize = 64;
/// The least that a refused client is asked to wait.
pub(crate) const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
/// Questions about sessions that an engine has not answered yet; past it a node refuses.
pub(crate) const SESSION_CALLS_MAX: usize = 64;
/// Tokenizers that a router keeps; each has at most 64 MiB and commonly 2 to 17.
pub(crate) const ASSETS_CACHED_MAX: usize = 8;
/// How long an actor may take to stop, before it is left behind.
pub(crate) const ACTOR_STOP_TIME_MAX: Duration = Duration::from_secs(8);
/// How long discovery may take for its goodbye.
pub(crate) const GOODBYE_TIME_MAX: Duration = Duration::from_secs(2);
/// What a client refused by a full node is told: about the time in which one of many rows ends.
pub(crate) const NODE_RETRY_AFTER: Duration = Duration::from_secs(1);

const _: () = assert!(
    ACTOR_STOP_TIME_MAX.as_millis() > (ENGINE_EXIT_TIME_MAX.as_millis() + ENGINE_REAP_TIME_MAX.as_millis())
);

/// Everything a node needs to know.
#[derive(Debug, Clone)]
pub struct NodeSettings {
    /// Its name for people.
    pub name: String,
    /// The cluster it belongs to.
    pub cluster: String,
    /// Drawn at random for each start of the program.
    pub id: NodeId,
    /// [`Role::Node`] hosts an engine, [`Role::Router`] dispatches; commonly both.
    pub roles: Vec<Role>,
    /// What it runs on, for people.
    pub hardware: String,
    /// Where the cluster's QUIC endpoint listens (UDP).
    pub listen: SocketAddr,
    /// What proves that others belong to the cluster.
    pub keys: ClusterKeys,
    /// How to start the engine; needed for [`Role::Node`] without a pipeline.
    pub engine: Option<Arc<dyn StartEngine>>,
    /// How its router dispatches; of no use without [`Role::Router`].
    pub dispatch: DispatchSettings,
    /// Have [`crate::start`] wait until the engine is ready, and fail if it cannot be: before anything is served.
    pub wait_for_model: bool,
    /// An engine that is not ready after this long is killed and started anew; [`MODEL_LOAD_TIME_MAX`] if in doubt.
    pub model_load_time_max: Duration,
    /// An engine that says nothing for this long is killed and started anew; [`ENGINE_SILENCE_MAX`] if in doubt.
    pub engine_silence_max: Duration,
    /// Whether to find others, and be found, over mDNS.
    pub mdns: bool,
    /// Routers to dial in any case, as `host:port`.
    pub peers: Vec<String>,
    /// Network interfaces to use for mDNS; empty means all.
    pub interfaces: Vec<String>,
    /// The pipeline that it is a member of, instead of an engine of its own.
    pub pipeline: Option<PipelineSettings>,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It would do nothing.
    #[error("roles is empty: a node needs at least one of \"node\" and \"router\"")]
    NoRole,
    /// The node role without an engine.
    #[error("the role \"node\" needs an engine to start, and none is configured")]
    NoEngine,
    /// A pipeline's member that others cannot reach.
    #[error(
        "a member of a pipeline needs both roles, \"node\" and \"router\": members reach each other through them"
    )]
    PipelineRoles,
    /// The socket cannot be had.
    #[error(transparent)]
    Transport(#[from] transport::TransportError),
    /// Discovery cannot start.
    #[error(transparent)]
    Discovery(#[from] discovery::DiscoveryError),
    /// The model cannot be loaded.
    #[error("the engine cannot start: {message}")]
    Engine {
        /// What the engine said, or what was seen of it.
        message: String,
    },
    /// An actor failed as it started.
    #[error("an internal part cannot start: {message}")]
    Actor {
        /// What was seen.
        message: String,
    },
}

impl From<ractor::SpawnErr> for StartError {
    fn from(error: ractor::SpawnErr) -> Self {
        Self::Actor { message: error.to_string() }
    }
}
