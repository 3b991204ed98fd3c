//! The models' texts by assets hash: each is loaded once, by whoever asks first, and the least recently used are let go.

use super::ModelText;
use crate::error::ApiError;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::{
    sync::{OnceCell, Semaphore},
    task::spawn_blocking,
};
use tracing::{info, warn};
use types::{AssetsHash, Directory, ModelCard, TokenId};

/// Models whose tokenizers are kept; a large one takes about 100 MB.
const MODELS_KEPT_MAX: usize = 8;
/// Texts above this many bytes are encoded on a blocking thread: at 1–4 MB/s smaller ones hold a server thread for a few
/// milliseconds, about as long as the hand-over takes on a busy machine.
const ENCODE_INLINE_BYTES_MAX: usize = 8 << 10;
/// The same of byte-level tokenizers, at some 50 MB/s and more.
const ENCODE_INLINE_BYTE_LEVEL_BYTES_MAX: usize = 64 << 10;
/// Bodies above this many bytes are made into prompts on a blocking thread as well: templates copy, at some 100 MB/s.
const RENDER_INLINE_BYTES_MAX: usize = 256 << 10;
/// Large texts encoded at once: the engine needs the processor too.
const ENCODES_MAX: usize = 2;

type Cell = Arc<OnceCell<Arc<ModelText>>>;

/// Loaded [`ModelText`]s.
pub(crate) struct TextCache {
    directory: Arc<dyn Directory>,
    /// Most recently used last.
    kept: Mutex<Vec<(AssetsHash, Cell)>>,
    encodes: Arc<Semaphore>,
}

impl TextCache {
    pub(crate) fn new(directory: Arc<dyn Directory>) -> Self {
        Self { directory, kept: Mutex::new(Vec::new()), encodes: Arc::new(Semaphore::new(ENCODES_MAX)) }
    }

    /// A model's text. Loading goes on when the caller goes away, so that the next one finds it.
    pub(crate) async fn get(&self, card: &ModelCard) -> Result<Arc<ModelText>, ApiError> {
        let cell = self.cell(card.assets);
        if let Some(text) = cell.get() {
            return Ok(text.clone());
        }
        let load = load(self.directory.clone(), card.clone(), cell);
        tokio::spawn(load).await.unwrap_or_else(|error| {
            Err(ApiError::Internal { what: format!("loading a tokenizer broke off: {error}") })
        })
    }

    /// Runs `render`, whose input has this many bytes, and reads the prompt that it gives: as much as is new of it. What it
    /// gives beside the prompt is passed on.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        text: &Arc<ModelText>,
        bytes: usize,
        render: impl FnOnce(&ModelText) -> Result<(String, T), ApiError> + Send + 'static,
    ) -> Result<(Vec<TokenId>, T), ApiError> {
        let failed = |message| ApiError::Tokenizer { message };
        if bytes > RENDER_INLINE_BYTES_MAX {
            let all = move |text: &ModelText| {
                let (prompt, beside) = render(text)?;
                Ok((text.read(text.known(prompt)).map_err(failed)?, beside))
            };
            return self.run(text, bytes, all).await;
        }
        let (prompt, beside) = render(text)?;
        let prompt = text.known(prompt);
        let unread = prompt.unread_bytes();
        Ok((self.run(text, unread, move |text| text.read(prompt).map_err(failed)).await?, beside))
    }

    /// Runs `encode`, whose input has this many bytes: a large one waits for its turn on a blocking thread.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        text: &Arc<ModelText>,
        bytes: usize,
        encode: impl FnOnce(&ModelText) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let inline_max =
            if text.is_byte_level() { ENCODE_INLINE_BYTE_LEVEL_BYTES_MAX } else { ENCODE_INLINE_BYTES_MAX };
        if bytes <= inline_max {
            return encode(text);
        }
        // The turn lasts as long as the work, also where the client does not wait for it.
        let turn = self.encodes.clone().acquire_owned().await.expect("never closed");
        let text = text.clone();
        let work = move || {
            let _turn = turn;
            encode(&text)
        };
        let done = spawn_blocking(work).await;
        done.unwrap_or_else(|error| Err(ApiError::Tokenizer { message: error.to_string() }))
    }

    fn cell(&self, hash: AssetsHash) -> Cell {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().position(|(other, _)| *other == hash);
        let entry = match found {
            Some(index) => kept.remove(index),
            None => {
                if kept.len() == MODELS_KEPT_MAX {
                    kept.remove(0);
                }
                (hash, Cell::default())
            }
        };
        let cell = entry.1.clone();
        kept.push(entry);
        cell
    }
}

async fn load(
    directory: Arc<dyn Directory>,
    card: ModelCard,
    cell: Cell,
) -> Result<Arc<ModelText>, ApiError> {
    let text = cell.get_or_try_init(|| async {
        let assets = directory.assets(card.assets).await?;
        let loaded = spawn_blocking(move || ModelText::load(&assets).map_err(|error| error.to_string()))
            .await
            .unwrap_or_else(|error| Err(error.to_string()));
        match loaded {
            Ok(text) => {
                info!(model = card.name, assets = %card.assets, "tokenizer loaded");
                Ok(Arc::new(text))
            }
            Err(message) => {
                warn!(model = card.name, assets = %card.assets, message, "tokenizer cannot be used");
                Err(ApiError::Assets { model: card.name.clone(), assets: card.assets, message })
            }
        }
    });
    text.await.cloned()
}
