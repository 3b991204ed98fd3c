//! Prompts in segments, so that the next turn of a conversation costs its new part.
//!
//! A tokenizer cuts a text at its special tokens before anything else, and what is between two of them becomes tokens
//! whatever is around it. So a text that is cut just before special tokens has the tokens of its segments, one after the
//! other. [`Segments`] knows where texts may be cut, and [`SegmentCache`] the tokens of segments seen lately; a conversation's
//! next turn has the former turns' segments, since cuts depend on what is before them only.
//!
//! Not every special token is a border: one that takes in the spaces before it, or depends on its neighbours, is none. What
//! follows a cut begins with the border itself, so that rules for the beginning of a text (`Metaspace`'s) see a special
//! token there, and nothing else.

use aho_corasick::{AhoCorasick, MatchKind};
use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};
use tokenizers::AddedToken;
use types::TokenId;

/// Segments are at least so long but for the last one: a shorter one costs less to read than to look up.
const SEGMENT_BYTES_MIN: usize = 256;
/// Tokens of each of the two generations that a model's cache keeps: together 32 MiB, a thousand long conversations.
const GENERATION_TOKENS_MAX: usize = 4 << 20;
/// Segments of each generation: bounds what the keys of short ones take.
const GENERATION_SEGMENTS_MAX: usize = 1 << 17;

/// Where texts may be cut.
#[derive(Debug)]
pub(crate) struct Segments {
    tokens: AhoCorasick,
    /// By pattern: whether it is a border.
    borders: Vec<bool>,
}

impl Segments {
    /// By a tokenizer's added tokens; none where these leave no safe place.
    pub(crate) fn new<'a>(added: impl Iterator<Item = &'a AddedToken>) -> Option<Self> {
        // Tokens that are looked for in normalized text are looked for between the others.
        let added: Vec<&AddedToken> =
            added.filter(|token| !token.normalized && !token.content.is_empty()).collect();
        let borders: Vec<bool> = added.iter().map(|token| token.special && !token.lstrip).collect();
        // What is passed over when it stands within a word moves all matches after it.
        if added.iter().any(|token| token.single_word) || !borders.contains(&true) {
            return None;
        }
        let patterns = added.iter().map(|token| &token.content);
        let tokens = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(patterns).ok()?;
        Some(Self { tokens, borders })
    }

    /// The segments of a text, which follow one another; at least one, but for an empty text.
    pub(crate) fn of(&self, text: &str) -> Vec<Range<usize>> {
        let mut segments = Vec::new();
        let mut start = 0;
        for found in self.tokens.find_iter(text) {
            if self.borders[found.pattern().as_usize()] && found.start() >= start + SEGMENT_BYTES_MIN {
                segments.push(start..found.start());
                start = found.start();
            }
        }
        if start < text.len() {
            segments.push(start..text.len());
        }
        segments
    }
}

/// A segment by its bytes; the first one of a text is not the same as others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SegmentKey([u8; 32]);

impl SegmentKey {
    pub(crate) fn new(text: &str, segment: &Range<usize>) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[u8::from(segment.start == 0)]).update(&text.as_bytes()[segment.clone()]);
        Self(*hasher.finalize().as_bytes())
    }
}

/// Tokens of segments: two generations, of which the old one goes when the young one is full.
#[derive(Debug, Default)]
pub(crate) struct SegmentCache {
    generations: Mutex<Generations>,
}

type Known = HashMap<SegmentKey, Arc<[TokenId]>>;

#[derive(Debug, Default)]
struct Generations {
    young: Known,
    young_tokens: usize,
    old: Known,
}

impl SegmentCache {
    /// What is known of these segments.
    pub(crate) fn get(&self, keys: &[SegmentKey]) -> Vec<Option<Arc<[TokenId]>>> {
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        keys.iter().map(|key| generations.get(key)).collect()
    }

    pub(crate) fn insert(&self, new: Vec<(SegmentKey, Arc<[TokenId]>)>) {
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, tokens) in new {
            generations.insert(key, tokens);
        }
    }
}

impl Generations {
    fn get(&mut self, key: &SegmentKey) -> Option<Arc<[TokenId]>> {
        if let Some(tokens) = self.young.get(key) {
            return Some(tokens.clone());
        }
        let tokens = self.old.remove(key)?;
        self.insert(*key, tokens.clone());
        Some(tokens)
    }

    fn insert(&mut self, key: SegmentKey, tokens: Arc<[TokenId]>) {
        let full = self.young_tokens + tokens.len() > GENERATION_TOKENS_MAX;
        if full || self.young.len() >= GENERATION_SEGMENTS_MAX {
            self.old = std::mem::take(&mut self.young);
            self.young_tokens = 0;
        }
        if tokens.len() > GENERATION_TOKENS_MAX {
            return;
        }
        self.young_tokens += tokens.len();
        if let Some(before) = self.young.insert(key, tokens) {
            self.young_tokens -= before.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> SegmentKey {
        SegmentKey::new(&number.to_string(), &(0..number.to_string().len()))
    }

    #[test]
    fn the_cache_is_bounded_and_keeps_what_is_used() {
        let cache = SegmentCache::default();
        let tokens: Arc<[TokenId]> = vec![1; GENERATION_TOKENS_MAX / 10].into();
        for number in 0..100 {
            cache.insert(vec![(key(number), tokens.clone())]);
            assert!(cache.get(&[key(0)])[0].is_some(), "used all the time");
            let generations = cache.generations.lock().unwrap();
            let kept: usize = generations.old.values().map(|tokens| tokens.len()).sum();
            assert!(generations.young_tokens <= GENERATION_TOKENS_MAX && kept <= GENERATION_TOKENS_MAX);
            let young: usize = generations.young.values().map(|tokens| tokens.len()).sum();
            assert_eq!(young, generations.young_tokens);
        }
        assert_eq!(cache.get(&[key(1)]), [None]);
        assert!(cache.get(&[key(99)])[0].is_some());
    }

    #[test]
    fn the_first_segment_is_not_the_same_as_others() {
        assert_eq!(SegmentKey::new("ab", &(0..1)), SegmentKey::new("ac", &(0..1)));
        assert_ne!(SegmentKey::new("aa", &(0..1)), SegmentKey::new("aa", &(1..2)));
    }

    #[test]
    fn cuts_are_before_borders_and_stay_as_a_text_grows() {
        let token = |content: &str| AddedToken::from(content.to_owned(), true).normalized(false);
        let check = |added: &[AddedToken], cuts: Option<&[usize]>| {
            let text = format!("{0}<a>{0}<b>x<a>{0} <c>{0}", "y".repeat(SEGMENT_BYTES_MIN));
            let segments = Segments::new(added.iter());
            let cut = |text: &str| {
                let segments = segments.as_ref().map(|segments| segments.of(text));
                segments.map(|all| all.iter().skip(1).map(|segment| segment.start).collect::<Vec<_>>())
            };
            assert_eq!(cut(&text), cuts.map(<[usize]>::to_vec));
            if let Some(cuts) = cuts {
                for end in 0..=text.len() {
                    let kept: Vec<usize> = cuts.iter().copied().filter(|cut| cut + 3 <= end).collect();
                    assert_eq!(cut(&text[..end]), Some(kept), "of {end} bytes");
                }
            }
        };
        let size = SEGMENT_BYTES_MIN;
        check(&[token("<a>"), token("<c>")], Some(&[size, 2 * size + 7, 3 * size + 11]));
        check(&[token("<a>"), token("<b>")], Some(&[size, 2 * size + 3]));
        check(&[token("<a>"), token("<c>").lstrip(true)], Some(&[size, 2 * size + 7]));
        check(&[token("<a>"), token("y<a>").lstrip(true)], Some(&[2 * size + 7]));
        check(&[token("<a>"), token("x").single_word(true)], None);
        check(&[AddedToken::from("<a>", false).normalized(false)], None);
        check(&[AddedToken::from("<a>", true).normalized(true)], None);
        check(&[], None);
    }
}
