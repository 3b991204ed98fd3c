//! A small HTTP/1.1 client: one connection a request, from any network namespace, server-sent events as they come.

use crate::Place;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// A test's answer that takes longer hangs.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);

/// Where requests go.
#[derive(Debug, Clone)]
pub struct Client {
    /// The endpoint.
    pub address: SocketAddr,
    /// Where the client stands.
    pub place: Place,
    /// The API key that it sends.
    pub key: Option<String>,
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers, names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    /// Where it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// How a streamed answer ended.
#[derive(Debug, Clone, PartialEq)]
pub enum StreamEnd {
    /// With a finish reason and `[DONE]`.
    Finished(String),
    /// With an error event.
    Error(Value),
    /// The connection ended in the middle.
    Broken(String),
}

impl Client {
    /// The same with an API key.
    #[must_use]
    pub fn with_key(&self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self.clone() }
    }

    /// A GET.
    ///
    /// # Errors
    /// Where nothing answers.
    pub fn get(&self, path: &str) -> io::Result<Answer> {
        Sse::open(self, &format!("GET {path} HTTP/1.1\r\n"), "")?.read_whole()
    }

    /// A POST of JSON.
    ///
    /// # Errors
    /// Where nothing answers.
    pub fn post(&self, path: &str, body: &Value) -> io::Result<Answer> {
        self.open(path, body)?.read_whole()
    }

    /// A POST whose answer is read as it comes.
    ///
    /// # Errors
    /// Where nothing answers.
    pub fn open(&self, path: &str, body: &Value) -> io::Result<Sse> {
        Sse::open(
            self,
            &format!("POST {path} HTTP/1.1\r\nContent-Type: application/json\r\n"),
            &body.to_string(),
        )
    }

    /// A streamed chat request of `max_tokens` tokens, no fewer.
    ///
    /// # Errors
    /// Where nothing answers.
    pub fn stream_chat(&self, prompt: &str, max_tokens: u32) -> io::Result<Sse> {
        self.open("/v1/chat/completions", &self.chat(prompt, max_tokens, true))
    }

    /// The body of such a request.
    pub fn chat(&self, prompt: &str, max_tokens: u32, stream: bool) -> Value {
        json!({
            "model": self.model().unwrap_or_default(),
            "messages": [{ "role": "user", "content": prompt }],
            "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "stream": stream,
        })
    }

    /// The first model served; none until there is one.
    pub fn model(&self) -> Option<String> {
        self.get("/v1/models").ok()?.json()["data"][0]["id"].as_str().map(str::to_owned)
    }

    /// Whether a model can answer.
    pub fn is_ready(&self) -> bool {
        self.get("/ready").is_ok_and(|answer| answer.status == 200)
    }

    /// The names of the nodes whose engine is ready, as the endpoint sees them.
    pub fn ready_nodes(&self) -> Vec<String> {
        let Ok(answer) = self.get("/v1/cluster") else { return Vec::new() };
        let view = answer.json();
        let nodes = view["nodes"].as_array().expect("nodes are a list");
        let ready = nodes.iter().filter(|node| node["engine"]["state"] == "ready");
        ready.filter_map(|node| node["name"].as_str().map(str::to_owned)).collect()
    }
}

/// An answer that is being read.
#[derive(Debug)]
pub struct Sse {
    /// The status code.
    pub status: u16,
    /// The headers, names in lower case.
    pub headers: BTreeMap<String, String>,
    body: BufReader<Body>,
}

impl Sse {
    fn open(client: &Client, head: &str, body: &str) -> io::Result<Self> {
        let mut stream = client.place.connect(client.address)?;
        stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        let key = client.key.as_ref().map(|key| format!("Authorization: Bearer {key}\r\n"));
        let rest = format!(
            "Host: {}\r\n{}Connection: close\r\nContent-Length: {}\r\n\r\n",
            client.address,
            key.unwrap_or_default(),
            body.len()
        );
        stream.write_all(format!("{head}{rest}{body}").as_bytes())?;
        let mut reader = BufReader::new(stream);
        let broken = || io::Error::new(io::ErrorKind::InvalidData, "the answer is no HTTP");
        let status = read_line(&mut reader)?
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .ok_or_else(broken)?;
        let mut headers = BTreeMap::new();
        loop {
            let line = read_line(&mut reader)?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let chunked = headers.get("transfer-encoding").is_some_and(|value| value == "chunked");
        let length = headers.get("content-length").and_then(|value| value.parse().ok());
        let left = if chunked { Some(0) } else { length };
        Ok(Self { status, headers, body: BufReader::new(Body { reader, chunked, left }) })
    }

    fn read_whole(mut self) -> io::Result<Answer> {
        let mut body = String::new();
        self.body.read_to_string(&mut body)?;
        Ok(Answer { status: self.status, headers: self.headers, body })
    }

    /// The data of the next event; none at the end of the answer.
    ///
    /// # Errors
    /// Where the connection breaks off.
    pub fn next_event(&mut self) -> io::Result<Option<String>> {
        loop {
            let mut line = String::new();
            if self.body.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            if let Some(data) = line.strip_prefix("data:") {
                return Ok(Some(data.trim().to_owned()));
            }
        }
    }

    /// Reads until the first text of a streamed chat; none where it ends before.
    pub fn first_text(&mut self) -> Option<String> {
        loop {
            let event: Value = serde_json::from_str(&self.next_event().ok()??).ok()?;
            if let Some(text) = text_of(&event) {
                return Some(text.to_owned());
            }
        }
    }

    /// Reads a streamed chat to its end; returns how many events had text, and the end.
    pub fn finish(mut self) -> (usize, StreamEnd) {
        let (mut texts, mut reason) = (0, None);
        loop {
            let data = match self.next_event() {
                Ok(Some(data)) => data,
                Ok(None) => return (texts, StreamEnd::Broken("the stream ended without [DONE]".to_owned())),
                Err(error) => return (texts, StreamEnd::Broken(error.to_string())),
            };
            if data == "[DONE]" {
                let missing = || StreamEnd::Broken("[DONE] without a finish reason".to_owned());
                return (texts, reason.map_or_else(missing, StreamEnd::Finished));
            }
            let Ok(event) = serde_json::from_str::<Value>(&data) else {
                return (texts, StreamEnd::Broken(format!("an event is no JSON: {data}")));
            };
            if !event["error"].is_null() {
                return (texts, StreamEnd::Error(event));
            }
            texts += usize::from(text_of(&event).is_some());
            reason = event["choices"][0]["finish_reason"].as_str().map(str::to_owned).or(reason);
        }
    }
}

fn text_of(event: &Value) -> Option<&str> {
    event["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty())
}

/// A body, however it is framed.
#[derive(Debug)]
struct Body {
    reader: BufReader<TcpStream>,
    chunked: bool,
    /// Bytes left of the chunk or the body; none where the connection's end is the body's.
    left: Option<u64>,
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.chunked && self.left == Some(0) {
            // A chunk's bytes end with a line break; before the first there is none.
            let mut line = read_line(&mut self.reader)?;
            if line.is_empty() {
                line = read_line(&mut self.reader)?;
            }
            let size = u64::from_str_radix(&line, 16);
            self.left = Some(size.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?);
            // The last chunk is empty.
            self.chunked = self.left != Some(0);
        }
        match &mut self.left {
            None => self.reader.read(buffer),
            Some(0) => Ok(0),
            Some(left) => {
                let most = buffer.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                let read = self.reader.read(&mut buffer[..most])?;
                if read == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                *left -= read as u64;
                Ok(read)
            }
        }
    }
}

fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}
