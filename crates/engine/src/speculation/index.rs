//! [`Index`]: where in a text the last few tokens of another one, or its own, stood before.
//!
//! Chains of positions by the hash of the tokens before them, as compressors keep them: a candidate is compared token by
//! token, so that a hash only says where to look, and nothing needs to be removed or locked. It takes 16 to 24 bytes a token.

use types::TokenId;

/// Tokens before a position by which it is found: the longer kind first, which leaves few candidates in a long text.
const KEYS: [usize; 2] = [6, 2];
/// Candidates of a kind that are compared, the latest first: bounds a search to some microseconds.
const CANDIDATES_MAX: usize = 16;
/// Tokens of a match that count; more say nothing further.
pub(super) const MATCH_TOKENS_MAX: usize = 32;
/// Places of the smallest table of a kind.
const PLACES_MIN: usize = 256;
/// Stands for no position: none has so few tokens before it.
const NONE: u32 = 0;

/// Positions of a text by what is before them.
#[derive(Debug, Default)]
pub(super) struct Index {
    kinds: [Chains; KEYS.len()],
    /// Tokens of the text that were read.
    read: usize,
}

#[derive(Debug, Default)]
struct Chains {
    /// Latest position of each hash; a power of two.
    heads: Vec<u32>,
    /// For each position the one before it with the same hash.
    before: Vec<u32>,
}

/// A place of a text before which the same tokens stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Match {
    /// Position of the token that follows.
    pub(super) at: usize,
    /// Tokens that are the same, up to [`MATCH_TOKENS_MAX`].
    pub(super) tokens: usize,
}

impl Index {
    /// Reads what is new of a text, which only ever grows.
    pub(super) fn extend(&mut self, text: &[TokenId]) {
        let from = self.read + 1;
        for (chains, key) in self.kinds.iter_mut().zip(KEYS) {
            chains.extend(text, from, key);
        }
        self.read = self.read.max(text.len());
    }

    /// The place in the text before which most of the last tokens of `query` stand; the latest one of equal ones, but
    /// `follow` before all others.
    pub(super) fn find(&self, text: &[TokenId], query: &[TokenId], follow: Option<usize>) -> Option<Match> {
        let shortest = KEYS[KEYS.len() - 1];
        let candidate = |at: usize| Match { at, tokens: common(&text[..at], query) };
        let follow = follow.filter(|&at| at < text.len()).map(candidate);
        let mut best = follow.filter(|found| found.tokens >= shortest);
        for (chains, key) in self.kinds.iter().zip(KEYS) {
            let Some(last) = query.len().checked_sub(key).map(|from| &query[from..]) else { continue };
            for at in chains.positions(last).filter(|&at| at < text.len()).take(CANDIDATES_MAX) {
                let found = candidate(at);
                if found.tokens >= key && best.is_none_or(|best| found.tokens > best.tokens) {
                    best = Some(found);
                }
            }
            if best.is_some_and(|best| best.tokens >= key) {
                break;
            }
        }
        best
    }
}

impl Chains {
    fn extend(&mut self, text: &[TokenId], from: usize, key: usize) {
        if text.len() >= self.heads.len() {
            // Twice as large as needed, and everything anew.
            self.heads = vec![NONE; (2 * text.len()).next_power_of_two().max(PLACES_MIN)];
            self.before.clear();
            self.before.resize(text.len() + 1, NONE);
            self.put(text, key, key);
        } else {
            self.before.resize(text.len() + 1, NONE);
            self.put(text, from.max(key), key);
        }
    }

    fn put(&mut self, text: &[TokenId], from: usize, key: usize) {
        for at in from..=text.len() {
            let place = self.place(&text[at - key..at]);
            self.before[at] = std::mem::replace(&mut self.heads[place], at as u32);
        }
    }

    fn positions(&self, last: &[TokenId]) -> impl Iterator<Item = usize> {
        let head = if self.heads.is_empty() { NONE } else { self.heads[self.place(last)] };
        let known = |at: u32| (at != NONE).then_some(at);
        std::iter::successors(known(head), move |&at| known(self.before[at as usize])).map(|at| at as usize)
    }

    fn place(&self, last: &[TokenId]) -> usize {
        // Knuth's multiplicative hash over 64 bits; its upper bits are the good ones.
        let hash = last.iter().fold(0_u64, |hash, &token| {
            (hash.rotate_left(23) ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        (hash >> 32) as usize & (self.heads.len() - 1)
    }
}

/// Last tokens that both have.
fn common(one: &[TokenId], other: &[TokenId]) -> usize {
    let pairs = one.iter().rev().zip(other.iter().rev());
    pairs.take(MATCH_TOKENS_MAX).take_while(|(one, other)| one == other).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A linear congruential generator (Knuth's MMIX constants), its upper bits.
    fn random(state: &mut u64, below: u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) % below
    }

    #[test]
    fn finds_the_longest_match_of_the_latest_places() {
        let check = |text: &[TokenId], query: &[TokenId], follow, expected: Option<(usize, usize)>| {
            let mut index = Index::default();
            // In two parts: what was read before is not read again.
            index.extend(&text[..text.len() / 2]);
            index.extend(text);
            let found = index.find(text, query, follow).map(|found| (found.at, found.tokens));
            assert_eq!(found, expected, "{query:?} in {text:?}");
        };
        check(&[1, 2, 3, 4], &[9, 2, 3], None, Some((3, 2)));
        check(&[1, 2, 3, 4], &[9, 3, 4], None, None);
        check(&[1, 2, 3, 1, 2, 5], &[7, 1, 2], None, Some((5, 2)));
        check(&[6, 1, 2, 3, 1, 2, 5], &[6, 1, 2], None, Some((3, 3)));
        check(&[1, 2, 3, 1, 2, 5], &[7, 1, 2], Some(2), Some((2, 2)));
        check(&[1, 2, 3, 1, 2, 5], &[8, 8], Some(2), None);
        check(&[1, 2], &[2], None, None);
        check(&[], &[1, 2, 3], None, None);
        check(&[4, 4, 4, 4], &[4, 4, 4, 4], None, Some((3, 3)));
    }

    #[test]
    fn matches_are_true_and_none_of_few_is_missed() {
        for seed in 0..200 {
            println!("seed {seed}");
            let mut state = seed;
            let (letters, length) = (2 + random(&mut state, 30), random(&mut state, 600) as usize);
            let mut text: Vec<TokenId> = Vec::new();
            let mut index = Index::default();
            while text.len() < length {
                if text.len() > 20 && random(&mut state, 4) == 0 {
                    let from = random(&mut state, text.len() as u64 - 10) as usize;
                    text.extend_from_within(from..from + 10);
                } else {
                    text.push(random(&mut state, letters) as TokenId);
                }
                index.extend(&text);
                let same = |at: &usize| common(&text[..*at], &text);
                let longest = (0..text.len()).map(|at| same(&at)).max().unwrap_or(0);
                let found = index.find(&text, &text, None);
                match found {
                    Some(found) => assert_eq!(found.tokens, same(&found.at), "{found:?}"),
                    None => assert!(longest < KEYS[1], "{longest} tokens are missed"),
                }
                let rare = (0..text.len()).filter(|at| same(at) >= KEYS[0]).count() <= CANDIDATES_MAX;
                if longest >= KEYS[0] && rare {
                    // Another text with the same hash may take a candidate's place, but hardly here.
                    assert_eq!(found.map(|found| found.tokens), Some(longest));
                }
            }
        }
    }
}
