//! Requests that wait at a router for a node with room.

use super::*;
use types::{ClientId, Priority};

/// A request of a client; at 10 ms a step it takes half a second.
fn of(id: u128, client: u64, priority: Priority) -> GenerateRequest {
    let service = Service { client: ClientId(client), priority, ..Service::default() };
    GenerateDraft { service, ..request(id, 50).into() }.try_into().expect("valid")
}

/// Makes requests one after the other; gives their ids in the order in which their answers ended.
async fn ends(node: &NodeHandle, requests: Vec<GenerateRequest>) -> Vec<u128> {
    let (ended, mut order) = tokio::sync::mpsc::unbounded_channel();
    let count = requests.len();
    for request in requests {
        let (node, ended) = (node.clone(), ended.clone());
        tokio::spawn(async move {
            let generation = node.generate(request.clone()).await.expect("accepted");
            check_text(&request, &collect(generation).await);
            ended.send(request.id.0).expect("the test waits");
        });
        // They come in this order.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut ids = Vec::new();
    for _ in 0..count {
        ids.push(order.recv().await.expect("one ends"));
    }
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_node_makes_requests_wait_in_a_bounded_queue() {
    let mut cluster = Cluster::new();
    cluster.add(&Engine { slots: 1, step_ms: 5, ..ENGINE }, &[Role::Node, Role::Router]).await;
    cluster.ready(1).await;
    let node = &cluster.nodes[0];
    // One slot, a few places at the node, then the router's queue; each in a task, as accepting may take long.
    let mut tasks = Vec::new();
    let release = tokio::sync::watch::Sender::new(false);
    let total = limits::ROUTER_WAITING_MAX as u128 + 40;
    for id in 0..total {
        let (node, mut released) = (node.clone(), release.subscribe());
        tasks.push(tokio::spawn(async move {
            let generation = node.generate(request(id, 2000)).await?;
            released.wait_for(|released| *released).await.expect("the sender lives");
            drop(generation);
            Ok(())
        }));
    }
    eventually("the queue is full", || node.view().waiting as usize == limits::ROUTER_WAITING_MAX).await;
    let error = node.generate(request(total, 5)).await.expect_err("busy");
    assert!(matches!(error, GenerateError::Busy { retry_after_ms } if retry_after_ms >= 1000), "{error}");
    // Now every accepted one is dropped at once, which makes room: in the end nobody is left.
    release.send_replace(true);
    for task in tasks {
        match task.await.expect("no panic") {
            Ok(()) | Err(GenerateError::Busy { .. }) => {}
            Err(error) => panic!("neither accepted nor busy: {error}"),
        }
    }
    eventually("nothing is left", || node.view().in_flight == 0 && node.view().waiting == 0).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_urgent_go_first_and_clients_take_turns() {
    let mut cluster = Cluster::new();
    cluster.add(&Engine { slots: 1, ..ENGINE }, &[Role::Node, Role::Router]).await;
    cluster.ready(1).await;
    // The first one runs, and one or two wait at the node already: those are not overtaken.
    let mut requests: Vec<GenerateRequest> = (0..3).map(|id| of(id, 9, Priority::High)).collect();
    requests.push(of(10, 1, Priority::Low));
    requests.extend((20..23).map(|id| of(id, 1, Priority::Normal)));
    requests.push(of(30, 2, Priority::Normal));
    requests.push(of(40, 3, Priority::High));
    let order = ends(&cluster.nodes[0], requests).await;
    let place = |id: u128| order.iter().position(|ended| *ended == id).expect("it ended");
    assert!(place(40) < place(20) || place(40) <= 4, "{order:?}");
    assert!(place(30) < place(22), "the second client does not wait for all of the first one's: {order:?}");
    assert_eq!(place(10), 8, "{order:?}");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_would_wait_too_long_is_refused_with_the_time_to_come_back() {
    let mut cluster = Cluster::new();
    let mut settings = cluster.settings(&Engine { slots: 1, ..ENGINE }, &[Role::Node, Role::Router]);
    settings.dispatch.wait_max = Duration::from_secs(1);
    cluster.nodes.push(start(settings).await.expect("it starts"));
    cluster.ready(1).await;
    let node = &cluster.nodes[0];
    let mut held = Vec::new();
    let refused = loop {
        let asked = Instant::now();
        match tokio::time::timeout(PATIENCE, node.generate(request(held.len() as u128, 4000))).await {
            Ok(Ok(generation)) => held.push(generation),
            Ok(Err(error)) => break (error, asked.elapsed()),
            Err(_) => panic!("it waits for ever"),
        }
        assert!(held.len() < 10, "one slot, and room for a few to wait");
    };
    let (error, waited) = refused;
    assert!(matches!(error, GenerateError::Busy { retry_after_ms } if retry_after_ms >= 1000), "{error}");
    assert!(waited < Duration::from_secs(3), "{waited:?}");
    assert_eq!(node.view().waiting, 0);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_do_not_hold_each_other_up() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Router]).await;
    cluster.add(&Engine { slots: 1, ..ENGINE }, &[Role::Node]).await;
    cluster.add(&Engine { slots: 1, model: "other", ..ENGINE }, &[Role::Node]).await;
    cluster.ready(2).await;
    let router = &cluster.nodes[0];
    let names: Vec<String> = router.models().into_iter().map(|card| card.name).collect();
    assert_eq!(names, ["fake", "other"]);
    let mut waiting = Vec::new();
    for id in 0..40 {
        let router = router.clone();
        waiting.push(tokio::spawn(async move { router.generate(request(id, 4000)).await }));
    }
    eventually("many wait", || router.view().waiting > 34).await;
    let draft = GenerateDraft { model: "other".to_owned(), ..request(100, 5).into() };
    let other: GenerateRequest = draft.try_into().expect("valid");
    let asked = Instant::now();
    let generation = router.generate(other.clone()).await.expect("its node is free");
    assert_eq!(generation.route.node_name, "node-2");
    check_stream(&collect(generation).await).expect("a proper stream");
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
    cluster.shutdown().await;
}
