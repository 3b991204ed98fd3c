//! A router as a node sees it: dialled, told how the node is, and served.
//!
//! One [`UplinkActor`] per router or configured address. Reports flow from the node actor's watch to the router, requests
//! from the router into the engine, each in a task of its own that lives as long as its stream. A router found twice, or
//! one that turns out to be this process, is connected to once, or not at all.

use crate::engine_handle::{EngineHandle, NodeReport};
use crate::pipeline::PipelineHost;
use crate::reports::Teller;
use crate::settings::{ACCEPT_HELD_MAX, REDIAL_DELAY, REDIAL_DELAY_MAX, REDIAL_DELAY_REFUSED};
use futures_util::StreamExt;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use transport::{Endpoint, IncomingRequest, JoinError, LinkClosed, ReplySender, RouterLink};
use types::{EmbedRequest, GenerateError, GenerateRequest, NodeId, TokenEvent};
use wire::{Hello, Reply};

/// What all uplinks of a node share.
#[derive(Clone)]
pub(crate) struct UplinkSettings {
    pub(crate) endpoint: Endpoint,
    pub(crate) hello: Hello,
    pub(crate) engine: EngineHandle,
    pub(crate) reports: watch::Receiver<NodeReport>,
    pub(crate) claims: Claims,
    /// What this node does for a pipeline.
    pub(crate) pipeline: Option<PipelineHost>,
}

/// Routers that some uplink is connected to.
#[derive(Clone, Default)]
pub(crate) struct Claims {
    routers: watch::Sender<BTreeSet<NodeId>>,
}

struct Claim {
    router: NodeId,
    claims: Claims,
}

impl Claims {
    fn claim(&self, router: NodeId) -> Option<Claim> {
        let new = self.routers.send_if_modified(|routers| routers.insert(router));
        new.then(|| Claim { router, claims: self.clone() })
    }

    async fn released(&self, router: NodeId) {
        // Fails only without a sender, and there is one here.
        let _ = self.routers.subscribe().wait_for(|routers| !routers.contains(&router)).await;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.routers.send_if_modified(|routers| routers.remove(&self.router));
    }
}

/// What became of a connection.
enum Served {
    /// It was of use until it ended.
    Joined,
    /// It led to this process.
    Itself,
    /// Another uplink has that router.
    Duplicate(NodeId),
}

pub(crate) struct UplinkActor;

pub(crate) enum UplinkMsg {
    /// Where the router is now.
    Found(Vec<SocketAddr>),
    /// It said goodbye, or nothing leads to it any more: when the connection ends it is not dialled again.
    Lost,
    /// The dialling task is over.
    Ended(DialEnd),
}

/// Why a router is not dialled any more.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum DialEnd {
    /// There was no address left.
    NoAddress,
    /// It is this process.
    Itself,
}

pub(crate) struct UplinkState {
    settings: UplinkSettings,
    addresses: watch::Sender<Vec<SocketAddr>>,
    task: JoinHandle<()>,
}

impl Actor for UplinkActor {
    type Msg = UplinkMsg;
    type State = UplinkState;
    type Arguments = (UplinkSettings, Vec<SocketAddr>);

    async fn pre_start(
        &self,
        myself: ActorRef<UplinkMsg>,
        (settings, addresses): Self::Arguments,
    ) -> Result<UplinkState, ActorProcessingErr> {
        let addresses = watch::Sender::new(addresses);
        let task = start_dialling(myself, &settings, &addresses);
        Ok(UplinkState { settings, addresses, task })
    }

    async fn handle(
        &self,
        myself: ActorRef<UplinkMsg>,
        message: UplinkMsg,
        state: &mut UplinkState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            UplinkMsg::Found(addresses) => lead_to(&state.addresses, addresses),
            UplinkMsg::Lost => lead_to(&state.addresses, Vec::new()),
            UplinkMsg::Ended(DialEnd::NoAddress) if !state.addresses.borrow().is_empty() => {
                // Found again as the task was ending.
                state.task = start_dialling(myself, &state.settings, &state.addresses);
            }
            UplinkMsg::Ended(_) => myself.stop(None),
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<UplinkMsg>,
        state: &mut UplinkState,
    ) -> Result<(), ActorProcessingErr> {
        state.task.abort();
        Ok(())
    }
}

/// Tells the dialling task, unless that is where it dials already.
fn lead_to(addresses: &watch::Sender<Vec<SocketAddr>>, now: Vec<SocketAddr>) {
    addresses.send_if_modified(|before| {
        let differs = *before != now;
        *before = now;
        differs
    });
}

fn start_dialling(
    actor: ActorRef<UplinkMsg>,
    settings: &UplinkSettings,
    addresses: &watch::Sender<Vec<SocketAddr>>,
) -> JoinHandle<()> {
    let (settings, addresses) = (settings.clone(), addresses.subscribe());
    tokio::spawn(async move {
        let end = dial(settings, addresses).await;
        // Fails only where the actor has stopped.
        let _ = actor.send_message(UplinkMsg::Ended(end));
    })
}

/// Dials until there is no address left, or the address turns out to be this process.
async fn dial(settings: UplinkSettings, mut addresses: watch::Receiver<Vec<SocketAddr>>) -> DialEnd {
    let mut delay = REDIAL_DELAY;
    let mut told = None;
    'dial: loop {
        let now = addresses.borrow_and_update().clone();
        if now.is_empty() {
            return DialEnd::NoAddress;
        }
        let mut wait = None;
        for address in now {
            match settings.endpoint.join(address, settings.hello.clone()).await {
                Ok(link) => {
                    (told, wait) = (None, None);
                    match serve(&settings, link).await {
                        Served::Joined => delay = REDIAL_DELAY,
                        Served::Itself => return DialEnd::Itself,
                        Served::Duplicate(router) => tokio::select! {
                            () = settings.claims.released(router) => {}
                            changed = addresses.changed() => match changed {
                                // Somebody else may be there.
                                Ok(()) => continue 'dial,
                                Err(_) => return DialEnd::NoAddress,
                            },
                        },
                    }
                    break;
                }
                Err(JoinError::Itself { .. }) => return DialEnd::Itself,
                Err(error) => {
                    if matches!(error, JoinError::Refused { .. } | JoinError::Key { .. }) {
                        wait = Some(REDIAL_DELAY_REFUSED);
                    }
                    let text = error.to_string();
                    if told.as_ref() != Some(&text) {
                        match wait {
                            Some(_) => tracing::warn!(%error, "cannot join a router"),
                            None => tracing::debug!(%error, "cannot join a router"),
                        }
                        told = Some(text);
                    }
                }
            }
        }
        // New addresses are tried at once.
        let wait = wait.unwrap_or(delay);
        delay = (delay * 2).min(REDIAL_DELAY_MAX);
        if let Ok(Err(_)) = timeout(wait, addresses.changed()).await {
            return DialEnd::NoAddress;
        }
    }
}

/// Serves a router until the connection ends.
async fn serve(settings: &UplinkSettings, link: RouterLink) -> Served {
    let router = link.router().node;
    if router == settings.hello.node {
        link.close("this is the same process");
        return Served::Itself;
    }
    let Some(claim) = settings.claims.claim(router) else {
        link.close("there is a connection already");
        return Served::Duplicate(router);
    };
    tracing::info!(router = %link.router().name, address = %link.remote_address(), "joined a router");
    let resync = Notify::new();
    let teller = Teller::new(settings.engine.clone());
    let reason = tokio::select! {
        LinkClosed { reason } = send_reports(&link, teller, settings.reports.clone(), &resync) => reason,
        () = serve_requests(&link, settings, &resync) => link.closed().await,
        reason = link.closed() => reason,
    };
    drop(claim);
    tracing::info!(router = %link.router().name, %reason, "left a router");
    Served::Joined
}

async fn send_reports(
    link: &RouterLink,
    mut teller: Teller,
    mut reports: watch::Receiver<NodeReport>,
    resync: &Notify,
) -> LinkClosed {
    loop {
        let report = reports.borrow_and_update().clone();
        for control in teller.news(report) {
            if let Err(closed) = link.send(control).await {
                return closed;
            }
        }
        tokio::select! {
            changed = reports.changed() => if changed.is_err() {
                return LinkClosed { reason: "this node is leaving".to_owned() };
            },
            () = resync.notified() => teller.forget_cache(),
        }
    }
}

/// Each request in a task of its own; all end with the connection. The transport bounds how many there are.
async fn serve_requests(link: &RouterLink, settings: &UplinkSettings, resync: &Notify) {
    let UplinkSettings { engine, pipeline, .. } = settings;
    let mut running = JoinSet::new();
    while let Some(request) = link.next_request().await {
        while running.try_join_next().is_some() {}
        match request {
            IncomingRequest::Generate { request, replies } => {
                running.spawn(serve_generate(engine.clone(), *request, replies));
            }
            IncomingRequest::Assets { hash, replies } => {
                let reply = match engine.assets(hash) {
                    Some(assets) => Reply::Assets((*assets).clone()),
                    None => Reply::Rejected(GenerateError::Unavailable {
                        model: hash.to_string(),
                        reason: "this node does not have these assets".to_owned(),
                    }),
                };
                running.spawn(serve_once(replies, std::future::ready(reply)));
            }
            IncomingRequest::Sessions { request, replies } => {
                let engine = engine.clone();
                running.spawn(serve_once(replies, async move {
                    engine.sessions(request).await.map_or_else(Reply::Rejected, Reply::Sessions)
                }));
            }
            IncomingRequest::Embed { request, replies } => {
                running.spawn(serve_embed(engine.clone(), *request, replies));
            }
            IncomingRequest::Measure { query, replies } => drop(match pipeline.clone() {
                Some(pipeline) => running.spawn(pipeline.serve_measure(query, replies)),
                None => running.spawn(refuse(replies)),
            }),
            IncomingRequest::Stage { order, replies } => drop(match pipeline.clone() {
                Some(pipeline) => running.spawn(pipeline.serve_stage(order, replies)),
                None => running.spawn(refuse(replies)),
            }),
            IncomingRequest::Tunnel(opening) => drop(match pipeline.clone() {
                Some(pipeline) => running.spawn(pipeline.serve_tunnel(opening)),
                None => running.spawn(opening.refuse(no_pipeline())),
            }),
            IncomingRequest::Resync { replies } => {
                resync.notify_one();
                running.spawn(serve_once(replies, std::future::ready(Reply::Resyncing)));
            }
        }
    }
}

async fn refuse(replies: ReplySender) {
    serve_once(replies, std::future::ready(Reply::Rejected(no_pipeline()))).await;
}

/// What is said to another node that takes this one for a member of its pipeline.
fn no_pipeline() -> GenerateError {
    let reason = "this node belongs to no pipeline".to_owned();
    GenerateError::Unavailable { model: "a pipeline's".to_owned(), reason }
}

/// One reply, unless the router does not wait for it.
async fn serve_once(mut replies: ReplySender, reply: impl Future<Output = Reply>) {
    let cancelled = replies.cancelled();
    let answer = async {
        // A router that is gone needs no answer.
        let _ = replies.send(reply.await).await;
    };
    tokio::select! {
        () = answer => {}
        () = cancelled => {}
    }
}

async fn serve_embed(engine: EngineHandle, request: EmbedRequest, replies: ReplySender) {
    let _delivery = engine.delivery();
    let arrived = replies.cancelled();
    serve_once(replies, async { engine.embed(request).await.map_or_else(Reply::Rejected, Reply::Embedded) })
        .await;
    // Bounded by the silence after which a connection ends.
    arrived.await;
}

async fn serve_generate(engine: EngineHandle, request: GenerateRequest, mut replies: ReplySender) {
    let id = request.id;
    let _delivery = engine.delivery();
    let mut events = match engine.generate(request) {
        Ok(events) => events,
        Err(error) => {
            tracing::debug!(request = %id, %error, "rejected");
            let _ = replies.send(Reply::Rejected(error)).await;
            return;
        }
    };
    tracing::debug!(request = %id, "taken for a router");
    let (cancelled, arrived) = (replies.cancelled(), replies.cancelled());
    let stream = async {
        let mut next = match timeout(ACCEPT_HELD_MAX, events.next()).await {
            Ok(first) => {
                replies.hold(&Reply::Accepted)?;
                first
            }
            Err(_) => {
                replies.send(Reply::Accepted).await?;
                events.next().await
            }
        };
        while let Some(event) = next {
            match event {
                // A token comes with it.
                TokenEvent::Started { cached_tokens } => replies.hold(&Reply::Started { cached_tokens })?,
                TokenEvent::Tokens { index, tokens, logprobs } => {
                    replies.send(Reply::Tokens { index, tokens, logprobs }).await?;
                }
                TokenEvent::Prompt { index, logprobs } => {
                    replies.send(Reply::Prompt { index, logprobs }).await?;
                }
                TokenEvent::Finished(finish) => replies.send(Reply::Done(finish)).await?,
            }
            next = events.next().await;
        }
        Ok::<(), transport::ReplyError>(())
    };
    // Dropping `events` before their end cancels the request in the engine.
    tokio::select! {
        sent = stream => match sent {
            // Bounded by the silence after which a connection ends.
            Ok(()) => arrived.await,
            Err(error) => tracing::debug!(request = %id, %error, "the answer is not read to its end"),
        },
        () = cancelled => tracing::debug!(request = %id, "cancelled by the router"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use transport::{ClusterKey, Peer};
    use types::{
        CacheScope, Finish, FinishReason, GenerateDraft, ModelAssets, ModelCard, OutputRules, RequestId,
        SamplingParams, Service, Speculation, TokenReport, Usage,
    };
    use wire::EngineCommand;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn hello(node: u128) -> Hello {
        Hello {
            program: "0".to_owned(),
            node: NodeId(node),
            name: format!("node {node}"),
            cluster: "test".to_owned(),
            roles: Vec::new(),
            hardware: "none".to_owned(),
        }
    }

    /// A node whose engine is played by the test, and a router that it has joined.
    async fn joined() -> (EngineHandle, watch::Sender<NodeReport>, Peer) {
        let (engine, reports, peer, _) = joined_with_control().await;
        (engine, reports, peer)
    }

    async fn joined_with_control()
    -> (EngineHandle, watch::Sender<NodeReport>, Peer, transport::ControlReceiver) {
        let key = ClusterKey::generate().expect("random numbers");
        let bind = || Endpoint::bind(([127, 0, 0, 1], 0).into(), &key).expect("binds");
        let (endpoint, router) = (bind(), bind());
        let engine = EngineHandle::new();
        let (reports, watched) = watch::channel(engine.report());
        let (to, hello_router) = (router.local_address(), hello(2));
        let (accepted, link) = tokio::join!(router.accept(&hello_router), endpoint.join(to, hello(1)));
        let (served, claims) = (engine.clone(), Claims::default());
        let settings = UplinkSettings {
            endpoint,
            hello: hello(1),
            engine: served,
            reports: watched,
            claims,
            pipeline: None,
        };
        let link = link.expect("joined");
        tokio::spawn(async move { serve(&settings, link).await });
        let (peer, control) = accepted.expect("open");
        (engine, reports, peer, control)
    }

    /// More tokens than fit the way to the router: some wait at the node until the router reads.
    #[tokio::test]
    async fn an_answer_counts_until_it_has_arrived() {
        const TOKENS: u32 = 100_000;
        let (engine, _reports, peer) = joined().await;
        let mut commands = engine.child_started();
        let assets = ModelAssets {
            tokenizer_json: String::new(),
            chat_template: None,
            bos_token: None,
            eos_token: None,
        };
        let card = ModelCard {
            name: "m".to_owned(),
            root: types::BlockHash(0),
            context_tokens: 2 * TOKENS,
            vocab_size: u32::MAX,
            eos_tokens: Vec::new(),
            assets: assets.hash(),
            created_s: 0,
            kind: types::ModelKind::Generator,
        };
        engine.child_ready(card, assets, 1);
        let draft = GenerateDraft {
            id: RequestId(1),
            model: "m".to_owned(),
            prompt: vec![1],
            sampling: SamplingParams::greedy(),
            max_tokens: TOKENS,
            stop_tokens: Vec::new(),
            ignore_eos: false,
            service: Service::default(),
            cache: CacheScope::default(),
            output: Vec::new(),
            rules: OutputRules::default(),
            report: TokenReport::default(),
            speculation: Speculation::default(),
        };
        let answer = peer.generate(draft.try_into().expect("valid")).await.expect("accepted");
        assert!(matches!(commands.recv().await, Some(EngineCommand::Submit(_))));
        let tokens = vec![u32::MAX - 1; TOKENS as usize];
        let finish = Finish { reason: FinishReason::Length, usage: Usage::default() };
        let events =
            [TokenEvent::Tokens { index: 0, tokens, logprobs: Vec::new() }, TokenEvent::Finished(finish)];
        for event in events {
            engine.child_event(RequestId(1), event).expect("in order");
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(engine.open_requests(), 1, "nobody has read it");
        let read: usize =
            timeout(PATIENCE, answer.collect::<Vec<_>>()).await.expect("ends").iter().map(tokens_of).sum();
        assert_eq!(read, TOKENS as usize);
        let arrived = async {
            while engine.open_requests() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, arrived).await.expect("arrived");
    }

    /// Also what has been told before, when the router says that it has lost it.
    #[tokio::test]
    async fn a_router_that_asks_is_told_the_whole_cache_again() {
        let (engine, _reports, peer, mut control) = joined_with_control().await;
        let blocks: Vec<types::BlockHash> = (0..10_000).map(types::BlockHash).collect();
        let mut snapshot = async || {
            let (mut got, mut parts) = (Vec::new(), 0);
            loop {
                let control = timeout(PATIENCE, control.next()).await.expect("in time").expect("open");
                if let wire::Control::CacheSnapshot { epoch: 0, seq, blocks, last } = control {
                    got.extend(blocks);
                    parts += 1;
                    if last {
                        return (seq, got, parts);
                    }
                }
            }
        };
        assert_eq!(snapshot().await, (0, Vec::new(), 1), "on connect");
        engine.child_cache(vec![types::CacheEvent::Stored {
            parent: types::BlockHash(u128::MAX),
            blocks: blocks.clone(),
        }]);
        peer.resync().await.expect("it will");
        // Events of more than a frame takes count as several.
        assert_eq!(snapshot().await, (3, blocks, 3));
    }

    fn tokens_of(event: &TokenEvent) -> usize {
        match event {
            TokenEvent::Tokens { tokens, .. } => tokens.len(),
            TokenEvent::Prompt { .. } | TokenEvent::Started { .. } | TokenEvent::Finished(_) => 0,
        }
    }

    #[tokio::test]
    async fn a_parked_duplicate_goes_where_its_address_leads_now_and_ends_without_one() {
        let key = ClusterKey::generate().expect("random numbers");
        let bind = || Endpoint::bind(([127, 0, 0, 1], 0).into(), &key).expect("binds");
        let (node, known, other) = (bind(), bind(), bind());
        let engine = EngineHandle::new();
        let (reports, watched) = watch::channel(engine.report());
        let claims = Claims::default();
        let claim = claims.claim(NodeId(2)).expect("the first");
        let settings = UplinkSettings {
            endpoint: node,
            hello: hello(1),
            engine,
            reports: watched,
            claims,
            pipeline: None,
        };
        let addresses = watch::Sender::new(vec![known.local_address()]);
        let dialling = tokio::spawn(dial(settings, addresses.subscribe()));
        let joined = async |router: &Endpoint, id: u128| {
            let (peer, _reports) =
                timeout(PATIENCE, router.accept(&hello(id))).await.expect("dialled").expect("open");
            peer
        };
        let duplicate = joined(&known, 2).await;
        assert_eq!(duplicate.closed().await, "there is a connection already");
        // The same address again is no news.
        lead_to(&addresses, vec![known.local_address()]);
        let again = timeout(Duration::from_millis(500), known.accept(&hello(2))).await;
        assert!(again.is_err(), "dialled again");
        lead_to(&addresses, vec![other.local_address()]);
        let moved = joined(&other, 3).await;
        lead_to(&addresses, Vec::new());
        assert!(
            timeout(Duration::from_millis(300), moved.closed()).await.is_err(),
            "what is connected stays"
        );
        moved.close("over");
        assert_eq!(timeout(PATIENCE, dialling).await.expect("ends").expect("no panic"), DialEnd::NoAddress);
        drop((claim, reports));
    }
}
