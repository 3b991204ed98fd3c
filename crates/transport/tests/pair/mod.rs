//! A router and a node on loopback, joined.

use std::{future::Future, net::SocketAddr, time::Duration};
use transport::{ClusterKey, ControlReceiver, Endpoint, IncomingRequest, Peer, ReplySender, RouterLink};
use types::{
    CacheScope, GenerateDraft, GenerateRequest, NodeId, OutputRules, RequestId, Role, SamplingParams,
    Service, Speculation, TokenReport,
};
use wire::Hello;

/// Nothing here takes longer; a test that does has hung.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Pair {
    pub(crate) router: Endpoint,
    pub(crate) node: Endpoint,
    pub(crate) peer: Peer,
    pub(crate) reports: ControlReceiver,
    pub(crate) link: RouterLink,
}

pub(crate) fn hello(node: u128, name: &str) -> Hello {
    Hello {
        program: "0.1.0".to_owned(),
        node: NodeId(node),
        name: name.to_owned(),
        cluster: "home".to_owned(),
        roles: vec![Role::Node],
        hardware: "test".to_owned(),
    }
}

pub(crate) fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().expect("an address")
}

pub(crate) async fn pair() -> Pair {
    let key = ClusterKey::generate().expect("random numbers");
    let router = Endpoint::bind(loopback(), &key).expect("binds");
    let node = Endpoint::bind(loopback(), &key).expect("binds");
    let welcome = hello(1, "router");
    let accept = router.accept(&welcome);
    let (accepted, link) =
        within(async { tokio::join!(accept, node.join(router.local_address(), hello(2, "node"))) }).await;
    let (peer, reports) = accepted.expect("open");
    Pair { peer, reports, link: link.expect("joined"), router, node }
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it hangs")
}

pub(crate) fn request(id: u128) -> GenerateRequest {
    let draft = GenerateDraft {
        id: RequestId(id),
        model: "smollm2".to_owned(),
        prompt: vec![1, 2, 3],
        sampling: SamplingParams::greedy(),
        max_tokens: 1000,
        stop_tokens: Vec::new(),
        ignore_eos: false,
        service: Service::default(),
        cache: CacheScope::default(),
        output: Vec::new(),
        rules: OutputRules::default(),
        report: TokenReport::default(),
        speculation: Speculation::default(),
    };
    draft.try_into().expect("valid")
}

/// The next request, which must be one to generate.
pub(crate) async fn next_generate(link: &RouterLink) -> (GenerateRequest, ReplySender) {
    match within(link.next_request()).await {
        Some(IncomingRequest::Generate { request, replies }) => (*request, replies),
        other => panic!("expected a request, got {other:?}"),
    }
}
