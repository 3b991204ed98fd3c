//! What is asked of a router, and in which words it refuses.

use crate::settings::RETRY_AFTER_MIN;
use router::{RouteError, RouteQuery};
use std::time::Duration;
use types::{
    BlockHash, EmbedRequest, GenerateError, GenerateRequest, NodeId, RequestId, Service, block_hashes,
};

/// What is asked for, prepared once for all tries until it has more of its answer.
pub(crate) struct Ask {
    pub(super) id: RequestId,
    pub(super) model: String,
    hashes: Vec<BlockHash>,
    /// Of prompt and answer so far.
    pub(super) tokens: u32,
    /// Still to be generated, at most.
    pub(super) max_tokens: u32,
    pub(super) service: Service,
    /// A part of the answer was passed on.
    pub(super) has_begun: bool,
}

/// A node that is not to have a request again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tried {
    pub(crate) node: NodeId,
    /// Only as long as its engine and its connection are the same; none: whatever becomes of it.
    pub(crate) life: Option<u64>,
}

impl Ask {
    /// Of a model whose chains have this root; none where it is not known.
    pub(super) fn new(request: &GenerateRequest, root: Option<BlockHash>) -> Self {
        let hashes = |root: BlockHash| {
            let root = request.cache.root(root);
            if request.output.is_empty() {
                block_hashes(root, &request.prompt)
            } else {
                block_hashes(root, &[request.prompt.as_slice(), &request.output].concat())
            }
        };
        let output = request.output.len() as u32;
        Self {
            id: request.id,
            model: request.model.clone(),
            hashes: root.map(hashes).unwrap_or_default(),
            tokens: request.prompt.len() as u32 + output,
            max_tokens: request.max_tokens - output,
            service: request.service,
            has_begun: output > 0,
        }
    }

    /// Of texts that become vectors: read, with nothing of them in any cache.
    pub(super) fn of_embed(request: &EmbedRequest) -> Self {
        Self {
            id: request.id,
            model: request.model.clone(),
            hashes: Vec::new(),
            tokens: u32::try_from(request.tokens()).unwrap_or(u32::MAX),
            max_tokens: 1,
            service: request.service,
            has_begun: false,
        }
    }

    pub(super) fn query<'a>(&'a self, exclude: &'a [NodeId]) -> RouteQuery<'a> {
        RouteQuery {
            model: &self.model,
            hashes: &self.hashes,
            prompt_tokens: self.tokens,
            max_tokens: self.max_tokens,
            exclude,
            session: self.service.affinity.map(|key| key.0),
            priority: self.service.priority,
        }
    }

    pub(super) fn unavailable(&self, reason: String) -> GenerateError {
        GenerateError::Unavailable { model: self.model.clone(), reason }
    }

    pub(super) fn error(&self, error: RouteError) -> GenerateError {
        match error {
            RouteError::UnknownModel { model, served } => GenerateError::UnknownModel { model, served },
            RouteError::NoNode { reason } => self.unavailable(reason),
            RouteError::AllBusy { retry_after } => busy(retry_after),
        }
    }
}

pub(super) fn busy(retry_after: Duration) -> GenerateError {
    GenerateError::Busy { retry_after_ms: retry_after.max(RETRY_AFTER_MIN).as_millis() as u64 }
}
