//! Every bound on what one request may ask for and on what one process may hold, with its reason.

use std::time::Duration;

/// Bytes of an HTTP body. A 128k-token prompt is about 0.6 MB of English; JSON escapes can triple that.
pub const HTTP_BODY_BYTES_MAX: usize = 16 << 20;
/// Levels of arrays and objects in a body's JSON: what the parser takes, which calls itself for each.
pub const JSON_DEPTH_MAX: usize = 127;
/// Tokens of a prompt, whatever the model's context: bounds one frame on the wire (4 bytes each).
pub const PROMPT_TOKENS_MAX: usize = 1 << 20;
/// Tokens of what an answer is expected to be like: a long file; it is kept beside the prompt.
pub const PREDICTION_TOKENS_MAX: usize = 1 << 17;
/// Tokens one request may generate.
pub const NEW_TOKENS_MAX: u32 = 1 << 20;
/// Entries of a request's `logit_bias`: OpenAI's bound.
pub const LOGIT_BIAS_MAX: usize = 300;
/// Bytes of a grammar or schema: those in use are a few kilobytes, and what is compiled on a server grows with it.
pub const GRAMMAR_BYTES_MAX: usize = 256 << 10;
/// Levels of arrays and objects in a JSON schema: those in use have a dozen, and what compiles a schema calls itself for each.
pub const SCHEMA_DEPTH_MAX: usize = 64;
/// Most probable tokens that are told of each token: OpenAI's bound.
pub const LOGPROBS_MAX: u32 = 20;
/// Tokens of one event that tells log-probabilities: keeps its frame small.
pub const LOGPROB_TOKENS_MAX: usize = 1024;
/// Tokens of a prompt whose own log-probabilities are asked for: they wait in memory until they are read, 168 bytes each.
pub const PROMPT_LOGPROB_TOKENS_MAX: usize = 1 << 15;
/// Texts of one question for vectors between a router and a node: their vectors fit one frame, and several nodes share
/// what one client asks.
pub const EMBED_INPUTS_MAX: usize = 32;
/// Numbers of one vector; the largest models have 4096.
pub const EMBED_DIMENSIONS_MAX: usize = 8192;
/// How long a node may take for one question for vectors: the longest texts on a slow machine, behind all that may wait there.
pub const EMBED_TIME_MAX: Duration = Duration::from_secs(600);
/// Extra stop tokens of a request.
pub const STOP_TOKENS_MAX: usize = 64;
/// Stop strings of a request. OpenAI allows 4; agents use more.
pub const STOP_STRINGS_MAX: usize = 16;
/// Bytes of one stop string: bounds what a stream holds back.
pub const STOP_STRING_BYTES_MAX: usize = 1024;
/// Bytes of a session's name.
pub const SESSION_ID_BYTES_MAX: usize = 64;
/// Bytes of a `cache_salt`: room for a hash or an id in any notation.
pub const CACHE_SALT_BYTES_MAX: usize = 256;
/// Sessions that one engine keeps; the longest unused one yields.
pub const SESSIONS_MAX: usize = 256;
/// How long the nodes of a cluster are given to tell of their sessions: an engine looks between two steps.
pub const SESSIONS_TIME_MAX: Duration = Duration::from_secs(2);
/// Milliseconds of a latency target that a request sets; who can wait for an hour is in no hurry.
pub const TARGET_MS_MAX: u32 = 3_600_000;
/// Requests that one engine keeps waiting for a slot; past it a node refuses.
pub const ENGINE_WAITING_MAX: usize = 64;
/// Requests that a router keeps waiting for a node; past it the client gets 429.
pub const ROUTER_WAITING_MAX: usize = 1024;
/// Token events a consumer may lag behind before its request is cancelled as stalled (one event is a step's tokens).
pub const EVENTS_BUFFERED_MAX: usize = 4096;
/// Blocks of an engine's cache that its node tells of: 33 million tokens, which no machine's memory holds. Past it routers
/// know less than there is.
pub const CACHE_BLOCKS_MAX: usize = 1 << 20;
/// Blocks in one report of an engine's cache: keeps frames small, so that a load report never waits long behind one.
pub const CACHE_BLOCKS_SENT_MAX: usize = 4096;
/// Nodes a router keeps.
pub const NODES_MAX: usize = 1024;
/// Members of a pipeline: more Macs than anybody joins for one model, and few enough to look through all their orders.
pub const PIPELINE_MEMBERS_MAX: usize = 8;
/// Models one node may serve.
pub const NODE_MODELS_MAX: usize = 64;
/// Bytes of a tokenizer with its chat template (the largest known vocabularies are about 35 MB).
pub const ASSETS_BYTES_MAX: usize = 64 << 20;
/// Without a sign of life for this long a node counts as lost.
pub const NODE_SILENCE_MAX: Duration = Duration::from_secs(2);
/// How often a node reports its load even when nothing changed; a few must fit into [`NODE_SILENCE_MAX`].
pub const LOAD_INTERVAL_MAX: Duration = Duration::from_millis(500);
/// At most one load report in this time.
pub const LOAD_INTERVAL_MIN: Duration = Duration::from_millis(50);

const _: () = assert!(SCHEMA_DEPTH_MAX < JSON_DEPTH_MAX);
const _: () = assert!(LOAD_INTERVAL_MAX.as_millis() * 3 < NODE_SILENCE_MAX.as_millis());
