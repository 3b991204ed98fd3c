//! [`CacheMirror`]: what the engine child's prefix cache holds, as its reports tell, kept for routers.
//!
//! The child's reports go in ([`CacheMirror::take`]); for each router comes out what it has not been told
//! ([`CacheMirror::news`]): the events since, or everything, where it knows nothing or lags too far behind. Each life of an
//! engine is an epoch, whose events are numbered from 0.

use std::collections::{BTreeMap, HashMap, VecDeque};
use types::{
    BlockHash, CacheEvent, CacheSnapshot,
    limits::{CACHE_BLOCKS_MAX, CACHE_BLOCKS_SENT_MAX},
};

/// Blocks of the events that are kept for routers that lag behind: what an engine stores in about a minute, and no more
/// than a snapshot of a full cache.
const RECENT_BLOCKS_MAX: usize = 1 << 16;

/// What a router has been told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CacheCursor {
    epoch: u64,
    seq: u64,
}

/// What a router is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CacheNews {
    Snapshot(CacheSnapshot),
    Events { epoch: u64, first_seq: u64, events: Vec<CacheEvent> },
}

#[derive(Debug, Default)]
pub(crate) struct CacheMirror {
    epoch: u64,
    /// Number of the next event.
    seq: u64,
    /// In the order in which they were stored, parents first.
    blocks: BTreeMap<u64, BlockHash>,
    numbers: HashMap<BlockHash, u64>,
    stored: u64,
    /// The newest events, up to number `seq`.
    recent: VecDeque<CacheEvent>,
    /// Blocks in these.
    recent_blocks: usize,
}

impl CacheMirror {
    /// The engine is gone, and its cache with it.
    pub(crate) fn restart(&mut self) {
        *self = Self { epoch: self.epoch + 1, ..Self::default() };
    }

    /// Takes what changed in the engine's cache.
    pub(crate) fn take(&mut self, events: Vec<CacheEvent>) {
        for event in events.into_iter().flat_map(split) {
            match &event {
                CacheEvent::Stored { blocks, .. } => blocks.iter().for_each(|&hash| self.store(hash)),
                CacheEvent::Removed { blocks } => {
                    for number in blocks.iter().filter_map(|hash| self.numbers.remove(hash)) {
                        self.blocks.remove(&number);
                    }
                }
            }
            self.seq += 1;
            self.recent_blocks += blocks_of(&event);
            self.recent.push_back(event);
            while self.recent_blocks > RECENT_BLOCKS_MAX {
                let oldest = self.recent.pop_front();
                self.recent_blocks -= oldest.as_ref().map_or(self.recent_blocks, blocks_of);
            }
        }
    }

    /// What a router that was told up to `told` has to be told, and up to where that goes; none where it knows everything.
    pub(crate) fn news(&self, told: Option<CacheCursor>) -> Option<(CacheNews, CacheCursor)> {
        let now = CacheCursor { epoch: self.epoch, seq: self.seq };
        if told == Some(now) {
            return None;
        }
        let missing = told.filter(|told| told.epoch == self.epoch).map(|told| (self.seq - told.seq) as usize);
        let news = match missing.and_then(|missing| self.recent.len().checked_sub(missing)) {
            Some(known) => CacheNews::Events {
                epoch: self.epoch,
                first_seq: self.seq - (self.recent.len() - known) as u64,
                events: self.recent.range(known..).cloned().collect(),
            },
            None => CacheNews::Snapshot(CacheSnapshot {
                epoch: self.epoch,
                seq: self.seq,
                blocks: self.blocks.values().copied().collect(),
            }),
        };
        Some((news, now))
    }

    fn store(&mut self, hash: BlockHash) {
        if self.blocks.len() >= CACHE_BLOCKS_MAX || self.numbers.contains_key(&hash) {
            return;
        }
        self.numbers.insert(hash, self.stored);
        self.blocks.insert(self.stored, hash);
        self.stored += 1;
    }
}

pub(crate) fn blocks_of(event: &CacheEvent) -> usize {
    match event {
        CacheEvent::Stored { blocks, .. } | CacheEvent::Removed { blocks } => blocks.len(),
    }
}

/// The same in events that may travel.
fn split(event: CacheEvent) -> Vec<CacheEvent> {
    if blocks_of(&event) <= CACHE_BLOCKS_SENT_MAX {
        return vec![event];
    }
    match event {
        CacheEvent::Removed { blocks } => {
            let parts = blocks.chunks(CACHE_BLOCKS_SENT_MAX);
            parts.map(|part| CacheEvent::Removed { blocks: part.to_vec() }).collect()
        }
        CacheEvent::Stored { mut parent, blocks } => {
            let parts = blocks.chunks(CACHE_BLOCKS_SENT_MAX).map(|part| {
                let stored = CacheEvent::Stored { parent, blocks: part.to_vec() };
                parent = part[part.len() - 1];
                stored
            });
            parts.collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use std::collections::BTreeSet;

    /// A router that believes what it is told.
    #[derive(Default)]
    struct Listener {
        told: Option<CacheCursor>,
        next: (u64, u64),
        blocks: BTreeSet<BlockHash>,
        snapshots: usize,
    }

    impl Listener {
        fn listen(&mut self, mirror: &CacheMirror) {
            let Some((news, told)) = mirror.news(self.told) else { return };
            self.told = Some(told);
            match news {
                CacheNews::Snapshot(CacheSnapshot { epoch, seq, blocks }) => {
                    self.next = (epoch, seq);
                    self.blocks = blocks.into_iter().collect();
                    self.snapshots += 1;
                }
                CacheNews::Events { epoch, first_seq, events } => {
                    assert_eq!((epoch, first_seq), self.next, "no gap");
                    assert!(!events.is_empty());
                    self.next.1 += events.len() as u64;
                    for event in events {
                        assert!((1..=CACHE_BLOCKS_SENT_MAX).contains(&blocks_of(&event)));
                        match event {
                            CacheEvent::Stored { blocks, .. } => self.blocks.extend(blocks),
                            CacheEvent::Removed { blocks } => {
                                blocks.iter().for_each(|hash| assert!(self.blocks.remove(hash)));
                            }
                        }
                    }
                }
            }
        }
    }

    fn stored(range: std::ops::Range<u128>) -> CacheEvent {
        CacheEvent::Stored { parent: BlockHash(u128::MAX), blocks: range.map(BlockHash).collect() }
    }

    fn removed(range: std::ops::Range<u128>) -> CacheEvent {
        CacheEvent::Removed { blocks: range.map(BlockHash).collect() }
    }

    #[test]
    fn who_lags_behind_or_missed_a_restart_gets_everything() {
        let mut mirror = CacheMirror::default();
        let (mut quick, mut slow) = (Listener::default(), Listener::default());
        slow.listen(&mirror);
        for round in 0..20 {
            mirror.take(vec![stored(round * 5000..(round + 1) * 5000)]);
            quick.listen(&mirror);
        }
        assert_eq!((quick.snapshots, quick.blocks.len()), (1, 100_000));
        assert!(mirror.recent_blocks <= RECENT_BLOCKS_MAX && mirror.recent_blocks > RECENT_BLOCKS_MAX / 2);
        slow.listen(&mirror);
        assert_eq!((slow.snapshots, slow.blocks.len()), (2, 100_000));
        mirror.restart();
        quick.listen(&mirror);
        assert_eq!((quick.snapshots, quick.blocks.len(), quick.next), (2, 0, (1, 0)));
        mirror.take(vec![stored(0..10), removed(8..10)]);
        quick.listen(&mirror);
        assert_eq!((quick.snapshots, quick.blocks.len(), quick.next), (2, 8, (1, 2)));
        assert_eq!(mirror.news(quick.told), None);
    }

    #[test]
    fn snapshots_have_parents_first() {
        let mut mirror = CacheMirror::default();
        mirror.take(vec![stored(5..8), stored(1..3), removed(7..8), stored(7..8)]);
        let Some((CacheNews::Snapshot(snapshot), _)) = mirror.news(None) else { panic!("news") };
        assert_eq!(snapshot.blocks, [5, 6, 1, 2, 7].map(BlockHash));
    }

    proptest! {
        /// Whenever it listens, a router then knows what there is.
        #[test]
        fn listeners_know_what_there_is(rounds in vec((any::<bool>(), 0..12u128, vec(any::<bool>(), 3)), 0..60)) {
            let mut mirror = CacheMirror::default();
            let mut truth = BTreeSet::new();
            let mut listeners = [(); 3].map(|()| Listener::default());
            for (number, (store, hash, listen)) in rounds.into_iter().enumerate() {
                if number % 17 == 16 {
                    mirror.restart();
                    truth.clear();
                } else if store && truth.insert(BlockHash(hash)) {
                    mirror.take(vec![stored(hash..hash + 1)]);
                } else if !store && truth.remove(&BlockHash(hash)) {
                    mirror.take(vec![removed(hash..hash + 1)]);
                }
                for (listener, _) in listeners.iter_mut().zip(listen).filter(|(_, listen)| *listen) {
                    listener.listen(&mirror);
                    prop_assert_eq!(&listener.blocks, &truth);
                }
            }
        }
    }
}
