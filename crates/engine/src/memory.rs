//! [`Memory`]: the KV of all sequences, of the prefix cache and of sessions, as blocks; and [`Held`], a sequence's part.
//!
//! A sequence's full blocks enter the cache once the step that wrote their last token has been collected, and from then on
//! the sequence uses the cached block, be it its own or one that another brought before: two blocks with one content never
//! stay. So whoever uses a block uses the cached ones before it, and all that nobody uses can be had back, by eviction.

use crate::{
    BlockId, EngineSettings,
    block_pool::BlockPool,
    prefix_cache::PrefixCache,
    sessions::{SessionKey, Sessions},
};
use std::{collections::BTreeMap, time::Instant};
use types::{BLOCK_TOKENS, BlockHash, CacheEvent, SessionInfo, TokenId};

/// What a sequence holds.
#[derive(Debug)]
pub(crate) struct Held {
    /// Of its chain; none where nothing is cached.
    root: Option<BlockHash>,
    /// Of the full blocks of its tokens; empty without a root.
    chain: Vec<BlockHash>,
    /// Its block table.
    blocks: Vec<BlockId>,
    /// So many of its first blocks are in the cache, by the hashes of its chain.
    stored: usize,
}

impl Held {
    /// Nothing yet, of these tokens.
    pub(crate) fn new(root: Option<BlockHash>, tokens: &[TokenId]) -> Self {
        let mut held = Self { root, chain: Vec::new(), blocks: Vec::new(), stored: 0 };
        held.extend(tokens);
        held
    }

    /// The block table.
    pub(crate) fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Tokens that fit into its blocks.
    pub(crate) fn room(&self) -> usize {
        self.blocks.len() * BLOCK_TOKENS
    }

    /// The part of its chain that a cache may save it from computing, of `tokens` tokens: not the last token, since the
    /// one after it is to be drawn.
    pub(crate) fn reusable(&self, tokens: usize) -> &[BlockHash] {
        &self.chain[..self.chain.len().min(tokens.saturating_sub(1) / BLOCK_TOKENS)]
    }

    /// Whether, from block `from` on, it has the next `count` blocks of `chain` in its own, not yet in the cache.
    pub(crate) fn leads(&self, chain: &[BlockHash], from: usize, count: usize) -> bool {
        let next = |chain: &[BlockHash]| chain.get(from..from + count).map(<[BlockHash]>::to_vec);
        self.stored <= from && next(chain).is_some_and(|blocks| next(&self.chain) == Some(blocks))
    }

    /// Hashes the blocks that `tokens` filled.
    fn extend(&mut self, tokens: &[TokenId]) {
        let Some(root) = self.root else { return };
        for block in tokens.chunks_exact(BLOCK_TOKENS).skip(self.chain.len()) {
            let parent = self.chain.last().copied().unwrap_or(root);
            self.chain.push(parent.child(block));
        }
    }
}

/// All blocks of a model and everyone who holds them.
#[derive(Debug)]
pub(crate) struct Memory {
    pool: BlockPool,
    cache: PrefixCache,
    sessions: Sessions,
}

impl Memory {
    pub(crate) fn new(blocks: usize, settings: &EngineSettings) -> Self {
        let share = settings.session_quota.clamp(0.0, 1.0);
        Self {
            pool: BlockPool::new(blocks),
            cache: PrefixCache::default(),
            sessions: Sessions::new(settings.session_ttl, (blocks as f64 * share) as usize),
        }
    }

    /// Blocks that are free or can be made so.
    pub(crate) fn available(&self) -> usize {
        self.pool.free() + self.cache.unused()
    }

    /// Blocks that sequences hold, each counted once.
    pub(crate) fn in_use(&self) -> usize {
        self.pool.total() - self.available()
    }

    /// Blocks in all.
    pub(crate) fn total(&self) -> usize {
        self.pool.total()
    }

    /// Blocks in the cache.
    pub(crate) fn cached(&self) -> usize {
        self.cache.len()
    }

    /// Blocks of a chain that are cached, and how many of these nobody uses: they are among the available ones.
    pub(crate) fn matched(&self, chain: &[BlockHash]) -> (usize, usize) {
        let matched = self.cache.matched(chain);
        (matched, matched - self.cache.in_use(&chain[..matched]))
    }

    /// Gives a sequence that holds nothing the cached blocks of its chain, for `tokens` tokens; returns the tokens in them.
    pub(crate) fn adopt(&mut self, held: &mut Held, tokens: usize) -> usize {
        assert!(held.blocks.is_empty() && held.stored == 0, "{held:?} holds something already");
        held.stored = self.cache.matched(held.reusable(tokens));
        held.blocks = self.cache.acquire(&held.chain[..held.stored]);
        held.blocks.iter().for_each(|&block| self.pool.share(block));
        held.room()
    }

    /// Gives a sequence blocks for `tokens` tokens, or as many as there are; returns the tokens that fit then, of these.
    pub(crate) fn grow(&mut self, held: &mut Held, tokens: usize) -> usize {
        while held.room() < tokens {
            let Some(block) = self.take() else { break };
            held.blocks.push(block);
        }
        held.room().min(tokens)
    }

    /// Caches the full blocks among the first `computed` tokens of a sequence: all steps that wrote them were collected.
    pub(crate) fn store(&mut self, held: &mut Held, tokens: &[TokenId], computed: usize) {
        held.extend(tokens);
        let full = held.chain.len().min(computed / BLOCK_TOKENS);
        while held.stored < full {
            let (hash, own) = (held.chain[held.stored], held.blocks[held.stored]);
            if self.cache.contains(hash) {
                // The step in flight still reads, or overwrites with the same, its own block; whoever gets that one next
                // writes to it later (see `Model`).
                let cached = self.cache.acquire(&[hash])[0];
                self.pool.share(cached);
                self.pool.release(own);
                held.blocks[held.stored] = cached;
            } else {
                let before = held.stored.checked_sub(1).map(|index| held.chain[index]);
                let parent = before.or(held.root).expect("a chain has a root");
                self.cache.store(parent, hash, own);
                self.pool.share(own);
            }
            held.stored += 1;
        }
    }

    /// Takes everything from a sequence; what is cached stays so.
    pub(crate) fn release(&mut self, held: &mut Held) {
        self.cache.release(&held.chain[..held.stored]);
        held.stored = 0;
        held.blocks.drain(..).for_each(|block| self.pool.release(block));
    }

    /// Keeps a sequence's cached blocks for its session.
    pub(crate) fn keep(&mut self, session: SessionKey, held: &Held, now: Instant) {
        self.sessions.keep(&mut self.cache, session, &held.chain[..held.stored], now);
    }

    /// Notes that a session is used.
    pub(crate) fn touch_session(&mut self, session: &SessionKey, now: Instant) {
        self.sessions.touch(session, now);
    }

    /// Ends a session; false where there was none.
    pub(crate) fn end_session(&mut self, session: &SessionKey) -> bool {
        self.sessions.end(&mut self.cache, session)
    }

    /// Seconds since the next block to be evicted was used, and until unused ones are used again; 0 where not known.
    pub(crate) fn ages_s(&self, now: Instant) -> (f64, f64) {
        (self.cache.tail_age(now).map_or(0.0, |age| age.as_secs_f64()), self.cache.reuse_s().unwrap_or(0.0))
    }

    /// It is `now`: ends the sessions whose time is over.
    pub(crate) fn expire(&mut self, now: Instant) {
        self.cache.mark(now);
        self.sessions.expire(&mut self.cache, now);
    }

    /// The sessions.
    pub(crate) fn sessions(&self, now: Instant) -> Vec<SessionInfo> {
        self.sessions.list(now)
    }

    /// What changed in the cache since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<CacheEvent> {
        self.cache.take_events()
    }

    /// The whole cache.
    pub(crate) fn snapshot(&self) -> Vec<CacheEvent> {
        self.cache.snapshot()
    }

    /// Asserts that references, users and pins are those of these sequences, the cache and the sessions.
    pub(crate) fn check<'a>(&self, sequences: impl Iterator<Item = &'a Held>) {
        let mut references = vec![0; self.pool.total()];
        let mut users = BTreeMap::new();
        for held in sequences {
            held.blocks.iter().for_each(|block| references[block.0 as usize] += 1);
            for hash in &held.chain[..held.stored] {
                *users.entry(*hash).or_default() += 1;
            }
        }
        self.cache.blocks().for_each(|(_, block)| references[block.0 as usize] += 1);
        assert_eq!(references, self.pool.references(), "references to blocks");
        let free = references.iter().filter(|&&count| count == 0).count();
        assert_eq!(free, self.pool.free(), "free blocks");
        self.cache.check(&users, &self.sessions.pins());
    }

    /// A free block, by eviction if need be; what sessions keep goes last.
    fn take(&mut self) -> Option<BlockId> {
        if self.pool.free() == 0 && self.cache.unused() > 0 {
            while !self.cache.can_evict() && self.sessions.yield_one(&mut self.cache) {}
            if let Some(block) = self.cache.evict() {
                self.pool.release(block);
            }
        }
        self.pool.take()
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
