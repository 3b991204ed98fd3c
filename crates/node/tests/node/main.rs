//! Whole nodes in one process: real engine children, real sockets on loopback, made-up models.

mod compiling;
mod embeddings;
mod failover;
mod knowledge;
mod queue;
mod sessions;

use futures_util::StreamExt;
use node::{DispatchSettings, EngineCommandLine, NodeHandle, NodeSettings, StartError, start};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use testkit::{FakeSettings, check_stream};
use transport::ClusterKey;
use types::{
    CacheScope, Directory, EngineState, FinishReason, Generate, GenerateDraft, GenerateError,
    GenerateRequest, Generation, NodeId, OutputRules, RequestId, Role, SamplingParams, Service, Speculation,
    TokenEvent, TokenReport, limits,
};

const MODEL: &str = "fake";
/// Nothing here should take so long.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the engine children's program is: built with the tests, beside them.
fn fake_engine() -> PathBuf {
    let test = std::env::current_exe().expect("this test has a path");
    let target = test.parent().and_then(Path::parent).expect("tests are in target/PROFILE/deps");
    target.join("examples").join("fake_engine")
}

struct Cluster {
    folder: tempfile::TempDir,
    key: ClusterKey,
    nodes: Vec<NodeHandle>,
}

struct Engine {
    model: &'static str,
    load_ms: u64,
    step_ms: u64,
    slots: u32,
    failure: Option<&'static str>,
}

const ENGINE: Engine = Engine { model: MODEL, load_ms: 60, step_ms: 10, slots: 4, failure: None };

impl Cluster {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self { folder, key: ClusterKey::generate().expect("random numbers"), nodes: Vec::new() }
    }

    fn pid_file(&self, index: usize) -> PathBuf {
        self.folder.path().join(format!("{index}.pid"))
    }

    fn settings(&self, engine: &Engine, roles: &[Role]) -> NodeSettings {
        let index = self.nodes.len();
        let mut args = vec![
            engine.model.into(),
            engine.load_ms.to_string().into(),
            engine.step_ms.to_string().into(),
            engine.slots.to_string().into(),
            self.pid_file(index).into_os_string(),
        ];
        args.extend(engine.failure.map(Into::into));
        NodeSettings {
            name: format!("node-{index}"),
            cluster: "test".to_owned(),
            id: NodeId(index as u128 + 1),
            roles: roles.to_vec(),
            hardware: "none".to_owned(),
            listen: ([127, 0, 0, 1], 0).into(),
            keys: self.key.clone().into(),
            engine: Some(Arc::new(EngineCommandLine { program: fake_engine(), args, env: Vec::new() })),
            dispatch: DispatchSettings::default(),
            wait_for_model: true,
            model_load_time_max: Duration::from_secs(10),
            engine_silence_max: Duration::from_secs(3),
            mdns: false,
            peers: self.nodes.iter().map(|node| node.local_address().to_string()).collect(),
            interfaces: Vec::new(),
            pipeline: None,
        }
    }

    /// Adds a node that dials all those before it.
    async fn add(&mut self, engine: &Engine, roles: &[Role]) -> usize {
        let settings = self.settings(engine, roles);
        self.nodes.push(start(settings).await.expect("the node starts"));
        self.nodes.len() - 1
    }

    /// The first node routes; waits until it knows that many ready ones.
    async fn ready(&self, count: usize) {
        let ready = || {
            let view = self.nodes[0].view();
            view.nodes.iter().filter(|node| node.engine == EngineState::Ready && node.load.is_some()).count()
                == count
        };
        eventually(&format!("{count} ready nodes"), ready).await;
    }

    fn kill_engine(&self, index: usize) {
        self.signal_engine(index, "-KILL");
    }

    fn signal_engine(&self, index: usize, signal: &str) {
        let pid = std::fs::read_to_string(self.pid_file(index)).expect("the engine wrote its id");
        let killed = std::process::Command::new("kill").args([signal, &pid]).status().expect("kill exists");
        assert!(killed.success());
    }

    async fn shutdown(self) {
        for node in &self.nodes {
            node.shutdown().await;
        }
    }
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn request(id: u128, max_tokens: u32) -> GenerateRequest {
    let draft = GenerateDraft {
        id: RequestId(id),
        model: MODEL.to_owned(),
        // None of the tokens that make the fake engine fail.
        prompt: (0..40).map(|index| (index + id as u32 * 7) % 989 + 1).collect(),
        sampling: SamplingParams::greedy(),
        max_tokens,
        stop_tokens: Vec::new(),
        ignore_eos: false,
        service: Service::default(),
        cache: CacheScope::default(),
        output: Vec::new(),
        rules: OutputRules::default(),
        report: TokenReport::default(),
        speculation: Speculation::default(),
    };
    GenerateRequest::try_from(draft).expect("a valid request")
}

async fn collect(generation: Generation) -> Vec<TokenEvent> {
    tokio::time::timeout(PATIENCE, generation.events.collect()).await.expect("the stream ends")
}

/// The stream is whole, and its text is what the model gives whatever runs beside it.
fn check_text(request: &GenerateRequest, events: &[TokenEvent]) {
    let (tokens, finish) = check_stream(events).expect("a proper stream");
    let expected = FakeSettings::default().output(request);
    assert_eq!((tokens, finish.reason), (expected.tokens, expected.reason));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_node_serves_its_own_requests() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Node, Role::Router]).await;
    cluster.ready(1).await;
    let node = &cluster.nodes[0];
    assert!(node.ready());
    let card = node.models().pop().expect("a model");
    let assets = node.assets(card.assets).await.expect("its tokenizer");
    assert_eq!((card.name.as_str(), assets.hash()), (MODEL, card.assets));
    let rates = node.view().nodes[0].load.expect("a load").rates;
    assert!((0.009..0.05).contains(&rates.decode_step_s), "measured about 10 ms a step: {rates:?}");
    let request = request(1, 20);
    let generation = node.generate(request.clone()).await.expect("accepted");
    assert_eq!(generation.route.node_name, "node-0");
    check_text(&request, &collect(generation).await);
    let unknown = GenerateDraft { model: "other".to_owned(), ..request.clone().into() };
    let error = node.generate(unknown.try_into().expect("valid")).await.expect_err("unknown");
    assert_eq!(
        error,
        GenerateError::UnknownModel { model: "other".to_owned(), served: vec![MODEL.to_owned()] }
    );
    let long = GenerateDraft { max_tokens: 8192, ..request.into() };
    let error = node.generate(long.try_into().expect("valid")).await.expect_err("too long");
    assert!(matches!(error, GenerateError::ContextExceeded { context_tokens: 8192, .. }), "{error}");
    eventually("no request is left", || node.view().in_flight == 0).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_cannot_be_loaded_is_an_error_at_the_start() {
    let check = async |failure: &'static str, expected: &str| {
        let cluster = Cluster::new();
        let settings =
            cluster.settings(&Engine { failure: Some(failure), ..ENGINE }, &[Role::Node, Role::Router]);
        match start(settings).await {
            Err(StartError::Engine { message }) => assert_eq!(message, expected),
            other => panic!("expected an error, got {other:?}"),
        }
    };
    check("weights.bin: no such file", "weights.bin: no such file").await;
    check("panic", "panicked: as asked").await;
    let cluster = Cluster::new();
    let mut settings = cluster.settings(&ENGINE, &[Role::Node]);
    let program = "/nonexistent/engine".into();
    settings.engine = Some(Arc::new(EngineCommandLine { program, args: Vec::new(), env: Vec::new() }));
    let error = start(settings).await.expect_err("no such program").to_string();
    assert!(error.contains("cannot start /nonexistent/engine"), "{error}");
    let mut settings = cluster.settings(&Engine { load_ms: 60_000, ..ENGINE }, &[Role::Node]);
    settings.model_load_time_max = Duration::from_millis(300);
    let error = start(settings).await.expect_err("too slow").to_string();
    assert!(error.contains("was not ready in time"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_list_each_other_and_themselves_are_connected_once() {
    let port = || {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a free port");
        socket.local_addr().expect("bound").port()
    };
    let ports = [port(), port()];
    let mut cluster = Cluster::new();
    for port in ports {
        let mut settings = cluster.settings(&ENGINE, &[Role::Node, Role::Router]);
        settings.listen = ([127, 0, 0, 1], port).into();
        settings.peers = ports
            .iter()
            .flat_map(|port| [format!("127.0.0.1:{port}"), format!("localhost:{port}")])
            .collect();
        cluster.nodes.push(start(settings).await.expect("the node starts"));
    }
    for node in &cluster.nodes {
        eventually("both see both", || {
            let view = node.view();
            view.nodes.len() == 2 && view.nodes.iter().all(|node| node.engine == EngineState::Ready)
        })
        .await;
        assert_eq!(node.view().nodes.iter().filter(|node| node.local).count(), 1);
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    for node in &cluster.nodes {
        assert_eq!(node.view().nodes.len(), 2, "still there after duplicates were dropped");
    }
    cluster.shutdown().await;
}

#[test]
fn an_engine_ends_with_its_parent() {
    let check = |load_ms: &str, wait: Duration, bound: Duration| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut child = std::process::Command::new(fake_engine())
            .args([MODEL, load_ms, "10", "4"])
            .arg(folder.path().join("pid"))
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("the engine starts");
        std::thread::sleep(wait);
        assert_eq!(child.try_wait().expect("its state"), None, "it waits for commands");
        drop(child.stdin.take());
        let dropped = Instant::now();
        while child.try_wait().expect("its state").is_none() {
            if dropped.elapsed() > bound {
                child.kill().expect("killed");
                panic!("still there after {bound:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    check("30", Duration::from_millis(800), Duration::from_secs(2));
    // In the middle of loading, after the time given to it.
    check("60000", Duration::from_millis(100), Duration::from_secs(8));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_request_leaves_the_engine_within_two_steps() {
    let mut cluster = Cluster::new();
    // Long steps, so that a busy machine is no matter.
    let step_ms = 250;
    cluster.add(&Engine { step_ms, ..ENGINE }, &[Role::Node, Role::Router]).await;
    cluster.add(&Engine { step_ms, ..ENGINE }, &[Role::Node]).await;
    cluster.ready(2).await;
    let node = &cluster.nodes[0];
    let running =
        || node.view().nodes.iter().map(|node| node.load.map_or(0, |load| load.running)).sum::<u32>();
    let mut generations = Vec::new();
    for id in 0..2 {
        generations.push(node.generate(request(id, 1000)).await.expect("accepted"));
    }
    let places: Vec<NodeId> = generations.iter().map(|generation| generation.route.node).collect();
    assert_ne!(places[0], places[1], "one here, one over the network");
    for generation in &mut generations {
        assert!(generation.events.next().await.is_some());
    }
    eventually("both run", || running() == 2).await;
    drop(generations);
    let dropped = Instant::now();
    eventually("none runs", || running() == 0).await;
    // Two steps, and one report of load.
    let bound = Duration::from_millis(2 * step_ms) + limits::LOAD_INTERVAL_MIN;
    assert!(dropped.elapsed() < bound, "took {:?}", dropped.elapsed());
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_spread_over_two_nodes() {
    let mut cluster = Cluster::new();
    for _ in 0..2 {
        let mut settings = cluster.settings(&ENGINE, &[Role::Node, Role::Router]);
        // How fast they write is measured, on a machine that may do other things meanwhile; it counts for nothing here.
        settings.dispatch.router.cost.decode = 0.0;
        cluster.nodes.push(start(settings).await.expect("the node starts"));
    }
    cluster.ready(2).await;
    let mut served = BTreeMap::<String, u32>::new();
    let mut running = Vec::new();
    for id in 0..8 {
        let request = request(id, 30);
        let generation = cluster.nodes[0].generate(request.clone()).await.expect("accepted");
        *served.entry(generation.route.node_name.clone()).or_default() += 1;
        running.push((request, tokio::spawn(collect(generation))));
    }
    for (request, events) in running {
        check_text(&request, &events.await.expect("no panic"));
    }
    // Half of them each; one more or less where one was slower to read.
    assert!(served.len() == 2 && served.values().all(|count| (3..=5).contains(count)), "{served:?}");
    let hash = cluster.nodes[0].models()[0].assets;
    assert!(cluster.nodes[0].assets(hash).await.is_ok());
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_finishes_what_runs_and_refuses_the_rest() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Node, Role::Router]).await;
    cluster.add(&ENGINE, &[Role::Node, Role::Router]).await;
    cluster.ready(2).await;
    let mut running = Vec::new();
    for id in 0..2 {
        let request = request(id, 60);
        let generation = cluster.nodes[0].generate(request.clone()).await.expect("accepted");
        running.push((request, tokio::spawn(collect(generation))));
    }
    let leaving = cluster.nodes[1].clone();
    let drained = tokio::spawn(async move { leaving.drain(PATIENCE).await });
    eventually("the router knows", || {
        cluster.nodes[0].view().nodes.iter().any(|node| node.engine == EngineState::Draining)
    })
    .await;
    for id in 10..14 {
        let generation = cluster.nodes[0].generate(request(id, 5)).await.expect("accepted");
        assert_eq!(generation.route.node_name, "node-0");
    }
    assert!(matches!(
        cluster.nodes[1].generate(request(20, 5)).await,
        Err(GenerateError::Unavailable { .. })
    ));
    assert!(drained.await.expect("no panic"), "drained in time");
    for (request, events) in running {
        check_text(&request, &events.await.expect("no panic"));
    }
    cluster.shutdown().await;
}

/// Generated is not read: what a slow consumer has not asked for yet must have left the node before the node goes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_that_is_not_read_yet_survives_the_end_of_its_node() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Router]).await;
    cluster.add(&Engine { step_ms: 0, ..ENGINE }, &[Role::Node]).await;
    cluster.ready(1).await;
    let mut running = Vec::new();
    for id in 0..4 {
        let request = request(id, 1500);
        running.push((request.clone(), cluster.nodes[0].generate(request).await.expect("accepted")));
    }
    assert!(cluster.nodes[1].drain(PATIENCE).await, "drained in time");
    cluster.nodes[1].shutdown().await;
    eventually("the node is gone", || cluster.nodes[0].view().nodes.is_empty()).await;
    for (request, generation) in running {
        check_text(&request, &collect(generation).await);
    }
    cluster.shutdown().await;
}
