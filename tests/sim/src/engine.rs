//! The engine child's stand-in: a task instead of a process, pipes in memory, [`FakeModel`] instead of MLX; what is
//! between them is the real [`EngineHost`] and the real engine.

use crate::{Mutant, record::Record, record::World};
use bytes::BytesMut;
use engine::{EngineSettings, Model, ModelError, ModelLimits, Slice, StepOutput, grammar::TokenMask};
use futures_util::FutureExt;
use node::{
    EngineLife, StartEngine, StartedEngine,
    engine_process::{EngineHost, LoadedModel},
};
use std::{collections::BTreeMap, io, sync::Arc, time::Duration};
use testkit::{FakeModel, FakeSettings, VirtualClock};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::{Notify, mpsc, oneshot, watch},
    task::spawn_local,
    time::{Instant, sleep, sleep_until, timeout},
};
use types::{
    BoxFuture, GenerateDraft, GenerateRequest, ModelAssets, ModelCard, RequestId, TokenEvent, limits,
};
use wire::{Decoder, EngineCommand, EngineReport, FrameClass};

/// Bytes that a pipe holds, as on Linux.
const PIPE_BYTES: usize = 64 << 10;

/// How a machine's node starts its engine.
#[derive(Debug, Clone)]
pub(crate) struct SimEngine {
    births: mpsc::UnboundedSender<Birth>,
}

/// An engine that is to live.
#[derive(Debug)]
struct Birth {
    stdin: DuplexStream,
    stdout: DuplexStream,
    kill: Arc<Notify>,
    ended: oneshot::Sender<&'static str>,
}

/// What all engines of a machine are like.
#[derive(Debug, Clone)]
pub(crate) struct Engines {
    pub(crate) world: World,
    pub(crate) machine: usize,
    pub(crate) model: FakeSettings,
    pub(crate) load_time: Duration,
    /// True while nothing is computed.
    pub(crate) frozen: watch::Receiver<bool>,
}

impl Engines {
    /// Hosts them from here on, on this thread: models do not move to others.
    pub(crate) fn host(self) -> SimEngine {
        let (sender, mut births) = mpsc::unbounded_channel();
        spawn_local(async move {
            while let Some(Birth { stdin, stdout, kill, ended }) = births.recv().await {
                self.world.lock().machines[self.machine].engine = Some(kill.clone());
                let engine = self.clone();
                spawn_local(async move {
                    let how = tokio::select! {
                        biased;
                        () = kill.notified() => "killed",
                        () = engine.run(stdin, stdout) => "exited",
                    };
                    // Its node may have gone.
                    let _ = ended.send(how);
                });
            }
        });
        SimEngine { births: sender }
    }
}

impl StartEngine for SimEngine {
    fn start(&self) -> io::Result<StartedEngine> {
        let (commands, stdin) = duplex(PIPE_BYTES);
        let (stdout, reports) = duplex(PIPE_BYTES);
        let kill = Arc::new(Notify::new());
        let (ended, end) = oneshot::channel();
        let birth = Birth { stdin, stdout, kill: kill.clone(), ended };
        self.births.send(birth).map_err(|_| io::Error::other("the machine is going"))?;
        let life = Box::new(EngineTask { kill, end });
        Ok(StartedEngine { commands: Box::new(commands), reports: Box::new(reports), life })
    }
}

struct EngineTask {
    kill: Arc<Notify>,
    end: oneshot::Receiver<&'static str>,
}

impl EngineLife for EngineTask {
    fn kill(&mut self) {
        self.kill.notify_one();
    }

    fn ended(&mut self) -> BoxFuture<'_, io::Result<String>> {
        Box::pin(async { Ok((&mut self.end).await.unwrap_or("gone with its machine").to_owned()) })
    }
}

impl Drop for EngineTask {
    fn drop(&mut self) {
        self.kill();
    }
}

/// One engine's place in the record: with it goes whatever it had.
struct Life {
    world: World,
    machine: usize,
    number: u32,
    /// Where answers begin that [`Mutant::AnswerAsPrompt`] made begin anew.
    offsets: BTreeMap<RequestId, u32>,
}

impl Life {
    fn note(&self, note: impl FnOnce(&mut Record, (usize, u32))) {
        note(&mut self.world.lock(), (self.machine, self.number));
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.note(Record::engine_ended);
    }
}

/// [`FakeModel`] with a card that names its assets.
#[derive(Debug)]
struct SimModel {
    model: FakeModel,
    card: ModelCard,
}

impl Model for SimModel {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn limits(&self) -> ModelLimits {
        self.model.limits()
    }

    fn submit(&mut self, slices: &[Slice<'_>]) -> Result<(), ModelError> {
        self.model.submit(slices)
    }

    fn draw(&mut self, masks: &[TokenMask]) -> Result<(), ModelError> {
        self.model.draw(masks)
    }

    fn collect(&mut self) -> Result<StepOutput, ModelError> {
        self.model.collect()
    }
}

impl Engines {
    /// Until told to leave, or until nobody is at the other end of the pipes.
    async fn run(self, mut stdin: DuplexStream, mut stdout: DuplexStream) {
        let number = self.world.lock().engine_started(self.machine);
        let mut life =
            Life { world: self.world.clone(), machine: self.machine, number, offsets: BTreeMap::new() };
        let loading = EngineReport::Loading { what: "weights".to_owned(), fraction: 0.0 };
        if !send(&mut stdout, vec![loading]).await {
            return;
        }
        sleep(self.load_time).await;
        let clock = Clock { began: Instant::now(), model: VirtualClock::new() };
        let (model, _) = FakeModel::new(self.model.clone(), clock.model.clone());
        let assets = ModelAssets {
            tokenizer_json: "{}".to_owned(),
            chat_template: None,
            bos_token: None,
            eos_token: None,
        };
        let card = ModelCard { assets: assets.hash(), ..model.card().clone() };
        let loaded = LoadedModel { model: Box::new(SimModel { model, card }), assets };
        let (mut host, ready) = EngineHost::new(loaded, EngineSettings::default(), || clock.model.now())
            .expect("the model does not fail");
        clock.passed().await;
        if !send(&mut stdout, ready).await {
            return;
        }
        life.note(Record::engine_ready);
        let mut input = Input { decoder: Decoder::new(FrameClass::Engine), buffer: BytesMut::new() };
        let mut frozen = self.frozen.clone();
        while !host.is_over() {
            let Some(commands) = input.take(&mut stdin, host.is_idle()).await else { return };
            // The whole process stands still; what was sent waits in the pipe.
            let _ = frozen.wait_for(|frozen| !*frozen).await;
            let mut reports = Vec::new();
            for command in commands {
                if let Some(command) = life.taken(command) {
                    host.take(clock.now(), command, &mut reports);
                }
            }
            host.step(clock.now(), &mut reports).expect("the model does not fail");
            clock.passed().await;
            let _ = frozen.wait_for(|frozen| !*frozen).await;
            host.stepped(clock.now(), &mut reports);
            host.engine().check_invariants();
            for report in &mut reports {
                life.told(report);
            }
            if !send(&mut stdout, reports).await {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

impl Life {
    /// Notes a command; gives it as the engine gets it, bugs that were put in included.
    fn taken(&mut self, command: EngineCommand) -> Option<EngineCommand> {
        match command {
            EngineCommand::Submit(request) => {
                self.note(|record, engine| record.owned(request.id, engine));
                Some(EngineCommand::Submit(self.mutated(*request).into()))
            }
            EngineCommand::Cancel(_) if self.world.is(Mutant::ForgottenCancel) => None,
            command => Some(command),
        }
    }

    fn mutated(&mut self, request: GenerateRequest) -> GenerateRequest {
        if request.output.is_empty() {
            return request;
        }
        let mut draft = GenerateDraft::from(request);
        if self.world.is(Mutant::ForgottenAnswer) {
            draft.output.clear();
        }
        if self.world.is(Mutant::AnswerAsPrompt) {
            let offset = draft.output.len() as u32;
            self.offsets.insert(draft.id, offset);
            draft.prompt.append(&mut draft.output);
            draft.max_tokens -= offset;
        }
        draft.try_into().expect("still valid")
    }

    /// Notes a report, and puts right what [`Mutant::AnswerAsPrompt`] would show at once.
    fn told(&mut self, report: &mut EngineReport) {
        if let EngineReport::Event { id, event } = report
            && let Some(offset) = self.offsets.get(id)
        {
            match event {
                TokenEvent::Prompt { .. } | TokenEvent::Started { .. } => {}
                TokenEvent::Tokens { index, .. } => *index += offset,
                TokenEvent::Finished(finish) => {
                    finish.usage.prompt_tokens -= offset;
                    finish.usage.cached_tokens = finish.usage.cached_tokens.min(finish.usage.prompt_tokens);
                    finish.usage.completion_tokens += offset;
                }
            }
        }
        match report {
            EngineReport::Event { id, event: TokenEvent::Finished(_) }
            | EngineReport::Rejected { id, .. } => {
                self.note(|record, engine| record.released(*id, engine));
            }
            EngineReport::Event { id, event: TokenEvent::Tokens { .. } } => {
                self.note(|record, engine| record.spoke(*id, engine));
            }
            EngineReport::Load(load) => self.note(|record, _| {
                let most = limits::ENGINE_WAITING_MAX as u32 + load.slots;
                if load.waiting > most {
                    record.fault(format_args!("an engine has {} requests waiting", load.waiting));
                }
            }),
            _ => {}
        }
    }
}

/// The model's time, which runs ahead while it computes, beside the simulation's.
struct Clock {
    began: Instant,
    model: VirtualClock,
}

impl Clock {
    /// The time for both.
    fn now(&self) -> std::time::Instant {
        self.model.advance(self.began.elapsed().saturating_sub(self.model.elapsed()));
        self.model.now()
    }

    /// Waits until the simulation is where the model is.
    async fn passed(&self) {
        sleep_until(self.began + self.model.elapsed()).await;
    }
}

struct Input {
    decoder: Decoder<EngineCommand>,
    buffer: BytesMut,
}

impl Input {
    /// All commands that are there; waits for one for a while where `idle`. None at the end of the pipe.
    async fn take(&mut self, stdin: &mut DuplexStream, idle: bool) -> Option<Vec<EngineCommand>> {
        let read = stdin.read_buf(&mut self.buffer);
        let read =
            if idle { timeout(limits::LOAD_INTERVAL_MAX, read).await.ok() } else { read.now_or_never() };
        if matches!(read, Some(Ok(0) | Err(_))) {
            return None;
        }
        let next = || self.decoder.next(&mut self.buffer).expect("a node writes frames");
        Some(std::iter::from_fn(next).collect())
    }
}

/// False: nobody reads.
async fn send(stdout: &mut DuplexStream, reports: Vec<EngineReport>) -> bool {
    let mut buffer = BytesMut::new();
    for report in &reports {
        wire::encode(FrameClass::Engine, report, &mut buffer).expect("reports fit their frames");
    }
    stdout.write_all(&buffer).await.is_ok()
}
