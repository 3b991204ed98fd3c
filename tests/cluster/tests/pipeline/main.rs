//! Nodes that hold one model together, each with some of its layers: they answer as one process does, and whatever happens
//! to one of them, no request is lost and no process is left hanging.
//!
//! Members in namespaces of their own, whose ranks reach each other through tunnels between the nodes, and a router for the
//! client. The prompts are those of `tests/goldens`, whose tokens are nowhere near a tie: an answer that differs is wrong.
//! `scripts/test-pipeline` runs more trials than the ordinary test run and shows the figures.

mod cluster;
mod trial;

use cluster::{Cluster, LONG_TOKENS, Links, MODEL, answers, pipeline_file};
use cluster_tests::{NodeSpec, Place, free_port, model, new_key, show, wait_for};
use serde_json::json;
use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};
use testkit::UdpRelay;
use trial::{Fault, Figures};

/// Tokens of an answer.
const TOKENS: usize = 24;

/// What one process with the whole model gives.
fn whole(model: &Path) -> Vec<String> {
    let mut whole = NodeSpec::local("whole", model)
        .flag("model-name", MODEL)
        .flag("max-batch", "8")
        .flag("kv-memory", "256 MiB")
        .flag("queue-time", cluster::QUEUE_TIME)
        .flag("mdns", "false")
        .flag("listen", &format!("127.0.0.1:{}", free_port()))
        .start();
    whole.wait_ready();
    answers(&whole.client, TOKENS).into_iter().map(|answer| answer.text).collect()
}

#[test]
fn stages_give_what_one_process_gives() {
    let Some(model) = model() else { return };
    let expected = whole(&model);
    // In MiB, of which the whole model takes 900: so little that all are needed, and stages are of very different lengths.
    for memory in [&[210, 1000][..], &[210, 330, 400], &[250; 4]] {
        let members = memory.len();
        let Some(cluster) = Cluster::start(memory, members, Links::Tunnel) else { return };
        cluster.wait_formed(members);
        for again in [false, true] {
            let answers = answers(&cluster.client, TOKENS);
            for (answer, expected) in answers.iter().zip(&expected) {
                assert_eq!(answer.text, *expected, "{members} stages, again: {again}");
            }
            // Blocks have 32 tokens; prompts that are shorter have nothing to hit.
            let cached: u64 = answers.iter().map(|answer| answer.cached_tokens).sum();
            assert!(!again || cached > 0, "{members} stages: nothing was cached");
        }
        let layers: Vec<u64> = cluster.stages().iter().map(|stage| stage.layers).collect();
        assert_eq!((layers.len(), layers.iter().sum::<u64>()), (members, 30), "{layers:?}");
        assert!(layers[0] < 8, "{layers:?}");
    }
}

/// All that two nodes say to each other, tunnels included, takes 5 ms each way.
#[test]
fn stages_far_apart_give_the_same() {
    const DELAY: Duration = Duration::from_millis(5);
    let Some(model) = model() else { return };
    let expected = whole(&model);
    let folder = tempfile::tempdir().expect("a folder");
    let key = new_key();
    let names = ["n0", "n1"];
    let local = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let listens = names.map(|_| local(free_port()));
    let relays = listens.map(|listen| UdpRelay::start(listen, DELAY).expect("a socket"));
    let start = |at: usize| {
        let file = folder.path().join(format!("{at}.toml"));
        // Neither holds the model alone.
        std::fs::write(&file, pipeline_file(&model, &names, 500, Links::Tunnel)).expect("written");
        let http = local(free_port());
        NodeSpec {
            name: names[at].to_owned(),
            place: Place::Host,
            client: Place::Host,
            http,
            flags: Vec::new(),
        }
        .flag("cluster-key", &key)
        .flag("config", &file.to_string_lossy())
        .flag("model-name", MODEL)
        .flag("mdns", "false")
        .flag("listen", &listens[at].to_string())
        .flag("queue-time", cluster::QUEUE_TIME)
        .flag("peers", &relays[1 - at].address().to_string())
        .start()
    };
    let nodes = [start(0), start(1)];
    let client = &nodes[0].client;
    wait_for("two members serve", cluster::FORMED_TIME_MAX, || {
        (cluster::stages(client).len() == 2).then_some(())
    });
    let before: u64 =
        relays.iter().map(|relay| relay.relayed().forth_bytes + relay.relayed().back_bytes).sum();
    let since = Instant::now();
    let answers = answers(client, TOKENS);
    let took = since.elapsed();
    for (answer, expected) in answers.iter().zip(&expected) {
        assert_eq!(answer.text, *expected);
    }
    // Each token is drawn at the last stage and known at the first, before the next one can be begun there.
    assert!(took > 2 * DELAY * (TOKENS as u32 - 1), "{took:?}");
    let after: u64 =
        relays.iter().map(|relay| relay.relayed().forth_bytes + relay.relayed().back_bytes).sum();
    // Hidden states of one token are 576 numbers of 4 bytes.
    let hidden = (answers.len() * TOKENS * 576 * 4) as u64;
    assert!(
        after - before > hidden,
        "{} bytes went through relays, of {hidden} of hidden states",
        after - before
    );
    show(&format!(
        "{} answers of {TOKENS} tokens in {took:?}, relays: {:?}",
        answers.len(),
        relays.map(|relay| relay.relayed())
    ));
}

#[test]
fn no_request_is_lost_and_nothing_hangs() {
    let trials = std::env::var("PIPELINE_TRIALS").map_or(1, |text| text.parse().expect("a whole number"));
    // Any three of them hold the model. One is not there at first: it is waited for, and then done without.
    let Some(mut cluster) = Cluster::start(&[320; 4], 3, Links::Tunnel) else { return };
    cluster.wait_formed(3);
    let expected: Vec<String> =
        answers(&cluster.client, LONG_TOKENS).into_iter().map(|answer| answer.text).collect();
    cluster.start_last();
    let mut figures = Figures::default();
    for trial in 0..trials {
        for fault in Fault::ALL {
            cluster.run(trial, fault, &expected, &mut figures);
        }
    }
    let json = figures.json();
    if let Some(file) = std::env::var_os("PIPELINE_JSON") {
        std::fs::write(file, json.to_string()).expect("the file can be written");
    }
    show(&json.to_string());
    assert!(figures.wrong.is_empty(), "{json}\n{}", figures.wrong.join("\n"));
}

/// A ring without tunnels, in a network that is trusted: the same answers, and the same end of all ranks where one is lost.
#[test]
fn ranks_that_reach_each_other_straight_end_with_each_other_too() {
    let Some(model) = model() else { return };
    let Some(mut cluster) = Cluster::start(&[320; 4], 4, Links::Direct) else { return };
    cluster.wait_formed(3);
    let expected = whole(&model);
    for (answer, expected) in answers(&cluster.client, TOKENS).iter().zip(&expected) {
        assert_eq!(answer.text, *expected);
    }
    let stages = cluster.stages();
    for node in cluster.nodes.iter().filter(|node| stages.iter().any(|stage| stage.node == node.name)) {
        let log = node.log();
        assert!(log.contains("neither encrypted nor authenticated"), "{log}");
        let rank = node.rank_pid().expect("it has a rank");
        let address = cluster_tests::ring_address(rank).expect("a place in the ring");
        assert!(!address.ip().is_loopback(), "{} listens at {address}", node.name);
    }
    let long: Vec<String> =
        answers(&cluster.client, LONG_TOKENS).into_iter().map(|answer| answer.text).collect();
    let mut figures = Figures::default();
    for fault in [Fault::MemberKilled, Fault::RankStopped, Fault::LinkDown] {
        cluster.run(0, fault, &long, &mut figures);
    }
    show(&json!({ "direct": figures.json() }).to_string());
    assert!(figures.wrong.is_empty(), "{}", figures.wrong.join("\n"));
}
