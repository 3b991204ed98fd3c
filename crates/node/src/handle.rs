//! Starting a node, and what its process holds of it.

use crate::assets::AssetsCache;
use crate::discovery_actor::{DiscoveryActor, DiscoveryActorSettings, DiscoveryMsg};
use crate::dispatch::Dispatch;
use crate::engine_actor::EngineActorSettings;
use crate::engine_handle::EngineHandle;
use crate::generate::RouterHandle;
use crate::node_actor::{NodeActor, NodeActorSettings, NodeMsg, Serves};
use crate::peer::PeerSource;
use crate::pipeline::{EngineTimes, PipelineHost};
use crate::router_actor::{RouterActor, RouterActorSettings, RouterMsg};
use crate::settings::{ACTOR_STOP_TIME_MAX, NodeSettings, StartError};
use crate::uplink::{Claims, UplinkSettings};
use discovery::DiscoverySettings;
use ractor::{Actor, ActorRef};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use transport::{ClusterKeys, Endpoint, TransportError};
use types::{
    AssetsHash, BoxFuture, ClusterView, Directory, Embed, EmbedRequest, Embeddings, Generate, GenerateError,
    GenerateRequest, Generation, ModelAssets, ModelCard, NodeId, Role, RoutePlan, SessionAnswers,
    SessionRequest, Sessions,
};
use wire::Hello;

/// While draining, how often it is checked whether requests are left at this process's router.
const DRAIN_CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// A running node. Clones share it; [`NodeHandle::shutdown`] ends it.
#[derive(Clone)]
pub struct NodeHandle {
    id: NodeId,
    cluster: String,
    endpoint: Endpoint,
    /// Of the cluster's keys, for whom discovery announces and takes for a peer.
    fingerprints: watch::Sender<Vec<String>>,
    engine: Option<(EngineHandle, ActorRef<NodeMsg>)>,
    router: Option<(RouterHandle, ActorRef<RouterMsg>)>,
    discovery: ActorRef<DiscoveryMsg>,
}

/// Starts all parts that the roles ask for.
///
/// # Errors
/// [`StartError`]; nothing is left running then.
pub async fn start(settings: NodeSettings) -> Result<NodeHandle, StartError> {
    let endpoint = Endpoint::bind(settings.listen, &settings.keys)?;
    start_on(endpoint, settings).await
}

/// The same on an endpoint of the caller's, whatever [`NodeSettings::listen`] says.
///
/// # Errors
/// [`StartError`]; nothing is left running then but the endpoint.
pub async fn start_on(endpoint: Endpoint, settings: NodeSettings) -> Result<NodeHandle, StartError> {
    let is = |role| settings.roles.contains(&role);
    if settings.roles.is_empty() {
        return Err(StartError::NoRole);
    }
    let hello = Hello {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        node: settings.id,
        name: settings.name.clone(),
        cluster: settings.cluster.clone(),
        roles: settings.roles.clone(),
        hardware: settings.hardware.clone(),
    };
    let (fingerprints, watched) = watch::channel(settings.keys.fingerprints());
    let mut parts = Parts { endpoint: endpoint.clone(), engine: None, router: None, discovery: None };
    let started = parts.start(&settings, hello, watched, is(Role::Node), is(Role::Router)).await;
    match (started, parts) {
        (Ok(()), Parts { engine, router, discovery: Some(discovery), .. }) => {
            let engine = engine.map(|(engine, actor, _)| (engine, actor));
            let (id, cluster) = (settings.id, settings.cluster);
            Ok(NodeHandle { id, cluster, endpoint, fingerprints, engine, router, discovery })
        }
        (Err(error), parts) => {
            parts.stop("this node cannot start").await;
            Err(error)
        }
        (Ok(()), parts) => {
            parts.stop("this node cannot start").await;
            Err(StartError::Actor { message: "discovery is missing".to_owned() })
        }
    }
}

type EnginePart = (EngineHandle, ActorRef<NodeMsg>, watch::Receiver<crate::engine_handle::NodeReport>);

struct Parts {
    endpoint: Endpoint,
    engine: Option<EnginePart>,
    router: Option<(RouterHandle, ActorRef<RouterMsg>)>,
    discovery: Option<ActorRef<DiscoveryMsg>>,
}

impl Parts {
    async fn start(
        &mut self,
        settings: &NodeSettings,
        hello: Hello,
        fingerprints: watch::Receiver<Vec<String>>,
        is_node: bool,
        is_router: bool,
    ) -> Result<(), StartError> {
        let dispatch =
            is_router.then(|| Arc::new(Dispatch::new(settings.cluster.clone(), settings.dispatch.clone())));
        let mut pipeline = None;
        if is_node {
            let handle = EngineHandle::new();
            let (reports, watched) = watch::channel(handle.report());
            let serves = match &settings.pipeline {
                Some(of) => {
                    let dispatch = dispatch.clone().ok_or(StartError::PipelineRoles)?;
                    let host = PipelineHost::new(of.clone(), settings.id, dispatch, handle.clone());
                    pipeline = Some(host.clone());
                    let times = EngineTimes {
                        load_max: settings.model_load_time_max,
                        silence_max: settings.engine_silence_max,
                    };
                    Serves::Pipeline(host, settings.name.clone(), times)
                }
                None => Serves::Engine(EngineActorSettings {
                    starter: settings.engine.clone().ok_or(StartError::NoEngine)?,
                    load_time_max: settings.model_load_time_max,
                    silence_max: settings.engine_silence_max,
                }),
            };
            let arguments = NodeActorSettings { serves, handle: handle.clone(), reports };
            let (actor, _) = Actor::spawn(None, NodeActor, arguments).await?;
            self.engine = Some((handle.clone(), actor, watched));
            if settings.wait_for_model && pipeline.is_none() {
                wait_for_model(&handle).await?;
            }
        }
        let engine = self.engine.as_ref();
        if let Some(dispatch) = dispatch {
            let local = engine.map(|(engine, _, reports)| PeerSource::Local {
                hello: hello.clone(),
                engine: engine.clone(),
                reports: reports.clone(),
            });
            let endpoint = self.endpoint.clone();
            let arguments =
                RouterActorSettings { endpoint, hello: hello.clone(), dispatch: dispatch.clone(), local };
            let (actor, _) = Actor::spawn(None, RouterActor, arguments).await?;
            let router = RouterHandle { dispatch, assets: Arc::new(AssetsCache::new()) };
            self.router = Some((router, actor));
        }
        let discovery = discovery::start(DiscoverySettings {
            cluster: settings.cluster.clone(),
            id: settings.id,
            name: settings.name.clone(),
            fingerprints,
            roles: settings.roles.clone(),
            port: self.endpoint.local_address().port(),
            mdns: settings.mdns,
            peers: settings.peers.clone(),
            interfaces: settings.interfaces.clone(),
        })?;
        let uplinks = engine.map(|(engine, _, reports)| UplinkSettings {
            endpoint: self.endpoint.clone(),
            hello,
            engine: engine.clone(),
            reports: reports.clone(),
            claims: Claims::default(),
            pipeline: pipeline.clone(),
        });
        let arguments = DiscoveryActorSettings { discovery, id: settings.id, uplinks };
        let (actor, _) = Actor::spawn(None, DiscoveryActor, arguments).await?;
        self.discovery = Some(actor);
        Ok(())
    }

    async fn stop(self, reason: &str) {
        let node = self.engine.map(|(_, actor, _)| actor);
        stop_all(
            self.discovery.as_ref(),
            self.router.map(|it| it.1).as_ref(),
            node.as_ref(),
            &self.endpoint,
            reason,
        )
        .await;
    }
}

async fn wait_for_model(engine: &EngineHandle) -> Result<(), StartError> {
    let mut changes = engine.changes();
    loop {
        if engine.is_ready() {
            return Ok(());
        }
        if let Some(message) = engine.failure() {
            return Err(StartError::Engine { message });
        }
        // Bounded by the time the engine has for loading.
        if changes.changed().await.is_err() {
            return Err(StartError::Engine { message: "its supervisor is gone".to_owned() });
        }
    }
}

/// Discovery first, so that nobody dials what is about to go; the engine last but for the sockets.
async fn stop_all(
    discovery: Option<&ActorRef<DiscoveryMsg>>,
    router: Option<&ActorRef<RouterMsg>>,
    node: Option<&ActorRef<NodeMsg>>,
    endpoint: &Endpoint,
    reason: &str,
) {
    async fn stop<M>(name: &str, actor: Option<&ActorRef<M>>) {
        let Some(actor) = actor else { return };
        if let Err(error) = actor.stop_and_wait(None, Some(ACTOR_STOP_TIME_MAX * 2)).await {
            tracing::warn!(%error, "{name} does not stop");
        }
    }
    stop("discovery", discovery).await;
    stop("the node", node).await;
    stop("the router", router).await;
    endpoint.close(reason).await;
}

impl NodeHandle {
    /// This process's id.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Where its QUIC endpoint listens.
    pub fn local_address(&self) -> SocketAddr {
        self.endpoint.local_address()
    }

    /// Goes over to other keys of the cluster; [`Endpoint::rekey`] says what becomes of connections that are up.
    ///
    /// # Errors
    /// Where the transport refuses; nothing is changed then.
    pub fn rekey(&self, keys: &ClusterKeys) -> Result<(), TransportError> {
        self.endpoint.rekey(keys)?;
        self.fingerprints.send_replace(keys.fingerprints());
        Ok(())
    }

    /// Whether a model can answer: any node's for a router, its own for a node without the router role.
    pub fn ready(&self) -> bool {
        match (&self.router, &self.engine) {
            (Some((router, _)), _) => !router.models().is_empty(),
            (None, Some((engine, _))) => engine.is_ready(),
            (None, None) => false,
        }
    }

    /// Takes nothing new, tells all routers, and waits until what runs here has ended and arrived; false if that was not
    /// by `deadline`. What waits at this router is given half of the time to find a node, this one included.
    pub async fn drain(&self, deadline: Duration) -> bool {
        let end = Instant::now() + deadline;
        if let Some((router, _)) = &self.router {
            router.dispatch.drain();
            let served = async {
                while router.dispatch.waiting() > 0 {
                    sleep(DRAIN_CHECK_INTERVAL).await;
                }
            };
            // Those that remain fail as the last node leaves.
            let _ = timeout(deadline / 2, served).await;
        }
        if let Some((engine, actor)) = &self.engine
            && actor.send_message(NodeMsg::Drain).is_err()
        {
            engine.drain();
        }
        let ended = async {
            while self.open_requests() > 0 {
                sleep(DRAIN_CHECK_INTERVAL).await;
            }
        };
        timeout_at(end, ended).await.is_ok()
    }

    /// Ends everything: goodbye to the others, the engine child, all connections. Requests that still run break off.
    /// Takes a bounded time.
    pub async fn shutdown(&self) {
        let node = self.engine.as_ref().map(|(_, actor)| actor);
        let router = self.router.as_ref().map(|(_, actor)| actor);
        stop_all(Some(&self.discovery), router, node, &self.endpoint, "this node is leaving").await;
    }

    fn open_requests(&self) -> usize {
        let engine = self.engine.as_ref().map_or(0, |(engine, _)| engine.open_requests());
        let router = self.router.as_ref().map_or(0, |(router, _)| router.dispatch.open_requests());
        engine + router
    }
}

impl std::fmt::Debug for NodeHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeHandle").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Generate for NodeHandle {
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Generation, GenerateError>> {
        match &self.router {
            Some((router, _)) => router.generate(request),
            None => Box::pin(std::future::ready(Err(GenerateError::Unavailable {
                model: request.model.clone(),
                reason: "this process is not a router".to_owned(),
            }))),
        }
    }
}

impl Embed for NodeHandle {
    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embeddings, GenerateError>> {
        match &self.router {
            Some((router, _)) => router.embed(request),
            None => Box::pin(std::future::ready(Err(GenerateError::Unavailable {
                model: request.model.clone(),
                reason: "this process is not a router".to_owned(),
            }))),
        }
    }
}

impl Directory for NodeHandle {
    fn models(&self) -> Vec<ModelCard> {
        self.router.as_ref().map(|(router, _)| router.models()).unwrap_or_default()
    }

    fn assets(&self, hash: AssetsHash) -> BoxFuture<'_, Result<Arc<ModelAssets>, GenerateError>> {
        match &self.router {
            Some((router, _)) => router.assets(hash),
            None => Box::pin(std::future::ready(Err(GenerateError::Unavailable {
                model: hash.to_string(),
                reason: "this process is not a router".to_owned(),
            }))),
        }
    }

    fn plan(&self, request: &GenerateRequest) -> Result<RoutePlan, GenerateError> {
        match &self.router {
            Some((router, _)) => router.plan(request),
            None => Err(GenerateError::Unavailable {
                model: request.model.clone(),
                reason: "this process is not a router".to_owned(),
            }),
        }
    }

    fn view(&self) -> ClusterView {
        let empty = || ClusterView { cluster: self.cluster.clone(), ..ClusterView::default() };
        self.router.as_ref().map_or_else(empty, |(router, _)| router.view())
    }
}

impl Sessions for NodeHandle {
    fn sessions(&self, request: SessionRequest) -> BoxFuture<'_, SessionAnswers> {
        match &self.router {
            Some((router, _)) => router.sessions(request),
            None => Box::pin(std::future::ready(SessionAnswers::default())),
        }
    }
}
