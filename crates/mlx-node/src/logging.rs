//! Log lines on stderr. stdout belongs to what a command prints, and in the engine process to frames.

use crate::values::LogFormat;
use std::io::{IsTerminal, stderr};
use tracing_subscriber::{EnvFilter, fmt};

/// Starts logging; `filter` was checked where it was read.
pub(crate) fn start(filter: &str, format: LogFormat) {
    let filter = EnvFilter::builder().parse_lossy(filter);
    let lines = fmt().with_env_filter(filter).with_writer(stderr);
    match format {
        LogFormat::Human => lines.with_ansi(stderr().is_terminal()).init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
}
