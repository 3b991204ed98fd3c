//! A node seen from a router.

use std::{net::SocketAddr, time::Duration};
use types::{AssetsHash, GenerateError, GenerateRequest, ModelAssets, TokenStream};
use wire::{Control, Hello};

/// A connected node. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Peer {
    hello: std::sync::Arc<Hello>,
}

impl Peer {
    /// Who it said it is.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Has the node generate. `Err` when it refuses or does not answer within [`crate::limits::ACCEPT_TIME_MAX`];
    /// afterwards everything is an event, also the loss of the node. Dropping the stream, or this future, cancels.
    pub async fn generate(&self, request: GenerateRequest) -> Result<TokenStream, GenerateError> {
        tokio::task::yield_now().await;
        Err(GenerateError::Unavailable { model: request.model.clone(), reason: String::new() })
    }

    /// Fetches a model's tokenizer and template, within [`crate::limits::ASSETS_TIME_MAX`]; their hash is checked.
    pub async fn assets(&self, hash: AssetsHash) -> Result<ModelAssets, GenerateError> {
        tokio::task::yield_now().await;
        Err(GenerateError::Unavailable { model: hash.to_string(), reason: String::new() })
    }

    /// The connection's current estimate of a round trip.
    pub fn rtt(&self) -> Duration {
        Duration::ZERO
    }

    /// Where it is.
    pub fn remote_address(&self) -> SocketAddr {
        SocketAddr::from(([0, 0, 0, 0], 0))
    }

    /// Waits until the connection has ended, and says why.
    pub async fn closed(&self) -> String {
        tokio::task::yield_now().await;
        String::new()
    }

    /// Ends the connection and tells the node why.
    pub fn close(&self, reason: &str) {
        let _ = reason;
    }
}

/// What a node reports.
#[derive(Debug)]
pub struct ControlReceiver {}

impl ControlReceiver {
    /// The next report, in order; `None` once the connection has ended (see [`Peer::closed`] for why). A node that
    /// sends anything else than reports is disconnected. Safe to cancel.
    pub async fn next(&mut self) -> Option<Control> {
        tokio::task::yield_now().await;
        None
    }
}
