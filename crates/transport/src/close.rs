//! How connections and streams end, in numbers for the other end and in words for people.

use crate::limits;
use quinn::{Connection, ConnectionError, ReadError, VarInt, WriteError};
use std::net::SocketAddr;
use types::limits::NODE_SILENCE_MAX;
use wire::FrameError;

/// A connection is closed in good order.
pub(crate) const CLOSED: VarInt = VarInt::from_u32(0);
/// A router will not have this node; the reason says why.
pub(crate) const REFUSED: VarInt = VarInt::from_u32(1);
/// A process has dialled itself.
pub(crate) const ITSELF: VarInt = VarInt::from_u32(2);
/// The other end does not keep to the protocol.
pub(crate) const PROTOCOL: VarInt = VarInt::from_u32(3);
/// The other end proved a key that is not accepted any more.
pub(crate) const REVOKED: VarInt = VarInt::from_u32(7);
/// Nothing was heard of the other end for too long.
pub(crate) const SILENT: VarInt = VarInt::from_u32(6);
/// A request's stream: nobody wants the answer any more.
pub(crate) const CANCELLED: VarInt = VarInt::from_u32(4);
/// A request's stream: the node gave the request up without an answer.
pub(crate) const ABANDONED: VarInt = VarInt::from_u32(5);

/// Why nothing more can be read from a stream.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    /// The bytes are wrong.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// There are no more bytes.
    #[error("{}", read_error(.0))]
    Stream(#[from] ReadError),
}

/// Why nothing more can be written to a stream.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// The message cannot travel.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Nobody takes bytes.
    #[error("{}", write_error(.0))]
    Stream(#[from] WriteError),
}

/// Closes with a reason, cut so that it fits into one packet. One that has ended keeps the reason that it has.
pub(crate) fn close(connection: &Connection, code: VarInt, reason: &str) {
    if connection.close_reason().is_none() {
        connection.close(code, cut(reason).as_bytes());
    }
}

/// What is said of an end that is not heard.
pub(crate) fn silent() -> String {
    format!("no sign of life for {} s", NODE_SILENCE_MAX.as_secs())
}

/// At most [`limits::REASON_BYTES_MAX`] of `reason`.
pub(crate) fn cut(reason: &str) -> &str {
    let mut end = reason.len().min(limits::REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}

/// What happened to a connection, in words.
pub(crate) fn connection_error(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            let reason = String::from_utf8_lossy(&close.reason);
            if reason.is_empty() { "closed by the other end".to_owned() } else { reason.into_owned() }
        }
        ConnectionError::TimedOut => silent(),
        ConnectionError::LocallyClosed => "closed here".to_owned(),
        ConnectionError::Reset => "it was restarted".to_owned(),
        error => error.to_string(),
    }
}

/// An address as people know it: IPv4 also where the socket is a dual-stack one.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::from((v4, v6.port())),
            None => address,
        },
        SocketAddr::V4(_) => address,
    }
}

fn read_error(error: &ReadError) -> String {
    match error {
        ReadError::Reset(code) => stream_code(*code),
        ReadError::ConnectionLost(error) => connection_error(error),
        error => error.to_string(),
    }
}

fn write_error(error: &WriteError) -> String {
    match error {
        WriteError::Stopped(code) => stream_code(*code),
        WriteError::ConnectionLost(error) => connection_error(error),
        error => error.to_string(),
    }
}

fn stream_code(code: VarInt) -> String {
    match code {
        CANCELLED => "cancelled by the other end".to_owned(),
        ABANDONED => "given up by the other end".to_owned(),
        PROTOCOL => "the other end found the frames wrong".to_owned(),
        code => format!("ended by the other end with code {code}"),
    }
}
