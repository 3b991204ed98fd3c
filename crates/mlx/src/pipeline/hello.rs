//! What ranks tell each other before they work together. Everybody hears the same, so all come to the same end.
//!
//! First what must be equal ([`Hello`]), before any weight is read; then what each of them has ([`Ready`]). A rank that
//! failed says so instead of leaving the others alone.

use super::{PipelineError, frame::VERSION};
use crate::distributed::MEMBERS_MAX;
use std::ops::Range;
use types::BlockHash;

/// Words of either: the same in all versions, so that different ones can tell.
pub(crate) const HELLO_WORDS: usize = 64;
/// Marks them.
const MAGIC: u32 = 0x6d6c_7868;
/// Entries of a stage's table of times.
pub(crate) const TIMES_MAX: usize = 16;

// Magic, version, state, weights, layers, hidden, activations, and the ranges; magic, version, state, blocks, and times.
const _: () = assert!(11 + 2 * MEMBERS_MAX <= HELLO_WORDS && 5 + 3 * TIMES_MAX <= HELLO_WORDS);

/// What must be equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    /// Of the weights and of what they are computed with.
    pub(crate) weights: BlockHash,
    /// Of the model.
    pub(crate) layers: u32,
    /// Of a hidden state.
    pub(crate) hidden: u32,
    /// Its type, as MLX numbers it.
    pub(crate) activations: u32,
    /// Layers of each rank.
    pub(crate) ranges: Vec<Range<u32>>,
}

/// What a rank has.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ready {
    /// Blocks of KV that it has room for.
    pub(crate) blocks: u32,
    /// Seconds of a pass of rows alone in its layers, by rows.
    pub(crate) times: Vec<(u32, f64)>,
}

/// The words of a rank that has nothing to tell because it failed.
pub(crate) fn failed() -> [u32; HELLO_WORDS] {
    filled([MAGIC, VERSION, 0])
}

fn filled(words: impl IntoIterator<Item = u32>) -> [u32; HELLO_WORDS] {
    let mut all = [0; HELLO_WORDS];
    all.iter_mut().zip(words).for_each(|(word, given)| *word = given);
    all
}

/// The words that follow version and state, if that rank speaks this version and did not fail.
fn told(rank: usize, words: &[u32]) -> Result<&[u32], PipelineError> {
    let refused = |reason: String| Err(PipelineError::Rank { rank, reason });
    match words {
        [MAGIC, VERSION, 1, rest @ ..] if words.len() == HELLO_WORDS => Ok(rest),
        [MAGIC, VERSION, ..] => refused("failed as it loaded the model; its own log says why".to_owned()),
        [MAGIC, version, ..] => {
            refused(format!("speaks version {version} of the pipeline, this program {VERSION}"))
        }
        _ => refused("did not say hello".to_owned()),
    }
}

impl Hello {
    pub(crate) fn words(&self) -> [u32; HELLO_WORDS] {
        let weights = self.weights.0;
        let head = [MAGIC, VERSION, 1]
            .into_iter()
            .chain((0..4).map(|part| (weights >> (32 * part)) as u32))
            .chain([self.layers, self.hidden, self.activations, self.ranges.len() as u32]);
        filled(head.chain(self.ranges.iter().flat_map(|range| [range.start, range.end])))
    }

    fn of(rank: usize, words: &[u32]) -> Result<Self, PipelineError> {
        let rest = told(rank, words)?;
        let weights = (0..4).fold(0, |hash, part| hash | u128::from(rest[part]) << (32 * part));
        let count = (rest[7] as usize).min(MEMBERS_MAX);
        let ranges = rest[8..].chunks_exact(2).take(count).map(|pair| pair[0]..pair[1]).collect();
        let (layers, hidden, activations) = (rest[4], rest[5], rest[6]);
        Ok(Self { weights: BlockHash(weights), layers, hidden, activations, ranges })
    }

    /// Holds what all ranks say to what this one says, and the ranges to the model.
    pub(crate) fn agree(&self, own: usize, all: &[Vec<u32>]) -> Result<(), PipelineError> {
        for (rank, words) in all.iter().enumerate() {
            let other = Self::of(rank, words)?;
            let differs = |what: &str, theirs: String, ours: String| {
                let reason = format!("has {what} {theirs}, and rank {own} {ours}");
                Err(PipelineError::Rank { rank, reason })
            };
            if other.weights != self.weights {
                let name = |hash: BlockHash| format!("{:032x}", hash.0);
                return differs(
                    "weights or numbers of another kind:",
                    name(other.weights),
                    name(self.weights),
                );
            }
            if other.ranges != self.ranges {
                return differs("layers", format!("{:?}", other.ranges), format!("{:?}", self.ranges));
            }
            let of = |hello: &Self| (hello.layers, hello.hidden, hello.activations);
            if of(&other) != of(self) {
                return differs(
                    "layers, width, type",
                    format!("{:?}", of(&other)),
                    format!("{:?}", of(self)),
                );
            }
        }
        let mut next = 0;
        for range in &self.ranges {
            if range.start != next || range.is_empty() {
                let reason = format!("layers {:?} are no partition of {}", self.ranges, self.layers);
                return Err(PipelineError::Place { reason });
            }
            next = range.end;
        }
        if next != self.layers {
            let reason = format!("layers {:?} are no partition of {}", self.ranges, self.layers);
            return Err(PipelineError::Place { reason });
        }
        Ok(())
    }
}

impl Ready {
    pub(crate) fn words(&self) -> [u32; HELLO_WORDS] {
        let times = &self.times[..self.times.len().min(TIMES_MAX)];
        let head = [MAGIC, VERSION, 1, self.blocks, times.len() as u32];
        let times = times.iter().flat_map(|&(rows, seconds)| {
            let bits = seconds.to_bits();
            [rows, bits as u32, (bits >> 32) as u32]
        });
        filled(head.into_iter().chain(times))
    }

    pub(crate) fn of(rank: usize, words: &[u32]) -> Result<Self, PipelineError> {
        let rest = told(rank, words)?;
        let count = (rest[1] as usize).min(TIMES_MAX);
        let seconds = |low: u32, high: u32| f64::from_bits(u64::from(low) | u64::from(high) << 32);
        let times = rest[2..].chunks_exact(3).take(count).map(|of| (of[0], seconds(of[1], of[2])));
        Ok(Self { blocks: rest[0], times: times.collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            weights: BlockHash(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10),
            layers: 30,
            hidden: 576,
            activations: 10,
            ranges: vec![0..10, 10..11, 11..30],
        }
    }

    #[test]
    fn what_ranks_tell_comes_as_it_went() {
        assert_eq!(Hello::of(0, &hello().words()).unwrap(), hello());
        let ready = Ready { blocks: 7, times: (1..17).map(|rows| (rows, 0.25 / f64::from(rows))).collect() };
        assert_eq!(Ready::of(0, &ready.words()).unwrap(), ready);
        assert_eq!(
            hello().words()[..12],
            [MAGIC, VERSION, 1, 0x0d0e_0f10, 0x090a_0b0c, 0x0506_0708, 0x0102_0304, 30, 576, 10, 3, 0]
        );
    }

    #[test]
    fn ranks_that_differ_are_named_with_what_differs() {
        let check = |change: &dyn Fn(&mut Hello, &mut Vec<u32>), expected: &str| {
            let mut other = hello();
            let mut words = Vec::new();
            change(&mut other, &mut words);
            let words = if words.is_empty() { other.words().to_vec() } else { words };
            let all = vec![hello().words().to_vec(), hello().words().to_vec(), words];
            let error = hello().agree(0, &all).unwrap_err().to_string();
            assert!(error.contains("rank 2") && error.contains(expected), "{error}");
        };
        let equal = vec![hello().words().to_vec(); 3];
        assert!(hello().agree(1, &equal).is_ok());
        check(&|other, _| other.weights.0 += 1, "01020304");
        check(&|other, _| other.ranges[2] = 11..29, "[0..10, 10..11, 11..29]");
        check(&|other, _| other.hidden = 9, "(30, 9, 10)");
        check(&|_, words| *words = failed().to_vec(), "its own log says why");
        check(&|_, words| *words = vec![9; HELLO_WORDS], "did not say hello");
        check(
            &|other, words| {
                *words = other.words().to_vec();
                words[1] = VERSION + 1;
            },
            "speaks version 3 of the pipeline, this program 2",
        );
    }

    #[test]
    fn ranges_are_a_partition_or_refused() {
        let check = |ends: &[(u32, u32)], whole: bool| {
            let hello = Hello { ranges: ends.iter().map(|&(from, to)| from..to).collect(), ..hello() };
            let agreed = hello.agree(0, &[hello.words().to_vec()]);
            assert_eq!(agreed.is_ok(), whole, "{ends:?}: {agreed:?}");
        };
        check(&[(0, 30)], true);
        check(&[(0, 1), (1, 30)], true);
        check(&[(0, 10), (10, 29)], false);
        check(&[(0, 10), (11, 30)], false);
        check(&[(0, 11), (10, 30)], false);
        check(&[(0, 10), (10, 10), (10, 30)], false);
        check(&[(1, 30)], false);
        check(&[], false);
    }
}
