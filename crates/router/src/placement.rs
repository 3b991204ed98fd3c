//! [`place`]: which layers of a model go to which nodes, where no node should hold all of them. Pure: measurements in, a
//! plan out.
//!
//! A pipeline is an order of some members, each with a contiguous range of layers. With `m` micro-batches of `b` rows in
//! flight, every row gets a token each
//! `cycle = max(m · max τ(b), Σ (τ(b) + λ + bytes/bandwidth))`, where τ is a stage's time and λ a link's latency: either the
//! slowest stage is always busy, or a row waits only for its own token to go around. All orders, ranges and numbers of
//! micro-batches are looked through: for each bound on the slowest stage, a dynamic programme over (members used, last
//! member, layers placed) finds the least sum, and the bound is found by bisection, since a wider bound never makes the sum
//! greater.

use std::ops::Range;

/// Members of a pipeline.
pub const MEMBERS_MAX: usize = types::limits::PIPELINE_MEMBERS_MAX;
/// Layers of a model; the largest known ones have 126.
pub const LAYERS_MAX: usize = 512;

/// A model, as far as its placement goes.
#[derive(Debug, Clone, PartialEq)]
pub struct PlacedModel {
    /// Bytes of each layer's weights.
    pub layer_bytes: Vec<u64>,
    /// Bytes of the embedding, which the first stage holds.
    pub embedding_bytes: u64,
    /// Bytes of norm and head, which the last stage holds; where the embedding is the head, that again.
    pub head_bytes: u64,
    /// Bytes of KV that a token takes in one layer.
    pub kv_bytes_per_token: u64,
    /// Tokens of KV that there is to be room for.
    pub kv_tokens: u64,
    /// Bytes of one token's hidden state, which goes from stage to stage.
    pub hidden_bytes: u64,
}

/// What a node can do.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Bytes for weights and KV.
    pub memory_bytes: u64,
    /// Seconds that a decode pass spends in a layer, by rows: measured, with rows rising from at least 1. In between it is
    /// interpolated, beyond the last one it grows as between the last two.
    pub layer_s: Vec<(u32, f64)>,
    /// Seconds that norm, head and drawing take, by rows, likewise.
    pub head_s: Vec<(u32, f64)>,
}

/// The way from one member to another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Seconds one way.
    pub latency_s: f64,
    /// Bytes a second.
    pub bytes_per_s: f64,
}

/// What a pipeline is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Most tokens a second, with this many rows at once.
    Throughput {
        /// Rows being written, at least 1.
        rows: u32,
    },
    /// The next token of a single row as soon as possible.
    Latency,
}

/// One member's part.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// Index of the member.
    pub member: usize,
    /// Its layers.
    pub layers: Range<usize>,
    /// Bytes of its weights, embedding and head included.
    pub weight_bytes: u64,
    /// Bytes of its KV.
    pub kv_bytes: u64,
    /// Seconds of a micro-batch in it.
    pub stage_s: f64,
    /// Seconds of a micro-batch on the way to the next stage, and from the last one back to the first.
    pub link_s: f64,
}

/// A placement and what is expected of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    /// In the order in which layers are computed; their ranges are a partition of all layers.
    pub stages: Vec<Stage>,
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

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlacementError {
    /// Nobody, or too many.
    #[error("{members} members; a pipeline has from 1 to {MEMBERS_MAX}")]
    Members {
        /// Members given.
        members: usize,
    },
    /// No layers, or too many.
    #[error("{layers} layers; from 1 to {LAYERS_MAX} can be placed")]
    Layers {
        /// Layers given.
        layers: usize,
    },
    /// A measurement that cannot be one.
    #[error("member {member}: {what} is not a measurement")]
    Measurement {
        /// Index of the member.
        member: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// All memory together is not enough, or cannot be cut at layers.
    #[error(
        "the model needs {needed_bytes} bytes with its KV; the members have {memory_bytes}, too little or badly divided"
    )]
    TooLarge {
        /// Bytes of weights and KV.
        needed_bytes: u64,
        /// Bytes of all members.
        memory_bytes: u64,
    },
    /// One node does it better.
    #[error(
        "{stages} stages would give {tokens_per_s:.1} tokens a second, and member {member} alone {alone_per_s:.1}"
    )]
    Slower {
        /// Stages of the best pipeline.
        stages: usize,
        /// Its tokens a second.
        tokens_per_s: f64,
        /// Index of the member that could hold the model.
        member: usize,
        /// That member's tokens a second.
        alone_per_s: f64,
    },
}

/// What a plan has to keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rules {
    /// Also where one member alone would be faster.
    pub forced: bool,
    /// The member that has the first layers; none: whichever is best.
    pub first: Option<usize>,
}

/// The best pipeline of more than one stage, or of one where a single member is all there is.
///
/// `links[i][j]` leads from member `i` to `j`.
///
/// # Errors
/// See [`PlacementError`]; [`PlacementError::Slower`] unless forced.
pub fn place(
    model: &PlacedModel,
    members: &[Member],
    links: &[Vec<Link>],
    goal: Goal,
    Rules { forced, first }: Rules,
) -> Result<Placement, PlacementError> {
    check(model, members, links)?;
    let rows = match goal {
        Goal::Throughput { rows } => rows.max(1),
        Goal::Latency => 1,
    };
    // More micro-batches than twice the stages only fill waits that are longer than the work: links so slow that no split
    // pays. They never have less than a row.
    let most = (2 * members.len() as u32).min(rows);
    let mut best: Option<Placement> = None;
    let mut alone: Option<Placement> = None;
    let better = |plan: &Placement, than: &Option<Placement>| {
        than.as_ref().is_none_or(|than| plan.cycle_s < than.cycle_s * (1.0 - 1e-9))
    };
    for micro_batches in 1..=most {
        let table = Table::new(model, members, links, rows.div_ceil(micro_batches), micro_batches);
        if best.as_ref().is_some_and(|best| table.cycle_s_min() >= best.cycle_s) {
            continue;
        }
        let stages_min = if members.len() == 1 { 1 } else { 2 };
        let plan = table.best(stages_min, first).map(|cut| table.plan(&cut, rows));
        best = plan.filter(|plan| better(plan, &best)).or(best);
        if micro_batches == 1 {
            // Alone, nothing is gained by cutting rows into batches.
            for member in 0..members.len() {
                let cut = [(member, 0..model.layer_bytes.len())];
                if table.fits(member, &cut[0].1) {
                    let plan = table.plan(&cut, rows);
                    if better(&plan, &alone) {
                        alone = Some(plan);
                    }
                }
            }
        }
    }
    match (best, alone) {
        (Some(best), Some(alone)) if !forced && best.stages.len() > 1 && alone.cycle_s <= best.cycle_s => {
            Err(PlacementError::Slower {
                stages: best.stages.len(),
                tokens_per_s: best.tokens_per_s,
                member: alone.stages[0].member,
                alone_per_s: alone.tokens_per_s,
            })
        }
        (Some(best), _) => Ok(best),
        (None, _) => Err(PlacementError::TooLarge {
            needed_bytes: model.embedding_bytes
                + model.head_bytes
                + model.layer_bytes.iter().sum::<u64>()
                + model.kv_bytes(&(0..model.layer_bytes.len())),
            memory_bytes: members.iter().map(|member| member.memory_bytes).sum(),
        }),
    }
}

fn check(model: &PlacedModel, members: &[Member], links: &[Vec<Link>]) -> Result<(), PlacementError> {
    if members.is_empty() || members.len() > MEMBERS_MAX {
        return Err(PlacementError::Members { members: members.len() });
    }
    let layers = model.layer_bytes.len();
    if layers == 0 || layers > LAYERS_MAX {
        return Err(PlacementError::Layers { layers });
    }
    let measured = |points: &[(u32, f64)], least: f64| {
        let rising = points.windows(2).all(|pair| pair[0].0 < pair[1].0);
        let times = points.iter().all(|&(rows, seconds)| rows > 0 && seconds.is_finite() && seconds >= least);
        !points.is_empty() && rising && times
    };
    let usable = |link: &Link| link.latency_s >= 0.0 && link.latency_s.is_finite() && link.bytes_per_s > 0.0;
    for (index, member) in members.iter().enumerate() {
        let error = |what| Err(PlacementError::Measurement { member: index, what });
        if !measured(&member.layer_s, f64::MIN_POSITIVE) {
            return error("layer_s");
        }
        // It is what is left of a pass without its layers, which on a busy machine may seem to be nothing.
        if !measured(&member.head_s, 0.0) {
            return error("head_s");
        }
        let row = links.get(index).filter(|row| row.len() == members.len());
        let others = row.map(|row| row.iter().enumerate().all(|(to, link)| to == index || usable(link)));
        if others != Some(true) {
            return error("a link");
        }
    }
    Ok(())
}

impl PlacedModel {
    fn kv_bytes(&self, layers: &Range<usize>) -> u64 {
        self.kv_bytes_per_token.saturating_mul(self.kv_tokens).saturating_mul(layers.len() as u64)
    }
}

/// Stages as members and ranges.
type Cut = Vec<(usize, Range<usize>)>;

/// One number of micro-batches: what each range costs each member.
struct Table<'a> {
    model: &'a PlacedModel,
    members: &'a [Member],
    micro_batches: u32,
    micro_rows: u32,
    /// Bytes of the first `l` layers.
    bytes: Vec<u64>,
    /// Seconds of a layer and of the head, by member.
    layer_s: Vec<f64>,
    head_s: Vec<f64>,
    /// Seconds from member to member of a micro-batch's hidden states, and of its tokens.
    hidden_link_s: Vec<Vec<f64>>,
    token_link_s: Vec<Vec<f64>>,
}

/// Where a state of the programme came from: the member before (none: first), and its layers' end.
#[derive(Debug, Clone, Copy)]
struct Step {
    sum_s: f64,
    from: u16,
    member_before: u8,
}

const NOWHERE: Step = Step { sum_s: f64::INFINITY, from: 0, member_before: u8::MAX };

impl<'a> Table<'a> {
    fn new(
        model: &'a PlacedModel,
        members: &'a [Member],
        links: &[Vec<Link>],
        micro_rows: u32,
        micro_batches: u32,
    ) -> Self {
        let mut bytes = vec![0];
        for layer in &model.layer_bytes {
            bytes.push(bytes[bytes.len() - 1] + layer);
        }
        let link_s = |bytes: u64| -> Vec<Vec<f64>> {
            let one = |link: &Link| link.latency_s + bytes as f64 / link.bytes_per_s;
            let row = |(from, row): (usize, &Vec<Link>)| {
                row.iter().enumerate().map(|(to, link)| if from == to { 0.0 } else { one(link) }).collect()
            };
            links.iter().enumerate().map(row).collect()
        };
        Self {
            model,
            members,
            micro_batches,
            micro_rows,
            bytes,
            layer_s: members.iter().map(|member| seconds_at(&member.layer_s, micro_rows)).collect(),
            head_s: members.iter().map(|member| seconds_at(&member.head_s, micro_rows)).collect(),
            hidden_link_s: link_s(model.hidden_bytes * u64::from(micro_rows)),
            token_link_s: link_s(4 * u64::from(micro_rows)),
        }
    }

    fn layers(&self) -> usize {
        self.model.layer_bytes.len()
    }

    fn weight_bytes(&self, layers: &Range<usize>) -> u64 {
        let embedding = if layers.start == 0 { self.model.embedding_bytes } else { 0 };
        let head = if layers.end == self.layers() { self.model.head_bytes } else { 0 };
        self.bytes[layers.end] - self.bytes[layers.start] + embedding + head
    }

    fn fits(&self, member: usize, layers: &Range<usize>) -> bool {
        let needed = self.weight_bytes(layers).saturating_add(self.model.kv_bytes(layers));
        needed <= self.members[member].memory_bytes
    }

    fn stage_s(&self, member: usize, layers: &Range<usize>) -> f64 {
        let head = if layers.end == self.layers() { self.head_s[member] } else { 0.0 };
        self.layer_s[member] * layers.len() as f64 + head
    }

    fn cycle_s(&self, slowest_s: f64, sum_s: f64) -> f64 {
        (f64::from(self.micro_batches) * slowest_s).max(sum_s)
    }

    /// The time of the slowest stage, were all members equally busy.
    fn slowest_s_min(&self) -> f64 {
        self.layers() as f64 / self.layer_s.iter().map(|layer_s| 1.0 / layer_s).sum::<f64>()
    }

    /// No cut takes less.
    fn cycle_s_min(&self) -> f64 {
        let fastest_s = self.layer_s.iter().copied().fold(f64::INFINITY, f64::min);
        self.cycle_s(self.slowest_s_min(), fastest_s * self.layers() as f64)
    }

    /// The cut with the least cycle, of at least so many stages.
    fn best(&self, stages_min: usize, first: Option<usize>) -> Option<Cut> {
        // All times that a slowest stage can have.
        let mut bounds: Vec<f64> = Vec::new();
        for member in 0..self.members.len() {
            for count in 1..=self.layers() {
                let body = self.layer_s[member] * count as f64;
                bounds.extend([body, body + self.head_s[member]]);
            }
        }
        bounds.sort_by(f64::total_cmp);
        bounds.dedup();
        let mut best: Option<(f64, Cut)> = None;
        // The first bound, from below, where the slowest stage is what counts; the best one is that or the one before.
        let least_s = self.slowest_s_min() * (1.0 - 1e-9);
        let (mut low, mut high) = (bounds.partition_point(|bound_s| *bound_s < least_s), bounds.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let found = self.least_sum(bounds[middle], stages_min, first);
            let busy = found
                .as_ref()
                .is_some_and(|(sum_s, _)| f64::from(self.micro_batches) * bounds[middle] >= *sum_s);
            if let Some((sum_s, cut)) = found {
                let slowest_s =
                    cut.iter().map(|(member, layers)| self.stage_s(*member, layers)).fold(0.0, f64::max);
                let cycle_s = self.cycle_s(slowest_s, sum_s);
                if best.as_ref().is_none_or(|(least_s, _)| cycle_s < *least_s) {
                    best = Some((cycle_s, cut));
                }
            }
            if busy { high = middle } else { low = middle + 1 }
        }
        best.map(|(_, cut)| cut)
    }

    /// The cut with the least sum of stages and links where no stage takes longer than `bound_s`.
    fn least_sum(&self, bound_s: f64, stages_min: usize, first: Option<usize>) -> Option<(f64, Cut)> {
        let (members, layers) = (self.members.len(), self.layers());
        let width = layers + 1;
        let at = |mask: usize, last: usize, end: usize| (mask * members + last) * width + end;
        // The furthest that each member's layers may reach, from each start.
        let reach: Vec<Vec<usize>> = (0..members)
            .map(|member| {
                let reach = |start: usize| {
                    let allowed = |end: &usize| {
                        let range = start..*end;
                        self.stage_s(member, &range) <= bound_s && self.fits(member, &range)
                    };
                    (start + 1..=layers).take_while(allowed).last().unwrap_or(start)
                };
                (0..layers).map(reach).collect()
            })
            .collect();
        // The way back from the last stage to the first is a part of the sum, so each first member has its own programme.
        let mut best: Option<(f64, Cut)> = None;
        for first in (0..members).filter(|member| first.is_none_or(|first| first == *member)) {
            let mut steps = vec![NOWHERE; (1 << members) * members * width];
            for end in 1..=reach[first][0] {
                let stage_s = self.stage_s(first, &(0..end));
                steps[at(1 << first, first, end)] = Step { sum_s: stage_s, ..NOWHERE };
            }
            for mask in (0..1_usize << members).filter(|mask| mask & (1 << first) != 0) {
                for last in (0..members).filter(|last| mask & (1 << last) != 0) {
                    for start in 1..layers {
                        let sum_s = steps[at(mask, last, start)].sum_s;
                        if sum_s.is_infinite() {
                            continue;
                        }
                        for next in (0..members).filter(|next| mask & (1 << next) == 0) {
                            let sum_s = sum_s + self.hidden_link_s[last][next];
                            let row = at(mask | 1 << next, next, 0);
                            for end in start + 1..=reach[next][start] {
                                let sum_s = sum_s + self.stage_s(next, &(start..end));
                                let step = &mut steps[row + end];
                                if sum_s < step.sum_s {
                                    *step = Step { sum_s, from: start as u16, member_before: last as u8 };
                                }
                            }
                        }
                    }
                }
            }
            for mask in 0..1_usize << members {
                if (mask.count_ones() as usize) < stages_min {
                    continue;
                }
                for last in (0..members).filter(|last| mask & (1 << last) != 0) {
                    let sum_s = steps[at(mask, last, layers)].sum_s + self.token_link_s[last][first];
                    if sum_s.is_finite() && best.as_ref().is_none_or(|(least_s, _)| sum_s < *least_s) {
                        let mut cut = Cut::new();
                        let (mut mask, mut member, mut end) = (mask, last, layers);
                        loop {
                            let step = steps[at(mask, member, end)];
                            let start = usize::from(step.from);
                            cut.push((member, start..end));
                            if step.member_before == u8::MAX {
                                break;
                            }
                            mask &= !(1 << member);
                            (member, end) = (usize::from(step.member_before), start);
                        }
                        cut.reverse();
                        best = Some((sum_s, cut));
                    }
                }
            }
        }
        best
    }

    fn plan(&self, cut: &[(usize, Range<usize>)], rows: u32) -> Placement {
        let stage = |(index, (member, layers)): (usize, &(usize, Range<usize>))| {
            let next = cut.get(index + 1);
            let link_s = match next {
                Some((next, _)) => self.hidden_link_s[*member][*next],
                None => self.token_link_s[*member][cut[0].0],
            };
            Stage {
                member: *member,
                layers: layers.clone(),
                weight_bytes: self.weight_bytes(layers),
                kv_bytes: self.model.kv_bytes(layers),
                stage_s: self.stage_s(*member, layers),
                link_s,
            }
        };
        let stages: Vec<Stage> = cut.iter().enumerate().map(stage).collect();
        assert_partition(&stages, self.layers());
        let work_s: f64 = stages.iter().map(|stage| stage.stage_s).sum();
        let sum_s = work_s + stages.iter().map(|stage| stage.link_s).sum::<f64>();
        let slowest_s = stages.iter().map(|stage| stage.stage_s).fold(0.0, f64::max);
        let cycle_s = self.cycle_s(slowest_s, sum_s);
        Placement {
            micro_batches: self.micro_batches,
            micro_rows: self.micro_rows,
            cycle_s,
            tokens_per_s: f64::from(rows) / cycle_s,
            bubble: 1.0 - f64::from(self.micro_batches) * work_s / (stages.len() as f64 * cycle_s),
            stages,
        }
    }
}

/// A hole or an overlap would be another model.
fn assert_partition(stages: &[Stage], layers: usize) {
    let mut end = 0;
    for stage in stages {
        assert!(stage.layers.start == end && stage.layers.end > end, "{stages:?} are no partition");
        end = stage.layers.end;
    }
    assert_eq!(end, layers, "{stages:?} are no partition");
}

/// Between measurements linear; below the first as the first; beyond the last as between the last two.
fn seconds_at(points: &[(u32, f64)], rows: u32) -> f64 {
    let after = points.iter().position(|point| point.0 >= rows);
    let (before, after) = match after {
        Some(0) => return points[0].1,
        Some(index) => (points[index - 1], points[index]),
        None if points.len() == 1 => return points[0].1 * f64::from(rows) / f64::from(points[0].0),
        None => (points[points.len() - 2], points[points.len() - 1]),
    };
    let share = (f64::from(rows) - f64::from(before.0)) / (f64::from(after.0) - f64::from(before.0));
    (before.1 + share * (after.1 - before.1)).max(0.0)
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
