//! [`CacheIndex`]: which nodes hold which blocks, exactly as their engines tell.
//!
//! It owns a [`Slot`] for each node, a map from block to the slots that hold it, and for each slot the set of its blocks,
//! so that a node can be forgotten. Blocks are named by half of their hash: two that collide cost one wrong guess among
//! 10^11, and a guess is all that this is.
//!
//! A cache holds a block only with all blocks before it, so the holders of a chain's blocks are nested sets: where
//! those of two blocks are equal, nobody drops out between them.

use rustc_hash::{FxHashMap, FxHashSet};
use types::{BlockHash, limits};

/// Blocks that one node may have in here; what it stores beyond is not known. A million blocks are 33 million tokens: more
/// than any Mac's memory holds, so that one node's nonsense leaves room for the others.
pub const NODE_BLOCKS_MAX: usize = 1 << 20;
/// Blocks of all nodes together: at 23 bytes each in the map and 12 in the sets, what fits into 4 GiB.
pub const INDEX_BLOCKS_MAX: usize = 110_000_000;
/// Slots: all nodes, and as many again as may restart while their former blocks are being forgotten.
const SLOTS: usize = limits::NODES_MAX + 64;
/// The map is cut in so many, so that growing copies a small part at a time.
const SHARDS: usize = 256;
/// Holders in a list; more are a bitmap.
const FEW: usize = 8;
/// Blocks forgotten at once, of nodes that are gone: about 50 µs. Fewer in tests, so that what is left shows.
const FORGET_AT_ONCE: usize = if cfg!(test) { 8 } else { 256 };

/// A node's place in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Slot(u16);

impl Slot {
    /// As an index into a list with [`SLOTS`] places.
    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Half of a block's hash.
pub(crate) fn key(hash: BlockHash) -> u64 {
    hash.0 as u64
}

/// A set of slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SlotSet([u64; SLOTS / 64]);

impl SlotSet {
    pub(crate) const EMPTY: Self = Self([0; SLOTS / 64]);

    /// Whether it was not in there.
    pub(crate) fn insert(&mut self, slot: Slot) -> bool {
        let (word, bit) = (&mut self.0[slot.index() / 64], 1 << (slot.index() % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    fn remove(&mut self, slot: Slot) {
        self.0[slot.index() / 64] &= !(1 << (slot.index() % 64));
    }

    fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }

    fn keep(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(word, other)| *word &= other);
    }

    /// Calls back for each slot that is not in `other`.
    fn without(&self, other: &Self, mut each: impl FnMut(Slot)) {
        for (at, (word, other)) in self.0.iter().zip(&other.0).enumerate() {
            let mut word = word & !other;
            while word != 0 {
                each(Slot((at * 64) as u16 + word.trailing_zeros() as u16));
                word &= word - 1;
            }
        }
    }
}

/// Who holds a block: one slot, or where the list or bitmap of several is.
#[derive(Debug, Clone, Copy)]
enum Holders {
    One(Slot),
    Few(u32),
    Many(u32),
}

/// Lists and bitmaps, and which of their places are free.
#[derive(Debug)]
struct Places<T> {
    all: Vec<T>,
    free: Vec<u32>,
}

impl<T> Places<T> {
    const EMPTY: Self = Self { all: Vec::new(), free: Vec::new() };

    fn add(&mut self, value: T) -> u32 {
        if let Some(at) = self.free.pop() {
            self.all[at as usize] = value;
            return at;
        }
        self.all.push(value);
        (self.all.len() - 1) as u32
    }
}

/// What a slot is.
#[derive(Debug, Default)]
enum Place {
    #[default]
    Free,
    Taken(FxHashSet<u64>),
    /// Its node is gone or restarted; its blocks are still to be forgotten.
    Left,
}

/// Blocks of a chain that each slot holds.
#[derive(Debug, Clone)]
pub(crate) struct Matches(Vec<u32>);

impl Matches {
    /// No slot holds anything.
    pub(crate) fn none() -> Self {
        Self(vec![0; SLOTS])
    }

    /// Leading blocks that this slot holds.
    pub(crate) fn blocks(&self, slot: Slot) -> usize {
        self.0[slot.index()] as usize
    }

    /// This slot holds at least so many.
    pub(crate) fn raise(&mut self, slot: Slot, blocks: usize) {
        let known = &mut self.0[slot.index()];
        *known = (*known).max(blocks as u32);
    }
}

/// Which nodes hold which blocks.
#[derive(Debug)]
pub(crate) struct CacheIndex {
    shards: Vec<FxHashMap<u64, Holders>>,
    few: Places<[Option<Slot>; FEW]>,
    many: Places<SlotSet>,
    places: Vec<Place>,
    taken: SlotSet,
    /// Blocks of slots that were left, still to be forgotten.
    left: Vec<(Slot, Vec<u64>)>,
    /// Pairs of block and slot, those to be forgotten included.
    held: usize,
}

impl Default for CacheIndex {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| FxHashMap::default()).collect(),
            few: Places::EMPTY,
            many: Places::EMPTY,
            places: (0..SLOTS).map(|_| Place::Free).collect(),
            taken: SlotSet::EMPTY,
            left: Vec::new(),
            held: 0,
        }
    }
}

impl CacheIndex {
    /// A slot for a node that holds nothing yet; none where all are taken.
    pub(crate) fn open(&mut self) -> Option<Slot> {
        let free = |places: &[Place]| places.iter().position(|place| matches!(place, Place::Free));
        while free(&self.places).is_none() && !self.left.is_empty() {
            self.forget();
        }
        let at = free(&self.places)?;
        self.places[at] = Place::Taken(FxHashSet::default());
        self.taken.insert(Slot(at as u16));
        Some(Slot(at as u16))
    }

    /// The node of this slot is gone, and with it all that it held.
    pub(crate) fn close(&mut self, slot: Slot) {
        if let Place::Taken(blocks) = std::mem::replace(&mut self.places[slot.index()], Place::Left) {
            self.taken.remove(slot);
            self.left.push((slot, blocks.into_iter().collect()));
            self.forget();
        }
    }

    /// The blocks that a slot holds.
    pub(crate) fn blocks(&self, slot: Slot) -> usize {
        match &self.places[slot.index()] {
            Place::Taken(blocks) => blocks.len(),
            Place::Free | Place::Left => 0,
        }
    }

    /// Pairs of block and node in here.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// This slot holds these blocks as well; those beyond the bounds are left out.
    pub(crate) fn store(&mut self, slot: Slot, blocks: &[BlockHash]) {
        self.forget();
        for &hash in blocks {
            self.insert(slot, key(hash));
        }
    }

    /// This slot does not hold these blocks any more.
    pub(crate) fn remove(&mut self, slot: Slot, blocks: &[BlockHash]) {
        self.forget();
        for &hash in blocks {
            let Place::Taken(held) = &mut self.places[slot.index()] else { return };
            if held.remove(&key(hash)) {
                self.erase(slot, key(hash));
            }
        }
    }

    /// This slot holds exactly these blocks.
    pub(crate) fn replace(&mut self, slot: Slot, blocks: &[BlockHash]) {
        let Place::Taken(held) = &self.places[slot.index()] else { return };
        let stays: FxHashSet<u64> = blocks.iter().map(|&hash| key(hash)).collect();
        let gone: Vec<u64> = held.difference(&stays).copied().collect();
        for key in gone {
            if let Place::Taken(held) = &mut self.places[slot.index()] {
                held.remove(&key);
            }
            self.erase(slot, key);
        }
        self.store(slot, blocks);
    }

    /// Leading blocks of the chain that each slot holds.
    pub(crate) fn matches(&self, hashes: &[BlockHash]) -> Matches {
        let mut matches = Matches::none();
        let held = hashes.partition_point(|&hash| self.holders(hash).is_some());
        if held > 0 {
            let (first, last) = (self.set(hashes[0]), self.set(hashes[held - 1]));
            self.narrow(hashes, (1, &first), (held, &last), &mut matches);
            last.without(&SlotSet::EMPTY, |slot| matches.raise(slot, held));
        }
        matches
    }

    /// Notes the slots that hold as many of the chain's blocks as `from` says, or more, but not as many as `to` says:
    /// each with those that hold so many.
    fn narrow(
        &self,
        hashes: &[BlockHash],
        from: (usize, &SlotSet),
        to: (usize, &SlotSet),
        matches: &mut Matches,
    ) {
        if from.0 == to.0 || from.1 == to.1 {
            return;
        }
        if from.0 + 1 == to.0 {
            from.1.without(to.1, |slot| matches.raise(slot, from.0));
            return;
        }
        let middle = usize::midpoint(from.0, to.0);
        let set = self.set(hashes[middle - 1]);
        self.narrow(hashes, from, (middle, &set), matches);
        self.narrow(hashes, (middle, &set), to, matches);
    }

    fn holders(&self, hash: BlockHash) -> Option<Holders> {
        self.shards[shard(key(hash))].get(&key(hash)).copied()
    }

    /// Those of its holders that are still there.
    fn set(&self, hash: BlockHash) -> SlotSet {
        let mut set = SlotSet::EMPTY;
        match self.holders(hash) {
            None => {}
            Some(Holders::One(slot)) => _ = set.insert(slot),
            Some(Holders::Few(at)) => {
                self.few.all[at as usize].iter().flatten().for_each(|&slot| _ = set.insert(slot));
            }
            Some(Holders::Many(at)) => set = self.many.all[at as usize].clone(),
        }
        set.keep(&self.taken);
        set
    }

    fn insert(&mut self, slot: Slot, key: u64) {
        let Place::Taken(held) = &mut self.places[slot.index()] else { return };
        if held.len() >= NODE_BLOCKS_MAX || self.held >= INDEX_BLOCKS_MAX || !held.insert(key) {
            return;
        }
        self.held += 1;
        let shard = &mut self.shards[shard(key)];
        let Some(holders) = shard.get_mut(&key) else {
            shard.insert(key, Holders::One(slot));
            return;
        };
        *holders = match *holders {
            Holders::One(other) => {
                let mut list = [None; FEW];
                (list[0], list[1]) = (Some(other), Some(slot));
                Holders::Few(self.few.add(list))
            }
            Holders::Few(at) => {
                let list = &mut self.few.all[at as usize];
                if let Some(place) = list.iter_mut().find(|place| place.is_none()) {
                    *place = Some(slot);
                    return;
                }
                let mut set = SlotSet::EMPTY;
                list.iter().flatten().for_each(|&slot| _ = set.insert(slot));
                set.insert(slot);
                self.few.free.push(at);
                Holders::Many(self.many.add(set))
            }
            Holders::Many(at) => {
                self.many.all[at as usize].insert(slot);
                return;
            }
        };
    }

    /// Takes a slot from a block's holders.
    fn erase(&mut self, slot: Slot, key: u64) {
        let shard = &mut self.shards[shard(key)];
        let Some(holders) = shard.get_mut(&key) else { return };
        let none_left = match *holders {
            Holders::One(other) => other == slot,
            Holders::Few(at) => {
                let list = &mut self.few.all[at as usize];
                list.iter_mut().filter(|place| **place == Some(slot)).for_each(|place| *place = None);
                let empty = list.iter().all(Option::is_none);
                if empty {
                    self.few.free.push(at);
                }
                empty
            }
            Holders::Many(at) => {
                let set = &mut self.many.all[at as usize];
                set.remove(slot);
                let empty = set.is_empty();
                if empty {
                    self.many.free.push(at);
                }
                empty
            }
        };
        if none_left {
            shard.remove(&key);
        }
        self.held -= 1;
    }

    /// Forgets a few blocks of slots that were left.
    fn forget(&mut self) {
        let Some((slot, blocks)) = self.left.last_mut() else { return };
        let slot = *slot;
        let some = blocks.split_off(blocks.len().saturating_sub(FORGET_AT_ONCE));
        if blocks.is_empty() {
            self.left.pop();
            self.places[slot.index()] = Place::Free;
        }
        for key in some {
            self.erase(slot, key);
        }
    }
}

/// Any bits will do: hashes are evenly spread, and the maps mix them again.
fn shard(key: u64) -> usize {
    (key >> 32) as usize % SHARDS
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
