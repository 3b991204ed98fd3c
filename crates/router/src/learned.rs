//! [`Predictor`]: how long one node takes to a first token, learned from how long it took.
//!
//! The time is a sum of four parts, each a feature of the request times a coefficient. Coefficients start as the node's
//! own measurements say and are corrected by recursive least squares with forgetting (Haykin, Adaptive Filter Theory,
//! chapter 9), each request weighted so that relative errors count.

use types::NodeRates;

/// Parts of a prediction.
pub(crate) const PARTS: usize = 4;
/// How much of what was learned before one more request stays: the last hundred or so count.
const FORGETTING: f64 = 0.99;
/// Relative doubt in the node's own measurements, against which one request has a doubt of 1.
const SEED_DOUBT: f64 = 0.3;
/// Coefficients stay within this factor of the node's own, so that no run of odd requests makes a node free, or lost.
const DRIFT_MAX: f64 = 8.0;
/// Errors below this are noise, in seconds; also keeps weights finite.
const TIME_S_MIN: f64 = 0.02;
/// Weight of one more request in the mean errors.
const ERROR_WEIGHT: f64 = 1.0 / 64.0;
/// A measured time beyond this factor of the predicted one says nothing of rates: the node stalled, or lost it.
const OUTLIER: f64 = 20.0;
/// The largest relative miss learned from at once.
const MISS_MAX: f64 = 1.0;
/// Prompt tokens that an engine prefills in one step beside its decode rows; each such step also costs a decode step.
const PREFILL_SLICE_TOKENS: f64 = 512.0;
/// Assumed of a node that has not told its speed: a slow one, so that measured ones come first.
pub(crate) const RATES_UNKNOWN: NodeRates =
    NodeRates { prefill_tokens_per_s: 200.0, decode_step_s: 0.05, decode_row_s: 0.01 };
/// The least and the most prefill rate believed, tokens a second: keeps costs finite whatever a node reports.
const PREFILL_RATE: (f64, f64) = (1.0, 1e9);
/// The longest decode step believed, in seconds.
const STEP_S_MAX: f64 = 60.0;

/// What of a request and its node makes up the time to its first token.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Features {
    /// Seconds of prefill that the node said it has ahead.
    pub(crate) backlog_s: f64,
    /// Prompt tokens to be read before its first token, in thousands, its own included.
    pub(crate) kilotokens: f64,
    /// Its own tokens times the tokens before them that they attend to, in millions.
    pub(crate) attention: f64,
    /// Steps that this takes beside rows that decode, times the seconds of a decode step.
    pub(crate) beside_s: f64,
}

impl Features {
    /// Of a request with `uncached` tokens behind `matched`, after `ahead` others, beside rows that take `step_s`.
    pub(crate) fn new(backlog_s: f64, ahead: u64, uncached: u64, matched: u64, step_s: f64) -> Self {
        let (tokens, own) = ((ahead + uncached) as f64, uncached as f64);
        Self {
            backlog_s,
            kilotokens: tokens / 1e3,
            attention: own * (matched as f64 + own / 2.0) / 1e6,
            beside_s: tokens / PREFILL_SLICE_TOKENS * step_s,
        }
    }

    fn parts(&self) -> [f64; PARTS] {
        [self.backlog_s, self.kilotokens, self.attention, self.beside_s]
    }
}

/// What was learned of a node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Learned {
    /// Prompt tokens a second when nothing else runs, before attention.
    pub prefill_tokens_per_s: f64,
    /// Seconds that a million pairs of a prompt's token and one before it add.
    pub attention_s: f64,
    /// How long a decode step takes, relative to what the node says.
    pub decode_scale: f64,
    /// Requests learned from.
    pub requests: u64,
    /// Mean relative error of the predicted time to the first token: above 0 where it was predicted too long.
    pub bias: f64,
    /// Mean of its magnitude.
    pub error: f64,
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Predictor {
    seed: [f64; PARTS],
    coefficients: [f64; PARTS],
    doubt: [[f64; PARTS]; PARTS],
    decode_scale: f64,
    requests: u64,
    bias: f64,
    error: f64,
}

impl Predictor {
    /// What the node says of itself.
    pub(crate) fn new(rates: &NodeRates) -> Self {
        let rate = f64::from(rates.prefill_tokens_per_s);
        let rate = if rate.is_nan() { PREFILL_RATE.0 } else { rate.clamp(PREFILL_RATE.0, PREFILL_RATE.1) };
        // A context of 32,000 tokens about halves the rate at which a model with 8 billion parameters reads.
        let seed = [1.0, 1e3 / rate, 1e6 / (rate * 32_000.0), 1.0];
        let mut doubt = [[0.0; PARTS]; PARTS];
        for (at, row) in doubt.iter_mut().enumerate() {
            row[at] = (seed[at] * SEED_DOUBT).powi(2);
        }
        let decode_scale = 1.0;
        Self { seed, coefficients: seed, doubt, decode_scale, requests: 0, bias: 0.0, error: 0.0 }
    }

    /// Seconds to the first token.
    pub(crate) fn seconds(&self, features: &Features) -> f64 {
        self.coefficients.iter().zip(features.parts()).map(|(coefficient, part)| coefficient * part).sum()
    }

    /// Seconds to read so many prompt tokens at the start of a context, alone.
    pub(crate) fn read_s(&self, tokens: f64) -> f64 {
        self.coefficients[1] * tokens / 1e3
    }

    /// A decode step that the node says takes so long.
    pub(crate) fn step_s(&self, told_s: f64) -> f64 {
        (told_s * self.decode_scale).clamp(0.0, STEP_S_MAX)
    }

    /// It took so many seconds.
    pub(crate) fn observe(&mut self, features: &Features, seconds: f64) {
        let predicted = self.seconds(features).max(TIME_S_MIN);
        let seconds = seconds.max(TIME_S_MIN);
        if !seconds.is_finite() || seconds > predicted * OUTLIER {
            return;
        }
        let miss = (predicted - seconds) / seconds;
        // The first ones are a plain mean.
        let weight = ERROR_WEIGHT.max(1.0 / (self.requests + 1) as f64);
        self.bias += (miss - self.bias) * weight;
        self.error += (miss.abs() - self.error) * weight;
        self.requests += 1;
        let x = features.parts().map(|part| part / predicted);
        let gain_of = self.doubt.map(|row| dot(&row, &x));
        let below = FORGETTING + dot(&gain_of, &x);
        // One request that found more cached than known, or stood behind others that were not, is no reason to panic.
        let miss = (seconds / predicted - 1.0).clamp(-MISS_MAX, MISS_MAX);
        let gain = gain_of.map(|part| part / below);
        for ((coefficient, seed), gain) in self.coefficients.iter_mut().zip(self.seed).zip(gain) {
            *coefficient = (*coefficient + gain * miss).clamp(seed / DRIFT_MAX, seed * DRIFT_MAX);
        }
        for (row, doubt) in self.doubt.iter_mut().enumerate() {
            for (column, doubt) in doubt.iter_mut().enumerate() {
                let most = (self.seed[row] * self.seed[column]).abs();
                *doubt = ((*doubt - gain[row] * gain_of[column]) / FORGETTING).clamp(-most, most);
            }
        }
    }

    /// A text of several tokens took `seconds` a step, where `predicted` was expected.
    pub(crate) fn observe_step(&mut self, predicted: f64, seconds: f64) {
        let ratio = seconds / predicted;
        if ratio.is_finite() && (1.0 / OUTLIER..OUTLIER).contains(&ratio) {
            let scale = self.decode_scale * (1.0 + (ratio - 1.0) * ERROR_WEIGHT);
            self.decode_scale = scale.clamp(1.0 / DRIFT_MAX, DRIFT_MAX);
        }
    }

    /// What is known by now.
    pub(crate) fn learned(&self) -> Learned {
        Learned {
            prefill_tokens_per_s: 1e3 / self.coefficients[1],
            attention_s: self.coefficients[2],
            decode_scale: self.decode_scale,
            requests: self.requests,
            bias: self.bias,
            error: self.error,
        }
    }
}

fn dot(one: &[f64; PARTS], other: &[f64; PARTS]) -> f64 {
    one.iter().zip(other).map(|(one, other)| one * other).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Learns from requests to a node that says 1000 tokens a second and has `rate`.
    fn learned(rate: f64, requests: usize) -> Predictor {
        let told = NodeRates { prefill_tokens_per_s: 1000.0, decode_step_s: 0.02, decode_row_s: 0.001 };
        let mut predictor = Predictor::new(&told);
        for index in 0..requests {
            let (ahead, uncached) = ((index * 37 % 11 * 100) as u64, (index * 53 % 17 * 70 + 30) as u64);
            let features = Features::new(0.0, ahead, uncached, (index * 29 % 2000) as u64, 0.0);
            predictor.observe(&features, (ahead + uncached) as f64 / rate);
        }
        predictor
    }

    #[test]
    fn wrong_rates_are_corrected() {
        for rate in [250.0, 700.0, 1000.0, 1500.0, 4000.0] {
            let known = learned(rate, 300).learned();
            let ratio = known.prefill_tokens_per_s / rate;
            assert!((0.8..1.25).contains(&ratio), "{rate}: {known:?}");
            assert!(known.error < 0.3 && known.bias.abs() <= known.error, "{rate}: {known:?}");
        }
        assert!(learned(700.0, 20).learned().error > learned(700.0, 400).learned().error);
    }

    #[test]
    fn lies_stay_finite() {
        for rate in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -3.0] {
            let told = NodeRates { prefill_tokens_per_s: rate, decode_step_s: rate, decode_row_s: rate };
            let mut predictor = Predictor::new(&told);
            for seconds in [f64::NAN, f64::INFINITY, 0.0, -1.0, 1e300, 1e-300, 0.5] {
                predictor.observe(&Features::new(1e9, u64::MAX / 4, u64::MAX / 4, 7, 1e9), seconds);
                predictor.observe(&Features::default(), seconds);
                predictor.observe_step(seconds, 0.0);
                predictor.observe_step(0.1, seconds);
            }
            let known = predictor.learned();
            let all =
                [known.prefill_tokens_per_s, known.attention_s, known.decode_scale, known.bias, known.error];
            assert!(all.iter().all(|value| value.is_finite()), "{rate}: {known:?}");
            assert!(predictor.seconds(&Features::new(0.1, 10, 10, 10, 0.1)) > 0.0);
        }
    }
}
