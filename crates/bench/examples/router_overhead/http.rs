//! As much of HTTP/1.1 as both ends need: heads, bodies of a known length, chunks.

use std::io;
use tokio::{io::AsyncReadExt, net::TcpStream};

/// Bytes of a head or body here at most; the prompts are far smaller.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;

/// Reads messages off a connection that is kept alive.
pub(crate) struct Reader {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that belong to messages before.
    taken: usize,
}

/// A message; its parts are in the reader's buffer.
pub(crate) struct Message {
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Reader {
    pub(crate) fn new() -> Self {
        Self { buffer: Vec::new(), taken: 0 }
    }

    /// The next message, with `body_begins` called once its first byte of body (or its end) is there; none at the end.
    pub(crate) async fn next(
        &mut self,
        stream: &mut TcpStream,
        mut body_begins: impl FnMut(),
    ) -> io::Result<Option<Message>> {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let head_end = loop {
            if let Some(at) = find(&self.buffer, b"\r\n\r\n") {
                break at + 4;
            }
            if self.fill(stream).await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        };
        let head = String::from_utf8_lossy(&self.buffer[..head_end]).to_ascii_lowercase();
        let length = header(&head, "content-length").and_then(|text| text.parse::<usize>().ok());
        let chunked = header(&head, "transfer-encoding").is_some_and(|text| text.contains("chunked"));
        let mut at = head_end;
        let mut body = Vec::new();
        if chunked {
            loop {
                let line_end = self.until(stream, at, b"\r\n", &mut body_begins).await?;
                let line = String::from_utf8_lossy(&self.buffer[at..line_end]).into_owned();
                let size = usize::from_str_radix(line.trim(), 16)
                    .map_err(|_| bad(format!("chunk size {line:?}")))?;
                at = line_end + 2;
                self.have(stream, at + size + 2, &mut body_begins).await?;
                body.extend_from_slice(&self.buffer[at..at + size]);
                at += size + 2;
                if size == 0 {
                    break;
                }
            }
        } else {
            let end = at + length.unwrap_or(0);
            self.have(stream, end, &mut body_begins).await?;
            body.extend_from_slice(&self.buffer[at..end]);
            at = end;
            if body.is_empty() {
                body_begins();
            }
        }
        self.taken = at;
        Ok(Some(Message { head, body }))
    }

    async fn until(
        &mut self,
        stream: &mut TcpStream,
        from: usize,
        what: &[u8],
        body_begins: &mut impl FnMut(),
    ) -> io::Result<usize> {
        loop {
            if self.buffer.len() > from {
                body_begins();
            }
            if let Some(at) = find(&self.buffer[from..], what) {
                return Ok(from + at);
            }
            if self.fill(stream).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    async fn have(
        &mut self,
        stream: &mut TcpStream,
        bytes: usize,
        body_begins: &mut impl FnMut(),
    ) -> io::Result<()> {
        if bytes > MESSAGE_BYTES_MAX {
            return Err(bad(format!("a message of {bytes} bytes")));
        }
        while self.buffer.len() < bytes {
            if self.fill(stream).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            body_begins();
        }
        body_begins();
        Ok(())
    }

    async fn fill(&mut self, stream: &mut TcpStream) -> io::Result<usize> {
        self.buffer.reserve(READ_BYTES);
        stream.read_buf(&mut self.buffer).await
    }
}

/// A header's value in a head in lower case.
fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value.trim())
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

fn bad(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
