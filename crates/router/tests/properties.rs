//! Whatever happens in whatever order: bookings balance, routes obey the rules, and the same inputs give the same routes.

use proptest::prelude::*;
use router::{BookingId, Considered, Excluded, RouteError, RouteQuery, Router, RouterSettings};
use std::time::{Duration, Instant};
use types::{
    AssetsHash, BlockHash, EngineState, ModelCard, NodeId, NodeLoad, NodeRates, Priority, block_hashes,
};

#[derive(Debug, Clone)]
enum Step {
    Up(u8),
    Down(u8),
    State(u8, u8),
    Load(u8, u8, u16),
    Send(u8, u16),
    Accepted(usize),
    FirstToken(usize),
    Finished(usize),
    Wait(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let node = 0..4u8;
    prop_oneof![
        1 => node.clone().prop_map(Step::Up),
        1 => node.clone().prop_map(Step::Down),
        3 => (node.clone(), 0..6u8).prop_map(|(node, state)| Step::State(node, state)),
        4 => (node, 0..12u8, any::<u16>()).prop_map(|(node, running, tokens)| Step::Load(node, running, tokens)),
        10 => (0..4u8, 1..300u16).prop_map(|(first, tokens)| Step::Send(first, tokens)),
        6 => any::<usize>().prop_map(Step::Accepted),
        5 => any::<usize>().prop_map(Step::FirstToken),
        6 => any::<usize>().prop_map(Step::Finished),
        2 => (0..2000u16).prop_map(Step::Wait),
    ]
}

fn card() -> ModelCard {
    ModelCard {
        name: "m".to_owned(),
        root: BlockHash(1),
        context_tokens: 1000,
        vocab_size: 10,
        eos_tokens: vec![],
        assets: AssetsHash([0; 32]),
        created_s: 0,
        kind: types::ModelKind::Generator,
    }
}

fn load(running: u8, tokens: u16) -> NodeLoad {
    NodeLoad {
        running: u32::from(running),
        waiting: 0,
        slots: 8,
        prefill_backlog_tokens: u64::from(tokens),
        decode_backlog_tokens: u64::from(tokens),
        kv_tokens: (0, 1),
        cached_kv_tokens: 0,
        prefill_backlog_s: f32::from(tokens) / 100.0,
        prefill_budget_tokens: 0,
        decode_step_s: [0.0; 8],
        cache_tail_age_s: 0.0,
        cache_reuse_s: 0.0,
        passes: 0,
        step_s: 0.0,
        drafts: Default::default(),
        rates: NodeRates { prefill_tokens_per_s: 100.0, decode_step_s: 0.1, decode_row_s: 0.01 },
    }
}

/// Runs the steps, checks each route, and returns all of them; leaves everything finished.
fn run(steps: &[Step]) -> (Router, Vec<Option<(NodeId, u32)>>, Instant) {
    let mut router = Router::new(RouterSettings::default());
    let mut now = Instant::now();
    let mut open: Vec<BookingId> = Vec::new();
    let mut routes = Vec::new();
    for step in steps {
        let id = |node: u8| NodeId(u128::from(node));
        let pick =
            |open: &Vec<BookingId>, index: usize| (!open.is_empty()).then(|| index % open.len().max(1));
        match *step {
            Step::Up(node) => assert!(router.node_up(id(node))),
            Step::Down(node) => router.node_down(id(node)),
            Step::State(node, state) => {
                let state = match state {
                    0 => EngineState::Loading,
                    1 => EngineState::Draining,
                    2 => EngineState::Restarting(String::new()),
                    _ => EngineState::Ready,
                };
                router.state(id(node), state, vec![card()]);
            }
            Step::Load(node, running, tokens) => router.load(id(node), load(running, tokens), now),
            Step::Send(first, tokens) => {
                let prompt: Vec<u32> =
                    (0..u32::from(tokens)).map(|index| u32::from(first) << 16 | index).collect();
                let hashes = block_hashes(BlockHash(1), &prompt);
                let exclude = [id(3)];
                let query = RouteQuery {
                    model: "m",
                    hashes: &hashes,
                    prompt_tokens: u32::from(tokens),
                    max_tokens: 100,
                    exclude: &exclude[..usize::from(first == 0)],
                    session: None,
                    priority: Priority::default(),
                };
                let route = router.route(&query, now);
                if let Ok(route) = &route {
                    let known = router.node(route.node).expect("a known node");
                    assert_eq!(*known.state(), EngineState::Ready);
                    assert!(!query.exclude.contains(&route.node));
                    assert!(route.matched_tokens < query.prompt_tokens);
                    assert!(route.cost.total_s().is_finite() && route.cost.total_s() >= 0.0);
                    open.push(router.book(route, &query, now).expect("a known node"));
                } else if let Err(RouteError::AllBusy { retry_after }) = &route {
                    assert!(*retry_after >= Duration::from_secs(1));
                    let full =
                        |one: &Considered| matches!(one.excluded, Some(Excluded::Full | Excluded::Refused));
                    assert!(router.explain(&query, now).iter().any(full), "busy without a full node");
                }
                routes.push(route.ok().map(|route| (route.node, route.matched_tokens)));
            }
            Step::Accepted(index) => {
                if let Some(index) = pick(&open, index) {
                    router.accepted(open[index], now);
                }
            }
            Step::FirstToken(index) => {
                if let Some(index) = pick(&open, index) {
                    router.first_token(open[index], now);
                }
            }
            Step::Finished(index) => {
                if let Some(index) = pick(&open, index) {
                    let booking = open.swap_remove(index);
                    router.finished(booking, now);
                    router.finished(booking, now);
                }
            }
            Step::Wait(ms) => now += Duration::from_millis(u64::from(ms)),
        }
        assert!(router.in_flight() <= open.len());
    }
    for booking in open {
        router.finished(booking, now);
    }
    (router, routes, now)
}

proptest! {
    #[test]
    fn bookings_balance_and_decisions_repeat(steps in prop::collection::vec(step(), 0..120)) {
        let (router, routes, _) = run(&steps);
        prop_assert_eq!(router.in_flight(), 0);
        for (_, known) in router.nodes() {
            prop_assert_eq!(known.booked_requests(), 0);
            prop_assert_eq!(known.booked_tokens(), 0);
        }
        let (_, again, _) = run(&steps);
        prop_assert_eq!(routes, again);
    }
}
