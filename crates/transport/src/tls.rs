//! Identity: mutual TLS 1.3 with raw public keys (RFC 7250) instead of certificates.
//!
//! All machines of a cluster derive the same Ed25519 key pair from the cluster key. Each end sends that public key,
//! signs the handshake with it, and accepts no other: whoever has not the cluster key ends in the handshake.

use crate::{ClusterKey, TransportError, limits};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{self, CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
    server::{
        AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::TLS13,
};
use std::sync::Arc;
use types::limits::NODE_SILENCE_MAX;

/// The application protocol. The version of the messages is told after the handshake, by name.
pub(crate) const ALPN: &[u8] = b"mlx-node/1";
/// What a node calls any router in TLS; the key is what counts.
pub(crate) const SERVER_NAME: &str = "mlx-node";
/// An Ed25519 private key in PKCS #8 is these bytes and the seed (RFC 8410, section 7).
const PKCS8_ED25519: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// The settings of both roles for one cluster key.
pub(crate) fn configs(
    key: &ClusterKey,
) -> Result<(quinn::ServerConfig, quinn::ClientConfig), TransportError> {
    configs_for(key, ALPN)
}

/// The same for any application protocol, so that tests can be strangers who have the key.
pub(crate) fn configs_for(
    key: &ClusterKey,
    alpn: &[u8],
) -> Result<(quinn::ServerConfig, quinn::ClientConfig), TransportError> {
    let provider = Arc::new(crypto::ring::default_provider());
    let identity = identity(key)?;
    let verifier = Arc::new(OnlyThisKey {
        key: SubjectPublicKeyInfoDer::from(identity.cert[0].as_ref().to_vec()),
        algorithms: provider.signature_verification_algorithms,
    });
    let mut server = server_crypto(&provider, &verifier, Arc::clone(&identity))?;
    let mut client = client_crypto(&provider, &verifier, identity)?;
    server.alpn_protocols = vec![alpn.to_vec()];
    client.alpn_protocols = vec![alpn.to_vec()];

    let mut server =
        quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server).map_err(tls)?));
    // The node opens the control stream and nothing else.
    server
        .transport_config(Arc::new(transport(1)))
        .max_incoming(limits::HANDSHAKES_WAITING_MAX)
        .migration(false);
    let mut client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(client).map_err(tls)?));
    client.transport_config(Arc::new(transport(limits::REQUESTS_MAX)));
    Ok((server, client))
}

fn server_crypto(
    provider: &Arc<CryptoProvider>,
    verifier: &Arc<OnlyThisKey>,
    identity: Arc<CertifiedKey>,
) -> Result<rustls::ServerConfig, TransportError> {
    let verifier: Arc<dyn ClientCertVerifier> = Arc::<OnlyThisKey>::clone(verifier);
    let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(tls)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(identity)));
    // Every connection proves the key again.
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    server.max_early_data_size = 0;
    Ok(server)
}

fn client_crypto(
    provider: &Arc<CryptoProvider>,
    verifier: &Arc<OnlyThisKey>,
    identity: Arc<CertifiedKey>,
) -> Result<rustls::ClientConfig, TransportError> {
    let verifier: Arc<dyn ServerCertVerifier> = Arc::<OnlyThisKey>::clone(verifier);
    let mut client = rustls::ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(tls)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(identity)));
    client.resumption = Resumption::disabled();
    client.enable_sni = false;
    Ok(client)
}

fn transport(streams_max: u32) -> quinn::TransportConfig {
    let idle = quinn::IdleTimeout::try_from(NODE_SILENCE_MAX).expect("seconds, where years would fit");
    let mut discovery = quinn::MtuDiscoveryConfig::default();
    discovery.upper_bound(limits::PACKET_BYTES_MAX);
    let mut transport = quinn::TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(streams_max.into())
        .max_concurrent_uni_streams(0u32.into())
        .stream_receive_window(limits::STREAM_WINDOW_BYTES.into())
        // All streams may be full at once: one slow reader never takes another's share.
        .receive_window((limits::STREAM_WINDOW_BYTES * (limits::REQUESTS_MAX + 1)).into())
        .send_window(limits::SEND_WINDOW_BYTES)
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(limits::KEEP_ALIVE_INTERVAL))
        .initial_rtt(limits::INITIAL_ROUND_TRIP)
        .mtu_discovery_config(Some(discovery))
        .datagram_receive_buffer_size(None);
    transport
}

fn identity(key: &ClusterKey) -> Result<Arc<CertifiedKey>, TransportError> {
    let mut pkcs8 = PKCS8_ED25519.to_vec();
    pkcs8.extend_from_slice(&key.derive::<32>(b"mlx-node transport identity"));
    let private = crypto::ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(pkcs8)).map_err(tls)?;
    let public = private.public_key().ok_or_else(|| tls("the key pair has no public key"))?;
    // rustls carries a raw public key where a certificate would be.
    let public = CertificateDer::from(public.as_ref().to_vec());
    Ok(Arc::new(CertifiedKey::new(vec![public], private)))
}

fn tls(error: impl ToString) -> TransportError {
    TransportError::Tls { message: error.to_string() }
}

/// The peer's public key is not the one derived from this cluster's key.
#[derive(Debug, thiserror::Error)]
#[error("it has another cluster key")]
struct AnotherKey;

/// Accepts one public key, on both sides.
#[derive(Debug)]
struct OnlyThisKey {
    key: SubjectPublicKeyInfoDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl OnlyThisKey {
    fn check(&self, end_entity: &CertificateDer<'_>) -> Result<(), Error> {
        if end_entity.as_ref() == self.key.as_ref() {
            Ok(())
        } else {
            Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(AnotherKey)))))
        }
    }

    fn check_signature(
        &self,
        message: &[u8],
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature_with_raw_key(message, &self.key, signed, &self.algorithms)
    }
}

/// TLS 1.2 is not offered, so its signatures are never asked for.
fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
}

impl ServerCertVerifier for OnlyThisKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        _cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for OnlyThisKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        _cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
