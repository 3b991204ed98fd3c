//! Clients that are slow, endless or silent: each of them ends in a bounded time, and nobody else notices.

use crate::support::*;
use api::{Access, ApiSettings, ServeSettings};
use axum::Router;
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{sleep, timeout},
};
use types::*;

/// For what the tests shorten to a fraction of a second.
const SOON: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(400);

fn cluster() -> Arc<Cluster> {
    Cluster::new(&["tiny"], None, Script::Events(vec![tokens(0, "ab"), finished(FinishReason::Length, 2)]))
}

async fn serve_with(app: Router, settings: ServeSettings) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(api::serve(listener, app, settings, std::future::pending()));
    address
}

fn short() -> ServeSettings {
    ServeSettings { headers_time_max: SHORT, write_time_max: SHORT, ..ServeSettings::default() }
}

/// All that comes until the connection ends, in whatever way.
async fn read_to_end(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut received = Vec::new();
    let _ = timeout(SOON, stream.read_to_end(&mut received)).await.expect("the connection is ended");
    String::from_utf8_lossy(&received).into_owned()
}

/// Whether a well-behaved client is answered.
async fn is_served(address: SocketAddr) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer.starts_with("HTTP/1.1 200"))
    };
    timeout(SOON, asked).await.is_ok_and(|served| served.unwrap_or(false))
}

#[tokio::test]
async fn headers_a_byte_at_a_time() {
    let address = serve_with(cluster().app(), short()).await;
    let began = Instant::now();
    let (mut read, mut write) = TcpStream::connect(address).await.unwrap().into_split();
    let drip = tokio::spawn(async move {
        let head = b"GET /health HTTP/1.1\r\nhost: x\r\nx-slow: ".iter().chain(std::iter::repeat(&b'a'));
        let mut sent = 0;
        for byte in head {
            if write.write_all(&[*byte]).await.is_err() {
                break;
            }
            sent += 1;
            sleep(Duration::from_millis(10)).await;
        }
        sent
    });
    assert!(is_served(address).await);
    read_to_end(&mut read).await;
    assert!(began.elapsed() >= SHORT, "it was given its time");
    let sent = timeout(SOON, drip).await.expect("writing fails").unwrap();
    assert!(sent < 2000, "{sent} bytes");
}

#[tokio::test]
async fn connections_that_stay_idle() {
    let address = serve_with(cluster().app(), short()).await;
    let mut fresh = TcpStream::connect(address).await.unwrap();
    let mut used = TcpStream::connect(address).await.unwrap();
    used.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(read_to_end(&mut used).await.starts_with("HTTP/1.1 200"));
    assert_eq!(read_to_end(&mut fresh).await, "");
}

#[tokio::test]
async fn a_mebibyte_of_headers() {
    let address = serve_with(cluster().app(), ServeSettings::default()).await;
    for line in
        [format!("x-long: {}\r\n", "a".repeat(1 << 20)), "x-many: aaaaaaaaaaaaaaaa\r\n".repeat(40_000)]
    {
        let (mut read, mut write) = TcpStream::connect(address).await.unwrap().into_split();
        let written = tokio::spawn(async move {
            let head = format!("GET /health HTTP/1.1\r\nhost: x\r\n{line}\r\n");
            // It need not all be taken.
            let _ = write.write_all(head.as_bytes()).await;
            write
        });
        let answer = read_to_end(&mut read).await;
        // Who is still sending may lose the answer to the reset.
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
        timeout(SOON, written).await.expect("taken or refused").unwrap();
    }
    assert!(is_served(address).await);
}

/// Sends chunks for as long as they are taken; the answer, and how many bytes that were.
async fn endless(address: SocketAddr, head: &str) -> (String, usize) {
    let (mut read, mut write) = TcpStream::connect(address).await.unwrap().into_split();
    let head = format!("{head} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    write.write_all(head.as_bytes()).await.unwrap();
    let sending = tokio::spawn(async move {
        let chunk = format!("10000\r\n{}\r\n", "a".repeat(0x10000));
        let mut sent = 0;
        while write.write_all(chunk.as_bytes()).await.is_ok() {
            sent += chunk.len();
        }
        sent
    });
    let answer = read_to_end(&mut read).await;
    drop(read);
    (answer, timeout(SOON, sending).await.expect("no more is taken").unwrap())
}

#[tokio::test]
async fn bodies_without_end() {
    let access = Access::of_keys(["k"]).into();
    let keyed = cluster().app_with(ApiSettings { access, ..ApiSettings::default() });
    let (keyed, open) = (
        serve_with(keyed, ServeSettings::default()).await,
        serve_with(cluster().app(), ServeSettings::default()).await,
    );
    // What systems hold of a connection in their buffers.
    const BUFFERS: usize = 16 << 20;
    for (address, head, status, most) in [
        (keyed, "POST /v1/completions", "401", BUFFERS),
        (open, "GET /v1/models", "200", BUFFERS),
        (open, "POST /nowhere", "404", BUFFERS),
        (open, "POST /v1/completions", "413", BUFFERS + (65 << 20)),
    ] {
        let (answer, sent) = endless(address, head).await;
        assert!(answer.is_empty() || answer.starts_with(&format!("HTTP/1.1 {status}")), "{head}: {answer}");
        assert!(sent <= most, "{head}: {sent} bytes were taken");
        assert!(is_served(address).await);
    }
}

#[tokio::test]
async fn more_idle_connections_than_places() {
    const PLACES: usize = 8;
    let cluster = Cluster::new(&["tiny"], None, Script::Hang(vec![tokens(0, "ab")]));
    let settings = ServeSettings { connections_max: PLACES, ..ServeSettings::default() };
    let address = serve_with(cluster.app(), settings).await;
    let body = r#"{"prompt":"x","stream":true}"#;
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut streaming = TcpStream::connect(address).await.unwrap();
    streaming.write_all(head.as_bytes()).await.unwrap();
    let mut received = Vec::new();
    while !String::from_utf8_lossy(&received).contains("\"text\":\"ab\"") {
        timeout(SOON, streaming.read_buf(&mut received)).await.unwrap().unwrap();
    }
    let mut idle = Vec::new();
    for count in 0..20 * PLACES {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // Half of them have begun to say something.
        if count % 2 == 0 {
            stream.write_all(b"GET / HTTP/1.1\r\nhos").await.unwrap();
        }
        idle.push(stream);
        if count % PLACES == 0 {
            assert!(is_served(address).await, "with {count} idle connections");
        }
    }
    for mut stream in idle.drain(..PLACES) {
        assert_eq!(read_to_end(&mut stream).await, "", "those that waited longest have gone");
    }
    // Whom an answer is being written to has not.
    assert!(timeout(SHORT, streaming.read_buf(&mut received)).await.is_err());
    assert_eq!(*cluster.cancelled.borrow(), 0);
}

#[tokio::test]
async fn a_client_that_stops_reading_its_stream() {
    // Far more than the buffers of both ends.
    let events = (0..150_000).map(|at| tokens(2 * at, "ab")).collect();
    let cluster = Cluster::new(&["tiny"], None, Script::Hang(events));
    let address = serve_with(cluster.app(), short()).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    let body = r#"{"prompt":"x","stream":true,"max_tokens":900}"#;
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut cancelled = cluster.cancelled.subscribe();
    timeout(SOON, cancelled.wait_for(|&count| count == 1)).await.expect("it is given up").unwrap();
    assert!(is_served(address).await);
    drop(stream);
}
