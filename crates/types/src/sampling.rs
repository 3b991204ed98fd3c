//! How a row's next token is drawn from its logits.

use crate::{TokenId, limits};
use serde::{Deserialize, Serialize};

/// Logits divided by less than this overflow; long before that the most probable token is certain.
const GREEDY_BELOW: f32 = 1e-5;

/// Sampling parameters as a client gives them, unchecked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingDraft {
    /// 0 is greedy; 1 samples from the model's own distribution.
    pub temperature: f32,
    /// Keep the most probable tokens whose probabilities sum to this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many of the most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this fraction as probable as the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of each token in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from the logit of each token in the output, times its count; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Keys the row's random numbers together with the position, so a text can be had again.
    pub seed: u64,
}

impl Default for SamplingDraft {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// Checked sampling parameters; the fields mean what [`SamplingDraft`]'s do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "SamplingDraft", into = "SamplingDraft")]
pub struct SamplingParams(SamplingDraft);

/// A sampling parameter out of its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A number out of its range.
    #[error("{name} is {value}; it must be {allowed}")]
    OutOfRange {
        /// The parameter, as OpenAI names it.
        name: &'static str,
        /// The value given.
        value: f32,
        /// The range in words.
        allowed: &'static str,
    },
    /// Too many biased tokens.
    #[error("logit_bias has {count} entries; at most {} are allowed", limits::LOGIT_BIAS_MAX)]
    TooManyBiases {
        /// Entries given.
        count: usize,
    },
}

impl TryFrom<SamplingDraft> for SamplingParams {
    type Error = SamplingError;

    fn try_from(mut draft: SamplingDraft) -> Result<Self, SamplingError> {
        let check = |name, value: f32, valid: bool, allowed| {
            if valid { Ok(()) } else { Err(SamplingError::OutOfRange { name, value, allowed }) }
        };
        let d = &draft;
        check("temperature", d.temperature, (0.0..=2.0).contains(&d.temperature), "from 0 to 2")?;
        check("top_p", d.top_p, d.top_p > 0.0 && d.top_p <= 1.0, "above 0 and at most 1")?;
        check("min_p", d.min_p, (0.0..=1.0).contains(&d.min_p), "from 0 to 1")?;
        let penalty = d.repetition_penalty;
        check("repetition_penalty", penalty, penalty > 0.0 && penalty <= 10.0, "above 0 and at most 10")?;
        for (name, value) in
            [("presence_penalty", d.presence_penalty), ("frequency_penalty", d.frequency_penalty)]
        {
            check(name, value, (-2.0..=2.0).contains(&value), "from -2 to 2")?;
        }
        if d.logit_bias.len() > limits::LOGIT_BIAS_MAX {
            return Err(SamplingError::TooManyBiases { count: d.logit_bias.len() });
        }
        for &(_, bias) in &d.logit_bias {
            check("logit_bias", bias, (-100.0..=100.0).contains(&bias), "from -100 to 100")?;
        }
        draft.logit_bias.sort_by_key(|entry| entry.0);
        draft.logit_bias.dedup_by_key(|entry| entry.0);
        Ok(Self(draft))
    }
}

impl From<SamplingParams> for SamplingDraft {
    fn from(params: SamplingParams) -> Self {
        params.0
    }
}

impl std::ops::Deref for SamplingParams {
    type Target = SamplingDraft;

    fn deref(&self) -> &SamplingDraft {
        &self.0
    }
}

impl SamplingParams {
    /// The most probable token each time.
    pub fn greedy() -> Self {
        Self(SamplingDraft { temperature: 0.0, ..SamplingDraft::default() })
    }

    /// Whether the row takes the most probable token, after penalties and biases.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW
    }

    /// Whether logits are changed before a token is drawn.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || !self.logit_bias.is_empty()
    }

    /// Whether part of the distribution is cut off.
    pub fn truncates(&self) -> bool {
        self.top_p < 1.0 || self.top_k > 0 || self.min_p > 0.0
    }

    /// The uniform number in [0, 1) that draws the token at `position` of the output, the same on every node.
    ///
    /// SplitMix64's finalizer (Steele, Lea, Flood 2014) over seed and position; the top 24 bits, exact in f32.
    pub fn uniform(&self, position: u32) -> f32 {
        let mut z = self.seed ^ u64::from(position).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for multiplier in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
            z = (z ^ (z >> 30)).wrapping_mul(multiplier);
            z ^= z >> 27;
        }
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_range_is_named() {
        let check = |change: fn(&mut SamplingDraft), expected: &str| {
            let mut draft = SamplingDraft::default();
            change(&mut draft);
            let error = SamplingParams::try_from(draft).expect_err("out of range").to_string();
            assert_eq!(error, expected);
        };
        check(|d| d.temperature = 3.0, "temperature is 3; it must be from 0 to 2");
        check(|d| d.temperature = f32::NAN, "temperature is NaN; it must be from 0 to 2");
        check(|d| d.top_p = 0.0, "top_p is 0; it must be above 0 and at most 1");
        check(|d| d.logit_bias = vec![(1, 101.0)], "logit_bias is 101; it must be from -100 to 100");
        check(|d| d.logit_bias = vec![(1, 0.0); 301], "logit_bias has 301 entries; at most 300 are allowed");
    }

    #[test]
    fn uniform_numbers_are_spread_and_repeat() {
        let params =
            SamplingParams::try_from(SamplingDraft { seed: 7, ..SamplingDraft::default() }).expect("valid");
        let mut buckets = [0; 10];
        for position in 0..10_000 {
            let u = params.uniform(position);
            assert!((0.0..1.0).contains(&u));
            assert_eq!(u, params.uniform(position));
            buckets[(u * 10.0) as usize] += 1;
        }
        assert!(buckets.iter().all(|&count| (850..1150).contains(&count)), "{buckets:?}");
    }
}
