//! The first bytes of a control stream in each direction: `mlxn`, then the version as a little-endian u32.
//!
//! These eight bytes never change, whatever the version, so that two versions can tell each other apart by name.

use crate::VERSION;

/// Bytes of a preface.
pub const PREFACE_BYTES: usize = 8;
/// What every version starts with.
const MAGIC: [u8; 4] = *b"mlxn";

/// Why a peer cannot be talked to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrefaceError {
    /// Something else altogether.
    #[error("not an mlx-node: the connection starts with {start:02x?}")]
    Foreign {
        /// Its first bytes.
        start: [u8; 4],
    },
    /// Another version of this program.
    #[error("wire version {theirs} there, {ours} here: run the same version of mlx-node on all machines")]
    Version {
        /// This program's.
        ours: u32,
        /// The peer's.
        theirs: u32,
    },
}

/// This program's preface.
pub fn preface() -> [u8; PREFACE_BYTES] {
    of_version(VERSION)
}

/// The preface of another version, for tests of how it is refused.
pub fn of_version(version: u32) -> [u8; PREFACE_BYTES] {
    let mut bytes = [0; PREFACE_BYTES];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..].copy_from_slice(&version.to_le_bytes());
    bytes
}

/// Whether a peer that starts with `bytes` speaks this version.
pub fn check(bytes: [u8; PREFACE_BYTES]) -> Result<(), PrefaceError> {
    let [a, b, c, d, version @ ..] = bytes;
    if [a, b, c, d] != MAGIC {
        return Err(PrefaceError::Foreign { start: [a, b, c, d] });
    }
    match u32::from_le_bytes(version) {
        VERSION => Ok(()),
        theirs => Err(PrefaceError::Version { ours: VERSION, theirs }),
    }
}
