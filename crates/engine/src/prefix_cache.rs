//! [`PrefixCache`]: the full blocks whose KV is worth keeping, found by the hash of all their tokens.
//!
//! It is a forest: a block's parent is the block before it, and a block is cached only while its parent is. Whoever uses
//! a block therefore uses all blocks before it, the cached ones of a chain are always its first ones (so that binary
//! search finds how many), and whatever nobody uses can be evicted, leaves first. The cache does not own blocks: for each
//! of its own, whoever fills it keeps a reference in the [`crate::block_pool::BlockPool`].

use crate::BlockId;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};
use types::{BlockHash, CacheEvent};

/// Ages are told to within this.
const MARK_INTERVAL: Duration = Duration::from_secs(1);
/// Marks kept: what was not used for longer than these span counts as that old.
const MARKS_MAX: usize = 4096;
/// Weight of one more use in the mean time between uses: the last few dozen count.
const REUSE_WEIGHT: f64 = 1.0 / 32.0;

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
    /// When ticks were: one each [`MARK_INTERVAL`], oldest first.
    marks: VecDeque<(u64, Instant)>,
    /// Mean seconds until blocks that nobody used were used again.
    reuse_s: Option<f64>,
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
        let unused = chain.last().and_then(|hash| self.nodes.get(hash)).filter(|node| node.users == 0);
        if let Some((node, &(_, now))) = unused.zip(self.marks.back()) {
            let age_s = self.age(node.used, now).as_secs_f64();
            let mean = self.reuse_s.get_or_insert(age_s);
            *mean += (age_s - *mean) * REUSE_WEIGHT;
        }
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

    /// It is `now`: what is used from here on is used at `now` or later.
    pub(crate) fn mark(&mut self, now: Instant) {
        if self.marks.back().is_some_and(|&(_, at)| now.saturating_duration_since(at) < MARK_INTERVAL) {
            return;
        }
        if self.marks.len() >= MARKS_MAX {
            self.marks.pop_front();
        }
        self.marks.push_back((self.tick, now));
    }

    /// Time since the last use of the block that would be evicted next.
    pub(crate) fn tail_age(&self, now: Instant) -> Option<Duration> {
        self.leaves.first().map(|&(used, ..)| self.age(used, now))
    }

    /// Mean time until blocks that nobody used were used again, in seconds.
    pub(crate) fn reuse_s(&self) -> Option<f64> {
        self.reuse_s
    }

    /// Time since a tick.
    fn age(&self, tick: u64, now: Instant) -> Duration {
        let before = self.marks.partition_point(|&(marked, _)| marked < tick).saturating_sub(1);
        self.marks.get(before).map_or(Duration::ZERO, |&(_, at)| now.saturating_duration_since(at))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_those_of_the_last_use() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let (root, one, two) = (BlockHash(0), BlockHash(1), BlockHash(2));
        let mut cache = PrefixCache::default();
        cache.mark(at(0));
        assert_eq!(cache.tail_age(at(5)), None, "nothing is cached");
        cache.acquire(&[]);
        cache.store(root, one, BlockId(0));
        assert_eq!(cache.tail_age(at(5)), None, "what is used is not evicted");
        cache.release(&[one]);
        assert_eq!(cache.tail_age(at(5)), Some(Duration::from_secs(5)));
        cache.mark(at(10));
        cache.acquire(&[]);
        cache.store(root, two, BlockId(1));
        cache.release(&[two]);
        assert_eq!((cache.tail_age(at(30)), cache.reuse_s()), (Some(Duration::from_secs(30)), None));
        cache.mark(at(30));
        cache.acquire(&[one]);
        assert_eq!(cache.tail_age(at(30)), Some(Duration::from_secs(20)), "the other one's");
        cache.release(&[one]);
        assert_eq!(cache.reuse_s(), Some(30.0));
    }
}
