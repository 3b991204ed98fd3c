//! A router as a node sees it: dialled, told how the node is, and served.
//!
//! One [`UplinkActor`] per router or configured address. Reports flow from the node actor's watch to the router, requests
//! from the router into the engine, each in a task of its own that lives as long as its stream. A router found twice, or
//! one that turns out to be this process, is connected to once, or not at all.

use crate::engine_handle::{EngineHandle, NodeReport};
use crate::settings::{REDIAL_DELAY, REDIAL_DELAY_MAX, REDIAL_DELAY_REFUSED};
use futures_util::StreamExt;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use transport::{Endpoint, IncomingRequest, JoinError, LinkClosed, ReplySender, RouterLink};
use types::{EngineState, GenerateError, GenerateRequest, NodeId, TokenEvent};
use wire::{Control, Hello, Reply};

/// What all uplinks of a node share.
#[derive(Clone)]
pub(crate) struct UplinkSettings {
    pub(crate) endpoint: Endpoint,
    pub(crate) hello: Hello,
    pub(crate) engine: EngineHandle,
    pub(crate) reports: watch::Receiver<NodeReport>,
    pub(crate) claims: Claims,
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
    /// It said goodbye: when the connection ends it is not dialled again.
    Lost,
    /// The dialling task is over.
    Ended,
}

pub(crate) struct UplinkState {
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
        let watched = addresses.subscribe();
        let task = tokio::spawn(async move {
            dial(settings, watched).await;
            // Fails only where the actor has stopped.
            let _ = myself.send_message(UplinkMsg::Ended);
        });
        Ok(UplinkState { addresses, task })
    }

    async fn handle(
        &self,
        myself: ActorRef<UplinkMsg>,
        message: UplinkMsg,
        state: &mut UplinkState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            UplinkMsg::Found(addresses) => drop(state.addresses.send_replace(addresses)),
            UplinkMsg::Lost => drop(state.addresses.send_replace(Vec::new())),
            UplinkMsg::Ended => myself.stop(None),
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

/// Dials until there is no address left, or the address turns out to be this process.
async fn dial(settings: UplinkSettings, mut addresses: watch::Receiver<Vec<SocketAddr>>) {
    let mut delay = REDIAL_DELAY;
    let mut told = None;
    loop {
        let now = addresses.borrow_and_update().clone();
        if now.is_empty() {
            return;
        }
        let mut wait = None;
        for address in now {
            match settings.endpoint.join(address, settings.hello.clone()).await {
                Ok(link) => {
                    (told, wait) = (None, None);
                    match serve(&settings, link).await {
                        Served::Joined => delay = REDIAL_DELAY,
                        Served::Itself => return,
                        Served::Duplicate(router) => settings.claims.released(router).await,
                    }
                    break;
                }
                Err(JoinError::Itself { .. }) => return,
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
        if let Ok(Err(_)) = tokio::time::timeout(wait, addresses.changed()).await {
            return;
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
    let reason = tokio::select! {
        LinkClosed { reason } = send_reports(&link, settings.reports.clone()) => reason,
        () = serve_requests(&link, &settings.engine) => link.closed().await,
        reason = link.closed() => reason,
    };
    drop(claim);
    tracing::info!(router = %link.router().name, %reason, "left a router");
    Served::Joined
}

async fn send_reports(link: &RouterLink, mut reports: watch::Receiver<NodeReport>) -> LinkClosed {
    let mut told = None;
    loop {
        let report = reports.borrow_and_update().clone();
        let NodeReport { state, models, load } = report;
        let sent = async {
            let now = (state, models);
            if told.as_ref() != Some(&now) {
                let (state, models) = now.clone();
                let leaving = state == EngineState::Draining;
                link.send(Control::State { state, models }).await?;
                if leaving {
                    link.send(Control::Leaving).await?;
                }
                told = Some(now);
            }
            if let Some(load) = load {
                link.send(Control::Load(load)).await?;
            }
            Ok(())
        };
        if let Err(closed) = sent.await {
            return closed;
        }
        if reports.changed().await.is_err() {
            return LinkClosed { reason: "this node is leaving".to_owned() };
        }
    }
}

/// Each request in a task of its own; all end with the connection. The transport bounds how many there are.
async fn serve_requests(link: &RouterLink, engine: &EngineHandle) {
    let mut running = JoinSet::new();
    while let Some(request) = link.next_request().await {
        while running.try_join_next().is_some() {}
        match request {
            IncomingRequest::Generate { request, replies } => {
                running.spawn(serve_generate(engine.clone(), request, replies));
            }
            IncomingRequest::Assets { hash, mut replies } => {
                let assets = engine.assets(hash);
                running.spawn(async move {
                    let reply = match assets {
                        Some(assets) => Reply::Assets((*assets).clone()),
                        None => Reply::Rejected(GenerateError::Unavailable {
                            model: hash.to_string(),
                            reason: "this node does not have these assets".to_owned(),
                        }),
                    };
                    // A router that is gone needs no answer.
                    let _ = replies.send(reply).await;
                });
            }
        }
    }
}

async fn serve_generate(engine: EngineHandle, request: GenerateRequest, mut replies: ReplySender) {
    let id = request.id;
    let mut events = match engine.generate(request) {
        Ok(events) => events,
        Err(error) => {
            let _ = replies.send(Reply::Rejected(error)).await;
            return;
        }
    };
    let cancelled = replies.cancelled();
    let stream = async {
        replies.send(Reply::Accepted).await?;
        while let Some(event) = events.next().await {
            let reply = match event {
                TokenEvent::Tokens { index, tokens } => Reply::Tokens { index, tokens },
                TokenEvent::Finished(finish) => Reply::Done(finish),
            };
            replies.send(reply).await?;
        }
        Ok::<(), transport::ReplyError>(())
    };
    // Dropping `events` before their end cancels the request in the engine.
    tokio::select! {
        sent = stream => if let Err(error) = sent {
            tracing::debug!(request = %id, %error, "the answer is not read to its end");
        },
        () = cancelled => tracing::debug!(request = %id, "cancelled by the router"),
    }
}
