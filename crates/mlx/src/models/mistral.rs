//! `model_type: mistral`: Llama's layers, all of them windowed where there is a window (the first release has one).

use super::spec::{Shared, Spec};
use crate::checkpoint::LoadError;
use serde_json::Value;

pub(super) fn spec(config: &Value) -> Result<Spec, LoadError> {
    let shared = Shared::parse(config)?;
    let windowed = shared.windowed(|_| true)?;
    Ok(shared.spec()?.with_windows(&windowed, shared.sliding_window))
}
