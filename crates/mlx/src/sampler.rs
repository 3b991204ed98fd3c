//! Draws one token for each row of `[rows, vocabulary]` logits, every row by its own parameters, in one graph.
//!
//! A row's token depends on nothing but its logits, its parameters and its position: the random number is keyed by
//! (seed, position), and the token is where that number falls in the row's cumulative distribution. Greedy rows take
//! the largest logit and never meet a random number.
//!
//! Our own operations for CPUs and GPUs draw on the device, so that nobody waits for the token ([`Draws`]); there a
//! row's last token may itself be one that the host does not know yet. [`sample`] does the same in MLX's operations, and
//! waits for the result.

use crate::{
    kernels,
    layers::{Path, Wanted},
    native,
};
use engine::RowSampling;
use mlx_rs::{
    Array, Dtype,
    error::Result,
    ops::{
        cumsum, exp, ge, gt, indexing::argmax_axis, logical_and, logsumexp_axis, lt, partition_axis, select,
        sort_axis,
    },
};
use std::collections::BTreeMap;
use types::TokenId;

/// Most probable tokens that top-k, top-p and min-p look at first. A row whose cut lies further down (a flat
/// distribution, a large top_k) is drawn again from a full sort.
const CANDIDATES: i32 = 1024;

/// Numbers of a row in [`Draws::rows`].
const DRAW_NUMBERS: usize = 9;
/// Numbers of a changed token in [`Draws::changes`].
const CHANGE_NUMBERS: usize = 4;

/// How every row draws, as our own operations read it (`cpp/native.cpp`, `gpu/sample.h`).
#[derive(Debug)]
pub(crate) struct Draws {
    /// `[rows, 9]`: index of the row's late token or -1, temperature (0: greedy), top_p, min_p, top_k (0: all), uniform
    /// number, repetition, presence and frequency penalty; floats by their bits.
    pub(crate) rows: Array,
    /// `[rows, 4 n]`: token (-1: none), factor, offset, and whether repetition (1) and presence (2) are in them.
    pub(crate) changes: Array,
}

impl Draws {
    /// `late`: for each row the index, among the tokens given to [`draw_on_device`], of an output token that the host
    /// does not know yet. Rows are filled up to `count`.
    pub(crate) fn new(
        rows: &[RowSampling<'_>],
        late: &[Option<usize>],
        count: usize,
        vocabulary: u32,
    ) -> Self {
        let mut numbers = Vec::with_capacity(count * DRAW_NUMBERS);
        for (row, late) in rows.iter().zip(late) {
            let params = row.params;
            let late = late.filter(|_| params.has_penalties()).map_or(-1, |index| index as i32);
            let bits = |number: f32| number.to_bits() as i32;
            numbers.extend([
                late,
                bits(params.temperature),
                bits(params.top_p),
                bits(params.min_p),
                i32::try_from(params.top_k).unwrap_or(i32::MAX),
                bits(params.uniform(row.position)),
                bits(params.repetition_penalty),
                bits(params.presence_penalty),
                bits(params.frequency_penalty),
            ]);
        }
        let mut unused = [0; DRAW_NUMBERS];
        unused[0] = -1;
        for _ in rows.len()..count {
            numbers.extend(unused);
        }
        let changed = |row: &RowSampling<'_>| match row.params.has_penalties() {
            true => Change::of_row(row, vocabulary),
            false => BTreeMap::new(),
        };
        let changed: Vec<_> = rows.iter().map(changed).collect();
        let width = changed.iter().map(BTreeMap::len).max().unwrap_or(0).next_power_of_two();
        let mut changes = Vec::with_capacity(count * width * CHANGE_NUMBERS);
        for row in &changed {
            let entry = |(&token, change): (&TokenId, &Change)| {
                [token as i32, change.factor.to_bits() as i32, change.offset.to_bits() as i32, change.seen]
            };
            let none = [-1, 0, 0, 0];
            changes.extend(row.iter().map(entry).chain(std::iter::repeat(none)).take(width).flatten());
        }
        changes.resize(count * width * CHANGE_NUMBERS, -1);
        let shape = |each: usize| [count as i32, each as i32];
        Self {
            rows: Array::from_slice(&numbers, &shape(DRAW_NUMBERS)),
            changes: Array::from_slice(&changes, &shape(width * CHANGE_NUMBERS)),
        }
    }
}

/// Draws each row's token on the device, `[rows]` as i32, by our own operations. `late [m]`: tokens as i32.
pub(crate) fn draw_on_device(logits: &Array, draws: &Draws, late: &Array, path: Path) -> Result<Array> {
    if path == Path::Kernel {
        return kernels::sample(logits, &draws.rows, &draws.changes, late);
    }
    native::sample(logits, &draws.rows, &draws.changes, late)
}

/// Draws each row's token, in MLX's operations.
pub(crate) fn sample(logits: &Array, rows: &[RowSampling<'_>]) -> Result<Vec<TokenId>> {
    let logits =
        if logits.dtype() == Dtype::Float32 { logits.clone() } else { logits.as_dtype(Dtype::Float32)? };
    let logits = penalize(&logits, rows)?;
    let greedy = argmax_axis(&logits, -1, false)?;
    let drawn: Vec<i32> =
        (0..rows.len() as i32).filter(|&row| !rows[row as usize].params.is_greedy()).collect();
    if drawn.is_empty() {
        return Ok(greedy.as_slice::<u32>().to_vec());
    }
    let subset: Vec<_> = drawn.iter().map(|&row| rows[row as usize]).collect();
    let (tokens, uncovered) = draw(&Wanted::Rows(&drawn).of(&logits)?, &subset, CANDIDATES)?;
    let mut evaluate = vec![&greedy, &tokens];
    evaluate.extend(&uncovered);
    mlx_rs::transforms::eval(evaluate)?;
    let mut result = greedy.as_slice::<u32>().to_vec();
    for (&row, &token) in drawn.iter().zip(tokens.as_slice::<u32>()) {
        result[row as usize] = token;
    }
    if let Some(uncovered) = uncovered {
        let again = drawn.iter().zip(uncovered.as_slice::<bool>()).filter(|(_, uncovered)| **uncovered);
        let again: Vec<i32> = again.map(|(&row, _)| row).collect();
        if !again.is_empty() {
            let subset: Vec<_> = again.iter().map(|&row| rows[row as usize]).collect();
            let (tokens, _) = draw(&Wanted::Rows(&again).of(&logits)?, &subset, logits.dim(-1))?;
            tokens.eval()?;
            for (&row, &token) in again.iter().zip(tokens.as_slice::<u32>()) {
                result[row as usize] = token;
            }
        }
    }
    Ok(result)
}

/// Tokens `[n]`, and `[n]` flags of rows whose cut lies below the `candidates` most probable tokens.
fn draw(logits: &Array, rows: &[RowSampling<'_>], candidates: i32) -> Result<(Array, Option<Array>)> {
    let column = |value: &dyn Fn(&RowSampling<'_>) -> f32| column(rows, value);
    let scaled = logits.divide(column(&|row| row.params.temperature))?;
    let (kept, uncovered) = if rows.iter().any(|row| row.params.truncates()) {
        let (threshold, uncovered) = threshold(&scaled, rows, candidates)?;
        let dropped = Array::from_f32(f32::NEG_INFINITY);
        (select(lt(&scaled, threshold)?, dropped, &scaled)?, Some(uncovered))
    } else {
        (scaled, None)
    };
    let weights = exp(kept.subtract(kept.max_axis(-1, true)?)?)?;
    let cumulative = cumsum(&weights, -1, false, true)?;
    let total = crate::raw::slice(&cumulative, &[0, cumulative.dim(1) - 1], cumulative.shape())?;
    // A little below the total, so that rounding cannot carry the target past the last kept token.
    let target = total.multiply(column(&|row| row.params.uniform(row.position) * (1.0 - 1e-6)))?;
    // A parallel sum may rise by a rounding at a token that was cut off; its weight says that it was.
    let drawn = logical_and(gt(&cumulative, &target)?, gt(&weights, Array::from_f32(0.0))?)?;
    Ok((argmax_axis(drawn, -1, false)?, uncovered))
}

/// The smallest scaled logit `[n, 1]` that each row keeps, and `[n]` flags of rows that might keep more than seen.
fn threshold(scaled: &Array, rows: &[RowSampling<'_>], candidates: i32) -> Result<(Array, Array)> {
    let vocabulary = scaled.dim(-1);
    let candidates = candidates.min(vocabulary);
    let count = rows.len() as i32;
    let column = |value: &dyn Fn(&RowSampling<'_>) -> f32| column(rows, value);
    let top = if candidates < vocabulary {
        let parted = partition_axis(scaled, vocabulary - candidates, -1)?;
        crate::raw::slice(&parted, &[0, vocabulary - candidates], &[count, vocabulary])?
    } else {
        scaled.clone()
    };
    let descending = sort_axis(top.negative()?, -1)?.negative()?;
    let probabilities = exp(descending.subtract(logsumexp_axis(scaled, -1, true)?)?)?;
    // Probability before each candidate: the first is always kept.
    let before = cumsum(&probabilities, -1, false, false)?;
    let ranks: Vec<f32> = (0..candidates).map(|rank| rank as f32).collect();
    let ranks = Array::from_slice(&ranks, &[1, candidates]);
    let top_k = column(&|row| if row.params.top_k == 0 { f32::INFINITY } else { row.params.top_k as f32 });
    // top_p of 1 keeps all, though rounding may carry the sum there early.
    let top_p = column(&|row| if row.params.top_p >= 1.0 { f32::INFINITY } else { row.params.top_p });
    let largest = crate::raw::slice(&probabilities, &[0, 0], &[count, 1])?;
    let min_p = largest.multiply(column(&|row| row.params.min_p))?;
    let kept = logical_and(lt(&before, top_p)?, lt(&ranks, top_k)?)?;
    let kept = logical_and(kept, ge(&probabilities, min_p)?)?;
    let unbounded = Array::from_f32(f32::INFINITY);
    let threshold = select(&kept, &descending, unbounded)?.min_axis(-1, true)?;
    let truncating: Vec<bool> = rows.iter().map(|row| row.params.truncates()).collect();
    let truncating = Array::from_slice(&truncating, &[count, 1]);
    let all = Array::from_f32(f32::NEG_INFINITY);
    let last = crate::raw::slice(&kept, &[0, candidates - 1], &[count, candidates])?;
    let uncovered = logical_and(last, &truncating)?.reshape(&[count])?;
    Ok((select(truncating, threshold, all)?, uncovered))
}

/// Penalties and biases, only at the tokens that they touch.
fn penalize(logits: &Array, rows: &[RowSampling<'_>]) -> Result<Array> {
    if !rows.iter().any(|row| row.params.has_penalties()) {
        return Ok(logits.clone());
    }
    let vocabulary = logits.dim(-1) as TokenId;
    let changes: Vec<_> = rows.iter().map(|row| Change::of_row(row, vocabulary)).collect();
    let width = changes.iter().map(BTreeMap::len).max().unwrap_or(0).next_power_of_two();
    let (mut tokens, mut factors, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
    for row in &changes {
        // Padding repeats an entry of the row: writing the same value twice changes nothing.
        let padding = row.iter().next().map_or((0, Change::NONE), |(&token, &change)| (token, change));
        let padded = row.iter().map(|(&token, &change)| (token, change));
        for (token, change) in padded.chain(std::iter::repeat(padding)).take(width) {
            tokens.push(token as i32);
            factors.push(change.factor);
            offsets.push(change.offset);
        }
    }
    let shape = [rows.len() as i32, width as i32];
    let tokens = Array::from_slice(&tokens, &shape);
    let factors = Array::from_slice(&factors, &shape);
    let touched = logits.take_along_axis(&tokens, -1)?;
    let positive = gt(&touched, Array::from_f32(0.0))?;
    let penalized = select(positive, touched.divide(&factors)?, touched.multiply(&factors)?)?;
    logits.put_along_axis(&tokens, penalized.add(Array::from_slice(&offsets, &shape))?, -1)
}

/// What happens to one token's logit: divided (if positive, else multiplied) by `factor`, then `offset` added.
#[derive(Debug, Clone, Copy)]
struct Change {
    factor: f32,
    offset: f32,
    /// 1: the repetition penalty is in `factor`; 2: the presence penalty is in `offset`.
    seen: i32,
}

impl Change {
    const NONE: Self = Self { factor: 1.0, offset: 0.0, seen: 0 };

    fn of_row(row: &RowSampling<'_>, vocabulary: TokenId) -> BTreeMap<TokenId, Self> {
        let params = row.params;
        let mut changes = BTreeMap::new();
        if params.repetition_penalty != 1.0 {
            for &token in row.prompt.iter().chain(row.output) {
                let change: &mut Self = changes.entry(token).or_insert(Self::NONE);
                change.factor = params.repetition_penalty;
                change.seen |= 1;
            }
        }
        if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
            let mut counts = BTreeMap::new();
            for &token in row.output {
                *counts.entry(token).or_insert(0.0_f32) += 1.0;
            }
            for (token, count) in counts {
                let change = changes.entry(token).or_insert(Self::NONE);
                change.offset -= params.presence_penalty + params.frequency_penalty * count;
                change.seen |= 2;
            }
        }
        for &(token, bias) in &params.logit_bias {
            changes.entry(token).or_insert(Self::NONE).offset += bias;
        }
        changes.retain(|&token, _| token < vocabulary);
        changes
    }
}

fn column(rows: &[RowSampling<'_>], value: &dyn Fn(&RowSampling<'_>) -> f32) -> Array {
    let values: Vec<f32> = rows.iter().map(value).collect();
    Array::from_slice(&values, &[rows.len() as i32, 1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::{SamplingDraft, SamplingParams};

    const VOCABULARY: usize = 5000;

    /// Logits of a row: a few heavy tokens and a long tail, by a fixed formula.
    fn logits(row: usize, flat: bool) -> Vec<f32> {
        let scale = if flat { 0.001 } else { 3.0 };
        (0..VOCABULARY)
            .map(|token| ((token * 7919 + row * 104_729) % 1009) as f32 / 1009.0 * scale * 2.0)
            .collect()
    }

    fn params(change: impl FnOnce(&mut SamplingDraft)) -> SamplingParams {
        let mut draft = SamplingDraft::default();
        change(&mut draft);
        SamplingParams::try_from(draft).unwrap()
    }

    fn run(rows: &[(Vec<f32>, SamplingParams, u32)]) -> Vec<TokenId> {
        let flat: Vec<f32> = rows.iter().flat_map(|row| row.0.clone()).collect();
        let logits = Array::from_slice(&flat, &[rows.len() as i32, VOCABULARY as i32]);
        let sampling: Vec<_> = rows
            .iter()
            .map(|(_, params, position)| RowSampling::plain(params, *position, &[1, 2], &[3, 3]))
            .collect();
        sample(&logits, &sampling).unwrap()
    }

    /// The tokens that a row may draw, by definition, in f64.
    fn allowed(logits: &[f32], params: &SamplingParams) -> Vec<bool> {
        let scaled: Vec<f64> = logits.iter().map(|&x| f64::from(x) / f64::from(params.temperature)).collect();
        let largest = scaled.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = scaled.iter().map(|x| (x - largest).exp()).sum();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| scaled[b].total_cmp(&scaled[a]));
        let (mut result, mut before, mut lowest) = (vec![false; logits.len()], 0.0, f64::MAX);
        for (rank, &token) in order.iter().enumerate() {
            let probability = (scaled[token] - largest).exp() / total;
            let keep = (params.top_k == 0 || rank < params.top_k as usize)
                && (params.top_p >= 1.0 || before < f64::from(params.top_p) + 1e-6)
                && probability >= f64::from(params.min_p) / total - 1e-9;
            if keep {
                lowest = lowest.min(scaled[token]);
            }
            before += probability;
        }
        for (token, x) in scaled.iter().enumerate() {
            result[token] = *x >= lowest - 1e-9;
        }
        result
    }

    #[test]
    fn drawn_tokens_are_allowed_and_spread() {
        let check = |flat: bool, change: &dyn Fn(&mut SamplingDraft), distinct_min: usize| {
            let params = params(change);
            let logits = logits(0, flat);
            let allowed = allowed(&logits, &params);
            let rows: Vec<_> = (0..64).map(|position| (logits.clone(), params.clone(), position)).collect();
            let mut seen: Vec<_> = run(&rows);
            assert!(seen.iter().all(|&token| allowed[token as usize]), "{params:?} drew {seen:?}");
            seen.sort_unstable();
            seen.dedup();
            assert!(seen.len() >= distinct_min, "{params:?} drew only {seen:?}");
        };
        check(false, &|_| (), 50);
        check(false, &|d| d.top_k = 1, 1);
        check(false, &|d| d.top_k = 20, 8);
        check(false, &|d| d.top_p = 0.1, 20);
        check(false, &|d| d.min_p = 0.9, 20);
        check(false, &|d| d.temperature = 0.05, 2);
        check(false, &|d| (d.top_k, d.top_p, d.min_p) = (50, 0.5, 0.01), 8);
        // Cuts below the first 1024 tokens: a flat distribution, a large top_k.
        check(true, &|d| d.top_p = 0.9, 50);
        check(true, &|d| d.top_k = 3000, 50);
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        let mut logits = vec![f32::NEG_INFINITY; VOCABULARY];
        for (token, probability) in [(10, 0.5_f32), (20, 0.3), (30, 0.15), (40, 0.05)] {
            logits[token] = probability.ln();
        }
        let draws = 4000;
        let rows: Vec<_> =
            (0..draws).map(|position| (logits.clone(), params(|d| d.top_p = 0.9), position)).collect();
        let mut counts = BTreeMap::new();
        for chunk in rows.chunks(100) {
            for token in run(chunk) {
                *counts.entry(token).or_insert(0) += 1;
            }
        }
        // The nucleus is the first three; five standard deviations of 4000 draws are below 160.
        for (token, share) in [(10, 0.5 / 0.95), (20, 0.3 / 0.95), (30, 0.15 / 0.95)] {
            let expected = share * f64::from(draws);
            assert!((f64::from(counts[&token]) - expected).abs() < 160.0, "{counts:?}");
        }
        assert_eq!(counts.len(), 3, "{counts:?}");
    }

    #[test]
    fn neighbours_do_not_matter() {
        let kinds = [
            params(|d| d.temperature = 0.0),
            params(|d| d.seed = 7),
            params(|d| (d.seed, d.top_p) = (8, 0.3)),
            params(|d| (d.seed, d.top_k) = (9, 5)),
            params(|d| (d.seed, d.min_p, d.frequency_penalty) = (10, 0.2, 1.0)),
            params(|d| (d.temperature, d.logit_bias) = (0.0, vec![(4321, 100.0)])),
            params(|d| (d.seed, d.top_k) = (11, 2000)),
            params(|d| (d.seed, d.repetition_penalty) = (12, 1.3)),
        ];
        let rows: Vec<_> = kinds
            .iter()
            .enumerate()
            .map(|(row, kind)| (logits(row, false), kind.clone(), row as u32))
            .collect();
        let together = run(&rows);
        for (row, token) in rows.iter().zip(&together) {
            assert_eq!(run(std::slice::from_ref(row)), [*token], "{:?}", row.1);
        }
        assert_eq!(together[5], 4321);
    }

    #[test]
    fn penalties_change_only_what_they_name() {
        let greedy = |change: &dyn Fn(&mut SamplingDraft)| {
            let mut logits = vec![0.0; VOCABULARY];
            (logits[1], logits[3], logits[9]) = (5.0, 4.9, 4.5);
            let params = params(|draft| {
                draft.temperature = 0.0;
                change(draft);
            });
            run(&[(logits, params, 0)])[0]
        };
        assert_eq!(greedy(&|_| ()), 1);
        // Token 1 is in the prompt, token 3 twice in the output.
        assert_eq!(greedy(&|d| d.repetition_penalty = 1.5), 9);
        assert_eq!(greedy(&|d| d.logit_bias = vec![(1, -100.0)]), 3);
        assert_eq!(greedy(&|d| (d.logit_bias, d.frequency_penalty) = (vec![(1, -100.0)], 0.15)), 3);
        assert_eq!(greedy(&|d| (d.logit_bias, d.frequency_penalty) = (vec![(1, -100.0)], 0.25)), 9);
        assert_eq!(greedy(&|d| (d.logit_bias, d.presence_penalty) = (vec![(1, -100.0)], 0.5)), 9);
    }
}
