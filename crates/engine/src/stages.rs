//! [`StageTimes`]: what a pipeline's stages take, and into how many passes its rows are best divided. Pure: measurements
//! in, a number out.
//!
//! A table for each stage, as it was measured at the start, follows what stages tell of passes while they serve: contexts
//! grow, machines get warm, and something else runs beside.

/// How much shorter a cycle must be for its rows to be divided further: measurements are no better than that, and more
/// passes are more work for the host.
const GAIN_MIN: f64 = 0.03;
/// Passes a stage: more only fill ways that are longer than the work.
const GROUPS_PER_STAGE: u32 = 2;
/// Of what a pass was off, how much all of its stage's table moves: what slows one pass down mostly slows all.
const ALL_SHARE: f64 = 0.1;
/// And how much the points around its rows move besides. Together a tenth remains of an error after a dozen passes, and a
/// pass that is off by chance moves little.
const NEAR_SHARE: f64 = 0.1;
/// A pass counts as off by a factor of e at most: one that was stopped in the middle says nothing.
const OFF_MAX: f64 = 1.0;

/// Measured times of a pipeline.
#[derive(Debug, Clone, PartialEq)]
pub struct StageTimes {
    /// Of each stage seconds of a pass by its rows, rising, at least one; beyond the last one they grow as between the last
    /// two.
    pub stages: Vec<Vec<(u32, f64)>>,
    /// Seconds once around, all stages' links together.
    pub links_s: f64,
}

impl StageTimes {
    /// Takes in that a pass of so many rows alone took so long in a stage.
    pub fn observe(&mut self, stage: usize, rows: u32, seconds: f64) {
        let Some(points) = self.stages.get_mut(stage) else { return };
        let expected = seconds_at(points, rows);
        if rows == 0 || !seconds.is_finite() || seconds <= 0.0 || expected <= 0.0 {
            return;
        }
        let off = (seconds / expected).ln().clamp(-OFF_MAX, OFF_MAX);
        let last = points.len() - 1;
        let after = points.partition_point(|point| point.0 < rows).min(last);
        let before = if points[after].0 <= rows { after } else { after.saturating_sub(1) };
        for (at, (_, of)) in points.iter_mut().enumerate() {
            let near = if (before..=after).contains(&at) { NEAR_SHARE } else { 0.0 };
            *of *= (off * (ALL_SHARE + near)).exp();
        }
        // More rows never take less: what was just observed counts for more than what was not.
        for at in (0..before).rev() {
            points[at].1 = points[at].1.min(points[at + 1].1);
        }
        for at in before + 1..=last {
            points[at].1 = points[at].1.max(points[at - 1].1);
        }
    }

    /// Seconds from a row's token to its next one, with `rows` rows in `groups` passes: either the slowest stage is always
    /// busy, or a row waits only for its own pass to go around, `max(m · max τ, Σ (τ + λ))`.
    pub fn cycle_s(&self, rows: u32, groups: u32) -> f64 {
        let groups = groups.max(1);
        let each = rows.div_ceil(groups).max(1);
        let (mut slowest, mut sum) = (0.0_f64, self.links_s);
        for stage in &self.stages {
            let seconds = seconds_at(stage, each);
            slowest = slowest.max(seconds);
            sum += seconds;
        }
        (f64::from(groups) * slowest).max(sum)
    }

    /// Into how many passes `rows` rows are best divided.
    pub fn groups(&self, rows: u32) -> u32 {
        let most = (GROUPS_PER_STAGE * self.stages.len() as u32).clamp(1, rows.max(1));
        (2..=most).fold(1, |best, groups| {
            let gains = self.cycle_s(rows, groups) < self.cycle_s(rows, best) * (1.0 - GAIN_MIN);
            if gains { groups } else { best }
        })
    }
}

/// On the line between the measured points around, or through the last two.
fn seconds_at(points: &[(u32, f64)], rows: u32) -> f64 {
    let (Some(&first), Some(&last)) = (points.first(), points.last()) else { return 0.0 };
    if rows <= first.0 || points.len() == 1 {
        return first.1;
    }
    let after = points.partition_point(|point| point.0 < rows).min(points.len() - 1);
    let ((low, low_s), (high, high_s)) = (points[after - 1], points[after]);
    let slope = (high_s - low_s) / f64::from(high - low);
    // More rows never take less.
    if rows > last.0 {
        last.1 + slope.max(0.0) * f64::from(rows - last.0)
    } else {
        low_s + slope * f64::from(rows - low)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stages that take `base` and `row` for each row, in milliseconds.
    fn times(stages: &[(f64, f64)], links_ms: f64) -> StageTimes {
        let table = |&(base, row): &(f64, f64)| {
            [1, 2, 4, 8, 16].map(|rows| (rows, (base + row * f64::from(rows)) / 1000.0)).to_vec()
        };
        StageTimes { stages: stages.iter().map(table).collect(), links_s: links_ms / 1000.0 }
    }

    #[test]
    fn rows_are_divided_where_that_pays() {
        let check = |what: &str, times: &StageTimes, rows: u32, groups: u32, cycle_ms: f64| {
            assert_eq!(times.groups(rows), groups, "{what}");
            let got = times.cycle_s(rows, groups) * 1000.0;
            assert!((got - cycle_ms).abs() < 1e-6, "{what}: {got} ms");
        };
        let flat = times(&[(10.0, 0.0), (10.0, 0.0)], 0.0);
        check("weights are read once for all rows, in one pass or two", &flat, 8, 1, 20.0);
        let steep = times(&[(0.0, 1.0), (0.0, 1.0)], 0.0);
        check("every row costs its own", &steep, 8, 2, 8.0);
        check("a row cannot be divided", &steep, 1, 1, 2.0);
        check("nobody is there", &steep, 0, 1, 2.0);
        check(
            "ways as long as the work hide behind more passes",
            &times(&[(0.0, 1.0), (0.0, 1.0)], 8.0),
            8,
            4,
            12.0,
        );
        check("flat, but the way is long", &times(&[(10.0, 0.0), (10.0, 0.0)], 30.0), 16, 1, 50.0);
        check("one stage does most", &times(&[(0.0, 3.0), (0.0, 1.0)], 0.0), 8, 2, 24.0);
        check("more rows than were measured", &steep, 64, 2, 64.0);
        check("between two measurements", &times(&[(1.0, 1.0), (1.0, 1.0)], 0.0), 12, 2, 14.0);
        check("a gain too small to believe", &times(&[(10.0, 0.05), (10.0, 0.05)], 0.0), 8, 1, 20.8);
    }

    /// What stages tell is believed, for rows that are seen and, less, for others.
    #[test]
    fn tables_follow_what_passes_take() {
        let mut learned = times(&[(2.0, 1.0), (2.0, 1.0)], 0.0);
        let begin = learned.clone();
        for _ in 0..40 {
            // The second stage is twice as slow as it was measured.
            learned.observe(1, 4, 0.012);
            learned.observe(1, 6, 0.016);
            learned.observe(0, 4, 0.006);
        }
        let ratio = |rows: u32, stage: usize| {
            seconds_at(&learned.stages[stage], rows) / seconds_at(&begin.stages[stage], rows)
        };
        assert!((ratio(4, 1) - 2.0).abs() < 0.05 && (ratio(6, 1) - 2.0).abs() < 0.05, "{learned:?}");
        assert!((1.3..2.1).contains(&ratio(16, 1)) && (1.3..2.1).contains(&ratio(1, 1)), "{learned:?}");
        assert_eq!(learned.stages[0], begin.stages[0]);
    }

    /// One row costs as much as eight at the start, and then it does not: more passes pay.
    #[test]
    fn what_passes_take_changes_how_rows_are_divided() {
        let mut times = times(&[(10.0, 0.0), (10.0, 0.0)], 0.0);
        assert_eq!(times.groups(8), 1);
        for _ in 0..40 {
            for stage in 0..2 {
                times.observe(stage, 8, 0.020);
                times.observe(stage, 4, 0.010);
            }
        }
        assert_eq!(times.groups(8), 2, "{times:?}");
    }

    #[test]
    fn tables_stay_in_order_whatever_is_told() {
        let mut random = 11_u64;
        let mut number = move |most: f64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 40) as f64 / (1_u64 << 24) as f64 * most
        };
        let mut times = times(&[(1.0, 1.0), (3.0, 0.1)], 0.0);
        for round in 0..2000 {
            let odd = [0.0, -1.0, f64::NAN, f64::INFINITY, 1e9, 1e-9];
            let seconds = if round % 7 == 0 { odd[number(6.0) as usize % 6] } else { number(0.1) };
            times.observe(number(3.0) as usize, number(200.0) as u32, seconds);
            for stage in &times.stages {
                assert!(stage.iter().all(|point| point.1.is_finite() && point.1 > 0.0), "{stage:?}");
                assert!(stage.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{stage:?}");
            }
        }
    }

    #[test]
    fn the_choice_is_never_worse_than_another_by_more_than_the_least_gain() {
        let mut random = 7_u64;
        let mut number = |most: f64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 40) as f64 / (1_u64 << 24) as f64 * most
        };
        for _ in 0..500 {
            let stages: Vec<_> = (0..1 + number(4.0) as usize).map(|_| (number(10.0), number(2.0))).collect();
            let times = times(&stages, number(20.0));
            let rows = 1 + number(40.0) as u32;
            let chosen = times.cycle_s(rows, times.groups(rows));
            for groups in 1..=(2 * stages.len() as u32).min(rows) {
                let other = times.cycle_s(rows, groups);
                assert!(chosen * (1.0 - GAIN_MIN) <= other + 1e-12, "{stages:?}, {rows} rows in {groups}");
            }
        }
    }
}
