//! Tokens guessed ahead: what they save, and that they change nothing.

use crate::harness::{Bench, MAC_RATES, draft, sampling};
use engine::{EngineSettings, ModelLimits, Speculate};
use std::time::Duration;
use testkit::{FakeSettings, StepCost};
use types::{
    CacheScope, DraftOrigin, GenerateDraft, GenerateRequest, OutputRules, RequestId, Speculation, TokenReport,
};

fn settings() -> FakeSettings {
    let limits = ModelLimits { slots: 16, blocks: 2048, kv_bytes_per_token: 1024 };
    FakeSettings { limits, ..FakeSettings::default() }
}

fn bench(speculation: Speculate) -> Bench {
    Bench::new(settings(), EngineSettings { rates: MAC_RATES, speculation, ..EngineSettings::default() })
}

/// How many times as fast some rows are with guesses that come true at a rate as without, on a machine with such costs.
fn ratio(rows: u128, rate: f64, cost: StepCost, tokens: u32) -> f64 {
    let seconds = |speculation| {
        let engine = EngineSettings { rates: MAC_RATES, speculation, ..EngineSettings::default() };
        let mut bench = Bench::new(FakeSettings { cost, ..settings() }, engine);
        bench.guess(rate);
        for id in 0..rows {
            bench.accept(draft(id, 100, tokens));
        }
        let begin = bench.clock.now();
        bench.run();
        bench.check_end();
        (bench.clock.now() - begin).as_secs_f64()
    };
    seconds(Speculate::Off) / seconds(Speculate::Auto)
}

#[test]
fn guesses_that_come_true_save_time_and_others_cost_little() {
    let mac = StepCost::mac();
    // Whose host takes a fifth as long as its device.
    let waiting = StepCost { host: Duration::from_millis(4), ..mac };
    // A token guessed ahead costs five times what a row does, or as much as a step.
    let dear = StepCost { draft: 5 * mac.row, ..waiting };
    let dearest = StepCost { draft: mac.base, ..waiting };
    let check = |rows: u128, rate: f64, (name, cost): (&str, StepCost), within: [f64; 2]| {
        let ratio = ratio(rows, rate, cost, 400);
        println!("{rows} rows, {rate} of the guesses true, {name}: {ratio:.3} times as fast");
        assert!(
            within[0] <= ratio && ratio <= within[1],
            "{rows} rows, {rate} true, {name}: {ratio} is not in {within:?}"
        );
    };
    let (cheap, waiting) = (("cheap", mac), ("with waits", waiting));
    let (dear, dearest) = (("dear", dear), ("as dear as steps", dearest));
    check(1, 1.0, cheap, [3.0, 20.0]);
    check(4, 1.0, cheap, [2.0, 20.0]);
    check(16, 1.0, cheap, [1.5, 20.0]);
    check(1, 0.65, cheap, [1.2, 3.0]);
    check(1, 1.0, waiting, [2.5, 20.0]);
    check(16, 1.0, waiting, [1.3, 20.0]);
    check(1, 1.0, dear, [1.5, 20.0]);
    for rows in [1, 4, 16] {
        check(rows, 0.0, waiting, [0.97, 1.001]);
        check(rows, 0.0, dearest, [0.97, 1.001]);
        check(rows, 0.2, dear, [0.97, 20.0]);
        check(rows, 0.7, dear, [0.97, 20.0]);
        check(rows, 0.7, dearest, [0.97, 1.05]);
    }
    check(1, 0.2, cheap, [0.97, 20.0]);
}

#[test]
fn a_row_that_gains_nothing_is_not_held_up() {
    let pause = |guessing: bool| {
        let mut bench = bench(Speculate::Auto);
        if guessing {
            bench.guess(1.0);
        }
        let off = Speculation { enabled: false, ..Speculation::default() };
        let slow = bench.accept(GenerateDraft { speculation: off, ..draft(1, 100, 200) });
        for id in 2..6 {
            bench.accept(draft(id, 100, 400));
        }
        while bench.streams.tokens(slow).len() < 150 {
            bench.step();
        }
        let times = &bench.times[&slow];
        assert_eq!(bench.streams.tokens(slow).len(), times.len(), "a token at a time");
        let spent = times[140] - times[40];
        bench.run();
        bench.check_end();
        spent
    };
    let (alone, beside) = (pause(false), pause(true));
    assert!(beside < alone.mul_f64(1.06), "{alone:?} became {beside:?}");
}

#[test]
fn whatever_is_guessed_the_text_is_the_same() {
    for (rate, stages) in [(0.0, 1), (0.3, 1), (0.65, 1), (1.0, 1), (0.65, 3), (1.0, 3)] {
        let settings = FakeSettings { stages, eos_at: Some(60..=150), ..settings() };
        let engine =
            EngineSettings { rates: MAC_RATES, speculation: Speculate::Always, ..EngineSettings::default() };
        let mut bench = Bench::new(settings, engine);
        bench.guess(rate);
        let ids: Vec<_> = (0..16_u128)
            .map(|id| {
                let at = id as u32;
                bench.accept(GenerateDraft {
                    sampling: sampling(id as u64 % 5),
                    ignore_eos: id % 5 == 4,
                    stop_tokens: if id % 3 == 0 {
                        (1..100).step_by(7).take(20).collect()
                    } else {
                        Vec::new()
                    },
                    rules: OutputRules { grammar: None, min_tokens: if id % 4 == 1 { 70 + at } else { 0 } },
                    report: TokenReport { logprobs: (id % 2 == 0).then_some(at % 5), prompt_logprobs: None },
                    ..draft(id, 50 + 3 * id as usize, 100 + at)
                })
            })
            .collect();
        bench.run();
        bench.check_end();
        let sum =
            |of: fn(&types::Usage) -> u32| -> u32 { ids.iter().map(|id| of(&bench.finish(*id).usage)).sum() };
        let (accepted, rejected) = (sum(|usage| usage.accepted_drafts), sum(|usage| usage.rejected_drafts));
        println!("rate {rate}, {stages} stages: {accepted} accepted, {rejected} rejected");
        assert!(rejected > 100 || rate == 1.0, "{rejected} rejected");
        assert!(accepted > 300 || rate < 0.5, "{accepted} accepted");
        let told = bench.engine.load(bench.clock.now()).drafts[DraftOrigin::Model as usize];
        assert!(u64::from(accepted) >= told.accepted && told.accepted > 0 || rate == 0.0, "{told:?}");
    }
}

#[test]
fn texts_say_what_texts_go_on_with() {
    let fake = settings();
    let request = |id: u128| draft(id, 100, 200);
    let valid = GenerateRequest::try_from(request(1)).expect("valid");
    let text = fake.output(&valid).tokens;
    let check = |what: &str, origin: DraftOrigin, drafts: &[GenerateDraft], fewer_passes: bool| {
        let mut bench = bench(Speculate::Auto);
        for draft in drafts {
            let before = bench.model.steps().len();
            let id = bench.accept(draft.clone());
            bench.run();
            let passes = bench.model.steps().len() - before;
            let usage = bench.finish(id).usage;
            if draft == &drafts[drafts.len() - 1] {
                assert_eq!(passes < 100, fewer_passes, "{what}: {passes} passes, {usage:?}");
                let count = bench.engine.load(bench.clock.now()).drafts[origin as usize];
                assert_eq!(count.accepted > 100, fewer_passes, "{what}: {count:?}");
            }
        }
        bench.check_end();
    };
    let again = GenerateDraft { id: RequestId(2), ..request(1) };
    check("an answer that was given", DraftOrigin::Answers, &[request(1), again.clone()], true);
    let salted = CacheScope { salt: Some("another".to_owned()), session: None };
    let salted = GenerateDraft { cache: salted, ..again.clone() };
    check("under another salt", DraftOrigin::Answers, &[request(1), salted], false);
    let off = Speculation { enabled: false, ..Speculation::default() };
    check(
        "not wanted",
        DraftOrigin::Answers,
        &[request(1), GenerateDraft { speculation: off, ..again }],
        false,
    );
    let mut edited = text.clone();
    edited[70..80].fill(3);
    edited.insert(120, 4);
    let speculation = Speculation { enabled: true, prediction: edited };
    check("a prediction", DraftOrigin::Prediction, &[GenerateDraft { speculation, ..request(1) }], true);
    let other = Speculation { enabled: true, prediction: vec![7; 300] };
    check(
        "a wrong one",
        DraftOrigin::Prediction,
        &[GenerateDraft { speculation: other, ..request(1) }],
        false,
    );
    // What is asked for stands in the prompt of a request that goes on after it.
    let mut quoting = request(1);
    quoting.output = text[..2].to_vec();
    check("nothing to say", DraftOrigin::Context, &[quoting], false);
}

#[test]
fn a_prediction_outside_the_vocabulary_is_refused() {
    let mut bench = bench(Speculate::Auto);
    let speculation = Speculation { enabled: true, prediction: vec![1, 1000] };
    let error = bench.submit(GenerateDraft { speculation, ..draft(1, 10, 10) }).expect_err("no such token");
    assert_eq!(error.to_string(), "token 1000 of the prediction is not below 1000");
}
