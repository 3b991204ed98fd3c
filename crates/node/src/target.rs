//! How a node is reached: this process's own without a socket, the others over the network.

use crate::engine_handle::EngineHandle;
use futures_util::FutureExt;
use std::sync::Arc;
use std::time::Duration;
use transport::Peer;
use types::{
    AssetsHash, BoxFuture, EmbedRequest, GenerateError, GenerateRequest, ModelAssets, SessionInfo,
    SessionRequest, TokenStream,
};

#[derive(Clone)]
pub(crate) enum Target {
    Local(EngineHandle),
    Remote(Peer),
}

impl Target {
    pub(crate) fn generate(
        &self,
        request: GenerateRequest,
    ) -> BoxFuture<'_, Result<TokenStream, GenerateError>> {
        match self {
            Self::Local(engine) => {
                let events = engine.generate(request).map(|source| Box::pin(source) as TokenStream);
                std::future::ready(events).boxed()
            }
            Self::Remote(peer) => peer.generate(request).boxed(),
        }
    }

    pub(crate) async fn assets(&self, hash: AssetsHash) -> Result<Arc<ModelAssets>, GenerateError> {
        match self {
            Self::Local(engine) => engine.assets(hash).ok_or_else(|| GenerateError::Unavailable {
                model: hash.to_string(),
                reason: "the node does not have these assets any more".to_owned(),
            }),
            Self::Remote(peer) => peer.assets(hash).await.map(Arc::new),
        }
    }

    /// The vector of each text.
    pub(crate) fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Vec<Vec<f32>>, GenerateError>> {
        match self {
            Self::Local(engine) => engine.embed(request).boxed(),
            Self::Remote(peer) => peer.embed(request).boxed(),
        }
    }

    /// The sessions that `request` is about, or why the node did not say.
    pub(crate) async fn sessions(&self, request: SessionRequest) -> Result<Vec<SessionInfo>, String> {
        match self {
            Self::Local(engine) => engine.sessions(request).await.map_err(|error| error.to_string()),
            Self::Remote(peer) => peer.sessions(request).await.map_err(|error| error.to_string()),
        }
    }

    /// None for this process's own.
    pub(crate) fn peer(&self) -> Option<&Peer> {
        match self {
            Self::Local(_) => None,
            Self::Remote(peer) => Some(peer),
        }
    }

    /// There and back.
    pub(crate) fn rtt(&self) -> Duration {
        self.peer().map_or(Duration::ZERO, Peer::rtt)
    }
}
