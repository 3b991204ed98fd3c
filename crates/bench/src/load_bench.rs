//! What requests do to each other in an engine, in real time: prompts beside rows, prefixes found again, rows that come
//! and go. The engine is driven as its process drives it, without pipes and network.

use engine::{Engine, EngineSettings, Model, ModelError};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use types::{
    BLOCK_TOKENS, CacheScope, GenerateDraft, GenerateError, GenerateRequest, OutputRules, RequestId,
    SamplingParams, Service, Speculation, TokenEvent, TokenId, TokenReport,
};

/// Steps before a measurement, for shapes and estimates to settle.
const WARM_UP_STEPS: usize = 12;
/// Share of a step within which the cost of coming and going is lost in noise.
const NOISE_SHARE: f64 = 0.02;

/// What to measure.
#[derive(Debug, Clone)]
pub struct LoadBenchSettings {
    /// Rows that are decoding while a long prompt is read.
    pub rows: usize,
    /// Tokens of that prompt.
    pub long_prompt: usize,
    /// Tokens of the prefix that is found again.
    pub prefix: usize,
    /// Rows of which one leaves and one joins in every step.
    pub churn_rows: usize,
    /// Their contexts, one measurement each: multiples of [`BLOCK_TOKENS`].
    pub churn_contexts: Vec<usize>,
    /// Steps of each measurement.
    pub steps: usize,
    /// How the engine schedules.
    pub engine: EngineSettings,
}

impl LoadBenchSettings {
    /// Sequences that must fit at once.
    pub fn slots(&self) -> usize {
        self.churn_rows.max(self.rows + 1)
    }

    /// Tokens that a sequence comes to.
    pub fn context(&self) -> usize {
        let steps = 8 * self.steps + 4 * WARM_UP_STEPS;
        let longest = self.churn_contexts.iter().copied().max().unwrap_or(0);
        longest.max(self.long_prompt).max(self.prefix + 64) + steps
    }
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct LoadFigures {
    /// Milliseconds between two tokens of a row while all rows decode: the median and the 99th percentile.
    pub quiet_itl_ms: [f64; 2],
    /// The same while the long prompt is read.
    pub during_prefill_itl_ms: [f64; 2],
    /// Ratio of the 99th percentiles.
    pub itl_p99_ratio_during_prefill: f64,
    /// Milliseconds to the long prompt's first token.
    pub long_ttft_ms: f64,
    /// Milliseconds to the first token behind a prefix that is new, and that is not.
    pub prefix_ttft_ms: [f64; 2],
    /// Ratio of the two.
    pub warm_prefix_ttft_ratio: f64,
    /// Rows that come and go, by context.
    pub churn: Vec<ChurnFigures>,
    /// Cost of a join and a leave with the longest context over that with the shortest; costs below 2 % of a step
    /// count as that.
    pub join_leave_ratio: f64,
}

/// Rows of one context.
#[derive(Debug, Clone, Serialize)]
pub struct ChurnFigures {
    /// Tokens of each row's context, which the rows share.
    pub context: usize,
    /// Milliseconds of the median step while all rows stay.
    pub steady_step_ms: f64,
    /// Milliseconds of the median step while in each one row leaves and another joins.
    pub churn_step_ms: f64,
    /// The difference.
    pub join_leave_ms: f64,
}

/// Measures everything in turn; the model is the engine's from then on.
///
/// # Errors
/// What the engine refuses, and what the model reports.
pub fn engine_under_load(
    mut model: Box<dyn Model>,
    settings: &LoadBenchSettings,
) -> Result<LoadFigures, LoadBenchError> {
    while model.prepare()? {}
    let mut drive = Drive::new(model, settings.engine.clone());
    let (quiet, during, long_ttft_ms) = drive.prompt_beside_rows(settings)?;
    let prefix_ttft_ms = drive.prefix_again(settings.prefix)?;
    let mut churn = Vec::new();
    for &context in &settings.churn_contexts {
        churn.push(drive.churn(settings, context)?);
    }
    let cost = |figures: &ChurnFigures| figures.join_leave_ms.max(NOISE_SHARE * figures.steady_step_ms);
    let by_context = |figures: &&ChurnFigures| figures.context;
    let longest = churn.iter().max_by_key(by_context).map_or(1.0, cost);
    let shortest = churn.iter().min_by_key(by_context).map_or(1.0, cost);
    Ok(LoadFigures {
        itl_p99_ratio_during_prefill: during[1] / quiet[1],
        quiet_itl_ms: quiet,
        during_prefill_itl_ms: during,
        long_ttft_ms,
        warm_prefix_ttft_ratio: prefix_ttft_ms[1] / prefix_ttft_ms[0],
        prefix_ttft_ms,
        churn,
        join_leave_ratio: longest / shortest,
    })
}

/// Why a measurement broke off.
#[derive(Debug, thiserror::Error)]
pub enum LoadBenchError {
    /// The engine did not take a request.
    #[error("the engine refused a request: {0}")]
    Refused(#[from] GenerateError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}

struct Drive {
    engine: Engine,
    model: String,
    vocabulary: u32,
    next_id: u128,
    /// When each token of each request came.
    times: BTreeMap<RequestId, Vec<Instant>>,
}

impl Drive {
    fn new(model: Box<dyn Model>, settings: EngineSettings) -> Self {
        let (name, vocabulary) = (model.card().name.clone(), model.card().vocab_size);
        let engine = Engine::new(model, settings);
        Self { engine, model: name, vocabulary, next_id: 0, times: BTreeMap::new() }
    }

    /// Fixed pseudo-random tokens (Knuth's multiplicative hash).
    fn tokens(&self, kind: u64, count: usize) -> Vec<TokenId> {
        let token = |at: u64| (kind * 1_000_003 + at + 7) * 2_654_435_761 % u64::from(self.vocabulary);
        (0..count as u64).map(|at| token(at) as TokenId).collect()
    }

    fn submit(&mut self, prompt: Vec<TokenId>, max_tokens: usize) -> Result<RequestId, GenerateError> {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let draft = GenerateDraft {
            id,
            model: self.model.clone(),
            prompt,
            sampling: SamplingParams::greedy(),
            max_tokens: max_tokens as u32,
            stop_tokens: Vec::new(),
            ignore_eos: true,
            service: Service::default(),
            cache: CacheScope::default(),
            output: Vec::new(),
            rules: OutputRules::default(),
            report: TokenReport::default(),
            speculation: Speculation::default(),
        };
        let request = GenerateRequest::try_from(draft)
            .map_err(|error| GenerateError::Invalid { message: error.to_string(), param: None })?;
        self.engine.submit(Instant::now(), request)?;
        Ok(id)
    }

    /// One step, as the engine's process makes it; returns when it ended.
    fn step(&mut self) -> Result<Instant, ModelError> {
        let mut events = Vec::new();
        self.engine.step(Instant::now(), &mut events)?;
        let now = Instant::now();
        self.engine.observe(now);
        for (id, event) in events {
            if matches!(event, TokenEvent::Tokens { .. }) {
                self.times.entry(id).or_default().push(now);
            }
        }
        Ok(now)
    }

    fn tokens_of(&self, id: RequestId) -> usize {
        self.times.get(&id).map_or(0, Vec::len)
    }

    fn until(&mut self, id: RequestId, tokens: usize) -> Result<(), ModelError> {
        while self.tokens_of(id) < tokens && !self.engine.is_idle() {
            self.step()?;
        }
        Ok(())
    }

    fn end(&mut self, ids: &[RequestId]) -> Result<(), ModelError> {
        ids.iter().for_each(|&id| self.engine.cancel(id));
        while !self.engine.is_idle() {
            self.step()?;
        }
        Ok(())
    }

    /// Gaps of all rows in milliseconds, between two times: median and 99th percentile.
    fn gaps(&self, ids: &[RequestId], from: Instant, to: Instant) -> [f64; 2] {
        let inside = |pair: &&[Instant]| pair[1] > from && pair[1] <= to;
        let of_row = |id: &RequestId| {
            let times = self.times.get(id).map_or(&[][..], Vec::as_slice);
            times.windows(2).filter(inside).map(|pair| ms(pair[1] - pair[0])).collect::<Vec<_>>()
        };
        let mut gaps: Vec<f64> = ids.iter().flat_map(of_row).collect();
        [percentile(&mut gaps, 0.5), percentile(&mut gaps, 0.99)]
    }

    fn prompt_beside_rows(
        &mut self,
        settings: &LoadBenchSettings,
    ) -> Result<([f64; 2], [f64; 2], f64), LoadBenchError> {
        let mut ids = Vec::new();
        for row in 0..settings.rows as u64 {
            let prompt = self.tokens(100 + row, 64);
            ids.push(self.submit(prompt, settings.long_prompt + 4 * settings.steps)?);
        }
        let Some(&last) = ids.last() else { return Ok(([0.0; 2], [0.0; 2], 0.0)) };
        self.until(last, WARM_UP_STEPS)?;
        let begin = Instant::now();
        self.until(last, WARM_UP_STEPS + settings.steps)?;
        let quiet = self.gaps(&ids, begin, Instant::now());
        // Another long prompt first: what slices take is learned.
        for measured in [false, true] {
            let prompt = self.tokens(200 + u64::from(measured), settings.long_prompt);
            let sent = Instant::now();
            let long = self.submit(prompt, 1)?;
            self.until(long, 1)?;
            if measured {
                let first = self.times[&long][0];
                let figures = (quiet, self.gaps(&ids, sent, first), ms(first - sent));
                self.end(&ids)?;
                return Ok(figures);
            }
        }
        unreachable!("the second prompt was measured")
    }

    fn prefix_again(&mut self, prefix: usize) -> Result<[f64; 2], LoadBenchError> {
        let shared = self.tokens(300, prefix);
        let mut ttft = [0.0; 2];
        for (turn, ttft) in ttft.iter_mut().enumerate() {
            let own = self.tokens(301 + turn as u64, 63);
            let sent = Instant::now();
            let id = self.submit([&shared[..], &own].concat(), 1)?;
            self.until(id, 1)?;
            *ttft = ms(self.times[&id][0] - sent);
            self.end(&[id])?;
        }
        Ok(ttft)
    }

    fn churn(
        &mut self,
        settings: &LoadBenchSettings,
        context: usize,
    ) -> Result<ChurnFigures, LoadBenchError> {
        let context = context.next_multiple_of(BLOCK_TOKENS);
        let shared = self.tokens(400 + context as u64, context);
        // All but the last token of each row's prompt is cached: it joins as a row.
        let mut kind = 0;
        let mut join = |drive: &mut Self| {
            kind += 1;
            let own = drive.tokens(1000 + kind, 1);
            drive.submit([&shared[..], &own].concat(), 8 * settings.steps + 4 * WARM_UP_STEPS)
        };
        let mut rows = std::collections::VecDeque::from([join(self)?]);
        self.until(rows[0], 1)?;
        while rows.len() < settings.churn_rows {
            rows.push_back(join(self)?);
        }
        self.until(rows[settings.churn_rows - 1], WARM_UP_STEPS)?;
        let steady_step_ms = self.step_ms(settings.steps, |_| Ok(()))?;
        let mut change = |drive: &mut Self| {
            if let Some(oldest) = rows.pop_front() {
                drive.engine.cancel(oldest);
            }
            rows.push_back(join(drive)?);
            Ok(())
        };
        self.step_ms(WARM_UP_STEPS, &mut change)?;
        let churn_step_ms = self.step_ms(settings.steps, &mut change)?;
        let left: Vec<_> = rows.into_iter().collect();
        self.end(&left)?;
        Ok(ChurnFigures {
            context,
            steady_step_ms,
            churn_step_ms,
            join_leave_ms: churn_step_ms - steady_step_ms,
        })
    }

    /// Milliseconds of the median of some steps, before each of which `change` happens.
    fn step_ms(
        &mut self,
        steps: usize,
        mut change: impl FnMut(&mut Self) -> Result<(), GenerateError>,
    ) -> Result<f64, LoadBenchError> {
        let mut last = Instant::now();
        let mut times = Vec::with_capacity(steps);
        for _ in 0..steps {
            change(self)?;
            let now = self.step()?;
            times.push(ms(now - last));
            last = now;
        }
        Ok(percentile(&mut times, 0.5))
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// By the nearest rank; 0 for no values.
fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (share * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}
