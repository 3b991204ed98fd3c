//! What an engine process can be started for beside serving a model alone: [`RankTask`], and the life of a process that has
//! no engine.
//!
//! Such a process takes no commands. The end of its standard input means that its parent has no more use for it: it ends at
//! once, wherever it is, since a rank whose neighbours are lost may hang inside MLX for ever.

use super::{Failure, PROGRESS_INTERVAL, READ_BYTES, STEPS_UNWRITTEN_MAX, panic_message, write_reports};
use serde::{Deserialize, Serialize};
use std::io::{ErrorKind, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};
use types::StageProfile;
use wire::EngineReport;

/// A rank tells so often that it lives.
const BEAT_INTERVAL: Duration = Duration::from_millis(250);
/// How long a rank may take to end by itself: what waits inside MLX for a neighbour that is lost would keep it for ever.
const RANK_EXIT_TIME_MAX: Duration = Duration::from_secs(1);

/// What an engine process is for, where that is not a whole model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RankTask {
    /// Measure a model here: [`run_measure`].
    Measure {
        /// Rows that there will be at once.
        rows: u32,
    },
    /// Be a rank of a pipeline. Which one, and who its neighbours are, is in the environment, as MLX has it.
    Rank {
        /// The first layer of each rank and the one after its last.
        layers: Vec<(u32, u32)>,
        /// Tokens of KV that there is to be room for.
        kv_tokens: u64,
        /// Over JACCL; else a ring.
        jaccl: bool,
    },
}

/// What a rank after the first one is at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StageStep<'a> {
    /// It has found its neighbours.
    Joined,
    /// It reads its part of the model.
    Loading {
        /// What.
        what: &'a str,
        /// How far, 0 to 1.
        fraction: f32,
    },
    /// All ranks have loaded.
    Ready,
    /// A pass was begun.
    Pass,
}

/// Measures a model for a placement: tells of its progress, then the profile.
///
/// Returns success where there is a profile; what it fails with reaches the parent as the reason.
pub fn run_measure(
    measure: impl FnOnce(&mut dyn FnMut(&str, f32)) -> Result<StageProfile, String>,
    stdin: impl Read + Send + 'static,
    stdout: impl Write + Send + 'static,
) -> ExitCode {
    alone(stdin, stdout, |reports| {
        let mut told = Told::default();
        let profile = measure(&mut |what, fraction| told.loading(reports, what, fraction))?;
        // A parent that is gone has no use for it.
        let _ = reports.send(vec![EngineReport::Profile(profile)]);
        Ok(())
    })
}

/// Is a rank after the first one: `stage` joins, loads and computes, and tells of each step. Meanwhile the parent hears every
/// 250 ms how many passes there were, from a thread that lives as long as the process.
///
/// Returns success once the head says that it is over; what it fails with reaches the parent as the reason.
pub fn run_stage(
    stage: impl FnOnce(&mut dyn FnMut(StageStep<'_>)) -> Result<(), String>,
    stdin: impl Read + Send + 'static,
    stdout: impl Write + Send + 'static,
) -> ExitCode {
    let code = alone(stdin, stdout, |reports| {
        let passes = beat(reports.clone());
        let mut told = Told::default();
        stage(&mut |step| {
            // Who does not hear it is gone, and then standard input ends.
            let tell = |report| drop(reports.send(vec![report]));
            match step {
                StageStep::Joined => tell(EngineReport::Joined),
                StageStep::Loading { what, fraction } => told.loading(reports, what, fraction),
                StageStep::Ready => tell(EngineReport::StageReady),
                StageStep::Pass => {
                    passes.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
    });
    end_process_within(RANK_EXIT_TIME_MAX);
    code
}

/// Tells the parent every 250 ms that this process lives, and what is counted in what is returned, for as long as that is
/// there.
pub(super) fn beat(reports: SyncSender<Vec<EngineReport>>) -> Arc<AtomicU64> {
    let passes = Arc::new(AtomicU64::new(0));
    let counted = Arc::downgrade(&passes);
    thread::spawn(move || {
        while let Some(passes) = counted.upgrade().map(|passes| passes.load(Ordering::Relaxed)) {
            if reports.send(vec![EngineReport::Beat { passes }]).is_err() {
                return;
            }
            thread::sleep(BEAT_INTERVAL);
        }
    });
    passes
}

/// Whatever happens, this process is no more after that time: not by its exit, which may wait for what MLX is at.
pub(super) fn end_process_within(most: Duration) {
    thread::spawn(move || {
        thread::sleep(most);
        end_process();
    });
}

/// Has the system end this process with its parent, also where it is stopped and could not see that for itself: on Linux.
/// Elsewhere a process that is stopped ends once it goes on, by the end of its standard input.
///
/// A parent that has ended before this was called is seen by that, too.
pub fn end_with_parent() {
    #[cfg(target_os = "linux")]
    {
        let signal = Some(rustix::process::Signal::KILL);
        if let Err(error) = rustix::process::set_parent_process_death_signal(signal) {
            tracing::warn!(%error, "this process does not end with its parent where it is stopped");
        }
    }
}

/// Ends this process as nothing inside it can keep it from.
pub(super) fn end_process() {
    #[cfg(unix)]
    {
        let signal = rustix::process::Signal::KILL;
        if let Err(error) = rustix::process::kill_process(rustix::process::getpid(), signal) {
            tracing::error!(%error, "this process cannot be ended");
        }
    }
    #[cfg(not(unix))]
    std::process::abort();
}

/// The last progress told.
#[derive(Debug, Default)]
pub(super) struct Told(Option<(String, Instant)>);

impl Told {
    /// Tells how far something is, not too often.
    pub(super) fn loading(&mut self, reports: &SyncSender<Vec<EngineReport>>, what: &str, fraction: f32) {
        let now = Instant::now();
        let same = |(last, at): &(String, Instant)| last == what && now - *at < PROGRESS_INTERVAL;
        if fraction < 1.0 && self.0.as_ref().is_some_and(same) {
            return;
        }
        self.0 = Some((what.to_owned(), now));
        // A parent that is gone is noticed soon enough.
        let _ = reports.send(vec![EngineReport::Loading { what: what.to_owned(), fraction }]);
    }
}

/// The life of a process without an engine.
fn alone(
    stdin: impl Read + Send + 'static,
    stdout: impl Write + Send + 'static,
    task: impl FnOnce(&SyncSender<Vec<EngineReport>>) -> Result<(), String>,
) -> ExitCode {
    let (reports, written) = sync_channel(STEPS_UNWRITTEN_MAX);
    thread::spawn(move || end_with_input(stdin));
    let writer = thread::spawn(move || write_reports(stdout, written));
    let ended = catch_unwind(AssertUnwindSafe(|| task(&reports).map_err(Failure)));
    let ended = ended.unwrap_or_else(|panic| Err(Failure(format!("panicked: {}", panic_message(&*panic)))));
    let code = match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(message)) => {
            tracing::error!(%message, "the process ends");
            // Where the parent is gone too, nobody is left to tell.
            let _ = reports.send(vec![EngineReport::Failed { message }]);
            ExitCode::FAILURE
        }
    };
    drop(reports);
    // Ends as soon as the parent has read, or is gone.
    let _ = writer.join();
    code
}

/// Ends the process once nothing comes from the parent any more.
fn end_with_input(mut stdin: impl Read) {
    let mut chunk = vec![0; READ_BYTES];
    loop {
        match stdin.read(&mut chunk) {
            Ok(0) => break,
            // Nothing is expected.
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::error!(%error, "standard input cannot be read");
                break;
            }
        }
    }
    end_process();
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use std::sync::Mutex;
    use wire::{Decoder, FrameClass};

    /// A parent that lives on and says nothing.
    struct Silent;

    impl Read for Silent {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            loop {
                thread::park();
            }
        }
    }

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("one writer").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Written {
        fn reports(&self) -> Vec<EngineReport> {
            let decoder = Decoder::<EngineReport>::new(FrameClass::Engine);
            let mut buffer = BytesMut::from(&self.0.lock().expect("one writer")[..]);
            std::iter::from_fn(|| decoder.next(&mut buffer).expect("frames")).collect()
        }
    }

    fn profile() -> StageProfile {
        StageProfile {
            memory_bytes: 1 << 30,
            weights: types::BlockHash(7),
            layer_s: vec![(1, 0.001)],
            head_s: vec![(1, 0.002)],
            layer_bytes: vec![10, 11],
            embedding_bytes: 5,
            head_bytes: 6,
            hidden_bytes: 4,
            kv_bytes_per_token: 2,
        }
    }

    #[test]
    fn a_profile_is_the_last_word_of_who_measures() {
        let written = Written::default();
        let measure = |progress: &mut dyn FnMut(&str, f32)| {
            (0..100).for_each(|at| progress("weights", at as f32 / 100.0));
            Ok(profile())
        };
        run_measure(measure, Silent, written.clone());
        let reports = written.reports();
        assert!(matches!(reports.first(), Some(EngineReport::Loading { .. })), "{reports:?}");
        assert_eq!(reports.last(), Some(&EngineReport::Profile(profile())));
        assert!(reports.len() < 50, "progress is told now and then: {reports:?}");
    }

    #[test]
    fn failures_and_panics_are_told() {
        let check = |measure: &dyn Fn() -> Result<StageProfile, String>, expected: &str| {
            let written = Written::default();
            run_measure(|_| measure(), Silent, written.clone());
            assert_eq!(written.reports(), [EngineReport::Failed { message: expected.to_owned() }]);
        };
        check(&|| Err("no such file".to_owned()), "no such file");
        check(&|| panic!("bad weights"), "panicked: bad weights");
    }

    #[test]
    fn beats_come_from_a_thread_of_their_own_and_count() {
        let (reports, heard) = sync_channel(STEPS_UNWRITTEN_MAX);
        let passes = beat(reports);
        passes.store(3, Ordering::Relaxed);
        let mut beats = Vec::new();
        let begin = Instant::now();
        while beats.len() < 4 {
            beats.extend(heard.recv_timeout(Duration::from_secs(5)).expect("beats go on"));
        }
        assert!(begin.elapsed() >= 2 * BEAT_INTERVAL, "{:?}", begin.elapsed());
        assert_eq!(beats.last(), Some(&EngineReport::Beat { passes: 3 }));
        drop(passes);
        let after = heard.iter().count();
        assert!(after <= 1, "{after} beats of what has ended");
    }
}
