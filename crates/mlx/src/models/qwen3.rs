//! `model_type: qwen3`: as Qwen2, with heads of queries and keys normalized instead of biases.

use super::{qwen2, spec::Spec};
use crate::checkpoint::LoadError;
use serde_json::Value;

pub(super) fn spec(config: &Value) -> Result<Spec, LoadError> {
    Ok(Spec { normed_heads: true, ..qwen2::spec(config)? })
}
