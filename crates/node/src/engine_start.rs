//! How engines come to be: a program of its own in production, whatever speaks the same over the same pipes in a
//! simulation.

use std::ffi::OsString;
use std::fmt::{self, Debug};
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Mutex, OnceLock};
use std::thread;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use types::BoxFuture;

/// Whoever can start an engine, again and again.
pub trait StartEngine: Debug + Send + Sync + 'static {
    /// Starts one, which runs [`crate::engine_process`]'s protocol. Called within a tokio runtime.
    ///
    /// # Errors
    /// Where there is none to be had, with what was tried.
    fn start(&self) -> io::Result<StartedEngine>;
}

/// An engine that was started. Dropping `life` kills it.
pub struct StartedEngine {
    /// Takes [`wire::EngineCommand`]s.
    pub commands: Box<dyn AsyncWrite + Send + Unpin>,
    /// Gives [`wire::EngineReport`]s; its end is the engine's end.
    pub reports: Box<dyn AsyncRead + Send + Unpin>,
    /// What else there is of it.
    pub life: Box<dyn EngineLife>,
}

impl Debug for StartedEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StartedEngine").finish_non_exhaustive()
    }
}

/// The life of an engine that was started.
pub trait EngineLife: Send {
    /// Kills it; does nothing where it has ended.
    fn kill(&mut self);

    /// Waits for its end, and says how it went. Safe to cancel.
    fn ended(&mut self) -> BoxFuture<'_, io::Result<String>>;
}

/// The program that hosts an engine: it calls [`crate::engine_process::run`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineCommandLine {
    /// The executable.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Variables set on top of the inherited environment.
    pub env: Vec<(OsString, OsString)>,
}

/// Something that [`starter`]'s thread is to do.
type Start = Box<dyn FnOnce() + Send>;

/// A thread that starts processes and ends with this one. Linux takes the end of the *thread* that started a process for its
/// parent's end, of which engines ask to die ([`crate::engine_process::end_with_parent`]); an event loop's threads may end
/// before.
fn starter() -> &'static Mutex<Sender<Start>> {
    static STARTER: OnceLock<Mutex<Sender<Start>>> = OnceLock::new();
    STARTER.get_or_init(|| {
        // Who sends waits until it was done: there is never more than one for each that starts an engine.
        let (sender, starts): (Sender<Start>, Receiver<Start>) = channel();
        thread::spawn(move || starts.into_iter().for_each(|start| start()));
        Mutex::new(sender)
    })
}

/// Does something on [`starter`]'s thread, within the caller's runtime, and waits for it.
fn on_starter<T: Send + 'static>(start: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let (told, started) = sync_channel(1);
    let runtime = Handle::current();
    let start = move || {
        let _entered = runtime.enter();
        // Who asked waits for it.
        let _ = told.send(start());
    };
    let gone = || io::Error::other("the thread that starts processes is gone");
    starter().lock().map_err(|_| gone())?.send(Box::new(start)).map_err(|_| gone())?;
    started.recv().map_err(|_| gone())?
}

impl EngineCommandLine {
    fn spawn(&self) -> io::Result<StartedEngine> {
        let mut command = Command::new(&self.program);
        // Ctrl-C in a terminal is for the node, which drains first; its engine must not die of it.
        #[cfg(unix)]
        command.process_group(0);
        command
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut child = on_starter(move || command.spawn())?;
        let missing = || io::Error::other("its pipes are missing");
        let commands = Box::new(child.stdin.take().ok_or_else(missing)?);
        let reports = Box::new(child.stdout.take().ok_or_else(missing)?);
        tracing::info!(program = %self.program.display(), pid = child.id(), "engine started");
        Ok(StartedEngine { commands, reports, life: Box::new(child) })
    }
}

impl StartEngine for EngineCommandLine {
    fn start(&self) -> io::Result<StartedEngine> {
        let with_name = |error: io::Error| {
            io::Error::new(error.kind(), format!("cannot start {}: {error}", self.program.display()))
        };
        self.spawn().map_err(with_name)
    }
}

impl EngineLife for Child {
    fn kill(&mut self) {
        // Fails only where it is gone already.
        let _ = self.start_kill();
    }

    fn ended(&mut self) -> BoxFuture<'_, io::Result<String>> {
        Box::pin(async { self.wait().await.map(|status| status.to_string()) })
    }
}
