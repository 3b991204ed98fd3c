//! [`EngineHost`]: an engine and what its node is told of it, without pipes, threads or a clock: commands and times go
//! in, reports come out.

use super::LoadedModel;
use super::probe;
use engine::{Engine, EngineSettings, ModelError, grammar::Matcher};
use std::time::{Duration, Instant};
use types::{
    Finish, FinishReason, GenerateError, GenerateRequest, Grammar, ModelCard, NodeLoad, RequestId,
    SessionInfo, SessionRequest, TokenEvent, Usage, limits,
};
use wire::{EngineCommand, EngineReport};

/// While only numbers change, at most one report of load or cache in this time: half of what the node passes on.
const LOAD_INTERVAL: Duration = limits::LOAD_INTERVAL_MIN.checked_div(2).expect("not divided by zero");

/// How long a grammar may take until it is compiled, those before it included. Its fuel is spent within some hundred
/// milliseconds; whoever waits longer has a grammar that nobody can serve, or is behind one.
const COMPILE_TIME_MAX: Duration = Duration::from_secs(10);

/// One engine as its process runs it.
///
/// Contract: until [`EngineHost::is_over`], take the commands that are there, waiting for one at most
/// [`limits::LOAD_INTERVAL_MAX`] and only where [`EngineHost::is_idle`]; then [`EngineHost::step`] with the time before
/// it, [`EngineHost::stepped`] with the time after it, and send the reports of all three in their order. What
/// [`EngineHost::take_uncompiled`] gives after commands is compiled elsewhere and comes back by [`EngineHost::compiled`],
/// as commands come.
#[derive(Debug)]
pub struct EngineHost {
    engine: Engine,
    card: ModelCard,
    load_told: (NodeLoad, Instant),
    cache_told: Instant,
    /// Requests whose grammars are being compiled, in order of arrival.
    compiling: Vec<Compiling>,
    /// Of these, the grammars that nobody was given yet.
    uncompiled: Vec<(RequestId, Grammar)>,
    /// Ends once nothing is left to do.
    leaving: bool,
}

/// A request whose grammar is being compiled.
#[derive(Debug)]
struct Compiling {
    request: GenerateRequest,
    since: Instant,
}

impl EngineHost {
    /// Measures a model, which moves `clock`, and makes its engine; also gives the reports that come first.
    ///
    /// # Errors
    /// Where the model fails as it is measured.
    pub fn new(
        mut loaded: LoadedModel,
        mut settings: EngineSettings,
        clock: impl Fn() -> Instant,
    ) -> Result<(Self, Vec<EngineReport>), ModelError> {
        let measured = probe::measure(&mut *loaded.model, &clock)?;
        tracing::debug!(?measured, "measured");
        let rates = measured.rates;
        (settings.rates, settings.decode_step_s) = (rates, measured.decode_step_s);
        let slots = loaded.model.limits().slots as u32;
        let card = loaded.model.card().clone();
        let engine = Engine::new(loaded.model, settings);
        let now = clock();
        let load = engine.load(now);
        let ready = EngineReport::Ready { card: card.clone(), assets: loaded.assets, rates, slots };
        let host = Self {
            engine,
            card,
            load_told: (load, now),
            cache_told: now,
            compiling: Vec::new(),
            uncompiled: Vec::new(),
            leaving: false,
        };
        Ok((host, vec![ready, EngineReport::Load(load)]))
    }

    /// Whether there is nothing to do but to wait for a command.
    pub fn is_idle(&self) -> bool {
        self.engine.is_idle() && !self.is_over()
    }

    /// Whether it was told to leave and has nothing left to do.
    pub fn is_over(&self) -> bool {
        self.engine.is_idle() && self.compiling.is_empty() && self.leaving
    }

    /// While it is idle: a part, of seconds at most, of what makes later steps faster. False: nothing is left of it.
    ///
    /// # Errors
    /// Where the model is lost.
    pub fn prepare(&mut self) -> Result<bool, ModelError> {
        self.engine.prepare()
    }

    /// The engine, to look at.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Does what the node wants.
    pub fn take(&mut self, now: Instant, command: EngineCommand, reports: &mut Vec<EngineReport>) {
        match command {
            EngineCommand::Submit(request) if self.leaving => {
                let reason = "the engine is leaving".to_owned();
                let error = GenerateError::Unavailable { model: request.model.clone(), reason };
                reports.push(EngineReport::Rejected { id: request.id, error });
            }
            EngineCommand::Submit(request) => {
                let id = request.id;
                let (prompt_tokens, output) = (request.prompt.len(), request.output.len());
                tracing::debug!(request = %id, prompt_tokens, output, "submitted");
                if let Err(error) = self.submit(now, *request) {
                    tracing::debug!(request = %id, %error, "rejected");
                    reports.push(EngineReport::Rejected { id, error });
                }
            }
            EngineCommand::Cancel(id) => {
                tracing::debug!(request = %id, "to be cancelled");
                match self.no_longer_compiling(id) {
                    Some(Compiling { request, .. }) => reports.push(cancelled(&request)),
                    None => self.engine.cancel(id),
                }
            }
            EngineCommand::Sessions { call, request } => {
                let sessions = self.sessions(now, &request);
                reports.push(EngineReport::Sessions { call, sessions });
            }
            // A node checks what it sends; this is for one that does not.
            EngineCommand::Embed(request) => {
                let error = self.card.must_embed().expect_err("this model generates");
                reports.push(EngineReport::Rejected { id: request.id, error });
            }
            EngineCommand::Shutdown => {
                self.leaving = true;
                self.engine.drain();
            }
        }
    }

    /// Grammars to be compiled, each for one request.
    pub fn take_uncompiled(&mut self) -> Vec<(RequestId, Grammar)> {
        std::mem::take(&mut self.uncompiled)
    }

    /// Takes a request whose grammar was compiled, unless it was cancelled meanwhile.
    pub fn compiled(
        &mut self,
        now: Instant,
        id: RequestId,
        matcher: Result<Matcher, GenerateError>,
        reports: &mut Vec<EngineReport>,
    ) {
        let Some(Compiling { request, .. }) = self.no_longer_compiling(id) else { return };
        let taken = matcher.and_then(|matcher| self.engine.submit_under(now, request, matcher));
        if let Err(error) = taken {
            reports.push(EngineReport::Rejected { id, error });
        }
    }

    fn submit(&mut self, now: Instant, request: GenerateRequest) -> Result<(), GenerateError> {
        let id = request.id;
        let Some(grammar) = request.rules.grammar.clone() else { return self.engine.submit(now, request) };
        // What is wrong with it is said at once.
        self.engine.check(&request)?;
        if self.compiling.iter().any(|compiling| compiling.request.id == id) {
            let message = format!("a request with the id {id} is already here");
            return Err(GenerateError::Invalid { message, param: Some("id".to_owned()) });
        }
        self.uncompiled.push((id, grammar));
        self.compiling.push(Compiling { request, since: now });
        Ok(())
    }

    fn no_longer_compiling(&mut self, id: RequestId) -> Option<Compiling> {
        self.uncompiled.retain(|(uncompiled, _)| *uncompiled != id);
        let index = self.compiling.iter().position(|compiling| compiling.request.id == id)?;
        Some(self.compiling.remove(index))
    }

    /// Ends what has been compiled for too long.
    fn expire(&mut self, now: Instant, reports: &mut Vec<EngineReport>) {
        let late = |compiling: &Compiling| now.saturating_duration_since(compiling.since) > COMPILE_TIME_MAX;
        while let Some(id) = self.compiling.first().filter(|first| late(first)).map(|first| first.request.id)
        {
            self.no_longer_compiling(id);
            let message = format!("grammar: not compiled within {} s", COMPILE_TIME_MAX.as_secs());
            let error = GenerateError::Invalid { message, param: Some("grammar".to_owned()) };
            reports.push(EngineReport::Rejected { id, error });
        }
    }

    /// One step of the engine, which waits for the model.
    ///
    /// # Errors
    /// Where the model is lost; the reports hold the ends of all requests, and there is no further step.
    pub fn step(&mut self, now: Instant, reports: &mut Vec<EngineReport>) -> Result<(), ModelError> {
        let mut events = Vec::new();
        let stepped = self.engine.step(now, &mut events);
        for (id, event) in &events {
            if let TokenEvent::Finished(finish) = event {
                tracing::debug!(request = %id, reason = ?finish.reason, usage = ?finish.usage, "finished");
            }
        }
        reports.extend(events.into_iter().map(|(id, event)| EngineReport::Event { id, event }));
        stepped.map(|_| ())
    }

    /// What is to be done after a step, also a failed one.
    pub fn stepped(&mut self, now: Instant, reports: &mut Vec<EngineReport>) {
        self.engine.observe(now);
        self.expire(now, reports);
        self.tell_cache(now, reports);
        let load = self.engine.load(now);
        let (told, at) = &self.load_told;
        let requests = (load.running, load.waiting) != (told.running, told.waiting);
        // A sign of life where nothing changes.
        let overdue = now - *at >= limits::LOAD_INTERVAL_MAX;
        if requests || overdue || (load != *told && now - *at >= LOAD_INTERVAL) {
            reports.push(EngineReport::Load(load));
            self.load_told = (load, now);
        }
    }

    /// Seldom enough that blocks which come and go in between are not worth a word.
    fn tell_cache(&mut self, now: Instant, reports: &mut Vec<EngineReport>) {
        if now - self.cache_told < LOAD_INTERVAL && !self.engine.is_idle() {
            return;
        }
        self.cache_told = now;
        let events = self.engine.take_cache_events();
        if !events.is_empty() {
            reports.push(EngineReport::Cache(events));
        }
    }

    /// The sessions that a request is about, which end if it says so.
    fn sessions(&mut self, now: Instant, request: &SessionRequest) -> Vec<SessionInfo> {
        let mut sessions = self.engine.sessions(now);
        match request {
            SessionRequest::List { client } => sessions.retain(|session| session.client == *client),
            SessionRequest::End { client, id } => {
                sessions.retain(|session| session.client == *client && session.id == *id);
                self.engine.end_session(*client, id);
            }
        }
        sessions
    }
}

/// The end of a request that the engine never saw.
fn cancelled(request: &GenerateRequest) -> EngineReport {
    let usage = Usage {
        prompt_tokens: request.prompt.len() as u32,
        completion_tokens: request.output.len() as u32,
        ..Usage::default()
    };
    let finish = Finish { reason: FinishReason::Cancelled, usage };
    EngineReport::Event { id: request.id, event: TokenEvent::Finished(finish) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::grammar::Grammars;
    use testkit::{FakeModel, FakeSettings, VirtualClock};
    use types::{
        CacheScope, GenerateDraft, ModelAssets, OutputRules, SamplingParams, Service, Speculation,
        TokenReport,
    };

    struct Bench {
        host: EngineHost,
        clock: VirtualClock,
        grammars: Grammars,
        reports: Vec<EngineReport>,
    }

    impl Bench {
        fn new() -> Self {
            let clock = VirtualClock::new();
            let settings = FakeSettings::default();
            let (model, _) = FakeModel::new(settings.clone(), clock.clone());
            let assets = ModelAssets {
                tokenizer_json: String::new(),
                chat_template: None,
                bos_token: None,
                eos_token: None,
            };
            let loaded = LoadedModel { model: Box::new(model), assets };
            let (host, _) =
                EngineHost::new(loaded, EngineSettings::default(), || clock.now()).expect("it does not fail");
            let grammars = Grammars::new(&settings.vocabulary()).expect("of texts");
            Self { host, clock, grammars, reports: Vec::new() }
        }

        fn take(&mut self, command: EngineCommand) {
            self.host.take(self.clock.now(), command, &mut self.reports);
        }

        fn submit(&mut self, id: u128, grammar: Option<&str>) {
            let draft = GenerateDraft {
                id: RequestId(id),
                model: "fake".to_owned(),
                prompt: vec![1, 2, 3],
                sampling: SamplingParams::greedy(),
                max_tokens: 20,
                stop_tokens: Vec::new(),
                ignore_eos: false,
                service: Service::default(),
                cache: CacheScope::default(),
                output: Vec::new(),
                rules: OutputRules {
                    grammar: grammar.map(|it| Grammar::Regex(it.to_owned())),
                    min_tokens: 0,
                },
                report: TokenReport::default(),
                speculation: Speculation::default(),
            };
            let request = GenerateRequest::try_from(draft).expect("valid");
            self.take(EngineCommand::Submit(request.into()));
        }

        /// Compiles what there is, as the process does.
        fn compile(&mut self) -> usize {
            let uncompiled = self.host.take_uncompiled();
            let count = uncompiled.len();
            for (id, grammar) in uncompiled {
                let matcher = self.grammars.compile(&grammar);
                self.host.compiled(self.clock.now(), id, matcher, &mut self.reports);
            }
            count
        }

        fn run(&mut self) -> Vec<String> {
            while !self.host.engine().is_idle() {
                self.host.step(self.clock.now(), &mut self.reports).expect("it does not fail");
                self.host.stepped(self.clock.now(), &mut self.reports);
            }
            let said = |report: EngineReport| match report {
                EngineReport::Event { id, event: TokenEvent::Finished(finish) } => {
                    Some(format!("{} {:?}", id.0, finish.reason))
                }
                EngineReport::Rejected { id, error } => Some(format!("{} {error}", id.0)),
                _ => None,
            };
            self.reports.drain(..).filter_map(said).collect()
        }
    }

    #[test]
    fn a_grammar_is_compiled_before_the_engine_has_its_request() {
        let mut bench = Bench::new();
        bench.submit(1, Some("[0-9]{4}"));
        bench.submit(2, None);
        assert_eq!(bench.host.engine().load(bench.clock.now()).waiting, 1);
        assert_eq!(bench.run(), ["2 Length"]);
        bench.submit(1, Some("[a-z]"));
        assert_eq!(bench.run(), ["1 a request with the id 00000000000000000000000000000001 is already here"]);
        assert_eq!(bench.compile(), 1);
        assert_eq!(bench.run(), ["1 Stop"]);
        bench.submit(3, Some("[0-9"));
        assert_eq!(bench.compile(), 1);
        let refused = bench.run();
        assert!(refused.len() == 1 && refused[0].starts_with("3 grammar: "), "{refused:?}");
    }

    #[test]
    fn what_is_compiled_may_be_cancelled_be_late_or_end_with_the_engine() {
        let mut bench = Bench::new();
        bench.submit(1, Some("[0-9]{4}"));
        bench.submit(2, Some("[0-9]{5}"));
        let late = bench.host.take_uncompiled();
        bench.take(EngineCommand::Cancel(RequestId(1)));
        assert_eq!(bench.run(), ["1 Cancelled"]);
        bench.clock.advance(COMPILE_TIME_MAX + Duration::from_millis(1));
        bench.host.stepped(bench.clock.now(), &mut bench.reports);
        assert_eq!(bench.run(), ["2 grammar: not compiled within 10 s"]);
        for (id, grammar) in late {
            let matcher = bench.grammars.compile(&grammar);
            bench.host.compiled(bench.clock.now(), id, matcher, &mut bench.reports);
        }
        assert_eq!(bench.run(), [""; 0]);
        bench.submit(3, Some("[0-9]{4}"));
        bench.take(EngineCommand::Shutdown);
        assert!(!bench.host.is_over() && bench.host.is_idle());
        assert_eq!(bench.compile(), 1);
        let refused = bench.run();
        assert!(refused.len() == 1 && refused[0].contains("draining"), "{refused:?}");
        assert!(bench.host.is_over());
    }
}
