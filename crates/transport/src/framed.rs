//! Frames over QUIC streams. Reading and writing are safe to cancel: a frame is passed on whole or not at all.

use crate::close::{ReceiveError, SendError};
use bytes::{Buf, BytesMut};
use futures_util::FutureExt;
use quinn::{RecvStream, SendStream};
use serde::{Serialize, de::DeserializeOwned};
use wire::{Decoder, FrameClass, encode};

/// Bytes taken from QUIC at once.
const CHUNK_BYTES: usize = 64 << 10;

/// Reads messages off a stream.
#[derive(Debug)]
pub(crate) struct FrameReader<T> {
    pub(crate) stream: RecvStream,
    buffer: BytesMut,
    decoder: Decoder<T>,
}

impl<T: DeserializeOwned> FrameReader<T> {
    pub(crate) fn new(stream: RecvStream, class: FrameClass) -> Self {
        Self { stream, buffer: BytesMut::new(), decoder: Decoder::new(class) }
    }

    /// Reads frames of another class from here on.
    pub(crate) fn with_class(self, class: FrameClass) -> Self {
        Self { decoder: Decoder::new(class), ..self }
    }

    /// Takes note of the stream's end if it has come, which leaves nothing to tell the other end when this is dropped.
    pub(crate) fn end_now(&mut self) {
        let _ = self.stream.read_chunk(CHUNK_BYTES, true).now_or_never();
    }

    /// The stream, and what was read of it and is no frame.
    pub(crate) fn into_parts(self) -> (RecvStream, BytesMut) {
        (self.stream, self.buffer)
    }

    /// The next message; `None` when the stream has ended between two.
    pub(crate) async fn next(&mut self) -> Result<Option<T>, ReceiveError> {
        loop {
            if let Some(message) = self.decoder.next(&mut self.buffer)? {
                return Ok(Some(message));
            }
            match self.stream.read_chunk(CHUNK_BYTES, true).await? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk.bytes),
                None => return self.decoder.finish(&self.buffer).map(|()| None).map_err(ReceiveError::from),
            }
        }
    }
}

/// Writes messages to a stream.
#[derive(Debug)]
pub(crate) struct FrameWriter {
    pub(crate) stream: SendStream,
    buffer: BytesMut,
}

impl FrameWriter {
    pub(crate) fn new(stream: SendStream) -> Self {
        Self { stream, buffer: BytesMut::new() }
    }

    /// Whether nothing waits to be written.
    pub(crate) fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Writes bytes of no frame before the next one.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Writes one message with the next one that is sent.
    pub(crate) fn hold<T: Serialize>(&mut self, class: FrameClass, message: &T) -> Result<(), SendError> {
        Ok(encode(class, message, &mut self.buffer)?)
    }

    /// Writes one message and waits until QUIC has taken it. Cancelled after it has begun to write, it leaves the
    /// rest to the next call.
    pub(crate) async fn send<T: Serialize>(
        &mut self,
        class: FrameClass,
        message: &T,
    ) -> Result<(), SendError> {
        if self.buffer.len() > CHUNK_BYTES {
            self.flush().await?;
        }
        encode(class, message, &mut self.buffer)?;
        self.flush().await
    }

    /// Writes what a cancelled call left.
    pub(crate) async fn flush(&mut self) -> Result<(), SendError> {
        while !self.buffer.is_empty() {
            let written = self.stream.write(&self.buffer).await?;
            self.buffer.advance(written);
        }
        if self.buffer.capacity() > CHUNK_BYTES {
            self.buffer = BytesMut::new();
        }
        Ok(())
    }
}
