//! Chained hashes of token blocks: the currency of prefix caches and of routing by them.

use crate::TokenId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Tokens of one block of KV. A multiple of what attention kernels like, small enough to waste little.
pub const BLOCK_TOKENS: usize = 32;

/// Hash of a block *and everything before it*: equal hashes mean equal prefixes, under the same root.
///
/// The first 128 bits of BLAKE3 over (parent, tokens as little-endian u32), so that no client can forge a collision.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockHash(pub u128);

impl BlockHash {
    /// The root of a model's chains: whatever makes KV incompatible (weights, KV format, salt) goes into `parts`.
    pub fn root(parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Self::from_hasher(&hasher)
    }

    /// The hash of the block that follows `self` and holds `tokens`.
    pub fn child(self, tokens: &[TokenId]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0.to_le_bytes());
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self::from_hasher(&hasher)
    }

    fn from_hasher(hasher: &blake3::Hasher) -> Self {
        let mut first = [0; 16];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(u128::from_le_bytes(first))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockHash({:032x})", self.0)
    }
}

/// Hashes of the full blocks of `tokens`, in order; a last partial block has none.
pub fn block_hashes(root: BlockHash, tokens: &[TokenId]) -> Vec<BlockHash> {
    let mut parent = root;
    let chain = tokens.chunks_exact(BLOCK_TOKENS).map(|block| {
        parent = parent.child(block);
        parent
    });
    chain.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_prefixes_have_equal_hashes_and_nothing_else_does() {
        let root = BlockHash::root(&[b"model", b"f32"]);
        let long: Vec<TokenId> = (0..100).collect();
        let hashes = block_hashes(root, &long);
        assert_eq!(hashes.len(), 3);
        assert_eq!(block_hashes(root, &long[..64]), hashes[..2]);
        let mut changed = long.clone();
        changed[0] = 7;
        let other = block_hashes(root, &changed);
        assert!(hashes.iter().zip(&other).all(|(one, two)| one != two), "a change carries through the chain");
        assert_ne!(BlockHash::root(&[b"ab", b"c"]), BlockHash::root(&[b"a", b"bc"]));
    }
}
