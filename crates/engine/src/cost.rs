//! How long a step takes: `t = a + b·prefill tokens + c·rows + d·KV tokens attended by rows + f·KV tokens attended by
//! prompts`, and `e` if there are slices at all, in seconds, learned as it runs; rows count by a factor of their number, since products over rows go by tiles and are no
//! straight line. Tokens that are guessed ahead count as rows of their own but for attention, and may cost something else (`h`
//! each); a pass that ends before the next one is planned costs what the host does meanwhile (`g`). `e` is there because steps of rows alone may be compiled ones: without it, what a small slice makes a
//! step longer would count as the price of its tokens, and slices would stay small.
//!
//! [`CostModel`] starts from measured [`NodeRates`] and a measured table of decode steps, and is corrected by every step's
//! duration. The scheduler asks it how many prompt tokens fit into a time, routers see it as [`NodeRates`] and as a table
//! again. It owns no clock: durations come in.

use types::NodeRates;

/// Prompt tokens whose attention is counted once: they share passes over the KV, where a decode row reads its own alone.
const QUERY_TILE_TOKENS: f64 = 32.0;
/// KV tokens that a prompt token's attention is guessed to cost as much as the rest of it. Only a scale.
const PROMPT_KV_TOKENS_SCALE: f64 = 2048.0;
/// Context at which [`CostModel::rates`] describes decoding, and slice at which it describes prefill, in tokens.
const RATES_TOKENS: usize = 512;
/// KV tokens attended by rows guessed to cost as much as a decode step of one row: weights and KV are both read once, and weights
/// are as large as the KV of 10k (SmolLM2) to 40k tokens (Llama 8B at 4 bits). Only a scale, the model learns the factor.
const KV_TOKENS_SCALE: f64 = 32768.0;
/// Variance of a measured duration around the model's, relative: steps of one shape differ by about 10 %.
const NOISE: f64 = 0.01;
/// Variance of a coefficient before any measurement, in units of its seed: a seed may be wrong by its own size.
const DOUBT: f64 = 1.0;
/// Variance that every step adds, so that old measurements fade: a coefficient may drift by 1 % a step.
const DRIFT: f64 = 1e-4;
/// Where drift stops: what is not exercised (prefill, during hours of decoding) must not become arbitrary.
const DRIFT_DOUBT_MAX: f64 = 0.25;
/// A duration further off than this, relative to the prediction, is a surprise: it counts as this far off at most,
/// and only a second one in a row, in the same direction, is believed.
const SURPRISE: f64 = 0.5;
/// A believed surprise scales the whole model, by this factor at most: the machine is another than was thought.
const RESCALE_MAX: f64 = 4.0;
/// The prefill coefficient never falls below this share of its scale: a collapse would allow slices without end.
const PREFILL_SHARE_MIN: f64 = 0.01;
/// Numbers of rows up to which steps of rows alone have a factor each; those between lie on lines.
const ROWS_KNOTS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// How far a step of rows alone may be from the straight line, as a factor and its inverse.
const ROWS_FACTOR_MAX: f64 = 8.0;
/// Share of a duration's distance from the prediction that goes into its factor: the line learns faster.
const ROWS_FACTOR_GAIN: f64 = 0.05;
/// Prompt tokens that a model which saw no step yet may be asked to read in one.
const FAMILIAR_TOKENS: usize = 256;
/// Tokens that such a model may be asked to look at ahead of rows in one step.
const FAMILIAR_DRAFTS: usize = 2;
/// What of that is left after a step with slices that were smaller.
const FAMILIAR_LEFT: f64 = 0.95;
/// Part of a step that a token guessed ahead is taken to cost more than a row, at the first sight of it. Only a scale: what
/// such tokens cost is learned as soon as they do.
const DRAFT_SHARE: f64 = 0.125;
/// Of the coefficients those of a step that ends before the next one is planned, and of a token guessed ahead: of guesses.
const GUESS_COEFFICIENTS: std::ops::Range<usize> = 6..COEFFICIENTS;
/// No step is predicted to take less, in seconds: keeps relative errors finite.
const STEP_S_MIN: f64 = 1e-7;

/// What a step did, as far as its duration depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct StepShape {
    prefill_tokens: usize,
    rows: usize,
    row_kv_tokens: f64,
    prompt_kv_tokens: f64,
    /// Tokens guessed ahead.
    drafts: usize,
    /// Whether it ends before the next one is planned.
    waited: bool,
}

impl StepShape {
    /// Adds a decode row that attends to `context` tokens.
    pub(crate) fn add_row(&mut self, context: usize) {
        self.rows += 1;
        self.row_kv_tokens += context as f64;
    }

    /// Adds a slice of `tokens` prompt tokens behind `start` others.
    pub(crate) fn add_slice(&mut self, start: usize, tokens: usize) {
        self.prefill_tokens += tokens;
        self.prompt_kv_tokens += tokens as f64 / QUERY_TILE_TOKENS * (start as f64 + tokens as f64 / 2.0);
    }

    /// Adds tokens that are guessed ahead of its rows: they share these rows' passes over the KV.
    pub(crate) fn add_drafts(&mut self, tokens: usize) {
        self.drafts += tokens;
    }

    /// Notes that it ends before the next one is planned.
    pub(crate) fn wait(&mut self) {
        self.waited = true;
    }

    pub(crate) fn has_rows(self) -> bool {
        self.rows > 0
    }

    pub(crate) fn rows(self) -> usize {
        self.rows
    }

    /// Whether tokens were guessed in it, or it was waited for in order to.
    pub(crate) fn guesses(self) -> bool {
        self.drafts > 0 || self.waited
    }

    /// The same step if nobody guessed.
    pub(crate) fn plain(self) -> Self {
        Self { drafts: 0, waited: false, ..self }
    }

    pub(crate) fn has_slices(self) -> bool {
        self.prefill_tokens > 0
    }

    /// Its rows alone.
    pub(crate) fn rows_alone(self) -> Self {
        Self { prefill_tokens: 0, prompt_kv_tokens: 0.0, ..self.plain() }
    }
}

/// Coefficients: of every step, of a prompt token, of a row, of a KV token attended by rows, of a step with slices, of a KV
/// token attended by prompts, of a step that ends before the next one is planned, of a token guessed ahead (beyond a row's).
const COEFFICIENTS: usize = 8;
/// Of a coefficient the least, but for the last one (`factor_min`): nothing gains time.
const FACTOR_MIN: [f64; COEFFICIENTS] = [0.0, PREFILL_SHARE_MIN, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];

/// The step-time model: a Kalman filter over its coefficients, on relative errors so that long and short steps count
/// alike. Coefficients are kept as multiples of a scale, which begins as the seed.
#[derive(Debug, Clone)]
pub(crate) struct CostModel {
    scale: [f64; COEFFICIENTS],
    factor: [f64; COEFFICIENTS],
    covariance: [[f64; COEFFICIENTS]; COEFFICIENTS],
    /// Sign of the last duration's error where it was a surprise, else 0: of steps without guesses, and with.
    surprise: [f64; 2],
    /// Of steps of rows alone, by [`ROWS_KNOTS`].
    rows_factor: [f64; ROWS_KNOTS.len()],
    /// Prompt tokens of the largest steps seen of late.
    familiar_tokens: f64,
    /// Most tokens that were guessed in a step.
    familiar_drafts: usize,
}

impl CostModel {
    /// A model that predicts what `rates` say, and `table` (rows, seconds) of steps of rows alone; a rate that is not a
    /// positive number is replaced by `fallback`'s.
    pub(crate) fn new(rates: &NodeRates, table: &[(u32, f32)], fallback: &NodeRates) -> Self {
        let sane = |value: f32, other: f32| {
            f64::from(if value.is_finite() && value > 0.0 { value } else { other }).max(STEP_S_MIN)
        };
        let prefill_s = 1.0 / sane(rates.prefill_tokens_per_s, fallback.prefill_tokens_per_s);
        let step_s = sane(rates.decode_step_s, fallback.decode_step_s);
        let row_s = sane(rates.decode_row_s, step_s as f32 / 100.0).min(step_s);
        let mut cost = Self {
            scale: [
                step_s,
                prefill_s,
                row_s,
                step_s / KV_TOKENS_SCALE,
                step_s,
                prefill_s * QUERY_TILE_TOKENS / PROMPT_KV_TOKENS_SCALE,
                step_s,
                step_s * DRAFT_SHARE,
            ],
            factor: [(1.0 - row_s / step_s).max(0.1), 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            covariance: doubt(),
            surprise: [0.0; 2],
            rows_factor: [1.0; ROWS_KNOTS.len()],
            familiar_tokens: FAMILIAR_TOKENS as f64,
            familiar_drafts: FAMILIAR_DRAFTS,
        };
        // While all factors are 1, the line.
        let line = |rows: u32| cost.seconds(StepShape { rows: rows as usize, ..StepShape::default() });
        let factors = ROWS_KNOTS.map(|knot| {
            // A table that ends early says of more rows what it says of its last ones.
            let measured = table.iter().min_by_key(|(rows, _)| rows.abs_diff(knot as u32));
            let factor = measured.map_or(1.0, |&(rows, seconds)| f64::from(seconds) / line(rows));
            if factor.is_finite() { factor.clamp(1.0 / ROWS_FACTOR_MAX, ROWS_FACTOR_MAX) } else { 1.0 }
        });
        cost.rows_factor = factors;
        cost
    }

    /// Seconds that a step of this shape is expected to take.
    pub(crate) fn seconds(&self, shape: StepShape) -> f64 {
        let features = self.features(shape);
        let sum: f64 = (0..COEFFICIENTS).map(|i| self.scale[i] * self.factor[i] * features[i]).sum();
        sum.max(STEP_S_MIN)
    }

    /// Seconds of a decode step with `rows` rows of usual length.
    pub(crate) fn decode_seconds(&self, rows: usize) -> f64 {
        let mut shape = StepShape::default();
        (0..rows).for_each(|_| shape.add_row(RATES_TOKENS));
        self.seconds(shape)
    }

    /// What the coefficients are multiplied with: for its rows, as if there were nothing else, by their number's factor.
    fn features(&self, shape: StepShape) -> [f64; COEFFICIENTS] {
        let rows = shape.rows + shape.drafts;
        let more = if shape.has_rows() {
            let (low, high, share) = knots_of(rows);
            self.rows_factor[low] * (1.0 - share) + self.rows_factor[high] * share - 1.0
        } else {
            0.0
        };
        let rows = rows as f64;
        [
            1.0 + more,
            shape.prefill_tokens as f64,
            rows + more * rows,
            shape.row_kv_tokens * (1.0 + more),
            f64::from(shape.prefill_tokens > 0),
            shape.prompt_kv_tokens,
            f64::from(shape.waited),
            shape.drafts as f64,
        ]
    }

    /// Seconds that having slices at all adds to a step.
    pub(crate) fn first_slice_seconds(&self) -> f64 {
        self.coefficient(4)
    }

    /// Seconds that a slice of `tokens` behind `start` tokens adds to a step that has slices.
    pub(crate) fn slice_seconds(&self, start: usize, tokens: usize) -> f64 {
        let mut shape = StepShape::default();
        shape.add_slice(start, tokens);
        self.coefficient(1) * shape.prefill_tokens as f64 + self.coefficient(5) * shape.prompt_kv_tokens
    }

    /// Most prompt tokens behind `start` tokens that `room_s` seconds more allow: [`Self::slice_seconds`], solved for them.
    pub(crate) fn slice_tokens(&self, room_s: f64, start: usize) -> usize {
        if room_s <= 0.0 {
            return 0;
        }
        let quadratic = self.coefficient(5) / QUERY_TILE_TOKENS / 2.0;
        let linear = self.coefficient(1) + self.coefficient(5) / QUERY_TILE_TOKENS * start as f64;
        // The form of the root that stays exact where `quadratic` is near or at 0.
        (2.0 * room_s / (linear + (linear * linear + 4.0 * quadratic * room_s).sqrt())) as usize
    }

    /// Most prompt tokens that a step should have, whatever is predicted: twice what steps had of late. What a small slice
    /// costs says little of a large one, and a prediction that is wrong by much would stop every row for seconds.
    pub(crate) fn trusted_tokens(&self) -> usize {
        (2.0 * self.familiar_tokens) as usize
    }

    /// Most tokens that should be guessed in a step, whatever is predicted: twice what there were before.
    pub(crate) fn trusted_drafts(&self) -> usize {
        2 * self.familiar_drafts
    }

    /// Learns from a step that took `seconds`.
    pub(crate) fn observe(&mut self, shape: StepShape, seconds: f64) {
        if !seconds.is_finite() || seconds <= 0.0 {
            return;
        }
        if shape.prefill_tokens > 0 {
            self.familiar_tokens = (self.familiar_tokens * FAMILIAR_LEFT).max(shape.prefill_tokens as f64);
        }
        self.familiar_drafts = self.familiar_drafts.max(shape.drafts);
        let expected = self.seconds(shape);
        let error = seconds / expected - 1.0;
        let surprise = if error.abs() > SURPRISE { error.signum() } else { 0.0 };
        let guesses = shape.guesses();
        let before = &mut self.surprise[usize::from(guesses)];
        let believed = surprise != 0.0 && surprise == *before;
        *before = if believed { 0.0 } else { surprise };
        let mut error = error.clamp(-SURPRISE, SURPRISE);
        if believed {
            let ratio = (seconds / expected).clamp(1.0 / RESCALE_MAX, RESCALE_MAX);
            if !guesses {
                self.scale = self.scale.map(|scale| scale * ratio);
                self.covariance = doubt();
                // What seemed to be the guesses' fault may have been the machine's.
                self.factor[GUESS_COEFFICIENTS].fill(0.0);
                return;
            }
            self.doubt_guesses();
            error = ratio - 1.0;
        }
        let mut features = self.features(shape);
        if guesses {
            // What steps without guesses take is learned of those: else what is wrong of guesses would seem to be wrong of
            // all steps, and guesses to cost nothing.
            features[..GUESS_COEFFICIENTS.start].fill(0.0);
        }
        let h: [f64; COEFFICIENTS] = std::array::from_fn(|i| self.scale[i] * features[i] / expected);
        let mut ph: [f64; COEFFICIENTS] =
            std::array::from_fn(|i| (0..COEFFICIENTS).map(|j| self.covariance[i][j] * h[j]).sum());
        if guesses {
            ph[..GUESS_COEFFICIENTS.start].fill(0.0);
        }
        let variance = NOISE + (0..COEFFICIENTS).map(|i| h[i] * ph[i]).sum::<f64>();
        if shape.prefill_tokens == 0 && !guesses && shape.has_rows() {
            // As long as the line is in doubt, what is off is its fault.
            let gain = ROWS_FACTOR_GAIN * NOISE / variance;
            let (low, high, share) = knots_of(shape.rows);
            for (knot, weight) in [(low, 1.0 - share), (high, share)] {
                let factor = self.rows_factor[knot] * (1.0 + gain * weight * error);
                self.rows_factor[knot] = factor.clamp(1.0 / ROWS_FACTOR_MAX, ROWS_FACTOR_MAX);
            }
        }
        for i in 0..COEFFICIENTS {
            self.factor[i] = (self.factor[i] + ph[i] / variance * error).max(self.factor_min(i));
            for j in 0..COEFFICIENTS {
                self.covariance[i][j] -= ph[i] * ph[j] / variance;
            }
        }
        for i in 0..COEFFICIENTS {
            // Rounding must not make a variance negative.
            self.covariance[i][i] = self.covariance[i][i].max(DRIFT);
            if self.covariance[i][i] < DRIFT_DOUBT_MAX {
                self.covariance[i][i] += DRIFT;
            }
        }
    }

    /// The model as routers see it.
    pub(crate) fn rates(&self) -> NodeRates {
        let mut prefill = StepShape::default();
        prefill.add_slice(0, RATES_TOKENS);
        let mut decode = StepShape::default();
        decode.add_row(RATES_TOKENS);
        let one_row = self.seconds(decode);
        decode.add_row(RATES_TOKENS);
        NodeRates {
            prefill_tokens_per_s: (RATES_TOKENS as f64 / self.seconds(prefill)) as f32,
            decode_step_s: one_row as f32,
            decode_row_s: (self.seconds(decode) - one_row).max(0.0) as f32,
        }
    }

    /// What guesses cost is as uncertain as at the beginning.
    fn doubt_guesses(&mut self) {
        for i in GUESS_COEFFICIENTS {
            for j in 0..COEFFICIENTS {
                (self.covariance[i][j], self.covariance[j][i]) = (0.0, 0.0);
            }
            self.covariance[i][i] = DOUBT;
        }
    }

    fn factor_min(&self, index: usize) -> f64 {
        // A token guessed ahead counts as a row besides, and may make up for that at most.
        if index == 7 { -self.coefficient(2) / self.scale[7] } else { FACTOR_MIN[index] }
    }

    fn coefficient(&self, index: usize) -> f64 {
        self.scale[index] * self.factor[index]
    }
}

/// The two [`ROWS_KNOTS`] around a number of rows, and the share of the second.
fn knots_of(rows: usize) -> (usize, usize, f64) {
    let high = ROWS_KNOTS.iter().position(|&knot| knot >= rows).unwrap_or(ROWS_KNOTS.len() - 1);
    let low = high.saturating_sub(1);
    let (from, to) = (ROWS_KNOTS[low] as f64, ROWS_KNOTS[high] as f64);
    let share = if high == low { 0.0 } else { ((rows as f64 - from) / (to - from)).min(1.0) };
    (low, high, share)
}

fn doubt() -> [[f64; COEFFICIENTS]; COEFFICIENTS] {
    std::array::from_fn(|i| std::array::from_fn(|j| if i == j { DOUBT } else { 0.0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: NodeRates =
        NodeRates { prefill_tokens_per_s: 1000.0, decode_step_s: 0.02, decode_row_s: 0.002 };

    /// A machine with known coefficients, and a reproducible mix of steps on it.
    struct Machine {
        coefficients: [f64; COEFFICIENTS],
        random: u64,
    }

    impl Machine {
        fn random(&mut self, below: usize) -> usize {
            self.random =
                self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.random >> 33) as usize % below
        }

        fn shape(&mut self, prefills: bool) -> StepShape {
            let mut shape = StepShape::default();
            for _ in 0..1 + self.random(16) {
                shape.add_row(self.random(4096));
            }
            if self.random(3) == 0 {
                shape.add_drafts(self.random(16));
                shape.wait();
            }
            if prefills && self.random(2) == 0 {
                let (start, tokens) = (self.random(4096), 64 + self.random(1024));
                shape.add_slice(start, tokens);
            }
            shape
        }

        fn seconds(&mut self, shape: StepShape) -> f64 {
            let features = features(shape);
            let exact: f64 = (0..COEFFICIENTS).map(|i| self.coefficients[i] * features[i]).sum();
            exact * (0.95 + 0.1 * self.random(1000) as f64 / 1000.0)
        }

        fn teach(&mut self, cost: &mut CostModel, steps: usize, prefills: bool) {
            for _ in 0..steps {
                let shape = self.shape(prefills);
                let seconds = self.seconds(shape);
                cost.observe(shape, seconds);
            }
        }

        /// Largest relative error over steps not learned from.
        fn error_max(&mut self, cost: &CostModel) -> f64 {
            let errors = (0..200).map(|_| {
                let shape = self.shape(true);
                (cost.seconds(shape) / self.seconds(shape) - 1.0).abs()
            });
            errors.collect::<Vec<_>>().into_iter().fold(0.0, f64::max)
        }
    }

    fn features(shape: StepShape) -> [f64; COEFFICIENTS] {
        let slices = f64::from(shape.prefill_tokens > 0);
        let (prompt, rows) = (shape.prefill_tokens as f64, shape.rows as f64);
        let (waited, drafts) = (f64::from(shape.waited), shape.drafts as f64);
        [1.0, prompt, rows + drafts, shape.row_kv_tokens, slices, shape.prompt_kv_tokens, waited, drafts]
    }

    fn machine(coefficients: [f64; COEFFICIENTS]) -> Machine {
        Machine { coefficients, random: 7 }
    }

    #[test]
    fn learns_machines_unlike_its_seed() {
        let check = |coefficients: [f64; COEFFICIENTS]| {
            let mut cost = CostModel::new(&SEED, &[], &SEED);
            let mut machine = machine(coefficients);
            machine.teach(&mut cost, 400, true);
            let error = machine.error_max(&cost);
            assert!(error < 0.25, "{coefficients:?} is predicted with an error of {error}: {cost:?}");
        };
        check([0.02, 0.001, 0.002, 1e-6, 0.0, 1e-6, 0.0, 0.0]);
        check([0.2, 0.02, 0.02, 1e-5, 0.0, 1e-5, 0.0, 0.0]);
        check([0.001, 0.00002, 0.00001, 1e-8, 0.0, 1e-8, 0.0, 0.0]);
        check([0.0, 0.001, 0.05, 0.0, 0.0, 0.0, 0.0, 0.0]);
        check([2.0, 0.1, 0.2, 1e-4, 0.0, 1e-4, 0.0, 0.0]);
        // Where the host takes as long as the device, and tokens guessed ahead half as much as rows.
        check([0.02, 0.001, 0.002, 1e-6, 0.0, 1e-6, 0.02, -0.001]);
        // Where a step with slices is another kind of step.
        check([0.002, 0.000_01, 0.0001, 1e-8, 0.004, 1e-8, 0.0, 0.0]);
    }

    #[test]
    fn one_outlier_is_not_believed_and_a_slower_machine_is() {
        let mut cost = CostModel::new(&SEED, &[], &SEED);
        let mut fast = machine([0.02, 0.001, 0.002, 1e-6, 0.0, 1e-6, 0.0, 0.0]);
        fast.teach(&mut cost, 400, true);
        let shape = fast.shape(true);
        let before = cost.seconds(shape);
        cost.observe(shape, 100.0 * before);
        assert!(cost.seconds(shape) < 1.3 * before, "{before} became {}", cost.seconds(shape));
        let mut slow = machine([0.06, 0.003, 0.006, 3e-6, 0.0, 3e-6, 0.0, 0.0]);
        slow.teach(&mut cost, 50, true);
        assert!(slow.error_max(&cost) < 0.4, "{cost:?}");
    }

    #[test]
    fn dear_guesses_say_nothing_of_other_steps() {
        let mut cost = CostModel::new(&SEED, &[], &SEED);
        machine([0.02, 0.001, 0.002, 1e-6, 0.0, 1e-6, 0.0, 0.0]).teach(&mut cost, 400, true);
        for rows in [1, 4, 16] {
            let plain = StepShape { rows, ..StepShape::default() };
            let guessing = StepShape { drafts: 3 * rows, waited: true, ..plain };
            let before = cost.seconds(plain);
            let seconds = 5.0 * before;
            (0..8).for_each(|_| cost.observe(guessing, seconds));
            let (other, own) = (cost.seconds(plain) / before, cost.seconds(guessing) / seconds);
            assert!((other - 1.0).abs() < 1e-9, "{rows} rows seem to take {other} times as long");
            assert!((own - 1.0).abs() < 0.2, "{rows} rows with guesses are off by a factor of {own}");
        }
    }

    #[test]
    fn decoding_for_hours_keeps_what_is_known_of_prefill() {
        let mut cost = CostModel::new(&SEED, &[], &SEED);
        let mut machine = machine([0.02, 0.001, 0.002, 1e-6, 0.0, 1e-6, 0.0, 0.0]);
        machine.teach(&mut cost, 400, true);
        machine.teach(&mut cost, 100_000, false);
        assert!(machine.error_max(&cost) < 0.25, "{cost:?}");
        assert!(cost.covariance.iter().flatten().all(|value| value.is_finite()));
    }

    #[test]
    fn a_measured_table_and_steps_that_go_by_tiles_are_followed() {
        // 8 rows cost as much as 1, 16 twice as much.
        let table = [(1, 0.02), (8, 0.02), (16, 0.04), (32, 0.08)];
        let rates = NodeRates { decode_row_s: 0.0002, ..SEED };
        let mut cost = CostModel::new(&rates, &table, &SEED);
        let shape = |rows: usize| StepShape { rows, ..StepShape::default() };
        for (rows, seconds) in table {
            let error = cost.seconds(shape(rows as usize)) / f64::from(seconds) - 1.0;
            assert!(error.abs() < 0.01, "{rows} rows are off by {error}");
        }
        for round in 0..400 {
            let (rows, seconds) = [(8, 0.03), (16, 0.03), (32, 0.1)][round % 3];
            cost.observe(shape(rows), seconds);
        }
        for (rows, seconds) in [(8, 0.03), (16, 0.03), (32, 0.1)] {
            let error = cost.seconds(shape(rows)) / seconds - 1.0;
            assert!(error.abs() < 0.1, "{rows} rows are off by {error}");
        }
    }

    #[test]
    fn slices_fill_their_time_and_never_more() {
        let mut cost = CostModel::new(&SEED, &[], &SEED);
        machine([0.02, 0.001, 0.002, 1e-5, 0.0, 1e-5, 0.0, 0.0]).teach(&mut cost, 400, true);
        for room_s in [-1.0, 0.0, 0.01, 0.1, 1.0, 10.0] {
            for start in [0, 100, 32_000] {
                let tokens = cost.slice_tokens(room_s, start);
                assert!(tokens == 0 || cost.slice_seconds(start, tokens) <= room_s, "{tokens} in {room_s} s");
                assert!(cost.slice_seconds(start, tokens + 1) > room_s, "{tokens} in {room_s} s");
            }
        }
    }

    #[test]
    fn rates_survive_a_round_trip_and_nonsense_is_replaced() {
        let check = |rates: NodeRates| {
            let got = CostModel::new(&rates, &[], &SEED).rates();
            assert!((got.decode_step_s / SEED.decode_step_s - 1.0).abs() < 0.01, "{got:?}");
            assert!((got.prefill_tokens_per_s / SEED.prefill_tokens_per_s - 1.0).abs() < 0.1, "{got:?}");
            assert!(got.decode_row_s > 0.0, "{got:?}");
        };
        check(SEED);
        check(NodeRates { prefill_tokens_per_s: 0.0, decode_step_s: f32::NAN, decode_row_s: -1.0 });
    }
}
