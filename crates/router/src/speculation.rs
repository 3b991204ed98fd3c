//! [`Speculation`]: blocks that nodes were sent and have not told of yet.
//!
//! A request that is on its way, waits or is being read will leave its prompt in its node's cache: who follows with the
//! same prefix finds it there, or waits for it there. So it counts as cached while the request is open, and for a while
//! after, until the node's own word must have come.

use crate::index::{Matches, Slot, key};
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use types::BlockHash;

/// How long after a request's end its blocks count without the node's word: several of its reports.
const CONFIRM_TIME_MAX: Duration = Duration::from_secs(2);
/// The same for a node that has not told of its cache at all: what it was sent is all that is known.
const UNTOLD_TIME_MAX: Duration = Duration::from_secs(600);
/// Blocks of all requests together: past it the ones that ended first are dropped, then nothing is noted.
pub(crate) const BLOCKS_MAX: usize = 1 << 20;

/// The blocks of one request.
#[derive(Debug)]
pub(crate) struct Guess {
    slot: Slot,
    blocks: Vec<u64>,
}

/// Unconfirmed blocks.
#[derive(Debug, Default)]
pub(crate) struct Speculation {
    /// Who is to have a block, and for how many requests.
    blocks: FxHashMap<u64, Vec<(Slot, u32)>>,
    /// Of requests that ended, by when they are to be dropped, each with its node told or untold.
    ended: [VecDeque<(Instant, Guess)>; 2],
    noted: usize,
}

impl Speculation {
    /// A request with these blocks was sent to a node. What it returns is given back by [`Self::ended`].
    pub(crate) fn sent(&mut self, slot: Slot, hashes: &[BlockHash]) -> Guess {
        while self.noted + hashes.len() > BLOCKS_MAX && self.drop_oldest() {}
        let room = BLOCKS_MAX - self.noted.min(BLOCKS_MAX);
        let blocks: Vec<u64> = hashes.iter().take(room).map(|&hash| key(hash)).collect();
        self.noted += blocks.len();
        for &block in &blocks {
            let holders = self.blocks.entry(block).or_default();
            match holders.iter_mut().find(|(holder, _)| *holder == slot) {
                Some((_, requests)) => *requests += 1,
                None => holders.push((slot, 1)),
            }
        }
        Guess { slot, blocks }
    }

    /// A request ended: its blocks count a little longer.
    pub(crate) fn ended(&mut self, guess: Guess, told: bool, now: Instant) {
        let time = if told { CONFIRM_TIME_MAX } else { UNTOLD_TIME_MAX };
        self.ended[usize::from(told)].push_back((now + time, guess));
        self.expire(now);
    }

    /// A request was not served: its blocks do not count.
    pub(crate) fn dropped(&mut self, guess: Guess) {
        self.noted -= guess.blocks.len();
        for block in guess.blocks {
            let Some(holders) = self.blocks.get_mut(&block) else { continue };
            if let Some(at) = holders.iter().position(|(holder, _)| *holder == guess.slot) {
                holders[at].1 -= 1;
                if holders[at].1 == 0 {
                    holders.swap_remove(at);
                }
            }
            if holders.is_empty() {
                self.blocks.remove(&block);
            }
        }
    }

    /// A slot's node is gone or told all that it has: what it was sent before does not count.
    pub(crate) fn forget(&mut self, slot: Slot) {
        for told in 0..2 {
            let (gone, stay) = std::mem::take(&mut self.ended[told])
                .into_iter()
                .partition::<VecDeque<_>, _>(|(_, guess)| guess.slot == slot);
            self.ended[told] = stay;
            gone.into_iter().for_each(|(_, guess)| self.dropped(guess));
        }
    }

    /// Drops what counted long enough.
    pub(crate) fn expire(&mut self, now: Instant) {
        for told in 0..2 {
            while self.ended[told].front().is_some_and(|(until, _)| *until <= now) {
                let (_, guess) = self.ended[told].pop_front().expect("it is there");
                self.dropped(guess);
            }
        }
    }

    /// Raises what slots hold of a chain by what they were sent.
    pub(crate) fn matches(&self, hashes: &[BlockHash], matches: &mut Matches) {
        // Whole prompts are noted, so whoever is to have a block is to have those before it: holders are nested sets, and
        // where as many have one block as another, nobody drops out between them.
        let noted = hashes.partition_point(|&hash| self.blocks.contains_key(&key(hash)));
        let mut blocks = 0;
        while blocks < noted {
            let holders = self.holders(hashes[blocks]);
            blocks +=
                hashes[blocks..noted].partition_point(|&hash| self.holders(hash).len() == holders.len());
            // Those that have more are raised again.
            holders.iter().for_each(|&(slot, _)| matches.raise(slot, blocks));
        }
    }

    fn holders(&self, hash: BlockHash) -> &[(Slot, u32)] {
        self.blocks.get(&key(hash)).map_or(&[], Vec::as_slice)
    }

    /// Leading blocks of a chain that several requests have or had a moment ago.
    pub(crate) fn shared(&self, hashes: &[BlockHash]) -> usize {
        let requests = |holders: &Vec<(Slot, u32)>| holders.iter().map(|(_, requests)| requests).sum::<u32>();
        hashes.partition_point(|&hash| self.blocks.get(&key(hash)).is_some_and(|all| requests(all) > 1))
    }

    /// Blocks noted, each as often as requests have it.
    pub(crate) fn noted(&self) -> usize {
        self.noted
    }

    /// Drops the request that ended first; false where there is none.
    fn drop_oldest(&mut self) -> bool {
        let first = self.ended.iter_mut().filter(|ended| !ended.is_empty());
        let oldest = first.min_by_key(|ended| ended.front().map(|(until, _)| *until));
        let Some((_, guess)) = oldest.and_then(VecDeque::pop_front) else { return false };
        self.dropped(guess);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::CacheIndex;
    use proptest::{collection::vec, prelude::*};

    const NODES: usize = 5;
    const BLOCKS: usize = 12;

    /// A prompt whose first blocks are those of all, the next those of its kind, and the last its own.
    fn prompt(kind: u8, blocks: usize, number: usize) -> Vec<BlockHash> {
        let block = |at: usize| match at {
            0..4 => at,
            4..8 => 100 * (usize::from(kind) + 1) + at,
            _ => 10_000 * (number + 1) + 1000 * usize::from(kind) + at,
        };
        (0..blocks).map(|at| BlockHash(block(at) as u128)).collect()
    }

    proptest! {
        /// Whatever was sent and given up: each node is taken to have of a chain what the best of its requests has.
        #[test]
        fn matches_are_those_of_the_requests(
            sent in vec((0..NODES, 0..3u8, 0..=BLOCKS, any::<bool>()), 0..40),
            asked in (0..3u8, 0..=BLOCKS, 0..40usize),
        ) {
            let mut index = CacheIndex::default();
            let slots: Vec<Slot> = (0..NODES).map(|_| index.open().expect("few")).collect();
            let (mut known, mut held) = (Speculation::default(), Vec::new());
            for (number, (node, kind, blocks, stays)) in sent.into_iter().enumerate() {
                let prompt = prompt(kind, blocks, number);
                let guess = known.sent(slots[node], &prompt);
                if stays {
                    held.push((node, prompt));
                } else {
                    known.dropped(guess);
                }
            }
            let asked = prompt(asked.0, asked.1, asked.2);
            let mut matches = Matches::none();
            known.matches(&asked, &mut matches);
            for (node, &slot) in slots.iter().enumerate() {
                let common = |prompt: &Vec<BlockHash>| {
                    prompt.iter().zip(&asked).take_while(|(one, other)| one == other).count()
                };
                let of_node = held.iter().filter(|(at, _)| *at == node);
                let best = of_node.map(|(_, prompt)| common(prompt)).max().unwrap_or(0);
                prop_assert_eq!(matches.blocks(slot), best);
            }
        }
    }
}
