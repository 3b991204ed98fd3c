//! What a decoder's tensors are called in a checkpoint.

use super::spec::{MlpSpec, Spec};
use crate::checkpoint::Tensors;

/// Where the tensors of a decoder may begin: alone, or beside an encoder of images that is not loaded.
const PREFIXES: [&str; 3] = ["", "language_model.", "model.language_model."];

/// Names of a checkpoint's tensors.
#[derive(Debug)]
pub(crate) struct Names {
    /// `model.`, or what stands for it.
    pub(crate) model: String,
    pub(crate) head: String,
}

impl Names {
    pub(crate) fn of(tensors: &Tensors) -> Self {
        let there = |model: &String| tensors.contains(&format!("{model}embed_tokens.weight"));
        let found = PREFIXES.into_iter().find_map(|prefix| {
            [format!("{prefix}model."), prefix.to_owned()].into_iter().find(there).map(|model| Self {
                model,
                head: format!("{}lm_head", if prefix == "language_model." { prefix } else { "" }),
            })
        });
        found.unwrap_or_else(|| Self { model: "model.".to_owned(), head: "lm_head".to_owned() })
    }

    pub(crate) fn layer(&self, index: usize) -> String {
        format!("{}layers.{index}.", self.model)
    }

    /// The matrices of all experts that have tensors of their own, and what they are called as one.
    pub(crate) fn stacked(&self, tensors: &Tensors, spec: &Spec) -> Vec<StackedName> {
        let mut stacked = Vec::new();
        for (index, layer) in spec.layers.iter().enumerate() {
            let MlpSpec::Experts(experts) = &layer.mlp else { continue };
            let prefix = format!("{}{}.", self.layer(index), experts.prefix);
            for (part, single) in PARTS.into_iter().zip(experts.single) {
                let of_expert = |expert: i32| format!("{prefix}experts.{expert}.{single}");
                if tensors.contains(&format!("{}.weight", of_expert(0))) {
                    let singles = (0..experts.count).map(of_expert).collect();
                    stacked.push(StackedName { singles, to: format!("{prefix}{}.{part}", experts.stacked) });
                }
            }
        }
        stacked
    }
}

/// Parts of an expert, as they are called where all experts are one tensor.
pub(super) const PARTS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// One matrix of each expert.
#[derive(Debug)]
pub(crate) struct StackedName {
    /// Without `.weight`.
    pub(crate) singles: Vec<String>,
    pub(crate) to: String,
}
