//! The same for what members of a pipeline say.

use super::text;
use proptest::{collection::vec, option, prelude::*};
use types::{
    BlockHash, EpochId, LinkProfile, MeasureQuery, MemberProfile, NodeId, PipelinePhase, PipelinePlan,
    PipelineReport, PlannedStage, StageNews, StageOrder, StageProfile, TunnelOrder,
};
use wire::{EngineReport, Reply, Request};

fn node() -> impl Strategy<Value = NodeId> {
    any::<u128>().prop_map(NodeId)
}

fn epoch() -> impl Strategy<Value = EpochId> {
    (node(), any::<u64>()).prop_map(|(head, number)| EpochId { head, number })
}

fn times() -> impl Strategy<Value = Vec<(u32, f64)>> {
    vec((any::<u32>(), 0f64..10.0), 0..6)
}

fn profile() -> impl Strategy<Value = StageProfile> {
    let bytes = (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>());
    (bytes, any::<u128>(), times(), times(), vec(any::<u64>(), 0..100)).prop_map(
        |((memory, embedding, head, hidden, kv), weights, layer_s, head_s, layer_bytes)| StageProfile {
            memory_bytes: memory,
            weights: BlockHash(weights),
            layer_s,
            head_s,
            layer_bytes,
            embedding_bytes: embedding,
            head_bytes: head,
            hidden_bytes: hidden,
            kv_bytes_per_token: kv,
        },
    )
}

pub(super) fn request() -> impl Strategy<Value = Request> {
    let ranges = vec((any::<u32>(), any::<u32>()), 0..9);
    let order = (epoch(), text(), any::<u128>(), any::<u32>(), vec(node(), 0..9), ranges, any::<u64>())
        .prop_map(|(epoch, model, weights, rank, members, layers, kv_tokens)| StageOrder {
            epoch,
            model,
            weights: BlockHash(weights),
            rank,
            members,
            layers,
            kv_tokens,
            direct_ports: vec![7000, 7001],
        });
    prop_oneof![
        (text(), vec(node(), 0..9))
            .prop_map(|(model, members)| Request::Measure(MeasureQuery { model, members })),
        order.prop_map(Request::Stage),
        (epoch(), any::<u32>()).prop_map(|(epoch, rank)| Request::Tunnel(TunnelOrder { epoch, rank })),
        any::<u64>().prop_map(|bytes| Request::Probe { bytes }),
    ]
}

pub(super) fn reply() -> impl Strategy<Value = Reply> {
    let link = (node(), 0f64..1.0, 0f64..1e12).prop_map(|(to, latency_s, bytes_per_s)| LinkProfile {
        to,
        latency_s,
        bytes_per_s,
    });
    let news = prop_oneof![
        Just(StageNews::Started),
        Just(StageNews::Joined),
        Just(StageNews::Ready),
        any::<u64>().prop_map(|passes| StageNews::Beat { passes }),
        text().prop_map(|message| StageNews::Failed { message }),
    ];
    prop_oneof![
        (profile(), vec(link, 0..9), any::<Option<u16>>()).prop_map(|(stage, links, direct_port)| {
            Reply::Measured(MemberProfile { stage, links, direct_port })
        }),
        news.prop_map(Reply::Stage),
        Just(Reply::Tunnel),
        Just(Reply::Probed),
    ]
}

pub(super) fn engine_report() -> impl Strategy<Value = EngineReport> {
    prop_oneof![
        Just(EngineReport::Joined),
        Just(EngineReport::StageReady),
        any::<u64>().prop_map(|passes| EngineReport::Beat { passes }),
        profile().prop_map(EngineReport::Profile),
    ]
}

pub(super) fn report() -> impl Strategy<Value = PipelineReport> {
    let phase = prop_oneof![
        Just(PipelinePhase::Waiting),
        Just(PipelinePhase::Planning),
        Just(PipelinePhase::Starting),
        Just(PipelinePhase::Running),
        Just(PipelinePhase::Refused),
    ];
    let stage = (node(), text(), any::<(u32, u32)>(), any::<(u64, u64, u64)>(), (0f64..1.0, 0f64..1.0))
        .prop_map(|(node, name, layers, (weight_bytes, kv_bytes, memory_bytes), (stage_s, link_s))| {
            PlannedStage { node, name, layers, weight_bytes, kv_bytes, memory_bytes, stage_s, link_s }
        });
    let plan = (vec(stage, 0..9), any::<u64>(), any::<(u32, u32, u32)>(), (0f64..1.0, 0f64..1e6, 0f64..1.0));
    let plan = plan.prop_map(|(stages, kv_tokens, (rows, micro_batches, micro_rows), times)| PipelinePlan {
        stages,
        kv_tokens,
        rows,
        micro_batches,
        micro_rows,
        cycle_s: times.0,
        tokens_per_s: times.1,
        bubble: times.2,
    });
    (text(), option::of(node()), any::<u64>(), phase, text(), option::of(plan)).prop_map(
        |(model, head, epoch, phase, detail, plan)| PipelineReport {
            model,
            head,
            epoch,
            phase,
            detail,
            plan,
        },
    )
}
