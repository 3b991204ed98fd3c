//! Who waits in a long queue, and what hides whom.

use router::{PASSED_MAX, Queue, RouteError, RouteQuery, Router, RouterSettings, Waiting};
use std::time::{Duration, Instant};
use types::{AssetsHash, BlockHash, ClientId, EngineState, ModelCard, NodeId, NodeLoad, NodeRates, Priority};

const MODEL: &str = "small";
const SLOTS: u32 = 4;

fn load(running: u32) -> NodeLoad {
    NodeLoad {
        running,
        waiting: 0,
        slots: SLOTS,
        prefill_backlog_tokens: 0,
        decode_backlog_tokens: u64::from(running) * 100,
        kv_tokens: (0, 65_536),
        cached_kv_tokens: 0,
        prefill_backlog_s: 0.0,
        prefill_budget_tokens: 0,
        decode_step_s: [0.0; 8],
        cache_tail_age_s: 0.0,
        cache_reuse_s: 0.0,
        passes: 0,
        step_s: 0.0,
        drafts: Default::default(),
        rates: NodeRates { prefill_tokens_per_s: 1000.0, decode_step_s: 0.04, decode_row_s: 0.002 },
    }
}

fn query(exclude: &[NodeId]) -> RouteQuery<'_> {
    RouteQuery {
        model: MODEL,
        hashes: &[],
        prompt_tokens: 100,
        max_tokens: 64,
        exclude,
        session: None,
        priority: Priority::default(),
    }
}

/// Two nodes, and requests that wait: each may go to one of them only.
struct Case {
    router: Router,
    queue: Queue<NodeId>,
    now: Instant,
}

impl Case {
    /// `behind` requests for node 2 wait behind `ahead` for node 1, which are shorter; both are full.
    fn new(ahead: usize, behind: usize) -> Self {
        let mut case = Self {
            router: Router::new(RouterSettings::default()),
            queue: Queue::new(ahead + behind),
            now: Instant::now(),
        };
        for node in [1, 2] {
            let card = ModelCard {
                name: MODEL.to_owned(),
                root: BlockHash(7),
                context_tokens: 8192,
                vocab_size: 1000,
                eos_tokens: vec![0],
                assets: AssetsHash([0; 32]),
                created_s: 0,
                kind: types::ModelKind::Generator,
            };
            assert!(case.router.node_up(NodeId(node)));
            case.router.state(NodeId(node), EngineState::Ready, vec![card]);
            case.running(node, SLOTS + 1);
        }
        for (node, count, work_s) in [(1, ahead, 1.0), (2, behind, 2.0)] {
            for _ in 0..count {
                let waiting =
                    Waiting { client: ClientId(0), priority: Priority::default(), work_s, again: false };
                case.queue.push(NodeId(node), waiting, case.now).expect("room");
            }
        }
        case
    }

    fn running(&mut self, node: u128, running: u32) {
        self.router.load(NodeId(node), load(running), self.now);
    }

    /// Goes through the queue, as routers do: how many were decided on, and where those went that found room.
    fn pass(&mut self) -> (usize, Vec<u128>) {
        let (mut decided, mut passed, mut sent) = (0, 0, Vec::new());
        let mut pass = self.queue.pass(self.now);
        while passed < PASSED_MAX
            && let Some((id, &node)) = self.queue.next_open(&mut pass, &self.router)
        {
            decided += 1;
            let other = [NodeId(3 - node.0)];
            match self.router.route_after(&query(&other), pass.plan(), self.now) {
                Ok(route) => {
                    assert_eq!(route.node, node);
                    self.router.book(&route, &query(&other), self.now).expect("the node is known");
                    self.queue.serve(id, self.now);
                    sent.push(node.0);
                }
                Err(RouteError::AllBusy { .. }) => {
                    self.queue.passed(id, pass.plan());
                    passed += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        (decided, sent)
    }
}

#[test]
fn those_far_behind_get_what_those_ahead_do_not_want() {
    let check = |ahead: usize| {
        let mut case = Case::new(ahead, 1);
        case.running(2, 0);
        let passes = ahead / PASSED_MAX + 1;
        let sent: Vec<_> = (0..passes).map(|_| case.pass().1).collect();
        let mut expected = vec![vec![]; passes - 1];
        expected.push(vec![2]);
        assert_eq!(sent, expected, "{ahead} ahead");
        assert_eq!(case.queue.len(), ahead);
    };
    [0, PASSED_MAX - 1, PASSED_MAX, PASSED_MAX * 5 + 7].into_iter().for_each(check);
}

#[test]
fn who_waits_is_decided_on_once_until_something_changes() {
    let mut case = Case::new(PASSED_MAX + 8, 3);
    assert_eq!(case.pass(), (PASSED_MAX, vec![]));
    assert_eq!(case.pass(), (11, vec![]), "those behind");
    assert_eq!(case.pass(), (0, vec![]), "all are known to wait");
    // Room at once, for the first that wants it; nobody else is asked for there once it is taken.
    case.running(2, SLOTS - 1);
    assert_eq!(case.pass(), (1, vec![2]));
    assert_eq!(case.pass(), (0, vec![]));
    // The same at the other node.
    case.running(1, SLOTS);
    assert_eq!(case.pass(), (1, vec![1]));
    // What was found out a while ago is found out anew.
    case.now += Duration::from_secs(1);
    assert_eq!(case.pass().0, PASSED_MAX);
    assert_eq!(case.pass().0, PASSED_MAX + 8 + 3 - 2 - PASSED_MAX);
}
