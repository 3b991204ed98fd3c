//! What the head tells the stages of a pass: its slices, as words of 32 bits.
//!
//! Every stage makes the same [`Slice`]s of it, and so the same attention and the same order of rows. Tokens stay with the
//! head, which alone embeds them; of a row's text only the tokens that its penalties look at go along, each once with its
//! number, since their order tells a sampler nothing.

use engine::{BlockId, Input, RowSampling, Scoring, SequenceId, Slice};
use std::collections::BTreeMap;
use types::{BLOCK_TOKENS, SamplingDraft, SamplingParams, TokenId, limits};

/// Words of a plan: block tables of 256 rows of a million tokens, and as much again for what penalties look at.
pub(crate) const PLAN_WORDS_MAX: usize = 1 << 24;

/// What a slice's first word says of what follows.
const SAMPLES: u32 = 1;
const MASKED: u32 = 2;
const LOGPROBS: u32 = 4;
const SCORES: u32 = 8;
const DRAFTS: u32 = 16;

/// A plan that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a plan of {words} words is damaged at word {at}: {what}")]
pub struct PlanError {
    words: usize,
    at: usize,
    what: String,
}

/// A pass as a stage knows it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    slices: Vec<Planned>,
    /// As many as the longest slice has: a stage does not need to know which.
    tokens: Vec<TokenId>,
}

#[derive(Debug, Clone, PartialEq)]
struct Planned {
    start: usize,
    count: usize,
    blocks: Vec<BlockId>,
    sample: Option<Sample>,
    drafts: usize,
    score: Option<(u32, Vec<TokenId>)>,
}

#[derive(Debug, Clone, PartialEq)]
struct Sample {
    params: SamplingParams,
    position: u32,
    prompt: Vec<TokenId>,
    output: Vec<TokenId>,
    masked: bool,
    logprobs: Option<u32>,
}

/// A pass in words.
pub(crate) fn encode(slices: &[Slice<'_>]) -> Vec<u32> {
    let mut words = vec![slices.len() as u32];
    for slice in slices {
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let sample = slice.sample.as_ref();
        words.push(
            flag(sample.is_some(), SAMPLES)
                | flag(sample.is_some_and(|sample| sample.masked), MASKED)
                | flag(sample.is_some_and(|sample| sample.logprobs.is_some()), LOGPROBS)
                | flag(slice.score.is_some(), SCORES)
                | flag(slice.drafts > 0, DRAFTS),
        );
        let count = slice.input.count();
        let blocks = &slice.blocks[..(slice.start + count).div_ceil(BLOCK_TOKENS)];
        words.extend([slice.start as u32, count as u32, blocks.len() as u32]);
        words.extend(blocks.iter().map(|block| block.0));
        if let Some(sample) = sample {
            encode_sample(sample, slice.drafts, &mut words);
        }
        if let Some(score) = &slice.score {
            words.extend([score.top, score.targets.len() as u32]);
            words.extend(score.targets);
        }
    }
    words
}

fn encode_sample(sample: &RowSampling<'_>, drafts: usize, words: &mut Vec<u32>) {
    let (known, guessed) = sample.output.split_at(sample.output.len() - drafts);
    let params = sample.params;
    words.extend([sample.position, params.seed as u32, (params.seed >> 32) as u32, params.top_k]);
    let numbers = [
        params.temperature,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    ];
    words.extend(numbers.map(f32::to_bits));
    words.push(params.logit_bias.len() as u32);
    words.extend(params.logit_bias.iter().flat_map(|&(token, bias)| [token, bias.to_bits()]));
    words.extend(sample.logprobs);
    let repeats = params.repetition_penalty != 1.0;
    let counts = |tokens: &[TokenId], wanted: bool| {
        let mut counts = BTreeMap::new();
        tokens.iter().filter(|_| wanted).for_each(|&token| *counts.entry(token).or_insert(0) += 1);
        counts
    };
    let prompt = counts(sample.prompt, repeats);
    let counted = params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
    let output = counts(known, repeats || counted);
    words.push(prompt.len() as u32);
    words.extend(prompt.keys());
    words.push(output.len() as u32);
    words.extend(output.iter().flat_map(|(&token, &count)| [token, count]));
    if drafts > 0 {
        // In their order: each is the output of those behind it.
        words.push(drafts as u32);
        words.extend(guessed);
    }
}

impl Plan {
    /// Reads a plan, which must be one to its last word.
    pub(crate) fn decode(words: &[u32]) -> Result<Self, PlanError> {
        let mut reader = Reader { words, at: 0 };
        let count = reader.length(4, "slices")?;
        let slices = (0..count).map(|_| reader.slice()).collect::<Result<Vec<_>, _>>()?;
        if reader.at != words.len() {
            return Err(reader.damaged("words follow its last slice"));
        }
        let longest = slices.iter().map(|slice| slice.count).max().unwrap_or(0);
        Ok(Self { slices, tokens: vec![0; longest] })
    }

    /// Tokens of all slices.
    pub(crate) fn tokens(&self) -> usize {
        self.slices.iter().map(|slice| slice.count).sum()
    }

    /// Its slices, in the head's order. Which tokens they append is not known.
    pub(crate) fn slices(&self) -> Vec<Slice<'_>> {
        self.slices.iter().enumerate().map(|(index, slice)| slice.of(index, &self.tokens)).collect()
    }
}

impl Planned {
    fn of<'a>(&'a self, index: usize, tokens: &'a [TokenId]) -> Slice<'a> {
        let sample = self.sample.as_ref().map(|sample| RowSampling {
            params: &sample.params,
            position: sample.position,
            prompt: &sample.prompt,
            output: &sample.output,
            masked: sample.masked,
            logprobs: sample.logprobs,
        });
        let score = self.score.as_ref().map(|(top, targets)| Scoring { targets, top: *top });
        Slice {
            sequence: SequenceId(index as u64),
            blocks: &self.blocks,
            start: self.start,
            input: Input::Tokens(&tokens[..self.count]),
            sample,
            drafts: self.drafts,
            score,
        }
    }
}

struct Reader<'a> {
    words: &'a [u32],
    at: usize,
}

impl Reader<'_> {
    fn damaged(&self, what: &str) -> PlanError {
        PlanError { words: self.words.len(), at: self.at, what: what.to_owned() }
    }

    fn word(&mut self) -> Result<u32, PlanError> {
        let word = self.words.get(self.at).copied().ok_or_else(|| self.damaged("it ends here"))?;
        self.at += 1;
        Ok(word)
    }

    fn float(&mut self) -> Result<f32, PlanError> {
        self.word().map(f32::from_bits)
    }

    /// A number of things of at least `each` words, which must still be there.
    fn length(&mut self, each: usize, what: &str) -> Result<usize, PlanError> {
        let count = self.word()? as usize;
        if count.saturating_mul(each) > self.words.len() - self.at {
            return Err(self.damaged(&format!("{count} {what} are more than follow")));
        }
        Ok(count)
    }

    fn list(&mut self, what: &str) -> Result<Vec<u32>, PlanError> {
        let count = self.length(1, what)?;
        (0..count).map(|_| self.word()).collect()
    }

    fn slice(&mut self) -> Result<Planned, PlanError> {
        let flags = self.word()?;
        if flags & !(SAMPLES | MASKED | LOGPROBS | SCORES | DRAFTS) != 0 {
            return Err(self.damaged(&format!("flags {flags:#x}")));
        }
        let (start, count) = (self.word()? as usize, self.word()? as usize);
        let blocks: Vec<BlockId> = self.list("blocks")?.into_iter().map(BlockId).collect();
        if count == 0 || count > blocks.len() * BLOCK_TOKENS {
            return Err(self.damaged(&format!("{count} tokens in {} blocks", blocks.len())));
        }
        if (start + count).div_ceil(BLOCK_TOKENS) != blocks.len() {
            return Err(self.damaged(&format!("{count} tokens from {start} in {} blocks", blocks.len())));
        }
        let mut sample = if flags & SAMPLES != 0 { Some(self.sample(flags)?) } else { None };
        let mut drafts = 0;
        if flags & DRAFTS != 0 {
            let guessed = self.list("drafts")?;
            drafts = guessed.len();
            match &mut sample {
                Some(sample) if (1..count).contains(&drafts) => sample.output.extend(guessed),
                _ => return Err(self.damaged(&format!("{drafts} drafts among {count} tokens"))),
            }
        }
        let score = if flags & SCORES != 0 {
            let top = self.word()?;
            let targets = self.list("targets")?;
            if targets.is_empty() || targets.len() > count {
                return Err(self.damaged(&format!("{} targets of {count} tokens", targets.len())));
            }
            Some((top, targets))
        } else {
            None
        };
        Ok(Planned { start, count, blocks, sample, drafts, score })
    }

    fn sample(&mut self, flags: u32) -> Result<Sample, PlanError> {
        let position = self.word()?;
        let (low, high, top_k) = (self.word()?, self.word()?, self.word()?);
        let mut draft = SamplingDraft {
            seed: u64::from(low) | u64::from(high) << 32,
            top_k,
            temperature: self.float()?,
            top_p: self.float()?,
            min_p: self.float()?,
            repetition_penalty: self.float()?,
            presence_penalty: self.float()?,
            frequency_penalty: self.float()?,
            logit_bias: Vec::new(),
        };
        for _ in 0..self.length(2, "biases")? {
            draft.logit_bias.push((self.word()?, self.float()?));
        }
        let params = SamplingParams::try_from(draft).map_err(|error| self.damaged(&error.to_string()))?;
        let logprobs = if flags & LOGPROBS != 0 { Some(self.word()?) } else { None };
        let prompt = self.list("tokens of a prompt")?;
        let mut output = Vec::new();
        for _ in 0..self.length(2, "tokens of an output")? {
            let (token, count) = (self.word()?, self.word()? as usize);
            if output.len() + count > limits::NEW_TOKENS_MAX as usize {
                return Err(self.damaged(&format!("{count} times token {token}")));
            }
            output.extend(std::iter::repeat_n(token, count));
        }
        Ok(Sample { params, position, prompt, output, masked: flags & MASKED != 0, logprobs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(change: impl FnOnce(&mut SamplingDraft)) -> SamplingParams {
        let mut draft = SamplingDraft { temperature: 0.5, seed: 0x1_0000_0002, ..SamplingDraft::default() };
        change(&mut draft);
        SamplingParams::try_from(draft).unwrap()
    }

    /// The words of a plan are what stages of this version speak: who changes them changes `frame::VERSION`.
    #[test]
    fn the_words_of_a_plan_are_these() {
        let (greedy, penalized) = (
            params(|draft| (draft.temperature, draft.seed) = (0.0, 0)),
            params(|draft| {
                (draft.repetition_penalty, draft.top_k) = (1.5, 40);
                draft.logit_bias = vec![(9, -2.0)];
            }),
        );
        let blocks: Vec<BlockId> = [7, 3, 5].map(BlockId).to_vec();
        let plain = RowSampling::plain(&greedy, 4, &[1, 2, 2], &[3, 3, 1]);
        let row = RowSampling { masked: true, logprobs: Some(2), params: &penalized, ..plain };
        let targets = [11, 12];
        let slice = |start, tokens, sample| Slice {
            sequence: SequenceId(77),
            blocks: &blocks,
            start,
            input: Input::Tokens(tokens),
            sample,
            drafts: 0,
            score: None,
        };
        let slices = [
            slice(40, &[5][..], Some(plain)),
            slice(0, &[5, 6, 7][..], None),
            Slice { score: Some(Scoring { targets: &targets, top: 3 }), ..slice(31, &[1, 2][..], Some(row)) },
            Slice { drafts: 1, ..slice(31, &[3, 1][..], Some(row)) },
        ];
        let one = 1.0_f32.to_bits();
        let half = 0.5_f32.to_bits();
        let (minus_two, repeats) = ((-2.0_f32).to_bits(), 1.5_f32.to_bits());
        #[rustfmt::skip]
        let expected = [
            4,
            1, 40, 1, 2, 7, 3, 4, 0, 0, 0, 0, one, 0, one, 0, 0, 0, 0, 0,
            0, 0, 3, 1, 7,
            15, 31, 2, 2, 7, 3, 4, 2, 1, 40, half, one, 0, repeats, 0, 0, 1, 9, minus_two, 2, 2, 1, 2,
            2, 1, 1, 3, 2, 3, 2, 11, 12,
            23, 31, 2, 2, 7, 3, 4, 2, 1, 40, half, one, 0, repeats, 0, 0, 1, 9, minus_two, 2, 2, 1, 2,
            1, 3, 2, 1, 1,
        ];
        let words = encode(&slices);
        assert_eq!(words, expected);
        let plan = Plan::decode(&words).unwrap();
        assert_eq!(plan.tokens(), 8);
        assert_eq!(encode(&plan.slices()), words);
        // Every word is needed, and there is none beyond.
        for end in 0..words.len() {
            assert!(Plan::decode(&words[..end]).is_err(), "cut to {end} words");
        }
        assert!(Plan::decode(&[&words[..], &[0]].concat()).is_err());
    }

    #[test]
    fn what_is_wrong_with_a_plan_is_told() {
        let check = |words: &[u32], expected: &str| {
            let error = Plan::decode(words).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(&[], "at word 0: it ends here");
        check(&[u32::MAX, 0, 0], "4294967295 slices are more than follow");
        check(&[1, 32, 0, 1, 1, 0], "flags 0x20");
        check(&[1, 16, 0, 2, 1, 0, 1, 5], "1 drafts among 2 tokens");
        check(&[1, 0, 0, 0, 1, 0], "0 tokens in 1 blocks");
        check(&[1, 0, 0, 33, 1, 0], "33 tokens in 1 blocks");
        check(&[1, 0, 64, 1, 1, 0], "1 tokens from 64 in 1 blocks");
        let mut sampled = vec![1, 1, 0, 1, 1, 0, 0, 0, 0, 0];
        sampled.extend([3.0_f32, 1.0, 0.0, 1.0, 0.0, 0.0].map(f32::to_bits));
        sampled.extend([0, 0, 0]);
        check(&sampled, "temperature is 3");
        sampled[10] = 0;
        assert!(Plan::decode(&sampled).is_ok());
        *sampled.last_mut().unwrap() = 1;
        sampled.extend([5, u32::MAX]);
        check(&sampled, "4294967295 times token 5");
        check(&[1, 8, 0, 1, 1, 0, 0, 2, 1, 1], "2 targets of 1 tokens");
    }

    /// Damage is an error or another plan, never a panic.
    #[test]
    fn damaged_plans_do_not_panic() {
        let greedy = SamplingParams::greedy();
        let blocks = [BlockId(1), BlockId(2)];
        let slice = Slice {
            sequence: SequenceId(0),
            blocks: &blocks,
            start: 33,
            input: Input::Tokens(&[4]),
            sample: Some(RowSampling::plain(&greedy, 0, &[], &[])),
            drafts: 0,
            score: None,
        };
        let words = encode(&[slice, slice]);
        for at in 0..words.len() {
            for value in [0, 1, 2, 33, 0x7fff_ffff, u32::MAX] {
                let mut damaged = words.clone();
                damaged[at] = value;
                if let Ok(plan) = Plan::decode(&damaged) {
                    assert_eq!(plan.slices().len(), plan.slices.len());
                }
            }
        }
    }
}
