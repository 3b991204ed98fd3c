//! A pipeline: nodes that together hold one model, each a contiguous range of its layers, and look like one node.
//!
//! One of them, the head, hosts the engine and the first layers; the others' processes are *ranks* after it. All ranks of
//! one start are an *epoch*: where one of them is lost, all end, and a new epoch is made of who is left.

use crate::{BlockHash, NodeId, limits::PIPELINE_MEMBERS_MAX};
use serde::{Deserialize, Serialize};

/// One life of a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EpochId {
    /// The node that made it.
    pub head: NodeId,
    /// Counts that node's epochs.
    pub number: u64,
}

/// What a member measured of itself and a model: what a placement needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageProfile {
    /// Bytes for weights and KV.
    pub memory_bytes: u64,
    /// Fingerprint of the weights: members with others do not make one model.
    pub weights: BlockHash,
    /// Seconds that a pass spends in a layer, by rows.
    pub layer_s: Vec<(u32, f64)>,
    /// Seconds that norm, head and drawing take, by rows.
    pub head_s: Vec<(u32, f64)>,
    /// Bytes of each layer's weights.
    pub layer_bytes: Vec<u64>,
    /// Bytes of the embedding.
    pub embedding_bytes: u64,
    /// Bytes of norm and head.
    pub head_bytes: u64,
    /// Bytes of one token's hidden state.
    pub hidden_bytes: u64,
    /// Bytes of KV that a token takes in one layer.
    pub kv_bytes_per_token: u64,
}

/// The way to another node, as a member sees it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LinkProfile {
    /// The other node.
    pub to: NodeId,
    /// Seconds one way.
    pub latency_s: f64,
    /// Bytes a second.
    pub bytes_per_s: f64,
}

/// What a member answers who is asked to measure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemberProfile {
    /// Itself and the model.
    pub stage: StageProfile,
    /// Its ways to those of the others that it is connected to.
    pub links: Vec<LinkProfile>,
    /// A port that a rank may listen at, where they are to reach each other without tunnels.
    pub direct_port: Option<u16>,
}

/// What a member is asked to measure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeasureQuery {
    /// The model's name.
    pub model: String,
    /// Whom it is to measure the ways to.
    pub members: Vec<NodeId>,
}

/// A member's part in an epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageOrder {
    /// Which.
    pub epoch: EpochId,
    /// The model's name.
    pub model: String,
    /// Fingerprint of the weights.
    pub weights: BlockHash,
    /// The member's place, from 1: the head is 0.
    pub rank: u32,
    /// All members, by rank.
    pub members: Vec<NodeId>,
    /// The first layer of each and the one after its last: a partition of all.
    pub layers: Vec<(u32, u32)>,
    /// Tokens of KV that all have room for.
    pub kv_tokens: u64,
    /// The ports that ranks may listen at, by rank, where they reach each other without tunnels; else none.
    pub direct_ports: Vec<u16>,
}

/// Why an order cannot be carried out by anybody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StageOrderError {
    /// Too few or too many.
    #[error("{members} members; from 2 to {PIPELINE_MEMBERS_MAX} can be ordered")]
    Members {
        /// Members named.
        members: usize,
    },
    /// Lists of different lengths, or a rank beyond them.
    #[error("rank {rank} of {members} members with {layers} ranges and {ports} ports")]
    Shape {
        /// The rank.
        rank: u32,
        /// Members named.
        members: usize,
        /// Ranges named.
        layers: usize,
        /// Ports named.
        ports: usize,
    },
    /// A hole, an overlap or an empty range.
    #[error("the ranges {layers:?} are no partition of a model's layers")]
    Partition {
        /// The ranges.
        layers: Vec<(u32, u32)>,
    },
}

impl StageOrder {
    /// Checks what came from elsewhere.
    ///
    /// # Errors
    /// [`StageOrderError`].
    pub fn check(&self) -> Result<(), StageOrderError> {
        let members = self.members.len();
        if !(2..=PIPELINE_MEMBERS_MAX).contains(&members) {
            return Err(StageOrderError::Members { members });
        }
        let (layers, ports) = (self.layers.len(), self.direct_ports.len());
        let rank = self.rank as usize;
        if layers != members || (ports != 0 && ports != members) || rank == 0 || rank >= members {
            return Err(StageOrderError::Shape { rank: self.rank, members, layers, ports });
        }
        let mut end = 0;
        for &(first, after) in &self.layers {
            if first != end || after <= first {
                return Err(StageOrderError::Partition { layers: self.layers.clone() });
            }
            end = after;
        }
        Ok(())
    }
}

/// What a member tells of its part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum StageNews {
    /// Its process was started.
    Started,
    /// Its process and its neighbours' have found each other.
    Joined,
    /// Its process computes.
    Ready,
    /// Its process lives.
    Beat {
        /// Passes that it has done.
        passes: u64,
    },
    /// Its process has ended, or cannot be started; the last news.
    Failed {
        /// Why.
        message: String,
    },
}

/// A way into a member's process, for the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelOrder {
    /// The epoch.
    pub epoch: EpochId,
    /// The rank that it leads to.
    pub rank: u32,
}

/// How a pipeline stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PipelinePhase {
    /// For members, or for the head.
    Waiting,
    /// Members are measured and a plan is made.
    Planning,
    /// Processes start and load.
    Starting,
    /// It serves.
    Running,
    /// There is no plan, as the detail says.
    Refused,
}

/// A member's part in a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedStage {
    /// The member.
    pub node: NodeId,
    /// Its name for people.
    pub name: String,
    /// Its first layer and the one after its last.
    pub layers: (u32, u32),
    /// Bytes of weights, embedding and head included.
    pub weight_bytes: u64,
    /// Bytes of KV.
    pub kv_bytes: u64,
    /// Bytes that it has for both.
    pub memory_bytes: u64,
    /// Seconds of a micro-batch in it.
    pub stage_s: f64,
    /// Seconds of a micro-batch on the way to the next stage; from the last one, of tokens to the first.
    pub link_s: f64,
}

/// A plan and what is expected of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PipelinePlan {
    /// In the order of layers; the first is the head's.
    pub stages: Vec<PlannedStage>,
    /// Tokens of KV that there is room for.
    pub kv_tokens: u64,
    /// Rows that it was made for.
    pub rows: u32,
    /// Micro-batches in flight.
    pub micro_batches: u32,
    /// Rows of the largest of them.
    pub micro_rows: u32,
    /// Seconds from a row's token to its next one.
    pub cycle_s: f64,
    /// Tokens a second of all rows.
    pub tokens_per_s: f64,
    /// Of the members' time, the part in which they wait.
    pub bubble: f64,
}

/// What a member tells of its pipeline; shown in `/v1/cluster`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PipelineReport {
    /// The model's name.
    pub model: String,
    /// The member whose engine serves, or will; itself, where it says so.
    pub head: Option<NodeId>,
    /// Epochs that there were of this head.
    pub epoch: u64,
    /// How it stands.
    pub phase: PipelinePhase,
    /// The same in words: what it waits for, what is wrong.
    pub detail: String,
    /// The head's plan.
    pub plan: Option<PipelinePlan>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_that_make_no_model_are_refused() {
        let order = |rank: u32, layers: &[(u32, u32)], ports: usize| StageOrder {
            epoch: EpochId { head: NodeId(1), number: 1 },
            model: "m".to_owned(),
            weights: BlockHash(1),
            rank,
            members: (1..=layers.len() as u128).map(NodeId).collect(),
            layers: layers.to_vec(),
            kv_tokens: 1,
            direct_ports: vec![1; ports],
        };
        let check = |rank, layers: &[(u32, u32)], ports, fine: bool| {
            let checked = order(rank, layers, ports).check();
            assert_eq!(checked.is_ok(), fine, "{rank} {layers:?} {ports}: {checked:?}");
        };
        check(1, &[(0, 3), (3, 7)], 0, true);
        check(1, &[(0, 3), (3, 7)], 2, true);
        check(1, &[(0, 3), (3, 7)], 1, false);
        check(0, &[(0, 3), (3, 7)], 0, false);
        check(2, &[(0, 3), (3, 7)], 0, false);
        check(1, &[(0, 3), (4, 7)], 0, false);
        check(1, &[(0, 3), (2, 7)], 0, false);
        check(1, &[(0, 3), (3, 3)], 0, false);
        check(1, &[(1, 3), (3, 5)], 0, false);
        check(1, &[(0, 3)], 0, false);
        check(1, &(0..9).map(|at| (at, at + 1)).collect::<Vec<_>>(), 0, false);
    }
}
