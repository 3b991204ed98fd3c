//! `model_type: mistral`: Llama's layers. Windowed attention, which only the first release has, needs a context of at
//! most the window; longer ones are cut to it.

use super::{Family, llama};
use crate::{
    checkpoint::{Checkpoint, LoadError},
    layers::Compute,
};

pub(super) fn load(checkpoint: &mut Checkpoint, compute: Compute) -> Result<Box<dyn Family>, LoadError> {
    let window = checkpoint.config.get("sliding_window").and_then(serde_json::Value::as_u64);
    let mut model = llama::Llama::load(checkpoint, compute)?;
    if let Some(window) = window {
        model.limit_context(window as usize);
    }
    Ok(Box::new(model))
}
