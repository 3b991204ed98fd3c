//! Memory of what is known of 1,000 nodes with 100,000 blocks each, none of which two nodes share: the worst case; and how
//! long a snapshot, an event and the loss of a node take then. Fails where it is more than 4 GiB.
#![expect(clippy::print_stdout, reason = "what the program prints is its result")]

use peak_alloc::PeakAlloc;
use router::{Router, RouterSettings};
use std::time::{Duration, Instant};
use types::{BlockHash, CacheEvent, CacheSnapshot, NodeId};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const NODES: u128 = 1000;
const BLOCKS: u128 = 100_000;
const BYTES_MAX: usize = 4 << 30;

/// Hashes as evenly spread as BLAKE3's.
fn hash(node: u128, block: u128) -> BlockHash {
    let value = (node << 32 | block).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
    BlockHash((value ^ value >> 64).wrapping_mul(0xd1b5_4a32_d192_ed03_9a4c_2f0e_bd0a_c2c9))
}

fn blocks(node: u128) -> Vec<BlockHash> {
    (0..BLOCKS).map(|block| hash(node, block)).collect()
}

fn main() {
    let now = Instant::now();
    let mut router = Router::new(RouterSettings::default());
    let snapshots = (0..NODES).map(|node| {
        assert!(router.node_up(NodeId(node)));
        let snapshot = CacheSnapshot { epoch: 1, seq: 0, blocks: blocks(node) };
        timed(|| router.cache_snapshot(NodeId(node), snapshot, now))
    });
    let snapshot_s = snapshots.max().unwrap_or_default();
    assert_eq!(router.index_blocks() as u128, NODES * BLOCKS, "all are known");
    let held = MEMORY.current_usage();
    let events = (0..1000).map(|index| {
        let (node, block) = (index % NODES, BLOCKS + index);
        let events = [
            CacheEvent::Removed { blocks: vec![hash(node, index)] },
            CacheEvent::Stored { parent: BlockHash(0), blocks: vec![hash(node, block)] },
        ];
        let seq = (index / NODES * 2) as u64;
        timed(|| router.cache_events(NodeId(node), 1, seq, &events, now).expect("no gap"))
    });
    let event = events.max().unwrap_or_default();
    let loss = timed(|| router.node_down(NodeId(0)));
    assert_eq!(router.cached_blocks(NodeId(0)), 0, "forgotten at once");
    println!(
        "{NODES} nodes with {BLOCKS} blocks: {:.2} GiB, at most {:.2} GiB; slowest of each: snapshot {snapshot_s:?}, \
         two events {event:?}, loss of a node {loss:?}",
        gib(held),
        gib(MEMORY.peak_usage())
    );
    assert!(MEMORY.peak_usage() <= BYTES_MAX, "more than {} GiB", gib(BYTES_MAX));
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}
