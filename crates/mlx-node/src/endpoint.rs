//! A running endpoint as the commands see it: requests over HTTP/1.1, answers whole or as server-sent events.
//!
//! Every request has a connection of its own: commands ask little, and measurements should not share anything.

use crate::{
    config::Values,
    keys::{self, Scope},
    pinned,
    values::Secret,
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

/// For a connection, and for an answer that is there at once; past this the endpoint is not well.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);
/// Bytes of an answer: a thousand nodes with a few models each.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Bytes of one event: an answer's log-probabilities are the longest.
const EVENT_BYTES_MAX: usize = 4 << 20;
/// Where a request went and why.
const ROUTE_HEADER: &str = "x-mlx-route";

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error("nothing answers at {url}: {reason} (is mlx-node running there? --http names another address)")]
    Unreachable { url: String, reason: String },
    #[error(
        "{url}{path}: 401: give a key with --api-keys or MLX_NODE_API_KEYS (of those that the settings have as hashes, \
         commands know nothing)"
    )]
    Key { url: String, path: String },
    #[error("{url}{path}: {status}: {message}")]
    Refused { url: String, path: String, status: u16, message: String },
    #[error("{url}{path}: {reason}")]
    Broken { url: String, path: String, reason: String },
    #[error("tls_cert: {path}: {reason}")]
    Certificate { path: String, reason: String },
}

/// An endpoint and the key to it.
#[derive(Clone)]
pub(crate) struct Endpoint {
    address: SocketAddr,
    key: Option<Secret>,
    tls: Option<TlsConnector>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("url", &self.url()).finish_non_exhaustive()
    }
}

/// What a request travels on.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Endpoint {
    /// The one that `http` names, with a key that may ask models; over TLS where `tls_cert` is set.
    ///
    /// # Errors
    /// A certificate that cannot be read.
    pub(crate) fn of(values: &Values) -> Result<Self, AskError> {
        Self::with_key(values, Scope::Use)
    }

    /// The same with a key that may administer.
    ///
    /// # Errors
    /// A certificate that cannot be read.
    pub(crate) fn to_administer(values: &Values) -> Result<Self, AskError> {
        Self::with_key(values, Scope::Admin)
    }

    fn with_key(values: &Values, scope: Scope) -> Result<Self, AskError> {
        let key = keys::written(&values.api_keys.0, &values.keys, scope).cloned();
        let tls = (!values.tls_cert.is_empty()).then(|| {
            let failed = |reason: String| AskError::Certificate { path: values.tls_cert.clone(), reason };
            let chain = std::fs::read(&values.tls_cert).map_err(|error| failed(error.to_string()))?;
            pinned::connector(&chain).map_err(failed)
        });
        Ok(Self { address: reachable(values.http), key, tls: tls.transpose()? })
    }

    pub(crate) fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// The body of a GET's answer.
    pub(crate) async fn get(&self, path: &str) -> Result<String, AskError> {
        self.whole(Method::GET, path).await
    }

    /// The answer to a POST of nothing, as JSON.
    pub(crate) async fn post_whole(&self, path: &str) -> Result<Value, AskError> {
        let text = self.whole(Method::POST, path).await?;
        serde_json::from_str(&text).map_err(|error| self.broken(path, error.to_string()))
    }

    async fn whole(&self, method: Method, path: &str) -> Result<String, AskError> {
        let broken = |reason: String| self.broken(path, reason);
        let asked = async {
            let answer = self.send(method, path, Bytes::new()).await?;
            let body = Limited::new(answer.body, ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|error| broken(error.to_string()))?.to_bytes();
            String::from_utf8(body.to_vec()).map_err(|_| broken("the answer is no text".to_owned()))
        };
        let seconds = ANSWER_TIME_MAX.as_secs();
        timeout(ANSWER_TIME_MAX, asked)
            .await
            .unwrap_or_else(|_| Err(broken(format!("no answer within {seconds} s"))))
    }

    /// The same as JSON.
    pub(crate) async fn get_json(&self, path: &str) -> Result<Value, AskError> {
        let text = self.get(path).await?;
        serde_json::from_str(&text).map_err(|error| self.broken(path, error.to_string()))
    }

    /// The events that answer a POST, however long they take. Dropping them cancels the request.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Events, AskError> {
        let answer = self.send(Method::POST, path, body.to_string().into()).await?;
        Ok(Events {
            endpoint: self.clone(),
            path: path.to_owned(),
            route: answer.route,
            body: answer.body,
            buffer: Vec::new(),
        })
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Answer, AskError> {
        let address = self.address;
        let url = self.url();
        let unreachable = |reason: String| AskError::Unreachable { url: url.clone(), reason };
        let stream = timeout(ANSWER_TIME_MAX, TcpStream::connect(address)).await;
        let stream = stream
            .map_err(|_| unreachable("no connection in time".to_owned()))?
            .map_err(|error| unreachable(error.to_string()))?;
        stream.set_nodelay(true).map_err(|error| unreachable(error.to_string()))?;
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(stream),
            Some(tls) => {
                let agreed =
                    timeout(ANSWER_TIME_MAX, tls.connect(ServerName::from(address.ip()), stream)).await;
                let agreed = agreed.map_err(|_| self.broken("", "no TLS in time".to_owned()))?;
                Box::new(agreed.map_err(|error| {
                    self.broken(
                        "",
                        format!("{error} (tls_cert is the certificate that commands expect there)"),
                    )
                })?)
            }
        };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(path, error.to_string()))?;
        // Ends with the answer, or when that is dropped; what went wrong shows there.
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, address.to_string())
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(Secret(key)) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request
            .body(Full::new(body))
            .map_err(|error| self.broken(path, format!("not asked: {error}")))?;
        let answer =
            sender.send_request(request).await.map_err(|error| self.broken(path, error.to_string()))?;
        let route =
            answer.headers().get(ROUTE_HEADER).and_then(|route| route.to_str().ok()).map(str::to_owned);
        let (status, body) = (answer.status(), answer.into_body());
        match status {
            status if status.is_success() => Ok(Answer { route, body }),
            StatusCode::UNAUTHORIZED => Err(AskError::Key { url, path: path.to_owned() }),
            status => {
                let message = refusal(body).await;
                Err(AskError::Refused { url, path: path.to_owned(), status: status.as_u16(), message })
            }
        }
    }

    fn broken(&self, path: &str, reason: String) -> AskError {
        AskError::Broken { url: self.url(), path: path.to_owned(), reason }
    }
}

struct Answer {
    route: Option<String>,
    body: Incoming,
}

/// What the body of a refusal says.
async fn refusal(body: Incoming) -> String {
    let body = timeout(ANSWER_TIME_MAX, Limited::new(body, ANSWER_BYTES_MAX).collect()).await;
    let Ok(Ok(body)) = body else { return "it does not say why".to_owned() };
    let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    let json: Option<Value> = serde_json::from_str(&text).ok();
    json.and_then(|json| Some(json["error"]["message"].as_str()?.to_owned())).unwrap_or(text)
}

/// Server-sent events of an answer.
#[derive(Debug)]
pub(crate) struct Events {
    endpoint: Endpoint,
    path: String,
    /// Where the request went and why, as the endpoint says.
    pub(crate) route: Option<String>,
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    /// The next event, as JSON; none after the last. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Result<Option<Value>, AskError> {
        loop {
            if let Some(event) = take_event(&mut self.buffer) {
                if event == "[DONE]" {
                    return Ok(None);
                }
                let json: Value = serde_json::from_str(&event)
                    .map_err(|error| self.endpoint.broken(&self.path, error.to_string()))?;
                if let Some(message) = json["error"]["message"].as_str() {
                    return Err(self.endpoint.broken(&self.path, message.to_owned()));
                }
                return Ok(Some(json));
            }
            if self.buffer.len() > EVENT_BYTES_MAX {
                let reason = format!("an event is longer than {EVENT_BYTES_MAX} bytes");
                return Err(self.endpoint.broken(&self.path, reason));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.buffer.extend(frame.into_data().unwrap_or_default()),
                Some(Err(error)) => return Err(self.endpoint.broken(&self.path, error.to_string())),
                None => {
                    let reason = "the answer broke off".to_owned();
                    return Err(self.endpoint.broken(&self.path, reason));
                }
            }
        }
    }
}

/// The data of the first whole event in a buffer, which it leaves; comments are passed over.
fn take_event(buffer: &mut Vec<u8>) -> Option<String> {
    loop {
        let end = buffer.windows(2).position(|pair| pair == b"\n\n")?;
        let event = String::from_utf8_lossy(&buffer[..end]).into_owned();
        buffer.drain(..end + 2);
        let data: Vec<&str> = event.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        if !data.is_empty() {
            return Some(data.join("\n"));
        }
    }
}

/// Where to reach an endpoint that listens on `http`: loopback, if it listens everywhere.
fn reachable(http: SocketAddr) -> SocketAddr {
    let ip = match http.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, http.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_cut_out_of_what_came() {
        let mut buffer = b": keep-alive\n\ndata: {\"a\":1}\n\ndata: [DO".to_vec();
        assert_eq!(take_event(&mut buffer).as_deref(), Some("{\"a\":1}"));
        assert_eq!(take_event(&mut buffer), None);
        buffer.extend(b"NE]\n\n");
        assert_eq!(take_event(&mut buffer).as_deref(), Some("[DONE]"));
        assert_eq!((take_event(&mut buffer), buffer.len()), (None, 0));
    }

    #[test]
    fn what_listens_everywhere_is_reached_here() {
        let check = |http: &str, expected: &str| {
            let parse = |text: &str| text.parse::<SocketAddr>().expect("an address");
            assert_eq!(reachable(parse(http)), parse(expected));
        };
        check("0.0.0.0:80", "127.0.0.1:80");
        check("[::]:80", "[::1]:80");
        check("10.0.0.1:80", "10.0.0.1:80");
    }
}
