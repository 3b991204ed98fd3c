//! [`Group`]: one member's view of its pipeline, without processes, sockets or a clock: who is there, who is the head, and
//! what a head does next. Events and times go in, [`Action`]s come out.
//!
//! The head is whoever is in office; where nobody is, the first of those present: in the order in which members are named,
//! else by id. It has members measured (a *round*), makes a plan, and starts an *epoch*, all processes of which live and end
//! together: where one fails, the epoch is torn down and a plan is made of who is left. A member that comes while an epoch
//! runs is taken in once nothing has been asked for a while.
//!
//! Contract: [`Group::handle`] is given every event, [`Event::Present`] at least every 100 ms, and its actions are carried
//! out in order. There is one round and one epoch at a time; after [`Action::Tear`] comes [`Event::Torn`] once all that this
//! process has of the epoch is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use types::{NodeId, PipelinePhase, limits::PIPELINE_MEMBERS_MAX};

/// Changes of who is there come in bursts: nothing is begun before they have ended.
const SETTLE: Duration = Duration::from_millis(300);
/// The same where anybody may belong: machines that are switched on together are found over mDNS within a few seconds.
const AUTO_SETTLE: Duration = Duration::from_secs(3);
/// A plan is made without those named who are not there by then.
const MISSING_TIME_MAX: Duration = Duration::from_secs(10);
/// From the start of an epoch's processes to their having found each other: each starts within a second or two, and where a
/// stranger took a neighbour's place, or one of them hangs, nobody else will ever tell.
const JOIN_TIME_MAX: Duration = Duration::from_secs(12);
/// A round has members measure at the same time, each within [`transport::limits::MEASURE_TIME_MAX`].
const ROUND_TIME_MAX: Duration = Duration::from_secs(70);
/// First wait after a start that failed; each further one in a row is twice as long.
const RETRY_DELAY: Duration = Duration::from_millis(250);
/// The longest: what keeps members from starting is commonly mended by hand.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(10);
/// First time for which a member is left out that spoiled a round or a start; each further one in a row is twice as long.
const BLAME_TIME: Duration = Duration::from_secs(2);
/// The longest.
const BLAME_TIME_MAX: Duration = Duration::from_secs(60);
/// Where there is no plan, one is looked for again after this long, or when others are there.
const REFUSED_TIME: Duration = Duration::from_secs(30);
/// A member that comes while an epoch runs is taken in once it has been there for this long, so that one that comes and
/// goes costs nothing.
const NEWCOMER_TIME: Duration = Duration::from_secs(2);
/// And once nothing has been asked for this long: between two turns of a conversation there is more.
const QUIET_TIME: Duration = Duration::from_secs(1);

const _: () = assert!(BLAME_TIME.as_millis() < BLAME_TIME_MAX.as_millis());

/// Who may belong to a pipeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PipelineMembers {
    /// Nodes of these names, in the order in which they become heads.
    Named(Vec<String>),
    /// All that have the same pipeline in their configuration.
    Auto,
}

/// Another node that tells of the same pipeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub name: String,
    /// Whom it takes for the head.
    pub head: Option<NodeId>,
}

/// Why a round gave no plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unplanned {
    /// A member did not answer, or does not fit the others.
    Member { node: NodeId, reason: String },
    /// All answered, and there is no plan.
    Refused(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Who is there now, but for this node, and whether nothing is asked of this node's engine.
    Present { seen: BTreeMap<NodeId, Seen>, quiet: bool },
    /// A round has ended; with whom the plan is made, by rank.
    Planned { round: u64, members: Result<Vec<NodeId>, Unplanned> },
    /// All processes of the epoch have found each other.
    Joined(u64),
    /// It serves.
    Up(u64),
    /// A part of it failed; whose, where that is known.
    Failed { epoch: u64, culprit: Option<NodeId>, reason: String },
    /// Nothing of it is left here.
    Torn(u64),
    /// This node hosts a stage for that head, or does no longer.
    Leased(Option<NodeId>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Have these measured, this node first, and make a plan. A round before is void.
    Plan { round: u64, members: Vec<NodeId> },
    /// Start what the round planned.
    Start { epoch: u64, round: u64 },
    /// End the epoch; requests that its engine had are to go on in the next one, or elsewhere.
    Tear { epoch: u64, reason: String },
}

/// What others are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stand {
    pub head: Option<NodeId>,
    pub epoch: u64,
    pub phase: PipelinePhase,
    pub detail: String,
}

#[derive(Debug)]
pub struct Group {
    own: NodeId,
    name: String,
    members: PipelineMembers,
    began: Instant,
    seen: BTreeMap<NodeId, Seen>,
    since: BTreeMap<NodeId, Instant>,
    /// When somebody came or went last.
    changed: Instant,
    /// Since when nothing is asked.
    quiet: Option<Instant>,
    leased: Option<NodeId>,
    office: bool,
    /// There was a pipeline before: who is not there by now is lost, not late.
    had_one: bool,
    rounds: u64,
    round: Option<Round>,
    epochs: u64,
    epoch: Option<Epoch>,
    /// Nothing is begun before.
    wait: Option<Instant>,
    /// Starts that failed in a row.
    failures: u32,
    last_failure: Option<String>,
    blamed: BTreeMap<NodeId, Blame>,
    /// Those that plans were looked for with, and that the running one does without.
    considered: BTreeSet<NodeId>,
    refused: Option<Refused>,
}

#[derive(Debug)]
struct Round {
    number: u64,
    members: Vec<NodeId>,
    until: Instant,
}

#[derive(Debug)]
struct Epoch {
    number: u64,
    members: Vec<NodeId>,
    state: EpochState,
}

#[derive(Debug)]
enum EpochState {
    /// Some have not found their neighbours; it fails if that lasts.
    Joining {
        until: Instant,
    },
    Loading,
    Running,
    /// It ends; then what this round planned is started.
    Tearing {
        next: Option<(u64, Vec<NodeId>)>,
    },
}

#[derive(Debug)]
struct Blame {
    strikes: u32,
    until: Instant,
    reason: String,
}

#[derive(Debug)]
struct Refused {
    why: String,
    members: Vec<NodeId>,
    until: Instant,
}

impl Group {
    pub fn new(own: NodeId, name: String, members: PipelineMembers, now: Instant) -> Self {
        Self {
            own,
            name,
            members,
            began: now,
            seen: BTreeMap::new(),
            since: BTreeMap::new(),
            changed: now,
            quiet: None,
            leased: None,
            office: false,
            had_one: false,
            rounds: 0,
            round: None,
            epochs: 0,
            epoch: None,
            wait: None,
            failures: 0,
            last_failure: None,
            blamed: BTreeMap::new(),
            considered: BTreeSet::new(),
            refused: None,
        }
    }

    /// Takes an event and says what is to be done.
    pub fn handle(&mut self, now: Instant, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Present { seen, quiet } => self.present(now, seen, quiet),
            Event::Planned { round, members } => self.planned(now, round, members, &mut actions),
            Event::Joined(number) => {
                if let Some(epoch) = self.epoch.as_mut().filter(|epoch| epoch.number == number)
                    && matches!(epoch.state, EpochState::Joining { .. })
                {
                    epoch.state = EpochState::Loading;
                }
            }
            Event::Up(number) => self.up(number),
            Event::Failed { epoch, culprit, reason } => {
                self.failed(now, epoch, culprit, reason, &mut actions);
            }
            Event::Torn(number) => self.torn(now, number, &mut actions),
            Event::Leased(head) => {
                self.leased = head;
                self.had_one |= head.is_some();
            }
        }
        self.decide(now, &mut actions);
        actions
    }

    pub fn stand(&self, now: Instant) -> Stand {
        let head = self.head(now);
        let (phase, detail) = self.told(head);
        Stand { head, epoch: self.epochs, phase, detail }
    }

    /// The head, as far as this node knows.
    fn head(&self, now: Instant) -> Option<NodeId> {
        if self.leased.is_some() {
            return self.leased;
        }
        let claims = self.seen.iter().filter(|(node, seen)| seen.head == Some(**node)).map(|(node, _)| *node);
        let own = self.office.then_some(self.own);
        let claimed = claims.chain(own).min_by_key(|node| self.order(*node));
        claimed.or_else(|| {
            let first = self.seen.keys().copied().chain([self.own]).min_by_key(|node| self.order(*node))?;
            (first == self.own && self.is_settled(now)).then_some(self.own)
        })
    }

    /// Heads come in this order.
    fn order(&self, node: NodeId) -> (usize, NodeId) {
        let name =
            if node == self.own { Some(&self.name) } else { self.seen.get(&node).map(|seen| &seen.name) };
        let place = match &self.members {
            PipelineMembers::Named(names) => {
                name.and_then(|name| names.iter().position(|named| named == name)).unwrap_or(names.len())
            }
            PipelineMembers::Auto => 0,
        };
        (place, node)
    }

    /// Those named who are not there.
    fn missing(&self) -> Vec<&str> {
        let PipelineMembers::Named(names) = &self.members else { return Vec::new() };
        let there = |name: &str| self.name == name || self.seen.values().any(|seen| seen.name == name);
        names.iter().map(String::as_str).filter(|name| !there(name)).collect()
    }

    /// Whether those who are there are all that are to be expected for now.
    fn is_settled(&self, now: Instant) -> bool {
        let still = now.saturating_duration_since(self.changed);
        if self.had_one {
            return still >= SETTLE;
        }
        match self.members {
            PipelineMembers::Named(_) if self.missing().is_empty() => still >= SETTLE,
            PipelineMembers::Named(_) => now.saturating_duration_since(self.began) >= MISSING_TIME_MAX,
            PipelineMembers::Auto => still >= AUTO_SETTLE,
        }
    }

    /// Who could belong to a plan, this node first.
    fn eligible(&self, now: Instant) -> Vec<NodeId> {
        let blamed = |node: &NodeId| self.blamed.get(node).is_some_and(|blame| blame.until > now);
        let mut others: Vec<NodeId> = self.seen.keys().copied().filter(|node| !blamed(node)).collect();
        others.sort_by_key(|node| self.order(*node));
        others.truncate(PIPELINE_MEMBERS_MAX - 1);
        [self.own].into_iter().chain(others).collect()
    }

    fn present(&mut self, now: Instant, seen: BTreeMap<NodeId, Seen>, quiet: bool) {
        if !seen.keys().eq(self.seen.keys()) {
            self.changed = now;
        }
        self.since.retain(|node, _| seen.contains_key(node));
        for node in seen.keys() {
            self.since.entry(*node).or_insert(now);
        }
        self.considered.retain(|node| seen.contains_key(node));
        self.seen = seen;
        self.quiet = if quiet { self.quiet.or(Some(now)) } else { None };
    }

    fn planned(
        &mut self,
        now: Instant,
        number: u64,
        members: Result<Vec<NodeId>, Unplanned>,
        actions: &mut Vec<Action>,
    ) {
        let Some(round) = self.round.take_if(|round| round.number == number) else { return };
        let is_quiet = self.is_quiet(now);
        match members {
            Ok(members) => {
                let Some(epoch) = &mut self.epoch else {
                    // Those who came since, or were left out for a while, were not.
                    let left_out = |node: &NodeId| !members.contains(node);
                    self.considered = round.members.into_iter().filter(left_out).collect();
                    self.start(now, number, members, actions);
                    return;
                };
                let differs = members.iter().collect::<BTreeSet<_>>() != epoch.members.iter().collect();
                if !differs {
                    self.considered.extend(round.members);
                } else if matches!(epoch.state, EpochState::Running) && is_quiet {
                    epoch.state = EpochState::Tearing { next: Some((number, members)) };
                    let reason = "the pipeline is formed anew with another member".to_owned();
                    actions.push(Action::Tear { epoch: epoch.number, reason });
                }
            }
            Err(Unplanned::Member { node, reason }) => self.blame(now, node, reason),
            Err(Unplanned::Refused(_)) if self.epoch.is_some() => self.considered.extend(round.members),
            Err(Unplanned::Refused(why)) => {
                self.refused = Some(Refused { why, members: round.members, until: now + REFUSED_TIME });
            }
        }
    }

    fn start(&mut self, now: Instant, round: u64, members: Vec<NodeId>, actions: &mut Vec<Action>) {
        self.epochs += 1;
        actions.push(Action::Start { epoch: self.epochs, round });
        let state = EpochState::Joining { until: now + JOIN_TIME_MAX };
        self.epoch = Some(Epoch { number: self.epochs, members, state });
        self.refused = None;
    }

    fn up(&mut self, number: u64) {
        let Some(epoch) = self.epoch.as_mut().filter(|epoch| epoch.number == number) else { return };
        if matches!(epoch.state, EpochState::Joining { .. } | EpochState::Loading) {
            epoch.state = EpochState::Running;
            // Requests that waited for it come now.
            self.quiet = None;
            for member in &epoch.members {
                self.blamed.remove(member);
            }
            (self.failures, self.last_failure, self.had_one) = (0, None, true);
        }
    }

    fn failed(
        &mut self,
        now: Instant,
        number: u64,
        culprit: Option<NodeId>,
        reason: String,
        actions: &mut Vec<Action>,
    ) {
        let Some(epoch) = self.epoch.as_mut().filter(|epoch| epoch.number == number) else { return };
        let ran = match epoch.state {
            EpochState::Tearing { .. } => return,
            EpochState::Running => true,
            EpochState::Joining { .. } | EpochState::Loading => false,
        };
        epoch.state = EpochState::Tearing { next: None };
        actions.push(Action::Tear { epoch: number, reason: reason.clone() });
        if ran {
            // Who fails so is commonly gone; the next look tells.
            if let Some(culprit) = culprit {
                self.seen.remove(&culprit);
            }
        } else {
            let delay = RETRY_DELAY.saturating_mul(1 << self.failures.min(16)).min(RETRY_DELAY_MAX);
            self.wait = Some(now + delay);
            self.failures = self.failures.saturating_add(1);
            if let Some(culprit) = culprit.filter(|culprit| *culprit != self.own) {
                self.blame(now, culprit, reason.clone());
            }
        }
        self.last_failure = Some(reason);
    }

    fn torn(&mut self, now: Instant, number: u64, actions: &mut Vec<Action>) {
        let Some(epoch) = self.epoch.take_if(|epoch| epoch.number == number) else { return };
        if let EpochState::Tearing { next: Some((round, members)) } = epoch.state
            && self.office
        {
            self.start(now, round, members, actions);
        }
    }

    fn blame(&mut self, now: Instant, node: NodeId, reason: String) {
        let strikes = self.blamed.get(&node).map_or(0, |blame| blame.strikes);
        let time = BLAME_TIME.saturating_mul(1 << strikes.min(16)).min(BLAME_TIME_MAX);
        self.blamed.insert(node, Blame { strikes: strikes + 1, until: now + time, reason });
    }

    /// What follows from how everything stands.
    fn decide(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let head = self.head(now);
        if head != Some(self.own) {
            self.office = false;
            self.round = None;
            self.refused = None;
            if let Some(epoch) = &mut self.epoch
                && !matches!(epoch.state, EpochState::Tearing { .. })
            {
                epoch.state = EpochState::Tearing { next: None };
                let reason = "another node is the head of the pipeline".to_owned();
                actions.push(Action::Tear { epoch: epoch.number, reason });
            }
            return;
        }
        self.office = true;
        if let Some(epoch) = &self.epoch
            && let EpochState::Joining { until } = epoch.state
            && until <= now
        {
            let seconds = JOIN_TIME_MAX.as_secs();
            let reason = format!(
                "the processes did not find each other within {seconds} s: one hangs, or a stranger connected to a port \
                 of theirs"
            );
            self.failed(now, epoch.number, None, reason, actions);
        }
        self.check_round(now);
        if self.round.is_none() && self.wants_plan(now) {
            self.rounds += 1;
            let members = self.eligible(now);
            actions.push(Action::Plan { round: self.rounds, members: members.clone() });
            self.round = Some(Round { number: self.rounds, members, until: now + ROUND_TIME_MAX });
        }
    }

    /// A round in which somebody is lost, or that does not end, is void.
    fn check_round(&mut self, now: Instant) {
        let Some(round) = &self.round else { return };
        let lost = round.members.iter().any(|node| *node != self.own && !self.seen.contains_key(node));
        if lost || round.until <= now {
            self.round = None;
            self.wait = Some(now + RETRY_DELAY);
        }
    }

    fn is_quiet(&self, now: Instant) -> bool {
        self.quiet.is_some_and(|since| now.saturating_duration_since(since) >= QUIET_TIME)
    }

    fn wants_plan(&self, now: Instant) -> bool {
        match &self.epoch {
            None => {
                let changed =
                    |refused: &Refused| refused.until <= now || refused.members != self.eligible(now);
                let refused = self.refused.as_ref().is_some_and(|refused| !changed(refused));
                let waits = self.wait.is_some_and(|wait| wait > now);
                !refused && !waits && self.is_settled(now)
            }
            Some(Epoch { members, state: EpochState::Running, .. }) => {
                let quiet = self.is_quiet(now);
                let stays = |node: &NodeId| {
                    let since = self.since.get(node);
                    since.is_some_and(|since| now.saturating_duration_since(*since) >= NEWCOMER_TIME)
                };
                let new = |node: &NodeId| !members.contains(node) && !self.considered.contains(node);
                quiet && self.eligible(now).iter().any(|node| new(node) && stays(node))
            }
            Some(_) => false,
        }
    }

    fn told(&self, head: Option<NodeId>) -> (PipelinePhase, String) {
        let name = |node: NodeId| {
            let seen = self.seen.get(&node).map(|seen| seen.name.clone());
            if node == self.own { self.name.clone() } else { seen.unwrap_or_else(|| node.to_string()) }
        };
        let missing = self.missing();
        let without = || {
            let blamed = self.blamed.iter().filter(|(node, _)| self.seen.contains_key(node));
            let blamed = blamed.map(|(node, blame)| format!("; without {}: {}", name(*node), blame.reason));
            let last = self.last_failure.iter().map(|reason| format!("; the last start failed: {reason}"));
            blamed.chain(last).collect::<String>()
        };
        match head {
            None if !missing.is_empty() => {
                (PipelinePhase::Waiting, format!("waits for {}", missing.join(", ")))
            }
            None => (PipelinePhase::Waiting, "waits for members".to_owned()),
            Some(head) if head != self.own => {
                let phase =
                    if self.leased.is_some() { PipelinePhase::Running } else { PipelinePhase::Waiting };
                (phase, format!("the head is {}", name(head)))
            }
            Some(_) => match (&self.epoch, &self.round, &self.refused) {
                (Some(epoch), _, _) => match epoch.state {
                    EpochState::Joining { .. } => {
                        (PipelinePhase::Starting, format!("processes start{}", without()))
                    }
                    EpochState::Loading => (PipelinePhase::Starting, format!("stages load{}", without())),
                    EpochState::Running => {
                        (PipelinePhase::Running, format!("{} stages{}", epoch.members.len(), without()))
                    }
                    EpochState::Tearing { .. } => {
                        (PipelinePhase::Starting, format!("processes end{}", without()))
                    }
                },
                (None, Some(round), _) => {
                    (PipelinePhase::Planning, format!("{} members measure{}", round.members.len(), without()))
                }
                (None, None, Some(refused)) => {
                    let missing = match missing.as_slice() {
                        [] => String::new(),
                        missing => format!("; {} not there", missing.join(", ")),
                    };
                    (PipelinePhase::Refused, format!("{}{missing}{}", refused.why, without()))
                }
                (None, None, None) => (PipelinePhase::Waiting, format!("waits{}", without())),
            },
        }
    }
}

#[cfg(test)]
#[path = "group_tests.rs"]
mod tests;
