//! TLS: a real client over it, a certificate that changes while a stream runs, and clients that do not speak it.
//!
//! The certificates in `tls` are made by `openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500
//! -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE`; their keys open nothing.

use crate::support::*;
use api::{Certificate, CertificateError, ServeSettings};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};
use types::*;

const ONE: [&[u8]; 2] = [include_bytes!("tls/one.cert.pem"), include_bytes!("tls/one.key.pem")];
const TWO: [&[u8]; 2] = [include_bytes!("tls/two.cert.pem"), include_bytes!("tls/two.key.pem")];
const SOON: Duration = Duration::from_secs(5);

fn certificate([chain, key]: [&[u8]; 2]) -> Certificate {
    Certificate::from_pem(chain, key).expect("valid")
}

async fn serve_tls(script: Script) -> (SocketAddr, watch::Sender<Certificate>) {
    let app = Cluster::new(&["tiny"], None, script).app();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, receiver) = watch::channel(certificate(ONE));
    let settings = ServeSettings {
        certificate: Some(receiver),
        headers_time_max: Duration::from_millis(500),
        ..ServeSettings::default()
    };
    tokio::spawn(api::serve(listener, app, settings, std::future::pending()));
    (address, sender)
}

/// A connection of a client that trusts these certificates.
async fn connect(address: SocketAddr, trusted: &[[&[u8]; 2]]) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    for [chain, _] in trusted {
        roots.add(CertificateDer::from_pem_slice(chain).unwrap()).unwrap();
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, TcpStream::connect(address).await?).await
}

async fn send(stream: &mut TlsStream<TcpStream>, body: &str) {
    let length = body.len();
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
}

async fn read_until(stream: &mut TlsStream<TcpStream>, text: &str) -> String {
    let mut received = Vec::new();
    let read = async {
        while !String::from_utf8_lossy(&received).contains(text) {
            assert_ne!(stream.read_buf(&mut received).await.unwrap(), 0, "ended before {text:?}");
        }
    };
    timeout(SOON, read).await.unwrap();
    String::from_utf8(received).unwrap()
}

#[tokio::test]
async fn a_stream_outlives_the_certificate_that_it_began_with() {
    let events = (0..5).map(|at| tokens(2 * at, "ab")).chain([finished(FinishReason::Length, 10)]).collect();
    let (address, certificates) = serve_tls(Script::Paced(events, Duration::from_millis(100))).await;
    let mut running = connect(address, &[ONE]).await.unwrap();
    send(&mut running, r#"{"prompt":"x","stream":true}"#).await;
    assert!(read_until(&mut running, "\"text\":\"ab\"").await.starts_with("HTTP/1.1 200"));

    certificates.send_replace(certificate(TWO));
    let error = connect(address, &[ONE]).await.expect_err("it has another certificate now");
    assert!(error.to_string().contains("certificate"), "{error}");
    let mut later = connect(address, &[TWO]).await.unwrap();
    send(&mut later, r#"{"prompt":"x"}"#).await;
    assert!(read_until(&mut later, "\"finish_reason\":\"length\"").await.starts_with("HTTP/1.1 200"));
    read_until(&mut running, "data: [DONE]").await;
}

#[tokio::test]
async fn who_speaks_no_tls_is_gone_soon_and_nobody_waits_for_them() {
    let (address, _certificates) = serve_tls(Script::Events(vec![finished(FinishReason::Stop, 0)])).await;
    let mut silent = TcpStream::connect(address).await.unwrap();
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut agreed = connect(address, &[ONE]).await.expect("others are served meanwhile");
    send(&mut agreed, r#"{"prompt":"x"}"#).await;
    read_until(&mut agreed, "finish_reason").await;
    for stream in [&mut silent, &mut plain] {
        let mut received = Vec::new();
        // An alert or nothing, and the end, in good order or as a reset.
        let _ = timeout(SOON, stream.read_to_end(&mut received)).await.expect("it is ended");
        assert!(!received.starts_with(b"HTTP"), "{received:?}");
    }
}

#[test]
fn what_is_no_certificate_is_said() {
    let check = |chain: &[u8], key: &[u8], expected: fn(&CertificateError) -> bool| {
        let error = Certificate::from_pem(chain, key).expect_err("wrong");
        assert!(expected(&error), "{error}");
        assert!(!error.to_string().contains("PRIVATE KEY-----"), "{error}");
    };
    check(b"", ONE[1], |error| *error == CertificateError::NoCertificate);
    check(ONE[1], ONE[1], |error| *error == CertificateError::NoCertificate);
    check(ONE[0], ONE[0], |error| matches!(error, CertificateError::Key(_)));
    check(ONE[0], TWO[1], |error| matches!(error, CertificateError::Pair(_)));
}
