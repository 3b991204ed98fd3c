//! Ends connections whose other end has gone silent, however slow QUIC believes the network to be.
//!
//! QUIC's own idle timeout is never shorter than three times its probe timeout (RFC 9000, section 10.1), which grows to
//! seconds where packets were held up for a while, as by a machine that was stopped and went on. And where packets get
//! through in one direction only, the end that hears nothing has to tell the other one.

use crate::{
    close::{self, close},
    limits::{SILENCE_CHECK_INTERVAL, SILENT_CHECKS_MAX},
};
use quinn::Connection;
use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};

/// Watches a connection until it is dropped.
#[derive(Debug)]
pub(crate) struct SilenceWatch(JoinHandle<()>);

impl SilenceWatch {
    pub(crate) fn new(connection: Connection) -> Self {
        Self(tokio::spawn(watch(connection)))
    }
}

impl Drop for SilenceWatch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn watch(connection: Connection) {
    let mut check = interval(SILENCE_CHECK_INTERVAL);
    // What came while this process stood still is yet to be read: that was one check, not many.
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut heard, mut silent) = (0, 0);
    loop {
        tokio::select! {
            _ = connection.closed() => return,
            _ = check.tick() => {}
        }
        let now = connection.stats().udp_rx.datagrams;
        silent = if now == heard { silent + 1 } else { 0 };
        heard = now;
        if silent >= SILENT_CHECKS_MAX {
            close(&connection, close::SILENT, &close::silent());
            return;
        }
    }
}
