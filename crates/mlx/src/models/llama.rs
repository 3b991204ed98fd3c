//! `model_type: llama`: Llama 2 and 3, SmolLM2 and whatever else shares their layers.

use super::spec::{Shared, Spec};
use crate::checkpoint::LoadError;
use serde_json::Value;

pub(super) fn spec(config: &Value) -> Result<Spec, LoadError> {
    let shared = Shared::parse(config)?;
    // Only where layers are named so: other users of this type carry a window that nothing applies.
    let windowed = shared.windowed(|_| false)?;
    Ok(shared.spec()?.with_windows(&windowed, shared.sliding_window))
}
