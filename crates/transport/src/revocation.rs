//! Ends connections whose other end proved a key that is not accepted any more.

use crate::{
    close::{self, close},
    tls::Accepted,
};
use quinn::Connection;
use tokio::sync::watch;

/// What the other end reads.
const REASON: &str = "the cluster key of this connection is not accepted any more";

/// Watches a connection until it ends, or nobody can change the keys any more. `accepted` is of before the handshake, so that
/// a change during it is not missed.
pub(crate) fn watch(connection: Connection, mut accepted: watch::Receiver<Accepted>) {
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = connection.closed() => return,
                changed = accepted.changed() => if changed.is_err() { return },
            }
            if !accepted.borrow_and_update().has(&connection) {
                close(&connection, close::REVOKED, REASON);
                return;
            }
        }
    });
}
