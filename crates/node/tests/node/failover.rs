//! Engines and nodes that die, hang or leave in the middle of answers.

use super::*;
use types::{Finish, SamplingDraft};

/// The request's own text, drawn with a seed and counted by penalties.
fn sampled(id: u128, max_tokens: u32) -> GenerateRequest {
    let sampling = SamplingDraft { seed: id as u64 * 77, presence_penalty: 0.5, ..SamplingDraft::default() };
    let sampling = sampling.try_into().expect("in range");
    GenerateDraft { sampling, ..request(id, max_tokens).into() }.try_into().expect("valid")
}

/// Reads until a token has come; gives what came.
async fn first_token(generation: &mut Generation) -> Vec<TokenEvent> {
    let mut events = Vec::new();
    while !matches!(events.last(), Some(TokenEvent::Tokens { .. })) {
        let event = tokio::time::timeout(PATIENCE, generation.events.next()).await.expect("in time");
        events.push(event.expect("a token comes before the end"));
    }
    events
}

async fn rest(mut events: Vec<TokenEvent>, generation: Generation) -> Vec<TokenEvent> {
    events.extend(collect(generation).await);
    events
}

fn usage(events: &[TokenEvent]) -> types::Usage {
    match events.last() {
        Some(TokenEvent::Finished(Finish { usage, .. })) => *usage,
        other => panic!("{other:?} is no end"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_engines_fail_of_is_tried_twice() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Router]).await;
    for _ in 0..3 {
        cluster.add(&ENGINE, &[Role::Node]).await;
    }
    cluster.ready(3).await;
    for token in [990, 991] {
        let pids = || (1..4).map(|index| std::fs::read_to_string(cluster.pid_file(index)).expect("an id"));
        let before: Vec<String> = pids().collect();
        let poison = GenerateDraft { prompt: vec![token; 40], ..request(1, 5).into() };
        let poison = cluster.nodes[0].generate(poison.try_into().expect("valid")).await.expect("accepted");
        let events = collect(poison).await;
        let (tokens, finish) = check_stream(&events).expect("a proper stream");
        assert!(tokens.is_empty() && matches!(finish.reason, FinishReason::Failed(_)), "{finish:?}");
        let failed = || pids().zip(&before).filter(|(now, before)| now != *before).count();
        eventually("two engines are replaced", || failed() == 2).await;
        eventually("all are ready", || cluster.nodes[1..].iter().all(NodeHandle::ready)).await;
        cluster.ready(3).await;
        assert_eq!(failed(), 2, "the third engine never saw it");
    }
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_go_on_on_other_nodes_unbroken() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Router]).await;
    for _ in 0..3 {
        cluster.add(&ENGINE, &[Role::Node]).await;
    }
    cluster.ready(3).await;
    let mut running = Vec::new();
    for id in 0..9 {
        let request = sampled(id, 150);
        let mut generation = cluster.nodes[0].generate(request.clone()).await.expect("accepted");
        let events = first_token(&mut generation).await;
        running.push((request, generation.route.node_name.clone(), tokio::spawn(rest(events, generation))));
    }
    // One engine is killed; a whole node goes, without a word to those whose requests it has.
    cluster.kill_engine(1);
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.nodes[2].shutdown().await;
    let mut moved = 0;
    for (request, node, events) in running {
        let events = events.await.expect("no panic");
        check_text(&request, &events);
        assert_eq!(
            usage(&events),
            types::Usage { prompt_tokens: 40, completion_tokens: 150, ..types::Usage::default() }
        );
        moved += u32::from(node != "node-3");
    }
    assert!(moved >= 4, "{moved} of 9 were on nodes that failed");
    let view = cluster.nodes[0].view();
    let told = view.moves.resumed + view.moves.hedge_won;
    assert!(told >= u64::from(moved), "{moved} went on elsewhere: {:?}", view.moves);
    let is_whole = |one: &types::RequestMove| !one.from.is_empty() && one.tokens < 150 && !one.why.is_empty();
    assert!(view.recent_moves.iter().all(is_whole), "{:?}", view.recent_moves);
    eventually("nothing is left", || cluster.nodes[0].view().in_flight == 0).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_engine_comes_back_and_its_answers_go_on() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Node, Role::Router]).await;
    cluster.ready(1).await;
    let node = &cluster.nodes[0];
    let begun = sampled(1, 100);
    let mut generation = node.generate(begun.clone()).await.expect("accepted");
    let events = first_token(&mut generation).await;
    cluster.kill_engine(0);
    let events = tokio::spawn(rest(events, generation));
    let killed = Instant::now();
    eventually("not ready", || !node.ready()).await;
    assert!(matches!(node.view().nodes[0].engine, EngineState::Restarting(_)));
    assert!(matches!(node.generate(request(2, 5)).await, Err(GenerateError::Unavailable { .. })));
    cluster.ready(1).await;
    assert!(killed.elapsed() < Duration::from_secs(3), "back within its load time and 2 s");
    check_text(&begun, &events.await.expect("no panic"));
    let request = request(3, 5);
    check_text(&request, &collect(node.generate(request.clone()).await.expect("accepted")).await);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_hangs_is_killed_and_an_idle_one_is_not() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Node, Role::Router]).await;
    cluster.ready(1).await;
    let node = &cluster.nodes[0];
    let idle = Instant::now();
    while idle.elapsed() < Duration::from_secs(4) {
        assert!(node.ready(), "an engine without work reports all the same");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let request = request(1, 100);
    let mut generation = node.generate(request.clone()).await.expect("accepted");
    let events = first_token(&mut generation).await;
    cluster.signal_engine(0, "-STOP");
    check_text(&request, &rest(events, generation).await);
    cluster.ready(1).await;
    cluster.shutdown().await;
}

/// The node answers and its engine does not: nobody would notice but for the requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hanging_engine_does_not_bring_on_another_does() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Router]).await;
    for _ in 0..2 {
        // The engine is left alone for as long as the test takes.
        let mut settings = cluster.settings(&ENGINE, &[Role::Node]);
        settings.engine_silence_max = Duration::from_secs(60);
        cluster.nodes.push(start(settings).await.expect("the node starts"));
    }
    cluster.ready(2).await;
    let mut running = Vec::new();
    for id in 0..4 {
        let request = sampled(id, 400);
        let mut generation = cluster.nodes[0].generate(request.clone()).await.expect("accepted");
        let events = first_token(&mut generation).await;
        running.push((request, tokio::spawn(rest(events, generation))));
    }
    cluster.signal_engine(1, "-STOP");
    let stopped = Instant::now();
    // Those that come now do not know yet.
    for id in 10..14 {
        let request = sampled(id, 5);
        let generation = cluster.nodes[0].generate(request.clone()).await.expect("accepted");
        running.push((request, tokio::spawn(collect(generation))));
    }
    for (request, events) in running {
        check_text(&request, &events.await.expect("no panic"));
    }
    assert!(stopped.elapsed() < Duration::from_secs(15), "took {:?}", stopped.elapsed());
    // By now it is known.
    for id in 20..24 {
        let generation = cluster.nodes[0].generate(request(id, 5)).await.expect("accepted");
        assert_eq!(generation.route.node_name, "node-2");
        collect(generation).await;
    }
    cluster.signal_engine(1, "-CONT");
    let back = async {
        for id in 30.. {
            let generation = cluster.nodes[0].generate(request(id, 5)).await.expect("accepted");
            let there = generation.route.node_name == "node-1";
            collect(generation).await;
            if there {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), back).await.expect("it is asked again once it works");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_fails_ends_the_request_it_fails_of_and_others_go_on() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Node, Role::Router]).await;
    cluster.ready(1).await;
    let node = &cluster.nodes[0];
    for (token, expected) in [(990, "panicked: as asked"), (991, "the model's backend failed: as asked")] {
        let bystander = request(1, 200);
        let mut generation = node.generate(bystander.clone()).await.expect("accepted");
        let events = first_token(&mut generation).await;
        let events = tokio::spawn(rest(events, generation));
        let poison = GenerateDraft { prompt: vec![token; 40], ..request(2, 5).into() };
        let poison = node.generate(poison.try_into().expect("valid")).await.expect("accepted");
        let (_, finish) = check_stream(&collect(poison).await).expect("a proper stream");
        assert!(matches!(finish.reason, FinishReason::Failed(_)), "{finish:?}");
        eventually("the reason shows", || {
            node.view().nodes[0].engine == EngineState::Restarting(expected.to_owned())
        })
        .await;
        check_text(&bystander, &events.await.expect("no panic"));
        cluster.ready(1).await;
    }
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_survive_the_death_of_their_engine() {
    let mut cluster = Cluster::new();
    // A router that has no engine of its own, and two nodes with one slot: most requests wait.
    cluster.add(&Engine { slots: 1, ..ENGINE }, &[Role::Router]).await;
    cluster.add(&Engine { slots: 1, load_ms: 600, ..ENGINE }, &[Role::Node]).await;
    cluster.add(&Engine { slots: 1, load_ms: 600, ..ENGINE }, &[Role::Node]).await;
    cluster.ready(2).await;
    let mut running = Vec::new();
    for id in 0..8 {
        let (request, node) = (request(id, 60), cluster.nodes[0].clone());
        let events = async move { collect(node.generate(request).await.expect("accepted")).await };
        running.push((super::request(id, 60), tokio::spawn(events)));
    }
    tokio::time::sleep(Duration::from_millis(250)).await;
    cluster.kill_engine(1);
    for (request, events) in running {
        check_text(&request, &events.await.expect("no panic"));
    }
    cluster.ready(2).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_vanishes_is_replaced_and_a_returning_one_serves() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Router]).await;
    cluster.add(&ENGINE, &[Role::Node]).await;
    cluster.ready(1).await;
    let begun = request(1, 200);
    let mut generation = cluster.nodes[0].generate(begun.clone()).await.expect("accepted");
    let events = first_token(&mut generation).await;
    let events = tokio::spawn(rest(events, generation));
    cluster.nodes[1].shutdown().await;
    eventually("no node", || cluster.nodes[0].view().nodes.is_empty()).await;
    assert!(!cluster.nodes[0].ready());
    let error = cluster.nodes[0].generate(request(2, 5)).await.expect_err("no node");
    assert!(matches!(error, GenerateError::Unavailable { .. }), "{error}");
    cluster.add(&ENGINE, &[Role::Node]).await;
    cluster.ready(1).await;
    let short = request(3, 5);
    check_text(&short, &collect(cluster.nodes[0].generate(short.clone()).await.expect("accepted")).await);
    check_text(&begun, &events.await.expect("no panic"));
    cluster.shutdown().await;
}

/// Under a load that keeps all nodes at work.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_ready_again_has_requests_within_two_seconds() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Router]).await;
    cluster.add(&ENGINE, &[Role::Node]).await;
    cluster.add(&ENGINE, &[Role::Node]).await;
    cluster.ready(2).await;
    let router = cluster.nodes[0].clone();
    let clients = (0..8).map(|client| {
        let router = router.clone();
        tokio::spawn(async move {
            for turn in 0.. {
                let request = request(client * 10_000 + turn, 20);
                let generation = router.generate(request.clone()).await.expect("some node serves");
                check_text(&request, &collect(generation).await);
            }
        })
    });
    let clients: Vec<_> = clients.collect();
    let works = |name: &str| {
        let view = router.view();
        view.nodes.iter().any(|node| {
            let runs = node.load.is_some_and(|load| load.running > 0 && load.passes > 0);
            node.name == name && node.engine == EngineState::Ready && runs
        })
    };
    let ready = |name: &str| {
        let view = router.view();
        view.nodes.iter().any(|node| node.name == name && node.engine == EngineState::Ready)
    };
    eventually("both work", || works("node-1") && works("node-2")).await;
    cluster.kill_engine(1);
    eventually("it is gone", || !ready("node-1")).await;
    eventually("it is ready", || ready("node-1")).await;
    let since = Instant::now();
    eventually("it works", || works("node-1")).await;
    assert!(since.elapsed() < Duration::from_secs(2), "its engine: {:?}", since.elapsed());
    // The whole process.
    cluster.nodes[2].shutdown().await;
    eventually("it has left", || !ready("node-2")).await;
    let name = format!("node-{}", cluster.add(&ENGINE, &[Role::Node]).await);
    eventually("it is ready", || ready(&name)).await;
    let since = Instant::now();
    eventually("it works", || works(&name)).await;
    assert!(since.elapsed() < Duration::from_secs(2), "the process: {:?}", since.elapsed());
    for client in clients {
        client.abort();
        let ended = client.await.expect_err("it goes on until it is stopped");
        assert!(ended.is_cancelled(), "a request failed: {ended}");
    }
    cluster.shutdown().await;
}
