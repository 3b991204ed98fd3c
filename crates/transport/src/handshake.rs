//! What is said on a new connection's control stream before it is anyone's.
//!
//! Node: preface, `Hello`. Router: preface, `Welcome`, or it closes the connection with a reason, which peers of any
//! version can read.

use crate::{
    ControlReceiver, JoinError, Peer, RouterLink,
    close::{self, ReceiveError, SendError, close},
    framed::{FrameReader, FrameWriter},
    revocation,
    tls::Accepted,
};
use quinn::{
    Connecting, Connection, ConnectionError, Incoming, ReadError, ReadExactError, RecvStream, WriteError,
};
use std::net::SocketAddr;
use tokio::sync::watch;
use wire::{
    Control, FrameClass, Hello, PrefaceError,
    preface::{self, PREFACE_BYTES},
};

/// Why a router sends a node away, in words.
#[derive(Debug)]
pub(crate) struct Refusal(pub(crate) String);

/// TLS alerts are QUIC errors from here to 0x1ff (RFC 9001, section 4.8).
const CRYPTO_ERRORS: std::ops::Range<u64> = 0x100..0x200;

/// The router's side.
pub(crate) async fn greet(
    incoming: Incoming,
    welcome: Hello,
    accepted: watch::Receiver<Accepted>,
) -> Result<(Peer, ControlReceiver), Refusal> {
    let connection = incoming.accept().map_err(|error| tls_refusal(&error))?;
    let connection = connection.await.map_err(|error| tls_refusal(&error))?;
    revocation::watch(connection.clone(), accepted);
    match hear(&connection, &welcome).await {
        Ok((hello, reader, mut writer)) => {
            writer.push(&preface::preface());
            let sent = writer.send(FrameClass::Hello, &Control::Welcome(welcome)).await;
            sent.map_err(|error| Refusal(format!("it was not there to be welcomed: {error}")))?;
            // Nothing more is said in this direction.
            let _ = writer.stream.finish();
            let reader = reader.with_class(FrameClass::Control);
            Ok((Peer::new(connection.clone(), hello), ControlReceiver::new(connection, reader)))
        }
        Err((code, reason)) => {
            close(&connection, code, &reason);
            Err(Refusal(reason))
        }
    }
}

/// Hears a node's hello; on error a close code and a reason that the node will read.
async fn hear(
    connection: &Connection,
    welcome: &Hello,
) -> Result<(Hello, FrameReader<Control>, FrameWriter), (quinn::VarInt, String)> {
    let protocol = |reason: String| (close::PROTOCOL, reason);
    let (writer, mut reader) =
        connection.accept_bi().await.map_err(|error| protocol(close::connection_error(&error)))?;
    let bytes = read_preface(&mut reader).await.map_err(|error| protocol(error.to_string()))?;
    match preface::check(bytes) {
        Ok(()) => {}
        Err(PrefaceError::Version { ours, theirs }) => return Err((close::REFUSED, versions(ours, theirs))),
        Err(error @ PrefaceError::Foreign { .. }) => return Err(protocol(error.to_string())),
    }
    let mut reader = FrameReader::new(reader, FrameClass::Hello);
    let hello = match reader.next().await {
        Ok(Some(Control::Hello(hello))) => hello,
        Ok(_) => return Err(protocol("the first frame is no hello".to_owned())),
        Err(error) => return Err(protocol(error.to_string())),
    };
    if hello.node == welcome.node {
        return Err((close::ITSELF, "it is this process itself".to_owned()));
    }
    if hello.cluster != welcome.cluster {
        let reason = format!(
            "the router {:?} belongs to cluster {:?}, the node {:?} to cluster {:?}",
            welcome.name, welcome.cluster, hello.name, hello.cluster
        );
        return Err((close::REFUSED, reason));
    }
    Ok((hello, reader, FrameWriter::new(writer)))
}

/// The node's side.
pub(crate) async fn join(
    connecting: Connecting,
    router: SocketAddr,
    hello: Hello,
    accepted: watch::Receiver<Accepted>,
) -> Result<RouterLink, JoinError> {
    let lost = |error: &ConnectionError| join_error(router, error);
    let refused = |reason: String| JoinError::Refused { router, reason };
    let connection = connecting.await.map_err(|error| lost(&error))?;
    revocation::watch(connection.clone(), accepted);
    let (writer, mut reader) = connection.open_bi().await.map_err(|error| lost(&error))?;
    let mut writer = FrameWriter::new(writer);
    writer.push(&preface::preface());
    writer.send(FrameClass::Hello, &Control::Hello(hello)).await.map_err(|error| match error {
        SendError::Stream(WriteError::ConnectionLost(error)) => lost(&error),
        error => refused(error.to_string()),
    })?;
    let bytes = read_preface(&mut reader).await.map_err(|error| match error {
        ReadExactError::ReadError(ReadError::ConnectionLost(error)) => lost(&error),
        error => refused(error.to_string()),
    })?;
    let hang_up = |reason: String| {
        close(&connection, close::REFUSED, &reason);
        refused(reason)
    };
    preface::check(bytes).map_err(|error| {
        hang_up(match error {
            PrefaceError::Version { ours, theirs } => versions(theirs, ours),
            error @ PrefaceError::Foreign { .. } => error.to_string(),
        })
    })?;
    let mut reader = FrameReader::new(reader, FrameClass::Hello);
    match reader.next().await {
        Ok(Some(Control::Welcome(welcome))) => Ok(RouterLink::new(connection, welcome, writer)),
        Ok(_) => Err(hang_up("its first frame is no welcome".to_owned())),
        Err(ReceiveError::Stream(ReadError::ConnectionLost(error))) => Err(lost(&error)),
        Err(error) => Err(hang_up(error.to_string())),
    }
}

/// Said to both, so with names instead of "here" and "there".
fn versions(router: u32, node: u32) -> String {
    format!(
        "the router speaks wire version {router}, the node {node}: run the same version of mlx-node on all machines"
    )
}

async fn read_preface(reader: &mut RecvStream) -> Result<[u8; PREFACE_BYTES], ReadExactError> {
    let mut bytes = [0; PREFACE_BYTES];
    reader.read_exact(&mut bytes).await?;
    Ok(bytes)
}

fn tls_refusal(error: &ConnectionError) -> Refusal {
    let reason = close::connection_error(error);
    Refusal(if is_crypto(error) { format!("it did not prove the cluster key: {reason}") } else { reason })
}

fn join_error(router: SocketAddr, error: &ConnectionError) -> JoinError {
    let reason = close::connection_error(error);
    match error {
        ConnectionError::ApplicationClosed(close) if close.error_code == close::ITSELF => {
            JoinError::Itself { router }
        }
        ConnectionError::ApplicationClosed(close)
            if close.error_code == close::REFUSED || close.error_code == close::PROTOCOL =>
        {
            JoinError::Refused { router, reason }
        }
        error if is_crypto(error) => JoinError::Key { router, reason },
        _ => JoinError::Unreachable { router, reason },
    }
}

/// Whether the TLS handshake failed, here or there.
fn is_crypto(error: &ConnectionError) -> bool {
    let code = match error {
        ConnectionError::TransportError(error) => error.code,
        ConnectionError::ConnectionClosed(close) => close.error_code,
        _ => return false,
    };
    CRYPTO_ERRORS.contains(&u64::from(code))
}

#[cfg(test)]
mod tests;
