//! A request's way through the cluster: placed, streamed straight to its consumer, and taken elsewhere when its node fails.
//!
//! [`start`] has a node accept it and gives the stream of its events; a [`Course`] is all that is needed to go on elsewhere.
//! Before the first token another node simply gets it; after it, another node gets prompt and answer so far and goes on
//! after them (same seed, same positions, same counts), so that the consumer sees one unbroken answer. Where a node answers
//! but does not bring the request on, a rival is started elsewhere: whoever has the next token first has the request.

use crate::dispatch::{Ask, Dispatch, Place, Silence, Tried};
use crate::health::{START_DEADLINE_MIN, Stage};
use crate::settings::{ENGINE_FAILURES_MAX, RESUMES_MAX, ROUTER_WAIT_MAX, TRIES_MAX};
use futures_util::{StreamExt, future::BoxFuture, stream};
use router::Outcome;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use types::{
    Finish, FinishReason, GenerateDraft, GenerateError, GenerateRequest, Generation, MoveKind, NodeId,
    RequestMove, TokenEvent, TokenId, TokenReport, TokenStream, Usage,
};

/// How soon a request is looked at again that should go on elsewhere, where no node has room for it.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// An engine that fails so many tokens after another one did fails of something else.
const FAR_TOKENS: usize = 32;

/// Has a node accept the request, or says why none does.
pub(crate) async fn start(
    dispatch: Arc<Dispatch>,
    request: GenerateRequest,
) -> Result<Generation, GenerateError> {
    dispatch.arrived();
    let ask = Arc::new(dispatch.ask(&request));
    let mut course = Course {
        dispatch,
        ask,
        output: request.output.clone(),
        request,
        told: 0,
        cached_tokens: None,
        tried: Vec::new(),
        failures: 0,
        failed_at: 0,
        resumes: 0,
        asked: String::new(),
    };
    let current = course.next(None).await?;
    let route = current.place.info.clone();
    let watch = Watch::new();
    let running =
        Running { course, current: Some(current), rival: None, watch, due: VecDeque::new(), ended: false };
    let events = stream::unfold(running, |mut running| async move {
        let event = running.next().await?;
        Some((event, running))
    });
    Ok(Generation { route, events: Box::pin(events) })
}

/// What is needed to go on elsewhere, and what was tried since the last token.
struct Course {
    dispatch: Arc<Dispatch>,
    /// As it came.
    request: GenerateRequest,
    /// What is asked for now.
    ask: Arc<Ask>,
    /// The answer as far as it was passed on.
    output: Vec<TokenId>,
    /// Tokens of the prompt whose log-probabilities were passed on.
    told: usize,
    /// What the first node that began it had in its cache; told once.
    cached_tokens: Option<u32>,
    tried: Vec<Tried>,
    /// Engines that failed under it, one soon after the other.
    failures: usize,
    /// Tokens of the answer when the last one did.
    failed_at: usize,
    /// Times that an answer that had begun went on elsewhere.
    resumes: usize,
    /// Name of the node that was asked last.
    asked: String,
}

/// A node that has the request.
struct Attempt {
    place: Place,
    events: TokenStream,
    /// A token came from it.
    begun: bool,
}

/// A rival that has the next token, or the end, and what it has.
struct Won {
    attempt: Attempt,
    events: VecDeque<TokenEvent>,
}

impl Course {
    fn has_begun(&self) -> bool {
        self.output.len() > self.request.output.len()
    }

    fn stage(&self) -> Stage {
        match (self.has_begun(), &self.request.rules.grammar) {
            (true, _) => Stage::Writes,
            (false, Some(_)) => Stage::Compiles,
            (false, None) => Stage::Waits,
        }
    }

    /// What another node is to be given: the request with the answer so far.
    fn rest(&self) -> Result<GenerateRequest, GenerateError> {
        if !self.has_begun() {
            return Ok(self.request.clone());
        }
        // What there was to tell of the prompt was told before.
        let report = TokenReport { prompt_logprobs: None, ..self.request.report };
        let draft = GenerateDraft { output: self.output.clone(), report, ..self.request.clone().into() };
        draft.try_into().map_err(|error: types::GenerateRequestError| GenerateError::Engine {
            message: error.to_string(),
        })
    }

    /// A node is not to have it again; once the answer has begun, and of a pipeline, only as long as its engine and its
    /// connection are the same: a node that came back is as good as another.
    fn give_up(&mut self, place: &Place) {
        let life = (self.has_begun() || place.is_pipeline).then_some(place.life);
        self.tried.push(Tried { node: place.info.node, life });
    }

    /// A node that had accepted it failed with `error`; whether it is worth another try.
    fn failed(&mut self, place: &Place, error: &GenerateError) -> bool {
        place.outcome(outcome_of(error));
        self.give_up(place);
        if matches!(error, GenerateError::Engine { .. }) {
            let soon = self.output.len() < self.failed_at + FAR_TOKENS;
            self.failures = if soon { self.failures + 1 } else { 1 };
            self.failed_at = self.output.len();
        }
        if self.has_begun() {
            self.resumes += 1;
        }
        error.is_retryable() && self.failures < ENGINE_FAILURES_MAX && self.resumes <= RESUMES_MAX
    }

    /// Has the next node accept it; `failed` is what the last one failed with.
    async fn next(&mut self, failed: Option<GenerateError>) -> Result<Attempt, GenerateError> {
        let again = failed.is_some();
        let mut last = failed;
        let deadline = Instant::now() + ROUTER_WAIT_MAX;
        if self.has_begun() {
            self.ask = Arc::new(self.dispatch.ask(&self.rest()?));
        }
        loop {
            if let Some(error) = &last
                && (!error.is_retryable()
                    || self.tried.len() >= TRIES_MAX
                    || !(matches!(error, GenerateError::Busy { .. }) || self.dispatch.may_retry(false)))
            {
                return Err(error.clone());
            }
            let place = match self.dispatch.place(&self.ask, &self.tried, again).await {
                Ok(place) => place,
                // That the other nodes cannot either says less than what the first one failed with.
                Err(error) => return Err(last.unwrap_or(error)),
            };
            let (place, accepted) = self.accepted(place).await?;
            let asked = std::mem::replace(&mut self.asked, place.info.node_name.clone());
            let error = match accepted {
                Ok(events) => {
                    place.accepted();
                    if let Some(error) = &last {
                        let kind = if self.has_begun() { MoveKind::Resumed } else { MoveKind::Retried };
                        self.moved(kind, &asked, &self.asked, error.to_string());
                    }
                    return Ok(Attempt { place, events, begun: false });
                }
                Err(error) => error,
            };
            tracing::debug!(request = %self.request.id, node = %place.info.node_name, %error, "refused");
            place.outcome(outcome_of(&error));
            if matches!(error, GenerateError::Busy { .. }) && Instant::now() < deadline {
                // Others filled it since it last reported: not its fault, and it may be asked again.
                place.refused_busy();
            } else {
                self.give_up(&place);
            }
            last = Some(error);
        }
    }

    /// Waits for the node to accept it, or refuse; where it brings nothing meanwhile, another one is asked instead.
    async fn accepted(
        &mut self,
        mut place: Place,
    ) -> Result<(Place, Result<TokenStream, GenerateError>), GenerateError> {
        let mut request = self.rest()?;
        loop {
            let since = Instant::now().into_std();
            let target = place.target.clone();
            let mut accepting = target.generate(request);
            let mut wait = START_DEADLINE_MIN;
            let elsewhere = loop {
                if let Ok(answer) = timeout(wait, &mut accepting).await {
                    return Ok((place, answer));
                }
                // No grammar is waited for: a node accepts before it compiles.
                match self.dispatch.silence(&place, &self.request.model, Stage::Waits, since) {
                    Silence::Normal(more) => wait = more,
                    Silence::Stalled => match self.elsewhere(&place) {
                        Some(elsewhere) => break elsewhere,
                        None => wait = LOOK_AGAIN,
                    },
                }
            };
            place.outcome(Outcome::Failed);
            self.give_up(&place);
            (place, request) = elsewhere;
        }
    }

    /// A place beside the one at a node that does not bring it on, if another node can take it at once and it may be tried
    /// again; and what that is to be given.
    fn elsewhere(&self, current: &Place) -> Option<(Place, GenerateRequest)> {
        let request = self.rest().ok()?;
        let ask = if self.has_begun() { Arc::new(self.dispatch.ask(&request)) } else { self.ask.clone() };
        let not_here = Tried { node: current.info.node, life: None };
        let tried: Vec<Tried> = self.tried.iter().copied().chain([not_here]).collect();
        let place = self.dispatch.place_now(&ask, &tried)?;
        if !self.dispatch.may_retry(true) {
            return None;
        }
        tracing::info!(
            request = %self.request.id, node = %current.info.node_name, elsewhere = %place.info.node_name,
            tokens = self.output.len(), "it does not go on: also tried elsewhere"
        );
        self.moved(
            MoveKind::Hedged,
            &current.info.node_name,
            &place.info.node_name,
            "it is silent".to_owned(),
        );
        Some((place, request))
    }

    /// Starts a rival to the node that has it.
    fn rival(&self, current: &Place) -> Option<BoxFuture<'static, Result<Won, NodeId>>> {
        let (place, request) = self.elsewhere(current)?;
        Some(Box::pin(race(place, request)))
    }

    fn moved(&self, kind: MoveKind, from: &str, to: &str, why: String) {
        let (from, to, tokens) = (from.to_owned(), to.to_owned(), self.output.len() as u32);
        let request = self.request.id;
        self.dispatch.moved(RequestMove { request, kind, from, to, tokens, why, age_s: 0.0 });
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.request.prompt.len() as u32,
            cached_tokens: self.cached_tokens.unwrap_or(0),
            completion_tokens: self.output.len() as u32,
            ..Usage::default()
        }
    }
}

/// Has a node accept the request and waits for its first token, or its end.
async fn race(place: Place, request: GenerateRequest) -> Result<Won, NodeId> {
    let node = place.info.node;
    let generated = place.target.generate(request).await;
    let mut events = generated.map_err(|error| {
        place.outcome(outcome_of(&error));
        node
    })?;
    place.accepted();
    let mut due = VecDeque::new();
    loop {
        let Some(event) = events.next().await else { return Err(node) };
        let wins = match &event {
            TokenEvent::Prompt { .. } | TokenEvent::Started { .. } => false,
            TokenEvent::Tokens { .. } => true,
            TokenEvent::Finished(Finish { reason: FinishReason::Failed(error), .. }) => {
                place.outcome(outcome_of(error));
                return Err(node);
            }
            TokenEvent::Finished(_) => true,
        };
        due.push_back(event);
        if wins {
            return Ok(Won { attempt: Attempt { place, events, begun: false }, events: due });
        }
    }
}

/// What an error says of the node that it comes from.
pub(crate) fn outcome_of(error: &GenerateError) -> Outcome {
    match error {
        GenerateError::NodeLost { .. } | GenerateError::Engine { .. } => Outcome::Failed,
        GenerateError::Busy { .. } | GenerateError::Unavailable { .. } => Outcome::Refused,
        GenerateError::Invalid { .. }
        | GenerateError::UnknownModel { .. }
        | GenerateError::ContextExceeded { .. } => Outcome::Answered,
    }
}

/// An accepted request.
struct Running {
    course: Course,
    /// None only while a rival is waited for that is the last hope.
    current: Option<Attempt>,
    rival: Option<BoxFuture<'static, Result<Won, NodeId>>>,
    watch: Watch,
    /// Events that a rival won with.
    due: VecDeque<TokenEvent>,
    ended: bool,
}

/// What happens next.
enum Next {
    Event(TokenEvent),
    Rival(Result<Won, NodeId>),
    Silence,
}

impl Running {
    async fn next(&mut self) -> Option<TokenEvent> {
        while !self.ended {
            let next = match self.due.pop_front() {
                Some(event) => Next::Event(event),
                None => self.wait().await,
            };
            match next {
                Next::Event(TokenEvent::Started { cached_tokens }) => {
                    if self.course.cached_tokens.is_none() {
                        self.course.cached_tokens = Some(cached_tokens);
                        return Some(TokenEvent::Started { cached_tokens });
                    }
                }
                Next::Event(TokenEvent::Prompt { index, logprobs }) => {
                    // Another node tells from the beginning.
                    let known = self.course.told.saturating_sub(index as usize);
                    let new = logprobs.into_iter().skip(known).collect::<Vec<_>>();
                    if !new.is_empty() {
                        let index = index + known as u32;
                        self.course.told = index as usize + new.len();
                        return Some(TokenEvent::Prompt { index, logprobs: new });
                    }
                }
                Next::Event(TokenEvent::Tokens { index, tokens, logprobs }) => {
                    if index as usize == self.course.output.len() {
                        self.took(&tokens);
                        return Some(TokenEvent::Tokens { index, tokens, logprobs });
                    }
                    let reason = format!("token {index} came where {} was due", self.course.output.len());
                    if let Some(event) = self.broke_off(GenerateError::NodeLost { tokens: 0, reason }).await {
                        return Some(event);
                    }
                }
                Next::Event(TokenEvent::Finished(Finish { reason: FinishReason::Failed(error), .. })) => {
                    if let Some(event) = self.broke_off(error).await {
                        return Some(event);
                    }
                }
                Next::Event(TokenEvent::Finished(finish)) => {
                    let cached_tokens = self.course.cached_tokens.unwrap_or(finish.usage.cached_tokens);
                    return Some(self.end(finish.reason, Usage { cached_tokens, ..finish.usage }));
                }
                Next::Rival(Ok(Won { attempt, events })) => {
                    let from =
                        std::mem::replace(&mut self.course.asked, attempt.place.info.node_name.clone());
                    let why = "the second was first".to_owned();
                    self.course.moved(MoveKind::HedgeWon, &from, &self.course.asked, why);
                    if let Some(slow) = self.current.replace(attempt) {
                        tracing::info!(request = %self.course.request.id, node = %slow.place.info.node_name, "given up: another was first");
                        slow.place.outcome(Outcome::Failed);
                        self.course.give_up(&slow.place);
                    }
                    (self.rival, self.due) = (None, events);
                }
                Next::Rival(Err(node)) => {
                    self.rival = None;
                    self.course.tried.push(Tried { node, life: None });
                    if self.current.is_none() {
                        let reason = "all nodes that had it were lost".to_owned();
                        if let Some(event) = self.go_on(GenerateError::NodeLost { tokens: 0, reason }).await {
                            return Some(event);
                        }
                    }
                }
                Next::Silence => self.look(),
            }
        }
        None
    }

    async fn wait(&mut self) -> Next {
        let Self { current, rival, watch, .. } = self;
        let event = async {
            match current {
                // Its producers end every stream with a last event; `None` here breaks the contract.
                Some(current) => match current.events.next().await {
                    Some(event) => event,
                    None => lost("its stream ended without an end"),
                },
                None => std::future::pending().await,
            }
        };
        let rivals = rival.is_some();
        let won = async {
            match rival {
                Some(rival) => rival.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            event = event => Next::Event(event),
            won = won => Next::Rival(won),
            () = &mut watch.sleep, if !rivals => Next::Silence,
        }
    }

    /// Tokens came from the node that has the request.
    fn took(&mut self, tokens: &[TokenId]) {
        let now = Instant::now();
        self.course.output.extend_from_slice(tokens);
        self.watch.since = now;
        self.rival = None;
        let Some(current) = &mut self.current else { return };
        current.place.pulse.beat(now.into_std());
        current.place.tokens += tokens.len() as u32;
        if !current.begun {
            current.begun = true;
            current.place.first_token();
            // It goes on: what failed before has been made good.
            self.course.tried.clear();
        }
    }

    /// It has been silent for a while.
    fn look(&mut self) {
        let Some(current) = &self.current else { return };
        let since = self.watch.since.into_std();
        let stage = self.course.stage();
        let dispatch = &self.course.dispatch;
        let wait = match dispatch.silence(&current.place, &self.course.request.model, stage, since) {
            Silence::Normal(wait) => wait,
            Silence::Stalled => {
                self.rival = self.course.rival(&current.place);
                LOOK_AGAIN
            }
        };
        self.watch.sleep.as_mut().reset(Instant::now() + wait);
    }

    /// The node that has it failed: it goes on elsewhere, or ends with the event returned.
    async fn broke_off(&mut self, error: GenerateError) -> Option<TokenEvent> {
        let place = self.current.take().map(|attempt| attempt.place);
        let worth = place.is_none_or(|place| {
            let worth = self.course.failed(&place, &error);
            tracing::info!(
                request = %self.course.request.id, node = %place.info.node_name, %error, worth,
                tokens = self.course.output.len(), "broke off"
            );
            worth
        });
        if !worth {
            self.rival = None;
            return Some(self.fail(error));
        }
        if self.rival.is_some() {
            return None;
        }
        self.go_on(error).await
    }

    async fn go_on(&mut self, error: GenerateError) -> Option<TokenEvent> {
        if self.course.output.len() >= self.course.request.max_tokens as usize {
            // All that was lost is the word that this is the end.
            return Some(self.end(FinishReason::Length, self.course.usage()));
        }
        match self.course.next(Some(error)).await {
            Ok(attempt) => {
                tracing::info!(
                    request = %self.course.request.id, node = %attempt.place.info.node_name,
                    tokens = self.course.output.len(), "goes on elsewhere"
                );
                self.current = Some(attempt);
                self.watch = Watch::new();
                None
            }
            Err(error) => Some(self.fail(error)),
        }
    }

    fn fail(&mut self, error: GenerateError) -> TokenEvent {
        let tokens = self.course.output.len() as u32;
        let error = match error {
            GenerateError::NodeLost { reason, .. } => GenerateError::NodeLost { tokens, reason },
            error => error,
        };
        let usage = self.course.usage();
        self.end(FinishReason::Failed(error), usage)
    }

    fn end(&mut self, reason: FinishReason, usage: Usage) -> TokenEvent {
        self.ended = true;
        (self.current, self.rival) = (None, None);
        TokenEvent::Finished(Finish { reason, usage })
    }
}

fn lost(reason: &str) -> TokenEvent {
    let error = GenerateError::NodeLost { tokens: 0, reason: reason.to_owned() };
    TokenEvent::Finished(Finish { reason: FinishReason::Failed(error), usage: Usage::default() })
}

/// When the last token came, and when that is looked at next: tokens only set the time, so that they cost no timer.
struct Watch {
    since: Instant,
    sleep: Pin<Box<Sleep>>,
}

impl Watch {
    fn new() -> Self {
        let since = Instant::now();
        Self { since, sleep: Box::pin(sleep_until(since + START_DEADLINE_MIN)) }
    }
}
