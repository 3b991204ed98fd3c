//! Stop strings over a text that arrives in pieces.
//!
//! One Knuth–Morris–Pratt automaton for each string: a byte costs constant time whatever the pieces, and the longest
//! prefix that any of them has matched is exactly what must be held back.

/// Finds the first stop string to be complete; where several end at the same byte, the longest.
#[derive(Debug)]
pub(crate) struct StopMatcher {
    patterns: Vec<Pattern>,
    /// Whether the text ends after the stop string, not before it.
    included: bool,
    /// The end of the text that may yet be part of a stop string.
    held: String,
}

/// What may be shown after a piece.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Released {
    pub(crate) text: String,
    /// A stop string was found; the text ends before it (or after it, where it is included), for good.
    pub(crate) stopped: Option<String>,
}

#[derive(Debug)]
struct Pattern {
    bytes: Vec<u8>,
    /// For each prefix's length less one, the length of its longest border.
    borders: Vec<usize>,
    matched: usize,
}

impl StopMatcher {
    /// A matcher for strings none of which is empty.
    pub(crate) fn new(stops: &[String], included: bool) -> Self {
        let patterns = stops.iter().map(|stop| Pattern::new(stop)).collect();
        Self { patterns, included, held: String::new() }
    }

    /// Takes a piece of the text and gives what cannot be part of a stop string any more.
    pub(crate) fn push(&mut self, piece: &str) -> Released {
        if self.patterns.is_empty() {
            return Released { text: piece.to_owned(), stopped: None };
        }
        let before = self.held.len();
        self.held.push_str(piece);
        for (index, byte) in piece.bytes().enumerate() {
            let complete = self.patterns.iter_mut().filter_map(|pattern| pattern.feed(byte)).max();
            if let Some(length) = complete {
                // Both ends are character borders: a stop string begins with a first byte and is whole.
                self.held.truncate(before + index + 1);
                let stop = self.held.split_off(self.held.len() - length);
                if self.included {
                    self.held.push_str(&stop);
                }
                return Released { text: std::mem::take(&mut self.held), stopped: Some(stop) };
            }
        }
        let hold = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - hold);
        Released { text: std::mem::replace(&mut self.held, held), stopped: None }
    }

    /// What was held back, once the text is known to end.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes().to_vec();
        let mut borders = vec![0; bytes.len()];
        let mut border = 0;
        for index in 1..bytes.len() {
            while border > 0 && bytes[index] != bytes[border] {
                border = borders[border - 1];
            }
            border += usize::from(bytes[index] == bytes[border]);
            borders[index] = border;
        }
        Self { bytes, borders, matched: 0 }
    }

    /// Its length if this byte completes it.
    fn feed(&mut self, byte: u8) -> Option<usize> {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.borders[self.matched - 1];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        (self.matched == self.bytes.len()).then_some(self.matched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    /// The same by definition: the shortest prefix of the text that ends with a stop string, less the longest such.
    fn naive(text: &str, stops: &[String]) -> (String, bool) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let ending = stops.iter().filter(|stop| text[..end].ends_with(*stop));
            if let Some(stop) = ending.max_by_key(|stop| stop.len()) {
                return (text[..end - stop.len()].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    fn run(pieces: &[&str], stops: &[String]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops, false);
        let mut out = String::new();
        for piece in pieces {
            let released = matcher.push(piece);
            out.push_str(&released.text);
            if let Some(stop) = released.stopped {
                let mut including = StopMatcher::new(stops, true);
                let text = pieces.iter().map(|piece| including.push(piece)).find(|out| out.stopped.is_some());
                assert!(text.is_some_and(|last| last.text.ends_with(&stop)));
                return (out, true);
            }
        }
        out.push_str(&matcher.finish());
        (out, false)
    }

    proptest! {
        #[test]
        fn every_split_gives_the_same(
            text in "[abé€]{0,24}",
            stops in vec("[abé€]{1,4}", 0..4),
        ) {
            let expected = naive(&text, &stops);
            let borders: Vec<usize> = (0..=text.len()).filter(|&at| text.is_char_boundary(at)).collect();
            for (position, &first) in borders.iter().enumerate() {
                for &second in &borders[position..] {
                    let pieces = [&text[..first], &text[first..second], &text[second..]];
                    prop_assert_eq!(run(&pieces, &stops), expected.clone());
                }
            }
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&chars, &stops), expected);
        }
    }

    #[test]
    fn holds_back_only_what_could_become_a_stop() {
        let mut matcher = StopMatcher::new(&["abab!".to_owned()], false);
        let mut check = |piece: &str, text: &str, stopped: bool| {
            let stopped = stopped.then(|| "abab!".to_owned());
            assert_eq!(matcher.push(piece), Released { text: text.to_owned(), stopped });
        };
        check("x", "x", false);
        check("aba", "", false);
        check("b", "", false);
        check("a", "ab", false);
        check("c", "abac", false);
        check("zabab", "z", false);
        check("!tail", "", true);
    }
}
