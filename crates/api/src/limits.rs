//! What one connection and one request may be, each with its reason; what bounds the cluster is in [`types::limits`].

use std::time::Duration;

/// Connections served at once; where there are more, one that waits for its client makes room. One that does nothing costs about
/// 30 kB.
pub(crate) const CONNECTIONS_MAX: usize = 4096;
/// For a request's headers to arrive, which also ends connections that stay idle.
pub(crate) const HEADERS_TIME_MAX: Duration = Duration::from_secs(60);
/// For a TLS handshake: two round trips and a signature.
pub(crate) const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// Bytes that are buffered of one connection. Headers that exceed it are refused by the HTTP library, without a body.
pub(crate) const CONNECTION_BUFFER_BYTES_MAX: usize = 64 << 10;
/// Bytes of a request's headers, names and values: what common proxies allow.
pub(crate) const HEADERS_BYTES_MAX: usize = 32 << 10;
/// Bytes of a path with its query: ids and names are short.
pub(crate) const URI_BYTES_MAX: usize = 8 << 10;
/// For the whole body to arrive: the largest takes 13 s over 10 Mbit/s.
pub(crate) const BODY_TIME_MAX: Duration = Duration::from_secs(30);
/// Bytes of a refused body that are read and dropped, so that a client that sends before it reads gets the refusal.
pub(crate) const DRAINED_BYTES_MAX: usize = 64 << 20;
/// Texts of which one request wants vectors: OpenAI's bound.
pub(crate) const INPUTS_MAX: usize = 2048;
/// Prompts of one request; each takes a place in the queue.
pub(crate) const PROMPTS_MAX: usize = 64;
/// Answers to one request: each is a request of its own to the cluster, and takes a place in its queue.
pub(crate) const CHOICES_MAX: usize = 128;
/// Tools of one request: OpenAI's bound.
pub(crate) const TOOLS_MAX: usize = 128;
/// Bytes of a tool's name. OpenAI allows 64; servers of tools put their own name before it.
pub(crate) const TOOL_NAME_BYTES_MAX: usize = 128;
/// Texts that an answer may be one of.
pub(crate) const TEXTS_MAX: usize = 1024;
/// A client that takes nothing of what is written for this long is gone, or might as well be: it holds a slot of an engine.
pub(crate) const WRITE_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a page may remember what it was told of another origin: browsers cap it at hours.
pub(crate) const CORS_AGE_MAX: Duration = Duration::from_secs(600);

const _: () = assert!(HEADERS_BYTES_MAX + URI_BYTES_MAX < CONNECTION_BUFFER_BYTES_MAX);
