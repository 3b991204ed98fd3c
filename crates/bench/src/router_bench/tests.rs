//! The simulation itself: the same to the bit, nothing lost, and what it is there to show.

use super::*;
use crate::router_bench::workload::Request;
use std::path::PathBuf;
use types::BlockHash;

fn settings(source: Source, policies: &[Policy]) -> RouterBenchSettings {
    RouterBenchSettings {
        source,
        nodes: 4,
        unequal: true,
        policies: policies.to_vec(),
        seeds: vec![7],
        requests: Some(600),
        load: Some(0.5),
        kv_share: None,
        divisor: 1,
        rivals: RivalSettings::default(),
        threads: 2,
    }
}

fn all() -> Vec<Policy> {
    Policy::ALL.map(|(policy, _)| policy).to_vec()
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    for source in [Source::Chats, Source::Agents, Source::Zipf] {
        let run = |threads, seed| {
            let settings = settings(source.clone(), &all());
            let report = router_bench(&RouterBenchSettings {
                threads,
                seeds: vec![seed],
                requests: Some(300),
                ..settings
            });
            serde_json::to_string(&report.expect("made up")).expect("plain data")
        };
        assert_eq!(run(1, 3), run(4, 3), "{source:?}");
        assert_ne!(run(2, 3), run(2, 4), "{source:?}");
    }
}

#[test]
fn everything_is_answered_and_counted() {
    for source in [Source::Chats, Source::Agents, Source::Zipf] {
        let report = router_bench(&settings(source, &all())).expect("made up");
        assert_eq!(report.policies.len(), Policy::ALL.len());
        for (policy, figures) in &report.policies {
            assert_eq!(figures.completed_of_offered, 1.0, "{policy}");
            assert_eq!(figures.requests_per_node.iter().sum::<u64>() as usize, report.requests, "{policy}");
            assert!(figures.hit_rate <= 1.0 && figures.ttft_p50_s <= figures.ttft_p99_s, "{policy}");
            assert!(figures.ttft_mean_s > 0.0 && figures.ttft_mean_s < figures.e2e_mean_s, "{policy}");
            assert!(figures.prediction_error < 0.5, "{policy}: {figures:?}");
        }
        let svg = chart(std::slice::from_ref(&report));
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
        assert!(report.policies.keys().all(|policy| svg.contains(policy.as_str())));
    }
}

#[test]
fn cost_follows_caches_as_well_as_who_does_only_that() {
    let settings = settings(Source::Agents, &[Policy::Cost, Policy::SglangRule, Policy::RoundRobin]);
    let report = router_bench(&settings).expect("made up");
    let [cost, sglang, robin] = ["cost", "sglang_rule", "round_robin"].map(|name| &report.policies[name]);
    assert!(cost.hit_rate > 0.95 * report.single_cache_hit_rate, "{report:?}");
    assert!(cost.hit_rate > robin.hit_rate && cost.ttft_mean_s < sglang.ttft_mean_s, "{report:?}");
}

/// Requests whose prompts have nothing in common, one every `interval_s`.
fn unlike(count: usize, tokens: u32) -> Vec<Request> {
    let request = |index: usize| Request {
        start_s: 0.0,
        offset_s: 0.0,
        prompt_tokens: tokens,
        output_tokens: 20,
        max_tokens: 64,
        hashes: (0..tokens / 32).map(|block| BlockHash((index as u128) << 64 | u128::from(block))).collect(),
        output_hashes: Vec::new(),
        session: None,
    };
    (0..count).map(request).collect()
}

#[test]
fn no_node_is_idle_while_others_have_a_queue() {
    // Equal nodes with empty caches: whatever comes at once is spread, and who is done gets the next.
    let room = Room::new(4, false, None, None);
    let requests = unlike(40, 2000);
    let arrivals = vec![0.0; requests.len()];
    let router = contender(Policy::Cost, RivalSettings::default());
    let outcomes = simulate(&requests, &arrivals, &room.nodes, 4096, router, Instant::now());
    assert!(outcomes.per_node.iter().all(|requests| (8..=12).contains(requests)), "{:?}", outcomes.per_node);
    let busy = outcomes.busy_s.iter().map(|busy_s| busy_s / outcomes.end_s);
    assert!(busy.clone().all(|share| share > 0.6), "{:?} of {} s", outcomes.busy_s, outcomes.end_s);
    // One prefix that all share: reading it anew is worth it once a node's queue is longer than that takes.
    let mut shared = unlike(200, 640);
    let prefix = shared[0].hashes[..10].to_vec();
    shared.iter_mut().for_each(|request| request.hashes[..10].copy_from_slice(&prefix));
    let arrivals = vec![0.0; shared.len()];
    let outcomes = simulate(&shared, &arrivals, &room.nodes, 4096, router, Instant::now());
    assert!(outcomes.per_node.iter().all(|&requests| requests >= 40), "{:?}", outcomes.per_node);
}

fn trace(name: &str, text: &str) -> Result<RouterReport, TraceError> {
    let folder = std::env::temp_dir().join(format!("router-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let path: PathBuf = folder.join(name);
    std::fs::write(&path, text).expect("written");
    let report = router_bench(&settings(Source::Trace(path.clone()), &[Policy::Cost]));
    std::fs::remove_file(path).expect("it is there");
    report
}

#[test]
fn traces_are_read_or_refused_with_the_line() {
    let line = |at: u32, ids: &str| {
        format!(r#"{{"timestamp": {at}, "input_length": 1100, "output_length": 5, "hash_ids": [{ids}]}}"#)
    };
    let report =
        trace("two.jsonl", &[line(0, "0, 1, 2"), line(3000, "0, 1, 3"), line(6000, "0, 4, 5")].join("\n"));
    let report = report.expect("a trace");
    // Of the second 1024 tokens, of the third 512, of 3 times 1100.
    assert!((report.single_cache_hit_rate - 1536.0 / 3300.0).abs() < 1e-9, "{report:?}");
    let csv = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:59:59.5000000,100,10\n\
               2023-11-17 00:00:01.0000000,50,3\n";
    assert_eq!(trace("two.csv", csv).expect("a trace").requests, 2);
    let check = |name: &str, text: &str, expected: &str| {
        let error = trace(name, text).expect_err(text).to_string();
        assert!(error.contains(expected), "{error}");
    };
    check("bad.jsonl", &[line(0, "1"), "{}".to_owned()].join("\n"), "bad.jsonl:2: missing field `timestamp`");
    check(
        "bad.csv",
        "h\n2023-11-16 18:17:03,12",
        "bad.csv:2: a field is missing in \"2023-11-16 18:17:03,12\"",
    );
    check("bad2.csv", "h\nnever,12,3", "bad2.csv:2: no time in \"never,12,3\"");
    check("none.csv", "h\n", "has no requests");
    check("trace.txt", "", "ends in neither .jsonl (Mooncake) nor .csv (Azure)");
}
