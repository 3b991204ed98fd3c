//! Inside the engine child process: pipes on one side, an [`engine::Engine`] on the other.
//!
//! Four threads. The calling one owns the [`EngineHost`] and all that the model holds: it takes commands, steps, and hands
//! each step's reports on. A reader turns standard input into commands, a writer turns reports into one write per step, and
//! one compiles grammars; all channels are bounded. The end of standard input means that the parent is gone: the process ends, a few seconds later
//! at the latest, even out of a long step. The clock is read here and nowhere further in.

mod compiler;
mod embed_host;
mod host;
mod probe;
mod task;

pub use embed_host::EmbedHost;
pub use host::EngineHost;
pub use task::{RankTask, StageStep, end_with_parent, run_measure, run_stage};

use bytes::BytesMut;
use compiler::Compiler;
use engine::{Embedder, EngineSettings, Model, grammar::Matcher};
use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};
use task::Told;
use types::{GenerateError, ModelAssets, RequestId, limits};
use wire::{Decoder, EngineCommand, EngineReport, FrameClass};

/// Commands read and not yet taken; the pipe holds the rest back.
const COMMANDS_MAX: usize = 256;
/// Steps whose reports are not yet written; a parent that reads no more for so long is as good as gone.
const STEPS_UNWRITTEN_MAX: usize = 256;
/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;
/// How long the process may live without its parent: a step may have to end first.
const PARENT_GONE_TIME_MAX: Duration = Duration::from_secs(5);
/// The same of a pipeline's first rank.
const RANK_GONE_TIME_MAX: Duration = Duration::from_secs(1);
/// At most one progress report of the same thing in this time.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// What the loading of a model gives.
#[derive(Debug)]
pub struct LoadedModel {
    /// The model.
    pub model: Box<dyn Model>,
    /// Its tokenizer and template; their hash must be that of the model's card.
    pub assets: ModelAssets,
}

/// What the loading of an embedder gives.
#[derive(Debug)]
pub struct LoadedEmbedder {
    /// The model.
    pub model: Box<dyn Embedder>,
    /// Its tokenizer; the hash must be that of the model's card.
    pub assets: ModelAssets,
}

/// A model of either kind.
#[derive(Debug)]
pub enum Loaded {
    /// One that generates.
    Generator(LoadedModel),
    /// One that makes vectors.
    Embedder(LoadedEmbedder),
}

impl From<LoadedModel> for Loaded {
    fn from(loaded: LoadedModel) -> Self {
        Self::Generator(loaded)
    }
}

/// Loads a model and runs its engine on the calling thread, until told to shut down or until the parent is gone.
///
/// `load` is given a function to tell its progress (what, and a fraction from 0 to 1). What it fails with reaches the
/// parent as the reason. `stdout` must be used by nobody else: see [`private_stdout`].
///
/// Returns success after a shutdown, and failure where the model could not be loaded or its backend failed.
pub fn run<L: Into<Loaded>>(
    load: impl FnOnce(&mut dyn FnMut(&str, f32)) -> Result<L, String>,
    settings: EngineSettings,
    stdin: impl Read + Send + 'static,
    stdout: impl Write + Send + 'static,
) -> ExitCode {
    live(stdin, stdout, PARENT_GONE_TIME_MAX, |link| serve(load, settings, link))
}

/// The same of a pipeline's first rank: joins the others, then loads. Tells that it joined, and every 250 ms that it lives,
/// from a thread of its own. Without its parent it ends within a second: the other ranks are being ended too, and inside MLX
/// it would wait for them for ever.
pub fn run_head<J, L: Into<Loaded>>(
    join: impl FnOnce() -> Result<J, String>,
    load: impl FnOnce(J, &mut dyn FnMut(&str, f32)) -> Result<L, String>,
    settings: EngineSettings,
    stdin: impl Read + Send + 'static,
    stdout: impl Write + Send + 'static,
) -> ExitCode {
    let code = live(stdin, stdout, RANK_GONE_TIME_MAX, |link| {
        let _beats = task::beat(link.reports.clone());
        let joined = join().map_err(Failure)?;
        if link.send(vec![EngineReport::Joined]).is_err() {
            return Ok(());
        }
        serve(|progress: &mut dyn FnMut(&str, f32)| load(joined, progress), settings, link)
    });
    task::end_process_within(RANK_GONE_TIME_MAX);
    code
}

/// The threads around what `work` does on the calling one.
fn live(
    stdin: impl Read + Send + 'static,
    stdout: impl Write + Send + 'static,
    gone_time_max: Duration,
    work: impl FnOnce(&mut Link) -> Result<(), Failure>,
) -> ExitCode {
    let (sender, inputs) = sync_channel(COMMANDS_MAX);
    let (report_sender, reports) = sync_channel(STEPS_UNWRITTEN_MAX);
    let commands = sender.clone();
    thread::spawn(move || {
        if read_commands(stdin, commands) {
            end_process_later(gone_time_max);
        }
    });
    let writer = thread::spawn(move || write_reports(stdout, reports));
    let mut link = Link { inputs, sender, reports: report_sender };
    let ended = catch_unwind(AssertUnwindSafe(|| work(&mut link)));
    let ended = ended.unwrap_or_else(|panic| Err(Failure(format!("panicked: {}", panic_message(&*panic)))));
    let code = match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(message)) => {
            tracing::error!(%message, "the engine ends");
            // Where the parent is gone too, nobody is left to tell.
            let _ = link.send(vec![EngineReport::Failed { message }]);
            ExitCode::FAILURE
        }
    };
    drop(link);
    // Ends as soon as the parent has read, or is gone.
    let _ = writer.join();
    code
}

/// A handle to the real standard output, which from then on is standard error to everyone else in this process: C and
/// C++ libraries included, so that nothing can be printed between two frames.
///
/// # Errors
/// Where the system has no more file descriptors.
#[cfg(unix)]
pub fn private_stdout() -> std::io::Result<std::fs::File> {
    use std::os::fd::AsFd;
    let private = std::io::stdout().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdout(std::io::stderr().as_fd())?;
    Ok(private.into())
}

struct Failure(String);

/// The parent does not read any more.
struct ParentGone;

/// What the engine's thread is told.
enum Input {
    Command(EngineCommand),
    Compiled(RequestId, Box<Result<Matcher, GenerateError>>),
    /// There is no further command: the parent is gone.
    End,
}

struct Link {
    inputs: Receiver<Input>,
    /// For those who tell more.
    sender: SyncSender<Input>,
    reports: SyncSender<Vec<EngineReport>>,
}

impl Link {
    fn send(&self, reports: Vec<EngineReport>) -> Result<(), ParentGone> {
        if reports.is_empty() { Ok(()) } else { self.reports.send(reports).map_err(|_| ParentGone) }
    }

    /// Passes on all that is there to be told; waits for one if told so. True: the parent is gone.
    fn take(&self, mut wait: bool, mut take: impl FnMut(Input)) -> bool {
        loop {
            // Without a wait, only what is there already.
            let wait_time = if wait { limits::LOAD_INTERVAL_MAX } else { Duration::ZERO };
            match self.inputs.recv_timeout(wait_time) {
                Ok(Input::End) | Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
                Ok(input) => take(input),
            }
            wait = false;
        }
    }
}

fn serve<L: Into<Loaded>>(
    load: impl FnOnce(&mut dyn FnMut(&str, f32)) -> Result<L, String>,
    settings: EngineSettings,
    link: &mut Link,
) -> Result<(), Failure> {
    let mut told = Told::default();
    let mut progress = |what: &str, fraction: f32| told.loading(&link.reports, what, fraction);
    let loaded = load(&mut progress).map_err(Failure)?.into();
    progress("measuring", 0.0);
    match loaded {
        Loaded::Generator(loaded) => generate(loaded, settings, link),
        Loaded::Embedder(loaded) => embed(loaded, link),
    }
}

/// Runs an embedder.
fn embed(loaded: LoadedEmbedder, link: &mut Link) -> Result<(), Failure> {
    let (mut host, ready) =
        EmbedHost::new(loaded, Instant::now).map_err(|error| Failure(error.to_string()))?;
    if link.send(ready).is_err() {
        return Ok(());
    }
    loop {
        let mut reports = Vec::new();
        let parent_gone = link.take(host.is_idle(), |input| {
            if let Input::Command(command) = input {
                host.take(command, &mut reports);
            }
        });
        if parent_gone || host.is_over() {
            let _ = link.send(reports);
            return Ok(());
        }
        let stepped = host.step(Instant::now(), &mut reports);
        host.stepped(Instant::now(), &mut reports);
        if link.send(reports).is_err() {
            return Ok(());
        }
        stepped.map_err(|error| Failure(error.to_string()))?;
    }
}

/// Runs the engine of a model that generates.
fn generate(loaded: LoadedModel, settings: EngineSettings, link: &mut Link) -> Result<(), Failure> {
    let (tokenizer_json, card) = (loaded.assets.tokenizer_json.clone(), loaded.model.card().clone());
    let (mut host, ready) =
        EngineHost::new(loaded, settings, Instant::now).map_err(|error| Failure(error.to_string()))?;
    if link.send(ready).is_err() {
        return Ok(());
    }
    let done = link.sender.clone();
    let compiler = Compiler::start(tokenizer_json, &card, move |id, matcher| {
        done.send(Input::Compiled(id, Box::new(matcher))).is_ok()
    });
    let mut unprepared = true;
    loop {
        let mut reports = Vec::new();
        let wait = host.is_idle() && !unprepared;
        let parent_gone = link.take(wait, |input| match input {
            Input::Command(command) => host.take(Instant::now(), command, &mut reports),
            Input::Compiled(id, matcher) => host.compiled(Instant::now(), id, *matcher, &mut reports),
            Input::End => {}
        });
        for (id, grammar) in host.take_uncompiled() {
            if let Err(error) = compiler.compile(id, grammar) {
                host.compiled(Instant::now(), id, Err(error), &mut reports);
            }
        }
        if parent_gone || host.is_over() {
            let _ = link.send(reports);
            return Ok(());
        }
        let stepped = host.step(Instant::now(), &mut reports);
        host.stepped(Instant::now(), &mut reports);
        if link.send(reports).is_err() {
            return Ok(());
        }
        stepped.map_err(|error| Failure(error.to_string()))?;
        if unprepared && host.is_idle() {
            unprepared = host.prepare().map_err(|error| Failure(error.to_string()))?;
        }
    }
}

/// The reader thread, until the end of the input. True: the process is to end; false: it does.
fn read_commands(mut stdin: impl Read, commands: SyncSender<Input>) -> bool {
    let decoder = Decoder::<EngineCommand>::new(FrameClass::Engine);
    let mut buffer = BytesMut::new();
    let mut chunk = vec![0; READ_BYTES];
    loop {
        match stdin.read(&mut chunk) {
            Ok(0) => break,
            Ok(bytes) => buffer.extend_from_slice(&chunk[..bytes]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(%error, "standard input cannot be read");
                break;
            }
        }
        loop {
            match decoder.next(&mut buffer) {
                Ok(Some(command)) => {
                    if commands.send(Input::Command(command)).is_err() {
                        return false;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::error!(%error, "standard input is not from an mlx-node");
                    // Who does not take it has ended.
                    let _ = commands.send(Input::End);
                    return true;
                }
            }
        }
    }
    let _ = commands.send(Input::End);
    true
}

/// The engine's thread may be in the middle of loading, or of a long step, and not look at its channel for minutes.
fn end_process_later(most: Duration) {
    thread::sleep(most);
    tracing::error!("the parent process is gone");
    task::end_process();
}

/// The writer thread: one write for all that is there.
fn write_reports(mut stdout: impl Write, reports: Receiver<Vec<EngineReport>>) {
    let mut buffer = BytesMut::new();
    while let Ok(batch) = reports.recv() {
        let mut next = Some(batch);
        while let Some(batch) = next {
            for report in &batch {
                if let Err(error) = wire::encode(FrameClass::Engine, report, &mut buffer) {
                    tracing::error!(%error, "a report cannot be encoded");
                    return;
                }
            }
            next = reports.try_recv().ok();
        }
        if stdout.write_all(&buffer).and_then(|()| stdout.flush()).is_err() {
            return;
        }
        buffer.clear();
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}
