//! What can be asked of a cluster's sessions.

use crate::{BoxFuture, ClientId, NodeId, SessionId, SessionInfo};
use serde::{Deserialize, Serialize};

/// What is asked of one node. It answers with the sessions that this was about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionRequest {
    /// Name the client's sessions.
    List {
        /// Whose.
        client: ClientId,
    },
    /// End one of the client's sessions: its KV is kept no longer than anyone's.
    End {
        /// Whose.
        client: ClientId,
        /// Which.
        id: SessionId,
    },
}

/// A session and where it is.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeSession {
    /// The node that holds it.
    pub node: NodeId,
    /// That node's name for people.
    pub node_name: String,
    /// What it holds.
    pub session: SessionInfo,
}

/// What the nodes answered.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SessionAnswers {
    /// By name of the session, then of the node. A conversation that went to several nodes is a session of each.
    pub sessions: Vec<NodeSession>,
    /// Names of the nodes that should have answered and did not in time.
    pub incomplete: Vec<String>,
}

/// Whoever reaches the sessions of all nodes.
pub trait Sessions: Send + Sync + 'static {
    /// Asks every node that may have sessions, and waits for [`crate::limits::SESSIONS_TIME_MAX`] at most.
    fn sessions(&self, request: SessionRequest) -> BoxFuture<'_, SessionAnswers>;
}
