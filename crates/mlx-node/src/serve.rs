//! `mlx-node serve`: starts the parts, in an order in which nothing is served that could not work, and ends them.
//!
//! Model files are found (or downloaded) first, then the HTTP port is taken without listening, then the node starts
//! and loads its model, and only then does the endpoint answer. The first SIGTERM or SIGINT drains, the second ends; SIGHUP
//! has the settings read again (`reload`).

use crate::{
    EXIT_FAILED, EXIT_USAGE,
    config::{self, Values},
    failed, hardware, key,
    logging::{self, LogFilterHandle},
    reload::{Operator, Order, Reload, Source},
    settings::{EngineProcessSettings, KeyOrigin, ModelSettings, Settings},
    values::{Goal, Links},
};
use api::{ApiSettings, ApiState, KeyHash, ServeSettings, SharedAccess};
use mlx::distributed::Backend;
use node::engine_process::RankTask;
use node::pipeline::{PipelineSettings, RankCommand};
use node::{
    ENGINE_SILENCE_MAX, EngineCommandLine, MODEL_LOAD_TIME_MAX, NodeHandle, NodeSettings, StartEngine,
};
use router::placement;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::{
    io::{self, IsTerminal},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    net::{TcpListener, TcpSocket},
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot, watch},
};
use types::{NodeId, Role};

/// Threads for sockets, JSON and short texts; long ones are encoded on threads of their own. One is busy for 50 µs with a
/// short request from end to end (`docs/performance.md`), and two hand work to each other, which takes longer than most of
/// it does. The engine process computes on every core meanwhile (or waits for a GPU).
const WORKER_THREADS: usize = 1;
/// Connections that wait to be accepted: a burst of clients between two turns of the accepting task.
const BACKLOG: u32 = 1024;

/// Descriptors of the process: a connection's each, the engine's pipes, files of models. Systems give 256 (macOS) or 1024 unless
/// asked for more.
const DESCRIPTORS: u64 = 8192;
/// Of these, what is not for connections of clients.
const DESCRIPTORS_KEPT: u64 = 512;

/// Runs until a signal ends it.
///
/// # Errors
/// The exit code; what was wrong has been said.
pub(crate) fn run(source: Source, values: Values) -> Result<(), ExitCode> {
    let log = logging::start(&values.log.0, values.log_format);
    let settings = Settings::resolve(values.clone()).map_err(|error| failed(EXIT_USAGE, error))?;
    say_where_the_key_is_from(&settings);
    warn_of_plain_keys(&source, &values);
    if settings.tls.is_some() && key::is_exposed(Path::new(&values.tls_key)) {
        tracing::warn!(
            "other users of this machine may read the certificate's key: chmod 600 {}",
            values.tls_key
        );
    }
    let parts = settings.model.as_ref().map(|model| parts(&settings, model)).transpose()?.unwrap_or_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .thread_name("mlx-node")
        .enable_all()
        .build()
        .map_err(|error| failed(EXIT_FAILED, format_args!("the system gives no threads: {error}")))?;
    let outcome = runtime.block_on(serve(settings, parts, Started { source, values, log }));
    // What has not ended by now is not waited for: the engine process ends with its standard input.
    runtime.shutdown_background();
    outcome
}

/// What settings were started with, to read them again.
struct Started {
    source: Source,
    values: Values,
    log: LogFilterHandle,
}

async fn serve(settings: Settings, parts: Parts, started: Started) -> Result<(), ExitCode> {
    let no_signals =
        |error: io::Error| failed(EXIT_FAILED, format_args!("cannot listen to signals: {error}"));
    let mut signals = Signals::new().map_err(no_signals)?;
    let http = settings.roles.contains(&Role::Router).then(|| take_port(settings.http)).transpose();
    let http = http.map_err(|error| {
        failed(EXIT_FAILED, format_args!("http = \"{}\" cannot be had: {error}", settings.http))
    })?;
    let access = SharedAccess::new(settings.access.clone());
    let api = ApiSettings {
        access: access.clone(),
        cache_per_key: settings.cache_per_key,
        cors_origins: settings.cors_origins.clone(),
        tool_formats: settings.tool_formats.clone(),
        ..ApiSettings::default()
    };
    let (certificate, pem) = settings.tls.clone().map(|(it, pem)| (watch::Sender::new(it), pem)).unzip();
    let serving = ServeSettings {
        certificate: certificate.as_ref().map(watch::Sender::subscribe),
        connections_max: connections_max(),
        ..ServeSettings::default()
    };
    let mut reload = Reload {
        source: started.source,
        values: started.values,
        keys: settings.keys.clone(),
        alone: matches!(settings.key_origin, KeyOrigin::Random(_)),
        access,
        certificate,
        pem,
        drain_timeout: settings.drain_timeout,
        log: started.log,
    };
    let (operator, mut orders) = Operator::new();
    let starting = node::start(node_settings(settings, parts)?);
    let node = tokio::select! {
        started = starting => started.map_err(|error| failed(EXIT_FAILED, error))?,
        () = signals.next() => return Ok(()),
    };
    let (stop, stopped) = oneshot::channel();
    let endpoint = http.map(|socket| listen(socket, &node, operator, api, serving, stopped)).transpose();
    let endpoint = endpoint
        .map_err(|error| failed(EXIT_FAILED, format_args!("the HTTP endpoint cannot start: {error}")))?;
    until_drained(&mut signals, &mut orders, &mut reload, &node).await;
    let drain_timeout = reload.drain_timeout;
    tracing::info!(at_most = ?drain_timeout, "draining: finishing what runs, refusing what comes");
    let finish = async {
        // The endpoint is gone already where the process has none.
        let _ = stop.send(());
        tokio::join!(node.drain(drain_timeout), async {
            if let Some(endpoint) = endpoint {
                // A panic of its task was logged when it happened.
                let _ = endpoint.await;
            }
        });
    };
    tokio::select! {
        drained = tokio::time::timeout(drain_timeout, finish) => {
            if drained.is_err() {
                tracing::warn!(after = ?drain_timeout, "requests still run; they end here");
            }
        }
        () = signals.next() => {
            tracing::warn!("a second signal: ending at once");
            return Ok(());
        }
    }
    tokio::select! {
        () = node.shutdown() => tracing::info!("left the cluster"),
        () = signals.next() => tracing::warn!("a second signal: ending at once"),
    }
    Ok(())
}

/// Does what is ordered until it is to end.
async fn until_drained(
    signals: &mut Signals,
    orders: &mut mpsc::Receiver<Order>,
    reload: &mut Reload,
    node: &NodeHandle,
) {
    let in_terminal = io::stderr().is_terminal();
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => return,
            _ = signals.interrupt.recv() => return,
            _ = signals.hangup.recv() => {
                if in_terminal && !io::stderr().is_terminal() {
                    tracing::info!("the terminal was closed");
                    return;
                }
                // Why not is in the log.
                let _ = reload.reload(node);
            }
            // Without an endpoint nobody orders anything.
            Some(order) = orders.recv() => match order {
                Order::Reload(done) => {
                    // Who asked may have gone.
                    let _ = done.send(reload.reload(node));
                }
                Order::Drain => {
                    tracing::info!("an administrator has this process end");
                    return;
                }
            },
        }
    }
}

/// Asks the system for descriptors, and says how many connections they are enough for.
fn connections_max() -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(DESCRIPTORS, |maximum| maximum.min(DESCRIPTORS));
    let mut had = current.unwrap_or(u64::MAX);
    if had < wanted {
        match setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum }) {
            Ok(()) => had = wanted,
            Err(error) => tracing::warn!(%error, had, wanted, "the system gives no more descriptors"),
        }
    }
    let most = ServeSettings::default().connections_max;
    let room = had.saturating_sub(DESCRIPTORS_KEPT).max(had / 2);
    usize::try_from(room).map_or(most, |room| most.min(room))
}

/// Takes a port without answering on it: a port in use is found out before minutes of loading.
fn take_port(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Or a restart would wait for the last connections' TIME_WAIT to pass.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

fn listen(
    socket: TcpSocket,
    node: &NodeHandle,
    operator: Operator,
    settings: ApiSettings,
    serving: ServeSettings,
    stopped: oneshot::Receiver<()>,
) -> io::Result<tokio::task::JoinHandle<io::Result<()>>> {
    let listener: TcpListener = socket.listen(BACKLOG)?;
    let app = api::app(ApiState {
        generate: Arc::new(node.clone()),
        embed: Arc::new(node.clone()),
        directory: Arc::new(node.clone()),
        sessions: Arc::new(node.clone()),
        operate: Arc::new(operator),
        settings,
    });
    Ok(tokio::spawn(api::serve(listener, app, serving, async {
        // A dropped sender means the same.
        let _ = stopped.await;
    })))
}

fn node_settings(settings: Settings, Parts { engine, pipeline }: Parts) -> Result<NodeSettings, ExitCode> {
    let mut id = [0; 16];
    getrandom::fill(&mut id)
        .map_err(|error| failed(EXIT_FAILED, format_args!("the system gives no random numbers: {error}")))?;
    Ok(NodeSettings {
        name: settings.name,
        cluster: settings.cluster,
        id: NodeId(u128::from_le_bytes(id)),
        roles: settings.roles,
        hardware: hardware::describe(),
        listen: settings.listen,
        keys: settings.keys,
        dispatch: settings.dispatch,
        wait_for_model: engine.is_some(),
        engine: engine.map(|engine| Arc::new(engine) as Arc<dyn StartEngine>),
        model_load_time_max: MODEL_LOAD_TIME_MAX,
        engine_silence_max: ENGINE_SILENCE_MAX,
        mdns: settings.mdns,
        peers: settings.peers,
        interfaces: settings.interfaces,
        pipeline,
    })
}

/// Why a pipeline cannot have `links = "jaccl"` on this machine.
const NO_JACCL: &str = "links = \"jaccl\": MLX has no JACCL on this machine, which takes macOS 26.2 or later with Thunderbolt 5 \
                        and `rdma_ctl enable`; use \"tunnel\", or \"direct\" on a network that nobody else is on";

/// What serves a model: an engine, or this node's part in a pipeline.
#[derive(Debug, Default)]
struct Parts {
    engine: Option<EngineCommandLine>,
    pipeline: Option<PipelineSettings>,
}

fn parts(settings: &Settings, model: &ModelSettings) -> Result<Parts, ExitCode> {
    let command = EngineCommand::find(model)?;
    let Some(pipeline) = &settings.pipeline else {
        return Ok(Parts { engine: Some(command.of(None)), pipeline: None });
    };
    if pipeline.links == Links::Jaccl && !Backend::Jaccl.is_available() {
        return Err(failed(EXIT_USAGE, format_args!("pipeline of {:?}: {NO_JACCL}", pipeline.model)));
    }
    let rows = pipeline.rows.clone().fixed().unwrap_or(settings.max_batch);
    let pipeline = PipelineSettings {
        model: model.engine.name.clone(),
        members: pipeline.members(),
        goal: match pipeline.goal {
            Goal::Throughput => placement::Goal::Throughput { rows },
            Goal::Latency => placement::Goal::Latency,
        },
        rows,
        kv_tokens: pipeline.kv_tokens.into(),
        memory_bytes: pipeline.memory.clone().fixed().map(|bytes| bytes.0),
        forced: pipeline.forced,
        links: pipeline.links(),
        command: Arc::new(command),
    };
    Ok(Parts { engine: None, pipeline: Some(pipeline) })
}

/// How engine processes are started: with this same program.
#[derive(Debug)]
struct EngineCommand {
    program: PathBuf,
    settings: EngineProcessSettings,
}

impl EngineCommand {
    /// Finds the model's files, downloading them if need be.
    fn find(model: &ModelSettings) -> Result<Self, ExitCode> {
        /// At most one line of progress in this time.
        const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
        let mut told = Instant::now();
        let mut progress = |what: &str, fraction: f32| {
            if told.elapsed() >= PROGRESS_INTERVAL {
                told = Instant::now();
                tracing::info!(what, percent = (fraction * 100.0).round(), "fetching the model");
            }
        };
        let path = mlx::hub::resolve(&model.source, model.offline, &mut progress)
            .map_err(|error| failed(EXIT_FAILED, error))?;
        let settings = EngineProcessSettings { model: path, ..model.engine.clone() };
        let program = std::env::current_exe().map_err(|error| {
            failed(EXIT_FAILED, format_args!("cannot find this program's own file: {error}"))
        })?;
        Ok(Self { program, settings })
    }

    fn of(&self, task: Option<RankTask>) -> EngineCommandLine {
        let settings = EngineProcessSettings { task, ..self.settings.clone() };
        let json = serde_json::to_string(&settings).expect("settings are plain data");
        EngineCommandLine {
            program: self.program.clone(),
            args: ["engine", "--settings", &json].map(Into::into).to_vec(),
            env: Vec::new(),
        }
    }
}

impl RankCommand for EngineCommand {
    fn task(&self, task: &RankTask) -> EngineCommandLine {
        self.of(Some(task.clone()))
    }

    fn whole(&self) -> EngineCommandLine {
        self.of(None)
    }
}

fn say_where_the_key_is_from(settings: &Settings) {
    let fingerprint = settings.keys.own.fingerprint();
    if let Some(other) = &settings.keys.other {
        tracing::info!(fingerprint = other.fingerprint(), "a second cluster key is taken from others, too");
    }
    match &settings.key_origin {
        KeyOrigin::Random(looked) => {
            let file =
                looked.as_ref().map_or_else(|| "key_file".to_owned(), |path| path.display().to_string());
            tracing::info!(
                "no cluster key ({file} is not there): running alone. To form a cluster, run `mlx-node key new` and \
                 copy the key to every machine"
            );
        }
        KeyOrigin::Setting => tracing::info!(%fingerprint, "cluster key from cluster_key"),
        KeyOrigin::File(path) => {
            tracing::info!(%fingerprint, file = %path.display(), "cluster key");
            if key::is_exposed(path) {
                tracing::warn!(
                    "other users of this machine may read the cluster key: chmod 600 {}",
                    path.display()
                );
            }
        }
    }
}

/// HTTP keys that stand in the settings as they are: they work, but whoever reads the file has them.
fn warn_of_plain_keys(source: &Source, values: &Values) {
    let all = values.api_keys.0.iter().chain(values.keys.iter().map(|entry| &entry.key));
    let plain = all.filter(|key| !KeyHash::is_written(&key.0)).count();
    if plain == 0 {
        return;
    }
    tracing::info!(
        keys = plain,
        "HTTP keys stand in the settings as they are; `mlx-node key hash` makes hashes of them"
    );
    if let Some(path) = config::used_file(source.file.as_deref()).filter(|path| key::is_exposed(path)) {
        tracing::warn!("other users of this machine may read the keys in it: chmod 600 {}", path.display());
    }
}

/// SIGTERM and SIGINT, and apart from them SIGHUP.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        let [terminate, interrupt, hangup] =
            [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
        Ok(Self { terminate: terminate?, interrupt: interrupt?, hangup: hangup? })
    }

    /// Resolves with the next of the first two.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
