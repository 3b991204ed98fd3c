//! QUIC between the processes of a cluster: identity, connections, and one stream per request.
//!
//! A node dials a router ([`Endpoint::join`] → [`RouterLink`]); a router takes what comes ([`Endpoint::accept`] →
//! [`Peer`]). Reports flow from node to router on the control stream; requests from router to node, each on a stream
//! of its own, whose reset in either direction cancels it.
//!
//! Who owns what: [`Endpoint`] the socket and the handshakes in flight, [`Peer`] and [`RouterLink`] one end of a
//! connection, a `TokenStream` or [`ReplySender`] one end of a request's stream. Every wait is bounded by
//! [`limits`]; both ends prove a [`ClusterKey`] in the TLS handshake, before a byte of ours is read. Which keys are taken may
//! change while connections are up ([`Endpoint::rekey`]).
#![warn(missing_docs)]

mod close;
mod endpoint;
mod framed;
mod handshake;
mod key;
pub mod limits;
mod peer;
mod pipeline;
mod revocation;
mod router_link;
mod silence;
mod socket;
mod tls;
mod warnings;

pub use endpoint::{Endpoint, JoinError, TransportError};
pub use key::{ClusterKey, ClusterKeys, GenerateKeyError, ParseKeyError};
pub use peer::{ControlReceiver, NoAnswer, Peer};
pub use pipeline::{StageStream, Tunnel, TunnelOpening};
pub use router_link::{IncomingRequest, LinkClosed, ReplyError, ReplySender, RouterLink};
