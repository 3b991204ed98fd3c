//! A token bucket: so much a minute, and after a pause as much as a minute brings at once.

use std::time::{Duration, Instant};

const MINUTE_S: f64 = 60.0;

/// What is left of an allowance. What is used up afterwards (tokens that were written) may take it below nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bucket {
    per_minute: f64,
    level: f64,
    /// When `level` was right.
    at: Instant,
}

impl Bucket {
    /// A full one.
    pub(crate) fn new(per_minute: u32, now: Instant) -> Self {
        let per_minute = f64::from(per_minute);
        Self { per_minute, level: per_minute, at: now }
    }

    /// How long it takes until `amount` is there; nothing where it is. More than a bucket holds is there once it is full.
    pub(crate) fn wait(&mut self, amount: f64, now: Instant) -> Duration {
        self.fill(now);
        let lacking = amount.min(self.per_minute) - self.level;
        Duration::from_secs_f64((lacking / self.per_minute * MINUTE_S).max(0.0))
    }

    /// Uses up `amount`, there or not.
    pub(crate) fn take(&mut self, amount: f64, now: Instant) {
        self.fill(now);
        self.level -= amount;
    }

    fn fill(&mut self, now: Instant) {
        // Threads may look at the clock in one order and come here in another.
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + elapsed * self.per_minute / MINUTE_S).min(self.per_minute);
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_by_the_minute_and_no_further() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut bucket = Bucket::new(60, start);
        let mut check = |now: f64, amount: f64, wait_s: f64| {
            let wait = bucket.wait(amount, at(now)).as_secs_f64();
            assert!((wait - wait_s).abs() < 1e-6, "{amount} at {now} s: {wait} s, not {wait_s} s");
            if wait_s == 0.0 {
                bucket.take(amount, at(now));
            }
        };
        check(0.0, 60.0, 0.0);
        check(0.0, 1.0, 1.0);
        check(0.5, 1.0, 0.5);
        check(1.0, 1.0, 0.0);
        check(1000.0, 60.0, 0.0);
        check(1000.0, 1.0, 1.0);
        // Earlier than what it knows: nothing comes of it.
        check(999.0, 1.0, 1.0);
        check(1030.0, 1000.0, 30.0);
        check(1060.0, 1000.0, 0.0);
        // That took more than there was.
        check(1060.0, 1.0, 941.0);
    }

    /// Whatever is asked for and when, in any span no more is given than the bucket holds and what it brings in that time.
    #[test]
    fn gives_no_more_than_its_rate() {
        let seed = 0x5eed_u64;
        let mut random = seed;
        let mut next = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as f64 / f64::from(1 << 31)
        };
        let start = Instant::now();
        let mut bucket = Bucket::new(120, start);
        let (mut now_s, mut given) = (0.0, Vec::new());
        for _ in 0..20_000 {
            now_s += next() * next();
            let now = start + Duration::from_secs_f64(now_s);
            let amount = (next() * 5.0).ceil().max(1.0);
            if bucket.wait(amount, now).is_zero() {
                bucket.take(amount, now);
                given.push((now_s, amount));
            }
        }
        let total: f64 = given.iter().map(|(_, amount)| amount).sum();
        assert!(total > now_s * 2.0 * 0.9, "seed {seed}: what is there is given: {total} in {now_s} s");
        for first in (0..given.len()).step_by(97) {
            let mut sum = 0.0;
            for &(at, amount) in &given[first..] {
                sum += amount;
                let allowed = 120.0 + (at - given[first].0) * 2.0;
                assert!(sum <= allowed + 1e-3, "seed {seed}: {sum} from {} to {at}", given[first].0);
            }
        }
    }
}
