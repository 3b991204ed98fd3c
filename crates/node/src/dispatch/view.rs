//! What a router tells of itself and of its nodes.

use super::ask::Ask;
use super::{Dispatch, State, now};
use crate::pipeline::Seen;
use crate::settings::TRIES_MAX;
use crate::target::Target;
use router::RouteError;
use std::collections::BTreeMap;
use transport::Peer;
use types::{
    AssetsHash, ClusterView, EngineState, GenerateError, ModelCard, NodeId, NodePrediction, NodeView,
    RouteInfo, RouteNode, RoutePlan,
};

impl Dispatch {
    /// What would become of a request now, and why.
    pub(crate) fn plan(&self, ask: &Ask) -> Result<RoutePlan, GenerateError> {
        let state = self.lock();
        let nodes = state.considered(ask);
        let query = ask.query(&[]);
        let (route, wait) = match state.router.route(&query, now()) {
            Ok(route) => (state.info(&route), None),
            Err(RouteError::AllBusy { retry_after }) => {
                (None, state.predicted_wait(ask).max(Some(retry_after)))
            }
            Err(error) => return Err(ask.error(error)),
        };
        Ok(RoutePlan {
            model: ask.model.clone(),
            prompt_tokens: ask.tokens,
            max_tokens: ask.max_tokens,
            route,
            waiting: state.waiting.len() as u32,
            wait_s: wait.map(|wait| wait.as_secs_f64()),
            nodes,
        })
    }

    pub(crate) fn models(&self) -> Vec<ModelCard> {
        self.lock().router.models()
    }

    /// Nodes that serve a model with these assets, this process first.
    pub(crate) fn holders(&self, hash: AssetsHash) -> Vec<Target> {
        let state = self.lock();
        let has = |node| {
            state.router.node(node).is_some_and(|known| known.models().iter().any(|card| card.assets == hash))
        };
        let holders =
            state.nodes.iter().filter(|(node, _)| has(**node)).map(|(_, entry)| entry.target.clone());
        let mut holders: Vec<Target> = holders.collect();
        holders.sort_by_key(|target| target.peer().is_some());
        holders.truncate(TRIES_MAX);
        holders
    }

    /// Nodes whose engine has a cache, and so may have sessions; with their names.
    pub(crate) fn session_holders(&self) -> Vec<(NodeId, String, Target)> {
        let state = self.lock();
        let holders = state.nodes.iter().filter(|(node, _)| {
            let known = state.router.node(**node).map(router::KnownNode::state);
            matches!(known, Some(EngineState::Ready | EngineState::Draining))
        });
        holders.map(|(&node, entry)| (node, entry.hello.name.clone(), entry.target.clone())).collect()
    }

    /// Another node that is connected.
    pub(crate) fn peer(&self, node: NodeId) -> Option<Peer> {
        self.lock().nodes.get(&node)?.target.peer().cloned()
    }

    /// A node's name for people, or its id.
    pub(crate) fn name(&self, node: NodeId) -> String {
        let state = self.lock();
        state.nodes.get(&node).map_or_else(|| node.to_string(), |entry| entry.hello.name.clone())
    }

    /// Other nodes that tell of a pipeline of this model, and do not leave.
    pub(crate) fn pipeline_members(&self, model: &str) -> BTreeMap<NodeId, Seen> {
        let state = self.lock();
        let seen = state.nodes.iter().filter_map(|(&node, entry)| {
            let report = entry.pipeline.as_ref().filter(|report| report.model == model)?;
            let leaves = state.router.node(node).is_none_or(|it| *it.state() == EngineState::Draining);
            let is_other = entry.target.peer().is_some();
            (is_other && !leaves).then(|| (node, Seen { name: entry.hello.name.clone(), head: report.head }))
        });
        seen.collect()
    }

    pub(crate) fn view(&self) -> ClusterView {
        let state = self.lock();
        let nodes = state.nodes.iter().filter_map(|(&id, entry)| {
            let known = state.router.node(id)?;
            let peer = entry.target.peer();
            Some(NodeView {
                id,
                name: entry.hello.name.clone(),
                local: peer.is_none(),
                address: peer.map(Peer::remote_address),
                hardware: entry.hello.hardware.clone(),
                version: entry.hello.program.clone(),
                engine: known.state().clone(),
                models: known.models().to_vec(),
                load: known.load().copied(),
                rtt_s: peer.map(|peer| peer.rtt().as_secs_f32()),
                cached_blocks: state.router.cached_blocks(id) as u64,
                prediction: state.router.learned(id).map(prediction).unwrap_or_default(),
                avoided: !entry.breaker.admits(now()) || state.hanging.contains(&id),
                pipeline: entry.pipeline.clone(),
            })
        });
        let mut nodes: Vec<NodeView> = nodes.collect();
        nodes.sort_by(|one, two| (&one.name, one.id).cmp(&(&two.name, two.id)));
        ClusterView {
            cluster: self.cluster.clone(),
            nodes,
            in_flight: state.router.in_flight() as u32,
            waiting: state.waiting.len() as u32,
            draining: state.draining,
            moves: state.moves.counts,
            recent_moves: state.moves.recent(now()),
        }
    }
}

impl State {
    pub(super) fn info(&self, route: &router::Route) -> Option<RouteInfo> {
        Some(RouteInfo {
            node: route.node,
            node_name: self.nodes.get(&route.node)?.hello.name.clone(),
            matched_tokens: route.matched_tokens,
            reason: route.reason.to_string(),
        })
    }

    /// All nodes with all that speaks for and against them.
    pub(super) fn considered(&self, ask: &Ask) -> Vec<RouteNode> {
        let now = now();
        let considered = self.router.explain(&ask.query(&[]), now).into_iter().filter_map(|one| {
            let entry = self.nodes.get(&one.node)?;
            let broken = (!entry.breaker.admits(now)).then(|| "it failed lately".to_owned());
            let hangs = self.hanging.contains(&one.node).then(|| "it brings nothing".to_owned());
            Some(RouteNode {
                node: one.node,
                name: entry.hello.name.clone(),
                matched_tokens: one.matched_tokens,
                requests: one.requests,
                backlog_s: one.cost.backlog_s,
                slot_s: one.cost.slot_s,
                prefill_s: one.cost.prefill_s,
                rtt_s: one.cost.rtt_s,
                evict_s: one.cost.evict_s,
                others_s: one.cost.others_s,
                decode_s: one.cost.decode_s,
                total_s: one.cost.total_s(),
                excluded: one.excluded.map(|excluded| excluded.to_string()).or(broken).or(hangs),
            })
        });
        considered.collect()
    }
}

fn prediction(learned: router::Learned) -> NodePrediction {
    NodePrediction {
        requests: learned.requests,
        prefill_tokens_per_s: learned.prefill_tokens_per_s,
        decode_scale: learned.decode_scale,
        bias: learned.bias,
        error: learned.error,
    }
}
