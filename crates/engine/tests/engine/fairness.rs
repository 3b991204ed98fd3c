//! Who goes before whom: clients by what they had, priorities, deadlines of their own.

use crate::harness::{Bench, draft};
use engine::ModelLimits;
use std::{collections::BTreeMap, time::Duration};
use testkit::FakeSettings;
use types::{ClientId, GenerateDraft, GenerateError, Priority, RequestId, Service};

fn machine(slots: usize) -> FakeSettings {
    let limits = ModelLimits { slots, blocks: 1 << 12, kv_bytes_per_token: 1024 };
    FakeSettings { limits, context_tokens: 1 << 15, ..FakeSettings::default() }
}

fn of_client(client: u64, id: u128, prompt: usize, output: u32) -> GenerateDraft {
    GenerateDraft {
        service: Service { client: ClientId(client), ..Service::default() },
        ..draft(id, prompt, output)
    }
}

/// Lets clients keep `backlog` requests each in the engine for `seconds`; returns the tokens that each got, prompt tokens
/// once and output tokens twice.
fn compete(slots: usize, clients: &[(u64, usize, usize, u32)], seconds: u64) -> BTreeMap<u64, f64> {
    let mut bench = Bench::measured(machine(slots));
    let end = bench.clock.now() + Duration::from_secs(seconds);
    let mut id = 0;
    let mut owners: BTreeMap<RequestId, (u64, usize)> = BTreeMap::new();
    while bench.clock.now() < end {
        for &(client, backlog, prompt, output) in clients {
            let open = |id: &RequestId| bench.streams.finish(*id).is_none();
            let mut mine = owners.iter().filter(|(id, owner)| owner.0 == client && open(id)).count();
            while mine < backlog {
                id += 1;
                match bench.submit(of_client(client, id, prompt, output)) {
                    Ok(request) => owners.insert(request, (client, prompt)),
                    Err(GenerateError::Busy { .. }) => break,
                    Err(error) => panic!("{error}"),
                };
                mine += 1;
            }
        }
        bench.step();
        bench.engine.check_invariants();
    }
    let mut service = BTreeMap::new();
    for (id, (client, prompt)) in owners {
        let output = bench.streams.tokens(id).len();
        let prompt = if output > 0 { prompt } else { 0 };
        *service.entry(client).or_insert(0.0) += (prompt + 2 * output) as f64;
    }
    service
}

#[test]
fn a_greedy_client_gets_its_share_and_no_more() {
    let check = |what: &str, slots: usize, clients: &[(u64, usize, usize, u32)], share: f64| {
        let service = compete(slots, clients, 120);
        let all: f64 = service.values().sum();
        let greedy = service[&1] / all;
        assert!(greedy < share, "{what}: the greedy client got {greedy:.2} of {service:?}");
    };
    // Between its requests a client of two holds less than its half: the rest goes to whoever waits.
    check("forty against two", 4, &[(1, 40, 400, 50), (2, 2, 400, 50)], 0.63);
    check("long against short requests", 4, &[(1, 30, 3000, 100), (2, 4, 200, 20)], 0.65);
    check("long texts in all slots", 4, &[(1, 40, 100, 5000), (2, 2, 100, 50)], 0.75);
    check("three clients", 6, &[(1, 40, 400, 50), (2, 4, 400, 50), (3, 4, 400, 50)], 0.42);
    // Where the others ask for little, the rest is the greedy one's: nothing is left unused.
    let service = compete(4, &[(1, 40, 400, 50), (2, 1, 50, 5)], 60);
    let alone = compete(4, &[(1, 40, 400, 50)], 60);
    assert!(service.values().sum::<f64>() > 0.8 * alone[&1], "{service:?} of {alone:?}");
}

#[test]
fn whoever_comes_late_to_a_full_engine_is_served_soon() {
    let mut bench = Bench::measured(machine(4));
    for id in 0..60 {
        bench.accept(of_client(1, id, 100, 8000));
    }
    for _ in 0..200 {
        bench.step();
    }
    let late = bench.accept(of_client(2, 1000, 100, 20));
    while bench.streams.finish(late).is_none() {
        bench.step();
    }
    // For a fifth of the time to its first token it hopes for a free slot; then it takes one.
    assert!(bench.ttft(late) < Duration::from_millis(1000), "{:?}", bench.ttft(late));
    assert!(bench.pause_max(late) < Duration::from_millis(200), "{:?}", bench.pause_max(late));
    (0..60).for_each(|id| bench.cancel(RequestId(id)));
    bench.run();
    bench.check_end();
}

#[test]
fn priorities_come_first_and_nobody_waits_for_ever() {
    let of_priority = |id: u128, priority: Priority| GenerateDraft {
        service: Service { priority, ..Service::default() },
        ..draft(id, 300, 30)
    };
    let mut bench = Bench::measured(machine(2));
    let low: Vec<_> = (0..4).map(|id| bench.accept(of_priority(id, Priority::Low))).collect();
    bench.step();
    let normal: Vec<_> = (10..14).map(|id| bench.accept(of_priority(id, Priority::Normal))).collect();
    let high: Vec<_> = (20..24).map(|id| bench.accept(of_priority(id, Priority::High))).collect();
    bench.run();
    bench.check_end();
    let last = |ids: &[RequestId]| ids.iter().map(|id| bench.times[id][0]).max().expect("some");
    let first = |ids: &[RequestId]| ids.iter().map(|id| bench.times[id][0]).min().expect("some");
    assert!(last(&high) < first(&normal), "high before normal");
    assert!(last(&normal) < last(&low), "normal before low");

    // A stream of urgent requests does not keep a batch from being served.
    let mut bench = Bench::measured(machine(2));
    let batch = bench.accept(of_priority(0, Priority::Low));
    let mut id = 100;
    while bench.streams.finish(batch).is_none() {
        let load = bench.engine.load(bench.clock.now());
        if load.waiting < 4 {
            id += 1;
            bench.accept(of_priority(id, Priority::High));
        }
        bench.step();
        assert!(bench.clock.elapsed() < Duration::from_secs(120), "it starves");
    }
    bench.run();
    bench.check_end();
}

#[test]
fn targets_of_their_own_are_kept() {
    // While a long prompt is read, one row wants a token every 50 ms, the others are content with 400.
    let mut bench = Bench::measured(machine(8));
    let with_tpot = |id: u128, ms: u32| GenerateDraft {
        service: Service { tpot_target_ms: Some(ms), ..Service::default() },
        ..draft(id, 100, 4000)
    };
    let hasty = bench.accept(with_tpot(1, 50));
    let patient: Vec<_> = (2..5).map(|id| bench.accept(with_tpot(id, 400))).collect();
    for _ in 0..100 {
        bench.step();
    }
    bench.times.clear();
    let long = bench.accept(draft(1000, 16 << 10, 1));
    while bench.streams.tokens(long).is_empty() {
        bench.step();
    }
    let slice = Duration::from_millis(64 + 20);
    let pause = bench.pause_max(hasty);
    assert!(pause < Duration::from_millis(100) + slice, "{pause:?}");
    for id in &patient {
        let pause = bench.pause_max(*id);
        assert!(pause < Duration::from_millis(440) + slice, "{pause:?}");
    }
    [&patient[..], &[hasty, long]].concat().into_iter().for_each(|id| bench.cancel(id));
    bench.run();
    bench.check_end();
}
