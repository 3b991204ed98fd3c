//! A model on several ranks, real processes over the ring, gives the answers of one process: this test starts itself, a
//! process for each rank, and the head's runs an engine.
//!
//! `MLX_TEST_MODEL` names the `.gguf` file (`scripts/fetch-test-model` prints where it is); without it these skip.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests, outside #[test] functions")]

use engine::{
    Engine, EngineSettings, Model,
    grammar::{Grammars, Vocabulary},
};
use mlx::{
    Dequantize, DeviceChoice, LoadSettings,
    distributed::{Backend, Group, RingPlace},
    pipeline,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    net::{SocketAddr, SocketAddrV4, TcpListener},
    ops::Range,
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
    time::Instant,
};
use types::{
    CacheScope, GenerateDraft, Grammar, ModelAssets, OutputRules, RequestId, SamplingDraft, SamplingParams,
    Service, Speculation, TokenEvent, TokenId, TokenReport,
};

/// Layers of each rank, by which a process knows that it is one.
const RANGES: &str = "MLX_TEST_RANGES";
/// Layers of the model.
const LAYERS: usize = 30;
/// Below this gap between the two largest logits either may be taken: sums in another order differ that much.
const TIE: f32 = 1e-3;
/// Tokens of an answer.
const NEW: u32 = 24;

#[derive(Deserialize)]
struct Golden {
    prompt: Vec<TokenId>,
    tokens: Vec<TokenId>,
    gaps: Vec<f32>,
}

fn goldens() -> Vec<Golden> {
    serde_json::from_str(include_str!("../../../tests/goldens/smollm2.json")).unwrap()
}

/// What came of a request.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Answer {
    tokens: Vec<TokenId>,
    /// Of the tokens, where asked for.
    logprobs: Vec<f32>,
    /// Of the prompt's tokens, where asked for.
    prompt_logprobs: Vec<f32>,
    cached: u32,
}

fn settings() -> Option<LoadSettings> {
    let Some(path) = std::env::var_os("MLX_TEST_MODEL") else {
        println!("skipped: MLX_TEST_MODEL is not set (scripts/fetch-test-model)");
        return None;
    };
    Some(LoadSettings {
        model: PathBuf::from(path),
        name: "small".to_owned(),
        slots: 16,
        context_tokens: Some(1024),
        kv_bytes: Some(256 << 20),
        dequantize: Dequantize::Auto,
        device: DeviceChoice::Cpu,
        kv_bits: None,
        verify: false,
    })
}

fn draft(id: u128, prompt: Vec<TokenId>) -> GenerateDraft {
    GenerateDraft {
        id: RequestId(id),
        model: "small".to_owned(),
        prompt,
        sampling: SamplingParams::greedy(),
        max_tokens: NEW,
        stop_tokens: Vec::new(),
        ignore_eos: false,
        service: Service::default(),
        cache: CacheScope::default(),
        output: Vec::new(),
        rules: OutputRules::default(),
        report: TokenReport::default(),
        speculation: Speculation::default(),
    }
}

/// Every kind of row: the goldens' prompts, then one that is drawn with penalties, one under a grammar, one whose
/// log-probabilities are told, one with its prompt's.
fn drafts(round: u128) -> Vec<GenerateDraft> {
    let goldens = goldens();
    let long: Vec<TokenId> = goldens.iter().flat_map(|golden| golden.prompt.clone()).take(300).collect();
    let mut drafts: Vec<_> = goldens
        .iter()
        .enumerate()
        .map(|(index, golden)| draft(round * 100 + index as u128, golden.prompt.clone()))
        .collect();
    let mut id = round * 100 + 50;
    let mut more = |change: &dyn Fn(&mut GenerateDraft)| {
        id += 1;
        let mut draft = draft(id, long.clone());
        change(&mut draft);
        drafts.push(draft);
    };
    more(&|draft| {
        let sampling = SamplingDraft {
            seed: 7,
            temperature: 0.8,
            top_p: 0.9,
            repetition_penalty: 1.2,
            ..SamplingDraft::default()
        };
        draft.sampling = sampling.try_into().unwrap();
    });
    more(&|draft| draft.rules.grammar = Some(Grammar::Regex("[a-f]{3}( [0-9]{2}){4}".to_owned())));
    more(&|draft| draft.report.logprobs = Some(3));
    more(&|draft| draft.report.prompt_logprobs = Some(0));
    drafts
}

/// The answers of an engine to all of these at once, and then again, with what it has cached.
fn answers(model: Box<dyn Model>, assets: &ModelAssets) -> Vec<Answer> {
    let card = model.card();
    let vocabulary =
        Vocabulary::from_tokenizer_json(&assets.tokenizer_json, card.vocab_size, &card.eos_tokens).unwrap();
    let mut grammars = Grammars::new(&vocabulary).unwrap();
    let mut engine = Engine::new(model, EngineSettings::default());
    let mut all = Vec::new();
    for round in 1..=2 {
        for draft in drafts(round) {
            let request = draft.clone().try_into().unwrap();
            match &draft.rules.grammar {
                Some(grammar) => {
                    engine.submit_under(Instant::now(), request, grammars.compile(grammar).unwrap()).unwrap();
                }
                None => engine.submit(Instant::now(), request).unwrap(),
            }
        }
        let mut answers = BTreeMap::<RequestId, Answer>::new();
        while !engine.is_idle() {
            let mut events = Vec::new();
            engine.step(Instant::now(), &mut events).unwrap();
            engine.observe(Instant::now());
            for (id, event) in events {
                let answer = answers.entry(id).or_default();
                match event {
                    TokenEvent::Started { .. } => {}
                    TokenEvent::Prompt { logprobs, .. } => {
                        answer.prompt_logprobs.extend(logprobs.iter().flatten().map(|told| told.logprob));
                    }
                    TokenEvent::Tokens { tokens, logprobs, .. } => {
                        answer.tokens.extend(tokens);
                        answer.logprobs.extend(logprobs.iter().map(|told| told.logprob));
                    }
                    TokenEvent::Finished(finish) => answer.cached = finish.usage.cached_tokens,
                }
            }
            engine.check_invariants();
        }
        all.extend(answers.into_values());
    }
    all
}

fn ranges_of(text: &str) -> Vec<Range<usize>> {
    let ends: Vec<usize> = text.split(',').map(|end| end.parse().unwrap()).collect();
    ends.iter().scan(0, |from, &end| Some(std::mem::replace(from, end)..end)).collect()
}

/// Not a test by itself: one rank's process.
#[test]
#[ignore = "one rank's process: `cargo test -p mlx --test pipeline` starts it for each rank"]
fn rank() {
    let (Ok(ranges), Some(mut settings)) = (std::env::var(RANGES), settings()) else { return };
    let ranges = ranges_of(&ranges);
    let said = if ranges.len() == 1 {
        let (model, assets) = mlx::load(&settings, &mut |_, _| ()).unwrap();
        format!("answers: {}", serde_json::to_string(&answers(model, &assets)).unwrap())
    } else {
        let group = Group::join(Backend::Ring).unwrap();
        if group.rank() > 0 {
            // The head decides of it.
            settings.name = "other".to_owned();
            match pipeline::run_stage(&settings, group, &ranges, Some(4000), &mut |_| ()) {
                Ok(()) => "over".to_owned(),
                Err(error) => format!("error: {error}"),
            }
        } else {
            match pipeline::load_head(&settings, group, &ranges, Some(4000), &mut |_, _| ()) {
                Ok((head, assets)) => {
                    format!("answers: {}", serde_json::to_string(&answers(Box::new(head), &assets)).unwrap())
                }
                Err(error) => format!("error: {error}"),
            }
        }
    };
    println!("\nsaid {said}");
}

struct Member {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Member {
    fn start(place: &RingPlace, ranges: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["rank", "--exact", "--ignored", "--nocapture", "--test-threads=1"]).env(RANGES, ranges);
        place.apply(&mut command);
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
        let mut child = spawned.unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    /// What it says in the end.
    fn said(&mut self) -> String {
        loop {
            let mut line = String::new();
            let bytes = self.output.read_line(&mut line).unwrap();
            assert!(bytes > 0, "a rank ended without a word");
            if let Some(said) = line.strip_prefix("said ") {
                return said.trim_end().to_owned();
            }
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ranks of one group on this machine, each with its ranges as a list of ends.
fn start(folder: &tempfile::TempDir, ranges: &[&str]) -> Vec<Member> {
    let listeners: Vec<_> = ranges.iter().map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<SocketAddrV4> = listeners
        .iter()
        .map(|listener| match listener.local_addr().unwrap() {
            SocketAddr::V4(address) => address,
            SocketAddr::V6(address) => panic!("{address}"),
        })
        .collect();
    drop(listeners);
    let hostfile = folder.path().join("hosts.json");
    std::fs::write(&hostfile, RingPlace::hostfile(&addresses)).unwrap();
    let member = |(rank, ranges): (usize, &&str)| {
        Member::start(&RingPlace { rank, hostfile: hostfile.clone() }, ranges)
    };
    ranges.iter().enumerate().map(member).collect()
}

fn answers_of(ends: &str) -> Vec<Answer> {
    let folder = tempfile::tempdir().unwrap();
    let count = ends.split(',').count();
    let mut members = start(&folder, &vec![ends; count]);
    let said = members[0].said();
    let answers = said.strip_prefix("answers: ").unwrap_or_else(|| panic!("{ends}: {said}"));
    for member in &mut members[1..] {
        assert_eq!(member.said(), "over", "{ends}");
    }
    serde_json::from_str(answers).unwrap()
}

/// The first token that differs, if it is no tie.
fn check_text(what: &str, golden: &Golden, tokens: &[TokenId]) {
    let differs = tokens.iter().zip(&golden.tokens).position(|(ours, theirs)| ours != theirs);
    if let Some(at) = differs {
        assert!(
            golden.gaps[at] < TIE,
            "{what}: token {at} is {} instead of {}",
            tokens[at],
            golden.tokens[at]
        );
    }
}

#[test]
fn stages_give_the_answers_of_one_process() {
    if settings().is_none() {
        return;
    }
    let goldens = goldens();
    let alone = answers_of(&LAYERS.to_string());
    for ends in ["15,30", "7,30", "29,30", "10,20,30", "3,18,25,30"] {
        println!("layers up to {ends}");
        let staged = answers_of(ends);
        assert_eq!(staged.len(), alone.len(), "{ends}");
        let each = alone.len() / 2;
        for (index, (staged, alone)) in staged.iter().zip(&alone).enumerate() {
            let what = format!("layers up to {ends}, answer {index}");
            match goldens.get(index % each) {
                Some(golden) => check_text(&what, golden, &staged.tokens),
                None => assert_eq!(staged.tokens, alone.tokens, "{what}"),
            }
            let same = |ours: &[f32], theirs: &[f32]| {
                assert_eq!(ours.len(), theirs.len(), "{what}");
                let apart = ours.iter().zip(theirs).map(|(ours, theirs)| (ours - theirs).abs());
                assert!(apart.fold(0.0, f32::max) < TIE, "{what}: {ours:?} and {theirs:?}");
            };
            same(&staged.logprobs, &alone.logprobs);
            same(&staged.prompt_logprobs, &alone.prompt_logprobs);
            assert_eq!(staged.cached, alone.cached, "{what}");
        }
        assert!(staged[each..].iter().any(|answer| answer.cached > 0), "{ends}: nothing was cached");
        assert!(staged.iter().any(|answer| !answer.logprobs.is_empty()));
        assert!(staged.iter().any(|answer| !answer.prompt_logprobs.is_empty()));
    }
}

#[test]
fn ranks_that_do_not_agree_say_so() {
    if settings().is_none() {
        return;
    }
    let check = |what: &str, ranges: &[&str], expected: &str| {
        let folder = tempfile::tempdir().unwrap();
        for (rank, mut member) in start(&folder, ranges).into_iter().enumerate() {
            let said = member.said();
            assert!(said.starts_with("error: ") && said.contains(expected), "{what}, rank {rank}: {said}");
        }
    };
    check("other ranges", &["15,30", "14,30"], "has layers");
    check("layers left out", &["15,29", "15,29"], "are no partition of 30");
    check("a stage without layers", &["30,30", "30,30"], "are no partition of 30");
}

#[test]
fn a_member_measures_what_a_placement_needs() {
    let Some(settings) = settings() else { return };
    let mut told = Vec::new();
    let begin = Instant::now();
    let profile = pipeline::measure(&settings, 16, &mut |what, _| told.push(what.to_owned())).unwrap();
    let took = begin.elapsed();
    println!("{took:?}: {profile:?}");
    assert!(took.as_secs() < 20, "{took:?}");
    assert!(told.iter().any(|what| what == "weights"));
    assert_eq!(profile.layer_bytes.len(), LAYERS);
    let first = profile.layer_bytes[0];
    assert!(profile.layer_bytes.iter().all(|&bytes| bytes == first), "{profile:?}");
    // 576 wide, 9 heads and 3 of keys of 64, 1536 within; expanded to f32 on a CPU.
    let layer = 4 * (576 * (576 + 2 * 192 + 576 + 3 * 1536) + 2 * 576);
    assert_eq!(first, layer);
    assert_eq!(profile.embedding_bytes, 4 * 49152 * 576);
    assert_eq!(profile.head_bytes, profile.embedding_bytes + 4 * 576, "the embedding is the head");
    assert_eq!((profile.hidden_bytes, profile.kv_bytes_per_token), (4 * 576, 2 * 4 * 3 * 64));
    let rows: Vec<u32> = profile.layer_s.iter().map(|entry| entry.0).collect();
    assert!(rows.starts_with(&[1, 2]) && rows.iter().all(|&rows| rows <= 16), "{rows:?}");
    assert_eq!(profile.head_s.len(), rows.len());
    assert!(profile.layer_s.iter().all(|entry| entry.1 > 0.0));
    assert!(profile.memory_bytes > profile.layer_bytes.iter().sum::<u64>() + profile.head_bytes);
}
