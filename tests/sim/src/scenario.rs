//! What a seed stands for: machines, what is done to them and when, and what clients want meanwhile.

use engine::ModelLimits;
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};
use std::time::Duration;
use testkit::{FakeSettings, StepCost};
use types::{
    CacheScope, GenerateDraft, GenerateRequest, OutputRules, Priority, RequestId, SamplingDraft, Service,
    Speculation, TokenId, TokenReport,
};

/// Everything runs before anything is done to it.
const WARM_UP: Duration = Duration::from_secs(4);
/// From the first fault to the last in a random scenario.
const FAULTY_TIME: Duration = Duration::from_secs(24);
/// Between two clients: what waited during a fault is made up for soon.
const JOB_GAP_MEAN: Duration = Duration::from_millis(450);
/// The same where each node is needed all the time.
const JOB_GAP_MEAN_BUSY: Duration = Duration::from_millis(150);
/// Texts that an engine runs side by side.
const SLOTS: usize = 8;
/// Prompts begin with one of these; blocks of them are cached.
const SYSTEM_PROMPTS: u32 = 3;

/// A text that a client wants.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) index: u32,
    pub(crate) at: Duration,
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) max_tokens: u32,
    /// Goes on to `max_tokens`, whatever the model says.
    pub(crate) is_long: bool,
    pub(crate) seed: u64,
    pub(crate) cancel_after: Option<Duration>,
    /// Asks whether this router serves.
    pub(crate) router: Option<usize>,
    /// When the last fault ended, for which this one asks.
    pub(crate) probe_of: Option<Duration>,
}

impl Job {
    pub(crate) fn request(&self, id: RequestId) -> GenerateRequest {
        // That it serves is asked, not how long those take that waited.
        let priority = if self.probe_of.is_some() { Priority::High } else { Priority::Normal };
        let temperature = if self.seed == 0 { 0.0 } else { 1.0 };
        let sampling = SamplingDraft { temperature, seed: self.seed, ..SamplingDraft::default() };
        let draft = GenerateDraft {
            id,
            model: model().name,
            prompt: self.prompt.clone(),
            sampling: sampling.try_into().expect("in range"),
            max_tokens: self.max_tokens,
            stop_tokens: Vec::new(),
            ignore_eos: self.is_long,
            service: Service { priority, ..Service::default() },
            cache: CacheScope::default(),
            output: Vec::new(),
            rules: OutputRules::default(),
            report: TokenReport::default(),
            speculation: Speculation::default(),
        };
        draft.try_into().expect("a valid request")
    }
}

/// What every engine serves.
pub(crate) fn model() -> FakeSettings {
    let cost = StepCost { jitter: 0.2, ..StepCost::mac() };
    let limits = ModelLimits { slots: SLOTS, ..FakeSettings::default().limits };
    FakeSettings { cost, limits, eos_at: Some(5..=120), ..FakeSettings::default() }
}

/// Something that is done to the cluster.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fault {
    /// The program ends at once, its engine too; at the end of the episode it is started again.
    Crash(usize),
    /// It leaves in order; then the same.
    Leave(usize),
    /// Its engine dies.
    EngineDeath(usize),
    /// Its engine stands still; the rest of it does not.
    Stall(usize),
    /// Its engine stands still, and what is sent to it and by it comes late.
    Freeze(usize),
    /// No packet gets to it or away from it.
    Cut(usize),
    /// None between these two.
    Split(usize, usize),
    /// None from the first to the second.
    OneWay(usize, usize),
    /// Of a thousand packets, so many are lost.
    Loss(u32),
    /// Packets take up to so long, each its own time.
    Slow(Duration),
}

impl Fault {
    /// The machines it is done to.
    pub(crate) fn machines(&self) -> Vec<usize> {
        match *self {
            Self::Crash(one)
            | Self::Leave(one)
            | Self::EngineDeath(one)
            | Self::Stall(one)
            | Self::Freeze(one)
            | Self::Cut(one) => vec![one],
            Self::Split(one, other) | Self::OneWay(one, other) => vec![one, other],
            Self::Loss(_) | Self::Slow(_) => Vec::new(),
        }
    }
}

/// Faults that begin and end together.
#[derive(Debug, Clone)]
pub(crate) struct Episode {
    pub(crate) begins: Duration,
    pub(crate) ends: Duration,
    pub(crate) faults: Vec<Fault>,
}

/// What one machine does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Roles {
    pub(crate) node: bool,
    pub(crate) router: bool,
}

/// A run, to the last detail.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub(crate) seed: u64,
    pub(crate) machines: Vec<Roles>,
    pub(crate) latency_max: Duration,
    /// One after another.
    pub(crate) episodes: Vec<Episode>,
    /// In the order of their times.
    pub(crate) jobs: Vec<Job>,
    /// The end of the last episode.
    pub(crate) quiet: Duration,
}

const BOTH: Roles = Roles { node: true, router: true };
const NODE: Roles = Roles { node: true, router: false };
const ROUTER: Roles = Roles { node: false, router: true };

impl Scenario {
    /// Anything may happen to all machines but one, which has an engine; the cluster can serve all the time.
    pub fn random(seed: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let clusters: [&[Roles]; 5] = [
            &[BOTH, BOTH, BOTH],
            &[BOTH, BOTH, BOTH, BOTH],
            &[NODE, NODE, NODE, ROUTER],
            &[NODE, NODE, NODE, ROUTER, ROUTER],
            &[BOTH, NODE, NODE, BOTH],
        ];
        let machines = clusters.choose(&mut random).expect("some").to_vec();
        let nodes: Vec<usize> = (0..machines.len()).filter(|&index| machines[index].node).collect();
        let rock = *nodes.choose(&mut random).expect("some");
        let mut episodes = Vec::new();
        let mut at = WARM_UP;
        while at < WARM_UP + FAULTY_TIME {
            let lasts = Duration::from_millis(random.random_range(100..5000));
            let mut faults = Vec::new();
            for _ in 0..random.random_range(1..=2) {
                let fault = random_fault(&mut random, &machines, rock);
                let taken = |other: &Fault| other.machines().iter().any(|it| fault.machines().contains(it));
                if !faults.iter().any(taken) {
                    faults.push(fault);
                }
            }
            episodes.push(Episode { begins: at, ends: at + lasts, faults });
            at += lasts + Duration::from_millis(random.random_range(0..3000));
        }
        let latency_max = Duration::from_millis(random.random_range(1..=20));
        Self::new(seed, machines, latency_max, (episodes, JOB_GAP_MEAN), &mut random)
    }

    /// Four machines of which one dies every ten seconds, for so long.
    pub fn kills(seed: u64, lasts: Duration) -> Self {
        const INTERVAL: Duration = Duration::from_secs(10);
        let mut random = SmallRng::seed_from_u64(seed);
        let machines = vec![NODE, NODE, NODE, NODE, ROUTER];
        let kills = lasts.as_secs() / INTERVAL.as_secs();
        let mut episodes = Vec::new();
        for kill in 0..kills {
            let begins = WARM_UP + INTERVAL * kill as u32;
            let down = Duration::from_millis(random.random_range(500..4000));
            let faults = vec![Fault::Crash(random.random_range(0..4))];
            episodes.push(Episode { begins, ends: begins + down, faults });
        }
        Self::new(seed, machines, Duration::from_millis(2), (episodes, JOB_GAP_MEAN_BUSY), &mut random)
    }

    /// The same machines and faults of one kind only, one machine after another.
    pub fn of(seed: u64, fault: fn(usize) -> FaultKind) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let machines = vec![NODE, NODE, NODE, ROUTER];
        let episode = |index: usize| {
            let begins = WARM_UP + Duration::from_secs(9) * index as u32;
            let faults = vec![fault(index % 3).0];
            Episode { begins, ends: begins + Duration::from_secs(6), faults }
        };
        let episodes = (0..3).map(episode).collect();
        Self::new(seed, machines, Duration::from_millis(2), (episodes, JOB_GAP_MEAN), &mut random)
    }

    fn new(
        seed: u64,
        machines: Vec<Roles>,
        latency_max: Duration,
        (episodes, gap): (Vec<Episode>, Duration),
        random: &mut SmallRng,
    ) -> Self {
        let quiet = episodes.iter().map(|episode| episode.ends).max().unwrap_or(WARM_UP);
        let mut jobs = Vec::new();
        let mut at = WARM_UP - Duration::from_millis(1500);
        while at < quiet + Duration::from_secs(2) {
            jobs.push(random_job(random, jobs.len() as u32, at));
            at += Duration::from_micros(random.random_range(1..2 * gap.as_micros() as u64));
        }
        for (index, _) in machines.iter().enumerate().filter(|(_, roles)| roles.router) {
            let mut probe = random_job(random, jobs.len() as u32, quiet);
            (probe.router, probe.probe_of, probe.cancel_after) = (Some(index), Some(quiet), None);
            (probe.is_long, probe.max_tokens) = (false, 20);
            jobs.push(probe);
        }
        jobs.sort_by_key(|job| job.at);
        Self { seed, machines, latency_max, episodes, jobs, quiet }
    }
}

/// A kind of fault, for [`Scenario::of`].
#[derive(Debug, Clone, PartialEq)]
pub struct FaultKind(Fault);

impl FaultKind {
    /// The engine stands still while the node goes on.
    pub fn stall(machine: usize) -> Self {
        Self(Fault::Stall(machine))
    }

    /// The machine's cable is cut.
    pub fn cut(machine: usize) -> Self {
        Self(Fault::Cut(machine))
    }

    /// The machine is stopped for a while.
    pub fn freeze(machine: usize) -> Self {
        Self(Fault::Freeze(machine))
    }
}

fn random_fault(random: &mut SmallRng, machines: &[Roles], rock: usize) -> Fault {
    let others: Vec<usize> = (0..machines.len()).filter(|&index| index != rock).collect();
    let one = *others.choose(random).expect("a cluster has several machines");
    let other = *others.iter().filter(|&&it| it != one).collect::<Vec<_>>().choose(random).expect("three");
    match random.random_range(0..12) {
        0 | 1 => Fault::Crash(one),
        2 => Fault::Leave(one),
        3 | 4 if machines[one].node => Fault::EngineDeath(one),
        5 if machines[one].node => Fault::Stall(one),
        6 => Fault::Freeze(one),
        7 => Fault::Cut(one),
        8 => Fault::Split(one, *other),
        9 => Fault::OneWay(one, *other),
        10 => Fault::Loss(random.random_range(5..80)),
        11 => Fault::Slow(Duration::from_millis(random.random_range(20..120))),
        _ => Fault::Crash(one),
    }
}

fn random_job(random: &mut SmallRng, index: u32, at: Duration) -> Job {
    let system = random.random_range(0..SYSTEM_PROMPTS);
    let mut prompt: Vec<TokenId> = (0..96).map(|token| 1 + (system * 131 + token * 7) % 900).collect();
    prompt.truncate(random.random_range(40..=96));
    prompt.extend((0..random.random_range(1..120)).map(|_| random.random_range(1..1000)));
    let is_long = random.random_bool(0.1);
    let cancel_after = random.random_bool(0.1).then(|| Duration::from_millis(random.random_range(0..3000)));
    Job {
        index,
        at,
        prompt,
        max_tokens: if is_long { random.random_range(200..=400) } else { random.random_range(1..=80) },
        is_long,
        seed: if random.random_bool(0.5) { 0 } else { random.random() },
        cancel_after,
        router: None,
        probe_of: None,
    }
}
