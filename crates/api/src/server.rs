//! Serves an app over TCP: bounded connections, time limits for headers and for clients that read nothing, no waiting for full packets.

use crate::{
    limits::{CONNECTION_BUFFER_BYTES_MAX, CONNECTIONS_MAX, HEADERS_TIME_MAX, WRITE_TIME_MAX},
    patience::Patient,
};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use std::{future::Future, io, pin::pin, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::Semaphore};
use tracing::{debug, info, warn};

/// Pause after a failed accept: it is likely to be a lack of file descriptors, which passes when connections end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `shutdown`, then stops accepting and returns when the requests in flight are answered.
/// How long that may take is the caller's to bound, by dropping this future; connections then end with the runtime.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let address = listener.local_addr()?;
    info!(%address, "serving HTTP");
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let graceful = GracefulShutdown::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await.expect("never closed");
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
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
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADERS_TIME_MAX)
            .max_buf_size(CONNECTION_BUFFER_BYTES_MAX)
            .serve_connection(
                TokioIo::new(Patient::new(stream, WRITE_TIME_MAX)),
                TowerToHyperService::new(app.clone()),
            );
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                debug!(%peer, %error, "a connection broke off");
            }
            drop(place);
        });
    }
    drop(listener);
    info!(%address, "no longer accepting; finishing what is in flight");
    graceful.shutdown().await;
    Ok(())
}
