//! What a head does: a round of measurements that ends in a plan, and an epoch, from the start of its processes to the end of
//! all of them here.

use super::group::{Event, Unplanned};
use super::host::{NEWS_MAX, PipelineHost};
use super::ring;
use super::settings::Links;
use crate::engine_actor::EngineActorSettings;
use crate::engine_child::{self, ChildEnd, HeadNews, HeadWatch};
use crate::engine_start::EngineCommandLine;
use futures_util::future::{join_all, select_all};
use router::placement::{self, Goal, Link, Member, PlacedModel, Placement, PlacementError, Rules};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use transport::{Peer, StageStream};
use types::{
    BlockHash, EpochId, MeasureQuery, MemberProfile, NodeId, PipelinePlan, PlannedStage, StageNews,
    StageOrder, TunnelOrder,
};

/// How long it takes at most to see that a member is gone whose stage has ended.
const LOST_TIME_MAX: Duration = Duration::from_millis(200);

/// What an engine may take and how long it may be silent: as for one without a pipeline.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EngineTimes {
    pub(crate) load_max: Duration,
    pub(crate) silence_max: Duration,
}

/// What a round gave.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    /// By rank; this node is the first.
    pub(super) members: Vec<NodeId>,
    names: Vec<String>,
    layers: Vec<(u32, u32)>,
    weights: BlockHash,
    /// Where ranks may listen that reach each other without tunnels.
    direct_ports: Vec<u16>,
    pub(super) plan: PipelinePlan,
}

/// Has these measured, this node first, and makes a plan.
pub(super) async fn plan(host: &PipelineHost, members: &[NodeId]) -> Result<Planned, Unplanned> {
    let query = MeasureQuery { model: host.settings().model.clone(), members: members.to_vec() };
    let measured = join_all(members.iter().map(|&node| measure(host, node, &query))).await;
    let profiles = measured.into_iter().collect::<Result<Vec<MemberProfile>, Unplanned>>()?;
    let names: Vec<String> = members.iter().map(|&node| host.dispatch().name(node)).collect();
    for (&node, profile) in members.iter().zip(&profiles) {
        same_model(&profiles[0], profile).map_err(|reason| Unplanned::Member { node, reason })?;
    }
    let links = links(members, &names, &profiles)?;
    let direct = host.settings().links != Links::Tunnels;
    for (&node, profile) in members.iter().zip(&profiles) {
        same_links(direct, profile).map_err(|reason| Unplanned::Member { node, reason })?;
    }
    let own = &profiles[0].stage;
    let model = PlacedModel {
        layer_bytes: own.layer_bytes.clone(),
        embedding_bytes: own.embedding_bytes,
        head_bytes: own.head_bytes,
        kv_bytes_per_token: own.kv_bytes_per_token,
        kv_tokens: host.settings().kv_tokens,
        hidden_bytes: own.hidden_bytes,
    };
    let could: Vec<Member> = profiles
        .iter()
        .map(|MemberProfile { stage, .. }| Member {
            memory_bytes: stage.memory_bytes,
            layer_s: stage.layer_s.clone(),
            head_s: stage.head_s.clone(),
        })
        .collect();
    let settings = host.settings();
    let rules = Rules { forced: settings.forced, first: Some(0) };
    let placement = placement::place(&model, &could, &links, settings.goal, rules)
        .map_err(|error| Unplanned::Refused(refusal(&error, &names)))?;
    let rows = match settings.goal {
        Goal::Throughput { rows } => rows.max(1),
        Goal::Latency => 1,
    };
    Ok(planned(members, &names, &could, &profiles, &model, rows, placement))
}

async fn measure(
    host: &PipelineHost,
    node: NodeId,
    query: &MeasureQuery,
) -> Result<MemberProfile, Unplanned> {
    let failed = |reason: String| Unplanned::Member { node, reason };
    if node == host.own() {
        // Without this node there is no plan of its own: what is wrong is told as such.
        return host.measure(query).await.map_err(Unplanned::Refused);
    }
    let peer = host.dispatch().peer(node).ok_or_else(|| failed("it is not connected".to_owned()))?;
    peer.measure(query.clone()).await.map_err(|error| failed(error.to_string()))
}

fn same_model(head: &MemberProfile, member: &MemberProfile) -> Result<(), String> {
    let (head, member) = (&head.stage, &member.stage);
    if head.weights != member.weights {
        return Err(format!(
            "its weights are {:032x}, the head's are {:032x}",
            member.weights.0, head.weights.0
        ));
    }
    if head.layer_bytes.len() != member.layer_bytes.len() {
        let (own, other) = (head.layer_bytes.len(), member.layer_bytes.len());
        return Err(format!("it counts {other} layers, the head {own}"));
    }
    Ok(())
}

/// Whether this member's ranks reach others as the head's do.
fn same_links(direct: bool, member: &MemberProfile) -> Result<(), String> {
    if member.direct_port.is_some() == direct {
        return Ok(());
    }
    let (own, head) = if direct { ("through", "without") } else { ("without", "through") };
    Err(format!(
        "its ranks reach each other {own} tunnels, the head's {head}: `links` must be the same at all members"
    ))
}

/// `[i][j]` leads from `i` to `j`.
fn links(
    members: &[NodeId],
    names: &[String],
    profiles: &[MemberProfile],
) -> Result<Vec<Vec<Link>>, Unplanned> {
    let row = |from: usize| {
        let to = |to: usize| {
            if to == from {
                return Ok(Link { latency_s: 0.0, bytes_per_s: f64::MAX });
            }
            let found = profiles[from].links.iter().find(|link| link.to == members[to]);
            let link = found.map(|link| Link { latency_s: link.latency_s, bytes_per_s: link.bytes_per_s });
            link.ok_or_else(|| Unplanned::Member {
                node: members[if from == 0 { to } else { from }],
                reason: format!("{} has no connection to {}", names[from], names[to]),
            })
        };
        (0..members.len()).map(to).collect()
    };
    (0..members.len()).map(row).collect()
}

/// The same in the members' names.
fn refusal(error: &PlacementError, names: &[String]) -> String {
    match error {
        PlacementError::Slower { stages, tokens_per_s, member, alone_per_s } => format!(
            "{stages} stages would give {tokens_per_s:.1} tokens a second, and {} alone {alone_per_s:.1}: give it the model \
             instead, or set forced = true",
            names[*member]
        ),
        PlacementError::Measurement { member, what } => {
            format!("{}: {what} is not a measurement", names[*member])
        }
        PlacementError::Members { .. } | PlacementError::Layers { .. } | PlacementError::TooLarge { .. } => {
            error.to_string()
        }
    }
}

fn planned(
    members: &[NodeId],
    names: &[String],
    could: &[Member],
    profiles: &[MemberProfile],
    model: &PlacedModel,
    rows: u32,
    placement: Placement,
) -> Planned {
    let Placement { stages, micro_batches, micro_rows, cycle_s, tokens_per_s, bubble } = placement;
    let range = |layers: &std::ops::Range<usize>| (layers.start as u32, layers.end as u32);
    let ranks: Vec<usize> = stages.iter().map(|stage| stage.member).collect();
    let layers = stages.iter().map(|stage| range(&stage.layers)).collect();
    let stages = stages.into_iter().map(|stage| PlannedStage {
        node: members[stage.member],
        name: names[stage.member].clone(),
        layers: range(&stage.layers),
        weight_bytes: stage.weight_bytes,
        kv_bytes: stage.kv_bytes,
        memory_bytes: could[stage.member].memory_bytes,
        stage_s: stage.stage_s,
        link_s: stage.link_s,
    });
    let plan = PipelinePlan {
        stages: stages.collect(),
        kv_tokens: model.kv_tokens,
        rows,
        micro_batches,
        micro_rows,
        cycle_s,
        tokens_per_s,
        bubble,
    };
    Planned {
        members: ranks.iter().map(|&rank| members[rank]).collect(),
        names: ranks.iter().map(|&rank| names[rank].clone()).collect(),
        layers,
        weights: profiles[0].stage.weights,
        direct_ports: ranks.iter().filter_map(|&rank| profiles[rank].direct_port).collect(),
        plan,
    }
}

/// What an epoch's parts tell its task.
enum News {
    Own(HeadNews),
    Stage(usize, StageNews),
}

/// Runs an epoch until `stop`; where it fails, that is told, and then the stop waited for. When this returns, nothing of it
/// is left on this node, and the others are told.
pub(super) async fn run_epoch(
    host: &PipelineHost,
    number: u64,
    planned: &Planned,
    times: EngineTimes,
    tell: impl Fn(Event),
    mut stop: watch::Receiver<bool>,
) {
    let epoch = EpochId { head: host.own(), number };
    let failed = if planned.members.len() == 1 {
        run_alone(host, epoch, times, &tell, &mut stop).await
    } else {
        run_ranks(host, epoch, planned, times, &tell, &mut stop).await
    };
    if let Err(Failed { culprit, reason }) = failed {
        tracing::warn!(epoch = number, %reason, "the pipeline has lost a part");
        tell(Event::Failed { epoch: number, culprit, reason });
        stopped(&mut stop).await;
    }
    tell(Event::Torn(number));
}

/// Why an epoch is over, and whose fault that is, where it is known.
#[derive(Debug)]
struct Failed {
    culprit: Option<NodeId>,
    reason: String,
}

fn here(reason: impl ToString) -> Failed {
    Failed { culprit: None, reason: reason.to_string() }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that whoever would stop it is gone.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Serves the whole model until it is to stop.
async fn run_alone(
    host: &PipelineHost,
    epoch: EpochId,
    times: EngineTimes,
    tell: &impl Fn(Event),
    stop: &mut watch::Receiver<bool>,
) -> Result<(), Failed> {
    let _occupied = host.occupy(epoch).await.map_err(here)?;
    tracing::info!(epoch = epoch.number, "one member holds the whole model");
    tell(Event::Joined(epoch.number));
    let (sender, mut news) = mpsc::channel(NEWS_MAX);
    let mut engine = OwnEngine::start(host, host.settings().command.whole(), times, false, sender);
    let ended = loop {
        tokio::select! {
            reason = engine.ended() => break Err(here(reason)),
            Some(News::Own(HeadNews::Ready)) = news.recv() => tell(Event::Up(epoch.number)),
            () = stopped(stop) => break Ok(()),
        }
    };
    engine.end().await;
    ended
}

/// Serves with the others until it is to stop.
async fn run_ranks(
    host: &PipelineHost,
    epoch: EpochId,
    planned: &Planned,
    times: EngineTimes,
    tell: &impl Fn(Event),
    stop: &mut watch::Receiver<bool>,
) -> Result<(), Failed> {
    let occupied = host.occupy(epoch).await.map_err(here)?;
    let size = planned.members.len();
    let seat = host.seat(&occupied, epoch, 0, &planned.members, &planned.direct_ports).await;
    let (seat, mut broken) = seat.map_err(here)?;
    let (sender, mut news) = mpsc::channel(NEWS_MAX);
    let ordered = tokio::select! {
        ordered = order_stages(host, epoch, planned) => ordered?,
        () = stopped(stop) => return Ok(()),
    };
    let stages = follow(ordered, &sender);
    let next = host.dispatch().peer(planned.members[1]).ok_or_else(|| Failed {
        culprit: Some(planned.members[1]),
        reason: format!("{} is gone", planned.names[1]),
    })?;
    let task = host.rank_task(planned.layers.clone(), planned.plan.kv_tokens);
    let mut command = host.settings().command.task(&task);
    seat.apply(&mut command);
    let mut engine = OwnEngine::start(host, command, times, true, sender);
    let way = ring::way(&seat, &next, TunnelOrder { epoch, rank: 1 });
    tokio::pin!(way);
    let mut joined = BTreeSet::new();
    let mut serves = false;
    let ended = loop {
        tokio::select! {
            // What a process says of itself is more than what is seen of its ways.
            biased;
            () = stopped(stop) => break Ok(()),
            Some(news) = news.recv() => match news {
                News::Own(HeadNews::Ready) => {
                    serves = true;
                    tell(Event::Up(epoch.number));
                }
                News::Stage(rank, StageNews::Failed { message }) => {
                    let reason = format!("{}: {message}", planned.names[rank]);
                    break Err(Failed { culprit: Some(planned.members[rank]), reason });
                }
                News::Own(HeadNews::Joined) => note_joined(&mut joined, 0, size, || tell(Event::Joined(epoch.number))),
                News::Stage(rank, StageNews::Joined) => {
                    note_joined(&mut joined, rank, size, || tell(Event::Joined(epoch.number)));
                }
                News::Stage(_, StageNews::Started | StageNews::Ready | StageNews::Beat { .. }) => {}
            },
            reason = engine.ended() => {
                if !serves {
                    host.forget_profile();
                }
                break Err(here(reason));
            }
            why = &mut way => break Err(here(why)),
            Some(why) = broken.recv() => break Err(here(why)),
        }
    };
    if ended.is_ok() || is_lost(host, planned).await {
        host.engine().excuse();
    }
    // The others' processes end with these streams, and this one's neighbours with them.
    drop(stages);
    engine.end().await;
    ended
}

/// Whether a member is gone, rather than its process: its connection may end a little after what runs through it.
async fn is_lost(host: &PipelineHost, planned: &Planned) -> bool {
    let peers = planned.members[1..].iter().map(|&node| host.dispatch().peer(node));
    let Some(peers) = peers.collect::<Option<Vec<Peer>>>() else { return true };
    let closed = select_all(peers.iter().map(|peer| Box::pin(peer.closed())));
    timeout(LOST_TIME_MAX, closed).await.is_ok()
}

/// One more has found its neighbours; `all` is called once, when that was the last.
fn note_joined(joined: &mut BTreeSet<usize>, rank: usize, size: usize, all: impl FnOnce()) {
    if joined.insert(rank) && joined.len() == size {
        all();
    }
}

/// Has all other members host their stages.
async fn order_stages(
    host: &PipelineHost,
    epoch: EpochId,
    planned: &Planned,
) -> Result<Vec<StageStream>, Failed> {
    let order = |rank: usize| StageOrder {
        epoch,
        model: host.settings().model.clone(),
        weights: planned.weights,
        rank: rank as u32,
        members: planned.members.clone(),
        layers: planned.layers.clone(),
        kv_tokens: planned.plan.kv_tokens,
        direct_ports: planned.direct_ports.clone(),
    };
    let ask = |rank: usize| async move {
        let failed = |reason| Failed { culprit: Some(planned.members[rank]), reason };
        let peer: Peer = host
            .dispatch()
            .peer(planned.members[rank])
            .ok_or_else(|| failed(format!("{} is gone", planned.names[rank])))?;
        peer.stage(order(rank)).await.map_err(|error| failed(error.to_string()))
    };
    join_all((1..planned.members.len()).map(ask)).await.into_iter().collect()
}

/// Passes on what stages tell; they end with what is returned.
fn follow(stages: Vec<StageStream>, sender: &mpsc::Sender<News>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for (at, mut stage) in stages.into_iter().enumerate() {
        let sender = sender.clone();
        tasks.spawn(async move {
            while let Some(news) = stage.next().await {
                if sender.send(News::Stage(at + 1, news)).await.is_err() {
                    return;
                }
            }
        });
    }
    tasks
}

/// This node's engine, which is the first rank. Dropped, it is killed.
struct OwnEngine {
    stop: watch::Sender<bool>,
    life: JoinHandle<ChildEnd>,
    ended: Option<String>,
}

impl OwnEngine {
    fn start(
        host: &PipelineHost,
        command: EngineCommandLine,
        times: EngineTimes,
        beats: bool,
        sender: mpsc::Sender<News>,
    ) -> Self {
        let settings = EngineActorSettings {
            starter: Arc::new(command),
            load_time_max: times.load_max,
            silence_max: times.silence_max,
        };
        let on = move |news| {
            // There are two in an engine's life, and room for many: without it nobody reads, and this epoch ends.
            let _ = sender.try_send(News::Own(news));
        };
        let (stop, stopped) = watch::channel(false);
        let engine = host.engine().clone();
        let life = tokio::spawn(async move {
            engine_child::run(&settings, &engine, stopped, Some(HeadWatch { on: &on, beats })).await
        });
        Self { stop, life, ended: None }
    }

    /// Waits for its end, and says how it ended. Safe to cancel.
    async fn ended(&mut self) -> String {
        if let Some(ended) = &self.ended {
            return ended.clone();
        }
        let ended = (&mut self.life).await;
        let ended = ended.map_or_else(|error| format!("its supervisor failed: {error}"), |end| end.reason);
        self.ended.insert(ended).clone()
    }

    /// Ends it, and waits until it is gone.
    async fn end(mut self) {
        self.stop.send_replace(true);
        // Bounded by the child's own timeouts.
        self.ended().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::StageProfile;

    fn profile(weights: u128, layers: usize, links: &[u128]) -> MemberProfile {
        let link = |&to: &u128| types::LinkProfile { to: NodeId(to), latency_s: 0.001, bytes_per_s: 1e9 };
        MemberProfile {
            stage: StageProfile {
                memory_bytes: 1 << 30,
                weights: BlockHash(weights),
                layer_s: vec![(1, 0.001)],
                head_s: vec![(1, 0.002)],
                layer_bytes: vec![10; layers],
                embedding_bytes: 5,
                head_bytes: 6,
                hidden_bytes: 4,
                kv_bytes_per_token: 2,
            },
            links: links.iter().map(link).collect(),
            direct_port: None,
        }
    }

    #[test]
    fn members_with_another_model_are_named() {
        let check = |other: MemberProfile, expected: Option<&str>| {
            let told = same_model(&profile(1, 30, &[]), &other).err();
            assert_eq!(told.is_some(), expected.is_some(), "{told:?}");
            assert!(told.unwrap_or_default().contains(expected.unwrap_or_default()));
        };
        check(profile(1, 30, &[]), None);
        check(profile(2, 30, &[]), Some("its weights are"));
        check(profile(1, 32, &[]), Some("it counts 32 layers, the head 30"));
    }

    #[test]
    fn members_that_reach_others_otherwise_are_named() {
        let with = |direct_port| MemberProfile { direct_port, ..profile(1, 30, &[]) };
        assert_eq!(same_links(false, &with(None)), Ok(()));
        assert_eq!(same_links(true, &with(Some(7000))), Ok(()));
        assert!(
            same_links(true, &with(None))
                .is_err_and(|why| why.contains("through tunnels, the head's without"))
        );
        assert!(
            same_links(false, &with(Some(1)))
                .is_err_and(|why| why.contains("without tunnels, the head's through"))
        );
    }

    #[test]
    fn a_way_that_is_missing_is_a_members_fault() {
        let (members, names) = ([1, 2, 3].map(NodeId), ["a", "b", "c"].map(str::to_owned));
        let check = |ways: [&[u128]; 3], expected: Option<u128>| {
            let profiles = ways.map(|ways| profile(1, 30, ways));
            match (links(&members, &names, &profiles), expected) {
                (Ok(links), None) => assert!(links.iter().all(|row| row.len() == 3)),
                (Err(Unplanned::Member { node, .. }), Some(expected)) => assert_eq!(node, NodeId(expected)),
                (got, _) => panic!("{got:?}"),
            }
        };
        check([&[2, 3], &[1, 3], &[1, 2]], None);
        check([&[2, 3], &[1], &[1, 2]], Some(2));
        // The head itself cannot be left out.
        check([&[2], &[1, 3], &[1, 2]], Some(3));
    }
}
