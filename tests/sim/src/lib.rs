//! The cluster in virtual time: real router, wire, transport, node and engine on turmoil's network, with a model that
//! only pretends. A [`Scenario`] comes from a seed; [`run`] runs it and says which invariants broke.
//!
//! One thread, one order of events: the driver below steps the machines (`machine.rs`) a millisecond at a time, does to
//! them what the scenario says, and sends them clients. They tell the record (`record.rs`) what happens, which holds it
//! against the design's invariants as it does. Nothing reads the real clock or the system's random numbers where that
//! shows: the same seed gives the same trace and the same packets, to the byte.

mod engine;
mod machine;

mod network;
mod record;
mod scenario;

pub use record::Stats;
pub use scenario::{FaultKind, Scenario};

use machine::{Machine, Order};
use network::Network;
use record::{MachineRecord, RECOVERY_TIME_MAX, Record, World};
use scenario::{Fault, Job};
use std::{
    any::Any,
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
    time::Duration,
};
use tokio::sync::watch;
use turmoil::Sim;
use types::RequestId;

/// Where every machine's QUIC endpoint listens.
const PORT: u16 = 7979;
/// Steps of virtual time.
const TICK: Duration = Duration::from_millis(1);
/// Nothing on a network is faster.
const LATENCY_MIN: Duration = Duration::from_micros(200);
/// Packets that a machine's socket holds.
const SOCKET_PACKETS: usize = 4096;
/// How often it is looked who has which request.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// A request that has not come to its end by so long after the last fault hangs.
const END_TIME_MAX: Duration = Duration::from_secs(60);
/// Where the key of a test's cluster comes from does not matter, as long as it is the same in each run.
const KEY: &str = "mlxk1-07070707070707070707070707070707070707070707070707070707070707074bb06f8e";

/// A bug that can be put in, to see that the checks find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// Engines forget that requests were cancelled.
    ForgottenCancel,
    /// Engines take the answer so far for a part of the prompt: what follows is drawn as if it came first.
    AnswerAsPrompt,
    /// Engines forget the answer so far, and give it again.
    ForgottenAnswer,
}

/// What a run gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Everything that happened, a line each.
    pub trace: String,
    /// A hash of every packet, in their order.
    pub sent: u64,
    /// How the cluster broke its invariants.
    pub breaches: Vec<String>,
    /// What it did.
    pub stats: Stats,
}

/// Runs a scenario to its end.
pub fn run(scenario: &Scenario, mutant: Option<Mutant>) -> Outcome {
    let machines = scenario.machines.iter().map(|roles| MachineRecord {
        is_node: roles.node,
        is_router: roles.router,
        is_up: false,
        lives: 0,
        inbox: None,
        engine: None,
        engines: 0,
        awaited: BTreeMap::new(),
        frozen: watch::Sender::new(false),
        healthy_since: Some(Duration::ZERO),
    });
    let world = World::new(Record::new(machines.collect(), scenario::model()), mutant);
    let network = Network::default();
    let ended = thread::scope(|scope| {
        // A thread of its own, for its random numbers: some dependencies keep a generator for each thread.
        let thread = scope.spawn(|| {
            entropy::seed(scenario.seed);
            catch_unwind(AssertUnwindSafe(|| Driver::new(scenario, world.clone(), network.clone()).run()))
        });
        thread.join().unwrap_or_else(Err)
    });
    if let Err(panic) = ended {
        world.lock().fault(format_args!("panicked: {}", panic_message(&*panic)));
    }
    let record = world.lock();
    Outcome {
        trace: record.trace.clone(),
        sent: network.sent(),
        breaches: record.breaches.clone(),
        stats: record.stats,
    }
}

/// The address of a machine.
fn address(machine: usize) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, machine as u8 + 1).into()
}

struct Driver<'a> {
    scenario: &'a Scenario,
    world: World,
    sim: Sim<'a>,
    network: Network,
    requests: u128,
    checked: Duration,
}

impl<'a> Driver<'a> {
    fn new(scenario: &'a Scenario, world: World, network: Network) -> Self {
        let mut sim = turmoil::Builder::new()
            .rng_seed(scenario.seed)
            .tick_duration(TICK)
            .simulation_duration(Duration::from_secs(24 * 3600))
            .min_message_latency(LATENCY_MIN)
            .max_message_latency(scenario.latency_max)
            .udp_capacity(SOCKET_PACKETS)
            .build();
        let routers = scenario.machines.iter().enumerate().filter(|(_, roles)| roles.router);
        let peers: Vec<String> = routers.map(|(index, _)| format!("{}:{PORT}", address(index))).collect();
        for (index, &roles) in scenario.machines.iter().enumerate() {
            let machine = Machine {
                world: world.clone(),
                index,
                roles,
                seed: scenario.seed,
                key: KEY.parse().expect("a key"),
                network: network.clone(),
                frozen: world.lock().machines[index].frozen.subscribe(),
                peers: peers.clone(),
            };
            sim.host(address(index), move || machine.clone().run());
        }
        Self { scenario, world, sim, network, requests: 0, checked: Duration::ZERO }
    }

    fn run(mut self) {
        let mut jobs = self.scenario.jobs.iter().cloned().peekable();
        let mut begins = self.scenario.episodes.iter().peekable();
        let mut ends = self.scenario.episodes.iter().peekable();
        self.world.lock().open = self.scenario.jobs.iter().map(|job| job.index).collect();
        let mut done_at = None;
        loop {
            let now = self.sim.elapsed();
            self.world.lock().now = now;
            while let Some(episode) = ends.next_if(|episode| episode.ends <= now) {
                episode.faults.iter().for_each(|fault| self.end(fault));
            }
            while let Some(episode) = begins.next_if(|episode| episode.begins <= now) {
                episode.faults.iter().for_each(|fault| self.begin(fault));
            }
            while let Some(job) = jobs.next_if(|job| job.at <= now) {
                self.send(job);
            }
            self.send_again(now);
            if now >= self.checked + CHECK_INTERVAL {
                self.checked = now;
                self.world.lock().check_owners();
            }
            let mut record = self.world.lock();
            if record.open.is_empty() {
                // What is left over shows a little later.
                let done = *done_at.get_or_insert(now);
                if now >= done + RECOVERY_TIME_MAX {
                    return;
                }
            } else if now > self.scenario.quiet + END_TIME_MAX {
                let open = record.open.clone();
                record.fault(format_args!("the jobs {open:?} have not come to an end"));
                return;
            }
            drop(record);
            if let Err(error) = self.sim.step() {
                self.world.lock().fault(format_args!("a machine's program failed: {error}"));
                return;
            }
        }
    }

    fn begin(&mut self, fault: &Fault) {
        let mut record = self.world.lock();
        record.note(format_args!("fault {fault:?}"));
        record.stats.faults += 1;
        let hit = match fault {
            Fault::Loss(_) | Fault::Slow(_) => (0..record.machines.len()).collect(),
            fault => fault.machines(),
        };
        for machine in hit {
            record.machines[machine].healthy_since = None;
        }
        match *fault {
            Fault::Crash(machine) => {
                (record.machines[machine].inbox, record.machines[machine].is_up) = (None, false);
                drop(record);
                self.sim.crash(address(machine));
            }
            Fault::Leave(machine) => {
                let inbox = record.machines[machine].inbox.take();
                record.machines[machine].is_up = false;
                // One that is starting has none yet; it leaves by being started again.
                inbox.map(|inbox| inbox.send(Order::Leave));
            }
            Fault::EngineDeath(machine) => {
                if let Some(engine) = &record.machines[machine].engine {
                    engine.notify_one();
                }
            }
            Fault::Stall(machine) => {
                record.machines[machine].frozen.send_replace(true);
            }
            Fault::Freeze(machine) => {
                record.machines[machine].frozen.send_replace(true);
                drop(record);
                self.others(machine).for_each(|other| self.sim.hold(address(machine), other));
            }
            Fault::Cut(machine) => {
                drop(record);
                self.others(machine).for_each(|other| self.sim.partition(address(machine), other));
            }
            Fault::Split(one, other) => self.sim.partition(address(one), address(other)),
            Fault::OneWay(one, other) => self.sim.partition_oneway(address(one), address(other)),
            Fault::Loss(permille) => self.network.lose(permille),
            Fault::Slow(most) => self.sim.set_max_message_latency(most),
        }
    }

    fn end(&mut self, fault: &Fault) {
        let mut record = self.world.lock();
        record.note(format_args!("over: {fault:?}"));
        let now = record.now;
        for machine in &mut record.machines {
            machine.healthy_since = machine.healthy_since.or(Some(now));
        }
        match *fault {
            Fault::Crash(machine) | Fault::Leave(machine) => {
                record.machines[machine].inbox = None;
                drop(record);
                self.sim.bounce(address(machine));
            }
            Fault::EngineDeath(_) => {}
            Fault::Stall(machine) => {
                record.machines[machine].frozen.send_replace(false);
            }
            Fault::Freeze(machine) => {
                record.machines[machine].frozen.send_replace(false);
                drop(record);
                self.others(machine).for_each(|other| self.sim.release(address(machine), other));
            }
            Fault::Cut(machine) => {
                drop(record);
                self.others(machine).for_each(|other| self.sim.repair(address(machine), other));
            }
            Fault::Split(one, other) => self.sim.repair(address(one), address(other)),
            Fault::OneWay(one, other) => self.sim.repair_oneway(address(one), address(other)),
            Fault::Loss(_) => self.network.lose(0),
            Fault::Slow(_) => self.sim.set_max_message_latency(self.scenario.latency_max),
        }
    }

    fn others(&self, machine: usize) -> impl Iterator<Item = IpAddr> + use<> {
        let machines = self.scenario.machines.len();
        (0..machines).filter(move |&other| other != machine).map(address)
    }

    /// Sends a client to its router, or to one that is up, each in turn.
    fn send(&mut self, job: Job) {
        let mut record = self.world.lock();
        let is_up = |index: &usize| {
            let machine = &record.machines[*index];
            machine.is_router && machine.is_up && machine.inbox.is_some()
        };
        let up: Vec<usize> = (0..record.machines.len()).filter(is_up).collect();
        self.requests += 1;
        let router = match job.router {
            Some(router) => Some(router).filter(is_up),
            None if up.is_empty() => None,
            None => Some(up[self.requests as usize % up.len()]),
        };
        let id = RequestId(self.requests);
        let again = record.now + CHECK_INTERVAL;
        let Some(router) = router else {
            record.again.push((again, job));
            return;
        };
        let inbox = record.machines[router].inbox.clone();
        let order = Order::Serve(Box::new(job), id);
        let sent = inbox.map(|inbox| inbox.send(order));
        if let Some(Err(unsent)) = sent
            && let Order::Serve(job, _) = unsent.0
        {
            record.again.push((again, *job));
        }
    }

    fn send_again(&mut self, now: Duration) {
        let mut record = self.world.lock();
        let all = std::mem::take(&mut record.again);
        let (due, later): (Vec<_>, Vec<_>) = all.into_iter().partition(|(at, _)| *at <= now);
        record.again = later;
        drop(record);
        for (_, job) in due {
            self.send(job);
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}
