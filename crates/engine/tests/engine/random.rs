//! Random traffic: whatever is submitted, cancelled and broken in whatever order, every request ends once, with its own text.

use crate::harness::{Bench, draft, matcher, sampling};
use crate::rules::GRAMMARS;
use engine::{EngineSettings, ModelLimits, Speculate};
use testkit::{FakeSettings, Fault, StepCost};
use types::{FinishReason, GenerateDraft, GenerateError, OutputRules, RequestId, TokenEvent, TokenReport};

/// Traffics that are tried; a failure prints the number, which is its seed.
const SEEDS: u64 = 400;

/// A linear congruential generator (Knuth's MMIX constants), its upper bits.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

fn settings(random: &mut Random) -> FakeSettings {
    let limits = ModelLimits {
        slots: 1 + random.below(8) as usize,
        blocks: 8 * (4 + random.below(40)) as usize,
        kv_bytes_per_token: 1024,
    };
    FakeSettings {
        context_tokens: random.pick(&[512, 2000, 4096]),
        limits,
        cost: random.pick(&[StepCost::mac(), StepCost::none()]),
        stages: random.pick(&[1, 1, 2, 4]),
        eos_at: random.pick(&[None, Some((0, 3)), Some((5, 60))]).map(|(from, to)| from..=to),
        ..FakeSettings::default()
    }
}

/// One in three brings the beginning of its own text.
fn request(id: u128, random: &mut Random, settings: &FakeSettings) -> GenerateDraft {
    let prompt_tokens = 1 + random.pick(&[3, 100, 1500]) * random.below(1000) as usize / 1000;
    let below = random.pick(&[1, 10, 80]);
    let max_tokens = 1 + random.below(below) as u32;
    // A few prompts and seeds, so that many requests are alike.
    let alike = draft(random.pick(&[1, 2, id]), prompt_tokens, max_tokens);
    let mut draft = GenerateDraft {
        id: RequestId(id),
        sampling: sampling(random.below(3)),
        stop_tokens: (0..random.below(20)).map(|_| random.below(1000) as u32).collect(),
        ignore_eos: random.one_in(4),
        rules: OutputRules {
            grammar: random.one_in(4).then(|| random.pick(GRAMMARS)()),
            min_tokens: if random.one_in(4) { random.below(u64::from(max_tokens) + 1) as u32 } else { 0 },
        },
        report: TokenReport {
            logprobs: random.one_in(4).then(|| random.below(5) as u32),
            prompt_logprobs: random.one_in(8).then(|| random.below(5) as u32),
        },
        ..alike
    };
    if random.one_in(3) {
        let request = draft.clone().try_into().expect("valid");
        let whole = settings.output_under(&request, matcher(&request));
        draft.output = whole.tokens;
        draft.output.truncate(random.below(u64::from(max_tokens)) as usize);
    }
    draft
}

/// Runs the traffic of a seed; returns its events.
fn traffic(seed: u64) -> Vec<(RequestId, TokenEvent)> {
    let mut random = Random(seed);
    let settings = settings(&mut random);
    let speculation = random.pick(&[Speculate::Off, Speculate::Auto, Speculate::Always]);
    let mut bench = Bench::new(settings.clone(), EngineSettings { speculation, ..EngineSettings::default() });
    if random.one_in(2) {
        bench.guess(random.pick(&[0.0, 0.3, 0.65, 1.0]));
    }
    let faults = random.one_in(3);
    let mut known = Vec::new();
    for number in 0..300_u128 {
        match random.below(10) {
            0..3 => match bench.submit(request(number, &mut random, &settings)) {
                Ok(id) => known.push(id),
                Err(GenerateError::ContextExceeded { .. } | GenerateError::Busy { .. }) => {}
                Err(error) => panic!("refused: {error}"),
            },
            3 if !known.is_empty() => {
                let id = random.pick(&known);
                bench.cancel(id);
            }
            4 if faults && random.one_in(4) => {
                let fault = random.pick(&[Fault::Sequence(0), Fault::Sequence(3)]);
                bench.model.inject(random.below(5), fault);
            }
            _ => {
                bench.step();
                bench.engine.check_invariants();
            }
        }
    }
    if random.one_in(4) {
        bench.model.inject(random.below(20), random.pick(&[Fault::Backend, Fault::Lost]));
        while !bench.engine.is_idle() {
            if bench.try_step().is_err() {
                assert!(bench.engine.is_idle());
                assert_eq!(bench.streams.unfinished(), []);
                return bench.events;
            }
        }
        bench.check_end();
    } else {
        bench.run();
        bench.check_end();
    }
    bench.events
}

#[test]
fn every_request_ends_once_with_its_own_text() {
    let mut ends = [0; 4];
    for seed in 0..SEEDS {
        println!("seed {seed}");
        for (_, event) in traffic(seed) {
            if let TokenEvent::Finished(finish) = event {
                let kind = match finish.reason {
                    FinishReason::Stop => 0,
                    FinishReason::Length => 1,
                    FinishReason::Cancelled => 2,
                    FinishReason::Failed(_) => 3,
                };
                ends[kind] += 1;
            }
        }
    }
    assert!(ends.iter().all(|&count| count > 200), "some end hardly ever came up: {ends:?}");
}

#[test]
fn equal_traffic_gives_equal_events() {
    for seed in [1, 2, 3] {
        println!("seed {seed}");
        assert_eq!(traffic(seed), traffic(seed));
    }
}
