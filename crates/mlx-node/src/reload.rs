//! Settings that change while `serve` runs: read again at SIGHUP or when an administrator asks (`mlx-node config apply`).
//!
//! [`Reload`] owns what is in force. Nothing is changed unless all that was read is valid; what cannot change without a restart
//! is named and stays as it is, each time until that restart.

use crate::{
    config::{self, Config, Values},
    logging::LogFilterHandle,
    settings::{KeyOrigin, Settings, TlsFiles},
};
use api::{Certificate, Operate, Reloaded, SharedAccess};
use node::NodeHandle;
use std::{path::PathBuf, time::Duration};
use tokio::sync::{mpsc, oneshot, watch};
use transport::ClusterKeys;
use types::BoxFuture;

/// Settings that are taken over without a restart.
const RELOADABLE: &[&str] = &[
    "api_keys",
    "key",
    "key_requests_per_minute",
    "key_tokens_per_minute",
    "key_concurrency",
    "open_metrics",
    "key_file",
    "cluster_key",
    "tls_cert",
    "tls_key",
    "drain_timeout",
    "log",
];
/// Said where all HTTP keys are gone: the file may be half written, and an endpoint should not open to everybody by that.
const KEYS_GONE: &str =
    "there are HTTP keys now and none in the settings any more: an endpoint without keys needs a restart";
/// Said where `serve` takes no orders any more.
const ENDING: &str = "this process is ending";
/// Orders that wait for `serve` to look: administrators are few.
const ORDERS_MAX: usize = 16;

/// Where the settings came from, to read them again. Variables are those of the process: nobody can change them.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    /// What `--config` said.
    pub(crate) file: Option<PathBuf>,
    pub(crate) flags: Config,
}

impl Source {
    /// Reads all settings.
    ///
    /// # Errors
    /// As [`config::load`].
    pub(crate) fn load(&self) -> Result<Values, config::ConfigError> {
        config::load(self.file.as_deref(), self.flags.clone(), std::env::vars_os())
    }
}

/// What `serve` is asked to do by its endpoint.
pub(crate) enum Order {
    Reload(oneshot::Sender<Result<Reloaded, String>>),
    Drain,
}

/// Passes orders on to `serve`.
#[derive(Debug, Clone)]
pub(crate) struct Operator(mpsc::Sender<Order>);

impl Operator {
    pub(crate) fn new() -> (Self, mpsc::Receiver<Order>) {
        let (orders, ordered) = mpsc::channel(ORDERS_MAX);
        (Self(orders), ordered)
    }
}

impl Operate for Operator {
    fn reload(&self) -> BoxFuture<'_, Result<Reloaded, String>> {
        Box::pin(async {
            let (done, reloaded) = oneshot::channel();
            self.0.send(Order::Reload(done)).await.map_err(|_| ENDING)?;
            reloaded.await.map_err(|_| ENDING)?
        })
    }

    fn drain(&self) {
        // Full or gone: it was asked to before.
        let _ = self.0.try_send(Order::Drain);
    }
}

/// What is in force, and the parts to tell when it changes.
pub(crate) struct Reload {
    pub(crate) source: Source,
    /// What is in force: what was started with, but for what was taken over since.
    pub(crate) values: Values,
    pub(crate) keys: ClusterKeys,
    /// Whether it runs without a cluster, which stays so.
    pub(crate) alone: bool,
    pub(crate) access: SharedAccess,
    pub(crate) certificate: Option<watch::Sender<Certificate>>,
    /// The bytes of the certificate in force and of its key.
    pub(crate) pem: Option<TlsFiles>,
    pub(crate) drain_timeout: Duration,
    pub(crate) log: LogFilterHandle,
}

impl Reload {
    /// Reads the settings again and takes over what can be; says so in the log, or why not.
    ///
    /// # Errors
    /// What is wrong with them; nothing is changed then.
    pub(crate) fn reload(&mut self, node: &NodeHandle) -> Result<Reloaded, String> {
        let reloaded = self.take_over(node);
        match &reloaded {
            Ok(Reloaded { applied, restart }) => {
                tracing::info!(?applied, after_a_restart = ?restart, "settings were read again");
            }
            Err(error) => tracing::error!(%error, "the settings were not reloaded, and nothing is changed"),
        }
        reloaded
    }

    fn take_over(&mut self, node: &NodeHandle) -> Result<Reloaded, String> {
        let read = self.source.load().map_err(|error| error.to_string())?;
        Settings::resolve(read.clone()).map_err(|error| error.to_string())?;
        // What holds from now on: keys of the new settings beside addresses of the old ones, say. That must be valid as well.
        let mut values = self.values.clone();
        let differing = self.values.differing(&read);
        for name in differing.iter().filter(|name| RELOADABLE.contains(name)) {
            values.take(name, &read);
        }
        let settings = Settings::resolve(values.clone()).map_err(|error| error.to_string())?;
        if settings.access.keys.is_empty() && !self.access.get().keys.is_empty() {
            return Err(KEYS_GONE.to_owned());
        }
        let mut restart: Vec<&str> =
            differing.iter().copied().filter(|name| !RELOADABLE.contains(name)).collect();
        let mut applied: Vec<&str> =
            differing.iter().copied().filter(|name| RELOADABLE.contains(name)).collect();

        let alone = matches!(settings.key_origin, KeyOrigin::Random(_));
        let rekeyed = !alone && settings.keys != self.keys;
        if alone != self.alone {
            // One that runs alone listens nowhere that others reach, and the reverse.
            for name in ["key_file", "cluster_key"] {
                values.take(name, &self.values);
            }
            applied.retain(|name| !["key_file", "cluster_key"].contains(name));
            restart.push("key_file");
        } else if rekeyed {
            node.rekey(&settings.keys).map_err(|error| error.to_string())?;
            self.keys = settings.keys;
            if !applied.contains(&"cluster_key") {
                name_once(&mut applied, "key_file");
            }
        }
        match (&self.certificate, settings.tls) {
            (Some(certificate), Some((new, files))) => {
                if self.pem.as_ref() != Some(&files) {
                    certificate.send_replace(new);
                    self.pem = Some(files);
                    name_once(&mut applied, "tls_cert");
                }
            }
            (None, None) => {}
            // With or without TLS is how the port was opened.
            (Some(_), None) | (None, Some(_)) => {
                for name in ["tls_cert", "tls_key"] {
                    values.take(name, &self.values);
                }
                applied.retain(|name| !["tls_cert", "tls_key"].contains(name));
                restart.extend(["tls_cert", "tls_key"]);
            }
        }
        self.access.replace(settings.access);
        self.drain_timeout = settings.drain_timeout;
        if applied.contains(&"log") {
            self.log.set(&values.log.0);
        }
        self.values = values;
        let names = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect();
        Ok(Reloaded { applied: names(applied), restart: names(restart) })
    }
}

/// A file may change where the setting that names it does not.
fn name_once<'a>(names: &mut Vec<&'a str>, name: &'a str) {
    if !names.contains(&name) {
        names.push(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reloadable_is_a_setting() {
        for name in RELOADABLE {
            assert!(Config::NAMES.contains(name) || *name == config::KEY, "{name}");
        }
    }
}
