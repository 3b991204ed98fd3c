//! What is found in the prefix cache, what sessions keep, and that neither ever changes a text.

use crate::harness::{Bench, draft, sampling};
use engine::{EngineSettings, ModelLimits};
use std::time::Duration;
use testkit::{FakeSettings, StepCost};
use types::{
    CacheEvent, CacheScope, ClientId, FinishReason, GenerateDraft, RequestId, Service, SessionId, TokenId,
};

/// A machine with `blocks` blocks of KV.
fn machine(blocks: usize) -> FakeSettings {
    let limits = ModelLimits { slots: 16, blocks, kv_bytes_per_token: 1024 };
    FakeSettings { limits, context_tokens: 8192, ..FakeSettings::default() }
}

/// A request of its own with this prompt.
fn of_prompt(id: u128, prompt: &[TokenId], max_tokens: u32) -> GenerateDraft {
    GenerateDraft { prompt: prompt.to_vec(), ..draft(id, 1, max_tokens) }
}

fn tokens(count: usize, salt: u32) -> Vec<TokenId> {
    (0..count as u32).map(|index| 1 + (index * 31 + salt * 7) % 997).collect()
}

fn session(name: &str) -> Option<SessionId> {
    Some(SessionId::try_from(name.to_owned()).expect("a valid name"))
}

#[test]
fn prefixes_of_prompts_and_completions_are_found() {
    let check = |what: &str, next: &dyn Fn(&[TokenId], &[TokenId]) -> GenerateDraft, cached: u32| {
        let mut bench = Bench::measured(machine(512));
        let prompt = tokens(200, 1);
        let first = bench.accept(of_prompt(1, &prompt, 100));
        bench.run();
        let output = bench.streams.tokens(first).to_vec();
        let id = bench.accept(next(&prompt, &output));
        bench.run();
        bench.check_end();
        assert_eq!(bench.finish(first).usage.cached_tokens, 0, "{what}");
        assert_eq!(bench.finish(id).usage.cached_tokens, cached, "{what}");
        let read = 200 + bench.finish(id).usage.prompt_tokens - cached;
        assert_eq!(bench.model.prefill_tokens(), read as usize, "{what}: tokens that were computed");
    };
    check("the same prompt", &|prompt, _| of_prompt(2, prompt, 5), 192);
    check("a longer one", &|prompt, _| of_prompt(2, &[prompt, &tokens(50, 2)].concat(), 5), 192);
    check("a shorter one", &|prompt, _| of_prompt(2, &prompt[..100], 5), 96);
    // The last token is computed whatever is cached: the one after it is to be drawn.
    check("as long as its blocks", &|prompt, _| of_prompt(2, &prompt[..128], 5), 96);
    check("one token more", &|prompt, _| of_prompt(2, &prompt[..129], 5), 128);
    check("another beginning", &|prompt, _| of_prompt(2, &[&[7], prompt].concat(), 5), 0);
    // The last token drawn was never read: 299 tokens are in the KV.
    check(
        "the next turn of a chat",
        &|prompt, output| of_prompt(2, &[prompt, output, &tokens(40, 3)].concat(), 5),
        288,
    );
    let scoped = |prompt: &[TokenId], salt: &str| GenerateDraft {
        cache: CacheScope { salt: Some(salt.to_owned()), session: None },
        ..of_prompt(2, prompt, 5)
    };
    check("under a salt", &|prompt, _| scoped(prompt, "mine"), 0);
}

#[test]
fn a_cache_that_is_off_keeps_nothing() {
    let settings = EngineSettings { prefix_cache: false, ..EngineSettings::default() };
    let mut bench = Bench::new(machine(512), settings);
    for id in [1, 2] {
        let id = bench.accept(of_prompt(id, &tokens(200, 1), 5));
        bench.run();
        assert_eq!(bench.finish(id).usage.cached_tokens, 0);
    }
    bench.check_end();
    assert_eq!(bench.model.prefill_tokens(), 400);
    assert_eq!(bench.engine.take_cache_events(), []);
}

#[test]
fn of_requests_that_come_together_one_reads_and_the_others_wait_for_it() {
    let mut bench = Bench::measured(machine(512));
    let shared = tokens(1000, 1);
    let ids: Vec<_> = (0..8)
        .map(|id| bench.accept(of_prompt(id, &[&shared[..], &tokens(60, 10 + id as u32)].concat(), 20)))
        .collect();
    let other = bench.accept(of_prompt(100, &tokens(60, 99), 20));
    bench.run();
    bench.check_end();
    for id in &ids[1..] {
        assert_eq!(bench.finish(*id).usage.cached_tokens, 992);
    }
    assert_eq!(bench.model.prefill_tokens(), 1060 + 7 * 68 + 60);
    // 1.06 s for the first, then 68 ms for each other; alone each would take 1.06 s.
    let last = ids.iter().map(|id| bench.ttft(*id)).max().expect("eight");
    assert!(last < Duration::from_millis(3000), "{last:?}");
    assert!(bench.ttft(other) < Duration::from_millis(1200), "who shares nothing waits for nobody");
}

#[test]
fn a_leader_that_goes_away_is_followed_by_another() {
    let mut bench = Bench::measured(machine(512));
    let shared = tokens(2000, 1);
    let ids: Vec<_> = (0..4)
        .map(|id| bench.accept(of_prompt(id, &[&shared[..], &tokens(60, 10 + id as u32)].concat(), 5)))
        .collect();
    bench.step();
    bench.step();
    bench.cancel(ids[0]);
    bench.run();
    bench.check_end();
    assert!(ids[1..].iter().all(|id| bench.finish(*id).reason == FinishReason::Length));
    assert!(bench.model.prefill_tokens() < 3000, "{}", bench.model.prefill_tokens());
}

#[test]
fn what_was_used_last_is_kept_longest() {
    // Room for three prompts of 10 blocks beside the one that runs.
    let mut bench = Bench::measured(machine(44));
    let ask = |bench: &mut Bench, id: u128, prompt: u32| {
        let id = bench.accept(of_prompt(id, &tokens(321, prompt), 1));
        bench.run();
        bench.finish(id).usage.cached_tokens
    };
    for (id, prompt, cached) in [
        (1, 1, 0),
        (2, 2, 0),
        (3, 3, 0),
        // Used again: the second is the oldest now.
        (4, 1, 320),
        (5, 4, 0),
        (6, 5, 0),
        (7, 1, 320),
    ] {
        assert_eq!(ask(&mut bench, id, prompt), cached, "request {id}");
    }
    // 11 blocks were needed where 4 were free. Leaves went first: of the second prompt the beginning is left.
    assert_eq!(ask(&mut bench, 8, 2), 96);
    bench.check_end();
}

#[test]
fn sessions_outlive_others_until_their_time_is_over() {
    let settings = EngineSettings {
        session_ttl: Duration::from_secs(60),
        session_quota: 0.5,
        ..EngineSettings::default()
    };
    let client = ClientId(7);
    let of_session = |id: u128, prompt: &[TokenId], name: &str| GenerateDraft {
        cache: CacheScope { salt: None, session: session(name) },
        service: Service { client, ..Service::default() },
        ..of_prompt(id, prompt, 1)
    };
    let mut bench = Bench::new(machine(44), settings);
    let chat = tokens(321, 1);
    bench.accept(of_session(1, &chat, "chat"));
    bench.run();
    let listed = bench.engine.sessions(bench.clock.now());
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].client, listed[0].id.as_str(), listed[0].tokens), (client, "chat", 320));
    // Others push everything out but what the session keeps.
    for id in 0..10 {
        bench.accept(of_prompt(100 + id, &tokens(321, 50 + id as u32), 1));
        bench.run();
    }
    let id = bench.accept(of_prompt(2, &chat, 1));
    bench.run();
    assert_eq!(bench.finish(id).usage.cached_tokens, 320);
    bench.clock.advance(Duration::from_secs(61));
    for id in 0..10 {
        bench.accept(of_prompt(200 + id, &tokens(321, 80 + id as u32), 1));
        bench.run();
    }
    assert_eq!(bench.engine.sessions(bench.clock.now()), []);
    let id = bench.accept(of_prompt(3, &chat, 1));
    bench.run();
    assert_eq!(bench.finish(id).usage.cached_tokens, 0, "its time is over");

    // Beyond the quota of 22 blocks the longest unused session yields.
    for (id, name) in [(301, "a"), (302, "b"), (303, "c")] {
        bench.accept(of_session(id, &tokens(321, id as u32), name));
        bench.run();
        bench.clock.advance(Duration::from_secs(1));
    }
    let names: Vec<_> =
        bench.engine.sessions(bench.clock.now()).iter().map(|info| info.id.as_str().to_owned()).collect();
    assert_eq!(names, ["b", "c"]);
    let (b, nobodys) = (session("b").expect("named"), ClientId(8));
    assert!(!bench.engine.end_session(nobodys, &b), "it belongs to another client");
    assert!(bench.engine.end_session(client, &b));
    assert!(!bench.engine.end_session(client, &b), "it is gone");
    bench.check_end();

    // Pinned blocks yield to requests that need the memory: nobody is refused for a session's sake.
    let id = bench.accept(draft(400, 1300, 60));
    bench.run();
    bench.check_end();
    assert_eq!(bench.finish(id).reason, FinishReason::Length);
}

#[test]
fn events_tell_what_a_cache_holds() {
    let mut bench = Bench::measured(machine(100));
    let mut known = std::collections::BTreeSet::new();
    for id in 0..40_u32 {
        bench.accept(of_prompt(u128::from(id), &tokens(40 + 61 * id as usize % 700, id % 11), 20 + id % 40));
        if id % 3 == 0 {
            bench.run();
        }
        for event in bench.engine.take_cache_events() {
            match event {
                CacheEvent::Stored { blocks, .. } => {
                    blocks.iter().for_each(|hash| assert!(known.insert(*hash), "{hash:?} was stored twice"));
                }
                CacheEvent::Removed { blocks } => {
                    blocks.iter().for_each(|hash| assert!(known.remove(hash), "{hash:?} was not there"));
                }
            }
        }
        let mut snapshot = std::collections::BTreeSet::new();
        for event in bench.engine.cache_snapshot() {
            let CacheEvent::Stored { parent, blocks } = event else { panic!("a snapshot only stores") };
            let root = !snapshot.contains(&parent);
            assert!(root || snapshot.contains(&parent), "parents first");
            snapshot.extend(blocks);
        }
        assert_eq!(snapshot, known);
    }
    bench.run();
    bench.check_end();
}

#[test]
fn a_hit_never_changes_the_text() {
    // Many requests over few prompts and seeds, with little memory; `check_end` compares every text with what it is alone.
    for blocks in [40, 100, 1000] {
        let cost = StepCost::none();
        let mut bench = Bench::measured(FakeSettings { cost, eos_at: Some(5..=60), ..machine(blocks) });
        for id in 0..200_u128 {
            let common = tokens(32 * (id % 5) as usize + 16, 1);
            let own = tokens(1 + (id * 37 % 90) as usize, (id % 7) as u32);
            let request = of_prompt(id, &[common, own].concat(), 1 + (id % 50) as u32);
            let request = GenerateDraft { sampling: sampling((id % 3) as u64), ..request };
            while bench.submit(request.clone()).is_err() {
                bench.step();
            }
            if id % 4 == 0 {
                bench.step();
            }
        }
        bench.run();
        bench.check_end();
        let cached: u32 = (0..200).map(|id| bench.finish(RequestId(id)).usage.cached_tokens).sum();
        assert!(cached > 2000, "{blocks} blocks: only {cached} tokens were found");
    }
}
