//! The other kind of model: it makes one vector of a text, in one pass, and keeps nothing between two.

use crate::ModelError;
use std::fmt;
use types::{ModelCard, TokenId};

/// A model that makes vectors of texts. All calls come from one thread.
pub trait Embedder: fmt::Debug {
    /// What this model is: its kind tells how long vectors are, its context how long texts may be.
    fn card(&self) -> &ModelCard;

    /// The vectors of some texts, which are computed together; each text has a token at least and fits the context, and each
    /// vector has length 1. What a text becomes does not depend on the others beyond rounding.
    ///
    /// # Errors
    /// [`ModelError::Backend`] where that failed.
    fn embed(&mut self, texts: &[&[TokenId]]) -> Result<Vec<Vec<f32>>, ModelError>;
}
