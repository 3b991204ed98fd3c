//! Bounds and timeouts of the transport, each with its reason.

use std::time::Duration;
use types::limits::NODE_SILENCE_MAX;

/// From the first packet to a welcome: a few round trips on a local network, and a router that is busy.
pub const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(5);
/// Handshakes a router works on at once; more wait in the socket's queue.
pub const HANDSHAKES_MAX: usize = 64;
/// Connection attempts that may wait for one of [`HANDSHAKES_MAX`]; more are refused.
pub const HANDSHAKES_WAITING_MAX: usize = 256;
/// Requests in flight on one connection. An engine runs tens and keeps 64 waiting.
pub const REQUESTS_MAX: u32 = 1024;
/// Bytes of one stream that may be on their way or wait for its reader: hidden states of a pipeline's slices follow each
/// other at 39 MB/s where a round trip takes 10 ms, at 390 MB/s where it takes 1 ms.
pub const STREAM_WINDOW_BYTES: u32 = 384 << 10;
/// Bytes a connection may have sent and not seen acknowledged: 80 MB/s at 100 ms.
pub const SEND_WINDOW_BYTES: u64 = 8 << 20;
/// How often a quiet connection shows that it is alive; several must fit into [`NODE_SILENCE_MAX`].
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(500);
/// How often it is looked whether a connection's other end was heard.
pub const SILENCE_CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// Looks in a row at which it was not heard before it counts as lost: [`NODE_SILENCE_MAX`], a [`KEEP_ALIVE_INTERVAL`],
/// which QUIC's own timeout begins with at the latest, and one more, so that QUIC comes first where it is not confused.
pub const SILENT_CHECKS_MAX: u32 = 11;
/// Bytes of a packet at most, where the network lets them through: jumbo frames, and the loopback. Found out by probes; a
/// network of 1500 bytes loses a few of them.
pub const PACKET_BYTES_MAX: u16 = 8952;
/// First guess of a round trip. Local networks are faster; the default of 333 ms makes the first lost packet costly.
pub const INITIAL_ROUND_TRIP: Duration = Duration::from_millis(50);
/// From sending a request to `Accepted` or `Rejected`: what a node may need to admit it, not to run it. One that swaps
/// needs seconds; past this another node is better.
pub const ACCEPT_TIME_MAX: Duration = Duration::from_secs(4);
/// From asking for assets to having them: the largest over a slow Wi-Fi link.
pub const ASSETS_TIME_MAX: Duration = Duration::from_secs(60);
/// From asking a member of a pipeline to measure to having its figures: a part of a model is read and computed, and the
/// machine may be busy.
pub const MEASURE_TIME_MAX: Duration = Duration::from_secs(60);
/// Bytes by which a link is measured: a fifth of a second over a Wi-Fi link, and enough to see what a cable can do.
pub const PROBE_BYTES: u64 = 4 << 20;
/// How long these may take; a slower link is no link for a pipeline.
pub const PROBE_TIME_MAX: Duration = Duration::from_secs(5);
/// From a stream's start to its request being complete.
pub const REQUEST_TIME_MAX: Duration = Duration::from_secs(10);
/// How long closing waits until the other ends have been told.
pub const CLOSE_TIME_MAX: Duration = Duration::from_secs(1);
/// Warnings about refused peers in each [`WARNINGS_INTERVAL`]; the rest are counted.
pub const WARNINGS_MAX: u32 = 10;
/// See [`WARNINGS_MAX`].
pub const WARNINGS_INTERVAL: Duration = Duration::from_secs(10);
/// Bytes of a reason in a close frame, so that it fits into one packet.
pub const REASON_BYTES_MAX: usize = 600;

const _: () = assert!(
    SILENCE_CHECK_INTERVAL.as_millis() * SILENT_CHECKS_MAX as u128
        > NODE_SILENCE_MAX.as_millis() + KEEP_ALIVE_INTERVAL.as_millis()
);
const _: () = assert!(KEEP_ALIVE_INTERVAL.as_millis() * 3 < NODE_SILENCE_MAX.as_millis());
