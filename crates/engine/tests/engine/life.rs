//! Everything that can become of a request.

use crate::harness::{Bench, draft, sampling};
use engine::ModelLimits;
use testkit::{FakeSettings, Fault};
use types::{
    FinishReason, GenerateDraft, GenerateError, RequestId, SamplingDraft, SamplingParams, TokenEvent, limits,
};

fn slots(slots: usize) -> FakeSettings {
    let defaults = FakeSettings::default();
    FakeSettings { limits: ModelLimits { slots, ..defaults.limits }, ..defaults }
}

#[test]
fn a_text_ends_as_it_should() {
    type Change<'a> = &'a dyn Fn(&mut GenerateDraft);
    let check = |what: &str, eos_at: Option<u32>, change: Change<'_>, reason, tokens, counted| {
        let settings = FakeSettings { eos_at: eos_at.map(|at| at..=at), ..FakeSettings::default() };
        let mut bench = Bench::measured(settings);
        let mut request = draft(1, 100, 8);
        change(&mut request);
        let id = bench.accept(request);
        bench.run();
        bench.check_end();
        assert_eq!(bench.finish(id).reason, reason, "{what}");
        assert_eq!(bench.streams.tokens(id).len(), tokens, "{what}");
        assert_eq!(bench.finish(id).usage.completion_tokens, counted, "{what}");
    };
    let (stop, length) = (FinishReason::Stop, FinishReason::Length);
    check("max_tokens", None, &|_| {}, length.clone(), 8, 8);
    check("one token", None, &|draft| draft.max_tokens = 1, length.clone(), 1, 1);
    check("end of text", Some(3), &|_| {}, stop.clone(), 3, 4);
    check("end of text at once", Some(0), &|_| {}, stop.clone(), 0, 1);
    check("end of text as the last token", Some(7), &|_| {}, stop.clone(), 7, 8);
    check("end of text ignored", Some(3), &|draft| draft.ignore_eos = true, length.clone(), 8, 8);
    check(
        "a stop token that does not come",
        None,
        &|draft| draft.stop_tokens = vec![5],
        length.clone(),
        8,
        8,
    );
    let request = draft(1, 100, 8).try_into().expect("valid");
    let second = FakeSettings::default().output(&request).tokens[1];
    check("a stop token", None, &|draft| draft.stop_tokens = vec![5, second], stop, 1, 2);
    check("the whole context", None, &|draft| draft.max_tokens = 8092, length.clone(), 8092, 8092);
    check("a prompt of one token", None, &|draft| draft.prompt.truncate(1), length, 8, 8);
}

#[test]
fn what_cannot_be_served_is_refused_with_the_value() {
    let check = |change: fn(&mut GenerateDraft), expected: &str| {
        let defaults = FakeSettings::default();
        let limits = ModelLimits { blocks: 128, ..defaults.limits };
        let mut bench = Bench::measured(FakeSettings { limits, ..defaults });
        bench.accept(draft(1, 10, 10));
        let mut request = draft(2, 10, 10);
        change(&mut request);
        let error = bench.submit(request).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        bench.run();
        bench.check_end();
    };
    check(|draft| draft.prompt[3] = 1000, "token 1000 at position 3 of the prompt is not below 1000");
    check(
        |draft| {
            let sampling = SamplingDraft { logit_bias: vec![(5000, 1.0)], ..SamplingDraft::default() };
            draft.sampling = SamplingParams::try_from(sampling).expect("in range");
        },
        "token 5000 of logit_bias is not below 1000",
    );
    check(|draft| draft.id = RequestId(1), "00000000000000000000000000000001 is already here");
    check(|draft| draft.model = "other".to_owned(), "\"other\" does not exist; this cluster serves: fake");
    check(|draft| draft.max_tokens = 8183, "max_tokens is 8183, but the model's context is 4096 tokens");
    check(|draft| draft.max_tokens = 4087, "10 tokens and max_tokens is 4087");
    check(|draft| draft.max_tokens = u32::MAX >> 12, "max_tokens is 1048575");
}

#[test]
fn a_request_that_just_fits_is_served() {
    let mut bench = Bench::measured(FakeSettings::default());
    let id = bench.accept(draft(1, 8190, 2));
    assert!(matches!(bench.submit(draft(2, 8190, 3)), Err(GenerateError::ContextExceeded { .. })));
    bench.run();
    bench.check_end();
    assert_eq!(bench.streams.tokens(id).len(), 2);
}

#[test]
fn the_queue_is_bounded_and_empties() {
    let mut bench = Bench::measured(slots(2));
    // As many as wait and run at most: what is submitted between two steps counts for both.
    for id in 0..limits::ENGINE_WAITING_MAX as u128 + 2 {
        bench.accept(draft(id, 10, 4));
    }
    let refused = bench.submit(draft(1000, 10, 4));
    assert!(matches!(refused, Err(GenerateError::Busy { retry_after_ms: 100..=30_000 })), "{refused:?}");
    assert_eq!(bench.step().admitted, 2);
    let refused = bench.submit(draft(1003, 10, 4)).expect_err("full again");
    // Three more tokens for each row, at 22 ms a step, until a place is free.
    assert!(matches!(refused, GenerateError::Busy { retry_after_ms: 100 }), "{refused:?}");
    bench.run();
    bench.check_end();
    assert_eq!(bench.model.prefill_tokens(), 660);
}

#[test]
fn cancelling_ends_a_request_once_and_frees_its_slot_for_the_next_step() {
    // `steps` before the cancellation bring the request to where it is cancelled.
    let check = |what: &str, prompt_tokens: usize, steps: usize, tokens: usize| {
        let mut bench = Bench::measured(slots(1));
        let id = bench.accept(draft(1, prompt_tokens, 100));
        let next = bench.accept(draft(2, prompt_tokens, 1));
        (0..steps).for_each(|_| {
            bench.step();
        });
        assert_eq!(bench.streams.tokens(id).len(), tokens, "{what}");
        bench.cancel(id);
        bench.cancel(id);
        let load = bench.engine.load(bench.clock.now());
        assert_eq!((load.running, load.kv_tokens.0), (0, 0), "{what}");
        let again = bench.submit(draft(1, 10, 1));
        assert!(matches!(again, Err(GenerateError::Invalid { .. })), "{what}: its last event is still due");
        assert_eq!(bench.step().admitted, 1, "{what}");
        assert_eq!(bench.finish(id).reason, FinishReason::Cancelled, "{what}");
        assert_eq!(bench.finish(id).usage.completion_tokens as usize, tokens, "{what}");
        bench.run();
        assert_eq!(bench.finish(next).reason, FinishReason::Length, "{what}");
        bench.cancel(id);
        assert!(bench.engine.is_idle(), "{what}");
        bench.check_end();
    };
    check("waiting", 10, 0, 0);
    check("in prefill", 5000, 2, 0);
    check("decoding", 10, 6, 5);
}

#[test]
fn a_waiting_request_is_cancelled_without_a_slot() {
    let mut bench = Bench::measured(slots(1));
    let ids = [1, 2, 3].map(|id| bench.accept(draft(id, 10, 20)));
    bench.step();
    bench.cancel(ids[1]);
    assert!(!bench.engine.is_idle());
    bench.step();
    assert_eq!(bench.finish(ids[1]).reason, FinishReason::Cancelled);
    bench.run();
    bench.check_end();
    assert_eq!(bench.model.prefill_tokens(), 20);
}

#[test]
fn a_lost_backend_ends_everything() {
    for (fault, nth) in [(Fault::Backend, 1), (Fault::Lost, 0)] {
        let mut bench = Bench::measured(slots(2));
        let ids = [1, 2, 3].map(|id| bench.accept(draft(id, 10, 20)));
        bench.step();
        bench.cancel(ids[2]);
        bench.model.inject(nth, fault);
        bench.step();
        let last = bench.accept(draft(4, 10, 20));
        let error = bench.try_step().expect_err("the injected failure");
        for id in [ids[0], ids[1], last] {
            let FinishReason::Failed(GenerateError::Engine { message }) = &bench.finish(id).reason else {
                panic!("{id} ended with {:?}", bench.finish(id))
            };
            assert_eq!(*message, error.to_string());
        }
        assert!(bench.engine.is_idle());
        assert_eq!(bench.try_step(), Err(error));
        let refused = bench.submit(draft(5, 10, 20)).expect_err("a lost backend").to_string();
        assert!(refused.contains("backend failed: injected"), "{refused}");
        assert_eq!(bench.streams.unfinished(), []);
        bench.engine.check_invariants();
    }
}

#[test]
fn one_sequence_fails_alone() {
    for fault in [Fault::Sequence(0), Fault::Sequence(1)] {
        let mut bench = Bench::measured(slots(3));
        bench.accept(draft(1, 10, 20));
        bench.accept(draft(2, 500, 20));
        bench.step();
        bench.model.inject(0, fault);
        bench.accept(draft(3, 10, 20));
        bench.run();
        bench.check_end();
        let failed = |id: &u128| matches!(bench.finish(RequestId(*id)).reason, FinishReason::Failed(_));
        assert_eq!([1, 2, 3].iter().filter(|id| failed(id)).count(), 1, "{fault:?}");
    }
}

#[test]
fn draining_finishes_what_is_here_and_takes_nothing_new() {
    let mut bench = Bench::measured(slots(1));
    let ids = [1, 2].map(|id| bench.accept(draft(id, 10, 5)));
    bench.step();
    bench.engine.drain();
    let refused = bench.submit(draft(3, 10, 5)).expect_err("draining").to_string();
    assert!(refused.contains("it is draining"), "{refused}");
    bench.run();
    bench.check_end();
    assert!(ids.iter().all(|id| bench.finish(*id).reason == FinishReason::Length));
}

#[test]
fn a_freed_slot_is_used_by_the_next_step() {
    let mut bench = Bench::measured(slots(1));
    for id in 0..10 {
        bench.accept(draft(id, 10, 1));
    }
    assert_eq!(bench.step().admitted, 1);
    for number in 1..=10 {
        // While the one token is drawn, its slot is not free: a step that brings it, and one that reads the next prompt.
        let summary = bench.step();
        assert_eq!((summary.tokens, summary.finished), (1, 1));
        assert_eq!(bench.step().admitted, u32::from(number < 10));
    }
    bench.check_end();
}

#[test]
fn kv_is_promised_and_a_large_request_is_not_overtaken() {
    let defaults = FakeSettings::default();
    let limits = ModelLimits { slots: 8, blocks: 64, ..defaults.limits };
    let mut bench = Bench::measured(FakeSettings { limits, ..defaults });
    let [small, large, late] =
        [(1, 600), (2, 1500), (3, 10)].map(|(id, prompt)| bench.accept(draft(id, prompt, 20)));
    assert_eq!(bench.step().admitted, 1, "620 + 1520 tokens are more than there are");
    let load = bench.engine.load(bench.clock.now());
    assert_eq!((load.running, load.waiting, load.kv_tokens.1), (1, 2, 2048));
    bench.run();
    bench.check_end();
    assert!(bench.times[&small].last() < bench.times[&large].first());
    assert!(bench.times[&small].last() < bench.times[&late].first(), "it came after the large one");
}

#[test]
fn where_kv_runs_out_the_youngest_goes_on_later() {
    let defaults = FakeSettings::default();
    let limits = ModelLimits { slots: 8, blocks: 64, ..defaults.limits };
    let mut bench = Bench::measured(FakeSettings { limits, ..defaults });
    let ids = [1, 2, 3].map(|id| {
        bench.accept(GenerateDraft {
            ignore_eos: true,
            sampling: sampling(id as u64),
            ..draft(id, 100, 1500)
        })
    });
    assert_eq!(bench.step().admitted, 3, "512 tokens of output are expected of each at first");
    let mut preempted = 0;
    while !bench.engine.is_idle() {
        preempted += bench.step().preempted;
        bench.engine.check_invariants();
    }
    assert!(preempted >= 1, "three of 1600 tokens are more than 2048");
    // The texts are those that each has alone.
    bench.check_end();
    assert!(ids.iter().all(|id| bench.finish(*id).usage.completion_tokens == 1500));
    assert!(bench.times[&ids[0]].last() < bench.times[&ids[1]].last(), "the oldest never yields");
    assert!(bench.times[&ids[1]].last() < bench.times[&ids[2]].last(), "who yielded comes before who waited");
}

/// Wherever an answer was cut off, with whatever of it in the cache: the rest is what it would have been.
#[test]
fn what_was_cut_off_elsewhere_goes_on_here() {
    let settings = FakeSettings { eos_at: Some(40..=120), ..FakeSettings::default() };
    let mut bench = Bench::measured(settings.clone());
    let whole = GenerateDraft { sampling: sampling(7), ..draft(1, 100, 200) };
    let text = settings.output(&whole.clone().try_into().expect("valid"));
    assert_eq!(text.reason, FinishReason::Stop);
    for cut in 0..=text.tokens.len() {
        let output = text.tokens[..cut].to_vec();
        let id = bench.accept(GenerateDraft { id: RequestId(cut as u128), output, ..whole.clone() });
        bench.events.clear();
        bench.run();
        let started = (0..).zip(&bench.events).find(|(_, (_, e))| matches!(e, TokenEvent::Started { .. }));
        assert_eq!(started.map(|(index, _)| index), (cut < text.tokens.len()).then_some(0), "cut {cut}");
        assert_eq!(bench.times.get(&id).map_or(0, Vec::len), text.tokens.len() - cut + 1, "cut {cut}");
        let usage = bench.finish(id).usage;
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (100, text.completion_tokens));
        // A prompt of three blocks and a bit; the fourth holds its end and 28 tokens of the answer.
        let cached = [0, 96, 100][usize::from(cut > 0) + usize::from(cut > 28)];
        assert_eq!(usage.cached_tokens, cached, "cut {cut}");
    }
    bench.check_end();
    let vocab = settings.vocab_size;
    let error = bench.submit(GenerateDraft { output: vec![vocab], ..whole }).expect_err("no such token");
    assert_eq!(error.to_string(), "token 1000 of the answer so far is not below 1000");
}

#[test]
fn load_counts_what_is_left() {
    let mut bench = Bench::measured(slots(1));
    assert_eq!(bench.engine.load(bench.clock.now()).prefill_backlog_tokens, 0);
    bench.accept(GenerateDraft { sampling: sampling(3), ..draft(1, 100, 8) });
    bench.accept(draft(2, 50, 4));
    let load = bench.engine.load(bench.clock.now());
    assert_eq!((load.running, load.waiting, load.slots), (0, 2, 1));
    assert_eq!((load.prefill_backlog_tokens, load.decode_backlog_tokens), (150, 12));
    bench.step();
    let load = bench.engine.load(bench.clock.now());
    assert_eq!((load.running, load.waiting), (1, 1));
    assert_eq!((load.prefill_backlog_tokens, load.decode_backlog_tokens), (50, 11));
    // 4 blocks of the running one.
    assert_eq!(load.kv_tokens, (128, 32_768));
    assert!((load.prefill_backlog_s / 0.05 - 1.0).abs() < 0.1, "{load:?}");
    assert!(load.decode_step_s.is_sorted() && load.decode_step_s[0] > 0.02, "{load:?}");
    assert!(load.prefill_budget_tokens > 300 && load.prefill_budget_tokens < 1000, "{load:?}");
    bench.run();
    bench.check_end();
}
