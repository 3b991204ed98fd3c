//! Grammars that are a chain of rules, terminals or references, or nested, as large as may be sent: a compiler that calls itself
//! for each link must not exhaust its stack, which would end the process.
#![expect(clippy::print_stdout, reason = "helpers of tests, outside #[test] functions")]

use engine::grammar::Grammars;
use std::time::{Duration, Instant};
use testkit::FakeSettings;
use types::{Grammar, limits};

/// What one grammar may take, in a debug build beside others.
const TIME_MAX: Duration = Duration::from_secs(60);

/// Compiles it, and begins a text of it if it is a grammar: `expected` says which.
fn check(name: &str, grammar: &Grammar, expected: bool) {
    // Not the one that other tests share, which would have them wait.
    let mut grammars = Grammars::new(&FakeSettings::default().vocabulary()).expect("a vocabulary of texts");
    assert!(grammar.text().len() <= limits::GRAMMAR_BYTES_MAX, "{name} has {} bytes", grammar.text().len());
    let began = Instant::now();
    let begun = grammars.compile(grammar).map(|mut matcher| matcher.mask().map(|mask| mask.count()));
    println!("{name}: {} bytes, {begun:?} in {:?}", grammar.text().len(), began.elapsed());
    assert!(began.elapsed() < TIME_MAX, "{name}");
    assert_eq!(begun.is_ok(), expected, "{name}: {begun:?}");
    if let Err(error) = begun {
        let error = error.to_string();
        assert!(error.starts_with("grammar: ") && error.len() < 700, "{name}: {error:?}");
    }
}

/// A name of three letters and digits.
fn name(at: usize) -> String {
    let digit = |at: usize| char::from(b"abcdefghijklmnopqrstuvwxyz0123456789"[at % 36]);
    [digit(at / 1296 % 26), digit(at / 36), digit(at)].iter().collect()
}

#[test]
fn chains_of_rules_and_terminals() {
    let chain = |first: &str, link: &dyn Fn(String, String) -> String, last: &str| {
        let mut text = format!("start: {first}aaa\n");
        let mut links = 0;
        while text.len() + 40 < limits::GRAMMAR_BYTES_MAX && links < 26 * 1296 - 1 {
            text.push_str(&link(name(links), name(links + 1)));
            links += 1;
        }
        println!("{links} links");
        text.push_str(&format!("{}:{last}\n", first.to_owned() + &name(links)));
        Grammar::Lark(text)
    };
    check("rules", &chain("", &|at, next| format!("{at}:{next}\n"), "\"x\""), true);
    check("rules with text", &chain("", &|at, next| format!("{at}:\"a\" {next}\n"), "\"x\""), true);
    let upper = |name: String| name.to_uppercase();
    let terminals = |link: &dyn Fn(String, String) -> String| {
        let Grammar::Lark(text) = chain("", link, "\"x\"") else { unreachable!("a Lark grammar") };
        let (first, rest) = text.split_once('\n').expect("a line");
        let (rules, last) = rest.trim_end().rsplit_once('\n').expect("a line");
        let (end, of) = last.split_once(':').expect("a rule");
        Grammar::Lark(format!("{}\n{rules}\n{}:{of}\n", first.replace("aaa", "AAA"), end.to_uppercase()))
    };
    let link = |at, next| format!("{}:\"a\" {}\n", upper(at), upper(next));
    check("terminals", &terminals(&link), true);
    let link = |at, next| format!("{}:\"a\"|{} \"b\"\n", upper(at), upper(next));
    check("terminals with alternatives", &terminals(&link), true);
}

#[test]
fn nests_of_lark_and_regular_expressions() {
    let nest = |open: &str, close: &str| {
        let levels = 250_000 / (open.len() + close.len());
        format!("{}\"x\"{}", open.repeat(levels), close.repeat(levels))
    };
    for (open, close) in [("(", ")"), ("[", "]"), ("~", ""), ("(\"a\"|", ")")] {
        check(open, &Grammar::Lark(format!("start: {}", nest(open, close))), false);
        check(open, &Grammar::Lark(format!("start: X\nX: {}", nest(open, close))), false);
    }
    for (open, close) in [("(", ")"), ("(a", ")?"), ("[", "]"), ("(?i:", ")")] {
        check(open, &Grammar::Regex(nest(open, close)), false);
    }
    check("a long regex", &Grammar::Regex("a?b".repeat(80_000)), true);
    check("many alternatives", &Grammar::Regex("ab|".repeat(80_000)), true);
    check("repeats", &Grammar::Regex(format!("a{}", "{1,2}".repeat(200))), true);
}

#[test]
fn chains_and_nests_of_schemas() {
    let chain = |link: &dyn Fn(usize) -> String| {
        let mut defs = String::new();
        let mut links = 0;
        while defs.len() + 200 < limits::GRAMMAR_BYTES_MAX {
            defs.push_str(&format!("\"d{links}\":{},", link(links + 1)));
            links += 1;
        }
        println!("{links} links");
        Grammar::JsonSchema(format!(
            "{{\"$ref\":\"#/$defs/d0\",\"$defs\":{{{defs}\"d{links}\":{{\"type\":\"null\"}}}}}}"
        ))
    };
    check("references", &chain(&|next| format!("{{\"$ref\":\"#/$defs/d{next}\"}}")), true);
    check("items", &chain(&|next| format!("{{\"items\":{{\"$ref\":\"#/$defs/d{next}\"}}}}")), false);
    let all = |next| format!("{{\"allOf\":[{{\"$ref\":\"#/$defs/d{next}\"}},{{\"minimum\":1}}]}}");
    check("allOf", &chain(&all), false);
    let schema = |text: &str| Grammar::JsonSchema(text.to_owned());
    check("itself", &schema(r##"{"$ref": "#"}"##), true);
    check("itself in allOf", &schema(r##"{"allOf": [{"$ref": "#"}]}"##), true);
    check("itself in anyOf", &schema(r##"{"anyOf": [{"$ref": "#"}, {"type": "null"}]}"##), true);
    // As deep as one may be, and no JSON deeper than its own parser takes.
    let nest = |open: &str, close: &str, levels: usize| {
        Grammar::JsonSchema(format!("{}{{}}{}", open.repeat(levels), close.repeat(levels)))
    };
    let most = limits::SCHEMA_DEPTH_MAX;
    check("items in items", &nest("{\"items\":", "}", most - 1), true);
    let open = "{\"type\":\"object\",\"required\":[\"a\"],\"properties\":{\"a\":";
    check("properties in properties", &nest(open, "}}", most / 2 - 1), true);
    check("allOf in allOf", &nest("{\"allOf\":[{\"minimum\":1},", "]}", most / 2 - 1), true);
    check("anyOf in anyOf", &nest("{\"anyOf\":[{\"minimum\":1},", "]}", most / 2 - 1), true);
    check("too deep", &nest("{\"items\":", "}", limits::JSON_DEPTH_MAX + 1), false);
    let constant = format!("{{\"const\":{}{}}}", "[".repeat(most - 1), "]".repeat(most - 1));
    check("a constant", &schema(&constant), true);
    // What quotes a wrong value must not cut it within a character.
    let wide = "é".repeat(300);
    for text in [format!("{{\"minimum\":\"{wide}\"}}"), format!("{{\"minimum\":\"a{wide}\"}}")] {
        check("a wide value", &schema(&text), false);
    }
}
