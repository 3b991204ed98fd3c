//! Responses that may be retrieved and continued: in memory, bounded, by client; the least recently used go first.
//!
//! Soft state of one router, as all of a router's is: another one, or this one after a restart, does not have them.

use super::{
    answer::ResponseJson,
    items::{InputItem, logprobs_memory, said},
};
use crate::job::Message;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use types::ClientId;

/// Bytes of all that is kept: some thousand conversations of some thousand words.
const BYTES_MAX: usize = 128 << 20;
/// Bytes of what is kept for one client, so that none pushes the others' out.
const CLIENT_BYTES_MAX: usize = BYTES_MAX / 4;
/// Responses that are kept: bounds what short ones take beside their text.
const ENTRIES_MAX: usize = 16 << 10;

/// A response with what it takes to go on from it.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) response: ResponseJson,
    /// What was said in its request.
    pub(super) input: Vec<InputItem>,
    /// The whole conversation, its answer last, without instructions.
    pub(super) messages: Vec<Message>,
}

/// A response's place in the store, while it is being written.
#[derive(Debug)]
pub(super) struct Keep {
    pub(super) store: Arc<ResponseStore>,
    pub(super) client: ClientId,
    pub(super) input: Vec<InputItem>,
    /// The conversation so far, without instructions.
    pub(super) messages: Vec<Message>,
    /// Bytes of the request.
    pub(super) bytes: usize,
}

impl Keep {
    /// Stores what came of it.
    pub(super) fn keep(mut self, response: ResponseJson) {
        self.messages.push(said(&response.output));
        let calls = |message: &Message| {
            let calls = message.tool_calls.iter();
            calls.map(|call| call.id.len() + call.name.len() + call.arguments.len()).sum::<usize>()
        };
        let texts = self.messages.iter().map(|message| {
            let reasoning = message.reasoning.as_ref().map_or(0, String::len);
            size_of::<Message>() + message.content.len() + reasoning + calls(message)
        });
        // The request is there as input and in what the response repeats of it; the answer twice, too.
        let bytes = size_of::<Stored>() + 2 * self.bytes + 2 * texts.sum::<usize>();
        let bytes = bytes + logprobs_memory(&response.output);
        self.store.insert(
            self.client,
            bytes,
            Stored { response, input: self.input, messages: self.messages },
        );
    }
}

/// What is kept.
#[derive(Debug, Default)]
pub(crate) struct ResponseStore {
    kept: Mutex<Kept>,
}

type Key = (ClientId, String);

#[derive(Debug, Default)]
struct Kept {
    entries: HashMap<Key, Entry>,
    bytes: usize,
    client_bytes: HashMap<ClientId, usize>,
    /// Counts uses.
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    stored: Arc<Stored>,
    bytes: usize,
    used: u64,
}

impl ResponseStore {
    /// A client's own response.
    pub(super) fn get(&self, client: ClientId, id: &str) -> Option<Arc<Stored>> {
        let mut kept = self.kept();
        kept.clock += 1;
        let now = kept.clock;
        let entry = kept.entries.get_mut(&(client, id.to_owned()))?;
        entry.used = now;
        Some(entry.stored.clone())
    }

    /// Whether it was there.
    pub(super) fn remove(&self, client: ClientId, id: &str) -> bool {
        self.kept().remove(&(client, id.to_owned()))
    }

    /// Keeps a response whose texts have about this many bytes; one that is larger than all that a client may keep is not.
    pub(super) fn insert(&self, client: ClientId, bytes: usize, stored: Stored) {
        if bytes > CLIENT_BYTES_MAX {
            return;
        }
        let mut kept = self.kept();
        kept.clock += 1;
        let (key, used) = ((client, stored.response.id.clone()), kept.clock);
        kept.remove(&key);
        kept.bytes += bytes;
        *kept.client_bytes.entry(client).or_default() += bytes;
        kept.entries.insert(key, Entry { stored: Arc::new(stored), bytes, used });
        while kept.client_bytes.get(&client).is_some_and(|&bytes| bytes > CLIENT_BYTES_MAX) {
            kept.remove_oldest(|other| other == client);
        }
        while kept.bytes > BYTES_MAX || kept.entries.len() > ENTRIES_MAX {
            kept.remove_oldest(|_| true);
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn remove(&mut self, key: &Key) -> bool {
        let Some(entry) = self.entries.remove(key) else { return false };
        self.bytes -= entry.bytes;
        if let Some(bytes) = self.client_bytes.get_mut(&key.0) {
            *bytes -= entry.bytes;
            if *bytes == 0 {
                self.client_bytes.remove(&key.0);
            }
        }
        true
    }

    fn remove_oldest(&mut self, of: impl Fn(ClientId) -> bool) {
        let candidates = self.entries.iter().filter(|((client, _), _)| of(*client));
        let oldest = candidates.min_by_key(|(_, entry)| entry.used).map(|(key, _)| key.clone());
        if let Some(key) = oldest {
            self.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert(store: &ResponseStore, client: u64, id: usize, bytes: usize) {
        let response = ResponseJson::for_test(id.to_string());
        let stored = Stored { response, input: Vec::new(), messages: Vec::new() };
        store.insert(ClientId(client), bytes, stored);
    }

    fn has(store: &ResponseStore, client: u64, id: usize) -> bool {
        store.get(ClientId(client), &id.to_string()).is_some()
    }

    #[test]
    fn what_was_not_used_goes_first() {
        let store = ResponseStore::default();
        for id in 0..100 {
            insert(&store, 1, id, CLIENT_BYTES_MAX / 10);
            assert!(has(&store, 1, 0), "used all the time");
            assert!(store.kept().bytes <= CLIENT_BYTES_MAX);
        }
        assert!(has(&store, 1, 99) && has(&store, 1, 91) && !has(&store, 1, 90));
        insert(&store, 1, 100, CLIENT_BYTES_MAX + 1);
        assert!(!has(&store, 1, 100) && has(&store, 1, 99), "what is too large pushes nothing out");
    }

    #[test]
    fn one_client_neither_sees_nor_displaces_the_others() {
        let store = ResponseStore::default();
        for client in 0..4 {
            insert(&store, client, 7, CLIENT_BYTES_MAX / 2);
        }
        for id in 0..50 {
            insert(&store, 0, id, CLIENT_BYTES_MAX / 2);
        }
        assert!((1..4).all(|client| has(&store, client, 7)));
        assert!(!has(&store, 1, 49) && has(&store, 0, 49));
        assert!(store.remove(ClientId(0), "49") && !store.remove(ClientId(0), "49"));
        assert!(store.remove(ClientId(1), "7") && has(&store, 2, 7));
    }

    #[test]
    fn short_ones_are_bounded_too() {
        let store = ResponseStore::default();
        for id in 0..ENTRIES_MAX + 10 {
            insert(&store, 1, id, 1);
        }
        let kept = store.kept();
        assert_eq!((kept.entries.len(), kept.bytes), (ENTRIES_MAX, ENTRIES_MAX));
        assert_eq!(kept.client_bytes[&ClientId(1)], ENTRIES_MAX);
    }
}
