//! TLS for the endpoint, of certificates and keys as PEM.

use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use std::sync::Arc;

/// What a listener proves itself with to those who connect; cheap to clone.
#[derive(Debug, Clone)]
pub struct Certificate(pub(crate) Arc<ServerConfig>);

/// Why there is no certificate in some texts. Shows nothing of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// No `BEGIN CERTIFICATE`.
    #[error("there is no certificate in it: PEM is expected, the server's own certificate first")]
    NoCertificate,
    /// A certificate that is no PEM.
    #[error("its certificate cannot be read: {0}")]
    Certificate(String),
    /// No `BEGIN PRIVATE KEY`.
    #[error("there is no private key in it that can be read: PEM without a passphrase is expected ({0})")]
    Key(String),
    /// Both, but they do not belong together, or are of a kind that is not known.
    #[error("the certificate and the private key cannot be used together: {0}")]
    Pair(String),
}

impl Certificate {
    /// Of the certificates of a chain, the server's first, and the private key.
    ///
    /// # Errors
    /// What is missing or wrong.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, CertificateError> {
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<_, _>>()
            .map_err(|error| CertificateError::Certificate(error.to_string()))?;
        if chain.is_empty() {
            return Err(CertificateError::NoCertificate);
        }
        let key =
            PrivateKeyDer::from_pem_slice(key).map_err(|error| CertificateError::Key(error.to_string()))?;
        let pair = |error: rustls::Error| CertificateError::Pair(error.to_string());
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(pair)?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(pair)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(Arc::new(config)))
    }
}
