//! Counts, and the requests that run or ran lately. One lock around plain numbers: nothing waits while it is held.

use super::{
    histogram::{FIRST_TOKEN_S, Histogram, REQUEST_S, REQUEST_TOKENS, TOKEN_S},
    life::{ABORTED, End, Life, Shown},
    rate::{History, Rates},
};
use serde::Serialize;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::time::Instant;
use types::{GenerateRequest, RequestId, RouteInfo, TokenEvent, limits};

/// Requests that have ended and are still shown.
const ENDED_MAX: usize = 32;
/// Running requests that are shown one by one, the oldest first: what a person looks through.
const SHOWN_MAX: usize = 128;
/// Models that are told apart; a cluster may have a few times what one node may serve before this is reached.
const MODELS_MAX: usize = 4 * limits::NODE_MODELS_MAX;
/// Pairs of a node and a reason that are told apart: all reasons, of more nodes than most clusters ever see.
const ROUTES_MAX: usize = 1024;
/// Kinds of HTTP answers that are told apart: a few methods and statuses of each route.
const ANSWERS_MAX: usize = 512;
/// What stands for those beyond a bound.
const OTHER: &str = "other";

#[derive(Debug)]
pub(crate) struct Board {
    started: Instant,
    figures: Mutex<Figures>,
}

/// Everything that was counted.
#[derive(Debug, Default)]
pub(super) struct Figures {
    pub(super) models: BTreeMap<String, ModelFigures>,
    /// By the node's name and the reason.
    pub(super) routes: BTreeMap<(String, String), u64>,
    /// By the route's pattern, the method and the status.
    pub(super) answers: BTreeMap<(String, String, u16), u64>,
    /// One for each generation that runs or waits, which has bounds of its own.
    running: BTreeMap<RequestId, Life>,
    /// The last to end is the last here.
    ended: VecDeque<Life>,
    rates: Rates,
}

#[derive(Debug)]
pub(super) struct ModelFigures {
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) generation_tokens: u64,
    pub(super) ends: BTreeMap<End, u64>,
    pub(super) first_token_s: Histogram,
    pub(super) between_tokens_s: Histogram,
    pub(super) per_token_s: Histogram,
    pub(super) queue_s: Histogram,
    pub(super) request_s: Histogram,
    pub(super) request_prompt_tokens: Histogram,
    pub(super) request_tokens: Histogram,
}

impl Default for ModelFigures {
    fn default() -> Self {
        Self {
            prompt_tokens: 0,
            cached_tokens: 0,
            generation_tokens: 0,
            ends: BTreeMap::new(),
            first_token_s: Histogram::new(FIRST_TOKEN_S),
            between_tokens_s: Histogram::new(TOKEN_S),
            per_token_s: Histogram::new(TOKEN_S),
            queue_s: Histogram::new(REQUEST_S),
            request_s: Histogram::new(REQUEST_S),
            request_prompt_tokens: Histogram::new(REQUEST_TOKENS),
            request_tokens: Histogram::new(REQUEST_TOKENS),
        }
    }
}

/// What the dashboard shows of this router's requests.
#[derive(Debug, Serialize)]
pub(crate) struct Snapshot {
    /// Seconds since this router's endpoint started.
    pub(crate) uptime_s: f32,
    /// Those that run, the oldest first, and then those that ended, the newest first.
    pub(crate) requests: Vec<Shown>,
    /// Running requests, whether shown or not.
    pub(crate) running: usize,
    pub(crate) history: History,
    pub(crate) totals: Totals,
}

/// Since the start, over all models.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Totals {
    pub(crate) done: u64,
    pub(crate) failed: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) generation_tokens: u64,
}

impl Board {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), figures: Mutex::default() }
    }

    /// A request is to be generated.
    pub(super) fn begins(&self, request: &GenerateRequest) {
        let life = Life::new(request, Instant::now());
        self.figures().running.insert(life.id, life);
    }

    /// A node accepted it.
    pub(super) fn accepted(&self, id: RequestId, route: &RouteInfo) {
        let now = Instant::now();
        let mut figures = self.figures();
        let key = (route.node_name.clone(), route.reason.clone());
        *bounded(&mut figures.routes, key, ROUTES_MAX, || (OTHER.to_owned(), OTHER.to_owned())) += 1;
        let Some((life, model)) = figures.of(id) else { return };
        life.accepted = Some(now);
        life.route = Some(route.clone());
        model.queue_s.observe(seconds(life.arrived, now), 1);
    }

    /// Something happened to it.
    pub(super) fn event(&self, id: RequestId, event: &TokenEvent) {
        let now = Instant::now();
        // What is told of the prompt's tokens says nothing of the request's progress.
        if let TokenEvent::Tokens { tokens, .. } = event {
            self.tokens(id, tokens.len() as u32, now);
        } else if let TokenEvent::Started { cached_tokens } = event {
            self.started(id, *cached_tokens, now);
        } else if let TokenEvent::Finished(finish) = event {
            self.ends(id, (&finish.reason).into());
        }
    }

    fn started(&self, id: RequestId, cached: u32, now: Instant) {
        let second = self.second(now);
        let mut figures = self.figures();
        let Some((life, model)) = figures.of(id) else { return };
        life.cached_tokens = Some(cached);
        let prompt = life.prompt_tokens;
        model.prompt_tokens += u64::from(prompt);
        model.cached_tokens += u64::from(cached);
        let rate = figures.rates.second(second);
        rate.prompt = rate.prompt.saturating_add(prompt);
        rate.cached = rate.cached.saturating_add(cached);
    }

    fn tokens(&self, id: RequestId, count: u32, now: Instant) {
        let second = self.second(now);
        let mut figures = self.figures();
        let Some((life, model)) = figures.of(id) else { return };
        // Several at once came one after the other, as far as a client can tell.
        let mut later = count;
        if life.first_token.is_none() {
            life.first_token = Some(now);
            model.first_token_s.observe(seconds(life.arrived, now), 1);
            later = count.saturating_sub(1);
        }
        let before = life.last_token.replace(now).unwrap_or(now);
        if later > 0 {
            model.between_tokens_s.observe(seconds(before, now) / f64::from(later), u64::from(later));
        }
        life.tokens += count;
        model.generation_tokens += u64::from(count);
        let rate = figures.rates.second(second);
        rate.tokens = rate.tokens.saturating_add(count);
    }

    /// A stop string ended its text, whatever else would have come. Of several ends the first one counts.
    pub(crate) fn stopped(&self, id: RequestId) {
        self.ends(id, End::Stop);
    }

    /// Whoever asked does not want more.
    pub(super) fn dropped(&self, id: RequestId) {
        self.ends(id, ABORTED);
    }

    pub(super) fn ends(&self, id: RequestId, end: End) {
        let now = Instant::now();
        let mut figures = self.figures();
        let Some((life, model)) = figures.of(id) else { return };
        *model.ends.entry(end).or_default() += 1;
        if !matches!(end, End::Failed(_)) {
            model.request_s.observe(seconds(life.arrived, now), 1);
            model.request_prompt_tokens.observe(f64::from(life.prompt_tokens), 1);
            model.request_tokens.observe(f64::from(life.tokens), 1);
            if let (Some(first), Some(last)) = (life.first_token, life.last_token)
                && life.tokens > 1
            {
                model.per_token_s.observe(seconds(first, last) / f64::from(life.tokens - 1), 1);
            }
        }
        life.ended = Some((now, end));
        let ended = figures.running.remove(&id);
        if figures.ended.len() == ENDED_MAX {
            figures.ended.pop_front();
        }
        figures.ended.extend(ended);
    }

    /// An HTTP request was answered.
    pub(super) fn answered(&self, route: &str, method: &str, status: u16) {
        let key = (route.to_owned(), method.to_owned(), status);
        let other = || (OTHER.to_owned(), OTHER.to_owned(), 0);
        *bounded(&mut self.figures().answers, key, ANSWERS_MAX, other) += 1;
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let now = Instant::now();
        let second = self.second(now);
        let mut figures = self.figures();
        let history = figures.rates.history(second);
        let mut running: Vec<&Life> = figures.running.values().collect();
        running.sort_by_key(|life| (life.arrived, life.id));
        running.truncate(SHOWN_MAX);
        let shown = running.into_iter().chain(figures.ended.iter().rev()).map(|life| life.shown(now));
        Snapshot {
            uptime_s: seconds(self.started, now) as f32,
            requests: shown.collect(),
            running: figures.running.len(),
            history,
            totals: figures.totals(),
        }
    }

    pub(super) fn uptime_s(&self) -> f64 {
        seconds(self.started, Instant::now())
    }

    pub(super) fn figures(&self) -> MutexGuard<'_, Figures> {
        // Numbers: after a panic elsewhere one of them is missing at worst.
        self.figures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_secs()
    }
}

impl Figures {
    /// A running request and its model's figures.
    fn of(&mut self, id: RequestId) -> Option<(&mut Life, &mut ModelFigures)> {
        let life = self.running.get_mut(&id)?;
        let model = bounded(&mut self.models, life.model.clone(), MODELS_MAX, || OTHER.to_owned());
        Some((life, model))
    }

    fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for model in self.models.values() {
            totals.prompt_tokens += model.prompt_tokens;
            totals.cached_tokens += model.cached_tokens;
            totals.generation_tokens += model.generation_tokens;
            for (end, count) in &model.ends {
                match end {
                    End::Stop | End::Length => totals.done += count,
                    End::Failed(_) => totals.failed += count,
                }
            }
        }
        totals
    }
}

/// What a map has for `key`, or for what stands for others where it is full.
fn bounded<K: Ord, V: Default>(
    map: &mut BTreeMap<K, V>,
    key: K,
    max: usize,
    other: impl Fn() -> K,
) -> &mut V {
    let key = if map.len() < max || map.contains_key(&key) { key } else { other() };
    map.entry(key).or_default()
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}
