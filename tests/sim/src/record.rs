//! What happened: the trace, who had which request when, and every breach of an invariant, found as it happens.

use crate::{Mutant, machine::Order, scenario::Job};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use testkit::{FakeSettings, StreamFault, check_stream};
use tokio::sync::{Notify, mpsc, watch};
use types::{Finish, FinishReason, GenerateError, GenerateRequest, RequestId, TokenEvent, limits};

/// After its faults have ended, a part of the cluster may take this long to serve again.
pub(crate) const RECOVERY_TIME_MAX: Duration = Duration::from_secs(5);
/// An engine may have a request for this long that another one has too, or that has ended: until both ends of a
/// connection have taken its silence for its end, a cancellation has come through, and a step has ended.
const LEFT_OVER_TIME_MAX: Duration =
    Duration::from_millis(limits::NODE_SILENCE_MAX.as_millis() as u64 + 2000);
/// Engines that may have a request at once: the one that is silent, or slow, and the one that took over.
const OWNERS_MAX: usize = 2;
/// Engine deaths under one request after which it may fail: it may be what they die of.
const ENGINE_DEATHS_MAX: usize = 2;
/// Engines after which a request may fail.
const ENGINES_MAX: usize = 3;

/// One engine's life: its machine, and its number.
pub(crate) type EngineId = (usize, u32);

/// Everything that all machines and the driver share. They run on one thread; the lock is never waited for.
#[derive(Debug, Clone)]
pub(crate) struct World {
    record: Arc<Mutex<Record>>,
    mutant: Option<Mutant>,
}

impl World {
    pub(crate) fn new(record: Record, mutant: Option<Mutant>) -> Self {
        Self { record: Arc::new(Mutex::new(record)), mutant }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this bug is in.
    pub(crate) fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }
}

/// A machine as the driver sees it.
#[derive(Debug)]
pub(crate) struct MachineRecord {
    pub(crate) is_node: bool,
    pub(crate) is_router: bool,
    pub(crate) is_up: bool,
    /// Starts of its program.
    pub(crate) lives: u32,
    pub(crate) inbox: Option<mpsc::UnboundedSender<Order>>,
    /// Kills its engine.
    pub(crate) engine: Option<Arc<Notify>>,
    pub(crate) engines: u32,
    /// Routers that do not give it requests yet, and since when its engine, which was started again, has been ready.
    pub(crate) awaited: BTreeMap<usize, Duration>,
    pub(crate) frozen: watch::Sender<bool>,
    /// Since when nothing is done to it; none while something is.
    pub(crate) healthy_since: Option<Duration>,
}

/// One try of a client.
#[derive(Debug)]
struct Attempt {
    job: Job,
    router: usize,
    request: GenerateRequest,
    sent: Duration,
    events: Vec<TokenEvent>,
    ended: Option<Duration>,
    /// Engines that have it, and for how long each had it in vain.
    owners: BTreeMap<EngineId, Duration>,
    /// All that ever had it.
    engines: BTreeSet<EngineId>,
    /// Those that gave tokens.
    spoke: BTreeSet<EngineId>,
    /// Those that died under it.
    deaths: usize,
}

/// What a run was, in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Texts that came to their end.
    pub finished: u32,
    /// Of those, texts that more than one engine worked on.
    pub moved: u32,
    /// Of those, texts with tokens of more than one engine.
    pub resumed: u32,
    /// Tokens that clients received.
    pub tokens: u32,
    /// Requests that clients cancelled.
    pub cancelled: u32,
    /// Requests that a client had to send again because its router was gone or cut off.
    pub sent_again: u32,
    /// Faults that were done.
    pub faults: u32,
    /// Longest time from the end of the last fault to a probe's first token.
    pub recovery_ms_max: u32,
    /// Longest time from when an engine that was started again is ready, and nothing is done to its machine and the
    /// router's, to when the router would give it requests. (Whether it does depends on what there is to do.)
    pub readmitted_ms_max: u32,
}

#[derive(Debug)]
pub(crate) struct Record {
    /// The driver's time, for where no machine runs.
    pub(crate) now: Duration,
    pub(crate) trace: String,
    pub(crate) breaches: Vec<String>,
    pub(crate) stats: Stats,
    pub(crate) machines: Vec<MachineRecord>,
    /// To be sent again, when.
    pub(crate) again: Vec<(Duration, Job)>,
    /// Jobs that are not done.
    pub(crate) open: BTreeSet<u32>,
    model: FakeSettings,
    attempts: BTreeMap<RequestId, Attempt>,
    checked: Duration,
}

impl Stats {
    /// Of several runs together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            finished: self.finished + other.finished,
            moved: self.moved + other.moved,
            resumed: self.resumed + other.resumed,
            tokens: self.tokens + other.tokens,
            cancelled: self.cancelled + other.cancelled,
            sent_again: self.sent_again + other.sent_again,
            faults: self.faults + other.faults,
            recovery_ms_max: self.recovery_ms_max.max(other.recovery_ms_max),
            readmitted_ms_max: self.readmitted_ms_max.max(other.readmitted_ms_max),
        }
    }
}

impl Record {
    pub(crate) fn new(machines: Vec<MachineRecord>, model: FakeSettings) -> Self {
        Self {
            now: Duration::ZERO,
            trace: String::new(),
            breaches: Vec::new(),
            stats: Stats::default(),
            machines,
            again: Vec::new(),
            open: BTreeSet::new(),
            model,
            attempts: BTreeMap::new(),
            checked: Duration::ZERO,
        }
    }

    pub(crate) fn time(&self) -> Duration {
        turmoil::sim_elapsed().unwrap_or(self.now)
    }

    pub(crate) fn note(&mut self, what: fmt::Arguments<'_>) {
        let time = self.time();
        writeln!(self.trace, "{:>10.6} {what}", time.as_secs_f64()).expect("a text takes everything");
    }

    /// An invariant is broken.
    pub(crate) fn fault(&mut self, what: fmt::Arguments<'_>) {
        self.note(format_args!("BREACH {what}"));
        let time = self.time();
        self.breaches.push(format!("at {:.3} s: {what}", time.as_secs_f64()));
    }
}

/// What engines tell.
impl Record {
    pub(crate) fn engine_started(&mut self, machine: usize) -> u32 {
        self.machines[machine].engines += 1;
        let number = self.machines[machine].engines;
        self.note(format_args!("m{machine} engine {number} starts"));
        number
    }

    pub(crate) fn engine_ready(&mut self, (machine, number): EngineId) {
        self.note(format_args!("m{machine} engine {number} is ready"));
        let again = number > 1 || self.machines[machine].lives > 1;
        if again {
            let since = self.time();
            let up = (0..self.machines.len())
                .filter(|&router| self.machines[router].is_router && self.machines[router].is_up);
            self.machines[machine].awaited = up.map(|router| (router, since)).collect();
        }
    }

    /// A router was started: it knows nobody, and nobody it.
    pub(crate) fn router_started(&mut self, router: usize) {
        for machine in &mut self.machines {
            machine.awaited.remove(&router);
        }
    }

    /// A router would give this machine requests.
    pub(crate) fn admitted(&mut self, machine: usize, router: usize) {
        let Some(since) = self.machines[machine].awaited.remove(&router) else { return };
        let healthy = |machine: usize| self.machines[machine].healthy_since;
        if let (Some(node), Some(router)) = (healthy(machine), healthy(router)) {
            let took = self.time().saturating_sub(since.max(node).max(router)).as_millis() as u32;
            self.stats.readmitted_ms_max = self.stats.readmitted_ms_max.max(took);
        }
    }

    pub(crate) fn engine_ended(&mut self, engine: EngineId) {
        self.note(format_args!("m{} engine {} is gone", engine.0, engine.1));
        self.machines[engine.0].awaited.clear();
        for attempt in self.attempts.values_mut() {
            if attempt.owners.remove(&engine).is_some() {
                attempt.deaths += 1;
            }
        }
    }

    pub(crate) fn owned(&mut self, id: RequestId, engine: EngineId) {
        self.note(format_args!("m{} engine {} takes {}", engine.0, engine.1, id.0));
        let Some(attempt) = self.attempts.get_mut(&id) else {
            self.fault(format_args!("an engine has the request {}, which nobody sent", id.0));
            return;
        };
        attempt.engines.insert(engine);
        attempt.owners.insert(engine, Duration::ZERO);
    }

    pub(crate) fn spoke(&mut self, id: RequestId, engine: EngineId) {
        if let Some(attempt) = self.attempts.get_mut(&id) {
            attempt.spoke.insert(engine);
        }
    }

    pub(crate) fn released(&mut self, id: RequestId, engine: EngineId) {
        self.note(format_args!("m{} engine {} lets go of {}", engine.0, engine.1, id.0));
        if let Some(attempt) = self.attempts.get_mut(&id) {
            attempt.owners.remove(&engine);
        }
    }
}

/// What clients see.
impl Record {
    pub(crate) fn sent(&mut self, job: &Job, router: usize, request: &GenerateRequest) {
        self.note(format_args!("client {} sends {} to m{router}", job.index, request.id.0));
        let attempt = Attempt {
            job: job.clone(),
            router,
            request: request.clone(),
            sent: self.time(),
            events: Vec::new(),
            ended: None,
            owners: BTreeMap::new(),
            engines: BTreeSet::new(),
            spoke: BTreeSet::new(),
            deaths: 0,
        };
        self.attempts.insert(request.id, attempt);
    }

    pub(crate) fn event(&mut self, id: RequestId, event: TokenEvent) {
        self.note(format_args!("{} {event:?}", id.0));
        let now = self.time();
        let attempt = self.attempts.get_mut(&id).expect("it was sent");
        if let TokenEvent::Tokens { tokens, .. } = &event {
            self.stats.tokens += tokens.len() as u32;
            let first = !attempt.events.iter().any(|event| matches!(event, TokenEvent::Tokens { .. }));
            if let (true, Some(since)) = (first, attempt.job.probe_of) {
                let took = now.saturating_sub(since);
                self.stats.recovery_ms_max = self.stats.recovery_ms_max.max(took.as_millis() as u32);
                if took > RECOVERY_TIME_MAX {
                    let router = attempt.router;
                    self.fault(format_args!("m{router} served again only {took:?} after the last fault"));
                }
            }
        }
        let attempt = self.attempts.get_mut(&id).expect("it was sent");
        attempt.events.push(event);
    }

    /// The stream of an accepted request has ended.
    pub(crate) fn ended(&mut self, id: RequestId) {
        let Some((tokens, finish)) = self.close(id, true) else { return };
        let attempt = &self.attempts[&id];
        let (index, engines, spoke) = (attempt.job.index, attempt.engines.len(), attempt.spoke.len());
        match finish.map(|finish| finish.reason) {
            Some(FinishReason::Length | FinishReason::Stop) => {
                let expected = self.model.output(&attempt.request);
                if tokens != expected.tokens {
                    self.fault(format_args!("{}: {tokens:?} instead of {:?}", id.0, expected.tokens));
                }
                self.stats.finished += 1;
                self.stats.moved += u32::from(engines > 1);
                self.stats.resumed += u32::from(spoke > 1);
                self.open.remove(&index);
            }
            Some(FinishReason::Failed(error)) => self.failed(id, &error),
            Some(FinishReason::Cancelled) => {
                self.fault(format_args!("{} was cancelled by nobody", id.0));
            }
            None => {}
        }
    }

    /// The client has gone.
    pub(crate) fn cancelled(&mut self, id: RequestId) {
        self.note(format_args!("client cancels {}", id.0));
        self.close(id, false);
        self.stats.cancelled += 1;
        let index = self.attempts[&id].job.index;
        self.open.remove(&index);
    }

    /// The router has gone, with the client's connection.
    pub(crate) fn router_lost(&mut self, id: RequestId) {
        self.note(format_args!("{} is gone with its router", id.0));
        self.close(id, false);
        self.send_again(id);
    }

    pub(crate) fn refused(&mut self, id: RequestId, error: &GenerateError) {
        self.note(format_args!("{} is refused: {error}", id.0));
        let now = self.time();
        self.attempts.get_mut(&id).expect("it was sent").ended = Some(now);
        self.failed(id, error);
    }

    /// Ends an attempt, and checks what came of it: tokens in order, each as it must be, and one end, or none yet.
    fn close(&mut self, id: RequestId, whole: bool) -> Option<(Vec<u32>, Option<Finish>)> {
        let now = self.time();
        let attempt = self.attempts.get_mut(&id).expect("it was sent");
        attempt.ended = Some(now);
        let (tokens, finish) = match check_stream(&attempt.events) {
            Ok((tokens, finish)) => (tokens, Some(finish)),
            Err(StreamFault::NoEnd { .. }) if !whole => {
                let tokens = |event: &TokenEvent| match event {
                    TokenEvent::Tokens { tokens, .. } => tokens.clone(),
                    TokenEvent::Prompt { .. } | TokenEvent::Started { .. } | TokenEvent::Finished(_) => {
                        Vec::new()
                    }
                };
                (attempt.events.iter().flat_map(tokens).collect(), None)
            }
            Err(fault) => {
                self.fault(format_args!("{}: {fault}", id.0));
                return None;
            }
        };
        let expected = self.model.output(&attempt.request).tokens;
        if !expected.starts_with(&tokens) {
            self.fault(format_args!("{}: {tokens:?} is not how {expected:?} begins", id.0));
        }
        Some((tokens, finish))
    }

    /// A request did not get its text: a breach, unless what was done to the cluster explains it.
    fn failed(&mut self, id: RequestId, error: &GenerateError) {
        let now = self.time();
        let attempt = &self.attempts[&id];
        let is_healthy = |machine: &MachineRecord| {
            machine.healthy_since.is_some_and(|since| now.saturating_sub(since) >= RECOVERY_TIME_MAX)
        };
        let nodes = self.machines.iter().filter(|machine| machine.is_node);
        let excused = !is_healthy(&self.machines[attempt.router])
            || !nodes.clone().any(is_healthy)
            || attempt.deaths >= ENGINE_DEATHS_MAX
            || attempt.engines.len() >= ENGINES_MAX;
        let wrong = matches!(error, GenerateError::Invalid { .. } | GenerateError::ContextExceeded { .. });
        if wrong || !excused {
            let (router, after) = (attempt.router, now - attempt.sent);
            self.fault(format_args!("{} failed at m{router} after {after:?}: {error}", id.0));
            let index = self.attempts[&id].job.index;
            self.open.remove(&index);
            return;
        }
        self.send_again(id);
    }

    fn send_again(&mut self, id: RequestId) {
        const CLIENT_RETRY: Duration = Duration::from_millis(300);
        self.stats.sent_again += 1;
        let at = self.time() + CLIENT_RETRY;
        let job = self.attempts[&id].job.clone();
        self.again.push((at, job));
    }
}

/// What is checked from time to time.
impl Record {
    /// Engines that have what they should not have, with the time since the last check.
    pub(crate) fn check_owners(&mut self) {
        let (now, since) = (self.now, self.now - self.checked);
        self.checked = now;
        let frozen: Vec<bool> = self.machines.iter().map(|machine| *machine.frozen.borrow()).collect();
        let mut faults = Vec::new();
        for (id, attempt) in &mut self.attempts {
            let awake = attempt.owners.keys().filter(|engine| !frozen[engine.0]).count();
            if awake > OWNERS_MAX {
                faults.push(format!("{awake} engines have the request {}", id.0));
            }
            for (engine, in_vain) in &mut attempt.owners {
                if (attempt.ended.is_none() && awake < 2) || frozen[engine.0] {
                    *in_vain = Duration::ZERO;
                    continue;
                }
                *in_vain += since;
                if *in_vain > LEFT_OVER_TIME_MAX {
                    *in_vain = Duration::ZERO;
                    let why = if attempt.ended.is_some() { "has ended" } else { "another engine has too" };
                    faults.push(format!("m{} still has the request {}, which {why}", engine.0, id.0));
                }
            }
        }
        for fault in faults {
            self.fault(format_args!("{fault}"));
        }
    }
}
