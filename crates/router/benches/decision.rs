//! How long a decision takes: 1,000 nodes with 1,000 blocks each, a prompt of 8,192 tokens of which one node has nearly all,
//! ten half, and all the beginning. Criterion's figures are means; the 99th percentile is printed after them.
#![expect(clippy::print_stdout, reason = "what the program prints is its result")]

use criterion::{Criterion, criterion_group, criterion_main};
use router::{RouteQuery, Router, RouterSettings};
use std::hint::black_box;
use std::time::{Duration, Instant};
use types::{
    AssetsHash, BlockHash, CacheSnapshot, EngineState, ModelCard, NodeId, NodeLoad, NodeRates, Priority,
    TokenId, block_hashes,
};

const NODES: u32 = 1000;
const PROMPT_TOKENS: u32 = 8192;
/// Decisions of which the 99th percentile is taken.
const DECISIONS: usize = 20_000;

fn card() -> ModelCard {
    ModelCard {
        name: "model".to_owned(),
        root: BlockHash(7),
        context_tokens: 1 << 17,
        vocab_size: 1000,
        eos_tokens: vec![0],
        assets: AssetsHash([0; 32]),
        created_s: 0,
        kind: types::ModelKind::Generator,
    }
}

fn load(index: u32) -> NodeLoad {
    let rate = 1000.0 + (index % 7) as f32 * 700.0;
    NodeLoad {
        running: index % 13,
        waiting: 0,
        slots: 32,
        prefill_backlog_tokens: u64::from(index % 5) * 500,
        decode_backlog_tokens: u64::from(index % 13) * 100,
        kv_tokens: (u64::from(index % 13) * 2000, 131_072),
        cached_kv_tokens: 100_000,
        prefill_backlog_s: (index % 5) as f32 * 500.0 / rate,
        prefill_budget_tokens: 0,
        decode_step_s: std::array::from_fn(|at| 0.01 + at as f32 * 0.001),
        cache_tail_age_s: 300.0,
        cache_reuse_s: 60.0,
        passes: 0,
        step_s: 0.0,
        drafts: Default::default(),
        rates: NodeRates { prefill_tokens_per_s: rate, decode_step_s: 0.01, decode_row_s: 0.001 },
    }
}

fn router(prompt: &[BlockHash], now: Instant) -> Router {
    let mut router = Router::new(RouterSettings::default());
    for index in 0..NODES {
        let node = NodeId(u128::from(index) + 1);
        assert!(router.node_up(node));
        router.state(node, EngineState::Ready, vec![card()]);
        router.load(node, load(index), now);
        router.rtt(node, Duration::from_micros(300));
        let had = match index {
            0 => prompt.len() - 2,
            1..=10 => prompt.len() / 2,
            _ => prompt.len() / 8,
        };
        let own: Vec<TokenId> = (0..32_000).map(|token| token ^ index << 16).collect();
        let blocks = [&prompt[..had], &block_hashes(BlockHash(7), &own)].concat();
        router.cache_snapshot(node, CacheSnapshot { epoch: 1, seq: 0, blocks }, now);
    }
    router
}

fn decision(criterion: &mut Criterion) {
    let tokens: Vec<TokenId> = (0..PROMPT_TOKENS).map(|token| token * 7).collect();
    let hashes = block_hashes(BlockHash(7), &tokens);
    let now = Instant::now();
    let router = router(&hashes, now);
    let query = RouteQuery {
        model: "model",
        hashes: &hashes,
        prompt_tokens: PROMPT_TOKENS,
        max_tokens: 512,
        exclude: &[],
        session: Some(1),
        priority: Priority::Normal,
    };
    assert_eq!(router.route(&query, now).map(|route| route.node), Ok(NodeId(1)));
    criterion.bench_function("route, 1000 nodes, 8192 tokens", |bench| {
        bench.iter(|| router.route(black_box(&query), now));
    });
    criterion.bench_function("hashes of 8192 tokens", |bench| {
        bench.iter(|| block_hashes(BlockHash(7), black_box(&tokens)));
    });
    let mut times: Vec<Duration> = (0..DECISIONS)
        .map(|_| {
            let start = Instant::now();
            let _ = black_box(router.route(black_box(&query), now));
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    let at = |share: f64| times[(DECISIONS as f64 * share) as usize];
    println!("route, 1000 nodes, 8192 tokens: p50 {:?}, p99 {:?}, of {DECISIONS}", at(0.5), at(0.99));
}

criterion_group!(benches, decision);
criterion_main!(benches);
