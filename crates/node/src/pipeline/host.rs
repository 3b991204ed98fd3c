//! [`PipelineHost`]: what this node does for a pipeline when another member, or its own head, asks: measure, host a stage,
//! and let the stage before it in.
//!
//! A stage lasts as long as the stream on which it was asked for: its process, its ways and its lease are one task's, and go
//! with it. There is one part at a time on a node: a stage, or the head's own.

use super::PipelineSettings;
use super::child::{self, Patience};
use super::group::Event;
use super::ring::{self, Seat, TunnelEnds};
use super::settings::Links;
use crate::dispatch::Dispatch;
use crate::engine_handle::EngineHandle;
use crate::engine_process::RankTask;
use futures_util::future::join_all;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use transport::limits::MEASURE_TIME_MAX;
use transport::{ReplySender, TunnelOpening};
use types::{
    EpochId, GenerateError, LinkProfile, MeasureQuery, MemberProfile, NodeId, StageNews, StageOrder,
    StageProfile, TunnelOrder,
};
use wire::{EngineReport, Reply};

/// News of a stage that the head has not read; it hears four beats a second.
pub(super) const NEWS_MAX: usize = 64;
/// A process that measures is given up this long before who asked gives up.
const MEASURE_MARGIN: Duration = Duration::from_secs(5);

/// How long a part may take to end before the next one is refused: its process is killed, and who asks waits
/// [`transport::limits::ACCEPT_TIME_MAX`].
const OCCUPY_TIME_MAX: Duration = Duration::from_secs(3);

/// Whoever is told of what happens.
pub(super) type Listener = Box<dyn Fn(Event) + Send + Sync>;

/// Clones share it.
#[derive(Clone)]
pub(crate) struct PipelineHost(Arc<Inner>);

struct Inner {
    settings: PipelineSettings,
    own: NodeId,
    dispatch: Arc<Dispatch>,
    engine: EngineHandle,
    part: watch::Sender<Option<Part>>,
    /// Measured once: a machine that hosts a stage cannot be measured again.
    profile: tokio::sync::Mutex<Option<StageProfile>>,
    leased: watch::Sender<Option<EpochId>>,
    listener: OnceLock<Listener>,
}

/// This node's place in an epoch, as far as who comes through a tunnel needs it.
#[derive(Debug, Clone)]
pub(super) struct Part {
    order: TunnelOrder,
    inlet: SocketAddrV4,
    taken: Arc<AtomicBool>,
    broken: mpsc::Sender<String>,
}

impl Part {
    /// Of a rank that tunnels lead to; what breaks of its way in goes to `broken`.
    fn new(epoch: EpochId, rank: u32, ends: &TunnelEnds, broken: mpsc::Sender<String>) -> Self {
        let order = TunnelOrder { epoch, rank };
        Self { order, inlet: ends.inlet, taken: Arc::default(), broken }
    }
}

impl PipelineHost {
    pub(crate) fn new(
        settings: PipelineSettings,
        own: NodeId,
        dispatch: Arc<Dispatch>,
        engine: EngineHandle,
    ) -> Self {
        if settings.links != Links::Tunnels {
            let model = &settings.model;
            tracing::warn!(%model, links = ?settings.links, "what a pipeline's ranks say is neither encrypted nor authenticated");
        }
        Self(Arc::new(Inner {
            settings,
            own,
            dispatch,
            engine,
            part: watch::Sender::new(None),
            profile: tokio::sync::Mutex::new(None),
            leased: watch::Sender::new(None),
            listener: OnceLock::new(),
        }))
    }

    pub(super) fn settings(&self) -> &PipelineSettings {
        &self.0.settings
    }

    pub(super) fn own(&self) -> NodeId {
        self.0.own
    }

    pub(super) fn dispatch(&self) -> &Dispatch {
        &self.0.dispatch
    }

    pub(super) fn engine(&self) -> &EngineHandle {
        &self.0.engine
    }

    pub(super) fn listen(&self, listener: Listener) {
        // A second one would be a second actor.
        let _ = self.0.listener.set(listener);
    }

    fn tell(&self, event: Event) {
        if let Some(listener) = self.0.listener.get() {
            listener(event);
        }
    }

    /// Takes the node's one part, waiting for the one before to end where there is one.
    pub(super) async fn occupy(&self, epoch: EpochId) -> Result<Occupied, String> {
        let taken = async {
            let mut leased = self.0.leased.subscribe();
            loop {
                let free = |leased: &mut Option<EpochId>| {
                    let free = leased.is_none();
                    free.then(|| *leased = Some(epoch));
                    free
                };
                if self.0.leased.send_if_modified(free) {
                    return;
                }
                // Fails only where the host is gone, and this is its own.
                let _ = leased.wait_for(Option::is_none).await;
            }
        };
        if timeout(OCCUPY_TIME_MAX, taken).await.is_ok() {
            let of = (epoch.head != self.0.own).then_some(epoch.head);
            if of.is_some() {
                self.tell(Event::Leased(of));
            }
            return Ok(Occupied { host: self.clone(), of });
        }
        let other = self.0.leased.borrow().map_or_else(String::new, |other| {
            format!(": it has one in epoch {} of {}", other.number, self.0.dispatch.name(other.head))
        });
        Err(format!("this node takes no part{other}"))
    }

    /// Answers with what this node can do.
    pub(crate) async fn serve_measure(self, query: MeasureQuery, mut replies: ReplySender) {
        let cancelled = replies.cancelled();
        let answer = async {
            let reply = match self.measure(&query).await {
                Ok(profile) => Reply::Measured(profile),
                Err(reason) => Reply::Rejected(self.unavailable(reason)),
            };
            // Whoever asked may be gone.
            let _ = replies.send(reply).await;
        };
        tokio::select! {
            () = answer => {}
            () = cancelled => {}
        }
    }

    pub(super) async fn measure(&self, query: &MeasureQuery) -> Result<MemberProfile, String> {
        self.check_model(&query.model)?;
        let others = query.members.iter().filter(|node| **node != self.0.own);
        let links = join_all(others.map(|node| self.link(*node)));
        let (stage, links) = tokio::join!(self.stage_profile(), links);
        let (stage, links) = (stage?, links.into_iter().flatten().collect());
        // Free now; whoever takes it before its rank does costs a start.
        let direct_port = match self.0.settings.links {
            Links::Tunnels => None,
            Links::Direct | Links::Jaccl(_) => {
                let port = ring::free_port().await;
                Some(port.map_err(|error| format!("no port for a rank: {error}"))?)
            }
        };
        Ok(MemberProfile { stage, links, direct_port })
    }

    /// A place for a rank of an epoch with these members, and where its process's ways in break.
    pub(super) async fn seat(
        &self,
        occupied: &Occupied,
        epoch: EpochId,
        rank: usize,
        members: &[NodeId],
        direct_ports: &[u16],
    ) -> Result<(Seat, mpsc::Receiver<String>), String> {
        let size = members.len();
        let (broken, breaks) = mpsc::channel(1);
        let failed = |error: std::io::Error| format!("no port or file for the process: {error}");
        let seat = match &self.0.settings.links {
            Links::Tunnels => Seat::take(rank, size).await.map_err(failed)?,
            Links::Direct => {
                let (before, next) = ((rank + size - 1) % size, (rank + 1) % size);
                let own = SocketAddrV4::new(self.own_ip(members[before]), direct_ports[rank]);
                let next = SocketAddrV4::new(self.ip_of(members[next])?, direct_ports[next]);
                Seat::direct(rank, size, own, next).map_err(failed)?
            }
            Links::Jaccl(links) => {
                let ip = if rank == 0 { self.own_ip(members[1]) } else { self.ip_of(members[0])? };
                let names: Vec<String> = members.iter().map(|&node| self.0.dispatch.name(node)).collect();
                let between = |from: &String, to: &String| {
                    let own = links.iter().filter(|link| link.from == *from && link.to == *to);
                    own.map(|link| link.device.as_str()).collect()
                };
                let row = |from: &String| names.iter().map(|to| between(from, to)).collect();
                let devices: Vec<Vec<Vec<&str>>> = names.iter().map(row).collect();
                let coordinator = SocketAddrV4::new(ip, direct_ports[0]);
                Seat::jaccl(rank, coordinator, &devices).map_err(failed)?
            }
        };
        // Without tunnels nothing comes in that this node sees.
        if let Some(ends) = &seat.tunnels {
            occupied.open(Part::new(epoch, rank as u32, ends, broken));
        }
        Ok((seat, breaks))
    }

    /// Another member's address, as this node is connected to it.
    fn ip_of(&self, node: NodeId) -> Result<Ipv4Addr, String> {
        let name = self.0.dispatch.name(node);
        let peer =
            self.0.dispatch.peer(node).ok_or_else(|| format!("{name} is not connected to this node"))?;
        match peer.remote_address().ip() {
            IpAddr::V4(ip) => Ok(ip),
            IpAddr::V6(ip) => Err(format!(
                "{name} is at {ip}, and ranks without tunnels need IPv4: set links = \"tunnel\", or name it by an IPv4 address \
                 in peers"
            )),
        }
    }

    /// This node's address, as another member reaches it; any, where that is not known.
    fn own_ip(&self, of: NodeId) -> Ipv4Addr {
        match self.0.dispatch.peer(of).and_then(|peer| peer.local_ip()) {
            Some(IpAddr::V4(ip)) => ip,
            _ => Ipv4Addr::UNSPECIFIED,
        }
    }

    /// The way to another member; none where there is no connection.
    async fn link(&self, to: NodeId) -> Option<LinkProfile> {
        let peer = self.0.dispatch.peer(to)?;
        let bytes_per_s = peer.probe().await.ok()?;
        Some(LinkProfile { to, latency_s: peer.rtt().as_secs_f64() / 2.0, bytes_per_s })
    }

    async fn stage_profile(&self) -> Result<StageProfile, String> {
        // Whoever asks meanwhile gets the same.
        let mut known = self.0.profile.lock().await;
        if let Some(profile) = &*known {
            return Ok(profile.clone());
        }
        let settings = &self.0.settings;
        let command = settings.command.task(&RankTask::Measure { rows: settings.rows });
        let patience = Patience::Whole(MEASURE_TIME_MAX.saturating_sub(MEASURE_MARGIN));
        let mut profile = child::run(&command, patience, |report| match report {
            EngineReport::Profile(profile) => ControlFlow::Break(Ok(profile)),
            EngineReport::Loading { .. } => ControlFlow::Continue(()),
            other => ControlFlow::Break(Err(out_of_turn(&other))),
        })
        .await??;
        if let Some(most) = settings.memory_bytes {
            profile.memory_bytes = profile.memory_bytes.min(most);
        }
        tracing::info!(
            model = %settings.model,
            memory_mb = profile.memory_bytes >> 20,
            layers = profile.layer_bytes.len(),
            "measured for a pipeline"
        );
        Ok(known.insert(profile).clone())
    }

    /// What was measured is not to be relied on: a process ended here before it served.
    pub(super) fn forget_profile(&self) {
        if let Ok(mut known) = self.0.profile.try_lock() {
            *known = None;
        }
    }

    /// Hosts a stage until the head has no more use for it.
    pub(crate) async fn serve_stage(self, order: StageOrder, mut replies: ReplySender) {
        let occupied = async {
            self.check(&order)?;
            self.occupy(order.epoch).await
        };
        let occupied = match occupied.await {
            Ok(occupied) => occupied,
            Err(reason) => {
                tracing::warn!(head = %order.epoch.head, %reason, "a stage was refused");
                let _ = replies.send(Reply::Rejected(self.unavailable(reason))).await;
                return;
            }
        };
        let (rank, epoch) = (order.rank, order.epoch.number);
        tracing::info!(head = %order.epoch.head, epoch, rank, layers = ?order.layers[rank as usize], "hosts a stage");
        let cancelled = replies.cancelled();
        let reason = tokio::select! {
            message = self.host(&order, &occupied, &mut replies) => {
                let _ = replies.send(Reply::Stage(StageNews::Failed { message: message.clone() })).await;
                message
            }
            () = cancelled => "the head has ended it".to_owned(),
        };
        drop(occupied);
        tracing::info!(epoch, rank, %reason, "hosts the stage no longer");
    }

    /// Says why it is over.
    async fn host(&self, order: &StageOrder, occupied: &Occupied, replies: &mut ReplySender) -> String {
        let (rank, size) = (order.rank as usize, order.members.len());
        let next = (rank + 1) % size;
        let Some(peer) = self.0.dispatch.peer(order.members[next]) else {
            return format!("the next member, {}, is not connected to this node", order.members[next]);
        };
        let seat = self.seat(occupied, order.epoch, rank, &order.members, &order.direct_ports).await;
        let (seat, mut broken) = match seat {
            Ok(seat) => seat,
            Err(why) => return why,
        };
        let task = self.rank_task(order.layers.clone(), order.kv_tokens);
        let mut command = self.0.settings.command.task(&task);
        seat.apply(&mut command);
        if replies.send(Reply::Stage(StageNews::Started)).await.is_err() {
            return "the head is gone".to_owned();
        }
        let (sender, mut news) = mpsc::channel(NEWS_MAX);
        let process = child::run(&command, Patience::Beats, |report| {
            let told = match report {
                EngineReport::Loading { .. } => return ControlFlow::Continue(()),
                EngineReport::Joined => StageNews::Joined,
                EngineReport::StageReady => StageNews::Ready,
                EngineReport::Beat { passes } => StageNews::Beat { passes },
                other => return ControlFlow::Break(out_of_turn(&other)),
            };
            match sender.try_send(told) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break("the head does not read the stage's news".to_owned()),
            }
        });
        let order = TunnelOrder { epoch: order.epoch, rank: next as u32 };
        let way = ring::way(&seat, &peer, order);
        tokio::pin!(process, way);
        let mut serves = false;
        loop {
            tokio::select! {
                // Its own words first, then what was seen of its ways.
                biased;
                ended = &mut process => {
                    if !serves {
                        self.forget_profile();
                    }
                    return ended.unwrap_or_else(|why| why);
                }
                Some(news) = news.recv() => {
                    serves |= news == StageNews::Ready;
                    if let Err(error) = replies.send(Reply::Stage(news)).await {
                        return error.to_string();
                    }
                }
                why = &mut way => return why,
                Some(why) = broken.recv() => return why,
            }
        }
    }

    /// Lets the member before this one in, once there is a process for it.
    pub(crate) async fn serve_tunnel(self, opening: TunnelOpening) {
        let order = opening.order;
        let is_it = |part: &Option<Part>| part.as_ref().is_some_and(|part| part.order == order);
        let mut parts = self.0.part.subscribe();
        let given_up = opening.cancelled();
        let found = async {
            let found = timeout(ring::JOIN_TIME_MAX, parts.wait_for(is_it)).await;
            found.ok()?.ok()?.clone()
        };
        let part = tokio::select! {
            part = found => part,
            () = given_up => return,
        };
        let part = part.filter(|part| !part.taken.swap(true, Ordering::Relaxed));
        let Some(part) = part else {
            let reason = format!("no process waits for rank {} of epoch {}", order.rank, order.epoch.number);
            return opening.refuse(self.unavailable(reason)).await;
        };
        let over = async {
            // Fails only where the host is gone.
            let _ = parts.wait_for(|part| !is_it(part)).await;
        };
        tokio::select! {
            why = ring::inlet(opening, part.inlet) => drop(part.broken.try_send(why)),
            () = over => {}
        }
    }

    fn check(&self, order: &StageOrder) -> Result<(), String> {
        order.check().map_err(|error| error.to_string())?;
        self.check_model(&order.model)?;
        if order.members[order.rank as usize] != self.0.own {
            return Err(format!(
                "rank {} is {}, and this is {}",
                order.rank, order.members[order.rank as usize], self.0.own
            ));
        }
        let tunnels = self.0.settings.links == Links::Tunnels;
        if order.direct_ports.is_empty() != tunnels {
            let own = if tunnels { "through tunnels" } else { "without tunnels" };
            return Err(format!(
                "this node's pipeline has ranks reach each other {own}, the head's does not: `links` must be the same at all members"
            ));
        }
        Ok(())
    }

    /// What a rank's process is to do.
    pub(super) fn rank_task(&self, layers: Vec<(u32, u32)>, kv_tokens: u64) -> RankTask {
        let jaccl = matches!(self.0.settings.links, Links::Jaccl(_));
        RankTask::Rank { layers, kv_tokens, jaccl }
    }

    fn check_model(&self, model: &str) -> Result<(), String> {
        let own = &self.0.settings.model;
        if model != own {
            return Err(format!("this node's pipeline is of {own:?}, not of {model:?}"));
        }
        Ok(())
    }

    fn unavailable(&self, reason: String) -> GenerateError {
        GenerateError::Unavailable { model: self.0.settings.model.clone(), reason }
    }
}

/// The node's one part is taken until this is dropped: however that comes, as when a connection goes and all that ran on it.
pub(super) struct Occupied {
    host: PipelineHost,
    /// The head, where that is another node.
    of: Option<NodeId>,
}

impl Occupied {
    /// From now on the member before may come in.
    fn open(&self, part: Part) {
        self.host.0.part.send_replace(Some(part));
    }
}

impl Drop for Occupied {
    fn drop(&mut self) {
        self.host.0.part.send_replace(None);
        // Before the next one may say that it has it.
        if self.of.is_some() {
            self.host.tell(Event::Leased(None));
        }
        self.host.0.leased.send_replace(None);
    }
}

/// What a process said that has no business to.
fn out_of_turn(report: &EngineReport) -> String {
    let what = format!("{report:?}");
    let name = what.split([' ', '(', '{']).next().unwrap_or_default();
    format!("protocol error: the process sent {name} out of turn")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::DispatchSettings;
    use crate::engine_start::EngineCommandLine;
    use crate::pipeline::{PipelineMembers, RankCommand};
    use router::placement::Goal;
    use std::sync::Mutex;

    #[derive(Debug)]
    struct NoProgram;

    impl RankCommand for NoProgram {
        fn task(&self, _: &RankTask) -> EngineCommandLine {
            self.whole()
        }

        fn whole(&self) -> EngineCommandLine {
            EngineCommandLine { program: "/nowhere/mlx-node".into(), args: Vec::new(), env: Vec::new() }
        }
    }

    fn host(own: u128) -> (PipelineHost, Arc<Mutex<Vec<Event>>>) {
        let settings = PipelineSettings {
            model: "m".to_owned(),
            members: PipelineMembers::Auto,
            links: Links::Tunnels,
            goal: Goal::Latency,
            rows: 1,
            kv_tokens: 1,
            memory_bytes: None,
            forced: false,
            command: Arc::new(NoProgram),
        };
        let dispatch = Arc::new(Dispatch::new("test".to_owned(), DispatchSettings::default()));
        let host = PipelineHost::new(settings, NodeId(own), dispatch, EngineHandle::new());
        let told = Arc::new(Mutex::new(Vec::new()));
        let log = told.clone();
        host.listen(Box::new(move |event| log.lock().expect("no panic").push(event)));
        (host, told)
    }

    fn epoch(head: u128, number: u64) -> EpochId {
        EpochId { head: NodeId(head), number }
    }

    #[tokio::test]
    async fn there_is_one_part_at_a_time_and_others_are_told_of() {
        let (host, told) = host(1);
        let first = host.occupy(epoch(2, 7)).await.expect("free");
        let next = tokio::spawn({
            let host = host.clone();
            async move { host.occupy(epoch(3, 1)).await.expect("free soon") }
        });
        tokio::task::yield_now().await;
        assert!(!next.is_finished(), "two parts at once");
        drop(first);
        drop(next.await.expect("no panic"));
        drop(host.occupy(epoch(1, 1)).await.expect("free"));
        let leased = |head: Option<u128>| Event::Leased(head.map(NodeId));
        let expected = [leased(Some(2)), leased(None), leased(Some(3)), leased(None)];
        assert_eq!(*told.lock().expect("no panic"), expected);
    }

    #[tokio::test]
    async fn a_part_that_stays_is_named() {
        let (host, _) = host(1);
        let _first = host.occupy(epoch(2, 7)).await.expect("free");
        let refused = host.occupy(epoch(3, 1)).await.err().expect("taken");
        assert!(refused.contains("epoch 7 of"), "{refused}");
    }

    #[tokio::test]
    async fn orders_for_others_are_refused_and_a_program_that_is_missing_is_named() {
        let (host, _) = host(1);
        let order = |model: &str, members: [u128; 2]| StageOrder {
            epoch: epoch(2, 1),
            model: model.to_owned(),
            weights: types::BlockHash(1),
            rank: 1,
            members: members.map(NodeId).to_vec(),
            layers: vec![(0, 3), (3, 7)],
            kv_tokens: 1,
            direct_ports: Vec::new(),
        };
        assert_eq!(host.check(&order("m", [2, 1])), Ok(()));
        let direct = StageOrder { direct_ports: vec![7000, 7001], ..order("m", [2, 1]) };
        assert!(host.check(&direct).is_err_and(|why| why.contains("`links` must be the same")));
        assert!(host.check(&order("m", [2, 3])).is_err_and(|why| why.contains("rank 1 is")));
        assert!(host.check(&order("other", [2, 1])).is_err_and(|why| why.contains("not of \"other\"")));
        let query = MeasureQuery { model: "m".to_owned(), members: vec![NodeId(1)] };
        let failed = host.measure(&query).await.expect_err("no program");
        assert!(failed.contains("/nowhere/mlx-node"), "{failed}");
    }
}
