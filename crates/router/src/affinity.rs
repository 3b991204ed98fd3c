//! What this router sent where: block hash → the few engines that were last given that block.
//!
//! An engine is named by an [`EngineEpoch`]; a restarted engine gets a new one, so everything recorded of the old one
//! stops matching at once and ages out. Bounded by two generations: when the young one is full it becomes the old one
//! and the former old one is dropped, so that whatever was used lately stays, at the cost of one hash map move.

use std::collections::HashMap;
use types::BlockHash;

/// One life of one node's engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct EngineEpoch(pub(crate) u32);

/// Blocks of each of the two generations: together 16 million tokens of distinct prefixes, about 40 MB.
pub(crate) const GENERATION_BLOCKS_MAX: usize = 1 << 18;
/// Engines remembered for one block; a prefix on more of them is everywhere.
const HOLDERS_MAX: usize = 8;

/// Newest first; free places are at the end.
type Holders = [Option<EngineEpoch>; HOLDERS_MAX];

#[derive(Debug)]
pub(crate) struct AffinityRecord {
    young: HashMap<BlockHash, Holders>,
    old: HashMap<BlockHash, Holders>,
    generation_blocks_max: usize,
}

impl AffinityRecord {
    pub(crate) fn new(generation_blocks_max: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), generation_blocks_max }
    }

    /// `engine` was sent a prompt of these blocks.
    pub(crate) fn record(&mut self, engine: EngineEpoch, hashes: &[BlockHash]) {
        // From the end, so that the head of a chain is always at least as recent as its tail.
        for &hash in hashes.iter().rev() {
            if self.young.len() >= self.generation_blocks_max {
                self.old = std::mem::take(&mut self.young);
            }
            let old = self.old.get(&hash).copied().unwrap_or_default();
            let holders = self.young.entry(hash).or_insert(old);
            let place = holders.iter().position(|holder| *holder == Some(engine)).unwrap_or(HOLDERS_MAX - 1);
            holders[..=place].rotate_right(1);
            holders[0] = Some(engine);
        }
    }

    /// Leading blocks of `hashes` that each recorded engine was given, as (engine, blocks), in order of engine.
    pub(crate) fn matches(&self, hashes: &[BlockHash]) -> Vec<(EngineEpoch, usize)> {
        let mut found: Vec<(EngineEpoch, usize)> = Vec::new();
        for (index, hash) in hashes.iter().enumerate() {
            let Some(holders) = self.young.get(hash).or_else(|| self.old.get(hash)) else { break };
            for engine in holders.iter().flatten() {
                // A block names its whole prefix: who was given it was given all blocks before it.
                match found.iter_mut().find(|(known, _)| known == engine) {
                    Some((_, blocks)) => *blocks = index + 1,
                    None => found.push((*engine, index + 1)),
                }
            }
        }
        found.sort_unstable();
        found
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::block_hashes;

    fn chain(first: u32, blocks: usize) -> Vec<BlockHash> {
        let mut tokens = vec![0; blocks * types::BLOCK_TOKENS];
        tokens[0] = first;
        block_hashes(BlockHash(1), &tokens)
    }

    #[test]
    fn longest_prefix_of_each_engine() {
        let mut record = AffinityRecord::new(100);
        let hashes = chain(1, 6);
        record.record(EngineEpoch(2), &hashes[..4]);
        record.record(EngineEpoch(1), &hashes[..2]);
        assert_eq!(record.matches(&hashes), [(EngineEpoch(1), 2), (EngineEpoch(2), 4)]);
        assert_eq!(record.matches(&chain(2, 6)), []);
        for engine in 10..30 {
            record.record(EngineEpoch(engine), &hashes[..1]);
        }
        assert!(record.matches(&hashes).contains(&(EngineEpoch(2), 4)), "deeper blocks still name it");
    }

    #[test]
    fn bounded_and_the_used_ones_stay() {
        let mut record = AffinityRecord::new(50);
        let kept = chain(0, 3);
        for first in 1..200 {
            record.record(EngineEpoch(1), &kept);
            record.record(EngineEpoch(1), &chain(first, 3));
            assert!(record.len() <= 100);
            assert_eq!(record.matches(&kept), [(EngineEpoch(1), 3)]);
        }
        assert_eq!(record.matches(&chain(1, 3)), [], "unused ones age out");
    }
}
