//! What a router believes of caches, by what nodes tell.

use router::{RouteQuery, Router, RouterSettings};
use std::time::Instant;
use types::{
    AssetsHash, BLOCK_TOKENS, BlockHash, CacheEvent, CacheSnapshot, EngineState, ModelCard, NodeId, Priority,
    TokenId, block_hashes,
};

const NODE: NodeId = NodeId(1);
const ROOT: BlockHash = BlockHash(9);
const BLOCKS: usize = 10;

struct Case {
    router: Router,
    now: Instant,
    chain: Vec<BlockHash>,
}

impl Case {
    fn new() -> Self {
        let mut router = Router::new(RouterSettings::default());
        let tokens: Vec<TokenId> = (0..(BLOCKS * BLOCK_TOKENS) as u32).collect();
        router.node_up(NODE);
        Self::ready(&mut router);
        Self { router, now: Instant::now(), chain: block_hashes(ROOT, &tokens) }
    }

    fn ready(router: &mut Router) {
        let card = ModelCard {
            name: "m".to_owned(),
            root: ROOT,
            context_tokens: 10_000,
            vocab_size: 10_000,
            eos_tokens: Vec::new(),
            assets: AssetsHash([0; 32]),
            created_s: 0,
            kind: types::ModelKind::Generator,
        };
        router.state(NODE, EngineState::Ready, vec![card]);
    }

    fn snapshot(&self, epoch: u64, seq: u64, blocks: std::ops::Range<usize>) -> CacheSnapshot {
        CacheSnapshot { epoch, seq, blocks: self.chain[blocks].to_vec() }
    }

    fn stored(&self, blocks: std::ops::Range<usize>) -> CacheEvent {
        let parent = blocks.start.checked_sub(1).map_or(ROOT, |before| self.chain[before]);
        CacheEvent::Stored { parent, blocks: self.chain[blocks].to_vec() }
    }

    fn events(&mut self, epoch: u64, first_seq: u64, events: &[CacheEvent]) -> bool {
        self.router.cache_events(NODE, epoch, first_seq, events, self.now).is_ok()
    }

    /// Blocks of the chain that the node is expected to have.
    fn matched(&self) -> usize {
        let query = RouteQuery {
            model: "m",
            hashes: &self.chain,
            prompt_tokens: (BLOCKS * BLOCK_TOKENS + 1) as u32,
            max_tokens: 10,
            exclude: &[],
            session: None,
            priority: Priority::Normal,
        };
        self.router.explain(&query, self.now)[0].matched_tokens as usize / BLOCK_TOKENS
    }
}

#[test]
fn a_snapshot_in_parts_is_one() {
    let mut case = Case::new();
    let [first, second, other] =
        [(7, 0..4), (7, 4..9), (8, 9..10)].map(|(seq, blocks)| case.snapshot(3, seq, blocks));
    case.router.cache_snapshot_more(NODE, &second);
    assert_eq!(case.matched(), 0, "of nothing that was begun");
    case.router.cache_snapshot(NODE, first, case.now);
    assert_eq!(case.matched(), 4);
    case.router.cache_snapshot_more(NODE, &other);
    case.router.cache_snapshot_more(NODE, &second);
    assert_eq!(case.matched(), 9, "and nothing of another");
    let stored = case.stored(9..10);
    assert!(case.events(3, 7, &[stored]));
    assert_eq!(case.matched(), 10);
}

#[test]
fn gaps_and_other_lives_are_noticed() {
    let mut case = Case::new();
    let (early, late) = (case.stored(0..4), case.stored(4..8));
    assert!(!case.events(1, 0, std::slice::from_ref(&early)), "before any snapshot");
    let empty = case.snapshot(1, 0, 0..0);
    case.router.cache_snapshot(NODE, empty, case.now);
    assert!(!case.events(1, 1, std::slice::from_ref(&late)), "one is missing");
    assert!(!case.events(2, 0, std::slice::from_ref(&late)), "of another engine");
    assert_eq!(case.matched(), 0);
    assert!(case.events(1, 0, &[early, late.clone()]));
    assert!(case.events(1, 1, std::slice::from_ref(&late)), "known already");
    assert_eq!(case.matched(), 8);
    let removed = CacheEvent::Removed { blocks: case.chain[6..8].to_vec() };
    assert!(case.events(1, 2, &[removed]));
    assert_eq!(case.matched(), 6);
    // Its engine starts again: nothing is there, and what its former life tells is of no use.
    case.router.state(NODE, EngineState::Restarting("killed".to_owned()), Vec::new());
    Case::ready(&mut case.router);
    assert_eq!(case.matched(), 0);
    assert!(!case.events(1, 3, &[late]));
}
