//! What guessing may lose: measured, whatever was predicted.
//!
//! Guesses are chosen by predictions, of times and of tokens, and any of them may be wrong. So the time that passes took is
//! compared to what they would have taken without guesses, and to what came of these; what is lost must be earned again by
//! passes without guesses, each of which earns a small share of its time, and until then more is to be promised.

/// Passes of which guessing may lose one: its share of all time.
const EARNED_SHARE: f64 = 0.01;
/// The most that is laid by, in passes: what a text gained says nothing of the next one.
const SAVED_MAX: f64 = 1.0;
/// The most that one pass is taken to have lost: it may have been a graph that had to be built, once.
const LOSS_MAX: f64 = 4.0;
/// The most that is owed, in passes: 1,000 passes without guesses later it is forgotten.
const DEBT_MAX: f64 = 10.0;
/// Rows are to be faster by this share at least, or nothing is guessed: what is predicted of times is no better.
const GAIN_MIN: f64 = 0.02;
/// And by this much more for each pass that is owed: where much was lost, only copied text promises as much.
const GAIN_PER_DEBT: f64 = 0.05;

/// How much guesses have gained or lost of late, in passes without guesses.
#[derive(Debug)]
pub(super) struct Allowance(f64);

impl Default for Allowance {
    fn default() -> Self {
        Self(SAVED_MAX)
    }
}

impl Allowance {
    /// A pass of rows in which nothing was guessed.
    pub(super) fn earn(&mut self) {
        self.0 = (self.0 + EARNED_SHARE).min(SAVED_MAX);
    }

    /// A pass with guesses, or one that was waited for in order to guess, lost so much; or gained, where it is negative.
    pub(super) fn spend(&mut self, passes: f64) {
        if passes.is_finite() {
            self.0 = (self.0 - passes.min(LOSS_MAX)).clamp(-DEBT_MAX, SAVED_MAX);
        }
    }

    /// By which share rows are to be faster before anything is guessed for them.
    pub(super) fn gain_min(&self) -> f64 {
        GAIN_MIN + GAIN_PER_DEBT * (-self.0).max(0.0)
    }

    /// Whether something may be guessed that does not seem to pay, to see whether it does.
    pub(super) fn allows_probes(&self) -> bool {
        self.0 >= SAVED_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_to_be_earned_again() {
        let check = |losses: &[f64], passes: usize, gain_min: f64, probes: bool| {
            let mut allowance = Allowance::default();
            losses.iter().for_each(|&loss| allowance.spend(loss));
            (0..passes).for_each(|_| allowance.earn());
            let told = (allowance.gain_min(), allowance.allows_probes());
            assert!((told.0 - gain_min).abs() < 1e-6, "{losses:?} and {passes} passes: {told:?}");
            assert_eq!(told.1, probes, "{losses:?} and {passes} passes");
        };
        check(&[], 0, 0.02, true);
        check(&[0.5], 0, 0.02, false);
        check(&[0.5], 51, 0.02, true);
        check(&[3.0], 0, 0.12, false);
        check(&[3.0], 200, 0.02, false);
        check(&[3.0], 301, 0.02, true);
        check(&[3.0, -2.0], 0, 0.02, false);
        check(&[-100.0, 2.0], 0, 0.07, false);
        check(&[1000.0], 0, 0.17, false);
        check(&[1000.0; 100], 0, 0.52, false);
        check(&[f64::NAN], 0, 0.02, true);
    }
}
