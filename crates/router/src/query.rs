//! What is asked of a router and what it answers.

use crate::cost::Cost;
use std::fmt;
use std::time::Duration;
use types::{BlockHash, NodeId, Priority};

/// What is to be routed.
#[derive(Debug, Clone, Copy)]
pub struct RouteQuery<'a> {
    /// The model's name.
    pub model: &'a str,
    /// Hashes of the prompt's full blocks, in order.
    pub hashes: &'a [BlockHash],
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens to generate at most.
    pub max_tokens: u32,
    /// Nodes not to be chosen: those that were tried.
    pub exclude: &'a [NodeId],
    /// A hash of who goes on: between nodes that cost the same, the one that had the session's last request is chosen.
    pub session: Option<u64>,
    /// How urgent it is: what it costs others weighs more or less.
    pub priority: Priority,
}

/// Where a request should go.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// The node.
    pub node: NodeId,
    /// Tokens of the prompt expected in its cache.
    pub matched_tokens: u32,
    /// What it is expected to cost there.
    pub cost: Cost,
    /// What decided.
    pub reason: RouteReason,
}

/// What decided a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteReason {
    /// No other node could take it.
    OnlyNode,
    /// Part of the prompt is expected in the node's cache, and that outweighs all else.
    Affinity,
    /// The node would be done first, whatever caches hold.
    LeastWork,
    /// The node seems slow and has had nothing for long: whether it still is shows only where it is given something.
    Trial,
}

impl fmt::Display for RouteReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OnlyNode => "only node",
            Self::Affinity => "affinity",
            Self::LeastWork => "least work",
            Self::Trial => "trial",
        })
    }
}

/// One node as a candidate for one request.
#[derive(Debug, Clone, PartialEq)]
pub struct Considered {
    /// The node.
    pub node: NodeId,
    /// Tokens of the prompt expected in its cache.
    pub matched_tokens: u32,
    /// What the request would cost there.
    pub cost: Cost,
    /// Requests there or on their way to it.
    pub requests: u32,
    /// Why it cannot be chosen now.
    pub excluded: Option<Excluded>,
}

/// Why a node cannot be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Excluded {
    /// Its engine loads, restarts or leaves.
    NotReady,
    /// It does not serve the model.
    OtherModel,
    /// It was tried before.
    Tried,
    /// Its context is too small, and another node's is not.
    SmallContext,
    /// It has as many requests as it may; where it is best all the same, the request waits for it.
    Full,
    /// It refused a request, and did not report its load since.
    Refused,
}

impl fmt::Display for Excluded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotReady => "not ready",
            Self::OtherModel => "other model",
            Self::Tried => "tried",
            Self::SmallContext => "context too small",
            Self::Full => "full",
            Self::Refused => "refused",
        })
    }
}

/// Why there is no route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// No node serves or served that model.
    #[error("no node serves the model {model:?}")]
    UnknownModel {
        /// The model asked for.
        model: String,
        /// The models that are served.
        served: Vec<String>,
    },
    /// Nodes are missing, not ready or tried already.
    #[error("{reason}")]
    NoNode {
        /// What the nodes lack.
        reason: String,
    },
    /// Every node that could serve it has as many requests as it may.
    #[error("all nodes are busy for {retry_after:?}")]
    AllBusy {
        /// When a place is expected.
        retry_after: Duration,
    },
}

/// Events of a node's cache were missed, or are of another engine than the one known: a snapshot is needed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("events of the cache of node {node} go on at {epoch}:{first_seq}, known is it up to {known:?}")]
pub struct Resync {
    /// The node.
    pub node: NodeId,
    /// Of the events.
    pub epoch: u64,
    /// Number of the first one.
    pub first_seq: u64,
    /// Epoch and next number expected; none where there was no snapshot yet.
    pub known: Option<(u64, u64)>,
}
