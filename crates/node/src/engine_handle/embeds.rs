//! Questions for vectors, as [`EngineHandle`] has them: an entry in the table from before the engine is asked until it has
//! answered, or died.

use super::{EngineHandle, ProtocolError, Table};
use crate::settings::NODE_RETRY_AFTER;
use tokio::sync::oneshot;
use types::{EmbedRequest, GenerateError, RequestId, limits};
use wire::EngineCommand;

/// The vector of each text, or why there are none.
pub(crate) type Vectors = Result<Vec<Vec<f32>>, GenerateError>;

pub(super) struct OpenEmbed {
    /// Tells one life of an id from another.
    serial: u64,
    /// Texts that it asks about.
    count: usize,
    answer: oneshot::Sender<Vectors>,
}

impl OpenEmbed {
    pub(super) fn end(self, vectors: Vectors) {
        // Whoever asked may have gone.
        let _ = self.answer.send(vectors);
    }
}

impl EngineHandle {
    /// The vectors of some texts; waits for the engine. Dropping the future cancels.
    pub(crate) async fn embed(&self, request: EmbedRequest) -> Vectors {
        let (asked, answer) = self.ask_embed(request)?;
        let gone = || GenerateError::Engine { message: "it ended before it answered".to_owned() };
        let vectors = answer.await.unwrap_or_else(|_| Err(gone()));
        drop(asked);
        vectors
    }

    fn ask_embed(&self, request: EmbedRequest) -> Result<(Asked, oneshot::Receiver<Vectors>), GenerateError> {
        let mut table = self.lock();
        table.admit_embed(&request)?;
        let (id, count, model) = (request.id, request.inputs.len(), request.model.clone());
        let sent = table
            .commands
            .as_ref()
            .is_some_and(|commands| commands.try_send(EngineCommand::Embed(request.into())).is_ok());
        if !sent {
            return Err(GenerateError::Unavailable { model, reason: "its engine is going".to_owned() });
        }
        table.submitted += 1;
        let serial = table.submitted;
        let (sender, answer) = oneshot::channel();
        table.embeds.insert(id, OpenEmbed { serial, count, answer: sender });
        drop(table);
        self.changed.send_replace(());
        Ok((Asked { engine: self.clone(), id, serial }, answer))
    }

    /// Passes the child's vectors on.
    pub(crate) fn child_embedded(&self, id: RequestId, vectors: Vec<Vec<f32>>) -> Result<(), ProtocolError> {
        let mut table = self.lock();
        let Some(open) = table.embeds.remove(&id) else {
            if table.abandoned {
                return Ok(());
            }
            return Err(ProtocolError { message: format!("vectors for the unknown request {id}") });
        };
        drop(table);
        self.changed.send_replace(());
        if vectors.len() != open.count {
            let message = format!("{} vectors of {} texts of request {id}", vectors.len(), open.count);
            open.end(Err(GenerateError::Engine { message: message.clone() }));
            return Err(ProtocolError { message });
        }
        open.end(Ok(vectors));
        Ok(())
    }
}

/// A question that was sent. Dropped before its answer, it is cancelled.
struct Asked {
    engine: EngineHandle,
    id: RequestId,
    serial: u64,
}

impl Drop for Asked {
    fn drop(&mut self) {
        let table = self.engine.lock();
        if table.embeds.get(&self.id).is_some_and(|open| open.serial == self.serial)
            && let Some(commands) = &table.commands
        {
            // Fails only where the child is gone, and with it the request.
            let _ = commands.try_send(EngineCommand::Cancel(self.id));
        }
    }
}

impl Table {
    fn admit_embed(&self, request: &EmbedRequest) -> Result<(), GenerateError> {
        let card = self.card_for(&request.model, request.id)?;
        card.must_embed()?;
        let invalid =
            |message: String| Err(GenerateError::Invalid { message, param: Some("input".to_owned()) });
        for (index, input) in request.inputs.iter().enumerate() {
            let (tokens, most) = (input.len(), card.context_tokens);
            if tokens > most as usize {
                return invalid(format!(
                    "input {index} has {tokens} tokens; the model's context is {most} tokens"
                ));
            }
            if let Some(token) = input.iter().find(|&&token| token >= card.vocab_size) {
                let end = card.vocab_size;
                return invalid(format!(
                    "input {index} holds the token {token}; the model's tokens end at {end}"
                ));
            }
        }
        if self.embeds.len() >= self.slots as usize + limits::ENGINE_WAITING_MAX {
            return Err(GenerateError::Busy { retry_after_ms: NODE_RETRY_AFTER.as_millis() as u64 });
        }
        Ok(())
    }
}
