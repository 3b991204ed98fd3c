//! Counts of values by size, as Prometheus has them.

/// Seconds to a first token: vLLM's bounds.
pub(super) const FIRST_TOKEN_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0,
];
/// Seconds between two tokens: vLLM's bounds, and some below them for small models.
pub(super) const TOKEN_S: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
];
/// Seconds of a whole request: vLLM's bounds, and some below them.
pub(super) const REQUEST_S: &[f64] = &[
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
];
/// Tokens of a request: 1, 2, 5 and so on up to a long context.
pub(super) const REQUEST_TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];

#[derive(Debug, Clone)]
pub(super) struct Histogram {
    /// Ascending; a value belongs to the first one that is not below it.
    bounds: &'static [f64],
    /// One for each bound, and one for what is above all.
    counts: Box<[u64]>,
    sum: f64,
}

impl Histogram {
    pub(super) fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1].into(), sum: 0.0 }
    }

    pub(super) fn observe(&mut self, value: f64, times: u64) {
        let place = self.bounds.partition_point(|&bound| bound < value);
        self.counts[place] += times;
        self.sum += value * times as f64;
    }

    pub(super) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    pub(super) fn sum(&self) -> f64 {
        self.sum
    }

    /// Each bound with the number of values up to it; the last bound is infinite.
    pub(super) fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(self.counts.iter()).scan(0, |below, (bound, count)| {
            *below += count;
            Some((bound, *below))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fall_below_the_next_bound() {
        let mut histogram = Histogram::new(&[1.0, 2.0]);
        for (value, times) in [(0.5, 1), (1.0, 2), (1.5, 3), (9.0, 1)] {
            histogram.observe(value, times);
        }
        let expected = [(1.0, 3), (2.0, 6), (f64::INFINITY, 7)];
        assert_eq!(histogram.cumulative().collect::<Vec<_>>(), expected);
        assert_eq!((histogram.count(), histogram.sum()), (7, 0.5 + 2.0 + 4.5 + 9.0));
    }

    #[test]
    fn bounds_ascend() {
        for bounds in [FIRST_TOKEN_S, TOKEN_S, REQUEST_S, REQUEST_TOKENS] {
            assert!(bounds.is_sorted_by(|a, b| a < b), "{bounds:?}");
        }
    }
}
