//! [`Cache`]: a node's KV in blocks, cached prefixes evicted by last use.
//!
//! Whoever lets go of a chain touches its last block first, and whoever uses a block uses those before it, so the least
//! recently used block without users never has children that are cached.

use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use std::collections::hash_map::Entry::{Occupied, Vacant};
use types::BlockHash;

/// Blocks in the queue that have been used again, beside as many as there are unused ones, before they are taken out.
const QUEUE_SLACK: usize = 1024;

#[derive(Debug)]
struct Entry {
    users: u32,
    /// When it was let go of last; 0 while it is used.
    used: u64,
    used_at_s: f64,
}

/// One node's blocks.
#[derive(Debug)]
pub(crate) struct Cache {
    total: usize,
    entries: FxHashMap<BlockHash, Entry>,
    /// By last use, with when that was: those without users, and some that have been used again since.
    queue: VecDeque<(u64, BlockHash)>,
    /// How many have no users.
    unused: usize,
    /// Blocks in use that are not cached.
    anonymous: usize,
    tick: u64,
    /// Mean seconds until unused blocks were used again.
    reuse_s: f64,
    stored: Vec<BlockHash>,
    removed: Vec<BlockHash>,
}

impl Cache {
    pub(crate) fn new(total: usize) -> Self {
        Self {
            total,
            entries: FxHashMap::default(),
            queue: VecDeque::new(),
            unused: 0,
            anonymous: 0,
            tick: 0,
            reuse_s: 0.0,
            stored: Vec::new(),
            removed: Vec::new(),
        }
    }

    /// Leading blocks that are cached.
    pub(crate) fn matched(&self, hashes: &[BlockHash]) -> usize {
        hashes.partition_point(|hash| self.entries.contains_key(hash))
    }

    /// Whether so many blocks could be had beside using `hashes`, which are cached.
    pub(crate) fn fits(&self, hashes: &[BlockHash], blocks: usize) -> bool {
        let unused = hashes.iter().filter(|hash| self.entries[hash].users == 0).count();
        self.in_use() + unused + blocks <= self.total
    }

    /// Uses cached blocks and takes others.
    pub(crate) fn take(&mut self, hashes: &[BlockHash], blocks: usize, now_s: f64) {
        if let Some(entry) = hashes.last().map(|hash| &self.entries[hash]).filter(|entry| entry.users == 0) {
            let age_s = now_s - entry.used_at_s;
            let weight = if self.reuse_s == 0.0 { 1.0 } else { 1.0 / 32.0 };
            self.reuse_s += (age_s - self.reuse_s) * weight;
        }
        for hash in hashes {
            self.use_block(*hash);
        }
        self.anonymous += blocks;
        while self.entries.len() + self.anonymous > self.total {
            let Some((tick, hash)) = self.queue.pop_front() else { break };
            if self.is_unused(tick, hash) {
                self.unused -= 1;
                self.entries.remove(&hash);
                self.removed.push(hash);
            }
        }
    }

    /// A block that was taken is full: it is cached, and used.
    pub(crate) fn store(&mut self, hash: BlockHash) {
        self.anonymous -= 1;
        match self.entries.entry(hash) {
            Occupied(_) => self.use_block(hash),
            Vacant(place) => {
                place.insert(Entry { users: 1, used: 0, used_at_s: 0.0 });
                self.stored.push(hash);
            }
        }
    }

    /// A chain is used no more, and other blocks neither.
    pub(crate) fn release(&mut self, hashes: &[BlockHash], blocks: usize, now_s: f64) {
        self.anonymous -= blocks;
        for hash in hashes.iter().rev() {
            let Some(entry) = self.entries.get_mut(hash) else { continue };
            entry.users -= 1;
            entry.used_at_s = now_s;
            if entry.users == 0 {
                self.tick += 1;
                entry.used = self.tick;
                self.unused += 1;
                self.queue.push_back((self.tick, *hash));
            }
        }
        if self.queue.len() > 2 * self.unused + QUEUE_SLACK {
            let queue = std::mem::take(&mut self.queue);
            self.queue = queue.into_iter().filter(|&(tick, hash)| self.is_unused(tick, hash)).collect();
        }
    }

    /// Blocks that sequences hold.
    pub(crate) fn in_use(&self) -> usize {
        self.entries.len() - self.unused + self.anonymous
    }

    pub(crate) fn cached(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// Seconds since the next one to be evicted was used; 0 where there is none.
    pub(crate) fn tail_age_s(&mut self, now_s: f64) -> f64 {
        while let Some(&(tick, hash)) = self.queue.front() {
            if self.is_unused(tick, hash) {
                return now_s - self.entries[&hash].used_at_s;
            }
            self.queue.pop_front();
        }
        0.0
    }

    /// Mean seconds until unused blocks were used again; 0 where none was.
    pub(crate) fn reuse_s(&self) -> f64 {
        self.reuse_s
    }

    /// What was stored and what was removed since the last call; what was both is in neither.
    pub(crate) fn take_events(&mut self) -> (Vec<BlockHash>, Vec<BlockHash>) {
        let (mut stored, mut removed) = (std::mem::take(&mut self.stored), std::mem::take(&mut self.removed));
        stored.retain(|hash| self.entries.contains_key(hash));
        removed.retain(|hash| !self.entries.contains_key(hash));
        (stored, removed)
    }

    /// Whether the block is still as it was when it was let go of then.
    fn is_unused(&self, tick: u64, hash: BlockHash) -> bool {
        self.entries.get(&hash).is_some_and(|entry| entry.used == tick)
    }

    fn use_block(&mut self, hash: BlockHash) {
        let Some(entry) = self.entries.get_mut(&hash) else { return };
        if entry.users == 0 {
            entry.used = 0;
            self.unused -= 1;
        }
        entry.users += 1;
    }
}
