//! [`Compiler`]: the thread that compiles grammars, beside the engine's. It owns the vocabulary and the cache of compiled
//! grammars; grammars go in by a bounded channel, matchers come back among the engine's commands.

use engine::grammar::{Grammars, Matcher, Vocabulary, VocabularyError};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread;
use types::{GenerateError, Grammar, ModelCard, RequestId, limits};

/// Grammars that wait to be compiled: as many as there may be requests that wait.
const WAITING_MAX: usize = limits::ENGINE_WAITING_MAX;
/// What a request is told for which there is no room: most grammars are compiled within some milliseconds.
const RETRY_AFTER_MS: u64 = 500;

pub(super) struct Compiler {
    jobs: SyncSender<(RequestId, Grammar)>,
}

impl Compiler {
    /// Starts the thread, which reads the vocabulary first. `done` passes on what came of each grammar; false: nobody
    /// takes it any more.
    pub(super) fn start(
        tokenizer_json: String,
        card: &ModelCard,
        done: impl Fn(RequestId, Result<Matcher, GenerateError>) -> bool + Send + 'static,
    ) -> Self {
        let (jobs, waiting) = sync_channel::<(RequestId, Grammar)>(WAITING_MAX);
        let (size, ends) = (card.vocab_size, card.eos_tokens.clone());
        thread::spawn(move || {
            let vocabulary = Vocabulary::from_tokenizer_json(&tokenizer_json, size, &ends);
            drop(tokenizer_json);
            let mut grammars = vocabulary.and_then(|vocabulary| Grammars::new(&vocabulary));
            if let Err(error) = &grammars {
                tracing::debug!(%error, "no grammars for this model");
            }
            for (id, grammar) in waiting {
                let compiled = match &mut grammars {
                    Ok(grammars) => grammars.compile(&grammar),
                    Err(error) => Err(unusable(error)),
                };
                if !done(id, compiled) {
                    return;
                }
            }
        });
        Self { jobs }
    }

    /// Hands a request's grammar over.
    ///
    /// # Errors
    /// [`GenerateError::Busy`] where too many wait.
    pub(super) fn compile(&self, id: RequestId, grammar: Grammar) -> Result<(), GenerateError> {
        self.jobs.try_send((id, grammar)).map_err(|error| match error {
            TrySendError::Full(_) => GenerateError::Busy { retry_after_ms: RETRY_AFTER_MS },
            TrySendError::Disconnected(_) => {
                GenerateError::Engine { message: "the compiler of grammars is gone".to_owned() }
            }
        })
    }
}

fn unusable(error: &VocabularyError) -> GenerateError {
    GenerateError::Invalid { message: error.to_string(), param: Some("grammar".to_owned()) }
}
