//! More requests than the memory for KV holds: all end as they should, and the engine stays within its budget.

use cluster_tests::{NodeSpec, model, wait_for};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

/// Requests at once.
const REQUESTS: usize = 200;
/// What they may take for KV: the smallest context there is, where 32 rows want twice as much.
const KV_MIB: u64 = 48;
/// What the engine may take beyond its budget.
const MARGIN: f64 = 1.1;

#[test]
fn two_hundred_requests_past_the_memory_neither_fail_nor_take_more() {
    let Some(model) = model() else { return };
    let kv_memory = format!("{KV_MIB} MiB");
    let mut node =
        NodeSpec::local("one", &model).flag("kv-memory", &kv_memory).flag("max-batch", "32").start();
    node.wait_ready();
    let served = node.client.model().expect("it serves a model");
    let body = |request: usize| {
        let words: Vec<String> = (0..12).map(|word| format!("{}", request * 31 + word * 7)).collect();
        serde_json::json!({
            "model": served, "prompt": words.join(" "), "max_tokens": 24, "ignore_eos": true, "temperature": 0.8,
        })
    };
    // One that has run shows what the engine takes without KV worth speaking of.
    assert_eq!(node.client.post("/v1/completions", &body(9999)).expect("connected").status, 200);
    let engine = node.engine_pid().expect("an engine runs");
    let quiet = resident_bytes(engine);

    let (peak, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let watch = {
        let (peak, done) = (Arc::clone(&peak), Arc::clone(&done));
        thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                peak.fetch_max(resident_bytes(engine), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(100));
            }
        })
    };
    let clients: Vec<_> = (0..REQUESTS)
        .map(|request| {
            let (client, body) = (node.client.clone(), body(request));
            thread::spawn(move || {
                client.post("/v1/completions", &body).map(|answer| (answer.status, answer.json()))
            })
        })
        .collect();
    let answers: Vec<_> = clients.into_iter().map(|client| client.join().expect("a client")).collect();
    done.store(true, Ordering::Relaxed);
    watch.join().expect("the watch");

    let mut answered = 0;
    for answer in answers {
        match answer.expect("the endpoint stays") {
            (200, json) => {
                assert_eq!(json["usage"]["completion_tokens"], 24, "{json}");
                answered += 1;
            }
            (429, json) => assert!(json["error"]["message"].is_string(), "{json}"),
            (status, json) => panic!("{status}: {json}"),
        }
    }
    assert!(answered >= REQUESTS / 2, "only {answered} were answered");
    assert_eq!(node.engine_pid(), Some(engine), "the engine is the one that began");
    let (peak, budget) = (peak.load(Ordering::Relaxed), quiet + (KV_MIB << 20));
    println!("{answered} of {REQUESTS} answered; {} MiB at most, {} allowed", peak >> 20, budget >> 20);
    assert!(
        peak as f64 <= budget as f64 * MARGIN,
        "{peak} bytes; {quiet} when quiet, and {KV_MIB} MiB of KV"
    );
    wait_for("idle again", Duration::from_secs(5), || {
        let nodes = node.client.get("/v1/cluster").ok()?.json();
        (nodes["nodes"][0]["load"]["running"] == 0).then_some(())
    });
}

/// Of one process.
#[cfg(target_os = "linux")]
fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or(0, |kib| kib << 10)
}

/// Of one process.
#[cfg(not(target_os = "linux"))]
fn resident_bytes(pid: u32) -> u64 {
    let output = std::process::Command::new("ps").args(["-o", "rss=", "-p", &pid.to_string()]).output();
    let kib =
        output.ok().and_then(|output| String::from_utf8_lossy(&output.stdout).trim().parse::<u64>().ok());
    kib.map_or(0, |kib| kib << 10)
}
