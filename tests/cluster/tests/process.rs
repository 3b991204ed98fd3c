//! One process on the loopback: its engine dies and comes back, it drains, it refuses the wrong key.

use cluster_tests::{Client, NodeSpec, StreamEnd, free_port, is_alive, model, new_key, wait_for};
use rustix::process::Signal;
use std::{
    thread,
    time::{Duration, Instant},
};

/// What issue 2 allows a restarted engine beyond its load time.
const RESTART_MARGIN: Duration = Duration::from_secs(2);

#[test]
fn a_killed_engine_comes_back_and_the_node_is_not_ready_meanwhile() {
    let Some(model) = model() else { return };
    let mut node = NodeSpec::local("one", &model).start();
    let load_time = node.wait_ready();
    for _ in 0..2 {
        let before = node.engine_pid().expect("an engine runs");
        let killed = Instant::now();
        node.kill_engine();
        wait_for("not ready after the kill", RESTART_MARGIN, || (!node.client.is_ready()).then_some(()));
        let refused = node.client.post("/v1/completions", &serde_json::json!({"model": "x", "prompt": "a"}));
        assert!(refused.expect("the endpoint lives").status >= 400);
        wait_for("ready again", load_time + RESTART_MARGIN, || node.client.is_ready().then_some(()));
        assert!(
            killed.elapsed() <= load_time + RESTART_MARGIN,
            "{:?} > {load_time:?} + 2 s",
            killed.elapsed()
        );
        assert_ne!(node.engine_pid(), Some(before));
        let (texts, end) = node.client.stream_chat("Hello", 5).expect("connected").finish();
        assert_eq!((texts > 0, end), (true, StreamEnd::Finished("length".to_owned())));
    }
}

#[test]
fn an_answer_goes_on_after_its_engine_was_killed() {
    let Some(model) = model() else { return };
    let mut node = NodeSpec::local("one", &model).start();
    node.wait_ready();
    let mut stream = node.client.stream_chat("Tell me a story.", 200).expect("connected");
    stream.first_text().expect("text comes");
    node.kill_engine();
    let (texts, end) = stream.finish();
    assert_eq!(end, StreamEnd::Finished("length".to_owned()), "after {texts} texts");
    assert!(node.log().contains("goes on elsewhere"), "{}", node.log());
}

/// Stopped, it does not see that its parent is gone: the system has to end it.
#[cfg(target_os = "linux")]
#[test]
fn an_engine_that_is_stopped_does_not_outlive_its_node() {
    let Some(model) = model() else { return };
    let mut node = NodeSpec::local("one", &model).start();
    node.wait_ready();
    let engine = node.engine_pid().expect("an engine runs");
    node.signal_engine(Signal::STOP);
    // A node that lives does not lose it by that.
    thread::sleep(Duration::from_millis(200));
    assert!(!cluster_tests::has_ended(engine));
    node.kill_alone();
    wait_for("its engine is gone", RESTART_MARGIN, || cluster_tests::has_ended(engine).then_some(()));
}

#[test]
fn a_signal_drains() {
    for signal in [Signal::TERM, Signal::INT] {
        let Some(model) = model() else { return };
        let mut node = NodeSpec::local("one", &model).start();
        node.wait_ready();
        let mut stream = node.client.stream_chat("Tell me a story.", 100).expect("connected");
        stream.first_text().expect("text comes");
        node.signal(signal);
        let client = node.client.clone();
        wait_for("new requests are refused", Duration::from_secs(1), || match client.get("/ready") {
            Ok(answer) => (answer.status == 503).then_some(()),
            Err(_) => Some(()),
        });
        let (texts, end) = stream.finish();
        assert_eq!(end, StreamEnd::Finished("length".to_owned()), "after {texts} texts");
        assert!(node.wait_exit().success());
        assert!(node.log().contains("draining"), "{}", node.log());
    }
}

#[test]
fn ctrl_c_drains_although_the_engine_hears_it_too() {
    let Some(model) = model() else { return };
    let mut node = NodeSpec::local("one", &model).start_in_own_group();
    node.wait_ready();
    let mut stream = node.client.stream_chat("Tell me a story.", 60).expect("connected");
    stream.first_text().expect("text comes");
    node.signal_group(Signal::INT);
    let (texts, end) = stream.finish();
    assert_eq!(end, StreamEnd::Finished("length".to_owned()), "after {texts} texts");
    assert!(node.wait_exit().success());
}

#[test]
fn a_second_signal_ends_at_once() {
    let Some(model) = model() else { return };
    let mut node = NodeSpec::local("one", &model).start();
    node.wait_ready();
    let engine = node.engine_pid().expect("an engine runs");
    let mut stream = node.client.stream_chat("Tell me a story.", 2000).expect("connected");
    stream.first_text().expect("text comes");
    node.signal(Signal::TERM);
    thread::sleep(Duration::from_millis(300));
    let second = Instant::now();
    node.signal(Signal::TERM);
    node.wait_exit();
    assert!(second.elapsed() < Duration::from_secs(2), "took {:?}", second.elapsed());
    wait_for("the engine ends too", Duration::from_secs(10), || (!is_alive(engine)).then_some(()));
}

#[test]
fn a_node_with_another_key_is_refused_and_that_is_logged() {
    let Some(model) = model() else { return };
    let port = free_port();
    let router = NodeSpec::local("router", &model)
        .flag("cluster-key", &new_key())
        .flag("mdns", "false")
        .flag("listen", &format!("127.0.0.1:{port}"));
    let mut router = router.start();
    router.wait_ready();
    let stranger = NodeSpec::local("stranger", &model)
        .flag("cluster-key", &new_key())
        .flag("mdns", "false")
        .flag("listen", &format!("127.0.0.1:{}", free_port()))
        .flag("peers", &format!("127.0.0.1:{port}"));
    let mut stranger = stranger.start();
    stranger.wait_ready();
    wait_for("the refusal is logged by the router", Duration::from_secs(10), || {
        router.log().contains("refused a peer").then_some(())
    });
    wait_for("and by the stranger", Duration::from_secs(10), || {
        stranger.log().contains("join a router").then_some(())
    });
    assert_eq!(router.client.ready_nodes(), ["router"]);
    assert_eq!(stranger.client.ready_nodes(), ["stranger"]);
    for log in [router.log(), stranger.log()] {
        assert!(!log.contains("mlxk1-"), "a key was logged: {log}");
    }
}

#[test]
fn peers_find_each_other_without_multicast() {
    let Some(model) = model() else { return };
    let (key, ports) = (new_key(), [free_port(), free_port()]);
    let spec = |name: &str, own: u16, other: u16| {
        NodeSpec::local(name, &model)
            .flag("cluster-key", &key)
            .flag("mdns", "false")
            .flag("listen", &format!("127.0.0.1:{own}"))
            .flag("peers", &format!("127.0.0.1:{other}"))
            // Fewer than half of the requests below, so that one node cannot take them all.
            .flag("max-batch", "3")
    };
    let mut one = spec("one", ports[0], ports[1]).start();
    let mut two = spec("two", ports[1], ports[0]).start();
    one.wait_ready();
    two.wait_ready();
    for client in [&one.client, &two.client] {
        wait_for("both are seen", Duration::from_secs(10), || {
            (client.ready_nodes() == ["one", "two"]).then_some(())
        });
    }
    let both = served_by(&one.client, 8);
    assert_eq!(both, ["one", "two"], "eight at once are spread");
}

/// The nodes that served `count` requests sent at once, sorted, each once.
fn served_by(client: &Client, count: usize) -> Vec<String> {
    let ask = |index: usize| {
        let stream = client.stream_chat(&format!("Tell me about {index}."), 20).expect("connected");
        let route = stream.headers.get("x-mlx-route").cloned().unwrap_or_default();
        let (texts, end) = stream.finish();
        assert_eq!((texts > 0, end), (true, StreamEnd::Finished("length".to_owned())));
        ["one", "two"]
            .into_iter()
            .find(|name| route.contains(name))
            .expect("a route names its node")
            .to_owned()
    };
    let mut names: Vec<String> = thread::scope(|scope| {
        let running: Vec<_> = (0..count).map(|index| scope.spawn(move || ask(index))).collect();
        running.into_iter().map(|thread| thread.join().expect("served")).collect()
    });
    names.sort();
    names.dedup();
    names
}
