//! [`SimNode`]: an engine in virtual time.
//!
//! A step reads a slice of the oldest prompts and draws a token for each row; it takes the time of its rows, of its
//! slice, and of what the slice attends to. Steps of rows alone are taken together until something happens.

use super::cache::Cache;
use super::workload::Request;
use std::collections::VecDeque;
use types::{BLOCK_TOKENS, NodeLoad, NodeRates};

/// Prompt tokens read in one step.
const SLICE_TOKENS: usize = 512;
/// Seconds that a step takes beside its rows and slices.
const STEP_S: f64 = 0.002;
/// Tokens before it that make a token take twice as long to read.
const ATTENTION_TOKENS: f64 = 40_000.0;
/// Rows of the table of decode steps.
const TABLE_ROWS: [u32; 8] = [1, 2, 4, 8, 16, 32, 64, 128];

/// How fast a node is and what it holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct NodeSpec {
    /// Prompt tokens a second.
    pub(crate) prefill_tokens_per_s: f64,
    /// Seconds of a decode step of one row.
    pub(crate) decode_step_s: f64,
    /// Seconds that each further row adds.
    pub(crate) decode_row_s: f64,
    /// Requests that run at once.
    pub(crate) slots: usize,
}

impl NodeSpec {
    /// Seconds of a decode step.
    pub(crate) fn step_s(&self, rows: usize) -> f64 {
        if rows == 0 { 0.0 } else { self.decode_step_s + self.decode_row_s * (rows - 1) as f64 }
    }

    /// Seconds to read `tokens` that follow `before`.
    pub(crate) fn read_s(&self, before: usize, tokens: usize) -> f64 {
        let (before, tokens) = (before as f64, tokens as f64);
        tokens / self.prefill_tokens_per_s * (1.0 + (before + tokens / 2.0) / ATTENTION_TOKENS)
    }
}

/// A request at a node.
#[derive(Debug)]
struct Sequence {
    request: usize,
    /// Tokens of its prompt that were read or found.
    position: usize,
    /// Blocks of the prompt and its answer that are cached and used by it.
    stored: usize,
    /// Blocks that it took and that are not cached.
    own: usize,
    written: u32,
}

/// What a node tells of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    FirstToken,
    Finished { written: u32 },
}

/// What happened until a step ended.
#[derive(Debug, Default)]
pub(crate) struct StepResult {
    pub(crate) told: Vec<(usize, Told)>,
}

/// Steps that are running: how many are known only when something happens.
#[derive(Debug, Clone, Copy)]
struct Run {
    start_s: f64,
    step_s: f64,
    steps: u32,
}

#[derive(Debug)]
pub(crate) struct SimNode {
    pub(crate) spec: NodeSpec,
    cache: Cache,
    waiting: VecDeque<Sequence>,
    reading: VecDeque<Sequence>,
    rows: Vec<Sequence>,
    run: Option<Run>,
    /// Tokens of each sequence in `reading`, from the front, that the running step reads.
    slices: Vec<usize>,
    /// Counts runs, so that an end that was brought forward is told from one that was not.
    pub(crate) version: u64,
    pub(crate) busy_s: f64,
    pub(crate) matched_tokens: u64,
    pub(crate) requests: u64,
    /// Cache events told so far.
    pub(crate) seq: u64,
}

impl SimNode {
    pub(crate) fn new(spec: NodeSpec, blocks: usize) -> Self {
        Self {
            spec,
            cache: Cache::new(blocks),
            waiting: VecDeque::new(),
            reading: VecDeque::new(),
            rows: Vec::new(),
            run: None,
            slices: Vec::new(),
            version: 0,
            busy_s: 0.0,
            matched_tokens: 0,
            requests: 0,
            seq: 0,
        }
    }

    /// A request arrives. Returns when the running steps end, if that changed or none was running.
    pub(crate) fn submit(&mut self, now_s: f64, request: usize, all: &[Request]) -> Option<f64> {
        self.waiting.push_back(Sequence { request, position: 0, stored: 0, own: 0, written: 0 });
        self.requests += 1;
        match &mut self.run {
            None => self.begin(now_s, all),
            Some(run) if run.steps > 1 => {
                // It is let in at the end of the step in flight.
                let steps = ((now_s - run.start_s) / run.step_s).ceil().max(1.0) as u32;
                if steps >= run.steps {
                    return None;
                }
                run.steps = steps;
                self.version += 1;
                Some(run.start_s + f64::from(steps) * run.step_s)
            }
            Some(_) => None,
        }
    }

    /// The running steps end; begins the next. Returns when that ends.
    pub(crate) fn step_end(&mut self, now_s: f64, all: &[Request], result: &mut StepResult) -> Option<f64> {
        let run = self.run.take().expect("a step is running");
        self.busy_s += now_s - run.start_s;
        let drawn = self.rows.len();
        let slices = std::mem::take(&mut self.slices);
        for tokens in slices {
            let Some(sequence) = self.reading.front_mut() else { break };
            let request = &all[sequence.request];
            sequence.position += tokens;
            let full = request.hashes.len().min(sequence.position / BLOCK_TOKENS);
            for hash in &request.hashes[sequence.stored..full] {
                self.cache.store(*hash);
            }
            sequence.own -= full - sequence.stored;
            sequence.stored = full;
            if sequence.position == request.prompt_tokens as usize {
                let mut sequence = self.reading.pop_front().expect("it is there");
                sequence.written = 1;
                result.told.push((sequence.request, Told::FirstToken));
                self.rows.push(sequence);
            }
        }
        let mut index = 0;
        for place in 0..self.rows.len() {
            let row = &mut self.rows[index];
            if place < drawn {
                row.written += run.steps;
            }
            if row.written >= all[row.request].output_tokens {
                let row = self.rows.remove(index);
                self.end(row, now_s, all, result);
            } else {
                index += 1;
            }
        }
        self.begin(now_s, all)
    }

    fn end(&mut self, mut row: Sequence, now_s: f64, all: &[Request], result: &mut StepResult) {
        let request = &all[row.request];
        for hash in &request.output_hashes {
            self.cache.store(*hash);
        }
        row.own -= request.output_hashes.len();
        let chain: Vec<_> = request.hashes.iter().chain(&request.output_hashes).copied().collect();
        self.cache.release(&chain, row.own, now_s);
        result.told.push((row.request, Told::Finished { written: row.written }));
    }

    fn begin(&mut self, now_s: f64, all: &[Request]) -> Option<f64> {
        let mut left = SLICE_TOKENS;
        let mut seconds = STEP_S + self.spec.step_s(self.rows.len());
        self.slices.clear();
        let mut index = 0;
        while left > 0 {
            if index == self.reading.len() && !self.admit(now_s, all) {
                break;
            }
            let sequence = &self.reading[index];
            let tokens = (all[sequence.request].prompt_tokens as usize - sequence.position).min(left);
            seconds += self.spec.read_s(sequence.position, tokens);
            left -= tokens;
            self.slices.push(tokens);
            index += 1;
        }
        if self.slices.is_empty() && self.rows.is_empty() {
            return None;
        }
        let ends = |row: &Sequence| all[row.request].output_tokens - row.written;
        let steps = if self.slices.is_empty() { self.rows.iter().map(ends).min().unwrap_or(1) } else { 1 };
        let steps = steps.max(1);
        self.run = Some(Run { start_s: now_s, step_s: seconds, steps });
        self.version += 1;
        Some(now_s + seconds * f64::from(steps))
    }

    /// Lets the next one in, if there is a slot and memory.
    fn admit(&mut self, now_s: f64, all: &[Request]) -> bool {
        if self.reading.len() + self.rows.len() >= self.spec.slots {
            return false;
        }
        let Some(sequence) = self.waiting.front_mut() else { return false };
        let request = &all[sequence.request];
        // The last token is always computed.
        let reusable = request.hashes.len().min((request.prompt_tokens as usize - 1) / BLOCK_TOKENS);
        let matched = self.cache.matched(&request.hashes[..reusable]);
        let tokens = (request.prompt_tokens + request.output_tokens) as usize;
        let needed = tokens.div_ceil(BLOCK_TOKENS) - matched;
        let alone = self.reading.is_empty() && self.rows.is_empty();
        if !alone && !self.cache.fits(&request.hashes[..matched], needed) {
            return false;
        }
        self.cache.take(&request.hashes[..matched], needed, now_s);
        sequence.position = matched * BLOCK_TOKENS;
        (sequence.stored, sequence.own) = (matched, needed);
        self.matched_tokens += sequence.position as u64;
        self.reading.extend(self.waiting.pop_front());
        true
    }

    /// Whether it has nothing to do.
    pub(crate) fn is_idle(&self) -> bool {
        self.run.is_none()
    }

    pub(crate) fn load(&mut self, now_s: f64, all: &[Request]) -> NodeLoad {
        let cache_tail_age_s = self.cache.tail_age_s(now_s) as f32;
        let left = |sequence: &Sequence, from: usize| {
            let tokens = all[sequence.request].prompt_tokens as usize - from;
            (tokens, self.spec.read_s(from, tokens))
        };
        let waiting = self.waiting.iter().map(|sequence| {
            let request = &all[sequence.request];
            let reusable = request.hashes.len().min((request.prompt_tokens as usize - 1) / BLOCK_TOKENS);
            left(sequence, self.cache.matched(&request.hashes[..reusable]) * BLOCK_TOKENS)
        });
        let reading = self.reading.iter().map(|sequence| left(sequence, sequence.position));
        let (tokens, seconds) =
            reading.chain(waiting).fold((0, 0.0), |all, one| (all.0 + one.0, all.1 + one.1));
        let sequences = || self.waiting.iter().chain(&self.reading).chain(&self.rows);
        let unwritten = |sequence: &Sequence| u64::from(all[sequence.request].max_tokens - sequence.written);
        NodeLoad {
            running: (self.reading.len() + self.rows.len()) as u32,
            waiting: self.waiting.len() as u32,
            slots: self.spec.slots as u32,
            prefill_backlog_tokens: tokens as u64,
            decode_backlog_tokens: sequences().map(unwritten).sum(),
            kv_tokens: (
                (self.cache.in_use() * BLOCK_TOKENS) as u64,
                (self.cache.total() * BLOCK_TOKENS) as u64,
            ),
            cached_kv_tokens: (self.cache.cached() * BLOCK_TOKENS) as u64,
            prefill_backlog_s: seconds as f32,
            prefill_budget_tokens: 0,
            decode_step_s: TABLE_ROWS.map(|rows| (STEP_S + self.spec.step_s(rows as usize)) as f32),
            cache_tail_age_s,
            cache_reuse_s: self.cache.reuse_s() as f32,
            passes: self.version,
            step_s: self.run.map_or(0.0, |run| run.step_s as f32),
            drafts: Default::default(),
            rates: NodeRates {
                prefill_tokens_per_s: self.spec.prefill_tokens_per_s as f32,
                decode_step_s: (STEP_S + self.spec.decode_step_s) as f32,
                decode_row_s: self.spec.decode_row_s as f32,
            },
        }
    }

    /// Blocks stored and removed since the last call.
    pub(crate) fn take_events(&mut self) -> (Vec<types::BlockHash>, Vec<types::BlockHash>) {
        self.cache.take_events()
    }
}
