//! Which of the nodes that could take a request gets it, by each policy.

use crate::cost::{Usual, Work};
use crate::node::KnownNode;
use crate::query::Excluded;
use crate::settings::{Policy, RivalSettings, RouterSettings};
use std::cmp::Ordering;
use std::time::Instant;
use types::{BLOCK_TOKENS, BlockHash, NodeId};

/// Costs within this fraction of the least one are equal: no prediction is better than that.
const TIE_FRACTION: f64 = 0.05;
/// Costs within this of the least one are equal, in seconds: below what anybody notices.
pub(crate) const TIE_S: f64 = 0.005;
/// [`Policy::PrefixHash`] goes by so many blocks at the beginning: 256 tokens, as smg does.
const PREFIX_BLOCKS: usize = 8;
/// [`Policy::SmgSpill`]: the most above the mean that is tolerated.
const SPILL_MAX: f64 = 64.0;

/// A node that could take the request.
#[derive(Debug)]
pub(crate) struct Candidate<'a> {
    pub(crate) node: NodeId,
    pub(crate) known: &'a KnownNode,
    pub(crate) matched_tokens: u32,
    pub(crate) requests: u32,
    /// Of its cost.
    pub(crate) total_s: f64,
    pub(crate) first_token_s: f64,
    pub(crate) excluded: Option<Excluded>,
}

/// What the choice depends on beside the candidates.
#[derive(Debug)]
pub(crate) struct Occasion<'a> {
    pub(crate) settings: &'a RouterSettings,
    pub(crate) hashes: &'a [BlockHash],
    pub(crate) prompt_tokens: u32,
    /// The node that had the session's last request.
    pub(crate) session: Option<NodeId>,
    /// Requests routed so far.
    pub(crate) turn: u64,
    pub(crate) usual: Usual,
    pub(crate) now: Instant,
}

impl Occasion<'_> {
    /// The index of the best one; none where there are none.
    pub(crate) fn choose(&self, all: &[Candidate<'_>]) -> Option<usize> {
        let rivals = &self.settings.rivals;
        match self.settings.policy {
            Policy::Cost => self.least(all, |one| one.total_s),
            Policy::GreedyTtft => self.least(all, |one| one.first_token_s),
            Policy::LeastWork => self.least(all, |one| {
                let work = self.work(one);
                work.backlog_s() + work.slot_s() + work.predictor.read_s(f64::from(self.prompt_tokens))
            }),
            Policy::RoundRobin => (self.turn as usize).checked_rem(all.len()),
            Policy::Lmetric => best(all, |one| -self.lmetric(one)),
            Policy::PrefixHash => self.prefix_hash(all, rivals),
            Policy::SglangRule => self.sglang_rule(all, rivals),
            Policy::SmgSpill => self.smg_spill(all, rivals),
            Policy::Llmd322 => self.llmd_322(all, rivals),
        }
    }

    /// The least by seconds; of those that are as good, the session's, then the one with the lower load.
    fn least(&self, all: &[Candidate<'_>], seconds: impl Fn(&Candidate<'_>) -> f64) -> Option<usize> {
        let least_s = all.iter().map(&seconds).fold(f64::INFINITY, f64::min);
        let tie_s = least_s + TIE_S.max(least_s * TIE_FRACTION);
        let tied = all.iter().enumerate().filter(|(_, one)| seconds(one) <= tie_s);
        let stays = |one: &Candidate<'_>| self.session == Some(one.node);
        let order = |one: &Candidate<'_>, other: &Candidate<'_>| {
            stays(other).cmp(&stays(one)).then_with(|| one.tie_order(other))
        };
        tied.min_by(|(_, one), (_, other)| order(one, other)).map(|(index, _)| index)
    }

    fn work<'a>(&self, one: &Candidate<'a>) -> Work<'a> {
        one.known.work(self.usual, 0.0, self.now)
    }

    fn lmetric(&self, one: &Candidate<'_>) -> f64 {
        let block = BLOCK_TOKENS as f64;
        let uncached = f64::from(self.prompt_tokens - one.matched_tokens);
        let to_read = (self.work(one).prefill_tokens() as f64 + uncached) / block;
        to_read * (self.work(one).kv_tokens().0 as f64 / block + 1.0)
    }

    fn matched(&self, one: &Candidate<'_>) -> f64 {
        f64::from(one.matched_tokens) / f64::from(self.prompt_tokens.max(1))
    }

    fn prefix_hash(&self, all: &[Candidate<'_>], rivals: &RivalSettings) -> Option<usize> {
        let beginning = self.hashes.get(self.hashes.len().min(PREFIX_BLOCKS).wrapping_sub(1));
        let beginning = beginning.map_or(0, |hash| hash.0 as u64);
        let total: u64 = all.iter().map(|one| u64::from(one.requests)).sum();
        let most = rivals.bounded_load * (total + 1) as f64 / all.len() as f64;
        let place =
            |one: &Candidate<'_>| mixed(beginning ^ mixed(one.node.0 as u64 ^ (one.node.0 >> 64) as u64));
        let fits = all.iter().enumerate().filter(|(_, one)| f64::from(one.requests) < most);
        fits.max_by_key(|(_, one)| place(one)).map(|(index, _)| index).or_else(|| least_loaded(all))
    }

    fn sglang_rule(&self, all: &[Candidate<'_>], rivals: &RivalSettings) -> Option<usize> {
        let loads = || all.iter().map(|one| one.requests);
        let (least, most) = (loads().min()?, loads().max()?);
        let uneven =
            most - least > rivals.balance_abs && f64::from(most) > rivals.balance_rel * f64::from(least);
        let longest = best(all, |one| self.matched(one))?;
        let worth = self.matched(&all[longest]) > rivals.cache_threshold;
        if worth && !uneven { Some(longest) } else { least_loaded(all) }
    }

    fn smg_spill(&self, all: &[Candidate<'_>], rivals: &RivalSettings) -> Option<usize> {
        let total: u64 = all.iter().map(|one| u64::from(one.requests)).sum();
        let mean = total as f64 / all.len().max(1) as f64;
        let above = (rivals.spill_root * mean.sqrt()).max(rivals.spill_min).min(SPILL_MAX);
        let spills = |one: &Candidate<'_>| {
            let load = f64::from(one.requests);
            load > mean * rivals.spill_rel && load > mean + above
        };
        let match_of = |one: &Candidate<'_>| if spills(one) { -1.0 } else { self.matched(one) };
        let longest = best(all, match_of)?;
        if match_of(&all[longest]) > rivals.cache_threshold { Some(longest) } else { least_loaded(all) }
    }

    fn llmd_322(&self, all: &[Candidate<'_>], rivals: &RivalSettings) -> Option<usize> {
        let queues = || all.iter().map(|one| f64::from(self.work(one).waiting()));
        let (least, most) = (queues().fold(f64::INFINITY, f64::min), queues().fold(0.0, f64::max));
        best(all, |one| {
            let waiting = f64::from(self.work(one).waiting());
            let queue = if most > least { (most - waiting) / (most - least) } else { 1.0 };
            let (held, total) = self.work(one).kv_tokens();
            let free = 1.0 - (held as f64 / total.max(1) as f64).min(1.0);
            let scores = [self.matched(one), queue, free];
            rivals.weights.iter().zip(scores).map(|(weight, score)| weight * score).sum()
        })
    }
}

impl Candidate<'_> {
    /// Between equal costs: lower load, then more of the prompt cached, then id.
    fn tie_order(&self, other: &Self) -> Ordering {
        let slots = |one: &Self| one.known.load().map_or(1, |load| load.slots.max(1));
        let load = |one: &Self, slots: u32| u64::from(one.requests) * u64::from(slots);
        load(self, slots(other))
            .cmp(&load(other, slots(self)))
            .then(other.matched_tokens.cmp(&self.matched_tokens))
            .then(self.node.cmp(&other.node))
    }
}

/// The one with the highest score; of several the one with the fewest requests.
fn best(all: &[Candidate<'_>], score: impl Fn(&Candidate<'_>) -> f64) -> Option<usize> {
    let scored = all.iter().enumerate().map(|(index, one)| (index, score(one), one));
    let order = |one: &(usize, f64, &Candidate<'_>), other: &(usize, f64, &Candidate<'_>)| {
        one.1.total_cmp(&other.1).then_with(|| by_load(other.2, one.2))
    };
    scored.max_by(order).map(|(index, ..)| index)
}

fn least_loaded(all: &[Candidate<'_>]) -> Option<usize> {
    all.iter().enumerate().min_by(|(_, one), (_, other)| by_load(one, other)).map(|(index, _)| index)
}

/// As the gateways count: requests, then requests so far, then id.
fn by_load(one: &Candidate<'_>, other: &Candidate<'_>) -> Ordering {
    let key = |one: &Candidate<'_>| (one.requests, one.known.given, one.node);
    key(one).cmp(&key(other))
}

/// The finalizer of splitmix64.
fn mixed(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
