//! What a router goes by: its rule, and the numbers in it.

use std::fmt;
use std::str::FromStr;

/// Requests whose prompt is not read yet that a router lets be at a node before it holds others back, unless they are read
/// in a moment; and requests beyond a node's slots. One is enough that nodes do not run dry, and whoever is held back is
/// bound to a node late.
pub const NODE_WAITING_MAX: u32 = 1;

/// By what rule a node is chosen. All but [`Self::Cost`] are there to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Policy {
    /// Least cost in seconds: waiting, reading, what it evicts, a part of writing.
    #[default]
    Cost,
    /// Least time to the first token, whatever that evicts (Mooncake's algorithm 1).
    GreedyTtft,
    /// Least product of prompt blocks to be read and blocks in use (Dynamo's `lmetric`).
    Lmetric,
    /// By hash of the prompt's beginning, with bounded load (KubeAI, smg).
    PrefixHash,
    /// Least work, whatever caches hold.
    LeastWork,
    /// One after the other.
    RoundRobin,
    /// Longest match above a threshold, unless request counts differ too much (SGLang's gateway 0.3.2).
    SglangRule,
    /// Longest match among the nodes that are not far above the mean of request counts (smg 1.13).
    SmgSpill,
    /// Weighted scores of match, queue and KV in use, 3 : 2 : 2 (llm-d, Gateway API inference extension).
    Llmd322,
}

impl Policy {
    /// Whether a request waits at the router for the node that is best for it, while that one is full and others are not.
    pub(crate) fn waits(self) -> bool {
        matches!(self, Self::Cost | Self::GreedyTtft | Self::LeastWork)
    }

    /// All, by name.
    pub const ALL: [(Self, &str); 9] = [
        (Self::Cost, "cost"),
        (Self::GreedyTtft, "greedy_ttft"),
        (Self::Lmetric, "lmetric"),
        (Self::PrefixHash, "prefix_hash"),
        (Self::LeastWork, "least_work"),
        (Self::RoundRobin, "round_robin"),
        (Self::SglangRule, "sglang_rule"),
        (Self::SmgSpill, "smg_spill"),
        (Self::Llmd322, "llmd_322"),
    ];
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = Self::ALL.iter().find(|(policy, _)| policy == self);
        f.write_str(found.map_or("", |(_, name)| name))
    }
}

/// A name that no policy has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is no policy; there are {}", Policy::ALL.map(|(_, name)| name).join(", "))]
pub struct PolicyError {
    /// The name given.
    pub value: String,
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(value: &str) -> Result<Self, PolicyError> {
        let found = Self::ALL.iter().find(|(_, name)| *name == value);
        found.map(|(policy, _)| *policy).ok_or_else(|| PolicyError { value: value.to_owned() })
    }
}

/// The rule and its numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterSettings {
    /// The rule.
    pub policy: Policy,
    /// Requests that may wait at a node beside those that run.
    pub node_waiting_max: u32,
    /// Of [`Policy::Cost`].
    pub cost: CostWeights,
    /// Of the rules to compare with.
    pub rivals: RivalSettings,
}

impl Default for RouterSettings {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            node_waiting_max: NODE_WAITING_MAX,
            cost: CostWeights::default(),
            rivals: RivalSettings::default(),
        }
    }
}

/// The numbers of [`Policy::Cost`], tuned with `mlx-node bench router` (docs/performance.md).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CostWeights {
    /// Of the time to write the answer, relative to the time until it starts. The wait for the first token is what a
    /// choice of node can change most.
    pub decode: f64,
    /// Of the time that others wait longer.
    pub others: f64,
    /// Of the time to read its prompt, beyond that it waits for it: what is read twice could have been read once.
    pub work: f64,
    /// Of the time to read again what the request evicts.
    pub eviction: f64,
    /// Seconds after which unused blocks are used again, where a node has not measured it.
    pub reuse_s: f64,
}

impl Default for CostWeights {
    fn default() -> Self {
        Self { decode: 2.0, others: 2.0, work: 18.0, eviction: 10.0, reuse_s: 120.0 }
    }
}

/// The numbers of the rules to compare with: by default those that they are published with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RivalSettings {
    /// [`Policy::SglangRule`], [`Policy::SmgSpill`]: the least part of a prompt that is worth following its cache.
    pub cache_threshold: f64,
    /// [`Policy::SglangRule`]: request counts differ too much if by more than this,
    pub balance_abs: u32,
    /// and by more than this factor.
    pub balance_rel: f64,
    /// [`Policy::SmgSpill`]: a node is passed over with more than this times the mean of request counts,
    pub spill_rel: f64,
    /// and more than the mean by √mean times this, at least [`Self::spill_min`] and at most 64.
    pub spill_root: f64,
    /// See [`Self::spill_root`].
    pub spill_min: f64,
    /// [`Policy::PrefixHash`]: request counts are at most this times their mean.
    pub bounded_load: f64,
    /// [`Policy::Llmd322`]: weights of match, queue and KV in use.
    pub weights: [f64; 3],
}

impl Default for RivalSettings {
    fn default() -> Self {
        Self {
            cache_threshold: 0.3,
            balance_abs: 64,
            balance_rel: 1.5,
            spill_rel: 1.5,
            spill_root: 2.0,
            spill_min: 4.0,
            bounded_load: 1.25,
            weights: [3.0, 2.0, 2.0],
        }
    }
}

impl RivalSettings {
    /// The best of some 30 settings of each rule on chats, agents and zipf, seeds 1 to 3, by mean time to the first token.
    pub const TUNED: Self = Self {
        cache_threshold: 0.3,
        balance_abs: 64,
        balance_rel: 1.5,
        spill_rel: 3.0,
        spill_root: 2.0,
        spill_min: 8.0,
        bounded_load: 1.25,
        weights: [3.0, 1.0, 2.0],
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_have_names() {
        for (policy, name) in Policy::ALL {
            assert_eq!(policy.to_string(), name);
            assert_eq!(name.parse(), Ok(policy));
        }
        let error = "fast".parse::<Policy>().expect_err("no policy");
        assert!(
            error.to_string().starts_with("\"fast\" is no policy; there are cost, greedy_ttft"),
            "{error}"
        );
    }
}
