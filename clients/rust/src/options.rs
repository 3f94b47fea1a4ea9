//! How a client connects, proves who it is, and checks who the server is.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Endpoint;
#[cfg(feature = "tls")]
use tonic::transport::{Certificate, ClientTlsConfig, Identity};
use tonic::{Code, Request, Status};

use crate::error::Error;

/// Where a server listens that was told nothing else.
pub const DEFAULT_TARGET: &str = "127.0.0.1:50051";

/// How to connect; [`crate::Client::with_options`] takes it.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Encrypt. `Some(Tls::default())` trusts the system's authorities.
    pub tls: Option<Tls>,
    /// Sent with every call; without TLS to this machine only.
    pub api_key: Option<String>,
    /// Let the API key travel to another machine unencrypted.
    pub plaintext_key: bool,
    /// Calls wait for the server to come up, up to their timeout, instead of failing after about a
    /// second.
    pub wait_for_ready: bool,
    /// The deadline of every call; [`crate::Client::with_timeout`] gives single calls their own.
    pub timeout: Option<Duration>,
}

/// PEM files for TLS.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    /// The authorities to trust; `None` = the system's.
    pub ca: Option<PathBuf>,
    /// The client's own certificate and key, for mutual TLS.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl Options {
    /// Errors: INVALID_ARGUMENT for what cannot be an address, a key or a certificate.
    pub(crate) fn endpoint(&self, target: &str) -> Result<Endpoint, Error> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let uri = if target.starts_with("unix:") {
            target.to_owned()
        } else {
            format!("{scheme}://{target}")
        };
        let endpoint = Endpoint::from_shared(uri)
            .map_err(|error| invalid(format!("{target}: {error}")))?
            .connect_timeout(Duration::from_secs(20))
            // The server answers pings more frequent than every 10 s with GOAWAY.
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .tcp_nodelay(true);
        match &self.tls {
            None => Ok(endpoint),
            Some(tls) => tls.applied_to(endpoint),
        }
    }

    pub(crate) fn bearer(&self, target: &str) -> Result<Bearer, Error> {
        let Some(key) = &self.api_key else {
            return Ok(Bearer(None));
        };
        // A line feed, left by an editor, would make the metadata illegal.
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(invalid("the API key is empty, or has characters that no key has"));
        }
        if self.tls.is_none() && !self.plaintext_key && !is_loopback(target) {
            return Err(invalid(format!(
                "the API key would travel to {target} in plaintext; use tls, or plaintext_key where \
                 the network itself is trusted"
            )));
        }
        let mut value: MetadataValue<Ascii> = format!("Bearer {key}")
            .parse()
            .map_err(|_| invalid("the API key has characters that no key has"))?;
        value.set_sensitive(true);
        Ok(Bearer(Some(value)))
    }
}

impl Tls {
    #[cfg(feature = "tls")]
    fn applied_to(&self, endpoint: Endpoint) -> Result<Endpoint, Error> {
        let mut config = match &self.ca {
            Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let Some((certificate, key)) = &self.identity {
            config = config.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        endpoint.tls_config(config).map_err(|error| invalid(error.to_string()))
    }

    #[cfg(not(feature = "tls"))]
    fn applied_to(&self, _: Endpoint) -> Result<Endpoint, Error> {
        Err(invalid("this build has no TLS: turn the feature `tls` on"))
    }
}

/// Adds the API key to a call.
#[derive(Clone)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl tonic::service::Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

fn is_loopback(target: &str) -> bool {
    if target.starts_with("unix:") {
        return true;
    }
    let host = target.rsplit_once(':').map_or(target, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(feature = "tls")]
fn read(file: &std::path::Path) -> Result<Vec<u8>, Error> {
    std::fs::read(file).map_err(|error| invalid(format!("{}: {error}", file.display())))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(Code::InvalidArgument, message)
}
