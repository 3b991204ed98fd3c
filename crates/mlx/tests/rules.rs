//! Answers under grammars, and what is told of tokens, by an engine on SmolLM2-135M-Instruct.
//!
//! `MLX_TEST_MODEL` names the `.gguf` file (`scripts/fetch-test-model` prints where it is); without it these skip.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests, outside #[test] functions")]

use engine::{
    Draft, DraftRow, DraftSource, Engine, EngineSettings, Speculate,
    grammar::{Grammars, Vocabulary},
};
use mlx::{Dequantize, DeviceChoice, LoadSettings};
use serde::Deserialize;
use std::{collections::BTreeMap, path::PathBuf, time::Instant};
use tokenizers::Tokenizer;
use types::{
    CacheScope, DraftOrigin, Finish, FinishReason, GenerateDraft, Grammar, OutputRules, RequestId,
    SamplingDraft, SamplingParams, Service, Speculation, TokenEvent, TokenId, TokenLogprobs, TokenReport,
};

/// How far our log-probabilities may be from mlx-lm's; on the CPU device, since a GPU computes in half precision.
const TOLERANCE: f32 = 1e-3;

#[derive(Deserialize)]
struct Golden {
    prompt: Vec<TokenId>,
    tokens: Vec<TokenId>,
}

/// A token's log-probability and the most probable tokens.
type Told = (f32, Vec<(TokenId, f32)>);

#[derive(Deserialize)]
struct GoldenLogprobs {
    index: usize,
    prompt: Vec<Told>,
    answer: Vec<Told>,
}

fn goldens() -> Vec<Golden> {
    serde_json::from_str(include_str!("../../../tests/goldens/smollm2.json")).unwrap()
}

/// What came of a request.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    prompt: Vec<Option<TokenLogprobs>>,
    tokens: Vec<TokenId>,
    logprobs: Vec<TokenLogprobs>,
    finish: Option<Finish>,
}

struct Bench {
    engine: Engine,
    grammars: Grammars,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    name: String,
}

impl Bench {
    fn new() -> Option<Self> {
        Self::guessing(Speculate::Off)
    }

    fn guessing(speculation: Speculate) -> Option<Self> {
        let Some(path) = std::env::var_os("MLX_TEST_MODEL") else {
            println!("skipped: MLX_TEST_MODEL is not set (scripts/fetch-test-model)");
            return None;
        };
        let settings = LoadSettings {
            model: PathBuf::from(path),
            name: "small".to_owned(),
            slots: 16,
            context_tokens: Some(2048),
            kv_bytes: Some(1 << 30),
            kv_bits: None,
            verify: false,
            dequantize: Dequantize::Auto,
            device: DeviceChoice::Cpu,
        };
        let (model, assets) = mlx::load(&settings, &mut |_, _| ()).unwrap();
        let card = model.card();
        let json = &assets.tokenizer_json;
        let vocabulary = Vocabulary::from_tokenizer_json(json, card.vocab_size, &card.eos_tokens).unwrap();
        Some(Self {
            grammars: Grammars::new(&vocabulary).unwrap(),
            vocabulary,
            tokenizer: Tokenizer::from_bytes(json).unwrap(),
            name: card.name.clone(),
            engine: Engine::new(model, EngineSettings { speculation, ..EngineSettings::default() }),
        })
    }

    fn draft(&self, id: u128, prompt: Vec<TokenId>, max_tokens: u32) -> GenerateDraft {
        GenerateDraft {
            id: RequestId(id),
            model: self.name.clone(),
            prompt,
            sampling: SamplingParams::greedy(),
            max_tokens,
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

    fn run(&mut self, drafts: &[GenerateDraft]) -> Vec<Answer> {
        for draft in drafts {
            let request = draft.clone().try_into().unwrap();
            match &draft.rules.grammar {
                Some(grammar) => {
                    let matcher = self.grammars.compile(grammar).unwrap();
                    self.engine.submit_under(Instant::now(), request, matcher).unwrap();
                }
                None => self.engine.submit(Instant::now(), request).unwrap(),
            }
        }
        let mut answers = BTreeMap::<RequestId, Answer>::new();
        while !self.engine.is_idle() {
            let mut events = Vec::new();
            self.engine.step(Instant::now(), &mut events).unwrap();
            self.engine.observe(Instant::now());
            for (id, event) in events {
                let answer = answers.entry(id).or_default();
                match event {
                    TokenEvent::Prompt { logprobs, .. } => answer.prompt.extend(logprobs),
                    TokenEvent::Tokens { tokens, logprobs, .. } => {
                        answer.tokens.extend(tokens);
                        answer.logprobs.extend(logprobs);
                    }
                    TokenEvent::Started { .. } => {}
                    TokenEvent::Finished(finish) => answer.finish = Some(finish),
                }
            }
        }
        drafts.iter().map(|draft| answers.remove(&draft.id).unwrap()).collect()
    }

    fn text(&self, tokens: &[TokenId]) -> String {
        self.tokenizer.decode(tokens, false).unwrap()
    }
}

/// The same tokens, in the same order but where they are as good as equal, and numbers within the tolerance.
fn assert_close(got: &TokenLogprobs, expected: &Told, what: &str) {
    let near = |one: f32, two: f32| (one - two).abs() < TOLERANCE;
    assert!(near(got.logprob, expected.0), "{what}: {got:?} instead of {expected:?}");
    assert_eq!(got.top.len(), expected.1.len(), "{what}");
    for (rank, (got, expected)) in got.top.iter().zip(&expected.1).enumerate() {
        assert!(near(got.1, expected.1), "{what}, rank {rank}: {got:?} instead of {expected:?}");
    }
    let named = |(token, logprob): &(TokenId, f32)| {
        let last = expected.1.last().map_or(0.0, |last| last.1);
        near(*logprob, last) || expected.1.iter().any(|(expected, _)| expected == token)
    };
    assert!(got.top.iter().all(named), "{what}: {got:?} instead of {expected:?}");
}

#[test]
fn log_probabilities_are_mlx_lms() {
    let Some(mut bench) = Bench::new() else { return };
    let goldens = goldens();
    let expected: Vec<GoldenLogprobs> =
        serde_json::from_str(include_str!("../../../tests/goldens/smollm2-logprobs.json")).unwrap();
    let report = TokenReport { logprobs: Some(5), prompt_logprobs: Some(5) };
    let draft = |golden: &GoldenLogprobs, penalties: bool| {
        let sampling = SamplingDraft {
            // They change what is drawn, not what is told.
            temperature: 0.0,
            logit_bias: if penalties { vec![(goldens[golden.index].tokens[0], 5.0)] } else { Vec::new() },
            ..SamplingDraft::default()
        };
        let id = golden.index as u128 + if penalties { 100 } else { 0 };
        let draft = bench.draft(id, goldens[golden.index].prompt.clone(), golden.answer.len() as u32);
        GenerateDraft { report, ignore_eos: true, sampling: sampling.try_into().unwrap(), ..draft }
    };
    let drafts: Vec<_> = expected.iter().map(|golden| draft(golden, false)).collect();
    let biased: Vec<_> = expected.iter().map(|golden| draft(golden, true)).collect();
    let (answers, biased) = (bench.run(&drafts), bench.run(&biased));
    let mut compared = 0;
    for (golden, (answer, biased)) in expected.iter().zip(answers.iter().zip(&biased)) {
        let what = |at: usize, of: &str| format!("prompt {}, {of} {at}", golden.index);
        assert_eq!(answer.prompt[0], None);
        assert_eq!(answer.prompt.len(), golden.prompt.len() + 1);
        for (at, (got, expected)) in answer.prompt[1..].iter().zip(&golden.prompt).enumerate() {
            assert_close(got.as_ref().unwrap(), expected, &what(at + 1, "token of the prompt"));
        }
        for (at, (got, expected)) in answer.logprobs.iter().zip(&golden.answer).enumerate() {
            if answer.tokens[at] != goldens[golden.index].tokens[at] {
                // A tie that went the other way: what follows is another text.
                break;
            }
            assert_close(got, expected, &what(at, "token"));
            compared += 1;
        }
        assert_eq!(biased.tokens[0], goldens[golden.index].tokens[0]);
        assert_close(&biased.logprobs[0], &golden.answer[0], &what(0, "biased token"));
    }
    println!("{compared} tokens of answers compared");
    assert!(compared > expected.len() * 12, "only {compared}");
}

/// Sixteen rows of every kind.
fn mixed_drafts(bench: &Bench) -> Vec<GenerateDraft> {
    let json = |text: &str| Some(Grammar::JsonSchema(text.to_owned()));
    let regex = |text: &str| Some(Grammar::Regex(text.to_owned()));
    let grammars = [
        json(
            r#"{"type": "object", "properties": {"capital": {"type": "string", "maxLength": 20}}, "required": ["capital"], "additionalProperties": false}"#,
        ),
        json(
            r#"{"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4}"#,
        ),
        json(
            r#"{"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9999}, "b": {"type": "boolean"}}, "required": ["a", "b"], "additionalProperties": false}"#,
        ),
        json(r#"{"anyOf": [{"type": "integer", "minimum": 10, "maximum": 99}, {"type": "null"}]}"#),
        json(
            r##"{"$defs": {"t": {"type": "object", "properties": {"l": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}}, "required": ["l"], "additionalProperties": false}}, "$ref": "#/$defs/t"}"##,
        ),
        json(r#"{"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}"#),
        json(r#"{"type": "string", "format": "date"}"#),
        json(r#"{"const": {"fixed": [1, 2, {"x": null}]}}"#),
        regex("(yes|no), (because|since) [a-z ]{5,30}\\."),
        regex("[0-9]{3}-[0-9]{4}"),
        Some(Grammar::Lark("start: \"(\" start \")\" | NUMBER\nNUMBER: /[0-9]{1,3}/".to_owned())),
        json(r#"{"type": "object"}"#),
        None,
        None,
        json(r#"{"type": "array", "items": {"type": "number"}, "maxItems": 5}"#),
        None,
    ];
    let goldens = goldens();
    grammars
        .iter()
        .zip(&goldens)
        .enumerate()
        .map(|(at, (grammar, golden))| {
            let sampling = SamplingDraft {
                temperature: [0.0, 0.8, 1.1][at % 3],
                top_p: if at % 4 == 1 { 0.9 } else { 1.0 },
                top_k: if at % 5 == 2 { 40 } else { 0 },
                frequency_penalty: if at % 6 == 3 { 0.4 } else { 0.0 },
                repetition_penalty: if at % 7 == 4 { 1.1 } else { 1.0 },
                seed: at as u64,
                ..SamplingDraft::default()
            };
            GenerateDraft {
                sampling: sampling.try_into().unwrap(),
                rules: OutputRules { grammar: grammar.clone(), min_tokens: if at >= 13 { 40 } else { 0 } },
                report: TokenReport {
                    logprobs: (at % 2 == 0).then_some(at as u32 % 4),
                    prompt_logprobs: (at % 8 == 6).then_some(1),
                },
                ..bench.draft(at as u128, golden.prompt.clone(), 100)
            }
        })
        .collect()
}

/// In one batch and alone: the same tokens and log-probabilities, and every JSON that was finished is valid.
#[test]
fn rows_under_grammars_are_what_they_are_alone() {
    let Some(mut bench) = Bench::new() else { return };
    let drafts = mixed_drafts(&bench);
    let together = bench.run(&drafts);
    let (mut finished, mut same) = (0, 0);
    for (at, (draft, answer)) in drafts.iter().zip(&together).enumerate() {
        let text = bench.text(&answer.tokens);
        let reason = &answer.finish.as_ref().unwrap().reason;
        println!("{at}: {reason:?} {text:?}");
        let alone = bench.run(&[GenerateDraft { id: RequestId(100 + at as u128), ..draft.clone() }]);
        let alone = alone.into_iter().next().unwrap();
        assert_eq!(
            alone.tokens,
            answer.tokens,
            "row {at} is another one alone: {:?}",
            bench.text(&alone.tokens)
        );
        assert_eq!(alone.logprobs.len(), answer.logprobs.len());
        for (alone, answer) in alone.logprobs.iter().zip(&answer.logprobs) {
            assert_close(answer, &(alone.logprob, alone.top.clone()), &format!("row {at}"));
        }
        assert_eq!(alone.prompt.len(), answer.prompt.len());
        same += 1;
        if draft.rules.min_tokens > 0 && draft.rules.grammar.is_none() {
            assert!(answer.tokens.len() >= 40, "row {at} has {} tokens", answer.tokens.len());
        }
        let Some(grammar) = &draft.rules.grammar else { continue };
        if *reason != FinishReason::Stop {
            continue;
        }
        finished += 1;
        if let Grammar::JsonSchema(schema) = grammar {
            let schema = serde_json::from_str(schema).unwrap();
            let value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
            assert!(jsonschema::is_valid(&schema, &value), "{text} under {schema}");
        }
    }
    println!("{same} rows as alone, {finished} finished");
    assert!(finished >= 10, "only {finished} finished");
}

/// Prompts that end at each byte of some tokens, within characters too: the answer is a text of its grammar from its first byte
/// on, and the prompt's tokens stay what they are.
#[test]
fn prompts_may_end_inside_a_token() {
    let Some(mut bench) = Bench::new() else { return };
    let text = "The opposite of possible is impossible; in German: unmöglich 🌍";
    let byte_token = |byte: u8| {
        let tokens = 0..bench.vocabulary.size();
        tokens.into_iter().find(|&token| bench.vocabulary.word(token) == [byte]).unwrap()
    };
    let encode = |text: &str| bench.tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    // Up to the last whole character as it is read, the rest byte by byte.
    let prompt_of = |bytes: &[u8]| {
        let whole = std::str::from_utf8(bytes).map_or_else(|error| error.valid_up_to(), str::len);
        let mut tokens = encode(std::str::from_utf8(&bytes[..whole]).unwrap());
        tokens.extend(bytes[whole..].iter().map(|&byte| byte_token(byte)));
        tokens
    };
    // Without places for spaces, which a small model never comes to an end of.
    let schema = r#"{"type": "string", "maxLength": 8}"#;
    let last = text.find("impossible").unwrap();
    let (mut drafts, mut rests, mut within) = (Vec::new(), Vec::new(), 0);
    for cut in last..text.len() {
        let prompt = prompt_of(&text.as_bytes()[..cut]);
        let whole = encode(text);
        // Whether its last token is none of the whole text's.
        within += usize::from(!whole.starts_with(&prompt));
        // What the text goes on with is one of the choices, where that is text.
        let rest = text.get(cut..).map_or_else(|| "lich".to_owned(), str::to_owned);
        let choices = Grammar::Lark(format!("start: {} | \"no\"", serde_json::to_string(&rest).unwrap()));
        let regex = Grammar::Regex("[a-z ]{3,8}!".to_owned());
        for grammar in [choices, regex, Grammar::JsonSchema(schema.to_owned())] {
            let draft = bench.draft(drafts.len() as u128, prompt.clone(), 60);
            let rules = OutputRules { grammar: Some(grammar), ..OutputRules::default() };
            drafts.push(GenerateDraft { rules, ..draft });
            rests.push(rest.clone());
        }
    }
    assert!(within > 10, "only {within} prompts end inside a token");
    let schema = serde_json::from_str(schema).unwrap();
    let mut went_on = 0;
    for (drafts, rests) in drafts.chunks(15).zip(rests.chunks(15)) {
        for ((draft, answer), rest) in drafts.iter().zip(bench.run(drafts)).zip(rests) {
            let bytes: Vec<u8> =
                answer.tokens.iter().flat_map(|&token| bench.vocabulary.word(token)).copied().collect();
            let said = String::from_utf8(bytes).expect("a text from its first byte on");
            let finish = answer.finish.unwrap();
            let what = format!("{said:?} after {:?}", bench.text(&draft.prompt));
            assert_eq!(finish.reason, FinishReason::Stop, "{what}");
            assert_eq!(finish.usage.prompt_tokens as usize, draft.prompt.len(), "{what}");
            match draft.rules.grammar.as_ref().unwrap() {
                Grammar::Lark(_) => {
                    assert!(said == *rest || said == "no", "{what}");
                    went_on += usize::from(said == *rest);
                }
                Grammar::Regex(_) => {
                    let words = said.strip_suffix('!').unwrap_or_else(|| panic!("{what}"));
                    assert!((3..=8).contains(&words.len()), "{what}");
                    assert!(words.bytes().all(|byte| byte == b' ' || byte.is_ascii_lowercase()), "{what}");
                }
                Grammar::JsonSchema(_) => {
                    let value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{what}: {error}"));
                    assert!(jsonschema::is_valid(&schema, &value), "{what}");
                }
            }
        }
    }
    println!(
        "{} answers, {within} prompts that end inside a token, {went_on} went on with the text",
        drafts.len()
    );
    assert!(went_on > 0, "the choice is the model's");
}

/// Knows texts, and guesses each of their tokens rightly at a rate.
#[derive(Debug)]
struct Guesser {
    texts: Vec<(Vec<TokenId>, Vec<TokenId>)>,
    rate: f64,
}

impl DraftSource for Guesser {
    fn origin(&self) -> DraftOrigin {
        DraftOrigin::Model
    }

    fn propose(&mut self, rows: &[DraftRow<'_>]) -> Vec<Draft> {
        let propose = |row: &DraftRow<'_>| {
            let prompt = &row.text[..row.prompt_tokens];
            let of_row =
                |text: &&(Vec<TokenId>, Vec<TokenId>)| text.0 == prompt && text.1.starts_with(row.output());
            let Some((_, text)) = self.texts.iter().find(of_row) else { return Draft::default() };
            let guess = |(at, &token): (usize, &TokenId)| {
                let hash = (at as u64 ^ row.sequence.0 << 20).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
                if (hash % 1000) as f64 / 1000.0 < self.rate { token } else { token / 2 + 100 }
            };
            // From one to seven, in turn.
            let most = row.most.min(1 + row.text.len() % 7);
            Draft {
                tokens: text.iter().enumerate().skip(row.output().len()).take(most).map(guess).collect(),
                matched: 1,
            }
        };
        rows.iter().map(propose).collect()
    }
}

/// Whatever is guessed and however much of it comes true: tokens, log-probabilities and ends are those without.
#[test]
fn guesses_change_nothing() {
    let Some(mut plain) = Bench::new() else { return };
    let drafts = mixed_drafts(&plain);
    let expected = plain.run(&drafts);
    for rate in [0.0, 0.3, 0.65, 1.0] {
        for rows in [16, 5, 1] {
            let Some(mut bench) = Bench::guessing(Speculate::Always) else { return };
            let known = drafts
                .iter()
                .zip(&expected)
                .map(|(draft, answer)| (draft.prompt.clone(), answer.tokens.clone()));
            bench.engine.guess_with(Box::new(Guesser { texts: known.collect(), rate }));
            let (mut accepted, mut rejected, mut compared) = (0, 0, 0);
            for (drafts, expected) in drafts.chunks(rows).zip(expected.chunks(rows)).take(6) {
                for ((draft, expected), got) in drafts.iter().zip(expected).zip(bench.run(drafts)) {
                    let what = format!("rate {rate}, {rows} rows, {}", draft.id);
                    assert_eq!(bench.text(&got.tokens), bench.text(&expected.tokens), "{what}");
                    assert_eq!(got.logprobs.len(), expected.logprobs.len(), "{what}");
                    for (got, expected) in got.logprobs.iter().zip(&expected.logprobs) {
                        assert_close(got, &(expected.logprob, expected.top.clone()), &what);
                    }
                    let (got, expected) = (got.finish.unwrap(), expected.finish.as_ref().unwrap());
                    assert_eq!(got.reason, expected.reason, "{what}");
                    assert_eq!(got.usage.completion_tokens, expected.usage.completion_tokens, "{what}");
                    accepted += got.usage.accepted_drafts;
                    rejected += got.usage.rejected_drafts;
                    compared += got.usage.completion_tokens;
                }
            }
            println!("rate {rate}, {rows} rows: {compared} tokens, {accepted} guesses true, {rejected} not");
            assert!(rate < 0.5 || accepted > compared / 4, "{accepted} of {compared}");
            assert!(rate == 1.0 || rejected > 0, "none was wrong");
        }
    }
}
