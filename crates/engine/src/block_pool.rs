//! [`BlockPool`]: which blocks of KV are free, and by how many each of the others is held.
//!
//! Holders are sequences (one reference for each place in a block table) and the prefix cache (one for each block in it).

use crate::BlockId;

/// All blocks of a model.
#[derive(Debug)]
pub(crate) struct BlockPool {
    /// By block; 0 for a free one.
    references: Vec<u32>,
    /// The last one is taken next.
    free: Vec<BlockId>,
}

impl BlockPool {
    /// A pool of free blocks.
    pub(crate) fn new(blocks: usize) -> Self {
        Self { references: vec![0; blocks], free: (0..blocks as u32).rev().map(BlockId).collect() }
    }

    /// A free block, which then has one holder; none where all are held.
    pub(crate) fn take(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.references[block.0 as usize] = 1;
        Some(block)
    }

    /// One more holder of a block that is held.
    pub(crate) fn share(&mut self, block: BlockId) {
        let references = &mut self.references[block.0 as usize];
        assert!(*references > 0, "{block:?} is shared though nobody holds it");
        *references += 1;
    }

    /// One holder less; without any it is free.
    pub(crate) fn release(&mut self, block: BlockId) {
        let references = &mut self.references[block.0 as usize];
        assert!(*references > 0, "{block:?} is released though nobody holds it");
        *references -= 1;
        if *references == 0 {
            self.free.push(block);
        }
    }

    /// Blocks that nobody holds.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Blocks in all.
    pub(crate) fn total(&self) -> usize {
        self.references.len()
    }

    /// By block, how many hold it.
    pub(crate) fn references(&self) -> &[u32] {
        &self.references
    }
}
