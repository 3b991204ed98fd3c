//! The socket: dialling, listening, and the handshakes in flight (what is said in them is in `handshake`).

use crate::{
    ClusterKeys, ControlReceiver, Peer, RouterLink, close, handshake,
    limits::{CLOSE_TIME_MAX, HANDSHAKE_TIME_MAX, HANDSHAKES_MAX},
    socket,
    tls::{self, Accepted, Configs},
    warnings::Warnings,
};
use ring::hmac;
use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, PoisonError, RwLock},
};
use tokio::{
    sync::{Mutex, watch},
    task::JoinSet,
    time::timeout,
};
use wire::Hello;

/// Why an endpoint cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The address cannot be listened on.
    #[error("cannot listen on UDP {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The socket given cannot be used.
    #[error("cannot use the socket: {source}")]
    Socket {
        /// What the system said.
        source: io::Error,
    },
    /// The TLS library refuses our settings.
    #[error("TLS cannot be set up: {message}")]
    Tls {
        /// What it said.
        message: String,
    },
}

/// Why a router was not joined.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// The address cannot be dialled from here.
    #[error("cannot connect to {router}: {reason}")]
    Address {
        /// The address.
        router: SocketAddr,
        /// What is wrong with it.
        reason: String,
    },
    /// Nobody there, or the connection broke off.
    #[error("{router} does not answer: {reason}")]
    Unreachable {
        /// The address.
        router: SocketAddr,
        /// What was seen.
        reason: String,
    },
    /// One of the two does not have the other's cluster key.
    #[error("{router} has another cluster key, or is no mlx-node: {reason}")]
    Key {
        /// The address.
        router: SocketAddr,
        /// What TLS said.
        reason: String,
    },
    /// It has the key and will not have us: another version, another cluster.
    #[error("{router} refused this node: {reason}")]
    Refused {
        /// The address.
        router: SocketAddr,
        /// Why, with both values.
        reason: String,
    },
    /// The address is this very process.
    #[error("{router} is this process itself")]
    Itself {
        /// The address.
        router: SocketAddr,
    },
}

/// One UDP socket for all connections of a process. Clones share it.
#[derive(Debug, Clone)]
pub struct Endpoint(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    quinn: quinn::Endpoint,
    local: SocketAddr,
    doors: RwLock<Doors>,
    /// Told to those who watch over connections that are up.
    accepted: watch::Sender<Accepted>,
    warnings: Warnings,
    handshakes: Mutex<Handshakes>,
}

/// With which keys is dialled and listened.
#[derive(Debug)]
struct Doors {
    configs: Configs,
    listening: bool,
}

/// What [`Endpoint::accept`] works on; behind a lock because several may wait in it.
#[derive(Debug, Default)]
struct Handshakes {
    tasks: JoinSet<Option<(Peer, ControlReceiver)>>,
}

impl Endpoint {
    /// Listens on `address`. An unspecified address means all of both IPv4 and IPv6 where the system can.
    ///
    /// Needs a tokio runtime.
    pub fn bind(address: SocketAddr, keys: impl Into<ClusterKeys>) -> Result<Self, TransportError> {
        let port = address.port();
        let all = [(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()];
        let addresses: &[SocketAddr] = if address.ip().is_unspecified() { &all } else { &[address] };
        let mut bound = Err(io::ErrorKind::AddrNotAvailable.into());
        for &address in addresses {
            bound = socket::bind(address).and_then(|socket| {
                let (config, runtime) = (quinn::EndpointConfig::default(), Arc::new(quinn::TokioRuntime));
                // A client for now: `accept` makes it a server.
                quinn::Endpoint::new_with_abstract_socket(config, None, Arc::new(socket), runtime)
            });
            if bound.is_ok() {
                break;
            }
        }
        Self::new(bound.map_err(|source| TransportError::Bind { address, source })?, &keys.into())
    }

    /// Uses a socket and a runtime of the caller's, and random numbers from a seed if there is one.
    pub fn with_socket(
        socket: Arc<dyn quinn::AsyncUdpSocket>,
        runtime: Arc<dyn quinn::Runtime>,
        keys: impl Into<ClusterKeys>,
        rng_seed: Option<[u8; 32]>,
    ) -> Result<Self, TransportError> {
        let mut config = quinn::EndpointConfig::default();
        if let Some(seed) = rng_seed {
            config.reset_key(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &seed))).rng_seed(Some(seed));
        }
        let quinn = quinn::Endpoint::new_with_abstract_socket(config, None, socket, runtime);
        Self::new(quinn.map_err(|source| TransportError::Socket { source })?, &keys.into())
    }

    fn new(quinn: quinn::Endpoint, keys: &ClusterKeys) -> Result<Self, TransportError> {
        let local = quinn.local_addr().map_err(|source| TransportError::Socket { source })?;
        let configs = tls::configs(keys)?;
        let accepted = watch::Sender::new(configs.accepted.clone());
        let doors = RwLock::new(Doors { configs, listening: false });
        let (warnings, handshakes) = (Warnings::default(), Mutex::default());
        Ok(Self(Arc::new(Inner { quinn, local, doors, accepted, warnings, handshakes })))
    }

    /// Goes over to other keys: for whom is dialled and accepted from now on, and for the connections that are up, of which
    /// those end whose other end proved a key that is not among them.
    ///
    /// # Errors
    /// Where the TLS library refuses; nothing is changed then.
    pub fn rekey(&self, keys: impl Into<ClusterKeys>) -> Result<(), TransportError> {
        let configs = tls::configs(&keys.into())?;
        let accepted = configs.accepted.clone();
        {
            let mut doors = self.0.doors.write().unwrap_or_else(PoisonError::into_inner);
            doors.configs = configs;
            if doors.listening {
                self.0.quinn.set_server_config(Some(doors.configs.server.clone()));
            }
        }
        self.0.accepted.send_replace(accepted);
        Ok(())
    }

    /// Listens from now on, if not yet.
    fn listen(&self) {
        let mut doors = self.0.doors.write().unwrap_or_else(PoisonError::into_inner);
        if !doors.listening {
            self.0.quinn.set_server_config(Some(doors.configs.server.clone()));
            doors.listening = true;
        }
    }

    /// Where this endpoint listens.
    pub fn local_address(&self) -> SocketAddr {
        self.0.local
    }

    /// Node side: dials a router, says hello, and is welcomed or refused, within [`HANDSHAKE_TIME_MAX`]. A refusal is
    /// also logged.
    pub async fn join(&self, router: SocketAddr, hello: Hello) -> Result<RouterLink, JoinError> {
        let client = {
            let doors = self.0.doors.read().unwrap_or_else(PoisonError::into_inner);
            doors.configs.client.clone()
        };
        let accepted = self.0.accepted.subscribe();
        let connecting = self.0.quinn.connect_with(client, router, tls::SERVER_NAME);
        let connecting =
            connecting.map_err(|error| JoinError::Address { router, reason: error.to_string() })?;
        let joined =
            match timeout(HANDSHAKE_TIME_MAX, handshake::join(connecting, router, hello, accepted)).await {
                Ok(joined) => joined,
                Err(_) => {
                    let reason = format!("no welcome within {} s", HANDSHAKE_TIME_MAX.as_secs());
                    Err(JoinError::Unreachable { router, reason })
                }
            };
        if let Err(error @ (JoinError::Refused { .. } | JoinError::Key { .. })) = &joined {
            self.0.warnings.not_joined(error);
        }
        joined
    }

    /// Router side: the next node that proved the key and said a matching hello; `None` once closed. Others are
    /// logged and skipped. Until this is first called, nobody can connect. Safe to cancel.
    pub async fn accept(&self, welcome: &Hello) -> Option<(Peer, ControlReceiver)> {
        let mut handshakes = self.0.handshakes.lock().await;
        self.listen();
        loop {
            let room = handshakes.tasks.len() < HANDSHAKES_MAX;
            tokio::select! {
                Some(done) = handshakes.tasks.join_next() => match done {
                    Ok(Some(accepted)) => return Some(accepted),
                    Ok(None) => {}
                    Err(error) => tracing::error!(%error, "a handshake failed within"),
                },
                incoming = self.0.quinn.accept(), if room => {
                    let incoming = incoming?;
                    // When busy, only with those who receive what is sent to their address.
                    if handshakes.tasks.len() >= HANDSHAKES_MAX / 2 && incoming.may_retry() {
                        if let Err(error) = incoming.retry() {
                            error.into_incoming().refuse();
                        }
                        continue;
                    }
                    handshakes.tasks.spawn(greet(self.clone(), incoming, welcome.clone()));
                }
            }
        }
    }

    /// Closes all connections and takes no more; waits until the other ends were told, at most [`CLOSE_TIME_MAX`].
    pub async fn close(&self, reason: &str) {
        self.0.quinn.close(close::CLOSED, close::cut(reason).as_bytes());
        if timeout(CLOSE_TIME_MAX, self.0.quinn.wait_idle()).await.is_err() {
            tracing::debug!("some peers may not know that this endpoint is closed");
        }
    }
}

/// One handshake on the router's side, from the first packet to the welcome.
async fn greet(
    endpoint: Endpoint,
    incoming: quinn::Incoming,
    welcome: Hello,
) -> Option<(Peer, ControlReceiver)> {
    let peer = close::canonical(incoming.remote_address());
    let accepted = endpoint.0.accepted.subscribe();
    let greeted = timeout(HANDSHAKE_TIME_MAX, handshake::greet(incoming, welcome, accepted)).await;
    let refusal = match greeted {
        Ok(Ok(accepted)) => return Some(accepted),
        Ok(Err(refusal)) => refusal,
        Err(_) => handshake::Refusal(format!("no hello within {} s", HANDSHAKE_TIME_MAX.as_secs())),
    };
    endpoint.0.warnings.refused(peer, &refusal.0);
    None
}
