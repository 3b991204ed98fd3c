//! `model_type: qwen2`: Qwen2 and 2.5. Biases of queries, keys and values are found where they are.

use super::spec::{Shared, Spec, parsed};
use crate::checkpoint::LoadError;
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Own {
    #[serde(default)]
    use_sliding_window: bool,
    max_window_layers: Option<usize>,
}

pub(super) fn spec(config: &Value) -> Result<Spec, LoadError> {
    let (shared, own): (Shared, Own) = (Shared::parse(config)?, parsed(config)?);
    // Layers before that one see everything.
    let first = own.max_window_layers.unwrap_or(0);
    let windowed = shared.windowed(|index| index >= first)?;
    let window = shared.sliding_window.filter(|_| own.use_sliding_window);
    Ok(shared.spec()?.with_windows(&windowed, window))
}
