//! One machine: the real node on a simulated socket, and the clients that are connected to its router.

use crate::{
    PORT, address,
    engine::Engines,
    network::{Network, SimSocket},
    record::World,
    scenario::{Job, Roles, model},
};
use futures_util::StreamExt;
use node::{
    DispatchSettings, ENGINE_SILENCE_MAX, MODEL_LOAD_TIME_MAX, NodeHandle, NodeSettings, StartEngine,
    start_on,
};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    task::spawn_local,
    time::{interval, sleep},
};
use transport::{ClusterKey, Endpoint};
use types::{Directory, EngineState, Generate, NodeId, RequestId, Role, limits};

/// A model of a few hundred megabytes from a fast disk.
const LOAD_TIME: Duration = Duration::from_millis(600);
/// What a machine that leaves is given to finish.
const LEAVE_TIME: Duration = Duration::from_millis(1500);
/// How often a router is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// What a machine is told.
#[derive(Debug)]
pub(crate) enum Order {
    /// A client is there.
    Serve(Box<Job>, RequestId),
    /// Leave the cluster in order.
    Leave,
}

/// All that a machine is given at each of its starts.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) world: World,
    pub(crate) index: usize,
    pub(crate) roles: Roles,
    pub(crate) seed: u64,
    pub(crate) key: ClusterKey,
    pub(crate) network: Network,
    pub(crate) frozen: watch::Receiver<bool>,
    pub(crate) peers: Vec<String>,
}

impl Machine {
    /// Its program, from its start to its end, if it has one.
    pub(crate) async fn run(self) -> turmoil::Result {
        let life = {
            let mut record = self.world.lock();
            let machine = &mut record.machines[self.index];
            (machine.lives, machine.is_up) = (machine.lives + 1, true);
            let lives = machine.lives;
            record.router_started(self.index);
            lives
        };
        // Different in each life, the same in each run.
        let name = u128::from(self.seed) << 64 | (self.index as u128 + 1) << 32 | u128::from(life);
        let socket = SimSocket::bind(self.network.clone(), name as u64 ^ self.seed).await?;
        let mut seed = [0; 32];
        seed[..16].copy_from_slice(&name.to_le_bytes());
        let endpoint =
            Endpoint::with_socket(Arc::new(socket), Arc::new(quinn::TokioRuntime), &self.key, Some(seed))?;
        let node = start_on(endpoint, self.settings(NodeId(name))).await?;
        let (inbox, mut orders) = mpsc::unbounded_channel();
        self.world.lock().machines[self.index].inbox = Some(inbox);
        let mut look = interval(LOOK_INTERVAL);
        loop {
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(Order::Serve(job, id)) => {
                        spawn_local(client(node.clone(), self.world.clone(), self.index, *job, id));
                    }
                    Some(Order::Leave) => {
                        node.drain(LEAVE_TIME).await;
                        node.shutdown().await;
                        return Ok(());
                    }
                    None => return Ok(()),
                },
                _ = look.tick() => self.look(&node),
            }
        }
    }

    fn settings(&self, id: NodeId) -> NodeSettings {
        let roles = [(Role::Node, self.roles.node), (Role::Router, self.roles.router)];
        let engines = Engines {
            world: self.world.clone(),
            machine: self.index,
            model: model(),
            load_time: LOAD_TIME,
            frozen: self.frozen.clone(),
        };
        NodeSettings {
            name: format!("m{}", self.index),
            cluster: "sim".to_owned(),
            id,
            roles: roles.into_iter().filter_map(|(role, has)| has.then_some(role)).collect(),
            hardware: "none".to_owned(),
            listen: (address(self.index), PORT).into(),
            keys: self.key.clone().into(),
            engine: self.roles.node.then(|| Arc::new(engines.host()) as Arc<dyn StartEngine>),
            dispatch: DispatchSettings::default(),
            wait_for_model: false,
            model_load_time_max: MODEL_LOAD_TIME_MAX,
            engine_silence_max: ENGINE_SILENCE_MAX,
            mdns: false,
            peers: self.peers.clone(),
            interfaces: Vec::new(),
            pipeline: None,
        }
    }

    /// Queues have their bounds; who is ready is known.
    fn look(&self, node: &NodeHandle) {
        let view = node.view();
        for known in view.nodes.iter().filter(|known| known.engine == EngineState::Ready && !known.avoided) {
            if let Some(machine) = known.name.strip_prefix('m').and_then(|index| index.parse().ok()) {
                self.world.lock().admitted(machine, self.index);
            }
        }
        if view.waiting as usize > limits::ROUTER_WAITING_MAX || view.nodes.len() > limits::NODES_MAX {
            let (waiting, nodes) = (view.waiting, view.nodes.len());
            let index = self.index;
            self.world
                .lock()
                .fault(format_args!("m{index} has {nodes} nodes, and {waiting} requests that wait"));
        }
    }
}

/// Says that a client's connection went with its router, unless told otherwise.
struct Connection {
    world: World,
    id: RequestId,
    is_over: bool,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.is_over {
            self.world.lock().router_lost(self.id);
        }
    }
}

async fn client(node: NodeHandle, world: World, router: usize, job: Job, id: RequestId) {
    let request = job.request(id);
    world.lock().sent(&job, router, &request);
    let mut connection = Connection { world: world.clone(), id, is_over: false };
    let served = async {
        match node.generate(request).await {
            Ok(mut generation) => {
                while let Some(event) = generation.events.next().await {
                    world.lock().event(id, event);
                }
                world.lock().ended(id);
            }
            Err(error) => world.lock().refused(id, &error),
        }
    };
    match job.cancel_after {
        None => served.await,
        Some(after) => tokio::select! {
            biased;
            () = served => {}
            () = sleep(after) => world.lock().cancelled(id),
        },
    }
    connection.is_over = true;
}
