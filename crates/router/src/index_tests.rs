//! The index against a map that is too simple to be wrong.

use super::*;
use proptest::{collection::vec, prelude::*};
use std::collections::{BTreeMap, BTreeSet};

/// Chains of blocks, each a branch of one tree: those of the same stem begin alike.
const CHAINS: u8 = 6;
const CHAIN_BLOCKS: usize = 24;
/// Nodes at once: more than are kept in a list.
const NODES: u8 = 14;

#[derive(Debug, Clone)]
enum Step {
    /// A node caches so many leading blocks of a chain.
    Store(u8, u8, usize),
    /// It evicts the blocks of a chain from there on.
    Remove(u8, u8, usize),
    /// It tells that it holds exactly so much of two chains.
    Replace(u8, (u8, usize), (u8, usize)),
    /// It is gone, and another one is there.
    Restart(u8),
    /// Others have something to tell: what was left is forgotten bit by bit.
    Touch(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let (node, chain, blocks) = (0..NODES, 0..CHAINS, 0..=CHAIN_BLOCKS);
    let part = (chain.clone(), blocks.clone());
    prop_oneof![
        8 => (node.clone(), part.clone()).prop_map(|(node, (chain, blocks))| Step::Store(node, chain, blocks)),
        4 => (node.clone(), part.clone()).prop_map(|(node, (chain, blocks))| Step::Remove(node, chain, blocks)),
        1 => (node.clone(), part.clone(), part).prop_map(|(node, one, other)| Step::Replace(node, one, other)),
        1 => node.clone().prop_map(Step::Restart),
        1 => node.prop_map(Step::Touch),
    ]
}

/// A chain's blocks: the first half is that of all chains with the same parity.
fn chain(chain: u8) -> Vec<BlockHash> {
    let block = |at: usize| {
        let branch = if at < CHAIN_BLOCKS / 2 { chain % 2 } else { chain };
        let low = (u128::from(branch) * 1000 + at as u128 + 1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        BlockHash(low)
    };
    (0..CHAIN_BLOCKS).map(block).collect()
}

/// Blocks of each node, as sets.
#[derive(Default)]
struct Naive(BTreeMap<u8, BTreeSet<u64>>);

impl Naive {
    fn matched(&self, node: u8, hashes: &[BlockHash]) -> usize {
        let held = &self.0[&node];
        hashes.iter().take_while(|&&hash| held.contains(&key(hash))).count()
    }

    /// What an engine evicts when it needs that block's place: the block and all behind it, in whichever chain.
    fn evicted(&self, node: u8, chains: &[Vec<BlockHash>], at: (u8, usize)) -> Vec<BlockHash> {
        let Some(&first) = chains[usize::from(at.0)].get(at.1) else { return Vec::new() };
        let behind = chains.iter().filter_map(|chain| {
            let from = chain.iter().position(|&block| block == first)?;
            Some(&chain[from..])
        });
        let held = &self.0[&node];
        let gone: BTreeSet<BlockHash> =
            behind.flatten().copied().filter(|&block| held.contains(&key(block))).collect();
        gone.into_iter().collect()
    }
}

proptest! {
    #[test]
    fn matches_are_those_of_a_naive_map(steps in vec(step(), 1..160), asked in vec((0..CHAINS, 0..=CHAIN_BLOCKS), 1..4)) {
        let chains: Vec<Vec<BlockHash>> = (0..CHAINS).map(chain).collect();
        let (mut index, mut naive) = (CacheIndex::default(), Naive::default());
        let mut slots: Vec<Slot> = (0..NODES).map(|_| index.open().expect("free slots")).collect();
        naive.0 = (0..NODES).map(|node| (node, BTreeSet::new())).collect();
        for step in steps {
            match step {
                Step::Store(node, chain, blocks) => {
                    let blocks = &chains[usize::from(chain)][..blocks];
                    index.store(slots[usize::from(node)], blocks);
                    naive.0.entry(node).or_default().extend(blocks.iter().map(|&hash| key(hash)));
                }
                Step::Remove(node, chain, from) => {
                    let gone = naive.evicted(node, &chains, (chain, from));
                    index.remove(slots[usize::from(node)], &gone);
                    let held = naive.0.entry(node).or_default();
                    gone.iter().for_each(|&hash| _ = held.remove(&key(hash)));
                }
                Step::Replace(node, one, other) => {
                    let part = |(chain, blocks): (u8, usize)| &chains[usize::from(chain)][..blocks];
                    let all = [part(one), part(other)].concat();
                    index.replace(slots[usize::from(node)], &all);
                    naive.0.insert(node, all.iter().map(|&hash| key(hash)).collect());
                }
                Step::Restart(node) => {
                    index.close(slots[usize::from(node)]);
                    slots[usize::from(node)] = index.open().expect("free slots");
                    naive.0.insert(node, BTreeSet::new());
                }
                Step::Touch(node) => index.store(slots[usize::from(node)], &[]),
            }
            for &(chain, blocks) in &asked {
                let hashes = &chains[usize::from(chain)][..blocks];
                let matches = index.matches(hashes);
                for node in 0..NODES {
                    let (got, expected) = (matches.blocks(slots[usize::from(node)]), naive.matched(node, hashes));
                    prop_assert_eq!(got, expected, "node {}, {} blocks of chain {}", node, blocks, chain);
                }
            }
            for (node, held) in &naive.0 {
                prop_assert_eq!(index.blocks(slots[usize::from(*node)]), held.len());
            }
        }
        // Nothing is left over of anybody.
        for &slot in &slots {
            index.close(slot);
        }
        while !index.left.is_empty() {
            index.forget();
        }
        prop_assert_eq!(index.held(), 0);
        prop_assert!(index.shards.iter().all(FxHashMap::is_empty));
        prop_assert_eq!(index.few.free.len(), index.few.all.len());
        prop_assert_eq!(index.many.free.len(), index.many.all.len());
    }
}
