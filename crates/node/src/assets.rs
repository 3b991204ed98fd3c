//! Tokenizers and templates that a router has fetched: a few, each fetched once however many ask at the same time.

use crate::settings::ASSETS_CACHED_MAX;
use crate::target::Target;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OnceCell;
use types::{AssetsHash, GenerateError, ModelAssets};

type Slot = Arc<OnceCell<Arc<ModelAssets>>>;

/// Least recently used first.
pub(crate) struct AssetsCache {
    slots: Mutex<Vec<(AssetsHash, Slot)>>,
}

impl AssetsCache {
    pub(crate) fn new() -> Self {
        Self { slots: Mutex::new(Vec::new()) }
    }

    /// From the cache, or from the first of the holders that has it.
    pub(crate) async fn get(
        &self,
        hash: AssetsHash,
        holders: impl FnOnce() -> Vec<Target>,
    ) -> Result<Arc<ModelAssets>, GenerateError> {
        let slot = self.slot(hash);
        let fetch = || async {
            let mut last = GenerateError::Unavailable {
                model: hash.to_string(),
                reason: "no connected node has this model's tokenizer".to_owned(),
            };
            for target in holders() {
                match target.assets(hash).await {
                    Ok(assets) => return Ok(assets),
                    Err(error) => last = error,
                }
            }
            Err(last)
        };
        slot.get_or_try_init(fetch).await.cloned()
    }

    fn slot(&self, hash: AssetsHash) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = match slots.iter().position(|(known, _)| *known == hash) {
            Some(index) => slots.remove(index).1,
            None => Slot::default(),
        };
        if slots.len() >= ASSETS_CACHED_MAX {
            slots.remove(0);
        }
        slots.push((hash, slot.clone()));
        slot
    }
}
