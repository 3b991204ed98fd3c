//! [`PrefixCache`]: the full blocks whose KV is worth keeping, found by the hash of all their tokens.
//!
//! It is a forest: a block's parent is the block before it, and a block is cached only while its parent is. Whoever uses
//! a block therefore uses all blocks before it, the cached ones of a chain are always its first ones (so that binary
//! search finds how many), and whatever nobody uses can be evicted, leaves first. The cache does not own blocks: for each
//! of its own, whoever fills it keeps a reference in the [`crate::block_pool::BlockPool`].

use crate::BlockId;
use std::collections::{BTreeMap, BTreeSet};
use types::{BlockHash, CacheEvent};

#[derive(Debug)]
struct Node {
    block: BlockId,
    /// The block before, or a chain's root.
    parent: BlockHash,
    /// Cached blocks whose parent it is.
    children: u32,
    /// Sequences that hold it.
    users: u32,
    /// Sessions that keep it.
    pins: u32,
    /// When it was used last; never less than that of a child that nobody uses.
    used: u64,
    /// Grows with each block stored: a parent's is less than its children's.
    number: u64,
    /// Whether those who listen know of it.
    told: bool,
}

impl Node {
    fn evictable_next(&self) -> bool {
        self.children == 0 && self.users == 0 && self.pins == 0
    }
}

/// The cached blocks.
#[derive(Debug, Default)]
pub(crate) struct PrefixCache {
    nodes: BTreeMap<BlockHash, Node>,
    /// Leaves that nobody uses or pins: last use, number, hash. The first is evicted next.
    leaves: BTreeSet<(u64, u64, BlockHash)>,
    /// Blocks without users.
    unused: usize,
    /// Blocks with pins.
    pinned: usize,
    tick: u64,
    stored: u64,
    /// Blocks stored since events were taken, by number.
    untold: BTreeMap<u64, BlockHash>,
    /// Blocks removed since, of those that were told.
    removed: BTreeSet<BlockHash>,
}

impl PrefixCache {
    /// How many of a chain's blocks are cached: its first ones.
    pub(crate) fn matched(&self, chain: &[BlockHash]) -> usize {
        chain.partition_point(|hash| self.nodes.contains_key(hash))
    }

    /// How many of a chain's blocks somebody uses: its first ones.
    pub(crate) fn in_use(&self, chain: &[BlockHash]) -> usize {
        chain.partition_point(|hash| self.nodes.get(hash).is_some_and(|node| node.users > 0))
    }

    /// Whether it is cached.
    pub(crate) fn contains(&self, hash: BlockHash) -> bool {
        self.nodes.contains_key(&hash)
    }

    /// A new user of cached blocks, given with all that come before them; returns where they are.
    pub(crate) fn acquire(&mut self, chain: &[BlockHash]) -> Vec<BlockId> {
        self.tick += 1;
        let tick = self.tick;
        let blocks = chain.iter().map(|&hash| {
            self.update(hash, |node| {
                node.users += 1;
                node.used = tick;
                node.block
            })
        });
        blocks.collect()
    }

    /// A user of these blocks less.
    pub(crate) fn release(&mut self, chain: &[BlockHash]) {
        self.tick += 1;
        let tick = self.tick;
        for &hash in chain {
            self.update(hash, |node| {
                node.users -= 1;
                node.used = tick;
            });
        }
    }

    /// Caches a block that is not cached, with the sequence that brings it as its user. Its parent is cached, or a root.
    pub(crate) fn store(&mut self, parent: BlockHash, hash: BlockHash, block: BlockId) {
        if self.nodes.contains_key(&parent) {
            self.update(parent, |node| node.children += 1);
        }
        let (number, told) = (self.stored, self.removed.remove(&hash));
        self.stored += 1;
        if !told {
            self.untold.insert(number, hash);
        }
        let node = Node { block, parent, children: 0, users: 1, pins: 0, used: self.tick, number, told };
        let before = self.nodes.insert(hash, node);
        assert!(before.is_none(), "{hash:?} was cached already");
    }

    /// Removes the longest unused leaf that no session keeps, if there is one.
    pub(crate) fn evict(&mut self) -> Option<BlockId> {
        let (_, number, hash) = self.leaves.pop_first()?;
        let node = self.nodes.remove(&hash).expect("leaves are cached");
        self.unused -= 1;
        if self.nodes.contains_key(&node.parent) {
            self.update(node.parent, |parent| parent.children -= 1);
        }
        if node.told {
            self.removed.insert(hash);
        } else {
            self.untold.remove(&number);
        }
        Some(node.block)
    }

    /// Whether [`Self::evict`] would find one.
    pub(crate) fn can_evict(&self) -> bool {
        !self.leaves.is_empty()
    }

    /// A session keeps these blocks.
    pub(crate) fn pin(&mut self, chain: &[BlockHash]) {
        for &hash in chain {
            self.update(hash, |node| node.pins += 1);
        }
    }

    /// A session keeps these blocks no longer.
    pub(crate) fn unpin(&mut self, chain: &[BlockHash]) {
        for &hash in chain {
            self.update(hash, |node| node.pins -= 1);
        }
    }

    /// Cached blocks.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Cached blocks that nobody uses. All of them can be evicted, some only after their sessions have lost them.
    pub(crate) fn unused(&self) -> usize {
        self.unused
    }

    /// Cached blocks that sessions keep, each counted once.
    pub(crate) fn pinned(&self) -> usize {
        self.pinned
    }

    /// What changed since the last call: what was there then and is not now, then what is new, parents first. What came
    /// and went in between is left out, so that this is never more than the blocks that there are, twice.
    pub(crate) fn take_events(&mut self) -> Vec<CacheEvent> {
        let mut events = Vec::new();
        if !self.removed.is_empty() {
            let blocks = std::mem::take(&mut self.removed).into_iter().collect();
            events.push(CacheEvent::Removed { blocks });
        }
        let untold = std::mem::take(&mut self.untold);
        for hash in untold.values() {
            self.nodes.get_mut(hash).expect("what is to be told is cached").told = true;
        }
        events.extend(self.stored_events(untold.into_values()));
        events
    }

    /// Everything, parents first.
    pub(crate) fn snapshot(&self) -> Vec<CacheEvent> {
        let by_number: BTreeMap<u64, BlockHash> =
            self.nodes.iter().map(|(&hash, node)| (node.number, hash)).collect();
        self.stored_events(by_number.into_values())
    }

    /// Blocks and where they are, by hash.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (BlockHash, BlockId)> {
        self.nodes.iter().map(|(&hash, node)| (hash, node.block))
    }

    /// Asserts what must always hold, given how often each block is used and pinned.
    pub(crate) fn check(&self, users: &BTreeMap<BlockHash, u32>, pins: &BTreeMap<BlockHash, u32>) {
        let mut children = BTreeMap::<BlockHash, u32>::new();
        for (hash, node) in &self.nodes {
            *children.entry(node.parent).or_default() += 1;
            if let Some(parent) = self.nodes.get(&node.parent) {
                assert!(parent.users >= node.users, "{hash:?} is used without its parent");
                let used = node.users > 0 || parent.used >= node.used;
                assert!(used && parent.number < node.number, "{hash:?} and its parent");
            }
        }
        for (hash, node) in &self.nodes {
            let counts = (node.users, node.pins, node.children);
            let count = |of: &BTreeMap<BlockHash, u32>| of.get(hash).copied().unwrap_or(0);
            assert_eq!(
                counts,
                (count(users), count(pins), count(&children)),
                "users, pins, children of {hash:?}"
            );
            let leaf = self.leaves.contains(&(node.used, node.number, *hash));
            assert_eq!(leaf, node.evictable_next(), "{hash:?} among the leaves");
        }
        let cached = |(hash, _): (&BlockHash, &u32)| assert!(self.contains(*hash), "{hash:?} is not cached");
        users.iter().chain(pins).for_each(cached);
        let count = |wanted: fn(&Node) -> bool| self.nodes.values().filter(|node| wanted(node)).count();
        assert_eq!(self.leaves.len(), count(Node::evictable_next), "leaves");
        assert_eq!(self.unused, count(|node| node.users == 0), "blocks without users");
        assert_eq!(self.pinned, count(|node| node.pins > 0), "pinned blocks");
        assert_eq!(self.untold.len(), count(|node| !node.told), "blocks to be told of");
    }

    fn stored_events(&self, hashes: impl Iterator<Item = BlockHash>) -> Vec<CacheEvent> {
        let mut chains: Vec<(BlockHash, Vec<BlockHash>)> = Vec::new();
        // By a chain's last block: where it is.
        let mut ends = BTreeMap::<BlockHash, usize>::new();
        for hash in hashes {
            let parent = self.nodes[&hash].parent;
            let index = ends.remove(&parent).unwrap_or(chains.len());
            match chains.get_mut(index) {
                Some((_, blocks)) => blocks.push(hash),
                None => chains.push((parent, vec![hash])),
            }
            ends.insert(hash, index);
        }
        chains.into_iter().map(|(parent, blocks)| CacheEvent::Stored { parent, blocks }).collect()
    }

    /// Changes a cached block; the only place where counts and leaves follow.
    fn update<T>(&mut self, hash: BlockHash, change: impl FnOnce(&mut Node) -> T) -> T {
        let node = self.nodes.get_mut(&hash).unwrap_or_else(|| panic!("{hash:?} is not cached"));
        let before = (node.evictable_next(), node.users == 0, node.pins > 0, node.used);
        let result = change(node);
        let after = (node.evictable_next(), node.users == 0, node.pins > 0, node.used);
        if before != after {
            if before.0 {
                self.leaves.remove(&(before.3, node.number, hash));
            }
            if after.0 {
                self.leaves.insert((after.3, node.number, hash));
            }
            self.unused = self.unused + usize::from(after.1) - usize::from(before.1);
            self.pinned = self.pinned + usize::from(after.2) - usize::from(before.2);
        }
        result
    }
}
