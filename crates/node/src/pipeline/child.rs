//! One process of a pipeline that has no engine: a rank after the first, or one that measures.
//!
//! It is read until it ends, says nothing for too long, or the reader has enough; then it is gone. Dropping [`run`]'s future
//! kills it too.

use crate::engine_child::reap;
use crate::engine_start::{EngineCommandLine, StartEngine, StartedEngine};
use crate::settings::{RANK_SILENCE_MAX, RANK_START_TIME_MAX};
use bytes::BytesMut;
use std::ops::ControlFlow;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::time::{Instant, sleep_until};
use wire::{Decoder, EngineReport, FrameClass};

/// Bytes read at once: such a process says little.
const READ_BYTES: usize = 16 << 10;

/// How long a process may say nothing.
#[derive(Debug, Clone, Copy)]
pub(super) enum Patience {
    /// Until it is over.
    Whole(Duration),
    /// It beats.
    Beats,
}

/// Starts a process and hands each report of its to `on`, until that breaks with what was wanted of it.
///
/// # Errors
/// Why nothing came of it: in the process's own words where it had any.
pub(super) async fn run<T>(
    command: &EngineCommandLine,
    patience: Patience,
    mut on: impl FnMut(EngineReport) -> ControlFlow<T>,
) -> Result<T, String> {
    let StartedEngine { commands, mut reports, mut life } =
        command.start().map_err(|error| error.to_string())?;
    let read = async {
        let decoder = Decoder::<EngineReport>::new(FrameClass::Engine);
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        let mut deadline = Instant::now()
            + match patience {
                Patience::Whole(most) => most,
                Patience::Beats => RANK_START_TIME_MAX,
            };
        loop {
            buffer.reserve(READ_BYTES);
            let read = tokio::select! {
                read = reports.read_buf(&mut buffer) => read,
                () = sleep_until(deadline) => {
                    return Err(Some(match patience {
                        Patience::Whole(most) => format!("the process took longer than {} s", most.as_secs()),
                        Patience::Beats => "the process does not beat: it hangs or is stopped".to_owned(),
                    }));
                }
            };
            match read {
                Ok(0) => return Err(decoder.finish(&buffer).err().map(|error| error.to_string())),
                Ok(_) => {}
                Err(error) => return Err(Some(format!("its output cannot be read: {error}"))),
            }
            while let Some(report) =
                decoder.next(&mut buffer).map_err(|error| Some(format!("protocol error: {error}")))?
            {
                match report {
                    EngineReport::Failed { message } => return Err(Some(message)),
                    report => {
                        if let ControlFlow::Break(wanted) = on(report) {
                            return Ok(wanted);
                        }
                    }
                }
            }
            if matches!(patience, Patience::Beats) {
                deadline = Instant::now() + RANK_SILENCE_MAX;
            }
        }
    };
    let ended = read.await;
    // Its end by itself is an end of what it says, without more.
    let status = reap(&mut *life, !matches!(ended, Err(None))).await;
    drop(commands);
    ended.map_err(|seen| seen.unwrap_or(status))
}
