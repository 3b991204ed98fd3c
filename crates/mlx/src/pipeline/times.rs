//! How long one stage's layers take, measured before it serves: with rows of a short context on blocks that nobody uses
//! yet.

use super::hello::TIMES_MAX;
use crate::runner::{Entering, Flight, Runner};
use engine::{BlockId, Input, Model, RowSampling, SequenceId, Slice};
use mlx_rs::{Array, error::Result, ops::zeros_dtype, transforms::eval};
use std::time::{Duration, Instant};
use types::{BLOCK_TOKENS, SamplingParams};

/// Where measuring stops, whatever has been measured by then: a pass that has begun is finished.
const TIME_MAX: Duration = Duration::from_secs(2);
/// Passes measured with each number of rows, after one that warms up; the shortest counts, as others only ever add.
const PASSES: usize = 5;
/// Short passes are measured again for so long: a disturbance lasts longer than some of them.
const AGAIN_TIME: Duration = Duration::from_millis(150);
/// Rows measured, as far as there is time and room.
const ROWS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
/// Tokens before each row's own.
const CONTEXT: usize = 2 * BLOCK_TOKENS;
/// Blocks of a row.
pub(super) const ROW_BLOCKS: usize = CONTEXT / BLOCK_TOKENS + 1;

const _: () = assert!(ROWS.len() <= TIMES_MAX);

/// Seconds of a pass of rows alone, by rows.
pub(crate) fn of_rows(runner: &mut Runner) -> Result<Vec<(u32, f64)>> {
    let limits = runner.limits();
    let most = limits.slots.min(limits.blocks / ROW_BLOCKS).max(1);
    let begin = Instant::now();
    let mut times: Vec<(u32, f64)> = Vec::new();
    for rows in ROWS.into_iter().filter(|&rows| rows <= most) {
        if !times.is_empty() && begin.elapsed() > TIME_MAX {
            break;
        }
        pass(runner, rows)?;
        let mut least = f64::INFINITY;
        let begin_rows = Instant::now();
        let mut measured = 0;
        while measured < PASSES || begin_rows.elapsed() < AGAIN_TIME {
            if measured > 0 && begin.elapsed() > TIME_MAX {
                break;
            }
            measured += 1;
            let begin = Instant::now();
            pass(runner, rows)?;
            least = least.min(begin.elapsed().as_secs_f64());
        }
        // More rows never take less: where they seem to, something else ran beside fewer.
        times.iter_mut().for_each(|(_, seconds)| *seconds = seconds.min(least));
        times.push((rows as u32, least));
    }
    Ok(times)
}

/// One pass of so many rows, from what enters to what leaves.
fn pass(runner: &mut Runner, rows: usize) -> Result<()> {
    let (part, dims) = (runner.part(), runner.dims());
    let greedy = SamplingParams::greedy();
    let blocks: Vec<Vec<BlockId>> = (0..rows as u32)
        .map(|row| (0..ROW_BLOCKS as u32).map(|at| BlockId(row * ROW_BLOCKS as u32 + at)).collect())
        .collect();
    let slices: Vec<Slice<'_>> = blocks
        .iter()
        .enumerate()
        .map(|(row, blocks)| Slice {
            sequence: SequenceId(row as u64),
            blocks,
            start: CONTEXT,
            input: Input::Tokens(&[0]),
            sample: Some(RowSampling::plain(&greedy, 1, &[], &[])),
            drafts: 0,
            score: None,
        })
        .collect();
    let mut there = || Ok(());
    let entering = match part.is_first() {
        true => None,
        false => {
            let hidden = zeros_dtype(&[rows as i32, dims.hidden], dims.kv.dtype)?;
            Some(Entering { hidden, arrival: &mut there })
        }
    };
    let Flight { hidden, tokens, .. } = runner.forward(&slices, entering)?;
    let left: Vec<&Array> = hidden.iter().chain(&tokens).collect();
    eval(left)
}
