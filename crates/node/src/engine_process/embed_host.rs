//! [`EmbedHost`]: an embedder and what its node is told of it, without pipes, threads or a clock: what
//! [`super::EngineHost`] is for a model that generates.
//!
//! Requests wait in order of arrival. A pass takes the next texts of the first ones, as many as are likely to be computed
//! within [`PASS_TIME`]: requests that come together are computed together, and none is held up for long by one with many
//! texts before it than a few passes.

use super::LoadedEmbedder;
use engine::{Embedder, ModelError};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use types::{
    DraftCount, DraftOrigin, EmbedRequest, GenerateError, NodeLoad, NodeRates, SessionInfo, TokenId, limits,
};
use wire::{EngineCommand, EngineReport};

/// How long a pass should take: routers hear of the load after each, and who gives up is noticed between two.
const PASS_TIME: Duration = Duration::from_millis(250);
/// Tokens of a pass at least: fewer would leave any machine idle.
const PASS_TOKENS_MIN: usize = 256;
/// And at most, whatever was measured: what a pass holds in memory grows with them.
const PASS_TOKENS_MAX: usize = 16_384;
/// Texts of a pass at most.
const PASS_TEXTS_MAX: usize = 128;
/// Requests that a router may think of as running: what comes together shares passes.
const SLOTS: u32 = 16;
/// Tokens of the text that is measured.
const PROBE_TOKENS: usize = 128;
/// Weight of a pass in the mean speed.
const SPEED_WEIGHT: f64 = 0.2;
/// While only numbers change, at most one report in this time, as of any engine.
const LOAD_INTERVAL: Duration = limits::LOAD_INTERVAL_MIN.checked_div(2).expect("not divided by zero");

/// One embedder as its process runs it.
///
/// Contract: that of [`super::EngineHost`], without grammars.
#[derive(Debug)]
pub struct EmbedHost {
    model: Box<dyn Embedder>,
    waiting: VecDeque<Waiting>,
    tokens_per_s: f64,
    passes: u64,
    /// When the pass began that has not been seen to end, and its tokens.
    pass: Option<(Instant, usize)>,
    load_told: (NodeLoad, Instant),
    /// Ends once nothing is left to do.
    leaving: bool,
}

#[derive(Debug)]
struct Waiting {
    request: EmbedRequest,
    /// Of its first texts.
    vectors: Vec<Vec<f32>>,
}

impl Waiting {
    fn rest(&self) -> &[Vec<TokenId>] {
        &self.request.inputs[self.vectors.len()..]
    }
}

impl EmbedHost {
    /// Measures a model, which moves `clock`; also gives the reports that come first.
    ///
    /// # Errors
    /// Where the model fails as it is measured.
    pub fn new(
        loaded: LoadedEmbedder,
        clock: impl Fn() -> Instant,
    ) -> Result<(Self, Vec<EngineReport>), ModelError> {
        let LoadedEmbedder { mut model, assets } = loaded;
        let card = model.card().clone();
        let token = PROBE_TOKENS.min(card.vocab_size.saturating_sub(1) as usize) as TokenId;
        let probe = vec![token; PROBE_TOKENS.min(card.context_tokens as usize).max(1)];
        // The first only warms up: buffers, kernels, pages.
        model.embed(&[&probe])?;
        let before = clock();
        model.embed(&[&probe])?;
        let seconds = (clock() - before).as_secs_f64().max(1e-6);
        let now = clock();
        let mut host = Self {
            model,
            waiting: VecDeque::new(),
            tokens_per_s: probe.len() as f64 / seconds,
            passes: 0,
            pass: None,
            load_told: (EMPTY, now),
            leaving: false,
        };
        let load = host.load();
        host.load_told = (load, now);
        let ready = EngineReport::Ready { card, assets, rates: load.rates, slots: SLOTS };
        Ok((host, vec![ready, EngineReport::Load(load)]))
    }

    /// Whether there is nothing to do but to wait for a command.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && !self.leaving
    }

    /// Whether it was told to leave and has nothing left to do.
    pub fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.leaving
    }

    /// Does what the node wants.
    pub fn take(&mut self, command: EngineCommand, reports: &mut Vec<EngineReport>) {
        match command {
            EngineCommand::Embed(request) => {
                let id = request.id;
                tracing::debug!(request = %id, inputs = request.inputs.len(), tokens = request.tokens(), "submitted");
                if self.leaving {
                    let reason = "the engine is leaving".to_owned();
                    let error = GenerateError::Unavailable { model: request.model.clone(), reason };
                    reports.push(EngineReport::Rejected { id, error });
                } else {
                    self.waiting.push_back(Waiting { request: *request, vectors: Vec::new() });
                }
            }
            EngineCommand::Cancel(id) => {
                let before = self.waiting.len();
                self.waiting.retain(|waiting| waiting.request.id != id);
                if self.waiting.len() < before {
                    let error = GenerateError::Unavailable {
                        model: self.model.card().name.clone(),
                        reason: "the request was cancelled".to_owned(),
                    };
                    reports.push(EngineReport::Rejected { id, error });
                }
            }
            // A node checks what it sends; this is for one that does not.
            EngineCommand::Submit(request) => {
                let error = self.model.card().must_generate().expect_err("this is an embedder");
                reports.push(EngineReport::Rejected { id: request.id, error });
            }
            EngineCommand::Sessions { call, .. } => {
                reports.push(EngineReport::Sessions { call, sessions: Vec::<SessionInfo>::new() });
            }
            EngineCommand::Shutdown => self.leaving = true,
        }
    }

    /// One pass, which waits for the model.
    ///
    /// # Errors
    /// Where the model is lost; the reports hold the ends of all requests, and there is no further pass.
    pub fn step(&mut self, now: Instant, reports: &mut Vec<EngineReport>) -> Result<(), ModelError> {
        let budget = (self.tokens_per_s * PASS_TIME.as_secs_f64()) as usize;
        let budget = budget.clamp(PASS_TOKENS_MIN, PASS_TOKENS_MAX);
        let (mut texts, mut tokens): (Vec<&[TokenId]>, usize) = (Vec::new(), 0);
        for text in self.waiting.iter().flat_map(Waiting::rest).take(PASS_TEXTS_MAX) {
            if tokens > 0 && tokens + text.len() > budget {
                break;
            }
            texts.push(text);
            tokens += text.len();
        }
        if texts.is_empty() {
            return Ok(());
        }
        let made = self.model.embed(&texts).and_then(|made| check(made, texts.len()));
        self.pass = Some((now, tokens));
        let mut made = match made {
            Ok(made) => made.into_iter(),
            Err(error) => {
                reports.extend(self.waiting.drain(..).map(|waiting| EngineReport::Rejected {
                    id: waiting.request.id,
                    error: GenerateError::Engine { message: error.to_string() },
                }));
                return Err(error);
            }
        };
        for waiting in &mut self.waiting {
            let rest = waiting.rest().len();
            waiting.vectors.extend(made.by_ref().take(rest));
        }
        while self.waiting.front().is_some_and(|first| first.rest().is_empty()) {
            let Some(Waiting { request, vectors }) = self.waiting.pop_front() else { break };
            tracing::debug!(request = %request.id, "finished");
            reports.push(EngineReport::Embedded { id: request.id, vectors });
        }
        Ok(())
    }

    /// What is to be done after a step, also a failed one.
    pub fn stepped(&mut self, now: Instant, reports: &mut Vec<EngineReport>) {
        if let Some((began, tokens)) = self.pass.take() {
            self.passes += 1;
            let seconds = now.saturating_duration_since(began).as_secs_f64().max(1e-6);
            self.tokens_per_s += (tokens as f64 / seconds - self.tokens_per_s) * SPEED_WEIGHT;
        }
        let load = self.load();
        let (told, at) = &self.load_told;
        let requests = (load.running, load.waiting) != (told.running, told.waiting);
        let overdue = now - *at >= limits::LOAD_INTERVAL_MAX;
        if requests || overdue || (load != *told && now - *at >= LOAD_INTERVAL) {
            reports.push(EngineReport::Load(load));
            self.load_told = (load, now);
        }
    }

    fn load(&self) -> NodeLoad {
        let unread: usize = self.waiting.iter().flat_map(Waiting::rest).map(Vec::len).sum();
        let requests = self.waiting.len() as u32;
        let budget = self.tokens_per_s.min(f64::from(u32::MAX));
        let seconds = unread as f64 / self.tokens_per_s;
        NodeLoad {
            running: requests.min(SLOTS),
            waiting: requests.saturating_sub(SLOTS),
            slots: SLOTS,
            prefill_backlog_tokens: unread as u64,
            prefill_backlog_s: seconds as f32,
            prefill_budget_tokens: budget as u64,
            passes: self.passes,
            step_s: seconds.min(PASS_TIME.as_secs_f64()) as f32,
            rates: NodeRates { prefill_tokens_per_s: self.tokens_per_s as f32, ..EMPTY.rates },
            ..EMPTY
        }
    }
}

/// Of a model that writes nothing and keeps nothing.
const EMPTY: NodeLoad = NodeLoad {
    running: 0,
    waiting: 0,
    slots: SLOTS,
    prefill_backlog_tokens: 0,
    decode_backlog_tokens: 0,
    kv_tokens: (0, 0),
    cached_kv_tokens: 0,
    prefill_backlog_s: 0.0,
    prefill_budget_tokens: 0,
    decode_step_s: [0.0; 8],
    cache_tail_age_s: 0.0,
    cache_reuse_s: 0.0,
    passes: 0,
    step_s: 0.0,
    drafts: [DraftCount { accepted: 0, rejected: 0 }; DraftOrigin::ALL.len()],
    rates: NodeRates { prefill_tokens_per_s: 1.0, decode_step_s: 0.0, decode_row_s: 0.0 },
};

/// A vector that holds no numbers has no length, and JSON cannot hold it.
fn check(made: Vec<Vec<f32>>, texts: usize) -> Result<Vec<Vec<f32>>, ModelError> {
    if made.len() != texts {
        return Err(ModelError::Backend(format!("{} vectors of {texts} texts", made.len())));
    }
    match made.iter().flatten().find(|number| !number.is_finite()) {
        Some(number) => Err(ModelError::Backend(format!("a vector holds {number}"))),
        None => Ok(made),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::{FakeEmbedder, VirtualClock};
    use types::{EmbedDraft, RequestId, Service};

    struct Bench {
        host: EmbedHost,
        clock: VirtualClock,
        reports: Vec<EngineReport>,
    }

    impl Bench {
        /// A thousand tokens a second.
        fn new() -> Self {
            let clock = VirtualClock::new();
            let model = FakeEmbedder::new("e", Duration::from_millis(1), clock.clone());
            let loaded = LoadedEmbedder { assets: FakeEmbedder::assets(), model: Box::new(model) };
            let (host, reports) = EmbedHost::new(loaded, || clock.now()).expect("it does not fail");
            assert!(matches!(reports[..], [EngineReport::Ready { .. }, EngineReport::Load(_)]));
            Self { host, clock, reports: Vec::new() }
        }

        fn embed(&mut self, id: u128, lengths: &[usize]) {
            let inputs = lengths.iter().map(|&length| vec![id as TokenId; length]).collect();
            let draft =
                EmbedDraft { id: RequestId(id), model: "e".to_owned(), inputs, service: Service::default() };
            let request = EmbedRequest::try_from(draft).expect("valid");
            self.host.take(EngineCommand::Embed(request.into()), &mut self.reports);
        }

        /// One pass, and what was said: ids with how many vectors, or why there are none.
        fn step(&mut self) -> Vec<String> {
            let _ = self.host.step(self.clock.now(), &mut self.reports);
            self.host.stepped(self.clock.now(), &mut self.reports);
            let said = |report: EngineReport| match report {
                EngineReport::Embedded { id, vectors } => Some(format!("{}: {}", id.0, vectors.len())),
                EngineReport::Rejected { id, error } => Some(format!("{}: {error}", id.0)),
                _ => None,
            };
            self.reports.drain(..).filter_map(said).collect()
        }
    }

    #[test]
    fn who_comes_together_is_computed_together_in_passes_of_bounded_time() {
        let mut bench = Bench::new();
        bench.embed(1, &[10, 20]);
        bench.embed(2, &[30]);
        let before = bench.clock.now();
        assert_eq!(bench.step(), ["1: 2", "2: 1"]);
        assert_eq!(bench.clock.now() - before, Duration::from_millis(60));
        assert!(bench.host.is_idle());
        // 256 tokens fit a pass; the second request's texts are split over two.
        bench.embed(3, &[200]);
        bench.embed(4, &[50, 100]);
        bench.embed(5, &[1000]);
        assert_eq!(bench.step(), ["3: 1"]);
        assert_eq!(bench.host.load().prefill_backlog_tokens, 1100);
        assert_eq!(bench.step(), ["4: 2"]);
        // Alone, however long it is.
        assert_eq!(bench.step(), ["5: 1"]);
        assert_eq!(bench.host.load().passes, 4);
    }

    #[test]
    fn the_cancelled_leave_and_the_last_are_served_before_the_end() {
        let mut bench = Bench::new();
        bench.embed(1, &[200, 200]);
        bench.embed(2, &[5]);
        assert_eq!(bench.step(), [""; 0], "a part of the first");
        bench.host.take(EngineCommand::Cancel(RequestId(1)), &mut bench.reports);
        bench.host.take(EngineCommand::Cancel(RequestId(7)), &mut bench.reports);
        bench.host.take(EngineCommand::Shutdown, &mut bench.reports);
        bench.embed(3, &[1]);
        assert!(!bench.host.is_over());
        let gone = |id: u128, why: &str| format!("{id}: no node can serve \"e\" now: {why}");
        let expected =
            [gone(1, "the request was cancelled"), gone(3, "the engine is leaving"), "2: 1".to_owned()];
        assert_eq!(bench.step(), expected);
        assert!(bench.host.is_over());
    }

    #[test]
    fn a_model_that_fails_ends_all_requests() {
        let mut bench = Bench::new();
        bench.embed(FakeEmbedder::FAILING_TOKEN.into(), &[3]);
        bench.embed(2, &[5]);
        let failed = "the engine failed: the model's backend failed: as asked";
        assert_eq!(
            bench.step(),
            [format!("{}: {failed}", FakeEmbedder::FAILING_TOKEN), format!("2: {failed}")]
        );
    }
}
