//! What a member is told of its pipeline.

use super::PipelineMembers;
use crate::{engine_process::RankTask, engine_start::EngineCommandLine};
use router::placement::Goal;
use std::{fmt, sync::Arc};

/// How a member's processes are started: all but their rank and their neighbours' addresses, which are added to the
/// environment as MLX has them.
pub trait RankCommand: fmt::Debug + Send + Sync {
    /// The command line of a process with this task.
    fn task(&self, task: &RankTask) -> EngineCommandLine;

    /// The command line of an engine with the whole model: where one member is left that can hold it.
    fn whole(&self) -> EngineCommandLine;
}

/// How a pipeline's ranks reach each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Links {
    /// Through tunnels between the nodes: encrypted, and only for who has the cluster's key.
    Tunnels,
    /// Over TCP, from one to the next: whoever is on that network can read along or spoil it. IPv4 only, as MLX has it.
    Direct,
    /// Over Thunderbolt 5 with RDMA, by these devices; as open as [`Self::Direct`].
    Jaccl(Vec<RdmaLink>),
}

/// A cable between two members, as one of them has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaLink {
    /// Whose end this is, by name.
    pub from: String,
    /// Where the cable leads.
    pub to: String,
    /// What the system of `from` calls it: `rdma_en5`.
    pub device: String,
}

/// A pipeline that this node is a member of.
#[derive(Debug, Clone)]
pub struct PipelineSettings {
    /// The model's name, as clients call it: members of one pipeline have the same.
    pub model: String,
    /// Who may belong to it.
    pub members: PipelineMembers,
    /// What it is for.
    pub goal: Goal,
    /// How ranks reach each other; the same at all members.
    pub links: Links,
    /// Rows that members measure up to.
    pub rows: u32,
    /// Tokens of KV that there is to be room for.
    pub kv_tokens: u64,
    /// The most memory that this node gives to weights and KV; none: what it finds.
    pub memory_bytes: Option<u64>,
    /// Also where one member alone would be faster.
    pub forced: bool,
    /// How its processes are started.
    pub command: Arc<dyn RankCommand>,
}
