//! A node seen from a router: its reports, and one stream for each request it is given.

use crate::{
    close::{self, ReceiveError, SendError, close},
    framed::{FrameReader, FrameWriter},
    limits::{ACCEPT_TIME_MAX, ASSETS_TIME_MAX},
    silence::SilenceWatch,
};
use futures_util::stream;
use quinn::Connection;
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::time::timeout;
use types::{
    AssetsHash, EmbedRequest, Finish, FinishReason, GenerateError, GenerateRequest, ModelAssets, SessionInfo,
    SessionRequest, TokenEvent, TokenStream, Usage,
    limits::{EMBED_TIME_MAX, NODE_MODELS_MAX, SESSIONS_TIME_MAX},
};
use wire::{Control, FrameClass, Hello, Reply, Request};

/// A connected node. Clones share the connection, which ends when the last clone and the last stream are dropped.
#[derive(Debug, Clone)]
pub struct Peer(pub(crate) Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) connection: Connection,
    hello: Hello,
    _silence: SilenceWatch,
}

impl Peer {
    pub(crate) fn new(connection: Connection, hello: Hello) -> Self {
        let silence = SilenceWatch::new(connection.clone());
        Self(Arc::new(Inner { connection, hello, _silence: silence }))
    }

    /// Who it said it is.
    pub fn hello(&self) -> &Hello {
        &self.0.hello
    }

    /// Has the node generate. `Err` when it refuses, or is lost or does not answer within [`ACCEPT_TIME_MAX`]; afterwards
    /// everything is an event, also the loss of the node. Dropping the stream, or this future, cancels.
    pub async fn generate(&self, request: GenerateRequest) -> Result<TokenStream, GenerateError> {
        let (model, prompt_tokens) = (request.model.clone(), request.prompt.len() as u32);
        let next_index = request.output.len() as u32;
        let exchange = self.ask(Request::Generate(request.into()), FrameClass::Reply);
        let answer = self.answer(ACCEPT_TIME_MAX, exchange).await;
        let lost =
            |error: NoAnswer| GenerateError::NodeLost { tokens: next_index, reason: error.to_string() };
        let (stream, reply) = answer.map_err(lost)?;
        match reply {
            Reply::Accepted => {
                let tokens =
                    Tokens { stream, started: false, next_index, told: 0, prompt_tokens, ended: false };
                Ok(Box::pin(stream::unfold(tokens, Tokens::next)))
            }
            Reply::Rejected(error) => Err(stream.finished(error)),
            reply => Err(unavailable(&model, stream.out_of_turn(&reply))),
        }
    }

    /// Fetches a model's tokenizer and template, within [`ASSETS_TIME_MAX`]; their hash is checked.
    pub async fn assets(&self, hash: AssetsHash) -> Result<ModelAssets, GenerateError> {
        let model = hash.to_string();
        let exchange = self.ask(Request::Assets(hash), FrameClass::Assets);
        let answer = self.answer(ASSETS_TIME_MAX, exchange).await;
        let (stream, reply) = answer.map_err(|error| unavailable(&model, error.to_string()))?;
        match reply {
            Reply::Assets(assets) => match stream.finished(assets.hash()) {
                actual if actual == hash => Ok(assets),
                actual => Err(unavailable(&model, format!("the node sent assets with hash {actual}"))),
            },
            Reply::Rejected(error) => Err(stream.finished(error)),
            reply => Err(unavailable(&model, stream.out_of_turn(&reply))),
        }
    }

    /// Has the node make vectors of texts, within [`EMBED_TIME_MAX`]; there is one for each. Dropping the future cancels.
    pub async fn embed(&self, request: EmbedRequest) -> Result<Vec<Vec<f32>>, GenerateError> {
        let (model, count) = (request.model.clone(), request.inputs.len());
        let exchange = self.ask(Request::Embed(request.into()), FrameClass::Embedded);
        let answer = self.answer(EMBED_TIME_MAX, exchange).await;
        let lost = |error: NoAnswer| GenerateError::NodeLost { tokens: 0, reason: error.to_string() };
        let (stream, reply) = answer.map_err(lost)?;
        match reply {
            Reply::Embedded(vectors) if vectors.len() == count => Ok(stream.finished(vectors)),
            Reply::Rejected(error) => Err(stream.finished(error)),
            reply => Err(unavailable(&model, stream.out_of_turn(&reply))),
        }
    }

    /// Has the node name or end sessions, within [`SESSIONS_TIME_MAX`]; gives those that this was about.
    pub async fn sessions(&self, request: SessionRequest) -> Result<Vec<SessionInfo>, NoAnswer> {
        let exchange = self.ask(Request::Sessions(request), FrameClass::Reply);
        let (stream, reply) = self.answer(SESSIONS_TIME_MAX, exchange).await?;
        match reply {
            Reply::Sessions(sessions) => Ok(stream.finished(sessions)),
            Reply::Rejected(error) => Err(self.no_answer(stream.finished(error).to_string())),
            reply => Err(self.no_answer(stream.out_of_turn(&reply))),
        }
    }

    /// Has the node send a snapshot of its cache on the control stream; within [`ACCEPT_TIME_MAX`] it says that it will.
    pub async fn resync(&self) -> Result<(), NoAnswer> {
        let exchange = self.ask(Request::Resync, FrameClass::Reply);
        let (stream, reply) = self.answer(ACCEPT_TIME_MAX, exchange).await?;
        match reply {
            Reply::Resyncing => {
                stream.finished(reply);
                Ok(())
            }
            reply => Err(self.no_answer(stream.out_of_turn(&reply))),
        }
    }

    /// The connection's current estimate of a round trip.
    pub fn rtt(&self) -> Duration {
        self.0.connection.rtt()
    }

    /// Where it is.
    pub fn remote_address(&self) -> SocketAddr {
        close::canonical(self.0.connection.remote_address())
    }

    /// By which address of this machine it reaches us, where the system tells.
    pub fn local_ip(&self) -> Option<IpAddr> {
        self.0.connection.local_ip().map(|ip| ip.to_canonical())
    }

    /// Waits until the connection has ended, and says why.
    pub async fn closed(&self) -> String {
        close::connection_error(&self.0.connection.closed().await)
    }

    /// Ends the connection and tells the node why.
    pub fn close(&self, reason: &str) {
        close(&self.0.connection, close::CLOSED, reason);
    }

    /// Sends a request on a stream of its own and reads the first reply.
    pub(crate) async fn ask(
        &self,
        request: Request,
        replies: FrameClass,
    ) -> Result<(RequestStream, Reply), AskError> {
        let (writer, reader) = self.0.connection.open_bi().await?;
        let mut stream = RequestStream {
            writer: FrameWriter::new(writer),
            reader: FrameReader::new(reader, replies),
            done: false,
        };
        stream.writer.send(FrameClass::Request, &request).await?;
        let _ = stream.writer.stream.finish();
        match stream.reader.next().await? {
            Some(reply) => Ok((stream, reply)),
            None => Err(AskError::NoReply),
        }
    }

    pub(crate) async fn answer<T>(
        &self,
        within: Duration,
        exchange: impl Future<Output = Result<T, AskError>>,
    ) -> Result<T, NoAnswer> {
        match timeout(within, exchange).await {
            Ok(answer) => answer.map_err(|error| self.no_answer(error.to_string())),
            Err(_) => Err(self.no_answer(format!("no answer within {} s", within.as_secs()))),
        }
    }

    pub(crate) fn no_answer(&self, reason: String) -> NoAnswer {
        NoAnswer { node: self.0.hello.name.clone(), reason }
    }
}

/// A node that did not answer as it should have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("node {node:?}: {reason}")]
pub struct NoAnswer {
    /// Its name for people.
    pub node: String,
    /// What was seen instead.
    pub reason: String,
}

fn unavailable(model: &str, reason: String) -> GenerateError {
    GenerateError::Unavailable { model: model.to_owned(), reason }
}

/// Why there is no first reply.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error("{}", close::connection_error(.0))]
    Connection(#[from] quinn::ConnectionError),
    #[error(transparent)]
    Send(#[from] SendError),
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error("it ended the stream without a reply")]
    NoReply,
}

/// The router's end of one request. Dropped before the last reply, it cancels the request.
#[derive(Debug)]
pub(crate) struct RequestStream {
    writer: FrameWriter,
    pub(crate) reader: FrameReader<Reply>,
    done: bool,
}

impl RequestStream {
    /// There is no further reply to come; passes `last` on.
    pub(crate) fn finished<T>(mut self, last: T) -> T {
        self.end();
        last
    }

    /// The last reply has been read. The stream's end commonly came in the same packet: where it did, nothing has to be
    /// said of the stream any more, otherwise a packet stops it, and the node has to acknowledge that.
    pub(crate) fn end(&mut self) {
        self.done = true;
        self.reader.end_now();
    }

    /// Breaks off because of a reply that must not come now; says what came.
    pub(crate) fn out_of_turn(mut self, reply: &Reply) -> String {
        self.done = true;
        let _ = self.reader.stream.stop(close::PROTOCOL);
        format!("the node sent {} out of turn", name(reply))
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        if !self.done {
            // Both may have ended already, which is as good.
            let _ = self.writer.stream.reset(close::CANCELLED);
            let _ = self.reader.stream.stop(close::CANCELLED);
        }
    }
}

pub(crate) fn name(reply: &Reply) -> &'static str {
    match reply {
        Reply::Accepted => "`Accepted`",
        Reply::Rejected(_) => "`Rejected`",
        Reply::Tokens { .. } => "`Tokens`",
        Reply::Done(_) => "`Done`",
        Reply::Assets(_) => "`Assets`",
        Reply::Sessions(_) => "`Sessions`",
        Reply::Started { .. } => "`Started`",
        Reply::Resyncing => "`Resyncing`",
        Reply::Prompt { .. } => "`Prompt`",
        Reply::Embedded(_) => "`Embedded`",
        Reply::Measured(_) => "`Measured`",
        Reply::Stage(_) => "`Stage`",
        Reply::Tunnel => "`Tunnel`",
        Reply::Probed => "`Probed`",
    }
}

/// An accepted request's events: holds the node to the contract of [`TokenStream`], and keeps it when the node is lost.
struct Tokens {
    stream: RequestStream,
    /// Whether tokens, or the word that they begin, came.
    started: bool,
    next_index: u32,
    /// Tokens of the prompt that were told of.
    told: u32,
    prompt_tokens: u32,
    ended: bool,
}

impl Tokens {
    async fn next(mut self) -> Option<(TokenEvent, Self)> {
        if self.ended {
            return None;
        }
        let reason = match self.stream.reader.next().await {
            Ok(Some(Reply::Started { cached_tokens })) if !self.started => {
                self.started = true;
                return Some((TokenEvent::Started { cached_tokens }, self));
            }
            Ok(Some(Reply::Prompt { index, logprobs })) if !self.started => {
                let told = index as usize + logprobs.len();
                if index == self.told && !logprobs.is_empty() && told <= self.prompt_tokens as usize {
                    self.told = told as u32;
                    return Some((TokenEvent::Prompt { index, logprobs }, self));
                }
                format!(
                    "the node told of {} tokens of the prompt from index {index} where index {} was due",
                    logprobs.len(),
                    self.told
                )
            }
            Ok(Some(Reply::Tokens { tokens, logprobs, .. }))
                if !logprobs.is_empty() && logprobs.len() != tokens.len() =>
            {
                format!("the node sent {} log-probabilities of {} tokens", logprobs.len(), tokens.len())
            }
            Ok(Some(Reply::Tokens { index, tokens, logprobs })) => match self.after(index, &tokens) {
                Some(next_index) => {
                    (self.started, self.next_index) = (true, next_index);
                    return Some((TokenEvent::Tokens { index, tokens, logprobs }, self));
                }
                None => format!(
                    "the node sent {} tokens from index {index} where index {} was due",
                    tokens.len(),
                    self.next_index
                ),
            },
            Ok(Some(Reply::Done(finish))) => {
                self.ended = true;
                self.stream.end();
                return Some((TokenEvent::Finished(finish), self));
            }
            Ok(Some(reply)) => format!("the node sent {} out of turn", name(&reply)),
            Ok(None) => "the node ended the stream early".to_owned(),
            Err(error) => error.to_string(),
        };
        self.ended = true;
        let _ = self.stream.reader.stream.stop(close::CANCELLED);
        let (prompt_tokens, completion_tokens) = (self.prompt_tokens, self.next_index);
        let finish = Finish {
            reason: FinishReason::Failed(GenerateError::NodeLost { tokens: completion_tokens, reason }),
            usage: Usage { prompt_tokens, completion_tokens, ..Usage::default() },
        };
        Some((TokenEvent::Finished(finish), self))
    }

    /// The index after `tokens`, if they are the ones that are due.
    fn after(&self, index: u32, tokens: &[types::TokenId]) -> Option<u32> {
        let due = index == self.next_index && !tokens.is_empty();
        let count = u32::try_from(tokens.len()).ok().filter(|_| due)?;
        index.checked_add(count)
    }
}

/// What a node reports.
#[derive(Debug)]
pub struct ControlReceiver {
    connection: Connection,
    reader: FrameReader<Control>,
}

impl ControlReceiver {
    pub(crate) fn new(connection: Connection, reader: FrameReader<Control>) -> Self {
        Self { connection, reader }
    }

    /// The next report, in order; `None` once the connection has ended (see [`Peer::closed`] for why). A node that
    /// sends anything else than reports is disconnected. Safe to cancel.
    pub async fn next(&mut self) -> Option<Control> {
        let reason = match self.reader.next().await {
            Ok(Some(Control::State { models, .. })) if models.len() > NODE_MODELS_MAX => {
                format!("{} models; at most {NODE_MODELS_MAX} are allowed", models.len())
            }
            Ok(Some(Control::Hello(_) | Control::Welcome(_))) => "a second hello".to_owned(),
            Ok(Some(report)) => return Some(report),
            Ok(None) => "the control stream was ended".to_owned(),
            Err(error) => error.to_string(),
        };
        if self.connection.close_reason().is_none() {
            let peer = close::canonical(self.connection.remote_address());
            tracing::warn!(%peer, reason, "disconnected a node");
            close(&self.connection, close::PROTOCOL, &reason);
        }
        None
    }
}
