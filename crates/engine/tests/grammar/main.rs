//! Grammars: masks against an independent validator of JSON schemas, token by token, over generated and hand-made schemas.

mod chains;
mod generated;
mod hand_made;
mod suite;

use engine::grammar::{Grammars, Matcher};
use serde_json::Value;
use std::sync::{LazyLock, Mutex};
use testkit::FakeSettings;
use types::{GenerateError, Grammar, TokenId};

/// Schemas that are generated, each from its number as seed.
const GENERATED: u64 = 300;
/// Instances of each, and changes of each instance.
const INSTANCES: usize = 6;

static GRAMMARS: LazyLock<Mutex<Grammars>> = LazyLock::new(|| {
    Mutex::new(Grammars::new(&FakeSettings::default().vocabulary()).expect("a vocabulary of texts"))
});

/// A linear congruential generator (Knuth's MMIX constants), its upper bits.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % bound as u64) as usize
    }

    pub(crate) fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

fn compile(grammar: &Grammar) -> Result<Matcher, GenerateError> {
    GRAMMARS.lock().expect("nobody panicked").compile(grammar)
}

fn schema(schema: &Value) -> Matcher {
    compile(&Grammar::JsonSchema(schema.to_string())).unwrap_or_else(|error| panic!("{error}: {schema}"))
}

/// A text cut into tokens of one and two characters, differently each time.
fn tokens(text: &str, random: &mut Random) -> Vec<TokenId> {
    static WORDS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
        let vocabulary = FakeSettings::default().vocabulary();
        (0..vocabulary.size()).map(|token| vocabulary.word(token).to_vec()).collect()
    });
    let (mut rest, mut tokens) = (text.as_bytes(), Vec::new());
    while !rest.is_empty() {
        let pair = WORDS.iter().position(|word| word.len() == 2 && rest.starts_with(word));
        let token = match pair {
            Some(pair) if random.one_in(2) => pair as TokenId,
            _ => TokenId::from(rest[0]) + 1,
        };
        rest = &rest[WORDS[token as usize].len()..];
        tokens.push(token);
    }
    tokens
}

/// Whether a matcher allows a whole text: each token by its mask, and the end after the last one. Says where it does not.
fn allows(mut matcher: Matcher, text: &str, random: &mut Random) -> Result<(), String> {
    let mut before = 0;
    for token in tokens(text, random) {
        if matcher.is_complete() {
            return Err(format!("complete after {before} bytes"));
        }
        let mask = matcher.mask().expect("something may follow");
        if !mask.allows(token) {
            assert!(matcher.consume(token).is_err(), "token {token} is not in the mask, and is taken");
            return Err(format!("token {token} after {before} bytes"));
        }
        matcher.consume(token).expect("the mask allows it");
        before += FakeSettings::default().vocabulary().word(token).len();
    }
    if matcher.may_end() { Ok(()) } else { Err("its end".to_owned()) }
}

/// Every instance that the validator takes is allowed, every other one is refused somewhere; returns how many of each.
fn check(value: &Value, instances: &[Value], random: &mut Random) -> [usize; 2] {
    let validator = jsonschema::options().should_validate_formats(true).build(value);
    let validator = validator.unwrap_or_else(|error| panic!("{error}: {value}"));
    let matcher = schema(value);
    let mut counts = [0; 2];
    for instance in instances {
        let text = instance.to_string();
        let (valid, allowed) = (validator.is_valid(instance), allows(matcher.clone(), &text, random));
        assert_eq!(allowed.is_ok(), valid, "{text} under {value}: {allowed:?}");
        counts[usize::from(!valid)] += 1;
    }
    counts
}

#[test]
fn masks_allow_what_is_valid_and_nothing_else() {
    let mut sums = [0; 2];
    for seed in 0..GENERATED {
        println!("seed {seed}");
        let mut random = Random(seed);
        let schema = generated::schema(&mut random, 3);
        let mut instances = Vec::new();
        for _ in 0..INSTANCES {
            let instance = generated::instance(&schema, &mut random, 6);
            instances.push(generated::changed(&instance, &mut random));
            instances.push(instance);
        }
        let counts = check(&schema, &instances, &mut random);
        assert!(counts[0] > 0, "no instance of {schema} is valid: {instances:?}");
        sums = [sums[0] + counts[0], sums[1] + counts[1]];
    }
    println!("{GENERATED} schemas, {} valid and {} invalid instances", sums[0], sums[1]);
    assert!(sums[0] > 1800 && sums[1] > 900, "{sums:?}");
}

#[test]
fn hand_made_schemas_too() {
    let mut random = Random(1);
    let (mut schemas, mut sums) = (0, [0; 2]);
    for (schema, valid, invalid) in hand_made::cases() {
        let counts = check(&schema, &[valid.clone(), invalid.clone()].concat(), &mut random);
        assert_eq!(counts, [valid.len(), invalid.len()], "{schema}");
        (schemas, sums) = (schemas + 1, [sums[0] + counts[0], sums[1] + counts[1]]);
    }
    println!("{schemas} schemas, {} valid and {} invalid instances", sums[0], sums[1]);
}

#[test]
fn what_cannot_be_kept_to_is_named() {
    let refused = |grammar: Grammar, expected: &str| {
        let error = compile(&grammar).expect_err(expected);
        assert!(matches!(&error, GenerateError::Invalid { param: Some(param), .. } if param == "grammar"));
        let error = error.to_string();
        assert!(error.contains(expected) && error.len() < 600, "{error:?} lacks {expected:?}");
    };
    let schema = |text: &str, expected: &str| refused(Grammar::JsonSchema(text.to_owned()), expected);
    schema("{", "the schema is not JSON");
    schema("[]", "schema must be an object or boolean");
    schema(r#"{"type": "strin"}"#, "strin");
    schema(r#"{"not": {"type": "string"}}"#, "not");
    schema(r#"{"type": "array", "uniqueItems": true}"#, "uniqueItems");
    schema(r#"{"if": {"type": "string"}, "then": {"minLength": 3}}"#, "if");
    schema(r#"{"type": "object", "dependentRequired": {"a": ["b"]}}"#, "dependentRequired");
    schema(r#"{"oneOf": [{"minimum": 3}, {"minimum": 5}]}"#, "oneOf");
    schema(r##"{"$ref": "#/$defs/none"}"##, "none");
    schema(r#"{"$ref": "https://example.com/schema.json"}"#, "example.com");
    schema(r#"{"type": "string", "format": "no-such"}"#, "no-such");
    schema(r#"{"type": "integer", "minimum": 5, "maximum": 3}"#, "minimum");
    refused(Grammar::Regex("[0-9".to_owned()), "grammar: ");
    refused(Grammar::Lark("start: item".to_owned()), "item");
    refused(Grammar::Lark(String::new()), "grammar: ");
}

/// As large as may be sent: each is compiled or refused within seconds, and what is compiled can be begun.
#[test]
fn large_grammars_are_bounded() {
    let check = |name: &str, grammar: Grammar| {
        let began = std::time::Instant::now();
        let begun = compile(&grammar).map(|mut matcher| matcher.mask().map(|mask| mask.count()));
        println!("{name}: {begun:?} in {:?}", began.elapsed());
        assert!(began.elapsed() < std::time::Duration::from_secs(20), "{name}");
        begun.is_ok()
    };
    let json = |value: Value| Grammar::JsonSchema(value.to_string());
    let names: Vec<String> = (0..5000).map(|at| format!("property_number_{at}")).collect();
    let strings: serde_json::Map<_, _> =
        names.iter().map(|name| (name.clone(), serde_json::json!({"type": "string"}))).collect();
    assert!(check("5000 properties", json(serde_json::json!({"type": "object", "properties": strings}))));
    assert!(check("5000 words", json(serde_json::json!({ "enum": names }))));
    check("a long array", json(serde_json::json!({"type": "array", "minItems": 1_000_000_000_u64})));
    check("a long string", json(serde_json::json!({"type": "string", "maxLength": 1_000_000_000_u64})));
    check("a large repetition", Grammar::Regex("(a|b|[0-9]{1,50}){1,5000}x".to_owned()));
    check("nested repetitions", Grammar::Regex("((((a{1,100}){1,100}){1,100}){1,100})".to_owned()));
    check("alternatives", Grammar::Regex(names.join("|")));
    let mut nested = serde_json::json!({"type": "null"});
    for _ in 0..60 {
        nested = serde_json::json!({"type": "array", "items": {"anyOf": [nested, {"type": "string"}]}});
    }
    check("deep", json(nested));
    let all: Vec<Value> = (0..14)
        .map(|at| serde_json::json!({"anyOf": [{"minimum": at}, {"maximum": -at}, {"multipleOf": at + 1}]}))
        .collect();
    check("an intersection of alternatives", json(serde_json::json!({ "allOf": all })));
}

#[test]
fn texts_of_other_grammars() {
    let mut random = Random(7);
    let mut check = |grammar: Grammar, valid: &[&str], invalid: &[&str]| {
        let matcher = compile(&grammar).unwrap_or_else(|error| panic!("{error}"));
        for text in valid {
            assert_eq!(allows(matcher.clone(), text, &mut random), Ok(()), "{text} of {grammar:?}");
        }
        for text in invalid {
            assert!(allows(matcher.clone(), text, &mut random).is_err(), "{text} of {grammar:?}");
        }
    };
    check(
        Grammar::Regex(r"\d{4}-\d{2}(-\d{2})?".to_owned()),
        &["2024-01", "2024-01-31"],
        &["2024", "2024-1", "2024-01-3", "2024-01-311", "x2024-01"],
    );
    check(
        Grammar::Regex("(red|green) light".to_owned()),
        &["red light", "green light"],
        &["blue light", "red"],
    );
    let lark = "start: sum\nsum: term (\"+\" term)*\nterm: NUMBER | \"(\" sum \")\"\nNUMBER: /[0-9]+/";
    check(
        Grammar::Lark(lark.to_owned()),
        &["1", "1+22", "(1+(2+3))+4", "((((7))))"],
        &["", "1+", "(1", "1)", "1++2", "a"],
    );
    check(Grammar::Regex("[^\"]*".to_owned()), &["", "grüße 🌍 ok"], &["a\"b"]);
}

#[test]
fn matchers_are_their_own_and_can_go_back() {
    let mut random = Random(3);
    let mut first = schema(&serde_json::json!({"type": "array", "items": {"type": "integer"}}));
    let other = first.clone();
    let text = tokens("[1,22,333]", &mut random);
    let mut masks = Vec::new();
    for &token in &text {
        masks.push(first.mask().unwrap());
        first.consume(token).unwrap();
    }
    assert!(first.is_complete() && first.may_end() && !other.is_complete());
    assert!(first.consume(text[0]).is_err());
    let mut again = schema(&serde_json::json!({"type": "array", "items": {"type": "integer"}}));
    for back in 1..=text.len() {
        text.iter().for_each(|&token| again.consume(token).unwrap());
        again.rollback(back).unwrap();
        assert_eq!(again.mask().unwrap(), masks[text.len() - back], "{back} tokens back");
        again.rollback(text.len() - back).unwrap();
    }
    assert!(again.rollback(1).is_err(), "there is nothing before the first token");
}
