//! `mlx-node pull`: has a model's files here before they are needed. What was begun before goes on where it ended.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "what the command prints is its result")]

use crate::{config::Values, settings::SettingsError};
use serde_json::json;
use std::{
    io::{IsTerminal, stderr},
    time::{Duration, Instant},
};

/// Where no bar is shown, a line of progress at most this often.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Why a model is not here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PullError {
    #[error(transparent)]
    Settings(SettingsError),
    #[error(transparent)]
    Hub(#[from] mlx::hub::HubError),
}

/// Fetches `model`, or the one that the settings name, and prints where it is.
pub(crate) fn run(values: &Values, model: Option<String>, json: bool) -> Result<(), PullError> {
    let model = model.or_else(|| Some(values.model.clone()).filter(|model| !model.is_empty()));
    let model = model.ok_or(PullError::Settings(SettingsError::NoModel))?;
    let mut told: Option<Instant> = None;
    let mut progress = |what: &str, fraction: f32| {
        let due = told.is_none_or(|told| told.elapsed() >= PROGRESS_INTERVAL);
        // On a terminal the downloads have bars of their own.
        if due && !stderr().is_terminal() {
            told = Some(Instant::now());
            eprintln!("{what}: {:.0} %", fraction * 100.0);
        }
    };
    let path = mlx::hub::resolve(&model, values.offline, &mut progress)?;
    if json {
        println!("{}", json!({ "model": model, "path": path }));
    } else {
        println!("{}", path.display());
    }
    Ok(())
}
