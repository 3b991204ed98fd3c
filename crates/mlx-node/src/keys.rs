//! `[[key]]` in the configuration file: HTTP keys of which more is said than that they exist, and what becomes of all keys.
//!
//! A key is written as it is or, better, as its hash (`mlx-node key new --http` makes both): who reads the file then learns
//! nothing that opens anything.

use crate::{
    config::{plain_text, unknown},
    values::{Limit, List, Secret, Setting},
};
use api::{ApiKey, KeyHash, RateLimits, Scopes};
use std::ops::Range;
use toml::de::DeTable;

/// Keys in a file: each request is compared with all of them.
const KEYS_MAX: usize = 1024;

const NAMES: &[&str] = &["key", "name", "scopes", "requests_per_minute", "tokens_per_minute", "concurrency"];

/// What a key is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    Use,
    Admin,
}

impl Setting for Scope {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "use" => Ok(Self::Use),
            "admin" => Ok(Self::Admin),
            _ => Err("\"use\" or \"admin\" is expected".to_owned()),
        }
    }

    fn to_toml(&self) -> String {
        match self {
            Self::Use => "\"use\"".to_owned(),
            Self::Admin => "\"admin\"".to_owned(),
        }
    }
}

/// One `[[key]]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct KeyEntry {
    /// The key, or its hash.
    pub(crate) key: Secret,
    /// Whose it is, for people.
    name: String,
    scopes: List<Scope>,
    /// None: what `key_requests_per_minute` says; likewise the others.
    requests_per_minute: Option<Limit>,
    tokens_per_minute: Option<Limit>,
    concurrency: Option<Limit>,
}

impl KeyEntry {
    /// Reads a table; an error says at which byte of the file it is, and never shows the key.
    pub(crate) fn parse(table: &DeTable<'_>, place: &Range<usize>) -> Result<Self, (usize, String)> {
        let mut entry = Self {
            key: Secret(String::new()),
            name: String::new(),
            scopes: List(vec![Scope::Use]),
            requests_per_minute: None,
            tokens_per_minute: None,
            concurrency: None,
        };
        for (key, value) in table {
            let name: &str = key.get_ref();
            let set = plain_text(value.get_ref()).and_then(|text| entry.set(name, &text));
            set.map_err(|message| (key.span().start, format!("key: {message}")))?;
        }
        entry.check().map_err(|message| (place.start, message.to_owned()))?;
        Ok(entry)
    }

    fn set(&mut self, name: &str, text: &str) -> Result<(), String> {
        fn read<T: Setting>(name: &str, text: &str) -> Result<T, String> {
            T::parse(text).map_err(|expected| format!("{name} = {text:?}: {expected}"))
        }
        match name {
            "key" => self.key = Secret::parse(text).map_err(|expected| format!("key: {expected}"))?,
            "name" => self.name = read(name, text)?,
            "scopes" => self.scopes = read(name, text)?,
            "requests_per_minute" => self.requests_per_minute = Some(read(name, text)?),
            "tokens_per_minute" => self.tokens_per_minute = Some(read(name, text)?),
            "concurrency" => self.concurrency = Some(read(name, text)?),
            _ => return Err(unknown("setting", name, NAMES)),
        }
        Ok(())
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.key.0.is_empty() {
            return Err("key: `key` is missing: the key, or its hash (`mlx-node key new --http` makes both)");
        }
        if self.scopes.0.is_empty() {
            return Err("key: scopes = []: at least one of \"use\" and \"admin\" is expected");
        }
        Ok(())
    }

    pub(crate) fn may(&self, scope: Scope) -> bool {
        self.scopes.0.contains(&scope)
    }

    /// Names and values as TOML, but not the key.
    pub(crate) fn shown(&self) -> Vec<(&'static str, String)> {
        let limit = |limit: &Option<Limit>| limit.as_ref().map(Setting::to_toml);
        let values = [
            Some(self.key.to_toml()),
            Some(self.name.to_toml()),
            Some(self.scopes.to_toml()),
            limit(&self.requests_per_minute),
            limit(&self.tokens_per_minute),
            limit(&self.concurrency),
        ];
        NAMES.iter().zip(values).filter_map(|(name, value)| Some((*name, value?))).collect()
    }
}

/// Why keys cannot be used. Never shows one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KeysError {
    #[error("api_keys: a key is empty")]
    Empty,
    #[error("{place}: {error}")]
    Hash { place: String, error: api::ParseHashError },
    #[error("{place}: the same key is there twice")]
    Twice { place: String },
    #[error("{count} keys; at most {KEYS_MAX}")]
    TooMany { count: usize },
}

/// All keys, those of `api_keys` first; `rates` is what holds where a key says nothing else.
pub(crate) fn resolve(
    plain: &[Secret],
    entries: &[KeyEntry],
    rates: RateLimits,
) -> Result<Vec<ApiKey>, KeysError> {
    let count = plain.len() + entries.len();
    if count > KEYS_MAX {
        return Err(KeysError::TooMany { count });
    }
    let mut keys: Vec<ApiKey> = Vec::with_capacity(count);
    let mut add = |place: String, key: &Secret, rest: &dyn Fn(KeyHash) -> ApiKey| {
        let hash = match KeyHash::of_setting(&key.0) {
            Ok(hash) => hash,
            Err(error) => return Err(KeysError::Hash { place, error }),
        };
        if keys.iter().any(|key| key.hash == hash) {
            return Err(KeysError::Twice { place });
        }
        keys.push(rest(hash));
        Ok(())
    };
    for key in plain {
        if key.0.is_empty() {
            return Err(KeysError::Empty);
        }
        add("api_keys".to_owned(), key, &|hash| ApiKey {
            hash,
            name: String::new(),
            scopes: Scopes::USE,
            rates,
        })?;
    }
    for (at, entry) in entries.iter().enumerate() {
        let limit = |own: Option<Limit>, all| own.map_or(all, |own| own.0);
        add(format!("key {} ({:?})", at + 1, entry.name), &entry.key, &|hash| ApiKey {
            hash,
            name: entry.name.clone(),
            scopes: Scopes { models: entry.may(Scope::Use), admin: entry.may(Scope::Admin) },
            rates: RateLimits {
                requests_per_minute: limit(entry.requests_per_minute, rates.requests_per_minute),
                tokens_per_minute: limit(entry.tokens_per_minute, rates.tokens_per_minute),
                concurrent: limit(entry.concurrency, rates.concurrent),
            },
        })?;
    }
    Ok(keys)
}

/// The first key that is good for something and written out, not as a hash: what commands send. A key that a command is given
/// takes the place of `api_keys`, and is whatever its user wants to send.
pub(crate) fn written<'a>(plain: &'a [Secret], entries: &'a [KeyEntry], scope: Scope) -> Option<&'a Secret> {
    let entries = || entries.iter().filter(|entry| entry.may(scope)).map(|entry| &entry.key);
    let is_written_out = |key: &&Secret| !KeyHash::is_written(&key.0);
    match scope {
        Scope::Use => plain.iter().chain(entries()).find(is_written_out),
        Scope::Admin => entries().chain(plain).find(is_written_out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_toml;
    use std::path::Path;

    fn keys(text: &str) -> Result<Vec<ApiKey>, String> {
        let values = from_toml(text, Path::new("c.toml")).map_err(|error| error.to_string())?.resolve();
        let rates = RateLimits { concurrent: Some(4), ..RateLimits::default() };
        resolve(&values.api_keys.0, &values.keys, rates).map_err(|error| error.to_string())
    }

    #[test]
    fn hashes_scopes_and_limits() {
        let hash = KeyHash::of(b"alice's");
        let text = format!(
            "api_keys = [\"plain\", \"{}\"]\n[[key]]\nkey = \"{hash}\"\nname = \"alice\"\nscopes = [\"use\", \"admin\"]\n\
             requests_per_minute = 60\nconcurrency = \"none\"\n[[key]]\nkey = \"op\"\nscopes = [\"admin\"]",
            KeyHash::of(b"hashed")
        );
        let keys = keys(&text).expect("valid");
        let hashes: Vec<KeyHash> = keys.iter().map(|key| key.hash).collect();
        assert_eq!(hashes, [&b"plain"[..], b"hashed", b"alice's", b"op"].map(KeyHash::of));
        let all = RateLimits { concurrent: Some(4), ..RateLimits::default() };
        assert_eq!((keys[0].scopes, keys[0].rates), (Scopes::USE, all));
        assert_eq!(keys[2].scopes, Scopes { models: true, admin: true });
        assert_eq!(
            keys[2].rates,
            RateLimits { requests_per_minute: Some(60), concurrent: None, ..RateLimits::default() }
        );
        assert_eq!((keys[3].scopes, keys[3].rates), (Scopes { models: false, admin: true }, all));
    }

    #[test]
    fn errors_name_the_place_and_never_the_key() {
        let check = |text: &str, expected: &str| {
            let error = keys(text).expect_err(text);
            assert!(error.contains(expected) && !error.contains("5ec2e7"), "{text}: {error}");
        };
        check("api_keys = [\"sha256:5ec2e7\"]", "api_keys: after \"sha256:\" 64 hexadecimal digits");
        check("[[key]]\nkey = \"sha256:5ec2e7\"\nname = \"bob\"", "key 1 (\"bob\"): after \"sha256:\"");
        check("api_keys = [\"5ec2e7\"]\n[[key]]\nkey = \"5ec2e7\"", "key 1 (\"\"): the same key");
        check("[[key]]\nname = \"bob\"", "c.toml:1: key: `key` is missing");
        check("[[key]]\nkey = \"5ec2e7 5ec2e7\"", "c.toml:2: key: key: a text without spaces");
        check(
            "[[key]]\nkey = \"k\"\nscopes = [\"root\"]",
            "c.toml:3: key: scopes = \"root\": \"use\" or \"admin\"",
        );
        check("[[key]]\nkey = \"k\"\nscopes = []", "scopes = []");
        check("[[key]]\nkey = \"k\"\nscope = \"use\"", "did you mean \"scopes\"?");
        check("[key]\nkey = \"k\"", "write [[key]]");
    }

    #[test]
    fn commands_send_what_is_written_out() {
        let values = from_toml(
            &format!(
                "api_keys = [\"{}\", \"plain\"]\n[[key]]\nkey = \"op\"\nscopes = [\"admin\"]",
                KeyHash::of(b"hashed")
            ),
            Path::new("c.toml"),
        );
        let values = values.expect("valid").resolve();
        let sent = |scope| written(&values.api_keys.0, &values.keys, scope).map(|key| key.0.as_str());
        assert_eq!((sent(Scope::Use), sent(Scope::Admin)), (Some("plain"), Some("op")));
    }
}
