//! What goes from stage to stage beside hidden states: frames of words, of which the first part has a fixed length, so
//! that a receiver knows what to wait for.
//!
//! A frame is [`FRAME_WORDS`] words: [`HEAD_WORDS`] that say what it is, then what it carries. What does not fit follows as
//! one further message of the rest's length.

use super::plan::PLAN_WORDS_MAX;
use crate::distributed::MEMBERS_MAX;

/// Marks a frame; anything else is not one of ours, or not at its begin.
const MAGIC: u32 = 0x6d6c_7870;
/// What all ranks of a group must agree on. Changes with frames, plans, results or their order.
pub(crate) const VERSION: u32 = 2;
/// Words of every frame: plans of some tens of rows with short contexts fit, and no link takes long for them.
pub(crate) const FRAME_WORDS: usize = 1024;
/// Magic, version, kind, pass, words carried, and what ranks tell of their passes.
pub(crate) const HEAD_WORDS: usize = 5 + CLOCKED_WORDS;
/// Words of what ranks tell of their passes.
const CLOCKED_WORDS: usize = 2 * MEMBERS_MAX;
/// Words that a frame carries by itself.
const ROOM: usize = FRAME_WORDS - HEAD_WORDS;

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A pass, as [`super::plan`] says it; hidden states follow.
    Plan = 1,
    /// Masks of the rows of the last plan that wait for them, each as many words as the vocabulary needs.
    Masks = 2,
    /// Answered by the last stage at once: how long the way around is.
    Ping = 3,
    /// There is no further frame.
    Stop = 4,
}

/// A pass of rows alone that a rank measured.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Clocked {
    /// Its rows; 0: there is nothing new.
    pub(crate) rows: u32,
    /// What it took.
    pub(crate) seconds: f32,
}

impl Clocked {
    pub(crate) fn words(self) -> [u32; 2] {
        [self.rows, self.seconds.to_bits()]
    }

    pub(crate) fn of(words: &[u32]) -> Self {
        Self { rows: words[0], seconds: f32::from_bits(words[1]) }
    }
}

/// A frame that came.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    /// Counts passes; wraps.
    pub(crate) pass: u32,
    pub(crate) words: Vec<u32>,
    /// What ranks tell of passes before this one, each in its own place on the frame's way to the last one.
    pub(crate) clocked: [Clocked; MEMBERS_MAX],
}

/// What is no frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// It does not begin like one.
    #[error("a frame begins with {magic:#x} and version {version}; this program speaks {VERSION}")]
    Foreign {
        /// The first word.
        magic: u32,
        /// The second.
        version: u32,
    },
    /// It is for something that this version does not know.
    #[error("a frame of kind {kind} with {words} words")]
    Unknown {
        /// The kind.
        kind: u32,
        /// Words that it is said to carry.
        words: u32,
    },
}

impl Frame {
    pub(crate) fn new(kind: Kind, pass: u32, words: Vec<u32>) -> Self {
        Self { kind, pass, words, clocked: [Clocked::default(); MEMBERS_MAX] }
    }

    /// The words that go first, and those that follow, if any.
    pub(crate) fn split(&self) -> (Vec<u32>, &[u32]) {
        let carried = self.words.len().min(ROOM);
        let mut first = vec![MAGIC, VERSION, self.kind as u32, self.pass, self.words.len() as u32];
        first.extend(self.clocked.iter().flat_map(|clocked| clocked.words()));
        first.extend_from_slice(&self.words[..carried]);
        first.resize(FRAME_WORDS, 0);
        (first, &self.words[carried..])
    }

    /// A frame of its first words, and how many are missing yet.
    pub(crate) fn begin(first: &[u32]) -> Result<(Self, usize), FrameError> {
        let (&[magic, version, ref rest @ ..], true) = (first, first.len() == FRAME_WORDS) else {
            return Err(FrameError::Foreign { magic: 0, version: 0 });
        };
        if (magic, version) != (MAGIC, VERSION) {
            return Err(FrameError::Foreign { magic, version });
        }
        let (kind, pass, count) = (rest[0], rest[1], rest[2]);
        let (told, carried) = rest[3..].split_at(CLOCKED_WORDS);
        let known = [Kind::Plan, Kind::Masks, Kind::Ping, Kind::Stop].into_iter();
        let kind = known.into_iter().find(|known| *known as u32 == kind);
        let words = count as usize;
        let (Some(kind), true) = (kind, words <= PLAN_WORDS_MAX) else {
            return Err(FrameError::Unknown { kind: first[2], words: count });
        };
        let here = words.min(carried.len());
        let mut frame = Self::new(kind, pass, carried[..here].to_vec());
        frame
            .clocked
            .iter_mut()
            .zip(told.chunks(2))
            .for_each(|(clocked, words)| *clocked = Clocked::of(words));
        Ok((frame, words - here))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_as_they_went() {
        for count in [0, 1, ROOM - 1, ROOM, ROOM + 1, 5000] {
            let mut frame = Frame::new(Kind::Masks, u32::MAX, (0..count as u32).collect());
            frame.clocked[3] = Clocked { rows: 8, seconds: 0.25 };
            let (first, rest) = frame.split();
            assert_eq!(first.len(), FRAME_WORDS);
            let (mut got, missing) = Frame::begin(&first).unwrap();
            assert_eq!(missing, rest.len());
            got.words.extend_from_slice(rest);
            assert_eq!(got, frame);
        }
        let (first, _) = Frame::new(Kind::Plan, 3, vec![9]).split();
        assert_eq!(first[..6], [0x6d6c_7870, 2, 1, 3, 1, 0], "the words of version 2");
        assert_eq!(first[HEAD_WORDS..][..2], [9, 0]);
    }

    #[test]
    fn what_is_no_frame_is_told() {
        let check = |change: &dyn Fn(&mut Vec<u32>), expected: &str| {
            let (mut first, _) = Frame::new(Kind::Ping, 0, Vec::new()).split();
            change(&mut first);
            let error = Frame::begin(&first).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(&|first| first[0] = 0x4745_5420, "begins with 0x47455420");
        check(&|first| first[1] = 1, "version 1; this program speaks 2");
        check(&|first| first[2] = 9, "kind 9 with 0 words");
        check(&|first| first[4] = u32::MAX, "kind 3 with 4294967295 words");
        check(&|first| first.truncate(2), "begins with 0x0");
    }
}
