//! Routing over simulated nodes, all policies side by side: the real [`router::Router`], nodes that batch at every step and
//! keep prefixes, requests from traces or made up, virtual time. The same settings give the same figures to the bit.

mod cache;
mod chart;
mod figures;
mod node;
mod room;
mod sim;
#[cfg(test)]
mod tests;
mod workload;

pub use chart::chart;
pub use figures::Figures;
pub use workload::{Source, TraceError};

use room::Room;
use router::{Policy, RivalSettings, RouterSettings};
use serde::Serialize;
use sim::simulate;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Requests of a made-up workload for each node.
const REQUESTS_PER_NODE: usize = 1000;
/// Requests of one run: more tell nothing more.
const REQUESTS_MAX: usize = 100_000;

/// What is to be simulated.
#[derive(Debug, Clone)]
pub struct RouterBenchSettings {
    /// Where requests come from.
    pub source: Source,
    /// Nodes, from 1 to [`types::limits::NODES_MAX`].
    pub nodes: usize,
    /// Of four speeds in turn, instead of one.
    pub unequal: bool,
    /// What is compared.
    pub policies: Vec<Policy>,
    /// One run each; a trace of Mooncake's is the same for all.
    pub seeds: Vec<u64>,
    /// Requests of each run; none: as many as a trace has, a thousand for each node otherwise.
    pub requests: Option<usize>,
    /// Work offered, as a share of what the nodes can do if all prefixes are found; none: as fast as the requests came.
    pub load: Option<f64>,
    /// KV of each node as a share of what all prompts bring; none: 131,072 tokens, for traces one share of the nodes'.
    pub kv_share: Option<f64>,
    /// Lengths of a trace are divided by this.
    pub divisor: u32,
    /// Of the rules to compare with.
    pub rivals: RivalSettings,
    /// Runs at once.
    pub threads: usize,
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RouterReport {
    /// Name of the workload.
    pub workload: String,
    /// Nodes.
    pub nodes: usize,
    /// Whether they are of four speeds.
    pub unequal: bool,
    /// Work offered.
    pub load: Option<f64>,
    /// Runs.
    pub seeds: Vec<u64>,
    /// Requests of all runs.
    pub requests: usize,
    /// Tokens that a single cache with all nodes' memory would find, of all.
    pub single_cache_hit_rate: f64,
    /// Means over the runs.
    pub policies: BTreeMap<String, Figures>,
}

/// A policy as it is meant: ours holds requests back until a node has room, gateways send them on at once.
pub(crate) fn contender(policy: Policy, rivals: RivalSettings) -> RouterSettings {
    let settings = RouterSettings { policy, rivals, ..RouterSettings::default() };
    match policy {
        Policy::Cost => settings,
        _ => RouterSettings { node_waiting_max: u32::MAX / 2, ..settings },
    }
}

/// Runs every policy on every seed.
///
/// # Errors
/// [`TraceError`].
pub fn router_bench(settings: &RouterBenchSettings) -> Result<RouterReport, TraceError> {
    let room = Room::new(settings.nodes, settings.unequal, settings.load, settings.kv_share);
    let count = settings.requests.unwrap_or(match settings.source {
        Source::Trace(_) => REQUESTS_MAX,
        Source::Chats | Source::Agents | Source::Zipf => settings.nodes * REQUESTS_PER_NODE,
    });
    // Any moment will do: only differences count.
    let epoch = Instant::now();
    let (mut name, mut requests, mut hit_rate) = (String::new(), 0, 0.0);
    let mut runs: Vec<Vec<Figures>> = vec![Vec::new(); settings.policies.len()];
    for &seed in &settings.seeds {
        let workload = settings.source.load(seed, count.clamp(1, REQUESTS_MAX), settings.divisor.max(1))?;
        let blocks = room.node_blocks(&workload);
        let (arrivals, all) = room.arrivals(&workload);
        let tokens: usize = all.iter().map(|request| request.prompt_tokens as usize).sum();
        let unread: usize = room::uncached(&all, blocks * room.nodes.len()).into_iter().sum();
        hit_rate += (1.0 - unread as f64 / tokens as f64) / settings.seeds.len() as f64;
        (name, requests) = (workload.name, requests + all.len());
        let figures = in_parallel(settings.threads, &settings.policies, |&policy| {
            let router = contender(policy, settings.rivals);
            let outcomes = simulate(&all, &arrivals, &room.nodes, blocks, router, epoch);
            Figures::of(&all, &arrivals, &outcomes)
        });
        runs.iter_mut().zip(figures).for_each(|(runs, figures)| runs.push(figures));
    }
    let policies = settings.policies.iter().zip(&runs).map(|(policy, runs)| {
        let runs: Vec<&Figures> = runs.iter().collect();
        (policy.to_string(), Figures::mean(&runs))
    });
    Ok(RouterReport {
        workload: name,
        nodes: settings.nodes,
        unequal: settings.unequal,
        load: settings.load,
        seeds: settings.seeds.clone(),
        requests,
        single_cache_hit_rate: hit_rate,
        policies: policies.collect(),
    })
}

/// The results of all inputs, in their order, worked out by several threads.
fn in_parallel<T: Sync, R: Send>(threads: usize, inputs: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, inputs.len().max(1)) {
            scope.spawn(|| {
                while let Some((index, input)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    inputs.get(index).map(|input| (index, input))
                } {
                    let result = work(input);
                    results.lock().expect("no thread fails holding it").insert(index, result);
                }
            });
        }
    });
    results.into_inner().expect("no thread failed").into_values().collect()
}
