//! What drafts are worth: how likely tokens come true, learned as it runs, and how many of them pay.

use types::DraftOrigin;

/// Tokens before a draft that speak for it, up to which drafts count as alike.
const CLASS_ENDS: [usize; 8] = [1, 2, 3, 5, 8, 12, 20, 31];
/// How likely a token of each class is taken to come true before any was seen.
const PRIOR: [f64; CLASS_ENDS.len() + 1] = [0.3, 0.3, 0.45, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95];
/// Tokens as which that counts.
const PRIOR_WEIGHT: f64 = 8.0;
/// What is left of a count with each further token of its class: a thousand tokens say how it is now.
const KEPT: f64 = 0.999;
/// Tokens that a row counts as if they had come true as often as elsewhere, before it is another kind of text.
const ROW_WEIGHT: f64 = 3.0;
/// What is left of a row's counts with each of its drafts: a text changes.
const ROW_KEPT: f64 = 0.9;
/// By how much a row's tokens may come true more often than elsewhere.
const ROW_FACTOR_MAX: f64 = 1.5;
/// Nothing is more certain.
const CERTAINTY_MAX: f64 = 0.98;
/// How much longer a pass may take for rows that guess nothing.
const OTHERS_SLOWER_MAX: f64 = 1.05;

/// How often tokens came true, by their origin and what spoke for them.
#[derive(Debug, Default)]
pub(super) struct Acceptance {
    counts: [[Count; PRIOR.len()]; DraftOrigin::ALL.len()],
}

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    accepted: f64,
    tried: f64,
}

impl Acceptance {
    /// How likely a token comes true if those before it did, of which `matched` speak for it.
    pub(super) fn probability(&self, origin: DraftOrigin, matched: usize) -> f64 {
        let class = class_of(matched);
        let Count { accepted, tried } = self.counts[origin as usize][class];
        (accepted + PRIOR_WEIGHT * PRIOR[class]) / (tried + PRIOR_WEIGHT)
    }

    /// Learns that of `offered` tokens the first `accepted` came true.
    pub(super) fn learn(&mut self, origin: DraftOrigin, matched: usize, offered: usize, accepted: usize) {
        for at in 0..offered.min(accepted + 1) {
            let count = &mut self.counts[origin as usize][class_of(matched + at)];
            count.accepted = count.accepted * KEPT + f64::from(at < accepted);
            count.tried = count.tried * KEPT + 1.0;
        }
    }
}

fn class_of(matched: usize) -> usize {
    CLASS_ENDS.iter().position(|&end| matched <= end).unwrap_or(CLASS_ENDS.len())
}

/// How a row's tokens come true compared to what is expected of such.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RowRecord {
    accepted: f64,
    expected: f64,
}

impl RowRecord {
    /// By how much more often.
    pub(super) fn factor(self) -> f64 {
        ((self.accepted + ROW_WEIGHT) / (self.expected + ROW_WEIGHT)).min(ROW_FACTOR_MAX)
    }

    /// Learns that of a draft with these probabilities, each if those before came true, the first `accepted` did.
    pub(super) fn learn(&mut self, probabilities: impl Iterator<Item = f64>, accepted: usize) {
        self.accepted = self.accepted * ROW_KEPT + accepted as f64;
        self.expected = self.expected * ROW_KEPT + probabilities.take(accepted + 1).sum::<f64>();
    }
}

/// How likely each token of a draft comes true with all before it: `of(at)` says it of a single one.
pub(super) fn chances(tokens: usize, factor: f64, of: impl Fn(usize) -> f64) -> Vec<f64> {
    let step = |chance: &mut f64, at: usize| {
        *chance *= (of(at) * factor).min(CERTAINTY_MAX);
        Some(*chance)
    };
    (0..tokens).scan(1.0, step).collect()
}

/// How many tokens of each row's draft make the rows fastest, by the chances of these; none where they would not be by
/// `gain_min`, as a share.
///
/// The sum of the logarithms of all rows' speeds is what counts (proportional fairness): a row may gain at the cost of
/// others, but what it gains as a share must be more than what they lose. `others` guess nothing and only lose.
/// `seconds(n)` is how long a pass with `n` tokens guessed takes, `plain_s` how long one without any. Adapted from TurboSpec
/// (arXiv 2406.14066), whose goodput is the sum of the speeds.
pub(super) fn choose(
    rows: &[&[f64]],
    others: usize,
    most: usize,
    gain_min: f64,
    plain_s: f64,
    seconds: impl Fn(usize) -> f64,
) -> Vec<usize> {
    let all = (rows.len() + others) as f64;
    let mut taken = vec![0; rows.len()];
    // Tokens expected of each row, and the most worthwhile choice so far.
    let mut expected = vec![1.0_f64; rows.len()];
    let (mut gain, mut best, mut most_gained) = (0.0, taken.clone(), gain_min * all);
    for count in 1..=most {
        let next = |row: usize| Some((row, (1.0 + rows[row].get(taken[row])? / expected[row]).ln()));
        let Some((row, more)) = (0..rows.len()).filter_map(next).max_by(|a, b| a.1.total_cmp(&b.1)) else {
            break;
        };
        expected[row] += rows[row][taken[row]];
        taken[row] += 1;
        gain += more;
        let slower = seconds(count) / plain_s;
        let idle = others + taken.iter().filter(|&&tokens| tokens == 0).count();
        let net = gain - all * slower.ln();
        if net > most_gained && (idle == 0 || slower <= OTHERS_SLOWER_MAX) {
            most_gained = net;
            best.clone_from(&taken);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_guessed_as_make_rows_faster() {
        let check = |what: &str,
                     rows: &[&[f64]],
                     others: usize,
                     seconds: &dyn Fn(usize) -> f64,
                     expected: &[usize]| {
            assert_eq!(choose(rows, others, 64, 0.02, 1.0, seconds), expected, "{what}");
        };
        let likely = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2];
        let flat = |_: usize| 1.0;
        let steep = |count: usize| 1.0 + count as f64;
        check("nothing known", &[], 3, &flat, &[]);
        check("for nothing", &[&likely], 0, &flat, &[8]);
        check("dear", &[&likely], 0, &steep, &[0]);
        check("a wait, then cheap", &[&likely], 0, &|n| 1.3 + 0.05 * n as f64, &[8]);
        check("a tenth each: while a token is worth that", &[&likely], 0, &|n| 1.0 + 0.1 * n as f64, &[6]);
        check("a wait longer than what is gained", &[&[0.2]], 0, &|_| 1.3, &[0]);
        // Up to four tokens are free.
        let tile = |count: usize| if count <= 4 { 1.02 } else { 3.0 };
        check("a full tile", &[&likely], 0, &tile, &[4]);
        check("its rows go to the likeliest", &[&likely, &[0.1, 0.05], &likely], 0, &tile, &[2, 0, 2]);
        check("others may lose little", &[&likely], 3, &tile, &[4]);
        check("but not this much", &[&likely], 3, &|n| 1.0 + 0.06 * n as f64, &[0]);
        check("nor for a row that gains less than they lose", &[&[0.3]], 30, &|_| 1.02, &[0]);
    }

    #[test]
    fn what_is_seen_counts_more_than_what_was_thought() {
        let origin = DraftOrigin::Context;
        let mut acceptance = Acceptance::default();
        assert!((acceptance.probability(origin, 2) - PRIOR[1]).abs() < 1e-9);
        for _ in 0..200 {
            acceptance.learn(origin, 2, 4, 0);
            acceptance.learn(origin, 9, 2, 2);
        }
        assert!(acceptance.probability(origin, 2) < 0.05);
        assert!(acceptance.probability(origin, 9) > 0.98);
        // Tokens behind one that did not come true say nothing.
        assert!((acceptance.probability(origin, 3) - PRIOR[2]).abs() < 1e-9);
        assert!((acceptance.probability(DraftOrigin::Answers, 2) - PRIOR[1]).abs() < 1e-9);

        let mut row = RowRecord::default();
        assert!((row.factor() - 1.0).abs() < 1e-9);
        (0..20).for_each(|_| row.learn([0.5, 0.5].into_iter(), 0));
        assert!(row.factor() < 0.5, "{row:?}");
        (0..20).for_each(|_| row.learn([0.5, 0.5].into_iter(), 2));
        assert!(row.factor() > 1.2, "{row:?}");
        assert_eq!(chances(3, 1.0, |_| 0.5), [0.5, 0.25, 0.125]);
    }
}
