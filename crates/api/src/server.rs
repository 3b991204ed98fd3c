//! Serves an app over TCP, with TLS where there is a certificate: bounded connections, time limits for handshakes, headers and
//! clients that read nothing, no waiting for full packets.

use crate::{
    held::Held,
    limits::{
        CONNECTION_BUFFER_BYTES_MAX, CONNECTIONS_MAX, HANDSHAKE_TIME_MAX, HEADERS_TIME_MAX, WRITE_TIME_MAX,
    },
    patience::Patient,
    seats::{Seat, Seats},
    tls::Certificate,
};
use axum::{Router, body::Body, extract::Request, response::Response};
use hyper::{body::Incoming, server::conn::http1, service::Service};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
    service::TowerToHyperService,
};
use std::{
    convert::Infallible, future::Future, io, net::SocketAddr, pin::Pin, pin::pin, sync::Arc, time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};

/// Pause after a failed accept: it is likely to be a lack of file descriptors, which passes when connections end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How connections are served.
#[derive(Debug, Clone)]
pub struct ServeSettings {
    /// What TLS is spoken with, and what comes after it; none: plain HTTP.
    pub certificate: Option<watch::Receiver<Certificate>>,
    /// Connections at once. Where there are more, the one goes that has been waiting for its client the longest.
    pub connections_max: usize,
    /// For a request's headers to arrive, which also ends connections that stay idle.
    pub headers_time_max: Duration,
    /// A client that takes nothing of what is written for this long is dropped.
    pub write_time_max: Duration,
}

impl Default for ServeSettings {
    fn default() -> Self {
        Self {
            certificate: None,
            connections_max: CONNECTIONS_MAX,
            headers_time_max: HEADERS_TIME_MAX,
            write_time_max: WRITE_TIME_MAX,
        }
    }
}

/// Serves until `shutdown`, then stops accepting and returns when the requests in flight are answered.
/// How long that may take is the caller's to bound, by dropping this future; connections then end with the runtime.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    settings: ServeSettings,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let address = listener.local_addr()?;
    info!(%address, tls = settings.certificate.is_some(), "serving HTTP");
    let seats = Seats::new(settings.connections_max);
    let graceful = GracefulShutdown::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let next = async { (seats.take().await, listener.accept().await) };
        let (seat, accepted) = tokio::select! {
            next = next => next,
            () = &mut shutdown => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%peer, %error, "a connection ended at once");
            continue;
        }
        let served =
            connection(stream, peer, app.clone(), settings.clone(), seat.clone(), graceful.watcher());
        tokio::spawn(async move {
            tokio::select! {
                () = served => {}
                () = seat.needed_elsewhere() => debug!(%peer, "an idle connection made room for another one"),
            }
        });
    }
    drop(listener);
    info!(%address, "no longer accepting; finishing what is in flight");
    graceful.shutdown().await;
    Ok(())
}

/// One connection, from the first byte to its end.
async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    app: Router,
    settings: ServeSettings,
    seat: Arc<Seat>,
    watcher: Watcher,
) {
    let stream = Patient::new(stream, settings.write_time_max);
    let app = Seated { app: TowerToHyperService::new(app), seat };
    let Some(certificate) = &settings.certificate else {
        return talk(stream, peer, app, &settings, watcher).await;
    };
    let acceptor = TlsAcceptor::from(certificate.borrow().0.clone());
    match timeout(HANDSHAKE_TIME_MAX.min(settings.headers_time_max), acceptor.accept(stream)).await {
        Ok(Ok(stream)) => talk(stream, peer, app, &settings, watcher).await,
        Ok(Err(error)) => debug!(%peer, %error, "no TLS was agreed on"),
        Err(_) => debug!(%peer, "a TLS handshake took too long"),
    }
}

async fn talk(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    peer: SocketAddr,
    app: Seated,
    settings: &ServeSettings,
    watcher: Watcher,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(settings.headers_time_max)
        .max_buf_size(CONNECTION_BUFFER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), app);
    if let Err(error) = watcher.watch(connection).await {
        debug!(%peer, %error, "a connection broke off");
    }
}

/// The app for one connection, whose place nobody takes while it is at work.
struct Seated {
    app: TowerToHyperService<Router>,
    seat: Arc<Seat>,
}

impl Service<Request<Incoming>> for Seated {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let (busy, answer) = (self.seat.busy(), self.app.call(request));
        Box::pin(async move { Ok(answer.await?.map(|body: Body| Held::body(body, busy))) })
    }
}
