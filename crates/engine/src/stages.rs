//! [`StageTimes`]: what a pipeline's stages take, and into how many passes its rows are best divided. Pure: measurements
//! in, a number out.

/// How much shorter a cycle must be for its rows to be divided further: measurements are no better than that, and more
/// passes are more work for the host.
const GAIN_MIN: f64 = 0.03;
/// Passes a stage: more only fill ways that are longer than the work.
const GROUPS_PER_STAGE: u32 = 2;

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
