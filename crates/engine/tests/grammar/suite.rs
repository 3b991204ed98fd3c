//! The JSON Schema Test Suite's cases, token by token: `tests/goldens/json_schema_suite.json`, which says where it is from.
//!
//! A schema allows the keys of an object in any order and a number in any spelling, a grammar one order and one spelling: an
//! instance is allowed where one way to write it is, and refused where all are.

use crate::{Random, allows, compile};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use types::Grammar;

#[derive(Deserialize)]
struct Suite {
    /// What `$schema` is in each.
    drafts: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    drafts: Vec<String>,
    schema: Value,
    /// Instances as texts, and whether they are valid.
    tests: Vec<(String, bool)>,
}

/// Ways to write one instance that are tried at most: those of six keys.
const WAYS_MAX: usize = 720;

/// Ways to write an instance: as it stands, with keys in other orders, whole numbers without a fraction.
fn ways(text: &str) -> Vec<String> {
    let value: Value = serde_json::from_str(text).expect("an instance");
    let mut ways = vec![text.to_owned()];
    ways.extend(orders(&whole(value)).into_iter().map(|value| value.to_string()));
    ways.sort();
    ways.dedup();
    ways
}

/// With whole numbers as integers.
fn whole(value: Value) -> Value {
    match value {
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() < 1e15 => {
                Value::from(float as i64)
            }
            _ => Value::Number(number),
        },
        Value::Array(items) => items.into_iter().map(whole).collect(),
        Value::Object(entries) => {
            Value::Object(entries.into_iter().map(|(key, value)| (key, whole(value))).collect())
        }
        other => other,
    }
}

fn orders(value: &Value) -> Vec<Value> {
    match value {
        Value::Array(items) => {
            let mut lists = vec![Vec::new()];
            for item in items {
                lists = product(&lists, &orders(item), |list, item| {
                    let mut list = list.clone();
                    list.push(item.clone());
                    list
                });
            }
            lists.into_iter().map(Value::Array).collect()
        }
        Value::Object(entries) => {
            let mut found = Vec::new();
            for key in entries.keys() {
                let mut rest = entries.clone();
                let first = rest.shift_remove(key).expect("a key of it");
                found.extend(product(&orders(&first), &orders(&Value::Object(rest)), |first, rest| {
                    let mut object = Map::from_iter([(key.clone(), first.clone())]);
                    object.extend(rest.as_object().expect("an object").clone());
                    Value::Object(object)
                }));
            }
            if entries.is_empty() {
                found.push(value.clone());
            }
            found.truncate(WAYS_MAX);
            found
        }
        other => vec![other.clone()],
    }
}

fn product<A, B, C>(firsts: &[A], seconds: &[B], make: impl Fn(&A, &B) -> C) -> Vec<C> {
    let pairs = firsts.iter().flat_map(|first| seconds.iter().map(move |second| (first, second)));
    pairs.take(WAYS_MAX).map(|(first, second)| make(first, second)).collect()
}

/// Where a grammar is another set of texts than the suite says, by the beginning of a case's name and the instance (all of them
/// where it is empty), and whether the grammar allows it.
const DEVIATIONS: &[(&str, &str, bool)] = &[
    // A format that is known is kept to, also where a draft takes it for a remark.
    ("format: ", "", false),
    // What is in a string is never looked at, also where a draft would.
    ("optional/content: ", "", true),
    // Numbers have one spelling, and no whole number an exponent.
    ("const: float and integers", "9007199254740992.0", false),
    ("optional/float-overflow: ", "1e+308", false),
    ("optional/zeroTerminatedFloats: ", "1.0", true),
    // The byte order mark is no space in Rust's regular expressions.
    ("optional/ecmascript-regex: ECMA 262 \\S", "\"\u{feff}\"", true),
    ("optional/ecmascript-regex: ECMA 262 \\s", "\"\u{feff}\"", false),
    // Formats are regular expressions: no calendar, no leap seconds, not every way to write an address.
    ("optional/format/date: ", "\"2021-02-29\"", true),
    ("optional/format/date-time: ", "\"1998-12-31T22:59:60Z\"", true),
    ("optional/format/date-time: ", "\"1998-12-31T23:58:60Z\"", true),
    ("optional/format/time: ", "\"22:59:60+00:00\"", true),
    ("optional/format/time: ", "\"22:59:60Z\"", true),
    ("optional/format/time: ", "\"23:58:60+00:00\"", true),
    ("optional/format/time: ", "\"23:58:60Z\"", true),
    ("optional/format/time: ", "\"23:59:60+00:30\"", true),
    ("optional/format/time: ", "\"23:59:60+01:00\"", true),
    ("optional/format/time: ", "\"23:59:60-00:30\"", true),
    ("optional/format/time: ", "\"23:59:60-01:00\"", true),
    ("optional/format/email: ", "\"\\\"joe bloggs\\\"@example.com\"", false),
    ("optional/format/email: ", "\"\\\"joe..bloggs\\\"@example.com\"", false),
    ("optional/format/email: ", "\"\\\"joe@bloggs\\\"@example.com\"", false),
    ("optional/format/email: ", "\"joe.bloggs@[IPv6:::1]\"", false),
    ("optional/format/ipv6: ", "\"1000:1000:1000:1000:1000:1000:255.255.255.255\"", false),
    ("optional/format/ipv6: ", "\"1:2::192.168.0.1\"", false),
    ("optional/format/ipv6: ", "\"1::d6:192.168.0.1\"", false),
    ("optional/format/ipv6: ", "\"::ffff:192.168.0.1\"", false),
    // What stands beside a reference holds, also in drafts before 2019-09.
    ("ref: ref overrides any sibling keywords", "", false),
];

/// Whether a refusal names a keyword of the schema, a format, a reference or a pattern in it, or the schema `false`.
fn is_named(schema: &Value, error: &str) -> bool {
    /// Too common to tell anything.
    const WORDS: [&str; 4] = ["$schema", "type", "properties", "schema"];
    let names = |word: &str| {
        // Of a reference, what it is looked for in.
        let word = word.split_once('#').map_or(word, |(resource, _)| resource);
        word.len() > 1 && !WORDS.contains(&word) && error.contains(word)
    };
    match schema {
        Value::Bool(allows) => !allows && error.contains("schema is false"),
        Value::String(text) => names(text),
        Value::Array(items) => items.iter().any(|item| is_named(item, error)),
        Value::Object(entries) => entries.iter().any(|(key, value)| names(key) || is_named(value, error)),
        Value::Null | Value::Number(_) => false,
    }
}

/// Compares one schema of one draft; counts what is allowed, refused, and schemas that are not supported.
fn check(name: &str, schema: &Value, tests: &[(String, bool)], used: &mut [usize], sums: &mut [usize; 3]) {
    let mut random = Random(11);
    let matcher = match compile(&Grammar::JsonSchema(schema.to_string())) {
        Ok(matcher) => matcher,
        Err(error) => {
            let error = error.to_string();
            // The last are of a schema that this one refers to: a draft's own.
            let named = is_named(schema, &error)
                || ["Unimplemented keys: [\"", "Unknown format: "].iter().any(|what| error.contains(what));
            assert!(named, "{name}: {error:?} names nothing of {schema}");
            sums[2] += 1;
            return;
        }
    };
    for (text, valid) in tests {
        let allowed = ways(text).iter().any(|way| allows(matcher.clone(), way, &mut random).is_ok());
        let known = DEVIATIONS.iter().position(|(of, instance, is_allowed)| {
            name.starts_with(of) && (instance.is_empty() || instance == text) && *is_allowed == allowed
        });
        match known {
            Some(at) if allowed != *valid => used[at] += 1,
            _ => {
                assert_eq!(allowed, *valid, "{name}: {text} under {schema}");
                sums[usize::from(!valid)] += 1;
            }
        }
    }
}

#[test]
fn the_suite_of_json_schema() {
    let text = include_str!("../../../../tests/goldens/json_schema_suite.json");
    let suite: Suite = serde_json::from_str(text).expect("the suite");
    let (mut sums, mut used) = ([0; 3], vec![0; DEVIATIONS.len()]);
    for case in &suite.cases {
        for draft in &case.drafts {
            let mut schema = case.schema.clone();
            if let Some(object) = schema.as_object_mut().filter(|object| !object.contains_key("$schema")) {
                object.insert("$schema".to_owned(), suite.drafts[draft].clone().into());
            }
            check(&case.name, &schema, &case.tests, &mut used, &mut sums);
        }
    }
    let [valid, invalid, refused] = sums;
    let deviations: usize = used.iter().sum();
    println!(
        "{valid} valid, {invalid} invalid instances, {deviations} deviations, {refused} schemas refused"
    );
    assert!(used.iter().all(|&count| count > 0), "some deviations are none any more: {used:?}");
    assert!(valid > 2300 && invalid > 1800 && refused < 700 && deviations < 120, "{sums:?} {deviations}");
}
