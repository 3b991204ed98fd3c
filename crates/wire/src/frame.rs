//! Frames: the length of a message as a little-endian u32, then the message.
//!
//! The length is checked against the limit of its [`FrameClass`] before anything is read or allocated for it.

use crate::codec::{self, CodecError};
use bytes::{Buf, BytesMut};
use serde::{Serialize, de::DeserializeOwned};
use std::marker::PhantomData;
use types::limits;

/// Bytes of the length before each message.
pub const HEADER_BYTES: usize = 4;
/// Bytes of a `Hello` or `Welcome`: a few names.
const HELLO_BYTES_MAX: usize = 16 << 10;
/// Bytes of a report on the control stream: up to [`limits::NODE_MODELS_MAX`] model cards, or
/// [`limits::CACHE_BLOCKS_SENT_MAX`] blocks of a cache, with room to spare.
const CONTROL_BYTES_MAX: usize = 1 << 20;
/// Bytes of a request: [`limits::PROMPT_TOKENS_MAX`] tokens of its prompt and [`limits::NEW_TOKENS_MAX`] of its answer at
/// up to 5 bytes, plus its parameters and grammar.
const REQUEST_BYTES_MAX: usize = 11 << 20;
/// Bytes of an answer to `Generate` or `Sessions`: one step's tokens, some log-probabilities, an error with its text, or the
/// sessions of an engine.
const REPLY_BYTES_MAX: usize = 256 << 10;
/// Bytes of an answer to `Embed`: vectors of 4 bytes a number, and some lengths.
const EMBEDDED_BYTES_MAX: usize = limits::EMBED_INPUTS_MAX * limits::EMBED_DIMENSIONS_MAX * 4 + (64 << 10);
/// Bytes of an answer to `Assets`: the assets and some lengths.
const ASSETS_BYTES_MAX: usize = limits::ASSETS_BYTES_MAX + (64 << 10);
/// Bytes of a message to or from an engine child, whose `Ready` holds assets and a model card.
const ENGINE_BYTES_MAX: usize = ASSETS_BYTES_MAX + CONTROL_BYTES_MAX;
/// The largest of all.
pub(crate) const PAYLOAD_BYTES_MAX: usize = ENGINE_BYTES_MAX;

const _: () = assert!(
    REQUEST_BYTES_MAX
        > (limits::PROMPT_TOKENS_MAX + limits::NEW_TOKENS_MAX as usize) * 5
            + limits::GRAMMAR_BYTES_MAX
            + (64 << 10)
);
// A token, its log-probability, and the alternatives with their count.
const _: () = assert!(
    REPLY_BYTES_MAX > limits::LOGPROB_TOKENS_MAX * (5 + 4 + 2 + limits::LOGPROBS_MAX as usize * (5 + 4)) + 64
);
// A text's length takes up to 5.
const _: () = assert!(
    REQUEST_BYTES_MAX > limits::PROMPT_TOKENS_MAX * 5 + limits::EMBED_INPUTS_MAX * 5 + (64 << 10)
        && ENGINE_BYTES_MAX > EMBEDDED_BYTES_MAX
);
// A hash takes 17 bytes; an event of one block has its parent and a few numbers besides.
const _: () = assert!(CONTROL_BYTES_MAX > limits::CACHE_BLOCKS_SENT_MAX * (2 * 17 + 4));
const _: () = assert!(ASSETS_BYTES_MAX > REPLY_BYTES_MAX && ENGINE_BYTES_MAX > REQUEST_BYTES_MAX);
const _: () = assert!(PAYLOAD_BYTES_MAX <= u32::MAX as usize);
// A session is its name, and up to 23 bytes of numbers and length.
const _: () = assert!(REPLY_BYTES_MAX > limits::SESSIONS_MAX * (limits::SESSION_ID_BYTES_MAX + 32));

/// Where a frame travels, which decides how large it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameClass {
    /// The first frames of a control stream.
    Hello,
    /// Later frames of a control stream.
    Control,
    /// From a router on a request's stream.
    Request,
    /// Answers to `Generate` and `Sessions`.
    Reply,
    /// Answers to `Embed`.
    Embedded,
    /// Answers to `Assets`.
    Assets,
    /// To and from an engine child.
    Engine,
}

impl FrameClass {
    /// Bytes of the message at most, without the header.
    pub const fn bytes_max(self) -> usize {
        match self {
            Self::Hello => HELLO_BYTES_MAX,
            Self::Control => CONTROL_BYTES_MAX,
            Self::Request => REQUEST_BYTES_MAX,
            Self::Reply => REPLY_BYTES_MAX,
            Self::Embedded => EMBEDDED_BYTES_MAX,
            Self::Assets => ASSETS_BYTES_MAX,
            Self::Engine => ENGINE_BYTES_MAX,
        }
    }
}

/// Why a frame cannot be written or read. After a read error the stream is useless.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Larger than its class allows.
    #[error("a {class:?} frame of {bytes} bytes; at most {} are allowed", class.bytes_max())]
    TooLarge {
        /// Its class.
        class: FrameClass,
        /// Its size.
        bytes: usize,
    },
    /// The stream ended within a frame.
    #[error("the stream ended within a frame, after {bytes} bytes of it")]
    Truncated {
        /// Bytes that had come, header included.
        bytes: usize,
    },
    /// Not a message of this type.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// Appends `message` as one frame; on error `buffer` is as it was.
pub fn encode<T: Serialize>(class: FrameClass, message: &T, buffer: &mut BytesMut) -> Result<(), FrameError> {
    let start = buffer.len();
    buffer.extend_from_slice(&[0; HEADER_BYTES]);
    let encoded = codec::encode(message, buffer).map_err(FrameError::from).and_then(|()| {
        let bytes = buffer.len() - start - HEADER_BYTES;
        if bytes > class.bytes_max() { Err(FrameError::TooLarge { class, bytes }) } else { Ok(bytes as u32) }
    });
    match encoded {
        Ok(bytes) => {
            buffer[start..start + HEADER_BYTES].copy_from_slice(&bytes.to_le_bytes());
            Ok(())
        }
        Err(error) => {
            buffer.truncate(start);
            Err(error)
        }
    }
}

/// Takes frames that hold a `T` off the front of a buffer.
#[derive(Debug, Clone, Copy)]
pub struct Decoder<T> {
    class: FrameClass,
    message: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Decoder<T> {
    /// For a stream of such frames.
    pub const fn new(class: FrameClass) -> Self {
        Self { class, message: PhantomData }
    }

    /// The next message, taken off the front of `buffer`; `None` when more bytes are needed.
    pub fn next(&self, buffer: &mut BytesMut) -> Result<Option<T>, FrameError> {
        let Some(header) = buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let bytes = u32::from_le_bytes(*header) as usize;
        if bytes > self.class.bytes_max() {
            return Err(FrameError::TooLarge { class: self.class, bytes });
        }
        let Some(payload) = buffer.get(HEADER_BYTES..HEADER_BYTES + bytes) else { return Ok(None) };
        let message = codec::decode(payload)?;
        buffer.advance(HEADER_BYTES + bytes);
        Ok(Some(message))
    }

    /// To be asked when the stream has ended: whether that was between two frames.
    pub fn finish(&self, buffer: &BytesMut) -> Result<(), FrameError> {
        if buffer.is_empty() { Ok(()) } else { Err(FrameError::Truncated { bytes: buffer.len() }) }
    }
}
