//! Answers under a grammar, of a least length, and with what is told of their tokens.

use crate::harness::{Bench, draft, matcher, sampling};
use engine::ModelLimits;
use testkit::{FakeSettings, Fault};
use types::{
    FinishReason, GenerateDraft, GenerateError, Grammar, OutputRules, Priority, RequestId, Service,
    TokenEvent, TokenReport,
};

/// Of each kind, some that end by themselves and some that go on.
pub(crate) const GRAMMARS: &[fn() -> Grammar] = &[
    || Grammar::JsonSchema(r#"{"type": "object", "properties": {"a": {"type": "integer"}}}"#.to_owned()),
    || Grammar::JsonSchema(r#"{"type": "array", "items": {"type": "string"}, "maxItems": 4}"#.to_owned()),
    || Grammar::JsonSchema(r#"{"enum": ["red", "green", 7, null]}"#.to_owned()),
    || Grammar::Regex("[0-9]{3}-[0-9]{4}".to_owned()),
    || Grammar::Regex("[a-z ]*".to_owned()),
    || Grammar::Lark("start: \"yes\" | \"no\" \" \" start".to_owned()),
];

fn under(id: u128, grammar: Grammar) -> GenerateDraft {
    let rules = OutputRules { grammar: Some(grammar), min_tokens: 0 };
    GenerateDraft { rules, sampling: sampling(id as u64), ..draft(id, 40, 200) }
}

fn text(settings: &FakeSettings, tokens: &[u32]) -> String {
    let vocabulary = settings.vocabulary();
    let bytes: Vec<u8> = tokens.iter().flat_map(|&token| vocabulary.word(token).to_vec()).collect();
    String::from_utf8(bytes).expect("UTF-8")
}

#[test]
fn rows_of_a_batch_keep_to_their_own_grammars() {
    let limits = ModelLimits { slots: 16, ..FakeSettings::default().limits };
    let settings = FakeSettings { limits, ..FakeSettings::default() };
    let mut bench = Bench::measured(settings.clone());
    let mut ids = Vec::new();
    for id in 0..16 {
        ids.push(match GRAMMARS.get(id as usize) {
            Some(grammar) => bench.accept(under(id, grammar())),
            None => bench.accept(GenerateDraft { sampling: sampling(id as u64), ..draft(id, 40, 60) }),
        });
    }
    bench.run();
    bench.check_end();
    let ended = |index: usize| {
        assert_eq!(bench.finish(ids[index]).reason, FinishReason::Stop);
        text(&settings, bench.streams.tokens(ids[index]))
    };
    assert!(["\"red\"", "\"green\"", "7", "null"].contains(&ended(2).as_str()), "{}", ended(2));
    let number = ended(3);
    assert!(number.len() == 8 && number.as_bytes()[3] == b'-', "{number}");
    assert!(ended(5).ends_with("yes"));
}

/// Each step begins before the tokens of the one before are known, whether these are drawn under a grammar or not.
#[test]
fn constrained_rows_stay_in_the_lookahead() {
    let steps_of = |grammar: Option<Grammar>| {
        let mut bench = Bench::measured(FakeSettings::default());
        let rules = OutputRules { grammar, min_tokens: 0 };
        bench.accept(GenerateDraft { rules, ..draft(1, 10, 50) });
        bench.run();
        bench.check_end();
        let steps = bench.model.steps();
        let gaps = steps.windows(2).filter(|pair| pair[1].time.0 > pair[0].time.1).count();
        (steps.len(), gaps)
    };
    let free = steps_of(None);
    assert_eq!(free, (50, 0));
    assert_eq!(steps_of(Some(Grammar::Regex("[a-z ]*".to_owned()))), free);
}

/// The slots are taken away in the middle of texts, and texts are cut off and brought back at every place.
#[test]
fn matchers_survive_preemption_and_failover() {
    let limits = ModelLimits { slots: 4, ..FakeSettings::default().limits };
    let settings = FakeSettings { limits, ..FakeSettings::default() };
    let mut bench = Bench::measured(settings.clone());
    let of_priority = |id, priority| GenerateDraft {
        service: Service { priority, ..Service::default() },
        ..under(id, GRAMMARS[4]())
    };
    for id in 0..4 {
        bench.accept(of_priority(id, Priority::Low));
    }
    let mut preempted = 0;
    for _ in 0..8 {
        preempted += bench.step().preempted;
    }
    // These take slots from those.
    for id in 4..6 {
        bench.accept(of_priority(id, Priority::High));
    }
    while !bench.engine.is_idle() {
        preempted += bench.step().preempted;
    }
    assert!(preempted > 0, "nobody was preempted");
    bench.check_end();

    let whole = under(50, GRAMMARS[3]());
    let request = whole.clone().try_into().expect("valid");
    let output = settings.output_under(&request, matcher(&request));
    assert_eq!(output.reason, FinishReason::Stop);
    for cut in 0..=output.tokens.len() {
        let output = output.tokens[..cut].to_vec();
        bench.accept(GenerateDraft { id: RequestId(100 + cut as u128), output, ..whole.clone() });
        bench.run();
    }
    bench.check_end();
    let error = bench.submit(GenerateDraft { output: vec![1 + u32::from(b'x')], ..whole });
    let error = error.expect_err("not in the grammar").to_string();
    assert!(error.contains("token 121 is not allowed by the grammar"), "{error}");
}

#[test]
fn a_text_has_its_least_length() {
    let check = |draft: GenerateDraft, min_tokens: u32, least: u32, reason: FinishReason| {
        let settings = FakeSettings { eos_at: Some(3..=3), ..FakeSettings::default() };
        let mut bench = Bench::measured(settings);
        let rules = OutputRules { min_tokens, ..draft.rules.clone() };
        let id = bench.accept(GenerateDraft { rules, ..draft });
        bench.run();
        bench.check_end();
        let finish = bench.finish(id);
        assert!(finish.usage.completion_tokens >= least, "{finish:?}");
        assert_eq!(finish.reason, reason);
    };
    let free = || GenerateDraft { sampling: sampling(3), ..draft(1, 10, 30) };
    check(free(), 0, 4, FinishReason::Stop);
    check(free(), 20, 30, FinishReason::Length);
    // What is complete ends; what may go on does.
    check(under(1, GRAMMARS[2]()), 100, 1, FinishReason::Stop);
    check(under(1, GRAMMARS[4]()), 0, 4, FinishReason::Stop);
    check(under(1, GRAMMARS[4]()), 100, 200, FinishReason::Length);
}

#[test]
fn what_is_told_of_tokens_is_told_once_and_in_order() {
    let settings = FakeSettings::default();
    let mut bench = Bench::measured(settings);
    let told = |id: u128, prompt: usize, logprobs, prompt_logprobs| GenerateDraft {
        report: TokenReport { logprobs, prompt_logprobs },
        ..draft(id, prompt, 10)
    };
    let cached = bench.accept(told(1, 700, None, None));
    bench.run();
    // The same prompt, which is in the cache now.
    let scored = bench.accept(GenerateDraft { id: RequestId(2), ..told(1, 700, Some(3), Some(2)) });
    let short = bench.accept(told(3, 1, Some(0), Some(20)));
    let plain = bench.accept(told(4, 50, Some(20), None));
    bench.run();
    bench.check_end();
    let counts = |id| {
        let (prompt, output) = bench.streams.logprobs(id);
        (prompt.len(), output.len(), output.first().map_or(0, |token| token.top.len()))
    };
    assert_eq!(counts(cached), (0, 0, 0));
    assert_eq!(counts(scored), (700, 10, 3));
    assert_eq!(counts(short), (1, 10, 0));
    assert_eq!(counts(plain), (0, 10, 20));
    assert_eq!(bench.finish(scored).usage.cached_tokens, 0);
    let slices = bench.model.steps();
    let longest =
        slices.iter().flat_map(|step| &step.slices).filter(|slice| slice.0.0 == 1).map(|slice| slice.2);
    assert_eq!(longest.max(), Some(128));
}

#[test]
fn who_cannot_go_on_ends_and_others_do() {
    let mut bench = Bench::measured(FakeSettings::default());
    let cancelled = bench.accept(under(1, GRAMMARS[4]()));
    let other = bench.accept(under(2, GRAMMARS[4]()));
    for _ in 0..5 {
        bench.step();
    }
    bench.cancel(cancelled);
    bench.model.inject(3, Fault::Sequence(0));
    bench.run();
    assert_eq!(bench.finish(cancelled).reason, FinishReason::Cancelled);
    assert!(matches!(bench.finish(other).reason, FinishReason::Failed(_)), "injected");
    // A text of characters that the vocabulary has, then one that is none of its tokens' and no end.
    let mut bench = Bench::measured(FakeSettings::default());
    let uncompiled = under(3, GRAMMARS[0]()).try_into().expect("valid");
    let error = bench.engine.submit(bench.clock.now(), uncompiled).expect_err("nobody compiled it");
    assert!(matches!(error, GenerateError::Invalid { .. }), "{error}");
    bench.check_end();
    assert!(bench.events.iter().all(|(_, event)| !matches!(event, TokenEvent::Prompt { .. })));
}
