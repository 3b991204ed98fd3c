//! Log lines on stderr. stdout belongs to what a command prints, and in the engine process to frames.

use crate::values::LogFormat;
use std::{
    fmt,
    io::{IsTerminal, stderr},
};
use tracing_subscriber::{EnvFilter, fmt as lines};

/// What lines are written can be changed by it.
pub(crate) struct LogFilterHandle(Box<dyn Fn(EnvFilter) + Send + Sync>);

impl LogFilterHandle {
    /// Goes over to another filter, which was checked where it was read.
    pub(crate) fn set(&self, filter: &str) {
        (self.0)(EnvFilter::builder().parse_lossy(filter));
    }
}

impl fmt::Debug for LogFilterHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogFilterHandle")
    }
}

/// Starts logging; `filter` was checked where it was read.
pub(crate) fn start(filter: &str, format: LogFormat) -> LogFilterHandle {
    let filter = EnvFilter::builder().parse_lossy(filter);
    let lines = lines().with_env_filter(filter).with_writer(stderr);
    // An error means that nobody logs any more.
    match format {
        LogFormat::Human => {
            let lines = lines.with_ansi(stderr().is_terminal()).with_filter_reloading();
            let handle = lines.reload_handle();
            lines.init();
            LogFilterHandle(Box::new(move |filter| drop(handle.reload(filter))))
        }
        LogFormat::Json => {
            let lines = lines.json().flatten_event(true).with_filter_reloading();
            let handle = lines.reload_handle();
            lines.init();
            LogFilterHandle(Box::new(move |filter| drop(handle.reload(filter))))
        }
    }
}
