//! The only file that names bincode, so that it can be replaced.
//!
//! Little-endian, variable-length integers. Decoding never allocates more than a small multiple of the bytes it was
//! given: a length is a promise that garbage breaks, so every decode has a limit on the memory it may claim.

use bytes::{BufMut, BytesMut};
use serde::{Serialize, de::DeserializeOwned};

/// Decoded bytes that one encoded byte may become: an empty string takes one byte and counts as the 8 of its length.
const GROWTH_MAX: usize = 8;
/// Sizes of payload, each with a decode limit of its own (the limit must be a constant).
const TIERS: [usize; 4] = [4 << 10, 64 << 10, 1 << 20, crate::frame::PAYLOAD_BYTES_MAX];

/// Why bytes are not a message, or a message not bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The message has no form in bytes.
    #[error("cannot encode: {message}")]
    Encode {
        /// What the codec said.
        message: String,
    },
    /// The bytes mean nothing.
    #[error("cannot decode {bytes} bytes: {message}")]
    Decode {
        /// How many there were.
        bytes: usize,
        /// What the codec said.
        message: String,
    },
    /// There was a message, and then more.
    #[error("{excess} bytes follow the message in a frame of {bytes} bytes")]
    Trailing {
        /// Bytes of the payload.
        bytes: usize,
        /// Bytes too many.
        excess: usize,
    },
}

/// Appends `message` to `buffer`.
pub(crate) fn encode<T: Serialize>(message: &T, buffer: &mut BytesMut) -> Result<(), CodecError> {
    let written =
        bincode::serde::encode_into_std_write(message, &mut buffer.writer(), bincode::config::standard());
    written.map(|_| ()).map_err(|error| CodecError::Encode { message: error.to_string() })
}

/// Reads the one message that `payload` holds.
pub(crate) fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, CodecError> {
    let decoded = match payload.len() {
        bytes if bytes <= TIERS[0] => decode_limited::<T, { TIERS[0] * GROWTH_MAX }>(payload),
        bytes if bytes <= TIERS[1] => decode_limited::<T, { TIERS[1] * GROWTH_MAX }>(payload),
        bytes if bytes <= TIERS[2] => decode_limited::<T, { TIERS[2] * GROWTH_MAX }>(payload),
        _ => decode_limited::<T, { TIERS[3] * GROWTH_MAX }>(payload),
    };
    let bytes = payload.len();
    match decoded {
        Ok((message, read)) if read == bytes => Ok(message),
        Ok((_, read)) => Err(CodecError::Trailing { bytes, excess: bytes - read }),
        Err(error) => Err(CodecError::Decode { bytes, message: error.to_string() }),
    }
}

fn decode_limited<T: DeserializeOwned, const LIMIT: usize>(
    payload: &[u8],
) -> Result<(T, usize), bincode::error::DecodeError> {
    bincode::serde::borrow_decode_from_slice(payload, bincode::config::standard().with_limit::<LIMIT>())
}
