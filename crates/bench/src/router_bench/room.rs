//! [`Room`]: the nodes that a workload meets, how fast it comes and how much they remember.

use super::cache::Cache;
use super::node::NodeSpec;
use super::workload::{Request, Workload};
use rustc_hash::FxHashSet;
use types::BLOCK_TOKENS;

/// Rows that a node is taken to decode at once where a workload is stretched to what nodes can do.
const ROWS_USUAL: usize = 8;
/// Requests that a node runs at once.
const SLOTS: usize = 32;
/// Prompt tokens a second, and how much longer decode steps take than 10 ms and half a millisecond for each further row.
const EQUAL: [(f64, f64); 1] = [(4000.0, 1.0)];
/// The same of four unlike Macs.
const UNEQUAL: [(f64, f64); 4] = [(6000.0, 0.6), (4000.0, 1.0), (2000.0, 1.6), (1200.0, 2.2)];

/// The nodes of a run.
#[derive(Debug, Clone)]
pub(crate) struct Room {
    pub(crate) nodes: Vec<NodeSpec>,
    /// Work offered, as a share of what the nodes can do if all prefixes are found; none: as fast as the requests came.
    pub(crate) load: Option<f64>,
    /// KV of each node as a share of what all prompts bring; none: what the workload says.
    pub(crate) kv_share: Option<f64>,
}

impl Room {
    /// Macs of one kind, or of four kinds in turn.
    pub(crate) fn new(count: usize, unequal: bool, load: Option<f64>, kv_share: Option<f64>) -> Self {
        let kinds: &[(f64, f64)] = if unequal { &UNEQUAL } else { &EQUAL };
        let nodes = kinds.iter().cycle().take(count).map(|&(prefill_tokens_per_s, longer)| NodeSpec {
            prefill_tokens_per_s,
            decode_step_s: 0.010 * longer,
            decode_row_s: 0.0005 * longer,
            slots: SLOTS,
        });
        Self { nodes: nodes.collect(), load, kv_share }
    }

    /// Blocks of KV of each node: at least what the largest request needs.
    pub(crate) fn node_blocks(&self, workload: &Workload) -> usize {
        let brought = || {
            let blocks: FxHashSet<_> = workload.requests.iter().flat_map(|request| &request.hashes).collect();
            blocks.len() as f64
        };
        let tokens = workload.requests.iter().map(|request| request.prompt_tokens + request.output_tokens);
        let least = tokens.max().unwrap_or(0) as usize / BLOCK_TOKENS + 1;
        let blocks = match (self.kv_share, workload.node_kv_tokens) {
            (Some(share), _) => (brought() * share) as usize,
            (None, Some(tokens)) => tokens / BLOCK_TOKENS,
            (None, None) => (brought() / self.nodes.len() as f64) as usize,
        };
        blocks.max(least)
    }

    /// The requests with the seconds at which they arrive, in that order.
    pub(crate) fn arrivals(&self, workload: &Workload) -> (Vec<f64>, Vec<Request>) {
        let requests = &workload.requests;
        let last_s = requests.iter().map(|request| request.start_s).fold(0.0, f64::max);
        let stretch = self.load.map_or(1.0, |load| {
            let blocks = requests.iter().map(|one| one.hashes.len() + one.output_hashes.len()).sum();
            let unread = uncached(requests, blocks);
            // All requests on one node take so long; together the nodes do what each does in its time.
            let alone_s = |node: &NodeSpec| -> f64 {
                let row_s = node.step_s(ROWS_USUAL) / ROWS_USUAL as f64;
                let each = requests.iter().zip(&unread).map(|(request, &unread)| {
                    let before = request.prompt_tokens as usize - unread;
                    node.read_s(before, unread) + row_s * f64::from(request.output_tokens)
                });
                each.sum()
            };
            let rate: f64 = self.nodes.iter().map(|node| 1.0 / alone_s(node)).sum();
            1.0 / (rate * load) / last_s.max(1e-9)
        });
        let mut order: Vec<(f64, &Request)> =
            requests.iter().map(|request| (request.start_s * stretch + request.offset_s, request)).collect();
        order.sort_by(|one, other| one.0.total_cmp(&other.0));
        order.into_iter().map(|(at_s, request)| (at_s, request.clone())).unzip()
    }
}

/// Tokens of each prompt that one cache of so many blocks would not have, were each prompt read at once.
pub(crate) fn uncached(requests: &[Request], blocks: usize) -> Vec<usize> {
    let mut cache = Cache::new(blocks);
    let uncached = requests.iter().map(|request| {
        let prompt = request.prompt_tokens as usize;
        let reusable = request.hashes.len().min((prompt - 1) / BLOCK_TOKENS);
        let matched = cache.matched(&request.hashes[..reusable]);
        let chain: Vec<_> = request.hashes.iter().chain(&request.output_hashes).copied().collect();
        cache.take(&chain[..matched], chain.len() - matched, 0.0);
        chain[matched..].iter().for_each(|hash| cache.store(*hash));
        cache.release(&chain, 0, 0.0);
        prompt - matched * BLOCK_TOKENS
    });
    uncached.collect()
}
