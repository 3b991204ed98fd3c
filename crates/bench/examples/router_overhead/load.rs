//! Who asks: some connections that are kept alive, on each one request after the other.

use crate::http::Reader;
use serde::Serialize;
use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinSet, time::timeout};

/// Conversations that the prompts belong to: those of one begin alike, and end each in its own way.
const GROUPS: u64 = 16;
/// Requests on each connection before any is counted.
const WARM_UP: usize = 20;
/// An answer that takes longer hangs.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// Bytes at the end of a prompt that no other prompt has.
const OWN_BYTES: usize = 60;

pub(crate) struct LoadArguments {
    pub(crate) address: SocketAddr,
    pub(crate) connections: usize,
    /// On all connections together.
    pub(crate) requests: usize,
    pub(crate) prompt_bytes: usize,
    pub(crate) stream: bool,
    pub(crate) seed: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct LoadFigures {
    /// Answered, the uncounted ones included.
    requests: usize,
    p50_us: f64,
    p99_us: f64,
    /// To the first byte of the body.
    first_p50_us: f64,
    per_s: f64,
}

struct Sample {
    first: Duration,
    whole: Duration,
}

pub(crate) fn run(arguments: LoadArguments) -> io::Result<LoadFigures> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(load(arguments))
}

async fn load(arguments: LoadArguments) -> io::Result<LoadFigures> {
    let LoadArguments { address, connections, requests, prompt_bytes, stream, seed } = arguments;
    let each = requests.div_ceil(connections);
    let prefixes: Vec<String> =
        (0..GROUPS).map(|group| words(group, prompt_bytes.saturating_sub(OWN_BYTES))).collect();
    let mut tasks = JoinSet::new();
    for connection in 0..connections {
        let own = seed.wrapping_mul(1_000_003).wrapping_add(connection as u64);
        let bodies: Vec<String> = (0..each + WARM_UP)
            .map(|index| {
                let tail =
                    words(own.wrapping_mul(7_919).wrapping_add(index as u64).wrapping_add(GROUPS), OWN_BYTES);
                body(&format!("{}{tail}", prefixes[(connection + index) % prefixes.len()]), stream)
            })
            .collect();
        tasks.spawn(ask(address, bodies, stream));
    }
    let started = Instant::now();
    let mut samples = Vec::new();
    while let Some(done) = tasks.join_next().await {
        samples.extend(done.map_err(io::Error::other)??);
    }
    let seconds = started.elapsed().as_secs_f64();
    let answered = connections * (each + WARM_UP);
    let mut whole: Vec<f64> = samples.iter().map(|sample| sample.whole.as_secs_f64() * 1e6).collect();
    let mut first: Vec<f64> = samples.iter().map(|sample| sample.first.as_secs_f64() * 1e6).collect();
    Ok(LoadFigures {
        requests: answered,
        p50_us: percentile(&mut whole, 0.5),
        p99_us: percentile(&mut whole, 0.99),
        first_p50_us: percentile(&mut first, 0.5),
        per_s: answered as f64 / seconds,
    })
}

/// All requests of one connection; an answer that is not the expected one is an error.
async fn ask(address: SocketAddr, bodies: Vec<String>, stream: bool) -> io::Result<Vec<Sample>> {
    let mut connection = TcpStream::connect(address).await?;
    connection.set_nodelay(true)?;
    let mut reader = Reader::new();
    let mut samples = Vec::new();
    for (index, body) in bodies.iter().enumerate() {
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let asked = Instant::now();
        connection.write_all(request.as_bytes()).await?;
        let mut first = None;
        let answer = reader.next(&mut connection, || {
            first.get_or_insert_with(|| asked.elapsed());
        });
        let answer = timeout(ANSWER_TIME_MAX, answer).await??.ok_or(io::ErrorKind::UnexpectedEof)?;
        let whole = asked.elapsed();
        let text = String::from_utf8_lossy(&answer.body);
        let expected = if stream { "data: [DONE]" } else { "\"choices\"" };
        if !answer.head.starts_with("http/1.1 200") || !text.contains(expected) || text.contains("\"error\"")
        {
            return Err(io::Error::other(format!("answered with {}{text}", answer.head)));
        }
        if index >= WARM_UP {
            samples.push(Sample { first: first.unwrap_or(whole), whole });
        }
    }
    Ok(samples)
}

fn body(prompt: &str, stream: bool) -> String {
    serde_json::json!({
        "model": "small", "messages": [{ "role": "user", "content": prompt }], "max_tokens": 1, "stream": stream,
    })
    .to_string()
}

/// Text of about so many bytes, made of words as they come in English.
fn words(seed: u64, bytes: usize) -> String {
    const WORDS: [&str; 32] = [
        "the",
        "of",
        "and",
        "to",
        "in",
        "that",
        "router",
        "is",
        "was",
        "for",
        "with",
        "as",
        "his",
        "on",
        "be",
        "at",
        "question",
        "answer",
        "between",
        "several",
        "machine",
        "model",
        "people",
        "number",
        "water",
        "called",
        "first",
        "network",
        "through",
        "sentence",
        "because",
        "different",
    ];
    let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut text = String::with_capacity(bytes + 16);
    while text.len() < bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push_str(WORDS[(state >> 59) as usize]);
        text.push(' ');
    }
    text
}

fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = ((values.len() - 1) as f64 * share).round() as usize;
    (values[at] * 10.0).round() / 10.0
}
