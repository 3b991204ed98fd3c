//! A client that goes away cancels what it asked for; a server that shuts down finishes what it has.

use crate::support::*;
use api::ServeSettings;
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    time::timeout,
};
use types::*;

const SOON: Duration = Duration::from_secs(5);

async fn send(address: std::net::SocketAddr, body: &str) -> TcpStream {
    let mut client = TcpStream::connect(address).await.unwrap();
    let request =
        format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    client.write_all(request.as_bytes()).await.unwrap();
    client
}

async fn read_until(client: &mut TcpStream, text: &str) -> String {
    let mut received = Vec::new();
    let read = async {
        while !String::from_utf8_lossy(&received).contains(text) {
            assert_ne!(client.read_buf(&mut received).await.unwrap(), 0, "ended before {text:?}");
        }
    };
    timeout(SOON, read).await.unwrap();
    String::from_utf8(received).unwrap()
}

async fn cancelled(cluster: &Arc<Cluster>, count: usize) {
    let mut watch = cluster.cancelled.subscribe();
    timeout(SOON, watch.wait_for(|&found| found == count)).await.expect("cancelled").unwrap();
}

#[tokio::test]
async fn a_client_that_leaves_cancels() {
    let cluster = Cluster::new(&["tiny"], None, Script::Hang(vec![tokens(0, "ab")]));
    let address = serve(cluster.app()).await;

    let mut streaming = send(address, r#"{"prompt":"x","stream":true}"#).await;
    read_until(&mut streaming, "\"text\":\"ab\"").await;
    assert_eq!(*cluster.cancelled.borrow(), 0);
    drop(streaming);
    cancelled(&cluster, 1).await;

    let whole = send(address, r#"{"prompt":"x"}"#).await;
    let asked = async {
        while cluster.asked.lock().unwrap().len() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, asked).await.unwrap();
    assert_eq!(*cluster.cancelled.borrow(), 1);
    drop(whole);
    cancelled(&cluster, 2).await;
}

#[tokio::test]
async fn shutdown_finishes_what_is_in_flight() {
    let events = vec![tokens(0, "ab"), finished(FinishReason::Stop, 2)];
    let cluster = Cluster::new(&["tiny"], None, Script::Events(events));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async {
        let _ = stopped.await;
    };
    let server = tokio::spawn(api::serve(listener, cluster.app(), ServeSettings::default(), shutdown));

    // Half a request is in flight when the server is told to stop, and an idle connection is open.
    let idle = TcpStream::connect(address).await.unwrap();
    let mut client = TcpStream::connect(address).await.unwrap();
    let body = r#"{"prompt":"x"}"#;
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    client.write_all(head.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    stop.send(()).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(TcpStream::connect(address).await.is_err(), "no longer accepting");
    client.write_all(body.as_bytes()).await.unwrap();
    read_until(&mut client, "\"text\":\"ab\"").await;
    timeout(SOON, server).await.expect("ended").unwrap().unwrap();
    drop(idle);
}
