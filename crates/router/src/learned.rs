//! [`Predictor`]: how long one node takes to a first token, learned from how long it took.
//!
//! The time is a sum of four parts, each a feature of the request times a coefficient: the node's own measurement times a
//! factor, 1 at first. Factors are learned by recursive least squares, in the form of a Kalman filter whose state drifts
//! (Ljung, System Identification, 11.5), so that what was learned long ago fades, and only in what new requests tell of.

use types::NodeRates;

/// Parts of a prediction.
pub(crate) const PARTS: usize = 4;
/// Doubt in a node's own measurements: the variance of factors before anything is learned.
const SEED_VARIANCE: f64 = 0.09;
/// By so much factors may drift from one request to the next: with the noise below, some fifty requests count.
const DRIFT_VARIANCE: f64 = 5e-5;
/// Variance of a request's time, relative to the predicted one.
const NOISE_VARIANCE: f64 = 0.1;
/// Factors and their inverses stay below this, so that no run of odd requests makes a node free, or lost.
pub(crate) const DRIFT_MAX: f64 = 8.0;
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
/// Tokens before it that make a token take twice as long to read, until that is learned: about so many where a model with
/// 8 billion parameters reads.
const ATTENTION_TOKENS: f64 = 32_000.0;
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
    /// The node's own measurements.
    seed: [f64; PARTS],
    factors: [f64; PARTS],
    variance: [[f64; PARTS]; PARTS],
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
        let mut variance = [[0.0; PARTS]; PARTS];
        variance.iter_mut().enumerate().for_each(|(at, row)| row[at] = SEED_VARIANCE);
        Self {
            seed: [1.0, 1e3 / rate, 1e6 / (rate * ATTENTION_TOKENS), 1.0],
            factors: [1.0; PARTS],
            variance,
            decode_scale: 1.0,
            requests: 0,
            bias: 0.0,
            error: 0.0,
        }
    }

    /// Seconds to the first token.
    pub(crate) fn seconds(&self, features: &Features) -> f64 {
        dot(&self.factors, &self.seeded(features))
    }

    /// Seconds to read so many prompt tokens at the start of a context, alone.
    pub(crate) fn read_s(&self, tokens: f64) -> f64 {
        self.factors[1] * self.seed[1] * tokens / 1e3
    }

    /// A decode step that the node says takes so long.
    pub(crate) fn step_s(&self, told_s: f64) -> f64 {
        (told_s * self.decode_scale).clamp(0.0, STEP_S_MAX)
    }

    /// It took so many seconds.
    pub(crate) fn observe(&mut self, features: &Features, seconds: f64) {
        let predicted = self.seconds(features).max(TIME_S_MIN);
        let seconds = seconds.max(TIME_S_MIN);
        if !seconds.is_finite() || !predicted.is_finite() || seconds > predicted * OUTLIER {
            return;
        }
        let miss = (predicted - seconds) / seconds;
        // The first ones are a plain mean.
        let weight = ERROR_WEIGHT.max(1.0 / (self.requests + 1) as f64);
        self.bias += (miss - self.bias) * weight;
        self.error += (miss.abs() - self.error) * weight;
        self.requests += 1;
        let shares = self.seeded(features).map(|part| part / predicted);
        // One request that found more cached than known, or stood behind others that were not, is no reason to panic.
        let miss = (seconds / predicted - 1.0).clamp(-MISS_MAX, MISS_MAX);
        let spread = self.variance.map(|row| dot(&row, &shares));
        let gain = spread.map(|part| part / (NOISE_VARIANCE + dot(&spread, &shares)));
        for (factor, gain) in self.factors.iter_mut().zip(gain) {
            *factor = (*factor + gain * miss).clamp(1.0 / DRIFT_MAX, DRIFT_MAX);
        }
        for (at, row) in self.variance.iter_mut().enumerate() {
            row.iter_mut().zip(spread).for_each(|(variance, spread)| *variance -= gain[at] * spread);
            if row[at] < SEED_VARIANCE {
                row[at] += DRIFT_VARIANCE;
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
            prefill_tokens_per_s: 1e3 / (self.factors[1] * self.seed[1]),
            attention_s: self.factors[2] * self.seed[2],
            decode_scale: self.decode_scale,
            requests: self.requests,
            bias: self.bias,
            error: self.error,
        }
    }

    fn seeded(&self, features: &Features) -> [f64; PARTS] {
        let parts = [features.backlog_s, features.kilotokens, features.attention, features.beside_s];
        let mut seeded = self.seed;
        seeded.iter_mut().zip(parts).for_each(|(seed, part)| *seed *= part);
        seeded
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
