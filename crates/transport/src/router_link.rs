//! A router seen from a node: reports go to it, requests come from it.

use crate::{
    close::{self, SendError, close},
    framed::{FrameReader, FrameWriter},
    limits::REQUEST_TIME_MAX,
    pipeline::{self, TunnelOpening},
    silence::SilenceWatch,
};
use futures_util::FutureExt;
use quinn::{Connection, RecvStream, SendStream};
use std::{net::SocketAddr, sync::Arc};
use tokio::{sync::Mutex, task::JoinSet, time::timeout};
use types::{AssetsHash, EmbedRequest, GenerateRequest, MeasureQuery, SessionRequest, StageNews, StageOrder};
use wire::{Control, FrameClass, FrameError, Hello, Reply, Request};

/// A joined router. Clones share the connection, which ends when the last clone and the last [`ReplySender`] are
/// dropped.
#[derive(Debug, Clone)]
pub struct RouterLink(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    connection: Connection,
    router: Hello,
    control: Mutex<FrameWriter>,
    /// Requests that are being read, so that a slow one does not hold up the next.
    arriving: Mutex<JoinSet<Option<IncomingRequest>>>,
    _silence: SilenceWatch,
}

/// The connection has ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the connection to the router has ended: {reason}")]
pub struct LinkClosed {
    /// Why.
    pub reason: String,
}

/// What a router wants.
#[derive(Debug)]
pub enum IncomingRequest {
    /// Tokens.
    Generate {
        /// Of what.
        request: Box<GenerateRequest>,
        /// For the answers.
        replies: ReplySender,
    },
    /// A tokenizer and template.
    Assets {
        /// Which.
        hash: AssetsHash,
        /// For the answer.
        replies: ReplySender,
    },
    /// Sessions named or ended.
    Sessions {
        /// What is asked.
        request: SessionRequest,
        /// For the answer.
        replies: ReplySender,
    },
    /// Vectors of texts are wanted.
    Embed {
        /// What.
        request: Box<EmbedRequest>,
        /// For the answer.
        replies: ReplySender,
    },
    /// A snapshot of the cache, on the control stream.
    Resync {
        /// For the word that it comes.
        replies: ReplySender,
    },
    /// What this node can do for a pipeline.
    Measure {
        /// What is to be measured.
        query: MeasureQuery,
        /// For the answer.
        replies: ReplySender,
    },
    /// A stage of a pipeline, for as long as the stream is open.
    Stage {
        /// Which.
        order: StageOrder,
        /// For its news.
        replies: ReplySender,
    },
    /// A way to a stage's process.
    Tunnel(TunnelOpening),
}

/// Why a reply was not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// Nobody reads any more: the request was cancelled or the router is gone.
    #[error("the request was cancelled: {reason}")]
    Cancelled {
        /// What was seen.
        reason: String,
    },
    /// The last reply has been sent before.
    #[error("the request has been answered before")]
    Finished,
    /// The reply cannot travel.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// A node's end of one request. Dropped before its last reply, it resets the stream: the router sees a lost node.
#[derive(Debug)]
pub struct ReplySender {
    writer: FrameWriter,
    /// All that `writer` has was put off, so that it goes with what comes next.
    held: bool,
    /// The last reply was given to `writer`.
    last: bool,
    /// And all of it was sent.
    finished: bool,
}

impl RouterLink {
    pub(crate) fn new(connection: Connection, router: Hello, control: FrameWriter) -> Self {
        let (control, arriving) = (Mutex::new(control), Mutex::default());
        let silence = SilenceWatch::new(connection.clone());
        Self(Arc::new(Inner { connection, router, control, arriving, _silence: silence }))
    }

    /// Who it said it is.
    pub fn router(&self) -> &Hello {
        &self.0.router
    }

    /// Where it is.
    pub fn remote_address(&self) -> SocketAddr {
        close::canonical(self.0.connection.remote_address())
    }

    /// Sends a report; in order, and waiting while the router does not read. Safe to cancel: a report is sent whole
    /// or not at all. A report that is too large to travel ends the connection.
    pub async fn send(&self, report: Control) -> Result<(), LinkClosed> {
        let mut control = self.0.control.lock().await;
        let sent = control.send(FrameClass::Control, &report).await;
        sent.map_err(|error| {
            let reason = error.to_string();
            if self.0.connection.close_reason().is_none() {
                close(&self.0.connection, close::PROTOCOL, &reason);
            }
            LinkClosed { reason }
        })
    }

    /// The next request; `None` once the connection has ended. Safe to cancel.
    pub async fn next_request(&self) -> Option<IncomingRequest> {
        let mut arriving = self.0.arriving.lock().await;
        loop {
            tokio::select! {
                Some(read) = arriving.join_next() => match read {
                    Ok(Some(request)) => return Some(request),
                    Ok(None) => {}
                    Err(error) => tracing::error!(%error, "reading a request failed within"),
                },
                stream = self.0.connection.accept_bi() => {
                    let (send, receive) = stream.ok()?;
                    let mut read = Box::pin(read_request(send, receive, self.remote_address()));
                    // A short request is there as its stream is.
                    match read.as_mut().now_or_never() {
                        Some(Some(request)) => return Some(request),
                        Some(None) => {}
                        None => drop(arriving.spawn(read)),
                    }
                }
            }
        }
    }

    /// Waits until the connection has ended, and says why.
    pub async fn closed(&self) -> String {
        close::connection_error(&self.0.connection.closed().await)
    }

    /// Ends the connection and tells the router why.
    pub fn close(&self, reason: &str) {
        close(&self.0.connection, close::CLOSED, reason);
    }
}

/// Reads the one frame of a request's stream, and its end.
async fn read_request(send: SendStream, receive: RecvStream, router: SocketAddr) -> Option<IncomingRequest> {
    let replies = ReplySender { writer: FrameWriter::new(send), held: false, last: false, finished: false };
    let mut reader = FrameReader::<Request>::new(receive, FrameClass::Request);
    let read = timeout(REQUEST_TIME_MAX, async {
        let request = reader.next().await?;
        // What follows these is no frame.
        let is_only = match request {
            Some(Request::Tunnel(_) | Request::Probe { .. }) => true,
            _ => reader.next().await?.is_none(),
        };
        Ok((request, is_only))
    });
    let reason = match read.await {
        Ok(Ok((Some(Request::Generate(request)), true))) => {
            return Some(IncomingRequest::Generate { request, replies });
        }
        Ok(Ok((Some(Request::Assets(hash)), true))) => {
            return Some(IncomingRequest::Assets { hash, replies });
        }
        Ok(Ok((Some(Request::Sessions(request)), true))) => {
            return Some(IncomingRequest::Sessions { request, replies });
        }
        Ok(Ok((Some(Request::Embed(request)), true))) => {
            return Some(IncomingRequest::Embed { request, replies });
        }
        Ok(Ok((Some(Request::Resync), true))) => return Some(IncomingRequest::Resync { replies }),
        Ok(Ok((Some(Request::Measure(query)), true))) => {
            return Some(IncomingRequest::Measure { query, replies });
        }
        Ok(Ok((Some(Request::Stage(order)), true))) => {
            return Some(IncomingRequest::Stage { order, replies });
        }
        Ok(Ok((Some(Request::Tunnel(order)), true))) => {
            return Some(IncomingRequest::Tunnel(TunnelOpening::new(order, reader, replies)));
        }
        Ok(Ok((Some(Request::Probe { bytes }), true))) => {
            pipeline::take_probe(reader, bytes, replies).await;
            return None;
        }
        Ok(Ok((None, _))) => "no request on its stream".to_owned(),
        Ok(Ok((Some(_), false))) => "more than one request on a stream".to_owned(),
        // The router changed its mind, or is gone.
        Ok(Err(close::ReceiveError::Stream(_))) => return None,
        Ok(Err(close::ReceiveError::Frame(error))) => error.to_string(),
        Err(_) => format!("a request was not complete within {} s", REQUEST_TIME_MAX.as_secs()),
    };
    tracing::warn!(%router, reason, "refused a stream");
    replies.refuse(&mut reader.stream);
    None
}

impl ReplySender {
    /// Sends a reply, waiting while the router does not read. After any but `Accepted`, `Prompt`, `Started`, `Tokens`, `Tunnel`
    /// and a stage's news the stream is finished. Safe to cancel: a reply is sent whole or not at all.
    pub async fn send(&mut self, reply: Reply) -> Result<(), ReplyError> {
        if self.last {
            // A cancelled call may have left a part of it.
            self.writer.flush().await.map_err(ReplyError::from)?;
            self.finish();
            return Err(ReplyError::Finished);
        }
        let class = match reply {
            Reply::Assets(_) => FrameClass::Assets,
            Reply::Embedded(_) => FrameClass::Embedded,
            _ => FrameClass::Reply,
        };
        let last = !matches!(
            reply,
            Reply::Accepted
                | Reply::Prompt { .. }
                | Reply::Started { .. }
                | Reply::Tokens { .. }
                | Reply::Tunnel
        ) && !matches!(&reply, Reply::Stage(news) if !matches!(news, StageNews::Failed { .. }));
        if !std::mem::take(&mut self.held) {
            self.writer.flush().await?;
        }
        self.last = last;
        let sent = self.writer.send(class, &reply).await;
        if let Err(SendError::Frame(_)) = sent {
            self.last = false;
        }
        sent?;
        if self.last {
            self.finish();
        }
        Ok(())
    }

    /// Puts a reply off until the next one is sent, which must not be long: both are in one packet then. Not for a last
    /// one.
    pub fn hold(&mut self, reply: &Reply) -> Result<(), ReplyError> {
        if self.last {
            return Err(ReplyError::Finished);
        }
        self.held |= self.writer.is_empty();
        self.writer.hold(FrameClass::Reply, reply).map_err(ReplyError::from)
    }

    /// Resolves when no further reply will be read: the request was cancelled, the router is gone, or the last reply
    /// was delivered. Independent of `self`, so that it can be awaited beside [`ReplySender::send`].
    pub fn cancelled(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let stopped = self.writer.stream.stopped();
        async move {
            let _ = stopped.await;
        }
    }

    /// The stream itself, where what follows is no frame.
    pub(crate) fn stream(&mut self) -> &mut SendStream {
        &mut self.writer.stream
    }

    /// Ends the stream in good order.
    pub(crate) fn finish(&mut self) {
        self.finished = true;
        // An error means that the router has stopped reading, which it may.
        let _ = self.writer.stream.finish();
    }

    fn refuse(mut self, receive: &mut RecvStream) {
        self.finished = true;
        let _ = self.writer.stream.reset(close::PROTOCOL);
        let _ = receive.stop(close::PROTOCOL);
    }
}

impl Drop for ReplySender {
    fn drop(&mut self) {
        if !self.finished {
            let _ = self.writer.stream.reset(close::ABANDONED);
        }
    }
}

impl From<SendError> for ReplyError {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Frame(error) => Self::Frame(error),
            error @ SendError::Stream(_) => Self::Cancelled { reason: error.to_string() },
        }
    }
}
