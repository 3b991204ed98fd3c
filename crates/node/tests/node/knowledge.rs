//! What routers know of nodes' caches, and what they say of their decisions.

use super::*;
use types::RoutePlan;

/// A prompt of that many blocks and one token.
fn long(id: u128, blocks: u32) -> GenerateRequest {
    let prompt = (0..blocks * 32 + 1).map(|index| (index * 3 + id as u32 * 101) % 900 + 1).collect();
    GenerateDraft { prompt, ..request(id, 40).into() }.try_into().expect("valid")
}

fn plan(router: &NodeHandle, request: &GenerateRequest) -> RoutePlan {
    router.plan(request).expect("the model is served")
}

/// By name, tokens of the request's prompt that a router expects in the node's cache.
fn matched(router: &NodeHandle, request: &GenerateRequest, node: &str) -> u32 {
    let plan = plan(router, request);
    plan.nodes.iter().find(|one| one.name == node).map_or(0, |one| one.matched_tokens)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_router_knows_what_caches_hold() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Router]).await;
    cluster.add(&ENGINE, &[Role::Router]).await;
    cluster.add(&ENGINE, &[Role::Node]).await;
    cluster.add(&ENGINE, &[Role::Node]).await;
    cluster.ready(2).await;
    let asked = [long(1, 20), long(2, 30)];
    let mut places = Vec::new();
    for request in &asked {
        let generation = cluster.nodes[0].generate(request.clone()).await.expect("accepted");
        places.push(generation.route.node_name.clone());
        check_text(request, &collect(generation).await);
    }
    let known = |router: &NodeHandle| {
        asked.iter().zip(&places).all(|(asked, place)| {
            let tokens = (asked.prompt.len() as u32 / 32) * 32;
            matched(router, asked, place) == tokens
        })
    };
    // The second router sent nothing itself.
    eventually("both know", || cluster.nodes[..2].iter().all(known)).await;
    for router in &cluster.nodes[..2] {
        // Prompts and answers, but for what is left over a whole block.
        let blocks: u64 = router.view().nodes.iter().map(|node| node.cached_blocks).sum();
        assert!((50..=54).contains(&blocks), "{blocks}");
    }
    let learned = cluster.nodes[0].view().nodes.iter().map(|node| node.prediction.requests).sum::<u64>();
    assert_eq!(learned, 2);
    // Also the answer is cached: the next turn of the conversation costs its new part.
    let answer = FakeSettings::default().output(&asked[0]).tokens;
    let next = GenerateDraft { prompt: [&*asked[0].prompt, &answer].concat(), ..asked[0].clone().into() };
    let next = GenerateRequest::try_from(next).expect("valid");
    eventually("the answer too", || matched(&cluster.nodes[1], &next, &places[0]) == 672).await;
    let generation = cluster.nodes[1].generate(next.clone()).await.expect("accepted");
    assert_eq!((generation.route.node_name.as_str(), generation.route.matched_tokens), (&*places[0], 672));
    assert_eq!(generation.route.reason, "affinity");
    let events = collect(generation).await;
    assert_eq!(events[0], TokenEvent::Started { cached_tokens: 672 });
    check_text(&next, &events);
    // An engine that starts anew has nothing.
    let index = if places[0] == "node-2" { 2 } else { 3 };
    cluster.kill_engine(index);
    eventually("nothing is there", || matched(&cluster.nodes[1], &next, &places[0]) == 0).await;
    cluster.ready(2).await;
    cluster.shutdown().await;
}

/// The same port as before, as when the program is started again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_router_is_exact_within_two_seconds_of_its_nodes() {
    let mut cluster = Cluster::new();
    let mut settings = cluster.settings(&ENGINE, &[Role::Router]);
    let port = {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a free port");
        socket.local_addr().expect("bound").port()
    };
    settings.listen = ([127, 0, 0, 1], port).into();
    cluster.nodes.push(start(settings.clone()).await.expect("it starts"));
    cluster.add(&ENGINE, &[Role::Node]).await;
    cluster.ready(1).await;
    let asked = long(1, 100);
    check_text(&asked, &collect(cluster.nodes[0].generate(asked.clone()).await.expect("accepted")).await);
    let exact = |router: &NodeHandle| matched(router, &asked, "node-1") == 3200;
    eventually("it knows", || exact(&cluster.nodes[0])).await;
    cluster.nodes.remove(0).shutdown().await;
    settings.id = NodeId(77);
    // The socket goes with the last of the tasks that used it.
    let restarted = loop {
        match start(settings.clone()).await {
            Ok(restarted) => break restarted,
            Err(StartError::Transport(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(error) => panic!("it starts again: {error}"),
        }
    };
    let started = Instant::now();
    eventually("its node is back", || !restarted.view().nodes.is_empty() && restarted.ready()).await;
    let joined = Instant::now();
    eventually("it is exact again", || exact(&restarted)).await;
    assert!(joined.elapsed() < Duration::from_secs(2), "took {:?}", joined.elapsed());
    // The longest wait between two tries to dial, and a moment.
    assert!(started.elapsed() < Duration::from_secs(5), "took {:?}", started.elapsed());
    restarted.shutdown().await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_tells_what_speaks_for_and_against_each_node() {
    let mut cluster = Cluster::new();
    cluster.add(&Engine { slots: 1, ..ENGINE }, &[Role::Node, Role::Router]).await;
    cluster.add(&Engine { slots: 1, ..ENGINE }, &[Role::Node]).await;
    cluster.ready(2).await;
    let router = &cluster.nodes[0];
    let asked = long(1, 10);
    let free = plan(router, &asked);
    assert_eq!((free.model.as_str(), free.prompt_tokens, free.max_tokens), (MODEL, 321, 40));
    let route = free.route.expect("there is room");
    assert!(free.nodes.iter().any(|node| node.name == route.node_name && node.excluded.is_none()));
    assert_eq!((free.wait_s, free.waiting, free.nodes.len()), (None, 0, 2));
    for node in &free.nodes {
        let terms = [
            node.backlog_s,
            node.slot_s,
            node.prefill_s,
            node.rtt_s,
            node.evict_s,
            node.decode_s,
            node.others_s,
        ];
        assert!((terms.iter().sum::<f64>() - node.total_s).abs() < 1e-9, "{node:?}");
    }
    assert_eq!(router.view().in_flight, 0, "nothing was sent");
    let mut running = Vec::new();
    for id in 10..14 {
        running.push(router.generate(request(id, 4000)).await.expect("accepted"));
    }
    let full = plan(router, &asked);
    assert_eq!((full.route, full.nodes.len()), (None, 2));
    assert!(full.wait_s.expect("it would wait") > 0.0);
    assert!(full.nodes.iter().all(|node| node.excluded.as_deref() == Some("full")), "{:?}", full.nodes);
    let unknown = GenerateDraft { model: "other".to_owned(), ..asked.into() };
    let error = router.plan(&unknown.try_into().expect("valid")).expect_err("unknown");
    assert!(matches!(error, GenerateError::UnknownModel { .. }), "{error}");
    drop(running);
    cluster.shutdown().await;
}
