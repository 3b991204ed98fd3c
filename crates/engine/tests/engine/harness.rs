//! An engine, its fake model and the oracles over its events, driven as a node drives them.

use engine::{
    Draft, DraftRow, DraftSource, Engine, EngineSettings, ModelError, Speculate, StepSummary,
    grammar::{Grammars, Matcher},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, LazyLock, Mutex},
    time::{Duration, Instant},
};
use testkit::{FakeHandle, FakeModel, FakeSettings, Streams, VirtualClock};
use types::{
    CacheScope, DraftOrigin, Finish, FinishReason, GenerateDraft, GenerateError, GenerateRequest, NodeRates,
    OutputRules, RequestId, SamplingDraft, SamplingParams, Service, Speculation, TokenEvent, TokenId,
    TokenReport,
};

/// What [`testkit::StepCost::mac`] comes to.
pub(crate) const MAC_RATES: NodeRates =
    NodeRates { prefill_tokens_per_s: 1000.0, decode_step_s: 0.021, decode_row_s: 0.001 };

/// A request with a prompt of its own, which is drawn greedily.
pub(crate) fn draft(id: u128, prompt_tokens: usize, max_tokens: u32) -> GenerateDraft {
    GenerateDraft {
        id: RequestId(id),
        model: "fake".to_owned(),
        prompt: (0..prompt_tokens).map(|index| 1 + ((index as u128 * 31 + id * 7) % 997) as u32).collect(),
        sampling: SamplingParams::greedy(),
        max_tokens,
        stop_tokens: Vec::new(),
        ignore_eos: false,
        service: Service::default(),
        cache: CacheScope::default(),
        output: Vec::new(),
        rules: OutputRules::default(),
        report: TokenReport::default(),
        speculation: Speculation::default(),
    }
}

pub(crate) fn sampling(seed: u64) -> SamplingParams {
    SamplingParams::try_from(SamplingDraft { seed, ..SamplingDraft::default() }).expect("in range")
}

/// For the vocabulary of the usual model.
static GRAMMARS: LazyLock<Mutex<Grammars>> = LazyLock::new(|| {
    let vocabulary = FakeSettings::default().vocabulary();
    Mutex::new(Grammars::new(&vocabulary).expect("a vocabulary of texts"))
});

/// At the beginning of the request's grammar.
pub(crate) fn matcher(request: &GenerateRequest) -> Option<Matcher> {
    let mut grammars = GRAMMARS.lock().expect("nobody panicked");
    request.rules.grammar.as_ref().map(|grammar| grammars.compile(grammar).expect("a grammar"))
}

/// Texts of requests, each with the length of its prompt.
type KnownTexts = Arc<Mutex<Vec<(usize, Vec<TokenId>)>>>;

/// Guesses what texts go on with, and is right at a rate: which tokens it knows is drawn by their positions.
#[derive(Debug)]
struct Guesser {
    known: KnownTexts,
    rate: f64,
}

impl DraftSource for Guesser {
    fn origin(&self) -> DraftOrigin {
        DraftOrigin::Model
    }

    fn propose(&mut self, rows: &[DraftRow<'_>]) -> Vec<Draft> {
        let known = self.known.lock().expect("nobody panicked");
        let propose = |row: &DraftRow<'_>| {
            let of_row = |(prompt, text): &&(usize, Vec<TokenId>)| {
                *prompt == row.prompt_tokens && text.len() > row.text.len() && text.starts_with(row.text)
            };
            let Some((_, text)) = known.iter().find(of_row) else { return Draft::default() };
            let guess = |(at, &token): (usize, &TokenId)| {
                let hash = (at as u64 ^ row.sequence.0 << 20).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
                if (hash % 1000) as f64 / 1000.0 < self.rate { token } else { 1 + token % 900 }
            };
            // From none to as many as may be, by the text's length.
            let most = row.most * (text.len() * 7 % 11) / 10;
            let tokens = text.iter().enumerate().skip(row.text.len()).take(most).map(guess).collect();
            Draft { tokens, matched: 1 }
        };
        rows.iter().map(propose).collect()
    }
}

pub(crate) struct Bench {
    pub(crate) engine: Engine,
    pub(crate) clock: VirtualClock,
    pub(crate) model: FakeHandle,
    pub(crate) streams: Streams,
    /// When each request's events came: its tokens and its end.
    pub(crate) times: BTreeMap<RequestId, Vec<Instant>>,
    pub(crate) arrivals: BTreeMap<RequestId, Instant>,
    /// Every event so far, in order.
    pub(crate) events: Vec<(RequestId, TokenEvent)>,
    settings: FakeSettings,
    /// What a source of guesses knows, where there is one.
    known: Option<KnownTexts>,
    accepted: BTreeMap<RequestId, GenerateRequest>,
    cancelled: BTreeSet<RequestId>,
}

impl Bench {
    pub(crate) fn new(settings: FakeSettings, engine: EngineSettings) -> Self {
        let clock = VirtualClock::new();
        let (model, handle) = FakeModel::new(settings.clone(), clock.clone());
        Self {
            engine: Engine::new(Box::new(model), engine),
            clock,
            model: handle,
            streams: Streams::default(),
            times: BTreeMap::new(),
            arrivals: BTreeMap::new(),
            events: Vec::new(),
            settings,
            known: None,
            accepted: BTreeMap::new(),
            cancelled: BTreeSet::new(),
        }
    }

    /// A bench whose engine knows how fast its machine is, and guesses nothing: a token a step.
    pub(crate) fn measured(settings: FakeSettings) -> Self {
        let speculation = Speculate::Off;
        Self::new(settings, EngineSettings { rates: MAC_RATES, speculation, ..EngineSettings::default() })
    }

    /// From now on tokens are guessed, right at this rate.
    pub(crate) fn guess(&mut self, rate: f64) {
        let known = KnownTexts::default();
        self.engine.guess_with(Box::new(Guesser { known: known.clone(), rate }));
        self.known = Some(known);
    }

    pub(crate) fn submit(&mut self, draft: GenerateDraft) -> Result<RequestId, GenerateError> {
        let request = GenerateRequest::try_from(draft).expect("a valid request");
        let id = request.id;
        match matcher(&request) {
            Some(matcher) => self.engine.submit_under(self.clock.now(), request.clone(), matcher)?,
            None => self.engine.submit(self.clock.now(), request.clone())?,
        }
        self.streams.accepted_after(id, &request.output);
        if let Some(known) = &self.known {
            let output = self.settings.output_under(&request, matcher(&request)).tokens;
            let text = [request.prompt.as_slice(), &output].concat();
            known.lock().expect("nobody panicked").push((request.prompt.len(), text));
        }
        self.arrivals.insert(id, self.clock.now());
        self.accepted.insert(id, request);
        Ok(id)
    }

    pub(crate) fn accept(&mut self, draft: GenerateDraft) -> RequestId {
        self.submit(draft).expect("room for the request")
    }

    pub(crate) fn cancel(&mut self, id: RequestId) {
        if self.streams.finish(id).is_none() {
            self.cancelled.insert(id);
        }
        self.engine.cancel(id);
    }

    pub(crate) fn try_step(&mut self) -> Result<StepSummary, ModelError> {
        let mut events = Vec::new();
        let result = self.engine.step(self.clock.now(), &mut events);
        self.engine.observe(self.clock.now());
        for (id, event) in &events {
            self.streams.record(*id, event);
            if matches!(event, TokenEvent::Started { .. } | TokenEvent::Prompt { .. }) {
                continue;
            }
            self.times.entry(*id).or_default().push(self.clock.now());
        }
        if let Ok(summary) = &result {
            let count = |wanted: fn(&TokenEvent) -> bool| events.iter().filter(|(_, e)| wanted(e)).count();
            assert_eq!(summary.finished as usize, count(|event| matches!(event, TokenEvent::Finished(_))));
            let tokens = |(_, event): &(RequestId, TokenEvent)| match event {
                TokenEvent::Tokens { tokens, .. } => tokens.len(),
                _ => 0,
            };
            assert_eq!(summary.tokens as usize, events.iter().map(tokens).sum::<usize>());
        }
        self.events.append(&mut events);
        result
    }

    pub(crate) fn step(&mut self) -> StepSummary {
        self.try_step().expect("a step without failure")
    }

    /// Steps until nothing is left to do. Every step must bring something on, so the number is bounded by the work.
    pub(crate) fn run(&mut self) {
        let load = self.engine.load(self.clock.now());
        // With a pipeline, passes are begun and collected by different steps.
        let each = if self.settings.stages > 1 { 2 } else { 1 };
        let steps_max = 10 + each * (load.prefill_backlog_tokens + load.decode_backlog_tokens);
        for _ in 0..steps_max {
            if self.engine.is_idle() {
                return;
            }
            self.step();
        }
        panic!("not idle after {steps_max} steps: {:?}", self.engine.load(self.clock.now()));
    }

    pub(crate) fn finish(&self, id: RequestId) -> &Finish {
        self.streams.finish(id).unwrap_or_else(|| panic!("{id} has not ended"))
    }

    /// Longest time between two tokens of a request.
    pub(crate) fn pause_max(&self, id: RequestId) -> Duration {
        self.times[&id].windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }

    /// Time from a request's arrival to its first token.
    pub(crate) fn ttft(&self, id: RequestId) -> Duration {
        self.times[&id][0] - self.arrivals[&id]
    }

    /// What must hold when all is done: every request ended once, with its own text, and nothing is held.
    pub(crate) fn check_end(&self) {
        assert_eq!(self.streams.unfinished(), []);
        self.engine.check_invariants();
        let load = self.engine.load(self.clock.now());
        let left = [u64::from(load.running), u64::from(load.waiting), load.kv_tokens.0];
        assert_eq!(left, [0; 3], "{load:?}");
        assert_eq!((load.prefill_backlog_tokens, load.decode_backlog_tokens), (0, 0));
        for (id, request) in &self.accepted {
            let expected = self.settings.output_under(request, matcher(request));
            let (tokens, finish) = (self.streams.tokens(*id), self.finish(*id));
            assert_eq!(finish.usage.prompt_tokens as usize, request.prompt.len());
            match &finish.reason {
                FinishReason::Cancelled => assert!(self.cancelled.contains(id), "{id} was not cancelled"),
                FinishReason::Failed(error) => {
                    assert!(error.to_string().contains("injected"), "{id}: {error}");
                }
                reason => {
                    assert_eq!(*reason, expected.reason, "{id}");
                    assert_eq!(finish.usage.completion_tokens, expected.completion_tokens, "{id}");
                    assert_eq!(tokens, expected.tokens, "{id}");
                    let told = (expected.prompt.as_slice(), expected.logprobs.as_slice());
                    assert_eq!(self.streams.logprobs(*id), told, "{id}");
                }
            }
            assert!(expected.tokens.starts_with(tokens), "{id}: the neighbours changed the text");
        }
    }
}
