//! What is chosen in one situation after the other, as data.

use router::{
    BookingId, Considered, Excluded, NODE_WAITING_MAX, Plan, Route, RouteError, RouteQuery, RouteReason,
    Router, RouterSettings,
};
use std::time::{Duration, Instant};
use types::{
    AssetsHash, BLOCK_TOKENS, BlockHash, EngineState, ModelCard, NodeId, NodeLoad, NodeRates, Priority,
    TokenId, block_hashes,
};

const MODEL: &str = "small";

fn card(name: &str) -> ModelCard {
    ModelCard {
        name: name.to_owned(),
        root: BlockHash(7),
        context_tokens: 8192,
        vocab_size: 1000,
        eos_tokens: vec![0],
        assets: AssetsHash([0; 32]),
        created_s: 0,
        kind: types::ModelKind::Generator,
    }
}

fn load(prefill_rate: f32, running: u32, prefill_backlog_tokens: u64) -> NodeLoad {
    NodeLoad {
        running,
        waiting: 0,
        slots: 8,
        prefill_backlog_tokens,
        decode_backlog_tokens: u64::from(running) * 100,
        kv_tokens: (0, 65_536),
        cached_kv_tokens: 0,
        prefill_backlog_s: prefill_backlog_tokens as f32 / prefill_rate,
        prefill_budget_tokens: 0,
        decode_step_s: [0.0; 8],
        cache_tail_age_s: 0.0,
        cache_reuse_s: 0.0,
        passes: 0,
        step_s: 0.0,
        drafts: Default::default(),
        rates: NodeRates {
            prefill_tokens_per_s: prefill_rate,
            decode_step_s: 40.0 / prefill_rate,
            decode_row_s: 2.0 / prefill_rate,
        },
    }
}

/// A router over nodes 1, 2, …, and a clock that stands still unless told.
struct Case {
    router: Router,
    now: Instant,
}

impl Case {
    fn new(loads: &[NodeLoad]) -> Self {
        let mut case = Self { router: Router::new(RouterSettings::default()), now: Instant::now() };
        for (index, load) in loads.iter().enumerate() {
            let node = NodeId(index as u128 + 1);
            assert!(case.router.node_up(node));
            case.state(node.0, EngineState::Ready);
            case.load(node.0, *load);
        }
        case
    }

    fn state(&mut self, node: u128, state: EngineState) {
        self.router.state(NodeId(node), state, vec![card(MODEL)]);
    }

    fn context(&mut self, node: u128, context_tokens: u32) {
        let card = ModelCard { context_tokens, ..card(MODEL) };
        self.router.state(NodeId(node), EngineState::Ready, vec![card]);
    }

    fn load(&mut self, node: u128, load: NodeLoad) {
        self.router.load(NodeId(node), load, self.now);
    }

    fn route(&self, prompt: &[TokenId], exclude: &[u128]) -> Result<Route, RouteError> {
        let exclude: Vec<NodeId> = exclude.iter().copied().map(NodeId).collect();
        let hashes = block_hashes(BlockHash(7), prompt);
        self.router.route(&query(prompt, &hashes, &exclude), self.now)
    }

    fn explain(&self, prompt: &[TokenId]) -> Vec<Considered> {
        let hashes = block_hashes(BlockHash(7), prompt);
        self.router.explain(&query(prompt, &hashes, &[]), self.now)
    }

    /// Routes and books; returns what was booked and where.
    fn send(&mut self, prompt: &[TokenId]) -> (BookingId, u128) {
        let route = self.route(prompt, &[]).expect("a route");
        let hashes = block_hashes(BlockHash(7), prompt);
        let booking =
            self.router.book(&route, &query(prompt, &hashes, &[]), self.now).expect("the node is known");
        (booking, route.node.0)
    }

    /// One request with that prompt from arrival to end, which takes as long as predicted.
    fn serve(&mut self, prompt: &[TokenId]) -> u128 {
        let predicted_s = self.route(prompt, &[]).expect("a route").cost.first_token_s();
        let (booking, node) = self.send(prompt);
        self.now += Duration::from_secs_f64(predicted_s);
        self.router.accepted(booking, self.now);
        self.router.first_token(booking, self.now);
        self.router.finished(booking, self.now);
        node
    }

    #[track_caller]
    fn check(&self, prompt: &[TokenId], node: u128, reason: RouteReason) {
        let route = self.route(prompt, &[]).expect("a route");
        assert_eq!((route.node.0, route.reason), (node, reason), "{route:?}");
    }
}

fn query<'a>(prompt: &[TokenId], hashes: &'a [BlockHash], exclude: &'a [NodeId]) -> RouteQuery<'a> {
    RouteQuery {
        model: MODEL,
        hashes,
        prompt_tokens: prompt.len() as u32,
        max_tokens: 64,
        exclude,
        session: None,
        priority: Priority::default(),
    }
}

fn prompt(first: TokenId, tokens: usize) -> Vec<TokenId> {
    (0..tokens as u32).map(|index| first * 1000 + index).collect()
}

#[test]
fn affinity_wins_over_a_small_difference_in_load() {
    let mut case = Case::new(&[load(1000.0, 0, 0), load(1000.0, 1, 0), load(1000.0, 1, 0)]);
    assert_eq!(case.serve(&prompt(1, 640)), 1);
    case.load(1, load(1000.0, 2, 0));
    case.check(&prompt(1, 640), 1, RouteReason::Affinity);
    assert_eq!(case.route(&prompt(1, 640), &[]).expect("a route").matched_tokens, 639);
    case.check(&prompt(2, 640), 2, RouteReason::LeastWork);
    let mut longer = prompt(1, 640);
    longer.extend(prompt(9, 100));
    assert_eq!(
        case.route(&longer, &[]).expect("a route").matched_tokens as usize,
        640 / BLOCK_TOKENS * BLOCK_TOKENS
    );
}

#[test]
fn load_wins_over_affinity_where_the_queue_is_long() {
    let mut case = Case::new(&[load(1000.0, 0, 0), load(1000.0, 0, 0)]);
    assert_eq!(case.serve(&prompt(1, 640)), 1);
    case.load(1, load(1000.0, 4, 20_000));
    case.check(&prompt(1, 640), 2, RouteReason::LeastWork);
    case.now += Duration::from_secs(20);
    case.check(&prompt(1, 640), 1, RouteReason::Affinity);
}

#[test]
fn what_of_the_backlog_is_cached_does_not_count() {
    let cached = NodeLoad { prefill_backlog_s: 0.1, ..load(1000.0, 1, 5000) };
    let mut case = Case::new(&[cached, load(1000.0, 1, 1000)]);
    case.check(&prompt(1, 100), 1, RouteReason::LeastWork);
    for untold in [f32::NAN, f32::NEG_INFINITY] {
        case.load(1, NodeLoad { prefill_backlog_s: untold, ..cached });
        case.check(&prompt(1, 100), 1, RouteReason::LeastWork);
    }
    case.load(1, NodeLoad { prefill_backlog_s: f32::INFINITY, ..cached });
    case.check(&prompt(1, 100), 2, RouteReason::LeastWork);
}

#[test]
fn unequal_rates() {
    let mut case = Case::new(&[load(500.0, 0, 0), load(4000.0, 3, 1000)]);
    case.check(&prompt(1, 1000), 2, RouteReason::LeastWork);
    case.load(2, load(4000.0, 3, 64_000));
    case.check(&prompt(1, 1000), 1, RouteReason::LeastWork);
}

#[test]
fn ties_go_to_lower_load_then_id() {
    let mut case = Case::new(&[load(1000.0, 0, 0), load(1000.0, 0, 0)]);
    case.check(&prompt(1, 100), 1, RouteReason::LeastWork);
    case.router.rtt(NodeId(1), Duration::from_millis(3));
    case.check(&prompt(1, 100), 1, RouteReason::LeastWork);
    let busy =
        NodeLoad { rates: NodeRates { decode_row_s: 0.0, ..load(1e6, 0, 0).rates }, ..load(1e6, 1, 0) };
    case.load(1, busy);
    case.load(2, NodeLoad { running: 0, ..busy });
    case.check(&prompt(1, 100), 2, RouteReason::LeastWork);
}

#[test]
fn bookings_spread_a_burst_before_any_report() {
    let mut case = Case::new(&[load(1000.0, 0, 0), load(1000.0, 0, 0), load(1000.0, 0, 0)]);
    let mut nodes: Vec<u128> = (0..3).map(|index| case.send(&prompt(index, 200)).1).collect();
    nodes.sort_unstable();
    assert_eq!(nodes, [1, 2, 3]);
}

#[test]
fn a_report_takes_over_from_the_booking() {
    let mut case = Case::new(&[load(1000.0, 0, 0), load(1000.0, 0, 0)]);
    let (booking, node) = case.send(&prompt(1, 500));
    assert_eq!(node, 1);
    case.load(1, load(1000.0, 0, 0));
    case.check(&prompt(2, 500), 2, RouteReason::LeastWork);
    case.router.accepted(booking, case.now);
    case.load(1, load(1000.0, 0, 0));
    case.check(&prompt(2, 500), 1, RouteReason::LeastWork);
}

#[test]
fn excluded_draining_and_lost_nodes_are_not_chosen() {
    let mut case = Case::new(&[load(1000.0, 0, 0), load(1000.0, 0, 0), load(1000.0, 0, 0)]);
    assert_eq!(case.route(&prompt(1, 10), &[1]).expect("a route").node, NodeId(2));
    case.state(1, EngineState::Draining);
    case.check(&prompt(1, 10), 2, RouteReason::LeastWork);
    case.router.node_down(NodeId(2));
    case.check(&prompt(1, 10), 3, RouteReason::OnlyNode);
    case.state(3, EngineState::Restarting("killed".to_owned()));
    let reason = "a node is leaving, a node is restarting (killed)".to_owned();
    assert_eq!(case.route(&prompt(1, 10), &[]), Err(RouteError::NoNode { reason }));
}

#[test]
fn a_restarted_node_forgets() {
    let mut case = Case::new(&[load(1000.0, 1, 0), load(1000.0, 0, 0)]);
    assert_eq!(case.serve(&prompt(1, 640)), 2);
    case.check(&prompt(1, 640), 2, RouteReason::LeastWork);
    assert_eq!(case.route(&prompt(1, 640), &[]).expect("a route").matched_tokens, 639);
    case.state(2, EngineState::Restarting("killed".to_owned()));
    case.state(2, EngineState::Ready);
    case.load(2, load(1000.0, 0, 0));
    assert_eq!(case.route(&prompt(1, 640), &[]).expect("a route").matched_tokens, 0);
}

#[test]
fn who_waits_waits_for_the_node_that_is_best() {
    let full = load(1000.0, 8 + NODE_WAITING_MAX, 0);
    let case = Case::new(&[full, load(1000.0, 0, 0)]);
    case.check(&prompt(1, 1000), 2, RouteReason::LeastWork);
    // Reading a thousand tokens there takes longer than a slot here becomes free.
    let mut case = Case::new(&[full, load(10.0, 0, 0)]);
    match case.route(&prompt(1, 1000), &[]) {
        Err(RouteError::AllBusy { retry_after }) => {
            assert!(retry_after >= Duration::from_secs(1) && retry_after <= Duration::from_secs(60));
        }
        other => panic!("expected busy, got {other:?}"),
    }
    let excluded: Vec<_> = case.explain(&prompt(1, 1000)).into_iter().map(|one| one.excluded).collect();
    assert_eq!(excluded, [Some(Excluded::Full), None]);
    case.load(1, load(1000.0, 1, 0));
    case.check(&prompt(1, 1000), 1, RouteReason::LeastWork);
}

#[test]
fn who_waits_counts_for_who_comes_after() {
    let mut case = Case::new(&[load(4000.0, 0, 0), load(1000.0, 0, 0)]);
    let sent: Vec<u128> = (0..NODE_WAITING_MAX).map(|index| case.send(&prompt(index, 1000)).1).collect();
    assert_eq!(sent, vec![1; NODE_WAITING_MAX as usize]);
    let (hashes, mut plan) = (block_hashes(BlockHash(7), &prompt(9, 1000)), Plan::default());
    let prompt = prompt(9, 1000);
    let query = query(&prompt, &hashes, &[]);
    let first = case.router.route_after(&query, &mut plan, case.now);
    assert!(matches!(first, Err(RouteError::AllBusy { .. })), "the fast one is best: {first:?}");
    let mut behind = 0;
    let route = loop {
        match case.router.route_after(&query, &mut plan, case.now) {
            Ok(route) => break route,
            Err(error) => assert!(behind < 100, "{error}"),
        }
        behind += 1;
    };
    assert_eq!(route.node, NodeId(2), "behind {behind} others the slow one is");
}

#[test]
fn a_node_that_refused_gets_nothing_until_it_reports() {
    let mut case = Case::new(&[load(1000.0, 0, 0), load(100.0, 0, 0)]);
    case.router.full(NodeId(1));
    case.check(&prompt(1, 10), 2, RouteReason::OnlyNode);
    case.load(1, load(1000.0, 0, 0));
    case.check(&prompt(1, 10), 1, RouteReason::LeastWork);
}

#[test]
fn an_end_after_the_report_makes_room_at_once() {
    let mut case = Case::new(&[load(1000.0, 0, 0)]);
    let (booking, _) = case.send(&prompt(1, 10));
    case.router.accepted(booking, case.now);
    case.load(1, load(1000.0, 8 + NODE_WAITING_MAX, 0));
    assert!(matches!(case.route(&prompt(1, 10), &[]), Err(RouteError::AllBusy { .. })));
    case.router.finished(booking, case.now);
    case.check(&prompt(1, 10), 1, RouteReason::OnlyNode);
}

#[test]
fn unknown_models_and_missing_nodes_are_told_apart() {
    let check = |case: &Case, model: &str, expected: RouteError| {
        let query = RouteQuery { model, prompt_tokens: 1, max_tokens: 1, ..query(&[], &[], &[]) };
        assert_eq!(case.router.route(&query, case.now), Err(expected));
    };
    let reason = |text: &str| RouteError::NoNode { reason: text.to_owned() };
    let unknown = RouteError::UnknownModel { model: "other".to_owned(), served: vec![MODEL.to_owned()] };
    let mut case = Case::new(&[]);
    check(&case, MODEL, reason("no node is connected"));
    assert!(case.router.node_up(NodeId(1)));
    check(&case, MODEL, reason("nodes are still loading their models"));
    case.state(1, EngineState::Ready);
    check(&case, "other", unknown);
    case.router.state(NodeId(1), EngineState::Ready, vec![card("third")]);
    check(&case, MODEL, reason("no connected node serves it any more"));
    case.router.node_down(NodeId(1));
    check(&case, MODEL, reason("no node is connected"));
}

#[test]
fn a_request_goes_where_its_context_fits() {
    let mut case = Case::new(&[load(4000.0, 0, 0), load(1000.0, 6, 0)]);
    case.context(1, 1024);
    case.context(2, 8192);
    assert_eq!(case.router.models()[0].context_tokens, 8192, "the largest is promised");
    let prompt = |tokens: u32| (0..tokens).collect::<Vec<TokenId>>();
    assert_eq!(case.route(&prompt(64), &[]).expect("a route").node, NodeId(1), "the faster");
    assert_eq!(case.route(&prompt(1024), &[]).expect("a route").node, NodeId(2), "the larger");
    assert_eq!(
        case.route(&prompt(9000), &[]).expect("a route").node,
        NodeId(1),
        "to be refused with the numbers"
    );
}

#[test]
fn a_full_cache_costs_what_it_gives_up() {
    // Node 1 is a little faster, and full of what was used a moment ago, or long ago.
    let full = |age_s: f32, cached: u64| NodeLoad {
        cached_kv_tokens: cached,
        cache_tail_age_s: age_s,
        cache_reuse_s: 60.0,
        ..load(1100.0, 0, 0)
    };
    let free = load(1000.0, 0, 0);
    let check = |one: NodeLoad, node: u128| {
        let case = Case::new(&[one, free]);
        case.check(&prompt(1, 1000), node, RouteReason::LeastWork);
        case.explain(&prompt(1, 1000))[0].cost.evict_s
    };
    let fresh = check(full(1.0, 65_536), 2);
    let old = check(full(600.0, 65_536), 1);
    assert_eq!(check(full(1.0, 60_000), 1), 0.0, "what fits evicts nothing");
    assert!(fresh > 100.0 * old && old > 0.0, "{fresh} {old}");
    // The less has to go, the less it costs; a node that does not say how soon blocks are used again is believed to need them.
    let part = Case::new(&[full(1.0, 65_000), free]).explain(&prompt(1, 1000))[0].cost.evict_s;
    assert!(part > 0.0 && part < fresh, "{part} {fresh}");
    let untold = NodeLoad { cache_reuse_s: 0.0, ..full(1.0, 65_536) };
    check(untold, 2);
    for age_s in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let cost = Case::new(&[full(age_s, u64::MAX), free]).explain(&prompt(1, 1000))[0].cost;
        assert!(cost.total_s().is_finite() && cost.evict_s >= 0.0, "{age_s}: {cost:?}");
    }
}

#[test]
fn what_is_evicted_costs_nothing_where_nobody_comes_back() {
    let full = NodeLoad {
        cached_kv_tokens: 65_536,
        cache_tail_age_s: 1.0,
        cache_reuse_s: 60.0,
        ..load(1000.0, 0, 0)
    };
    let mut case = Case::new(&[full]);
    let evict_s = |case: &mut Case| {
        case.load(1, full);
        case.explain(&prompt(1, 1000))[0].cost.evict_s
    };
    let before = evict_s(&mut case);
    (0..100).for_each(|index| _ = case.serve(&prompt(100 + index, 64)));
    assert!(evict_s(&mut case) > 0.8 * before, "a hundred strangers prove nothing: {before}");
    (0..900).for_each(|index| _ = case.serve(&prompt(1000 + index, 64)));
    let strangers = evict_s(&mut case);
    assert!(strangers < 0.01 * before, "{strangers} {before}");
    (0..100).for_each(|_| _ = case.serve(&prompt(7, 64)));
    assert!(evict_s(&mut case) > 0.8 * before, "those who come back count at once: {before}");
}

#[test]
fn who_is_in_a_hurry_costs_others_more() {
    // Node 1 has the prompt and is busy; node 2 would have to read it.
    let mut case = Case::new(&[load(1000.0, 0, 0), load(1000.0, 0, 0)]);
    assert_eq!(case.serve(&prompt(1, 640)), 1);
    let hashes = block_hashes(BlockHash(7), &prompt(1, 640));
    let mut chosen = |backlog: u64| {
        case.load(1, load(1000.0, 2, backlog));
        [Priority::High, Priority::Normal, Priority::Low].map(|priority| {
            let query = RouteQuery { priority, ..query(&prompt(1, 640), &hashes, &[]) };
            let considered = case.router.explain(&query, case.now);
            let costs = considered.iter().map(|one| (one.cost.total_s(), one.node.0));
            costs.min_by(|one, other| one.0.total_cmp(&other.0)).expect("two nodes").1
        })
    };
    let mut last = [1; 3];
    let mut seen = Vec::new();
    for backlog in (0..40_000).step_by(500) {
        let now = chosen(backlog);
        assert!(now.iter().zip(&last).all(|(now, last)| now >= last), "{backlog}: {now:?} after {last:?}");
        if now != last {
            seen.push(now);
        }
        last = now;
    }
    // The urgent one leaves the busy node first, the one that can wait last.
    assert_eq!(seen, [[2, 1, 1], [2, 2, 1], [2, 2, 2]]);
}

/// Two engines that started together measured themselves at half their speed. One has worked since, and tells better; the
/// other, which had nothing to do and so nothing to learn from, is as fast.
#[test]
fn a_node_that_had_no_work_yet_is_taken_to_be_as_wrong_as_those_that_had() {
    let told = |step_s: f32, passes: u64, running: u32| {
        let mut load = load(700.0, running, 0);
        (load.slots, load.passes, load.decode_step_s) = (4, passes, [step_s; 8]);
        load
    };
    let fresh = |step_s: f32| told(step_s, 0, 0);
    let mut case = Case::new(&[fresh(0.030), fresh(0.030)]);
    // Four answers are being written there.
    case.load(1, told(0.015, 20, 4));
    case.check(&prompt(3, 39), 2, RouteReason::LeastWork);
    // Who comes later did not hear what was told before the first pass, and has to believe what it hears.
    let later = Case::new(&[told(0.015, 20, 4), fresh(0.030)]);
    later.check(&prompt(3, 39), 1, RouteReason::LeastWork);
    // Where steps turn out longer than measured, who has not worked is believed: else it might never be asked to.
    let mut slower = Case::new(&[fresh(0.010), fresh(0.015)]);
    slower.load(1, told(0.060, 20, 2));
    slower.check(&prompt(3, 39), 2, RouteReason::LeastWork);
    // Who has gone is no measure any more.
    case.router.node_down(NodeId(1));
    assert!(case.router.node_up(NodeId(3)));
    case.state(3, EngineState::Ready);
    case.load(3, told(0.015, 20, 4));
    case.check(&prompt(3, 39), 3, RouteReason::LeastWork);
}

/// A node that measured itself while its machine did something else seems slower than it is, for as long as nothing is sent
/// there: once it has missed many requests it gets one, and then ever more rarely.
#[test]
fn a_node_that_seems_slow_is_tried_now_and_then() {
    let trials = |slow_rate: f32, requests: u32| {
        let mut case = Case::new(&[load(4000.0, 0, 0), load(4000.0, 0, 0), load(slow_rate, 0, 0)]);
        let mut at = Vec::new();
        for index in 0..requests {
            let prompt = prompt(index, 100);
            let route = case.route(&prompt, &[]).expect("a route");
            if route.node == NodeId(3) {
                assert_eq!(route.reason, RouteReason::Trial, "{slow_rate}: {index}");
                at.push(index);
            }
            case.serve(&prompt);
        }
        at
    };
    assert_eq!(trials(1000.0, 200), [12, 36, 84, 180]);
    assert_eq!(trials(1.0, 200), [0; 0], "however wrong it may be, it is no match");
    // One that is merely without the prefix, and so gets nothing, has nothing to prove.
    let mut case = Case::new(&[load(4000.0, 0, 0), load(3000.0, 0, 0)]);
    let popular = prompt(0, 100);
    let first = case.serve(&popular);
    for index in 1..100 {
        assert_eq!(case.serve(&popular), first, "request {index}");
    }
    // One that has come back is known afresh, also where it was found slow before.
    let mut case = Case::new(&[load(4000.0, 0, 0), load(1000.0, 0, 0)]);
    let mut until_tried = || {
        let mut sent = 0;
        while case.serve(&prompt(sent, 100)) != 2 {
            sent += 1;
            assert!(sent < 100, "never tried");
        }
        sent
    };
    assert_eq!((until_tried(), until_tried()), (8, 15));
    case.state(2, EngineState::Restarting("killed".to_owned()));
    case.state(2, EngineState::Ready);
    case.load(2, load(1000.0, 0, 0));
    let mut sent = 0;
    while case.serve(&prompt(500 + sent, 100)) != 2 {
        sent += 1;
        assert!(sent < 100, "never tried");
    }
    assert_eq!(sent, 8);
}

/// Of a node that is tried is learned; one that surprises is tried again soon.
#[test]
fn a_node_that_was_wrong_of_itself_is_found_out() {
    let mut case = Case::new(&[load(4000.0, 0, 0), load(4000.0, 0, 0), load(1000.0, 0, 0)]);
    let mut tried = 0;
    for index in 0..100 {
        let (booking, node) = case.send(&prompt(index, 400));
        case.now += Duration::from_millis(100);
        case.router.accepted(booking, case.now);
        case.router.first_token(booking, case.now);
        case.router.finished(booking, case.now);
        tried += u32::from(node == 3);
    }
    let rate = case.router.learned(NodeId(3)).expect("it is known").prefill_tokens_per_s;
    assert!(tried > 4 && rate > 2500.0, "tried {tried} times, taken to read {rate} tokens a second");
}
