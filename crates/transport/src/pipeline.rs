//! What members of a pipeline ask of each other: figures, stages, and ways for their processes' bytes.
//!
//! All on streams of their own, as any request: the head's [`Peer`] asks, the member's `RouterLink` is asked. A stage lasts
//! as long as its stream, so that whoever is lost takes its stages with it. A [`Tunnel`] is a stream whose frames are over:
//! bytes both ways, encrypted and under the connection's watch; dropped, it breaks off at both ends.

use crate::{
    Peer, close,
    framed::{FrameReader, FrameWriter},
    limits::{ACCEPT_TIME_MAX, MEASURE_TIME_MAX, PROBE_BYTES, PROBE_TIME_MAX},
    peer::{AskError, NoAnswer, RequestStream, name},
    router_link::{ReplyError, ReplySender},
};
use bytes::{Buf, BytesMut};
use quinn::{RecvStream, SendStream};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::timeout,
};
use types::{GenerateError, MeasureQuery, MemberProfile, StageNews, StageOrder, TunnelOrder};
use wire::{FrameClass, Reply, Request};

/// Bytes of a probe taken or sent at once.
const CHUNK_BYTES: usize = 64 << 10;

impl Peer {
    /// Has the node measure itself and a pipeline's model, within [`MEASURE_TIME_MAX`].
    pub async fn measure(&self, query: MeasureQuery) -> Result<MemberProfile, NoAnswer> {
        let exchange = self.ask(Request::Measure(query), FrameClass::Reply);
        let (stream, reply) = self.answer(MEASURE_TIME_MAX, exchange).await?;
        match reply {
            Reply::Measured(profile) => Ok(stream.finished(profile)),
            Reply::Rejected(error) => Err(self.no_answer(stream.finished(error).to_string())),
            reply => Err(self.no_answer(stream.out_of_turn(&reply))),
        }
    }

    /// Has the node host a stage; the first news comes within [`ACCEPT_TIME_MAX`]. Dropping the stream, or this future,
    /// ends the stage.
    pub async fn stage(&self, order: StageOrder) -> Result<StageStream, NoAnswer> {
        let exchange = self.ask(Request::Stage(order), FrameClass::Reply);
        let (stream, reply) = self.answer(ACCEPT_TIME_MAX, exchange).await?;
        match reply {
            Reply::Stage(first) => Ok(StageStream { stream, first: Some(first), ended: false }),
            Reply::Rejected(error) => Err(self.no_answer(stream.finished(error).to_string())),
            reply => Err(self.no_answer(stream.out_of_turn(&reply))),
        }
    }

    /// A way to a stage's process on the node, within `patience`: the process may have to start first.
    pub async fn tunnel(&self, order: TunnelOrder, patience: Duration) -> Result<Tunnel, NoAnswer> {
        let open = async {
            let (writer, reader) = self.0.connection.open_bi().await?;
            let mut writer = FrameWriter::new(writer);
            let mut reader = FrameReader::<Reply>::new(reader, FrameClass::Reply);
            writer.send(FrameClass::Request, &Request::Tunnel(order)).await?;
            let reply = reader.next().await?.ok_or(AskError::NoReply)?;
            Ok((writer.stream, reader, reply))
        };
        match self.answer(patience, open).await? {
            (send, reader, Reply::Tunnel) => {
                let (receive, read) = reader.into_parts();
                Ok(Tunnel { read, receive, send: Half::Opened { stream: send, is_over: false } })
            }
            (_, _, Reply::Rejected(error)) => Err(self.no_answer(error.to_string())),
            (_, _, reply) => Err(self.no_answer(format!("the node sent {} out of turn", name(&reply)))),
        }
    }

    /// Sends the node [`PROBE_BYTES`], and gives how many bytes a second arrived there.
    pub async fn probe(&self) -> Result<f64, NoAnswer> {
        let probe = async {
            let (writer, reader) = self.0.connection.open_bi().await?;
            let mut writer = FrameWriter::new(writer);
            let mut reader = FrameReader::<Reply>::new(reader, FrameClass::Reply);
            writer.send(FrameClass::Request, &Request::Probe { bytes: PROBE_BYTES }).await?;
            let since = Instant::now();
            let chunk = vec![0; CHUNK_BYTES];
            let mut left = PROBE_BYTES as usize;
            while left > 0 {
                let bytes = left.min(CHUNK_BYTES);
                writer.stream.write_all(&chunk[..bytes]).await.map_err(close::SendError::from)?;
                left -= bytes;
            }
            let _ = writer.stream.finish();
            let reply = reader.next().await?.ok_or(AskError::NoReply)?;
            Ok((reply, since.elapsed()))
        };
        match self.answer(PROBE_TIME_MAX, probe).await? {
            (Reply::Probed, took) => Ok(PROBE_BYTES as f64 / took.as_secs_f64().max(1e-9)),
            (reply, _) => Err(self.no_answer(format!("the node sent {} out of turn", name(&reply)))),
        }
    }
}

/// The node's side of [`Peer::probe`].
pub(crate) async fn take_probe(reader: FrameReader<Request>, bytes: u64, mut replies: ReplySender) {
    let (mut receive, read) = reader.into_parts();
    let all = async {
        let mut got = read.len() as u64;
        while got < bytes.min(PROBE_BYTES) {
            match receive.read_chunk(CHUNK_BYTES, true).await {
                Ok(Some(chunk)) => got += chunk.bytes.len() as u64,
                Ok(None) | Err(_) => return,
            }
        }
        // Who asked sees for itself where this does not arrive.
        let _ = replies.send(Reply::Probed).await;
    };
    // Too late, the stream is reset as it is dropped.
    let _ = timeout(PROBE_TIME_MAX, all).await;
}

/// A stage that another node hosts. Dropped, it ends there.
#[derive(Debug)]
pub struct StageStream {
    stream: RequestStream,
    first: Option<StageNews>,
    ended: bool,
}

impl StageStream {
    /// The next news; [`StageNews::Failed`] is the last, also where the node was lost. Safe to cancel.
    pub async fn next(&mut self) -> Option<StageNews> {
        if let Some(first) = self.first.take() {
            return Some(self.pass_on(first));
        }
        if self.ended {
            return None;
        }
        let message = match self.stream.reader.next().await {
            Ok(Some(Reply::Stage(news))) => return Some(self.pass_on(news)),
            Ok(Some(reply)) => format!("the node sent {} out of turn", name(&reply)),
            Ok(None) => "the node ended the stage".to_owned(),
            Err(error) => error.to_string(),
        };
        self.ended = true;
        Some(StageNews::Failed { message })
    }

    fn pass_on(&mut self, news: StageNews) -> StageNews {
        if matches!(news, StageNews::Failed { .. }) {
            self.ended = true;
            self.stream.end();
        }
        news
    }
}

/// A way that is asked for, to a stage of this node.
#[derive(Debug)]
pub struct TunnelOpening {
    /// Where to.
    pub order: TunnelOrder,
    reader: FrameReader<Request>,
    replies: ReplySender,
}

impl TunnelOpening {
    pub(crate) fn new(order: TunnelOrder, reader: FrameReader<Request>, replies: ReplySender) -> Self {
        Self { order, reader, replies }
    }

    /// Opens it.
    pub async fn accept(mut self) -> Result<Tunnel, ReplyError> {
        self.replies.send(Reply::Tunnel).await?;
        let (receive, read) = self.reader.into_parts();
        Ok(Tunnel { read, receive, send: Half::Answered { replies: self.replies } })
    }

    /// Says why not.
    pub async fn refuse(mut self, error: GenerateError) {
        // Whoever asked may be gone.
        let _ = self.replies.send(Reply::Rejected(error)).await;
    }

    /// Resolves once nobody waits for it any more.
    pub fn cancelled(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.replies.cancelled()
    }
}

/// Bytes both ways. Dropped before its end was told, it is broken off.
#[derive(Debug)]
pub struct Tunnel {
    /// What was read with the last frame.
    read: BytesMut,
    receive: RecvStream,
    send: Half,
}

#[derive(Debug)]
enum Half {
    Opened { stream: SendStream, is_over: bool },
    Answered { replies: ReplySender },
}

impl Half {
    fn stream(&mut self) -> Pin<&mut SendStream> {
        Pin::new(match self {
            Self::Opened { stream, .. } => stream,
            Self::Answered { replies } => replies.stream(),
        })
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        if let Self::Opened { stream, is_over: false } = self {
            // It may have ended at the other end.
            let _ = stream.reset(close::CANCELLED);
        }
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.read.is_empty() {
            return AsyncRead::poll_read(Pin::new(&mut this.receive), context, buffer);
        }
        let bytes = this.read.len().min(buffer.remaining());
        buffer.put_slice(&this.read[..bytes]);
        this.read.advance(bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(self.get_mut().send.stream(), context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(self.get_mut().send.stream(), context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().send {
            Half::Opened { stream, is_over } => {
                *is_over = true;
                // An error means that nobody reads any more.
                let _ = stream.finish();
            }
            Half::Answered { replies } => replies.finish(),
        }
        Poll::Ready(Ok(()))
    }
}
