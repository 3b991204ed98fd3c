//! Two nodes in two network namespaces: they find each other over mDNS, one is killed under load and returns.

use cluster_tests::{Client, Network, NodeSpec, StreamEnd, model, new_key, wait_for};
use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

/// mDNS answers within a second or two; the rest is for a busy machine.
const FOUND_TIME_MAX: Duration = Duration::from_secs(15);
/// What issue 2 allows a node that returns, from being ready.
const SERVES_AGAIN_TIME_MAX: Duration = Duration::from_secs(5);
/// A silent node is lost after 2 s; then its requests are sent elsewhere.
const LOST_TIME_MAX: Duration = Duration::from_secs(6);
/// Tokens of a request under load: long enough to be caught in the middle, short enough to come round often.
const LOAD_TOKENS: u32 = 40;
/// Slots of a node. Two nodes on one busy machine may measure each other as slow; what one has no slot for, the other
/// gets, whatever it measured.
const SLOTS: &str = "4";
/// Clients that load the cluster: more than one node has slots for.
const LOAD_CLIENTS: usize = 6;

struct Pair {
    specs: [NodeSpec; 2],
    // Last, so that the processes in it are gone before it goes.
    _network: Network,
}

/// Two nodes, `one` and `two`, of one cluster; none where namespaces cannot be had.
fn pair() -> Option<Pair> {
    let model = model()?;
    let network = Network::new(2)?;
    let key = new_key();
    let spec = |index: u8, name: &str| {
        NodeSpec::at(&network, index, name, "node,router", &key)
            .flag("model", &model.to_string_lossy())
            .flag("max-batch", SLOTS)
    };
    Some(Pair { specs: [spec(0, "one"), spec(1, "two")], _network: network })
}

#[test]
fn nodes_discover_each_other_and_both_endpoints_answer() {
    let Some(pair) = pair() else { return };
    let mut nodes = pair.specs.each_ref().map(NodeSpec::start);
    for node in &mut nodes {
        node.wait_ready();
    }
    for node in &nodes {
        wait_for(&format!("{} sees both", node.name), FOUND_TIME_MAX, || {
            (node.client.ready_nodes() == ["one", "two"]).then_some(())
        });
        let question = node.client.chat("What is the capital of France?", 12, false);
        let answer = node.client.post("/v1/chat/completions", &question).expect("an answer");
        assert_eq!(answer.status, 200, "{}", answer.body);
        let text = answer.json()["choices"][0]["message"]["content"].to_string();
        assert!(text.contains("Paris"), "{text}");
    }
    let both: BTreeSet<String> = first_texts(&nodes[1].client).into_iter().map(|(node, _)| node).collect();
    assert_eq!(both, BTreeSet::from(["one".to_owned(), "two".to_owned()]));
}

#[test]
fn a_node_killed_under_load_costs_no_request_and_returns() {
    let Some(pair) = pair() else { return };
    let mut one = pair.specs[0].start();
    let mut two = pair.specs[1].start();
    one.wait_ready();
    two.wait_ready();
    wait_for("both are seen", FOUND_TIME_MAX, || (one.client.ready_nodes() == ["one", "two"]).then_some(()));

    let stop = AtomicBool::new(false);
    let outcomes = thread::scope(|scope| {
        let clients: Vec<_> = (0..LOAD_CLIENTS)
            .map(|index| {
                let (client, stop) = (&one.client, &stop);
                scope.spawn(move || load(client, index, stop))
            })
            .collect();
        // Until both are in the middle of something.
        thread::sleep(Duration::from_secs(4));
        two.kill();
        wait_for("the loss is seen", LOST_TIME_MAX, || (one.client.ready_nodes() == ["one"]).then_some(()));
        thread::sleep(Duration::from_secs(4));
        stop.store(true, Ordering::Relaxed);
        clients
            .into_iter()
            .flat_map(|client| client.join().expect("a client does not panic"))
            .collect::<Vec<_>>()
    });
    // What the killed node had goes on at the other one.
    let failed: Vec<_> = outcomes.iter().filter(|it| !matches!(it.end, StreamEnd::Finished(_))).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let served: BTreeSet<&str> = outcomes.iter().map(|it| it.node.as_str()).collect();
    assert!(served.contains("two") && served.contains("one"), "the load reached both: {served:?}");

    let mut two = pair.specs[1].start();
    two.wait_ready();
    let ready = Instant::now();
    let served = wait_for("the returned node serves", 2 * SERVES_AGAIN_TIME_MAX, || {
        first_texts(&one.client).into_iter().find(|(node, _)| node == "two")
    });
    assert!(served.1 - ready <= SERVES_AGAIN_TIME_MAX, "{:?}", served.1 - ready);
}

#[derive(Debug)]
#[expect(dead_code, reason = "shown where an assertion fails")]
struct Outcome {
    node: String,
    texts: usize,
    end: StreamEnd,
    took: Duration,
}

fn load(client: &Client, index: usize, stop: &AtomicBool) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let prompt = format!("Tell me about the number {}.", index * 1000 + outcomes.len());
        let outcome = match client.stream_chat(&prompt, LOAD_TOKENS) {
            Ok(stream) if stream.status == 200 => {
                let node = node_of(&stream.headers["x-mlx-route"]);
                let (texts, end) = stream.finish();
                Outcome { node, texts, end, took: began.elapsed() }
            }
            Ok(stream) => {
                let end = StreamEnd::Broken(format!("status {}", stream.status));
                Outcome { node: String::new(), texts: 0, end, took: began.elapsed() }
            }
            Err(error) => {
                let end = StreamEnd::Broken(error.to_string());
                Outcome { node: String::new(), texts: 0, end, took: began.elapsed() }
            }
        };
        outcomes.push(outcome);
    }
    outcomes
}

/// Sends six requests at once; returns which node each one's first text came from, and when.
fn first_texts(client: &Client) -> Vec<(String, Instant)> {
    thread::scope(|scope| {
        let ask = |index: usize| {
            let mut stream = client.stream_chat(&format!("Say {index}."), 8).expect("connected");
            assert_eq!(stream.status, 200);
            let node = node_of(&stream.headers["x-mlx-route"]);
            stream.first_text().expect("a text has a beginning");
            (node, Instant::now())
        };
        let running: Vec<_> = (0..6).map(|index| scope.spawn(move || ask(index))).collect();
        running.into_iter().map(|thread| thread.join().expect("served")).collect()
    })
}

/// The node that a route names.
fn node_of(route: &str) -> String {
    ["one", "two"].into_iter().find(|name| route.contains(name)).unwrap_or(route).to_owned()
}
