//! Who is kept out, what they are told, and what is logged.

use crate::{ClusterKey, ClusterKeys, Endpoint, JoinError, RouterLink, close, tls};
use quinn::crypto::rustls::QuicClientConfig;
use std::{
    io::Write,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::timeout;
use types::{NodeId, Role};
use wire::{Control, FrameClass, Hello, encode, preface};

/// What was logged while this is there, on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn hello(node: u128, cluster: &str) -> Hello {
    Hello {
        program: "0.1.0".to_owned(),
        node: NodeId(node),
        name: format!("mac{node}"),
        cluster: cluster.to_owned(),
        roles: vec![Role::Node],
        hardware: "test".to_owned(),
    }
}

fn endpoint(key: &ClusterKey) -> Endpoint {
    Endpoint::bind("127.0.0.1:0".parse().unwrap(), key).unwrap()
}

/// Runs `stranger` against a router, which must accept nobody, then lets a proper node in: it still can.
async fn check_kept_out<T>(key: &ClusterKey, stranger: impl AsyncFnOnce(SocketAddr) -> T) -> (T, String) {
    let (log, _guard) = Log::start();
    let router = endpoint(key);
    let address = router.local_address();
    let welcome = hello(1, "home");
    let seen = tokio::select! {
        accepted = router.accept(&welcome) => panic!("a stranger got in: {accepted:?}"),
        seen = timeout(Duration::from_secs(10), async {
            let seen = stranger(address).await;
            // The router may come to know a moment later.
            tokio::time::sleep(Duration::from_millis(200)).await;
            seen
        }) => seen.expect("the stranger hangs"),
    };
    let node = endpoint(key);
    let both = async { tokio::join!(router.accept(&welcome), node.join(address, hello(2, "home"))) };
    let (accepted, joined) = timeout(Duration::from_secs(10), both).await.expect("a proper node hangs");
    assert!(accepted.is_some() && joined.is_ok());
    (seen, log.text())
}

#[tokio::test]
async fn another_key_gets_nothing_and_is_logged_with_its_address() {
    let (key, other) = (ClusterKey::generate().unwrap(), ClusterKey::generate().unwrap());
    let node = endpoint(&other);
    let address = node.local_address();
    let (seen, log) = check_kept_out(&key, async |router| node.join(router, hello(2, "home")).await).await;
    assert!(matches!(seen, Err(JoinError::Key { .. })), "{seen:?}");
    let (name, peer) = ("did not prove the cluster key", format!("peer={address}"));
    assert!(
        log.lines().any(|line| line.contains("WARN") && line.contains(name) && line.contains(&peer)),
        "{log}"
    );
    for secret in [key.reveal(), other.reveal()] {
        assert!(!log.contains(&secret[6..38]), "the key is in the log");
    }
}

/// A client that accepts any router and takes whatever it is given, with no key of its own or another one's.
async fn read_all(router: SocketAddr, client: quinn::ClientConfig) -> Result<usize, quinn::ConnectionError> {
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connection = endpoint.connect_with(client, router, "mlx-node").unwrap().await?;
    let (mut send, mut receive) = connection.open_bi().await?;
    let mut bytes = bytes::BytesMut::from(&preface::preface()[..]);
    encode(FrameClass::Hello, &Control::Hello(hello(2, "home")), &mut bytes).unwrap();
    // The TLS alert may be faster.
    let _ = send.write_all(&bytes).await;
    let read = receive.read_to_end(1 << 20).await;
    read.map(|bytes| bytes.len())
        .map_err(|_| connection.close_reason().expect("reading failed because it is closed"))
}

fn is_tls_alert(error: &quinn::ConnectionError) -> bool {
    super::is_crypto(error)
}

#[tokio::test]
async fn no_key_at_all_gets_nothing() {
    let key = ClusterKey::generate().unwrap();
    let client = |raw_keys: bool, alpn: &[u8]| {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyRouter { raw_keys }))
            .with_no_client_auth();
        client.alpn_protocols = if alpn.is_empty() { Vec::new() } else { vec![alpn.to_vec()] };
        quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(client).unwrap()))
    };
    for (raw_keys, alpn) in
        [(true, tls::ALPN), (false, tls::ALPN), (true, b"h3"), (false, b"h3"), (true, b"")]
    {
        let (seen, log) =
            check_kept_out(&key, async |router| read_all(router, client(raw_keys, alpn)).await).await;
        let error = seen.expect_err("nothing may come");
        assert!(is_tls_alert(&error), "{raw_keys} {alpn:?}: {error}");
        assert!(log.contains("refused a peer peer=127.0.0.1:"), "{log}");
    }
}

/// The key is right, the application protocol is not.
#[tokio::test]
async fn another_protocol_gets_nothing() {
    let key = ClusterKey::generate().unwrap();
    let client = tls::configs_for(&(&key).into(), b"mlx-node/0").unwrap().client;
    let (seen, _) = check_kept_out(&key, async |router| read_all(router, client).await).await;
    assert!(is_tls_alert(&seen.expect_err("nothing may come")));
}

#[tokio::test]
async fn another_version_is_refused_by_name_on_both_sides() {
    let key = ClusterKey::generate().unwrap();
    let client = tls::configs(&(&key).into()).unwrap().client;
    // A node of version 2 tells so and reads, as far as version 1 is concerned, garbage.
    let (seen, log) = check_kept_out(&key, async |router| {
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let connection = endpoint.connect_with(client, router, tls::SERVER_NAME).unwrap().await.unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(&preface::of_version(wire::VERSION + 1)).await.unwrap();
        send.write_all(&[0xff; 100]).await.unwrap();
        super::join_error(router, &connection.closed().await).to_string()
    })
    .await;
    let (ours, theirs) = (wire::VERSION, wire::VERSION + 1);
    let reason = format!("the router speaks wire version {ours}, the node {theirs}: run the same version");
    assert!(seen.contains(&reason), "{seen}");
    assert!(log.contains(&reason), "{log}");
}

/// The same from the other side: a router of another version.
#[tokio::test]
async fn a_router_of_another_version_is_named_too() {
    let key = ClusterKey::generate().unwrap();
    let (log, _guard) = Log::start();
    let server = tls::configs(&(&key).into()).unwrap().server;
    let router = quinn::Endpoint::server(server, "127.0.0.1:0".parse().unwrap()).unwrap();
    let address = router.local_addr().unwrap();
    let node = endpoint(&key);
    let serve = async {
        let connection = router.accept().await.unwrap().await.unwrap();
        let (mut send, _receive) = connection.accept_bi().await.unwrap();
        send.write_all(&preface::of_version(wire::VERSION + 1)).await.unwrap();
        close::connection_error(&connection.closed().await)
    };
    let (joined, told) = tokio::join!(node.join(address, hello(2, "home")), serve);
    let reason = format!("the router speaks wire version {}, the node {}", wire::VERSION + 1, wire::VERSION);
    assert!(joined.expect_err("refused").to_string().contains(&reason));
    assert!(told.contains(&reason), "{told}");
    assert!(log.text().contains(&reason), "{}", log.text());
}

#[tokio::test]
async fn another_cluster_is_refused_by_name_on_both_sides() {
    let key = ClusterKey::generate().unwrap();
    let node = endpoint(&key);
    let (seen, log) = check_kept_out(&key, async |router| node.join(router, hello(2, "office")).await).await;
    let reason = "the router \"mac1\" belongs to cluster \"home\", the node \"mac2\" to cluster \"office\"";
    let error = seen.expect_err("refused");
    assert!(matches!(&error, JoinError::Refused { reason: told, .. } if told == reason), "{error}");
    let said = |line: &str, what: &str| line.contains("WARN") && line.contains(what);
    assert!(log.lines().any(|line| said(line, "refused a peer")), "{log}");
    assert!(log.lines().any(|line| said(line, "could not join a router")), "{log}");
}

#[tokio::test]
async fn a_process_does_not_join_itself() {
    let key = ClusterKey::generate().unwrap();
    let node = endpoint(&key);
    let (seen, _) = check_kept_out(&key, async |router| node.join(router, hello(1, "home")).await).await;
    assert!(matches!(seen, Err(JoinError::Itself { .. })), "{seen:?}");
}

/// A frame of garbage, of too much, and none: each is sent away, and the router goes on.
#[tokio::test]
async fn a_bad_hello_is_refused() {
    let key = ClusterKey::generate().unwrap();
    let too_large = (FrameClass::Hello.bytes_max() as u32 + 1).to_le_bytes();
    let cases: [(&[u8], &str); 3] = [
        (&[3, 0, 0, 0, 0xff, 0xff, 0xff], "cannot decode 3 bytes"),
        (&too_large, "a Hello frame of 16385 bytes; at most 16384 are allowed"),
        (&[1, 0, 0, 0, 4], "the first frame is no hello"),
    ];
    for (frame, reason) in cases {
        let client = tls::configs(&(&key).into()).unwrap().client;
        let (seen, log) = check_kept_out(&key, async |router| {
            let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
            let connection = endpoint.connect_with(client, router, tls::SERVER_NAME).unwrap().await.unwrap();
            let (mut send, _receive) = connection.open_bi().await.unwrap();
            send.write_all(&preface::preface()).await.unwrap();
            send.write_all(frame).await.unwrap();
            close::connection_error(&connection.closed().await)
        })
        .await;
        assert!(seen.contains(reason), "{seen}");
        assert!(log.contains(reason), "{log}");
    }
}

/// A crowd of strangers cannot fill the log.
#[tokio::test]
async fn warnings_are_bounded() {
    let (key, other) = (ClusterKey::generate().unwrap(), ClusterKey::generate().unwrap());
    let (_, log) = check_kept_out(&key, async |router| {
        let node = endpoint(&other);
        for _ in 0..30 {
            node.join(router, hello(2, "home")).await.expect_err("refused");
        }
    })
    .await;
    let logged = log.lines().filter(|line| line.contains("refused a peer")).count();
    assert_eq!(logged, crate::limits::WARNINGS_MAX as usize, "{log}");
}

/// Trusts everybody.
#[derive(Debug)]
struct AnyRouter {
    raw_keys: bool,
}

impl rustls::client::danger::ServerCertVerifier for AnyRouter {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![rustls::SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        self.raw_keys
    }
}

/// A cluster goes over from one key to the next in three steps, each on one end after the other: whatever of both is done,
/// they connect, and connections stay up, until a key is taken back that one of them was made with.
#[tokio::test]
async fn a_cluster_changes_its_key_end_by_end() {
    let (old, new) = (ClusterKey::generate().unwrap(), ClusterKey::generate().unwrap());
    let with = |own: &ClusterKey, other: Option<&ClusterKey>| ClusterKeys {
        own: own.clone(),
        other: other.cloned(),
    };
    let (router, node) = (endpoint(&old), endpoint(&old));
    let address = router.local_address();
    let connect = async || {
        let welcome = hello(1, "home");
        let (peer, link) = tokio::join!(router.accept(&welcome), node.join(address, hello(2, "home")));
        (peer.expect("open"), link.expect("joined"))
    };
    let first = connect().await;
    let steps = [with(&old, Some(&new)), with(&new, Some(&old))];
    for keys in &steps {
        for end in [&router, &node] {
            end.rekey(keys).unwrap();
            connect().await;
        }
    }
    let second = connect().await;
    let stays = async |link: &RouterLink| timeout(Duration::from_millis(200), link.closed()).await.is_err();
    assert!(stays(&first.1).await, "both keys are accepted still");
    router.rekey(&new).unwrap();
    connect().await;
    // It was made with the key that has gone; the second one was not.
    let reason = timeout(Duration::from_secs(5), first.1.closed()).await.expect("closed");
    assert!(reason.contains("not accepted any more"), "{reason}");
    node.rekey(&new).unwrap();
    connect().await;
    assert!(stays(&second.1).await, "the key that it was made with is accepted");
    let stranger = endpoint(&old);
    let welcome = hello(1, "home");
    let refused = tokio::select! {
        refused = stranger.join(address, hello(3, "home")) => refused,
        _ = router.accept(&welcome) => panic!("the old key is accepted"),
    };
    assert!(matches!(refused, Err(JoinError::Key { .. })), "{refused:?}");
}
