//! Who may do what: API keys by their hashes, what each is good for, and how much each may ask.
//!
//! [`SharedAccess`] is the one thing of the endpoint that changes while it serves: whoever reloads the settings replaces it
//! whole, and every request looks at what there is as it comes.

use crate::RateLimits;
use sha2::{Digest, Sha256};
use std::{
    fmt,
    str::FromStr,
    sync::{Arc, PoisonError, RwLock},
};
use subtle::{Choice, ConstantTimeEq};

/// What a written hash begins with: the function's name.
const HASH_PREFIX: &str = "sha256:";
const HASH_BYTES: usize = 32;

/// SHA-256 of an API key, written `sha256:` and 64 hexadecimal digits. A drawn key cannot be found from it; one that a person
/// thought up can, by trying.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyHash([u8; HASH_BYTES]);

/// Why a text is not a hash. Never shows the text: it may be a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("after \"{HASH_PREFIX}\" {} hexadecimal digits are expected (`mlx-node key hash` writes them)", 2 * HASH_BYTES)]
pub struct ParseHashError;

impl KeyHash {
    /// The hash of a key.
    pub fn of(key: &[u8]) -> Self {
        Self(Sha256::digest(key).into())
    }

    /// Whether a text is meant to be a hash and not a key.
    pub fn is_written(text: &str) -> bool {
        text.starts_with(HASH_PREFIX)
    }

    /// The hash that a setting says, which is a hash or a key.
    ///
    /// # Errors
    /// A hash that is none.
    pub fn of_setting(text: &str) -> Result<Self, ParseHashError> {
        if Self::is_written(text) { text.parse() } else { Ok(Self::of(text.as_bytes())) }
    }
}

impl FromStr for KeyHash {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, ParseHashError> {
        let digits = text.strip_prefix(HASH_PREFIX).ok_or(ParseHashError)?.as_bytes();
        if digits.len() != 2 * HASH_BYTES {
            return Err(ParseHashError);
        }
        let mut bytes = [0; HASH_BYTES];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |at: usize| char::from(pair[at]).to_digit(16).ok_or(ParseHashError);
            *byte = (digit(0)? << 4 | digit(1)?) as u8;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HASH_PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Its first digits, which tell keys apart.
impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyHash({:02x}{:02x}…)", self.0[0], self.0[1])
    }
}

/// What a key is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scopes {
    /// To ask models.
    pub models: bool,
    /// To change what this process does: `/v1/admin/…`.
    pub admin: bool,
}

impl Scopes {
    /// What a key is good for of which nothing else is said.
    pub const USE: Self = Self { models: true, admin: false };
}

/// One key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// Of the key.
    pub hash: KeyHash,
    /// Whose it is, for people; empty where nobody said.
    pub name: String,
    /// What it is good for.
    pub scopes: Scopes,
    /// How much it may ask.
    pub rates: RateLimits,
}

impl ApiKey {
    /// A key that may ask models, as much as it likes.
    pub fn of(key: &str) -> Self {
        let hash = KeyHash::of(key.as_bytes());
        Self { hash, name: String::new(), scopes: Scopes::USE, rates: RateLimits::default() }
    }
}

/// Who may do what.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Access {
    /// Clients must have one of these; none lets everyone in.
    pub keys: Vec<ApiKey>,
    /// What all may ask for together where there are no keys.
    pub rates: RateLimits,
    /// Whether, where there are no keys, whoever reaches the endpoint may also administer it.
    pub open_admin: bool,
    /// Whether `/metrics` needs no key.
    pub open_metrics: bool,
}

impl Access {
    /// These keys, which may ask models, and nothing else.
    pub fn of_keys<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        Self { keys: keys.into_iter().map(ApiKey::of).collect(), ..Self::default() }
    }

    /// The key that was given, if it is one of these. Looks at all of them whatever it finds.
    pub(crate) fn find(&self, given: &[u8]) -> Option<&ApiKey> {
        let given = KeyHash::of(given);
        let mut found = None;
        for key in &self.keys {
            let same: Choice = key.hash.0.ct_eq(&given.0);
            if bool::from(same) {
                found = Some(key);
            }
        }
        found
    }
}

/// [`Access`] that can be replaced while it is used. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct SharedAccess(Arc<RwLock<Arc<Access>>>);

impl SharedAccess {
    /// With this to begin with.
    pub fn new(access: Access) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(access))))
    }

    /// What there is now.
    pub fn get(&self) -> Arc<Access> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts something else in its place; requests that were let in go on.
    pub fn replace(&self, access: Access) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(access);
    }
}

impl From<Access> for SharedAccess {
    fn from(access: Access) -> Self {
        Self::new(access)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 180-2's example.
    #[test]
    fn hashes_are_sha_256() {
        let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(KeyHash::of(b"abc").to_string(), text);
        assert_eq!(text.parse(), Ok(KeyHash::of(b"abc")));
        assert_eq!(
            KeyHash::of_setting(&text.to_uppercase().replacen("SHA", "sha", 1)),
            Ok(KeyHash::of(b"abc"))
        );
        assert_eq!(KeyHash::of_setting("abc"), Ok(KeyHash::of(b"abc")));
        for wrong in [&text[..70], &format!("{text}0"), "sha256:", &text.replace("7816", "ü16"), "sha256:é"]
        {
            assert_eq!(KeyHash::of_setting(wrong), Err(ParseHashError), "{wrong}");
        }
    }

    #[test]
    fn a_key_is_found_by_all_of_it() {
        let access = Access::of_keys(["first", "second"]);
        assert_eq!(access.find(b"second"), Some(&ApiKey::of("second")));
        for wrong in ["", "firs", "first ", "third", &ApiKey::of("first").hash.to_string()] {
            assert_eq!(access.find(wrong.as_bytes()), None, "{wrong:?}");
        }
    }

    #[test]
    fn what_is_replaced_is_seen_by_all() {
        let shared = SharedAccess::new(Access::of_keys(["old"]));
        let (other, before) = (shared.clone(), shared.get());
        shared.replace(Access::of_keys(["new"]));
        assert!(other.get().find(b"new").is_some() && other.get().find(b"old").is_none());
        assert!(before.find(b"old").is_some());
    }
}
