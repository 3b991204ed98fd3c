//! What a client waits for beside the model.

use crate::support::*;
use std::time::{Duration, Instant};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use types::*;

/// The shortest time for which a system delays an acknowledgement that a small second packet may wait for.
const STALL: Duration = Duration::from_millis(40);

/// The head of a streamed answer leaves alone and the first text follows: on a connection that has served before, systems
/// acknowledge late, and a server that waits for that holds each first token up.
#[tokio::test]
async fn a_connection_that_is_used_again_does_not_hold_up_the_first_token() {
    let events = vec![tokens(0, "a"), tokens(1, "b"), finished(FinishReason::Length, 2)];
    let cluster = Cluster::new(&["tiny"], None, Script::Paced(events, Duration::from_millis(2)));
    let mut client = TcpStream::connect(serve(cluster.app()).await).await.unwrap();
    let body = r#"{"prompt":"x","stream":true,"max_tokens":2}"#;
    let request =
        format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut waited = Vec::new();
    for _ in 0..15 {
        let (asked, mut first, mut received) = (Instant::now(), None, Vec::new());
        client.write_all(request.as_bytes()).await.unwrap();
        while !received.ends_with(b"\r\n0\r\n\r\n") {
            let read =
                timeout(Duration::from_secs(5), client.read_buf(&mut received)).await.unwrap().unwrap();
            assert_ne!(read, 0, "the connection ended");
            if first.is_none() && received.windows(5).any(|window| window == b"data:") {
                first = Some(asked.elapsed());
            }
        }
        waited.push(first.expect("text"));
    }
    waited.sort();
    let median = waited[waited.len() / 2];
    assert!(median < STALL * 3 / 4, "{waited:?}");
}
