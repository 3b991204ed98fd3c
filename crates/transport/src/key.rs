//! The cluster key: the one secret that all machines of a cluster share.
//!
//! Everything that proves membership is derived from it with HKDF-SHA256 (RFC 5869), each with an info string of its
//! own, so that nothing that leaves the process says anything about the key.

use ring::{digest, hkdf, rand};
use std::{fmt, str::FromStr};

/// What a key's text starts with: a kind of secret that people and scanners can recognize, and its version.
const PREFIX: &str = "mlxk1-";
/// Bytes of the key.
const KEY_BYTES: usize = 32;
/// Bytes of SHA-256 over the key that end its text, against typing errors.
const CHECK_BYTES: usize = 4;
/// Hexadecimal digits of a key's text after its prefix.
const DIGITS: usize = 2 * (KEY_BYTES + CHECK_BYTES);

/// 32 random bytes that all machines of a cluster share. Its [`fmt::Debug`] form does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey([u8; KEY_BYTES]);

/// The key that a process proves itself with, and another one that it takes from others, too: so a cluster goes over from one
/// key to the next while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterKeys {
    /// What this process proves itself with.
    pub own: ClusterKey,
    /// What others may prove themselves with instead.
    pub other: Option<ClusterKey>,
}

impl ClusterKeys {
    /// All keys that others may have, the own one first.
    pub fn all(&self) -> impl Iterator<Item = &ClusterKey> {
        [&self.own].into_iter().chain(&self.other)
    }

    /// Their fingerprints, the own one's first.
    pub fn fingerprints(&self) -> Vec<String> {
        self.all().map(ClusterKey::fingerprint).collect()
    }
}

impl From<ClusterKey> for ClusterKeys {
    fn from(own: ClusterKey) -> Self {
        Self { own, other: None }
    }
}

impl From<&ClusterKey> for ClusterKeys {
    fn from(own: &ClusterKey) -> Self {
        own.clone().into()
    }
}

impl From<&Self> for ClusterKeys {
    fn from(keys: &Self) -> Self {
        keys.clone()
    }
}

/// Why a text is not a cluster key. Never shows the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseKeyError {
    /// Something else.
    #[error("a cluster key starts with {PREFIX:?}; this text does not (make one with `mlx-node key new`)")]
    Prefix,
    /// Cut off, or too long.
    #[error("a cluster key has {DIGITS} digits after {PREFIX:?}; this one has {digits}")]
    Length {
        /// Its digits.
        digits: usize,
    },
    /// Not hexadecimal.
    #[error("the character at position {position} of the cluster key is not a hexadecimal digit")]
    Digit {
        /// Counts from 1, prefix included.
        position: usize,
    },
    /// A typing error.
    #[error("the cluster key's checksum is wrong: a digit was changed")]
    Checksum,
}

/// The system has no random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the system gives no random numbers for a new cluster key")]
pub struct GenerateKeyError;

impl ClusterKey {
    /// A new key from the system's random numbers.
    pub fn generate() -> Result<Self, GenerateKeyError> {
        let key =
            rand::generate::<[u8; KEY_BYTES]>(&rand::SystemRandom::new()).map_err(|_| GenerateKeyError)?;
        Ok(Self(key.expose()))
    }

    /// The key as text, to be stored and given to other machines. The only way to see it.
    pub fn reveal(&self) -> String {
        let check = checksum(&self.0);
        format!("{PREFIX}{}{}", hex(&self.0), hex(&check))
    }

    /// 16 hexadecimal digits that differ for different keys and tell nothing else; may be announced.
    pub fn fingerprint(&self) -> String {
        hex(&self.derive::<8>(b"mlx-node fingerprint"))
    }

    /// Bytes that only holders of the key can compute, different for each `info`.
    pub(crate) fn derive<const N: usize>(&self, info: &[u8]) -> [u8; N] {
        struct Length(usize);
        impl hkdf::KeyType for Length {
            fn len(&self) -> usize {
                self.0
            }
        }
        let mut bytes = [0; N];
        let pseudorandom = hkdf::Salt::new(hkdf::HKDF_SHA256, b"mlx-cluster key v1").extract(&self.0);
        pseudorandom
            .expand(&[info], Length(N))
            .and_then(|material| material.fill(&mut bytes))
            .expect("HKDF-SHA256 gives up to 8160 bytes, and fewer are asked for");
        bytes
    }
}

impl FromStr for ClusterKey {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        let digits = text.trim().strip_prefix(PREFIX).ok_or(ParseKeyError::Prefix)?;
        if let Some(at) = digits.chars().position(|digit| !digit.is_ascii_hexdigit()) {
            return Err(ParseKeyError::Digit { position: PREFIX.len() + at + 1 });
        }
        if digits.len() != DIGITS {
            return Err(ParseKeyError::Length { digits: digits.len() });
        }
        let mut bytes = [0; KEY_BYTES + CHECK_BYTES];
        for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
            *byte = pair.iter().fold(0, |value, &digit| {
                value << 4 | (digit as char).to_digit(16).expect("checked above") as u8
            });
        }
        let (key, check) = bytes.split_at(KEY_BYTES);
        let key: [u8; KEY_BYTES] = key.try_into().expect("split there");
        if checksum(&key) == check { Ok(Self(key)) } else { Err(ParseKeyError::Checksum) }
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKey(fingerprint {})", self.fingerprint())
    }
}

fn checksum(key: &[u8; KEY_BYTES]) -> [u8; CHECK_BYTES] {
    let hash = digest::digest(&digest::SHA256, key);
    hash.as_ref()[..CHECK_BYTES].try_into().expect("SHA-256 has 32 bytes")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made once with this code; another derivation would split clusters at an upgrade.
    #[test]
    fn what_is_derived_never_changes() {
        let key = ClusterKey([7; KEY_BYTES]);
        assert_eq!(key.fingerprint(), "0317304246423835");
        let digits = "07".repeat(KEY_BYTES);
        assert_eq!(key.reveal(), format!("mlxk1-{digits}4bb06f8e"));
    }

    #[test]
    fn text_round_trips_and_is_shown_on_demand_only() {
        let key = ClusterKey::generate().expect("random numbers");
        let text = key.reveal();
        assert_eq!(text.parse(), Ok(key.clone()));
        assert_eq!(
            format!("  {}\n", text.to_uppercase().replacen("MLXK", "mlxk", 1)).parse(),
            Ok(key.clone())
        );
        let digits = text.strip_prefix(PREFIX).expect("prefix");
        let debug = format!("{key:?}");
        assert_eq!(debug, format!("ClusterKey(fingerprint {})", key.fingerprint()));
        assert!(!debug.contains(&digits[..8]));
        assert_ne!(ClusterKey::generate().expect("random numbers").fingerprint(), key.fingerprint());
    }

    #[test]
    fn errors_say_what_is_wrong_and_never_show_the_text() {
        let text = ClusterKey([7; KEY_BYTES]).reveal();
        let check = |text: &str, expected: &str| {
            let error = text.parse::<ClusterKey>().expect_err("no key").to_string();
            assert_eq!(error, expected);
        };
        let prefix =
            "a cluster key starts with \"mlxk1-\"; this text does not (make one with `mlx-node key new`)";
        check("", prefix);
        check("secret", prefix);
        check(&text[6..], prefix);
        check(&text[..40], "a cluster key has 72 digits after \"mlxk1-\"; this one has 34");
        check(&format!("{text}0"), "a cluster key has 72 digits after \"mlxk1-\"; this one has 73");
        let digit = "the character at position 10 of the cluster key is not a hexadecimal digit";
        check(&format!("{}é{}", &text[..9], &text[10..]), digit);
        check(&text.replacen("07", "08", 1), "the cluster key's checksum is wrong: a digit was changed");
    }
}
