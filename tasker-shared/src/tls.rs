//! TLS for clients: rustls with ring, told explicitly. The HTTP crate is built without a default provider
//! and panics when it has to choose one.

use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};

/// Trusts the web's certificate authorities.
pub fn web() -> Result<ClientConfig, rustls::Error> {
    trusting(RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() })
}

/// Trusts these certificate authorities alone.
pub fn trusting(roots: RootCertStore) -> Result<ClientConfig, rustls::Error> {
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map(|builder| builder.with_root_certificates(roots).with_no_client_auth())
}
