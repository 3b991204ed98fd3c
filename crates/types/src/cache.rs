//! What a request may find in prefix caches, what it leaves there, and what caches tell of themselves.

use crate::{BlockHash, limits};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Who asks, for fairness and for what belongs to them: a hash of the API key, 0 where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct ClientId(pub u64);

impl ClientId {
    /// Whoever has that API key: the first 64 bits of its BLAKE3, so that the key cannot be told from it.
    pub fn of_key(key: &[u8]) -> Self {
        let mut first = [0; 8];
        first.copy_from_slice(&blake3::hash(key).as_bytes()[..8]);
        Self(u64::from_le_bytes(first))
    }
}

/// A conversation that a client named: its KV is kept for its next request. 1 to 64 visible ASCII characters.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SessionId(String);

/// A name that no session can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is no session id: 1 to {} visible ASCII characters are allowed",
    limits::SESSION_ID_BYTES_MAX
)]
pub struct SessionIdError {
    /// The value given, at most its first 80 characters.
    pub value: String,
}

impl TryFrom<String> for SessionId {
    type Error = SessionIdError;

    fn try_from(value: String) -> Result<Self, SessionIdError> {
        let visible = value.bytes().all(|byte| byte.is_ascii_graphic());
        if visible && (1..=limits::SESSION_ID_BYTES_MAX).contains(&value.len()) {
            Ok(Self(value))
        } else {
            Err(SessionIdError { value: value.chars().take(80).collect() })
        }
    }
}

impl From<SessionId> for String {
    fn from(id: SessionId) -> Self {
        id.0
    }
}

impl SessionId {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({})", self.0)
    }
}

/// Which cached prefixes a request may use, and who keeps its own.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CacheScope {
    /// Requests share prefixes with those of the same salt only; at most [`limits::CACHE_SALT_BYTES_MAX`] bytes.
    pub salt: Option<String>,
    /// The session that keeps its KV.
    pub session: Option<SessionId>,
}

impl CacheScope {
    /// The root of its chains of block hashes, given the model's ([`crate::ModelCard::root`]).
    pub fn root(&self, model: BlockHash) -> BlockHash {
        match &self.salt {
            Some(salt) => BlockHash::root(&[&model.0.to_le_bytes(), salt.as_bytes()]),
            None => model,
        }
    }

    /// The same with a salt that no other client can have, whatever salt it asks for.
    pub fn of_client(self, client: ClientId) -> Self {
        let client = client.0.to_le_bytes();
        let parts: &[&[u8]] = match &self.salt {
            Some(salt) => &[b"client", &client, salt.as_bytes()],
            None => &[b"client", &client],
        };
        Self { salt: Some(format!("{:032x}", BlockHash::root(parts).0)), ..self }
    }
}

/// How urgent a request is among others of all clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Whenever nobody else waits: batches.
    Low,
    /// As they come.
    #[default]
    Normal,
    /// Before others.
    High,
}

/// What requests that belong together have in common: a hash of a client's session, or of its user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AffinityKey(pub u64);

impl AffinityKey {
    /// The key of what a client calls `name`: others' requests with the same name do not belong to it.
    pub fn new(client: ClientId, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&client.0.to_le_bytes()).update(name.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        Self(u64::from_le_bytes(first))
    }
}

/// How a request is to be served among others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Service {
    /// Who asks: clients get equal shares.
    pub client: ClientId,
    /// Before or after others.
    pub priority: Priority,
    /// Milliseconds to the first token that are aimed at; the engine's own target if none.
    pub ttft_target_ms: Option<u32>,
    /// Milliseconds from token to token that are aimed at; the engine's own target if none.
    pub tpot_target_ms: Option<u32>,
    /// Requests with the same key belong together, as those of a session or a user do, and go to the same node where that
    /// costs little.
    pub affinity: Option<AffinityKey>,
}

/// What changed in an engine's prefix cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheEvent {
    /// These blocks are cached now: each the child of the one before, the first one of `parent`.
    Stored {
        /// The block before the first, or a chain's root.
        parent: BlockHash,
        /// In order, at least one.
        blocks: Vec<BlockHash>,
    },
    /// These blocks are not cached any more.
    Removed {
        /// At least one.
        blocks: Vec<BlockHash>,
    },
}

/// All that an engine's prefix cache holds, for who knows nothing of it or missed events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheSnapshot {
    /// Tells one life of an engine from the next.
    pub epoch: u64,
    /// Events that led to this since the engine started: the number of the next one.
    pub seq: u64,
    /// Parents before children.
    pub blocks: Vec<BlockHash>,
}

/// A session as its engine holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Whose it is.
    pub client: ClientId,
    /// Its name.
    pub id: SessionId,
    /// Tokens whose KV is kept for it.
    pub tokens: u32,
    /// Seconds since its last request ended.
    pub idle_s: f32,
    /// Seconds until it is forgotten unless used again.
    pub expires_in_s: f32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_ids_are_short_and_visible() {
        let check = |value: &str, good: bool| {
            assert_eq!(SessionId::try_from(value.to_owned()).is_ok(), good, "{value:?}");
        };
        check("a", true);
        check("chat-42/user_7", true);
        check(&"x".repeat(limits::SESSION_ID_BYTES_MAX), true);
        check(&"x".repeat(limits::SESSION_ID_BYTES_MAX + 1), false);
        check("", false);
        check("two words", false);
        check("zeile\n", false);
        check("käse", false);
    }

    #[test]
    fn salts_separate_chains() {
        let root = BlockHash(7);
        let salted =
            |salt: Option<&str>| CacheScope { salt: salt.map(str::to_owned), session: None }.root(root);
        assert_eq!(salted(None), root);
        assert_ne!(salted(Some("")), root);
        assert_ne!(salted(Some("a")), salted(Some("b")));
    }

    #[test]
    fn clients_have_salts_of_their_own() {
        let scope = |salt: Option<&str>| CacheScope { salt: salt.map(str::to_owned), session: None };
        let [one, two] = [b"first", b"other"].map(|key| ClientId::of_key(key));
        assert_ne!(one, two);
        let mut salts = Vec::new();
        for client in [one, two] {
            for salt in [None, Some(""), Some("a"), Some(&*"x".repeat(limits::CACHE_SALT_BYTES_MAX))] {
                let salted = scope(salt).of_client(client);
                assert_eq!(salted, scope(salt).of_client(client));
                assert_eq!(salted.salt.as_ref().map(String::len), Some(32));
                salts.push(salted.salt);
            }
        }
        salts.sort();
        salts.dedup();
        assert_eq!(salts.len(), 8);
    }
}
