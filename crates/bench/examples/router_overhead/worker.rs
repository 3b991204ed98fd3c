//! What SGLang's gateways route to: an engine's HTTP endpoint that answers with one token at once.

use crate::http::Reader;
use std::{io, net::SocketAddr};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
};

const JSON_ANSWER: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":"small","choices":[{"index":0,"message":{"role":"assistant","content":" the"},"logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":40,"completion_tokens":1,"total_tokens":41}}"#;
const EVENTS: [&str; 3] = [
    r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"small","choices":[{"index":0,"delta":{"role":"assistant","content":" the"},"logprobs":null,"finish_reason":null}]}"#,
    r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"small","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}"#,
    "[DONE]",
];
const MODELS: &str = r#"{"object":"list","data":[{"id":"small","object":"model","created":1700000000,"owned_by":"fake","max_model_len":131072}]}"#;
const MODEL_INFO: &str =
    r#"{"model_path":"small","tokenizer_path":"","is_generation":true,"served_model_name":"small"}"#;

pub(crate) fn run(address: SocketAddr) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(address).await?;
        let answers = Answers::new();
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            // A gateway that closes a connection in the middle of a request is its own affair.
            tokio::spawn(serve(stream, answers));
        }
    })
}

/// Whole answers, head and body, made once.
#[derive(Clone, Copy)]
struct Answers {
    json: &'static str,
    sse: &'static str,
    models: &'static str,
    info: &'static str,
    health: &'static str,
}

impl Answers {
    fn new() -> Self {
        let whole = |body: &str| -> &'static str {
            format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .leak()
        };
        let events: String = EVENTS
            .iter()
            .map(|event| format!("data: {event}\n\n"))
            .map(|event| format!("{:x}\r\n{event}\r\n", event.len()))
            .collect();
        let sse = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n{events}0\r\n\r\n"
        );
        Self {
            json: whole(JSON_ANSWER),
            sse: sse.leak(),
            models: whole(MODELS),
            info: whole(MODEL_INFO),
            health: whole("{}"),
        }
    }
}

async fn serve(mut stream: TcpStream, answers: Answers) -> io::Result<()> {
    let mut reader = Reader::new();
    while let Some(request) = reader.next(&mut stream, || ()).await? {
        let path = request.head.split(' ').nth(1).unwrap_or_default();
        let answer = match path {
            "/v1/chat/completions" => {
                // The field is at the end of the body, where the load client and the gateways write it; or anywhere.
                let streams = contains(&request.body, b"\"stream\":true");
                if streams { answers.sse } else { answers.json }
            }
            "/v1/models" => answers.models,
            "/health" | "/health_generate" => answers.health,
            _ => answers.info,
        };
        stream.write_all(answer.as_bytes()).await?;
    }
    Ok(())
}

/// From the end: prompts are long.
fn contains(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).rev().any(|window| window == what)
}
