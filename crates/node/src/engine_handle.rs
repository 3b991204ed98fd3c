//! The engine as the rest of the node sees it: admission, submission, cancellation, and its state.
//!
//! [`EngineHandle`] shares one table with the task that reads the child's reports (`engine_child.rs`). An entry in the
//! table is the admission permit: it is made before anything is sent to the child and goes when the child reported the
//! request's end, or died. There are never more entries than the engine has slots and waiting places.

mod embeds;

use crate::cache_mirror::{CacheCursor, CacheMirror, CacheNews};
use crate::settings::{ENGINE_SLOTS_MAX, NODE_RETRY_AFTER, SESSION_CALLS_MAX};
use crate::sink::{TokenSink, TokenSource, token_channel};
use embeds::OpenEmbed;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, oneshot, watch};
use types::{
    AssetsHash, CacheEvent, EngineState, GenerateError, GenerateRequest, ModelAssets, ModelCard, NodeLoad,
    PipelineReport, RequestId, SessionInfo, SessionRequest, TokenEvent, limits,
};
use wire::EngineCommand;

/// Commands on their way to a child: each request is at most one `Submit` and one `Cancel`, each question about sessions
/// one command, so this is never full.
const COMMANDS_MAX: usize =
    2 * (ENGINE_SLOTS_MAX as usize + limits::ENGINE_WAITING_MAX) + SESSION_CALLS_MAX + 1;

/// What the cluster is told of this node.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NodeReport {
    pub(crate) state: EngineState,
    pub(crate) models: Vec<ModelCard>,
    /// None until the engine was ready.
    pub(crate) load: Option<NodeLoad>,
    /// Of a pipeline's member.
    pub(crate) pipeline: Option<PipelineReport>,
}

/// Clones share the engine.
#[derive(Clone)]
pub(crate) struct EngineHandle {
    table: Arc<Mutex<Table>>,
    /// Apart from the table, so that a router that is told everything holds no token up.
    cache: Arc<Mutex<CacheMirror>>,
    changed: watch::Sender<()>,
}

struct Table {
    state: EngineState,
    draining: bool,
    /// Kept while the engine restarts: it is what the node serves, if not now.
    card: Option<ModelCard>,
    assets: Option<(AssetsHash, Arc<ModelAssets>)>,
    slots: u32,
    load: Option<NodeLoad>,
    /// How the last child ended.
    failure: Option<String>,
    requests: BTreeMap<RequestId, Open>,
    embeds: BTreeMap<RequestId, OpenEmbed>,
    submitted: u64,
    /// Questions about sessions that the child has not answered, by their number.
    calls: BTreeMap<u64, oneshot::Sender<Vec<SessionInfo>>>,
    called: u64,
    /// Answers that are on their way to other machines.
    deliveries: usize,
    commands: Option<mpsc::Sender<EngineCommand>>,
    pipeline: Option<PipelineReport>,
    /// All requests have been ended here; what the child still says of them is of no use.
    abandoned: bool,
    /// The child goes, and nothing that it was asked for is why.
    excused: bool,
}

struct Open {
    sink: TokenSink,
    /// Position in the order of submission; also tells one life of an id from another.
    serial: u64,
    /// Tokens to be read, and to be written at most, before it has begun.
    unread: u32,
    unwritten: u32,
}

/// What an engine child did that its contract forbids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("protocol error: {message}")]
pub(crate) struct ProtocolError {
    pub(crate) message: String,
}

impl EngineHandle {
    pub(crate) fn new() -> Self {
        let table = Table {
            state: EngineState::Loading,
            draining: false,
            card: None,
            assets: None,
            slots: 0,
            load: None,
            failure: None,
            requests: BTreeMap::new(),
            embeds: BTreeMap::new(),
            submitted: 0,
            calls: BTreeMap::new(),
            called: 0,
            deliveries: 0,
            commands: None,
            pipeline: None,
            abandoned: false,
            excused: false,
        };
        Self { table: Arc::new(Mutex::new(table)), cache: Arc::default(), changed: watch::Sender::new(()) }
    }

    /// Takes a request or says why not; never waits.
    pub(crate) fn generate(&self, request: GenerateRequest) -> Result<TokenSource, GenerateError> {
        let mut table = self.lock();
        table.admit(&request)?;
        let id = request.id;
        let given = request.output.len() as u32;
        let (prompt_tokens, max_tokens) = (request.prompt.len() as u32, request.max_tokens);
        let model = request.model.clone();
        let sent = table
            .commands
            .as_ref()
            .is_some_and(|it| it.try_send(EngineCommand::Submit(request.into())).is_ok());
        if !sent {
            return Err(GenerateError::Unavailable { model, reason: "its engine is going".to_owned() });
        }
        table.submitted += 1;
        let serial = table.submitted;
        let engine = self.clone();
        let (sink, source) =
            token_channel(prompt_tokens, given..max_tokens, move || engine.cancel(id, serial));
        let (unread, unwritten) = (prompt_tokens + given, max_tokens - given);
        table.requests.insert(id, Open { sink, serial, unread, unwritten });
        drop(table);
        self.changed.send_replace(());
        Ok(source)
    }

    /// A model's tokenizer and template, if this engine has it.
    pub(crate) fn assets(&self, hash: AssetsHash) -> Option<Arc<ModelAssets>> {
        self.lock().assets.as_ref().filter(|(known, _)| *known == hash).map(|(_, assets)| assets.clone())
    }

    /// Names or ends sessions, and gives those that this was about; waits for the engine, which looks between two steps.
    /// One that is not ready has none.
    pub(crate) async fn sessions(&self, request: SessionRequest) -> Result<Vec<SessionInfo>, GenerateError> {
        let answer = {
            let mut table = self.lock();
            let Some(commands) = table.commands.as_ref().filter(|_| table.state == EngineState::Ready) else {
                return Ok(Vec::new());
            };
            if table.calls.len() >= SESSION_CALLS_MAX {
                return Err(GenerateError::Busy { retry_after_ms: NODE_RETRY_AFTER.as_millis() as u64 });
            }
            let call = table.called;
            // Where this fails the child is going, which drops the sender below as well.
            let _ = commands.try_send(EngineCommand::Sessions { call, request });
            let (sender, answer) = oneshot::channel();
            table.calls.insert(call, sender);
            table.called += 1;
            answer
        };
        let gone = |_| GenerateError::Engine { message: "it ended before it answered".to_owned() };
        answer.await.map_err(gone)
    }

    /// Counts an answer to another machine until the guard is dropped: the node must not leave before.
    pub(crate) fn delivery(&self) -> Delivery {
        self.lock().deliveries += 1;
        Delivery { engine: self.clone() }
    }

    /// The state now, with everything accepted so far counted in, also what the engine has not reported yet.
    pub(crate) fn report(&self) -> NodeReport {
        let table = self.lock();
        let state = match (&table.state, table.draining) {
            (EngineState::Ready, true) => EngineState::Draining,
            (state, _) => state.clone(),
        };
        let load = table.load.map(|load| table.with_unseen(load));
        let models = table.card.iter().cloned().collect();
        NodeReport { state, models, load, pipeline: table.pipeline.clone() }
    }

    /// What a router that was told up to `told` has to be told of the cache, and up to where that goes.
    pub(crate) fn cache_news(&self, told: Option<CacheCursor>) -> Option<(CacheNews, CacheCursor)> {
        self.lock_cache().news(told)
    }

    pub(crate) fn is_ready(&self) -> bool {
        let table = self.lock();
        table.state == EngineState::Ready && !table.draining
    }

    /// How the last child ended, if one did.
    pub(crate) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// From now on nothing is taken; what runs goes on.
    pub(crate) fn drain(&self) {
        self.lock().draining = true;
        self.changed.send_replace(());
    }

    /// Requests that have not ended, and answers that have not arrived where they were asked for.
    pub(crate) fn open_requests(&self) -> usize {
        let table = self.lock();
        (table.requests.len() + table.embeds.len()).max(table.deliveries)
    }

    /// Told of every change.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn cancel(&self, id: RequestId, serial: u64) {
        let table = self.lock();
        if table.requests.get(&id).is_some_and(|open| open.serial == serial)
            && let Some(commands) = &table.commands
        {
            // Fails only where the child is gone, and with it the request.
            let _ = commands.try_send(EngineCommand::Cancel(id));
        }
    }

    fn lock_cache(&self) -> MutexGuard<'_, CacheMirror> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Each change is complete in itself, so a panic elsewhere leaves nothing half done.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The side of the task that owns the child.
impl EngineHandle {
    /// A child was started: what it is to be sent comes out of here.
    pub(crate) fn child_started(&self) -> mpsc::Receiver<EngineCommand> {
        let (sender, commands) = mpsc::channel(COMMANDS_MAX);
        let mut table = self.lock();
        (table.commands, table.excused) = (Some(sender), false);
        commands
    }

    /// How the pipeline stands that this node is a member of. Where this node's engine does not serve, that is its state.
    pub(crate) fn pipeline(&self, report: PipelineReport) {
        let mut table = self.lock();
        let state = EngineState::Pipeline(report.detail.clone());
        let same = table.state == EngineState::Ready || table.state == state;
        if same && table.pipeline.as_ref() == Some(&report) {
            return;
        }
        if table.state != EngineState::Ready {
            table.state = state;
        }
        table.pipeline = Some(report);
        drop(table);
        self.changed.send_replace(());
    }

    /// Its load is known with its first report of it, which comes with this one.
    pub(crate) fn child_ready(&self, card: ModelCard, assets: ModelAssets, slots: u32) {
        let mut table = self.lock();
        table.state = EngineState::Ready;
        table.assets = Some((card.assets, Arc::new(assets)));
        table.card = Some(card);
        table.slots = slots.clamp(1, ENGINE_SLOTS_MAX);
        table.load = None;
        drop(table);
        self.changed.send_replace(());
    }

    pub(crate) fn child_load(&self, load: NodeLoad) {
        let mut table = self.lock();
        let slots = table.slots;
        table.load = Some(NodeLoad { slots, ..load });
        drop(table);
        self.changed.send_replace(());
    }

    pub(crate) fn child_cache(&self, events: Vec<CacheEvent>) {
        self.lock_cache().take(events);
        self.changed.send_replace(());
    }

    /// Passes an event on; one for a request that is not here is a child's error, as ids stay until their end.
    pub(crate) fn child_event(&self, id: RequestId, event: TokenEvent) -> Result<(), ProtocolError> {
        let mut table = self.lock();
        let Some(open) = table.requests.get(&id) else {
            if table.abandoned {
                return Ok(());
            }
            return Err(ProtocolError { message: format!("an event for the unknown request {id}") });
        };
        let last = matches!(event, TokenEvent::Finished(_));
        let pushed = open.sink.push(event);
        if last {
            table.requests.remove(&id);
        }
        drop(table);
        if last {
            self.changed.send_replace(());
        }
        pushed.map_err(|error| ProtocolError { message: format!("request {id}: {error}") })
    }

    pub(crate) fn child_rejected(&self, id: RequestId, error: GenerateError) -> Result<(), ProtocolError> {
        let mut table = self.lock();
        if let Some(open) = table.embeds.remove(&id) {
            drop(table);
            open.end(Err(error));
            self.changed.send_replace(());
            return Ok(());
        }
        let open = table.requests.remove(&id);
        if open.is_none() && table.abandoned {
            return Ok(());
        }
        drop(table);
        let open =
            open.ok_or_else(|| ProtocolError { message: format!("rejects the unknown request {id}") })?;
        open.sink.fail(|_| error);
        self.changed.send_replace(());
        Ok(())
    }

    /// Passes the answer to a question about sessions on.
    pub(crate) fn child_sessions(&self, call: u64, sessions: Vec<SessionInfo>) -> Result<(), ProtocolError> {
        let mut table = self.lock();
        let asked = table.calls.remove(&call);
        if asked.is_none() && table.abandoned {
            return Ok(());
        }
        let asked =
            asked.ok_or_else(|| ProtocolError { message: format!("answers the unknown call {call}") })?;
        // Whoever asked may have waited long enough.
        let _ = asked.send(sessions);
        Ok(())
    }

    /// The child is about to be ended because others are lost or come: its requests are not what an engine died of.
    pub(crate) fn excuse(&self) {
        self.lock().excused = true;
    }

    /// The child is gone: whatever it had ends here, once.
    pub(crate) fn child_ended(&self, reason: &str) {
        let mut table = self.lock();
        table.state = EngineState::Restarting(reason.to_owned());
        table.commands = None;
        table.load = None;
        table.failure = Some(reason.to_owned());
        table.calls.clear();
        let excused = table.excused;
        let (open, embeds) = (std::mem::take(&mut table.requests), std::mem::take(&mut table.embeds));
        drop(table);
        self.lock_cache().restart();
        end_all(open, embeds, |tokens| match excused {
            true => GenerateError::NodeLost { tokens, reason: reason.to_owned() },
            false => GenerateError::Engine { message: reason.to_owned() },
        });
        self.changed.send_replace(());
    }

    /// Ends all requests and has the child exit.
    pub(crate) fn ask_child_to_exit(&self) {
        let mut table = self.lock();
        table.draining = true;
        table.abandoned = true;
        table.calls.clear();
        let (open, embeds) = (std::mem::take(&mut table.requests), std::mem::take(&mut table.embeds));
        if let Some(commands) = table.commands.take() {
            for &id in open.keys().chain(embeds.keys()) {
                let _ = commands.try_send(EngineCommand::Cancel(id));
            }
            // Where even this finds no room, the end of the pipe means the same.
            let _ = commands.try_send(EngineCommand::Shutdown);
        }
        drop(table);
        let left = |tokens| GenerateError::NodeLost { tokens, reason: "the node has left".to_owned() };
        end_all(open, embeds, left);
        self.changed.send_replace(());
    }
}

/// An answer on its way to another machine.
pub(crate) struct Delivery {
    engine: EngineHandle,
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.engine.lock().deliveries -= 1;
    }
}

/// The last event of requests whose engine is gone.
fn end_all(
    requests: BTreeMap<RequestId, Open>,
    embeds: BTreeMap<RequestId, OpenEmbed>,
    error: impl Fn(u32) -> GenerateError,
) {
    for open in requests.into_values() {
        open.sink.fail(&error);
    }
    for open in embeds.into_values() {
        open.end(Err(error(0)));
    }
}

impl Table {
    /// The card of the model that a request names, where it can be taken.
    fn card_for(&self, model: &str, id: RequestId) -> Result<&ModelCard, GenerateError> {
        let unavailable = |reason: String| GenerateError::Unavailable { model: model.to_owned(), reason };
        if self.draining {
            return Err(unavailable("the node is leaving".to_owned()));
        }
        let card = match (&self.state, &self.card) {
            (EngineState::Ready, Some(card)) => card,
            (EngineState::Restarting(seen), _) => {
                return Err(unavailable(format!("the node's engine is restarting ({seen})")));
            }
            (EngineState::Pipeline(how), _) => {
                return Err(unavailable(format!("the node's pipeline is not up: {how}")));
            }
            _ => return Err(unavailable("the node is loading its model".to_owned())),
        };
        if card.name != model {
            let served = vec![card.name.clone()];
            return Err(GenerateError::UnknownModel { model: model.to_owned(), served });
        }
        if self.requests.contains_key(&id) || self.embeds.contains_key(&id) {
            // As where it comes back before its cancellation has arrived.
            return Err(unavailable(format!("a request with the id {id} is running already")));
        }
        Ok(card)
    }

    fn admit(&self, request: &GenerateRequest) -> Result<(), GenerateError> {
        let card = self.card_for(&request.model, request.id)?;
        card.must_generate()?;
        // The engine checks these too, but by then the request has been accepted and its status sent.
        let (prompt_tokens, max_tokens) = (request.prompt.len() as u32, request.max_tokens);
        let kv_tokens = self.load.map_or(0, |load| load.kv_tokens.1);
        let room = if kv_tokens == 0 { u64::MAX } else { kv_tokens };
        let context_tokens = room.min(u64::from(card.context_tokens)) as u32;
        if u64::from(prompt_tokens) + u64::from(max_tokens) > u64::from(context_tokens) {
            return Err(GenerateError::ContextExceeded { prompt_tokens, max_tokens, context_tokens });
        }
        let invalid = |token: u32, param: &str| GenerateError::Invalid {
            message: format!(
                "{param} holds the token {token}; the model's tokens end at {}",
                card.vocab_size
            ),
            param: Some(param.to_owned()),
        };
        for (param, tokens) in [("prompt", &request.prompt), ("output", &request.output)] {
            if let Some(&token) = tokens.iter().find(|&&token| token >= card.vocab_size) {
                return Err(invalid(token, param));
            }
        }
        if let Some(&(token, _)) = request.sampling.logit_bias.iter().find(|bias| bias.0 >= card.vocab_size) {
            return Err(invalid(token, "logit_bias"));
        }
        if self.requests.len() >= self.slots as usize + limits::ENGINE_WAITING_MAX {
            return Err(GenerateError::Busy { retry_after_ms: NODE_RETRY_AFTER.as_millis() as u64 });
        }
        Ok(())
    }

    /// Adds what was submitted and is on its way through the pipe: the newest requests, as many as the engine lacks.
    fn with_unseen(&self, mut load: NodeLoad) -> NodeLoad {
        let seen = load.running as usize + load.waiting as usize;
        let unseen = self.requests.len().saturating_sub(seen);
        if unseen == 0 {
            return load;
        }
        let mut newest: Vec<&Open> = self.requests.values().filter(|open| !open.sink.started()).collect();
        newest.sort_unstable_by_key(|open| std::cmp::Reverse(open.serial));
        for open in newest.into_iter().take(unseen) {
            load.waiting += 1;
            load.prefill_backlog_tokens += u64::from(open.unread);
            load.decode_backlog_tokens += u64::from(open.unwritten);
            load.prefill_backlog_s += open.unread as f32 / load.rates.prefill_tokens_per_s.max(1.0);
            load.prefill_budget_tokens = load.prefill_budget_tokens.saturating_sub(u64::from(open.unread));
        }
        load
    }
}
