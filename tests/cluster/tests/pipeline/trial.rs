//! Something happens to a member in the middle of streams: what becomes of these, and of the processes.

use crate::cluster::{Cluster, FORMED_TIME_MAX, LONG_TOKENS, ask, prompts};
use cluster_tests::{has_ended, ring_address, show, stray_connection, wait_for};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// What issue 6 allows: every process of an epoch that lost a part is gone by then.
const GONE_TIME_MAX: Duration = Duration::from_secs(5);
/// The same in the ordinary test run, where others may have all of the machine's cores: less is not told from a machine
/// that is busy.
const GONE_TIME_BUSY_MAX: Duration = Duration::from_secs(20);
/// Within this a start that fails ends in a message, and so do its processes.
const START_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a member is stopped or cut off: longer than it takes to be lost.
const AWAY: Duration = Duration::from_secs(4);

/// What happens to a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// The process of the head's rank dies.
    HeadRankKilled,
    /// A node dies; its rank is left without a parent.
    MemberKilled,
    /// The head's node dies.
    HeadKilled,
    /// A rank stops where it stands, and its node does not.
    RankStopped,
    /// A rank stops where it stands, and then its node dies.
    OrphanStopped,
    /// A node and its rank stop where they stand, and go on later.
    MemberStopped,
    /// A node is cut off.
    LinkDown,
    /// A node dies and is not started again: the others are to do without it.
    MemberStaysAway,
    /// A rank of the next epoch never gets to looking for its neighbours.
    RankNeverStarts,
    /// Somebody connects to a rank's port as it is waiting for its neighbour.
    Stray,
}

impl Fault {
    pub(crate) const ALL: [Self; 10] = [
        Self::HeadRankKilled,
        Self::MemberKilled,
        Self::HeadKilled,
        Self::RankStopped,
        Self::OrphanStopped,
        Self::MemberStopped,
        Self::LinkDown,
        Self::MemberStaysAway,
        Self::RankNeverStarts,
        Self::Stray,
    ];

    /// Whether the epoch ends by what happens, at once; else what happens is done to the one after.
    fn is_at_once(self) -> bool {
        !matches!(self, Self::RankNeverStarts | Self::Stray)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Figures {
    trials: usize,
    by_fault: BTreeMap<Fault, usize>,
    /// Trials in which a request or a process was not as it has to be.
    hung: usize,
    streams: usize,
    /// The longest time from a fault to the end of all processes of its epoch, and to the end of all streams.
    gone_s: f64,
    again_s: f64,
    pub(crate) wrong: Vec<String>,
}

impl Figures {
    pub(crate) fn json(&self) -> Value {
        let by_fault: BTreeMap<String, usize> =
            self.by_fault.iter().map(|(fault, trials)| (format!("{fault:?}"), *trials)).collect();
        json!({
            "fault_trials": self.trials, "faults": by_fault, "hung": self.hung, "streams": self.streams,
            "again_s_max": self.again_s, "gone_s_max": self.gone_s,
        })
    }
}

fn gone_time_max() -> Duration {
    if std::env::var_os("PIPELINE_TRIALS").is_some() { GONE_TIME_MAX } else { GONE_TIME_BUSY_MAX }
}

impl Cluster {
    /// A trial, and then whatever makes the next one possible.
    pub(crate) fn run(&mut self, trial: usize, fault: Fault, expected: &[String], figures: &mut Figures) {
        figures.trials += 1;
        *figures.by_fault.entry(fault).or_default() += 1;
        if let Err(what) = self.trial(fault, expected, figures) {
            figures.hung += 1;
            show(&format!("{fault:?}, trial {trial}: {what}"));
            figures.wrong.push(format!("{fault:?}, trial {trial}: {what}"));
        }
        self.wait_all_there();
        self.wait_formed(3);
    }

    /// Has something happen in the middle of streams, and looks what becomes of them.
    fn trial(&mut self, fault: Fault, expected: &[String], figures: &mut Figures) -> Result<(), String> {
        let begun = Arc::new(AtomicUsize::new(0));
        let streams: Vec<_> = prompts()
            .into_iter()
            .take(3)
            .map(|prompt| {
                let (client, begun) = (self.client.clone(), begun.clone());
                thread::spawn(move || ask(&client, &prompt, LONG_TOKENS, Some(&begun)))
            })
            .collect();
        figures.streams += streams.len();
        let count = streams.len();
        wait_for("all streams have begun", FORMED_TIME_MAX, || {
            (begun.load(Ordering::Relaxed) >= count || streams.iter().all(thread::JoinHandle::is_finished))
                .then_some(())
        });
        let place = match fault {
            Fault::HeadRankKilled | Fault::HeadKilled => 0,
            _ => 1 + figures.trials % 2,
        };
        // A member that was taken in just now may have ended the epoch that the streams began in.
        let (victim, rank) = wait_for("a rank that something can happen to", FORMED_TIME_MAX, || {
            let stages = self.stages();
            let name = &stages.get(place)?.node;
            let victim = self.nodes.iter().position(|node| node.name == *name)?;
            Some((victim, self.nodes[victim].rank_pid()?))
        });
        // Of the others only ranks: some may be measuring themselves.
        let ranks: Vec<Option<u32>> = self.nodes.iter().map(|node| node.rank_pid()).collect();
        let since = Instant::now();
        // Held open until the trial is over.
        let mut stray = None;
        let mut stopped = None;
        match fault {
            Fault::HeadRankKilled => cluster_tests::signal(rank, Signal::KILL),
            Fault::MemberKilled | Fault::HeadKilled | Fault::MemberStaysAway => {
                self.nodes[victim].signal(Signal::KILL);
            }
            Fault::RankStopped => cluster_tests::signal(rank, Signal::STOP),
            Fault::OrphanStopped => {
                cluster_tests::signal(rank, Signal::STOP);
                self.nodes[victim].signal(Signal::KILL);
            }
            Fault::MemberStopped => self.nodes[victim].stop(true),
            Fault::LinkDown => self.network.plug(victim as u8, false),
            Fault::RankNeverStarts => {
                cluster_tests::signal(rank, Signal::KILL);
                let (_, next) = self.wait_next_rank(&ranks);
                cluster_tests::signal(next, Signal::STOP);
                stopped = Some((next, Instant::now()));
            }
            Fault::Stray => {
                cluster_tests::signal(rank, Signal::KILL);
                let (at, next) = self.wait_next_rank(&ranks);
                let port = ring_address(next);
                stray = port.and_then(|port| stray_connection(&self.specs[at].place, port));
            }
        }
        // What a stopped or cut off node has is not to be had from outside; the others' must be gone.
        let away = matches!(fault, Fault::MemberStopped | Fault::LinkDown);
        let left = |ranks: &[Option<u32>]| {
            let others = ranks.iter().enumerate().filter(|(at, _)| !(away && *at == victim));
            others.filter_map(|(_, pid)| *pid).filter(|pid| !has_ended(*pid)).count()
        };
        while left(&ranks) > 0 && since.elapsed() < gone_time_max() {
            thread::sleep(Duration::from_millis(50));
        }
        let mut hang = left(&ranks);
        // Whoever is to spoil the next epoch had to wait for its ranks first.
        if fault.is_at_once() {
            figures.gone_s = figures.gone_s.max(since.elapsed().as_secs_f64());
        }
        match fault {
            Fault::MemberKilled | Fault::HeadKilled | Fault::OrphanStopped => {
                self.nodes[victim] = self.specs[victim].start();
            }
            Fault::MemberStopped | Fault::LinkDown => {
                thread::sleep(AWAY.saturating_sub(since.elapsed()));
                if fault == Fault::LinkDown {
                    self.network.plug(victim as u8, true);
                } else {
                    self.nodes[victim].stop(false);
                }
            }
            _ => {}
        }
        let mut wrong = String::new();
        if let Some((stopped, since)) = stopped {
            while !has_ended(stopped) && since.elapsed() < START_TIME_MAX {
                thread::sleep(Duration::from_millis(50));
            }
            hang += usize::from(!has_ended(stopped));
        }
        for (at, stream) in streams.into_iter().enumerate() {
            match stream.join().expect("a client does not panic") {
                Ok(answer) if answer.text == expected[at] => {}
                Ok(answer) => {
                    write!(wrong, "stream {at}: {:?} instead of {:?}; ", answer.text, expected[at])
                        .expect("a string");
                }
                Err(why) => write!(wrong, "stream {at}: {why}; ").expect("a string"),
            }
        }
        drop(stray);
        figures.again_s = figures.again_s.max(since.elapsed().as_secs_f64());
        if fault == Fault::MemberStaysAway {
            self.nodes[victim] = self.specs[victim].start();
        }
        if hang > 0 {
            write!(wrong, "{hang} processes still there after {:?}", gone_time_max()).expect("a string");
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }

    /// A rank that was not there before, and whose it is: the next epoch may do without the one whose process has ended.
    fn wait_next_rank(&self, before: &[Option<u32>]) -> (usize, u32) {
        wait_for("a next rank has its place", FORMED_TIME_MAX, || {
            self.nodes.iter().zip(before).enumerate().find_map(|(at, (node, before))| {
                let next = node.rank_pid().filter(|next| Some(*next) != *before)?;
                Some((at, next))
            })
        })
    }
}
