use super::*;

const MS: Duration = Duration::from_millis(1);

/// Members whose shells are played: rounds, starts and ends take some time, and what is told is seen at once.
struct World {
    now: Instant,
    groups: BTreeMap<NodeId, Group>,
    names: BTreeMap<NodeId, String>,
    /// Those that are there and reach each other.
    there: BTreeSet<NodeId>,
    /// What happens later, to whom.
    due: Vec<(Instant, NodeId, Event)>,
    log: Vec<(NodeId, Action)>,
    quiet: bool,
    /// By how many nodes a plan can be made.
    least: usize,
    /// Who spoils starts.
    spoils: Option<NodeId>,
    /// Who never joins.
    hangs: Option<NodeId>,
    planned: BTreeMap<(NodeId, u64), Vec<NodeId>>,
    running: BTreeMap<NodeId, Vec<NodeId>>,
}

impl World {
    fn new(count: u128, members: &PipelineMembers) -> Self {
        let now = Instant::now();
        let name = |node: u128| format!("n{node}");
        let group = |node: u128| (NodeId(node), Group::new(NodeId(node), name(node), members.clone(), now));
        Self {
            now,
            groups: (1..=count).map(group).collect(),
            names: (1..=count).map(|node| (NodeId(node), name(node))).collect(),
            there: BTreeSet::new(),
            due: Vec::new(),
            log: Vec::new(),
            quiet: true,
            least: 1,
            spoils: None,
            hangs: None,
            planned: BTreeMap::new(),
            running: BTreeMap::new(),
        }
    }

    fn named(count: u128) -> Self {
        Self::new(count, &PipelineMembers::Named((1..=count).map(|node| format!("n{node}")).collect()))
    }

    fn come(&mut self, node: u128) {
        let node = NodeId(node);
        let members = self.groups[&node].members.clone();
        self.groups.insert(node, Group::new(node, self.names[&node].clone(), members, self.now));
        self.there.insert(node);
    }

    /// It is gone, with all that it had.
    fn lose(&mut self, node: u128) {
        let node = NodeId(node);
        self.there.remove(&node);
        self.due.retain(|(_, of, _)| *of != node);
        let epochs: Vec<NodeId> = self.running.keys().copied().collect();
        for head in epochs {
            if head == node {
                for member in self.running.remove(&head).expect("running") {
                    self.due.push((self.now, member, Event::Leased(None)));
                }
            } else if self.running[&head].contains(&node) {
                let epoch = self.groups[&head].epochs;
                let reason = "lost".to_owned();
                self.due.push((self.now, head, Event::Failed { epoch, culprit: Some(node), reason }));
            }
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += 50 * MS;
            for node in self.there.clone() {
                let others = self.there.iter().filter(|other| **other != node);
                let seen = others.map(|other| {
                    let head = self.groups[other].stand(self.now).head;
                    (*other, Seen { name: self.names[other].clone(), head })
                });
                let event = Event::Present { seen: seen.collect(), quiet: self.quiet };
                self.give(node, event);
            }
            let now = self.now;
            let due: Vec<_> = self.due.extract_if(.., |(at, _, _)| *at <= now).collect();
            for (_, node, event) in due {
                if self.there.contains(&node) {
                    self.give(node, event);
                }
            }
        }
    }

    fn give(&mut self, node: NodeId, event: Event) {
        for action in self.groups.get_mut(&node).expect("a group").handle(self.now, event) {
            self.log.push((node, action.clone()));
            let (now, due) = (self.now, &mut self.due);
            let mut later = |ms: u32, node, event| due.push((now + ms * MS, node, event));
            match action {
                Action::Plan { round, members } => {
                    let enough = members.len() >= self.least;
                    let refused = || Unplanned::Refused("too small".to_owned());
                    let members = if enough { Ok(members) } else { Err(refused()) };
                    self.planned.insert((node, round), members.clone().unwrap_or_default());
                    later(200, node, Event::Planned { round, members });
                }
                Action::Start { epoch, round } => {
                    let members = self.planned[&(node, round)].clone();
                    match self.spoils {
                        Some(spoils) if members.contains(&spoils) => {
                            let reason = "its weights differ".to_owned();
                            later(100, node, Event::Failed { epoch, culprit: Some(spoils), reason });
                            continue;
                        }
                        _ if self.hangs.is_some_and(|hangs| members.contains(&hangs)) => continue,
                        _ => {}
                    }
                    // Who hosts a stage for another head refuses.
                    let refuses =
                        |member: &&NodeId| self.groups[*member].leased.is_some_and(|head| head != node);
                    if let Some(&culprit) = members.iter().find(refuses) {
                        let reason = "it belongs to another".to_owned();
                        let failed = Event::Failed { epoch, culprit: Some(culprit), reason };
                        later(50, node, failed);
                        continue;
                    }
                    for member in members.iter().filter(|member| **member != node) {
                        later(50, *member, Event::Leased(Some(node)));
                    }
                    later(300, node, Event::Joined(epoch));
                    later(900, node, Event::Up(epoch));
                    self.running.insert(node, members);
                }
                Action::Tear { epoch, .. } => {
                    for member in self.running.remove(&node).into_iter().flatten().filter(|it| *it != node) {
                        later(20, member, Event::Leased(None));
                    }
                    later(40, node, Event::Torn(epoch));
                }
            }
        }
    }

    fn stand(&self, node: u128) -> Stand {
        self.groups[&NodeId(node)].stand(self.now)
    }

    /// Exactly this head runs, with these.
    fn check(&self, head: u128, members: &[u128]) {
        let stand = self.stand(head);
        assert_eq!((stand.phase, stand.head), (PipelinePhase::Running, Some(NodeId(head))), "{stand:?}");
        let members: Vec<NodeId> = members.iter().copied().map(NodeId).collect();
        assert_eq!(self.running, BTreeMap::from([(NodeId(head), members)]));
    }

    fn starts(&self) -> usize {
        self.log.iter().filter(|(_, action)| matches!(action, Action::Start { .. })).count()
    }
}

#[test]
fn all_come_and_the_first_is_the_head() {
    for order in [[1, 2, 3], [3, 2, 1], [2, 3, 1]] {
        let mut world = World::named(3);
        for node in order {
            world.come(node);
            world.run(400 * MS);
        }
        world.run(3000 * MS);
        world.check(1, &[1, 2, 3]);
        assert_eq!(world.starts(), 1, "{order:?}: {:?}", world.log);
        assert_eq!(world.stand(2).head, Some(NodeId(1)));
    }
}

#[test]
fn who_is_missing_is_named_and_not_waited_for_for_ever() {
    let mut world = World::named(3);
    world.come(2);
    world.come(3);
    world.run(5000 * MS);
    let stand = world.stand(2);
    assert_eq!((stand.phase, stand.detail.as_str()), (PipelinePhase::Waiting, "waits for n1"));
    world.run(MISSING_TIME_MAX);
    world.check(2, &[2, 3]);
    // The first one returns: it follows the head that there is, and is taken in.
    world.quiet = false;
    world.come(1);
    world.run(6000 * MS);
    world.check(2, &[2, 3]);
    assert_eq!(world.stand(1).head, Some(NodeId(2)));
    world.quiet = true;
    world.run(6000 * MS);
    world.check(2, &[2, 1, 3]);
    assert_eq!(world.starts(), 2);
}

#[test]
fn a_member_that_is_lost_is_done_without_and_taken_in_again() {
    let mut world = World::named(3);
    (1..=3).for_each(|node| world.come(node));
    world.run(4000 * MS);
    world.quiet = false;
    world.lose(3);
    world.run(2000 * MS);
    world.check(1, &[1, 2]);
    world.come(3);
    world.run(5000 * MS);
    world.check(1, &[1, 2]);
    world.quiet = true;
    world.run(5000 * MS);
    world.check(1, &[1, 2, 3]);
}

#[test]
fn the_next_one_follows_a_head_that_is_lost() {
    for members in
        [PipelineMembers::Auto, PipelineMembers::Named(["n1", "n2", "n3"].map(str::to_owned).into())]
    {
        let mut world = World::new(3, &members);
        (1..=3).for_each(|node| world.come(node));
        world.run(6000 * MS);
        world.check(1, &[1, 2, 3]);
        world.lose(1);
        world.run(2000 * MS);
        world.check(2, &[2, 3]);
        world.lose(2);
        world.run(2000 * MS);
        world.check(3, &[3]);
        world.come(1);
        world.come(2);
        world.run(6000 * MS);
        world.check(3, &[3, 1, 2]);
    }
}

#[test]
fn who_is_left_may_be_too_few() {
    let mut world = World::named(2);
    world.least = 2;
    world.come(1);
    world.come(2);
    world.run(4000 * MS);
    world.lose(2);
    world.run(4000 * MS);
    let stand = world.stand(1);
    assert_eq!(stand.phase, PipelinePhase::Refused);
    assert!(stand.detail.starts_with("too small; n2 not there"), "{stand:?}");
    let rounds = world.log.len();
    world.run(10_000 * MS);
    assert_eq!(world.log.len(), rounds, "looked for again and again");
    world.come(2);
    world.run(4000 * MS);
    world.check(1, &[1, 2]);
}

#[test]
fn who_spoils_starts_is_left_out_and_named() {
    let mut world = World::named(3);
    world.spoils = Some(NodeId(3));
    (1..=3).for_each(|node| world.come(node));
    world.run(6000 * MS);
    world.check(1, &[1, 2]);
    assert!(world.stand(1).detail.contains("without n3: its weights differ"), "{:?}", world.stand(1));
    world.spoils = None;
    world.run(10_000 * MS);
    world.check(1, &[1, 2, 3]);
}

#[test]
fn processes_that_do_not_find_each_other_are_started_anew() {
    let mut world = World::named(2);
    world.hangs = Some(NodeId(2));
    world.come(1);
    world.come(2);
    world.run(JOIN_TIME_MAX + 3000 * MS);
    assert!(world.stand(1).detail.contains("did not find each other"), "{:?}", world.stand(1));
    world.hangs = None;
    world.run(JOIN_TIME_MAX + 3000 * MS);
    world.check(1, &[1, 2]);
}

/// Whatever comes and goes: never two epochs of one head, and once all is still, one pipeline of all who are there.
#[test]
fn after_any_coming_and_going_there_is_one_pipeline() {
    for seed in 0..200 {
        let mut random = numbers(seed);
        let mut world = World::named(4);
        world.come(1 + u128::from(random(4)));
        for _ in 0..12 {
            let node = 1 + u128::from(random(4));
            if world.there.contains(&NodeId(node)) {
                world.lose(node);
            } else {
                world.come(node);
            }
            world.quiet = random(2) == 0;
            world.run(Duration::from_millis(u64::from(random(4000))));
        }
        if world.there.is_empty() {
            world.come(2);
        }
        world.quiet = true;
        world.run(120_000 * MS);
        let there: Vec<u128> = world.there.iter().map(|node| node.0).collect();
        assert_eq!(world.running.len(), 1, "seed {seed}: {:?} of {there:?}", world.running);
        let (head, members) = world.running.iter().next().expect("one");
        let members: BTreeSet<NodeId> = members.iter().copied().collect();
        assert_eq!(members, world.there, "seed {seed}: {:?}", world.stand(head.0));
    }
}

/// Numbers below a bound, the same for the same seed.
fn numbers(seed: u64) -> impl FnMut(u32) -> u32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |bound| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as u32 % bound
    }
}
