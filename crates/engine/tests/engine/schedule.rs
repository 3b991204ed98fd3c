//! Who runs when, in virtual time.

use crate::harness::{Bench, MAC_RATES, draft};
use engine::{EngineSettings, ModelLimits, Speculate};
use std::time::Duration;
use testkit::{FakeSettings, StepCost};
use types::{GenerateError, NodeRates, RequestId};

fn machine(slots: usize, cost: StepCost) -> FakeSettings {
    let limits = ModelLimits { slots, blocks: 1 << 15, kv_bytes_per_token: 1024 };
    FakeSettings { limits, cost, context_tokens: 1 << 17, ..FakeSettings::default() }
}

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

#[test]
fn rows_go_on_while_a_long_prompt_is_read() {
    let check = |what: &str, rows: u128, cost: StepCost, rates: NodeRates| {
        let settings = EngineSettings { rates, ..EngineSettings::default() };
        let mut bench = Bench::new(machine(rows as usize + 2, cost), settings.clone());
        let ids: Vec<_> = (0..rows).map(|id| bench.accept(draft(id, 100, 20_000))).collect();
        while ids.iter().any(|id| bench.streams.tokens(*id).len() < 50) {
            bench.step();
        }
        // What a slice takes is learned from the first one, where it was not measured.
        let first = bench.accept(draft(999, 200, 1));
        while bench.streams.finish(first).is_none() {
            bench.step();
        }
        bench.times.clear();
        let begin = bench.clock.now();
        let long = bench.accept(draft(1000, 32 << 10, 10));
        while bench.streams.tokens(long).is_empty() {
            bench.step();
        }
        // The smallest slice is 64 tokens; at the end of the prompt it attends to 32k.
        let slice = cost.prefill_token * 64 + cost.kv_1024 * 64;
        let target = settings.tpot_target.max(cost.base + (cost.row + cost.kv_1024 * 20) * rows as u32);
        let pause_max = (target + slice).mul_f64(1.0 + 2.0 * cost.jitter);
        for id in &ids {
            let pause = bench.pause_max(*id);
            assert!(pause <= pause_max, "{what}: a row paused for {pause:?}, more than {pause_max:?}");
        }
        // Reading alone takes this long; rows cost it no more than what they are promised.
        let alone = (cost.prefill_token + cost.kv_1024 / 2) * (32 << 10);
        let took = bench.clock.now() - begin;
        assert!(took < alone * 5, "{what}: reading took {took:?} instead of {alone:?}");
        [&ids[..], &[long]].concat().into_iter().for_each(|id| bench.cancel(id));
        bench.run();
        bench.check_end();
    };
    let mac = StepCost::mac();
    check("one row", 1, mac, MAC_RATES);
    check("eight rows", 8, mac, MAC_RATES);
    check("a slower machine than thought", 8, mac, EngineSettings::default().rates);
    let rates = NodeRates { prefill_tokens_per_s: 100.0, decode_step_s: 0.06, decode_row_s: 0.01 };
    let cpu = StepCost { base: ms(50), prefill_token: ms(10), row: ms(10), ..mac };
    check("slices longer than the target", 4, cpu, rates);
    check("rows slower than the target", 12, cpu, rates);
    let rates = NodeRates { prefill_tokens_per_s: 20_000.0, decode_step_s: 0.006, decode_row_s: 0.0001 };
    let gpu = StepCost { base: ms(6), prefill_token: ms(1) / 20, row: ms(1) / 10, ..mac };
    check("a fast machine", 32, gpu, rates);
}

#[test]
fn rows_hardly_notice_a_prompt_that_has_time() {
    // A machine that reads 20,000 tokens a second, where rows alone take 9 ms a step and their target allows 100.
    let rates = NodeRates { prefill_tokens_per_s: 20_000.0, decode_step_s: 0.006, decode_row_s: 0.0001 };
    let cost = StepCost { base: ms(6), prefill_token: ms(1) / 20, row: ms(1) / 10, ..StepCost::mac() };
    let mut bench = Bench::new(machine(32, cost), EngineSettings { rates, ..EngineSettings::default() });
    let ids: Vec<_> = (0..16).map(|id| bench.accept(draft(id, 100, 4000))).collect();
    let pause_while = |bench: &mut Bench, done: &dyn Fn(&Bench) -> bool| {
        bench.times.clear();
        while !done(bench) {
            bench.step();
        }
        ids.iter().map(|id| bench.pause_max(*id)).max().expect("rows")
    };
    pause_while(&mut bench, &|bench| bench.streams.tokens(ids[15]).len() > 50);
    let quiet = pause_while(&mut bench, &|bench| bench.streams.tokens(ids[15]).len() > 100);
    // 0.1 and 1.6 s alone: nobody waits behind them.
    for (id, tokens, pause, ttft) in [(1000, 2048, quiet * 2, ms(400)), (1001, 16 << 10, quiet * 3, ms(4800))]
    {
        let long = bench.accept(draft(id, tokens, 1));
        let beside = pause_while(&mut bench, &|bench| !bench.streams.tokens(long).is_empty());
        assert!(beside < pause, "{tokens} tokens: {beside:?}, where {pause:?} are allowed");
        assert!(bench.ttft(long) < ttft, "{tokens} tokens: {:?}", bench.ttft(long));
    }
    ids.clone().into_iter().for_each(|id| bench.cancel(id));
    bench.run();
    bench.check_end();
}

#[test]
fn slices_are_large_where_having_one_is_what_costs() {
    // As a GPU: steps of rows alone are compiled and take 2 ms, any slice makes that 6, and 150 tokens more take 1 ms.
    let cost = StepCost {
        base: ms(2),
        slices: ms(4),
        prefill_token: Duration::from_micros(7),
        row: Duration::from_micros(20),
        kv_1024: Duration::from_micros(1),
        ..StepCost::mac()
    };
    let rates = NodeRates { prefill_tokens_per_s: 100_000.0, decode_step_s: 0.002, decode_row_s: 0.00002 };
    let tpot_target = ms(10);
    let mut bench =
        Bench::new(machine(9, cost), EngineSettings { rates, tpot_target, ..EngineSettings::default() });
    let ids: Vec<_> = (0..8).map(|id| bench.accept(draft(id, 100, 4000))).collect();
    while bench.streams.tokens(ids[7]).len() < 50 {
        bench.step();
    }
    for id in 1000..1003 {
        let long = bench.accept(draft(id, 4096, 1));
        while bench.streams.tokens(long).is_empty() {
            bench.step();
        }
    }
    // 30 ms alone, in a few slices; 128 of the smallest would take 0.8 s.
    let ttft = bench.ttft(RequestId(1002));
    assert!(ttft < ms(200), "{ttft:?}");
    ids.into_iter().for_each(|id| bench.cancel(id));
    bench.run();
    bench.check_end();
}

#[test]
fn several_prompts_are_read_at_once() {
    let mut bench = Bench::measured(machine(8, StepCost::mac()));
    for id in 0..4 {
        bench.accept(draft(id, 90, 2));
    }
    let summary = bench.step();
    assert_eq!((summary.slices, summary.prefill_tokens, summary.tokens), (4, 360, 0));
    let summary = bench.step();
    assert_eq!(
        (summary.rows, summary.tokens),
        (4, 4),
        "the next step is begun before the first one's tokens are known"
    );
    bench.run();
    bench.check_end();
}

#[test]
fn a_short_prompt_overtakes_a_long_one_that_can_wait() {
    let mut bench = Bench::measured(machine(4, StepCost::mac()));
    let long = bench.accept(draft(1, 32 << 10, 2));
    bench.step();
    let short = bench.accept(draft(2, 100, 2));
    bench.run();
    bench.check_end();
    assert!(bench.ttft(short) < Duration::from_secs(1), "{:?}", bench.ttft(short));
    assert!(bench.ttft(long) < Duration::from_secs(50), "{:?}", bench.ttft(long));
}

#[test]
fn no_request_starves_under_constant_arrivals() {
    // Each short request needs about 0.1 s of prefill; with eight slots one arrives every `every` steps.
    let check = |what: &str, speculation, every: u128, refused: bool| {
        let engine = EngineSettings { rates: MAC_RATES, speculation, ..EngineSettings::default() };
        let mut bench = Bench::new(machine(8, StepCost::mac()), engine);
        let mut busy = 0;
        let mut long = None;
        for step in 0..4000_u128 {
            if step % every == 0 {
                match bench.submit(draft(step, 100, 10)) {
                    Ok(_) => {}
                    Err(GenerateError::Busy { .. }) => busy += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            if step >= 100 && long.is_none() {
                long = bench.submit(draft(1_000_000, 4000, 10)).ok();
            }
            bench.step();
        }
        assert_eq!(busy > 0, refused, "{what}: {busy} refused");
        let long = long.expect("taken at some time");
        // 4 s alone; at most 64 requests of 0.12 s each are before it, and those after it have later deadlines.
        assert!(bench.ttft(long) < Duration::from_secs(30), "{what}: {:?}", bench.ttft(long));
        bench.run();
        bench.check_end();
        let ttft_max = bench.arrivals.keys().map(|id| bench.ttft(*id)).max().expect("requests");
        assert!(ttft_max < Duration::from_secs(30), "{what}: {ttft_max:?}");
        for id in bench.arrivals.keys() {
            assert!(bench.pause_max(*id) < ms(200), "{what}: {id} paused for {:?}", bench.pause_max(*id));
        }
    };
    check("light load", Speculate::Off, 12, false);
    check("overload", Speculate::Off, 1, true);
    check("light load, guessing", Speculate::Auto, 12, false);
    check("overload, guessing", Speculate::Auto, 1, true);
}

#[test]
fn speed_is_learned() {
    let check = |cost: StepCost, expected: NodeRates| {
        let mut bench = Bench::new(machine(4, cost), EngineSettings::default());
        for id in 0..120 {
            while bench.submit(draft(id, 300 + 13 * id as usize, 1 + 10 * (id % 4) as u32)).is_err() {
                bench.step();
            }
        }
        bench.run();
        bench.check_end();
        let got = bench.engine.rates();
        let close = |got: f32, expected: f32| (got / expected - 1.0).abs() < 0.2;
        assert!(close(got.prefill_tokens_per_s, expected.prefill_tokens_per_s), "{got:?}");
        assert!(close(got.decode_step_s, expected.decode_step_s), "{got:?}");
    };
    let mac = StepCost::mac();
    check(mac, MAC_RATES);
    let fast = StepCost { base: ms(5), prefill_token: ms(1) / 20, row: ms(1) / 10, kv_1024: ms(0), ..mac };
    check(
        fast,
        NodeRates { prefill_tokens_per_s: 512.0 / 0.0306, decode_step_s: 0.0051, decode_row_s: 0.0001 },
    );
}
