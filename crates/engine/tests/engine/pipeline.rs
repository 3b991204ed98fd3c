//! A model whose stages compute different passes at a time.

use crate::harness::{Bench, MAC_RATES, draft};
use engine::{EngineSettings, ModelLimits};
use std::time::Duration;
use testkit::{FakeSettings, StepCost};

/// The usual machine, cut into stages; without jitter, so that times can be told in advance.
fn bench(stages: usize) -> Bench {
    let limits = ModelLimits { slots: 16, blocks: 1 << 12, kv_bytes_per_token: 1024 };
    let cost = StepCost { jitter: 0.0, ..StepCost::mac() };
    let settings = FakeSettings { limits, cost, stages, context_tokens: 1 << 15, ..FakeSettings::default() };
    Bench::new(settings, EngineSettings { rates: MAC_RATES, ..EngineSettings::default() })
}

#[test]
fn rows_are_divided_so_that_all_stages_work() {
    let check = |stages: usize, rows: u128, groups: u32| {
        let mut bench = bench(stages);
        let ids: Vec<_> = (0..rows).map(|id| bench.accept(draft(id, 20, 4000))).collect();
        while ids.iter().any(|id| bench.streams.tokens(*id).len() < 50) {
            bench.step();
        }
        bench.times.clear();
        let (begin, before) = (bench.clock.now(), bench.model.steps().len());
        while ids.iter().any(|id| bench.times.get(id).is_none_or(|times| times.len() < 100)) {
            bench.step();
        }
        let per_token = (bench.clock.now() - begin) / 100;
        // All stages work, so a row's next token comes when its own pass is through: with a few rows in each, and a base
        // of 20 ms, that is sooner than one pass over all rows, however many stages there are.
        let each = (rows as u32).div_ceil(groups);
        let pass = Duration::from_micros(20_000 + u64::from(each) * 1000);
        assert!(
            per_token < pass.mul_f64(1.05),
            "{stages} stages, {rows} rows: a token in {per_token:?}; {pass:?} were expected"
        );
        let most = bench.model.steps()[before..].iter().map(|step| step.rows.len()).max();
        assert_eq!(most, Some(each as usize), "{stages} stages, {rows} rows");
        ids.into_iter().for_each(|id| bench.cancel(id));
        bench.run();
        bench.check_end();
    };
    check(1, 8, 1);
    check(2, 8, 2);
    check(4, 8, 4);
    check(3, 8, 3);
    check(4, 1, 1);
    check(4, 2, 2);
}

#[test]
fn slices_of_a_prompt_follow_each_other_through_the_stages() {
    let ttft = |stages: usize| {
        let mut bench = bench(stages);
        let id = bench.accept(draft(1, 8000, 1));
        bench.run();
        bench.check_end();
        bench.ttft(id).as_secs_f64()
    };
    let (alone, four) = (ttft(1), ttft(4));
    assert!(four < alone * 0.4, "four stages read a prompt in {four} s, one in {alone} s");
}

#[test]
fn rows_go_on_while_a_prompt_is_read_in_stages() {
    let mut bench = bench(4);
    let ids: Vec<_> = (0..8).map(|id| bench.accept(draft(id, 20, 4000))).collect();
    while ids.iter().any(|id| bench.streams.tokens(*id).len() < 50) {
        bench.step();
    }
    bench.times.clear();
    let long = bench.accept(draft(1000, 8000, 1));
    while bench.streams.tokens(long).is_empty() {
        bench.step();
    }
    let pause = ids.iter().map(|id| bench.pause_max(*id)).max().expect("rows");
    // The target, and one pass more with its slice.
    assert!(pause < Duration::from_millis(200), "a row paused for {pause:?}");
    let ttft = bench.ttft(long);
    assert!(ttft < Duration::from_secs(16), "the prompt took {ttft:?}; 8 s alone on one stage");
    ids.into_iter().for_each(|id| bench.cancel(id));
    bench.run();
    bench.check_end();
}
