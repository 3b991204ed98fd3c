//! A router seen from a node.

use std::{future::Future, net::SocketAddr};
use types::{AssetsHash, GenerateRequest};
use wire::{Control, FrameError, Hello, Reply};

/// A joined router.
#[derive(Debug, Clone)]
pub struct RouterLink {
    router: std::sync::Arc<Hello>,
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
        request: GenerateRequest,
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
pub struct ReplySender {}

impl RouterLink {
    /// Who it said it is.
    pub fn router(&self) -> &Hello {
        &self.router
    }

    /// Where it is.
    pub fn remote_address(&self) -> SocketAddr {
        SocketAddr::from(([0, 0, 0, 0], 0))
    }

    /// Sends a report; in order, and waiting while the router does not read. Safe to cancel: a report is sent whole
    /// or not at all.
    pub async fn send(&self, report: Control) -> Result<(), LinkClosed> {
        let _ = report;
        tokio::task::yield_now().await;
        Err(LinkClosed { reason: String::new() })
    }

    /// The next request; `None` once the connection has ended. Safe to cancel.
    pub async fn next_request(&self) -> Option<IncomingRequest> {
        tokio::task::yield_now().await;
        None
    }

    /// Waits until the connection has ended, and says why.
    pub async fn closed(&self) -> String {
        tokio::task::yield_now().await;
        String::new()
    }

    /// Ends the connection and tells the router why.
    pub fn close(&self, reason: &str) {
        let _ = reason;
    }
}

impl ReplySender {
    /// Sends a reply, waiting while the router does not read. After `Rejected`, `Done` or `Assets` the stream is
    /// finished. Safe to cancel: a reply is sent whole or not at all.
    pub async fn send(&mut self, reply: Reply) -> Result<(), ReplyError> {
        let _ = reply;
        tokio::task::yield_now().await;
        Err(ReplyError::Finished)
    }

    /// Resolves when no further reply will be read: the request was cancelled, the router is gone, or the last reply
    /// was delivered. Independent of `self`, so that it can be awaited beside [`ReplySender::send`].
    pub fn cancelled(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        std::future::pending()
    }
}
