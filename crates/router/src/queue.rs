//! [`Queue`]: requests that wait for a node, and which of them is next; pure.
//!
//! The order, as the router gives out places one by one:
//! 1. by priority class; every [`PROMOTE_AFTER`] of waiting counts as one class more, so that nobody waits for ever;
//! 2. by client: the one that has been given the least work first, as in fair queueing. A client that comes, or comes back,
//!    starts where the one served last stands, so that nobody saves up shares;
//! 3. by work: the shortest first, where each second of waiting counts for a second of work, so that a long request is
//!    overtaken by others only for as long as its own work takes.
//!
//! Whoever goes through the queue ([`Queue::pass`]) may pass over those whose node has no room ([`Queue::passed`]), and meets
//! them again ([`Queue::next_open`]) once that has room, or some time later: so that in a long queue those far behind
//! are asked for as well, whatever those before them wait for.

use crate::plan::{Meant, Plan};
use crate::router::Router;
use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap};
use std::time::{Duration, Instant};
use types::{ClientId, Priority};

/// Waiting for this long makes a request as urgent as one of the next higher class that has just come.
const PROMOTE_AFTER: Duration = Duration::from_secs(10);
/// Clients remembered that wait for nothing just now; the ones with the least debt are forgotten first.
const CLIENTS_MAX: usize = 4096;
/// Weight of the last interval in the mean time between places.
const INTERVAL_WEIGHT: f64 = 0.1;

/// Names a request in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId(u64);

/// How a request waits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Waiting {
    /// Whose it is.
    pub client: ClientId,
    /// Before or after others.
    pub priority: Priority,
    /// Seconds of work that it brings, as far as known: what no cache has of its prompt, and a part of its answer.
    pub work_s: f64,
    /// It had a place before, which was lost: it goes before all others.
    pub again: bool,
}

/// Once through the queue, in its order.
#[derive(Debug)]
pub struct Pass {
    now: Instant,
    /// Of those that were not met yet; the least comes first.
    keys: BinaryHeap<Reverse<(Key, QueueId)>>,
    /// What those that were met wait for.
    plan: Plan,
}

impl Pass {
    /// For which nodes those wait that were passed over.
    pub fn plan(&mut self) -> &mut Plan {
        &mut self.plan
    }
}

/// There is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} requests are waiting, which is the limit")]
pub struct QueueFull {
    /// How many wait.
    pub len: usize,
}

#[derive(Debug)]
struct Entry<T> {
    item: T,
    waiting: Waiting,
    since: Instant,
    meant: Option<Meant>,
}

/// What a client has been given.
#[derive(Debug, Clone, Copy, Default)]
struct Account {
    served_s: f64,
    waiting: usize,
}

/// Requests that wait, at most so many.
#[derive(Debug)]
pub struct Queue<T> {
    entries: BTreeMap<QueueId, Entry<T>>,
    clients: BTreeMap<ClientId, Account>,
    /// Where the client that was served last stood.
    level_s: f64,
    len_max: usize,
    next: u64,
    /// When the last place was given while others waited, and the mean time between places.
    last: Option<Instant>,
    interval_s: Option<f64>,
}

impl<T> Queue<T> {
    /// Nothing waits yet.
    pub fn new(len_max: usize) -> Self {
        Self {
            entries: BTreeMap::new(),
            clients: BTreeMap::new(),
            level_s: 0.0,
            len_max,
            next: 0,
            last: None,
            interval_s: None,
        }
    }

    /// A request waits from `now` on. One that had a place before is let in whatever the bound: it counts as running.
    ///
    /// # Errors
    /// [`QueueFull`].
    pub fn push(&mut self, item: T, waiting: Waiting, now: Instant) -> Result<QueueId, QueueFull> {
        if self.entries.len() >= self.len_max && !waiting.again {
            return Err(QueueFull { len: self.entries.len() });
        }
        if self.entries.is_empty() {
            self.last = Some(now);
        }
        let id = QueueId(self.next);
        self.next += 1;
        let level_s = self.level_s;
        let account = self.clients.entry(waiting.client).or_default();
        if account.waiting == 0 {
            account.served_s = account.served_s.max(level_s);
        }
        account.waiting += 1;
        // `max` also replaces NaN.
        let waiting = Waiting { work_s: waiting.work_s.max(0.0), ..waiting };
        self.entries.insert(id, Entry { item, waiting, since: now, meant: None });
        self.forget();
        Ok(id)
    }

    /// Begins to go through all that wait at `now`, in their order; see [`Self::next`].
    pub fn pass(&self, now: Instant) -> Pass {
        let keys = self.entries.iter().map(|(&id, entry)| Reverse((self.key(entry, now), id)));
        Pass { now, keys: keys.collect(), plan: Plan::default() }
    }

    /// The next one to be given a place. It may then be served, removed or passed over; each is met once.
    pub fn next(&self, pass: &mut Pass) -> Option<(QueueId, &T)> {
        loop {
            let Reverse((key, id)) = pass.keys.pop()?;
            let Some(entry) = self.entries.get(&id) else { continue };
            // Its client has been given something meanwhile: others may come first now.
            let key_now = self.key(entry, pass.now);
            if key_now > key {
                pass.keys.push(Reverse((key_now, id)));
                continue;
            }
            return Some((id, &entry.item));
        }
    }

    /// The next one that is to be decided on: not those that are known to wait for a node that still has no room.
    pub fn next_open(&self, pass: &mut Pass, router: &Router) -> Option<(QueueId, &T)> {
        loop {
            let (id, item) = self.next(pass)?;
            let meant = self.entries.get(&id).and_then(|entry| entry.meant);
            if !meant.is_some_and(|meant| router.still_waits(&meant, &mut pass.plan, pass.now)) {
                return Some((id, item));
            }
        }
    }

    /// A request that was met waits on, for the node that `plan` tells of.
    pub fn passed(&mut self, id: QueueId, plan: &Plan) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.meant = plan.meant();
        }
    }

    /// A request is given a place at `now`: it leaves, and its client has had its work.
    pub fn serve(&mut self, id: QueueId, now: Instant) -> Option<T> {
        let entry = self.entries.remove(&id)?;
        if let Some(last) = self.last.replace(now) {
            let interval_s = now.saturating_duration_since(last).as_secs_f64();
            let mean = self.interval_s.get_or_insert(interval_s);
            *mean += (interval_s - *mean) * INTERVAL_WEIGHT;
        }
        if let Some(account) = self.clients.get_mut(&entry.waiting.client) {
            self.level_s = self.level_s.max(account.served_s);
            account.served_s += entry.waiting.work_s;
            account.waiting -= 1;
        }
        self.forget();
        Some(entry.item)
    }

    /// A request waits no longer, and has had nothing.
    pub fn remove(&mut self, id: QueueId) -> Option<T> {
        let entry = self.entries.remove(&id)?;
        if let Some(account) = self.clients.get_mut(&entry.waiting.client) {
            account.waiting -= 1;
        }
        self.forget();
        Some(entry.item)
    }

    /// Those that wait, in the order in which they came.
    pub fn iter(&self) -> impl Iterator<Item = (QueueId, &T)> {
        self.entries.iter().map(|(&id, entry)| (id, &entry.item))
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How long one that comes at `now` will wait, by the pace at which places were given; none where that is not known.
    pub fn predicted_wait(&self, priority: Priority) -> Option<Duration> {
        let ahead = self.entries.values().filter(|entry| entry.waiting.priority >= priority).count();
        let wait_s = (ahead + 1) as f64 * self.interval_s?;
        Duration::try_from_secs_f64(wait_s).ok()
    }

    fn key(&self, entry: &Entry<T>, now: Instant) -> Key {
        let Entry { waiting, since, .. } = entry;
        let waited = now.saturating_duration_since(*since);
        let promoted = (waited.as_millis() / PROMOTE_AFTER.as_millis()).min(1000) as i64;
        let class = match waiting.again {
            true => i64::MIN,
            false => -(waiting.priority as i64) - promoted,
        };
        let served_s = self.clients.get(&waiting.client).map_or(0.0, |account| account.served_s);
        Key { class, served_s, left_s: waiting.work_s - waited.as_secs_f64() }
    }

    /// Keeps who waits, and of the others those who have had more than the one that was served last.
    fn forget(&mut self) {
        let level_s = self.level_s;
        let idle = |account: &Account| account.waiting == 0;
        self.clients.retain(|_, account| !idle(account) || account.served_s > level_s);
        while self.clients.len() > CLIENTS_MAX.max(self.len_max) {
            let idle = self.clients.iter().filter(|(_, account)| idle(account));
            let least = idle.min_by(|one, two| one.1.served_s.total_cmp(&two.1.served_s));
            let Some(client) = least.map(|(&client, _)| client) else { break };
            self.clients.remove(&client);
        }
    }
}

/// What orders requests; less comes first.
#[derive(Debug, Clone, Copy)]
struct Key {
    class: i64,
    served_s: f64,
    left_s: f64,
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Key {}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        let order = self.class.cmp(&other.class).then(self.served_s.total_cmp(&other.served_s));
        order.then(self.left_s.total_cmp(&other.left_s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use std::collections::BTreeSet;

    fn waiting(client: u64, priority: Priority, work_s: f64) -> Waiting {
        Waiting { client: ClientId(client), priority, work_s, again: false }
    }

    fn first<T>(queue: &Queue<T>, now: Instant) -> Option<QueueId> {
        queue.next(&mut queue.pass(now)).map(|(id, _)| id)
    }

    fn drain(queue: &mut Queue<&'static str>, now: Instant) -> Vec<&'static str> {
        let mut order = Vec::new();
        let mut pass = queue.pass(now);
        while let Some((id, _)) = queue.next(&mut pass) {
            order.extend(queue.serve(id, now));
        }
        order
    }

    /// Requests as (name, client, priority, work in seconds, seconds that it has waited), and the order expected.
    fn check(requests: &[(&'static str, u64, Priority, f64, u64)], expected: &[&str]) {
        let start = Instant::now();
        let end = start + Duration::from_secs(1000);
        let mut queue = Queue::new(100);
        let mut requests = requests.to_vec();
        requests.sort_by_key(|request| Reverse(request.4));
        for (name, client, priority, work_s, waited_s) in requests {
            let at = end - Duration::from_secs(waited_s);
            queue.push(name, waiting(client, priority, work_s), at).expect("room");
        }
        assert_eq!(drain(&mut queue, end), expected);
        assert!(queue.is_empty() && first(&queue, end).is_none());
    }

    #[test]
    fn the_order_is_as_it_is_said_to_be() {
        use Priority::{High, Low, Normal};
        check(&[("long", 1, Normal, 9.0, 0), ("short", 1, Normal, 1.0, 0)], &["short", "long"]);
        check(&[("long", 1, Normal, 9.0, 9), ("short", 1, Normal, 1.0, 0)], &["long", "short"]);
        check(
            &[("low", 1, Low, 1.0, 0), ("high", 1, High, 9.0, 0), ("normal", 1, Normal, 5.0, 0)],
            &["high", "normal", "low"],
        );
        check(
            &[("low", 1, Low, 1.0, 25), ("high", 1, High, 9.0, 0), ("normal", 1, Normal, 5.0, 0)],
            &["low", "high", "normal"],
        );
        let greedy = [("a1", 1, Normal, 1.0, 5), ("a2", 1, Normal, 1.0, 5), ("a3", 1, Normal, 1.0, 5)];
        let modest = [("b1", 2, Normal, 2.0, 0)];
        check(&[&greedy[..], &modest].concat(), &["a1", "b1", "a2", "a3"]);
    }

    #[test]
    fn who_had_a_place_goes_first_and_is_let_in() {
        let now = Instant::now();
        let mut queue = Queue::new(1);
        queue.push("first", waiting(1, Priority::High, 0.0), now).expect("room");
        let full = queue.push("second", waiting(1, Priority::High, 0.0), now);
        assert_eq!(full, Err(QueueFull { len: 1 }));
        queue.push("again", Waiting { again: true, ..waiting(1, Priority::Low, 9.0) }, now).expect("let in");
        assert_eq!(drain(&mut queue, now), ["again", "first"]);
    }

    #[test]
    fn nobody_saves_up_shares_and_nobody_escapes_debts_by_leaving() {
        let now = Instant::now();
        let mut queue = Queue::new(100);
        for name in ["a1", "a2", "a3", "a4"] {
            queue.push(name, waiting(1, Priority::Normal, 10.0), now).expect("room");
        }
        for _ in 0..2 {
            let id = first(&queue, now).expect("one waits");
            queue.serve(id, now);
        }
        // It comes late, and takes turns from now on.
        for name in ["b1", "b2"] {
            queue.push(name, waiting(2, Priority::Normal, 10.0), now).expect("room");
        }
        assert_eq!(drain(&mut queue, now), ["b1", "a3", "b2", "a4"]);
        queue.push("a5", waiting(1, Priority::Normal, 1.0), now).expect("room");
        queue.push("c1", waiting(3, Priority::Normal, 10.0), now).expect("room");
        assert_eq!(drain(&mut queue, now), ["c1", "a5"]);
    }

    #[test]
    fn waits_are_predicted_from_the_pace() {
        let start = Instant::now();
        let mut queue = Queue::new(100);
        assert_eq!(queue.predicted_wait(Priority::Normal), None);
        for name in ["a", "b", "c", "d"] {
            queue.push(name, waiting(1, Priority::Normal, 1.0), start).expect("room");
        }
        for seconds in 1..3 {
            let now = start + Duration::from_secs(seconds);
            let id = first(&queue, now).expect("one waits");
            queue.serve(id, now);
        }
        assert_eq!(queue.predicted_wait(Priority::Normal), Some(Duration::from_secs(3)));
        assert_eq!(queue.predicted_wait(Priority::High), Some(Duration::from_secs(1)));
    }

    proptest! {
        /// Whatever comes and goes: the bound holds, everyone is served or removed once, clients are forgotten.
        #[test]
        fn everyone_leaves_once(steps in vec((0..4u8, 0..5u64, 0..3u8, 0..20u32), 0..300)) {
            let mut now = Instant::now();
            let mut queue = Queue::new(8);
            let mut inside = BTreeSet::new();
            for (number, (step, client, priority, work)) in steps.into_iter().enumerate() {
                now += Duration::from_millis(700);
                let priority = [Priority::Low, Priority::Normal, Priority::High][usize::from(priority)];
                match step {
                    0 | 1 => match queue.push(number, waiting(client, priority, f64::from(work)), now) {
                        Ok(_) => prop_assert!(inside.insert(number)),
                        Err(full) => prop_assert_eq!(full.len, 8),
                    },
                    2 => {
                        let first = first(&queue, now);
                        prop_assert_eq!(first.is_some(), !inside.is_empty());
                        if let Some(item) = first.and_then(|id| queue.serve(id, now)) {
                            prop_assert!(inside.remove(&item));
                        }
                    }
                    _ => {
                        let any = queue.iter().next().map(|(id, _)| id);
                        if let Some(item) = any.and_then(|id| queue.remove(id)) {
                            prop_assert!(inside.remove(&item));
                        }
                    }
                }
                prop_assert_eq!(queue.len(), inside.len());
                prop_assert!(queue.len() <= 8);
            }
        }

        /// With equal work and one class, no client gets ahead of another that waits by more than one request.
        #[test]
        fn clients_take_turns(counts in vec(1..20usize, 2..5)) {
            let now = Instant::now();
            let mut queue = Queue::new(1000);
            for (client, &count) in counts.iter().enumerate() {
                for _ in 0..count {
                    queue.push(client, waiting(client as u64, Priority::Normal, 1.0), now).expect("room");
                }
            }
            let (mut served, mut left) = (vec![0usize; counts.len()], counts.clone());
            let mut pass = queue.pass(now);
            while let Some((id, _)) = queue.next(&mut pass) {
                let client = queue.serve(id, now).expect("it waits");
                served[client] += 1;
                left[client] -= 1;
                for (other, &count) in left.iter().enumerate() {
                    prop_assert!(count == 0 || served[client] <= served[other] + 1);
                }
            }
        }

        /// Nobody waits for ever behind others that keep coming, however urgent and short these are.
        #[test]
        fn nobody_starves(work in 0..60u32) {
            let start = Instant::now();
            let mut queue = Queue::new(1000);
            let old = queue.push(0, waiting(1, Priority::Low, f64::from(work)), start).expect("room");
            for second in 0..200u64 {
                let now = start + Duration::from_secs(second);
                queue.push(1, waiting(1, Priority::High, 0.0), now).expect("room");
                let id = first(&queue, now).expect("one waits");
                queue.serve(id, now);
                if id == old {
                    prop_assert!(second <= 30 + u64::from(work));
                    return Ok(());
                }
            }
            prop_assert!(false, "never served");
        }
    }
}
