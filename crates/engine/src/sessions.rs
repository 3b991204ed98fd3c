//! [`Sessions`]: conversations that clients named. Each keeps the blocks of its last request in the cache, for a time.

use crate::prefix_cache::PrefixCache;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use types::{BLOCK_TOKENS, BlockHash, ClientId, SessionId, SessionInfo, limits};

/// Whose conversation it is, and its name.
pub(crate) type SessionKey = (ClientId, SessionId);

#[derive(Debug)]
struct Session {
    /// The blocks that it pins, from a root on; at least one.
    chain: Vec<BlockHash>,
    /// When a request of it came or ended last.
    used: Instant,
}

/// The sessions of an engine, and the pins that they have in its cache.
#[derive(Debug)]
pub(crate) struct Sessions {
    ttl: Duration,
    /// What all of them may pin together, in blocks.
    blocks_max: usize,
    sessions: BTreeMap<SessionKey, Session>,
}

impl Sessions {
    pub(crate) fn new(ttl: Duration, blocks_max: usize) -> Self {
        Self { ttl, blocks_max, sessions: BTreeMap::new() }
    }

    /// Pins what a request of the session left in the cache, as far as the quota goes, instead of what it pinned before.
    /// Where the quota is used up, the longest unused sessions end.
    pub(crate) fn keep(
        &mut self,
        cache: &mut PrefixCache,
        key: SessionKey,
        chain: &[BlockHash],
        now: Instant,
    ) {
        let chain = chain[..chain.len().min(self.blocks_max)].to_vec();
        cache.pin(&chain);
        if let Some(before) = self.sessions.remove(&key) {
            cache.unpin(&before.chain);
        }
        if chain.is_empty() {
            return;
        }
        while cache.pinned() > self.blocks_max || self.sessions.len() >= limits::SESSIONS_MAX {
            let Some(longest_unused) = self.longest_unused() else { break };
            self.end(cache, &longest_unused);
        }
        self.sessions.insert(key, Session { chain, used: now });
    }

    /// Notes that a request of the session came.
    pub(crate) fn touch(&mut self, key: &SessionKey, now: Instant) {
        if let Some(session) = self.sessions.get_mut(key) {
            session.used = now;
        }
    }

    /// Ends a session; false where there was none.
    pub(crate) fn end(&mut self, cache: &mut PrefixCache, key: &SessionKey) -> bool {
        let session = self.sessions.remove(key);
        if let Some(session) = &session {
            cache.unpin(&session.chain);
        }
        session.is_some()
    }

    /// Ends those that were not used for too long.
    pub(crate) fn expire(&mut self, cache: &mut PrefixCache, now: Instant) {
        let ttl = self.ttl;
        self.sessions.retain(|_, session| {
            let stays = now.saturating_duration_since(session.used) < ttl;
            if !stays {
                cache.unpin(&session.chain);
            }
            stays
        });
    }

    /// Takes one pin, the last one of the longest unused session; false where there is none.
    pub(crate) fn yield_one(&mut self, cache: &mut PrefixCache) -> bool {
        let Some(key) = self.longest_unused() else { return false };
        let Some(session) = self.sessions.get_mut(&key) else { return false };
        cache.unpin(&session.chain[session.chain.len() - 1..]);
        session.chain.pop();
        if session.chain.is_empty() {
            self.sessions.remove(&key);
        }
        true
    }

    /// Those that have not expired, by client and name.
    pub(crate) fn list(&self, now: Instant) -> Vec<SessionInfo> {
        let info = |((client, id), session): (&SessionKey, &Session)| {
            let idle = now.saturating_duration_since(session.used);
            (idle < self.ttl).then(|| SessionInfo {
                client: *client,
                id: id.clone(),
                tokens: (session.chain.len() * BLOCK_TOKENS) as u32,
                idle_s: idle.as_secs_f32(),
                expires_in_s: (self.ttl - idle).as_secs_f32(),
            })
        };
        self.sessions.iter().filter_map(info).collect()
    }

    /// By block, how many sessions pin it.
    pub(crate) fn pins(&self) -> BTreeMap<BlockHash, u32> {
        let mut pins = BTreeMap::new();
        for hash in self.sessions.values().flat_map(|session| &session.chain) {
            *pins.entry(*hash).or_default() += 1;
        }
        pins
    }

    fn longest_unused(&self) -> Option<SessionKey> {
        self.sessions.iter().min_by_key(|(_, session)| session.used).map(|(key, _)| key.clone())
    }
}
