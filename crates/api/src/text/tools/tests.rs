//! Each format's calls, whole and cut anywhere.

use super::*;
use crate::text::{AnswerParser, Part, ReasoningFormat, ReasoningParser, Start};
use proptest::{collection::vec, prelude::*};
use serde_json::{Value, json};

fn tools() -> Arc<[Tool]> {
    let parameters = json!({"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "units": {"type": ["string", "null"]},
        "where": {"type": "object"},
    }});
    let tool = |name: &str| Tool {
        name: name.to_owned(),
        description: None,
        parameters: Some(parameters.clone()),
        strict: false,
    };
    vec![tool("weather"), tool("time")].into()
}

/// The parts of a text that comes in these pieces, neighbours of a kind joined.
fn parts<'a>(format: ToolFormat, pieces: impl IntoIterator<Item = &'a str>) -> Vec<Part> {
    let mut parser = ToolParser::new(format, tools());
    let mut joined = Parts::default();
    let mut add = |out: Parts| {
        for part in out.0 {
            match part {
                Part::Content(text) => joined.content(&text),
                Part::Arguments(text) => joined.arguments(&text),
                Part::Reasoning(text) => joined.reasoning(&text),
                other => joined.0.push(other),
            }
        }
    };
    for piece in pieces {
        let mut out = Parts::default();
        parser.push(piece, &mut out);
        add(out);
    }
    let mut out = Parts::default();
    parser.finish(&mut out);
    add(out);
    joined.0
}

fn borders(text: &str) -> Vec<usize> {
    (0..=text.len()).filter(|&at| text.is_char_boundary(at)).collect()
}

/// The parts of a text, which must not depend on where it is cut.
fn parse(format: ToolFormat, text: &str) -> Vec<Part> {
    let whole = parts(format, [text]);
    for at in borders(text) {
        assert_eq!(parts(format, [&text[..at], &text[at..]]), whole, "{text:?} cut at {at}");
    }
    let chars: Vec<String> = text.chars().map(String::from).collect();
    assert_eq!(parts(format, chars.iter().map(String::as_str)), whole, "{text:?} by characters");
    whole
}

fn content(text: &str) -> Part {
    Part::Content(text.to_owned())
}

/// Content, then calls, then content; arguments are compared as JSON.
#[track_caller]
fn check(format: ToolFormat, text: &str, before: &str, calls: &[(&str, Value)], after: &str) {
    let mut found = parse(format, text).into_iter().peekable();
    let text_of = |found: &mut std::iter::Peekable<std::vec::IntoIter<Part>>| match found.peek() {
        Some(Part::Content(text)) => {
            let text = text.clone();
            found.next();
            text
        }
        _ => String::new(),
    };
    assert_eq!(text_of(&mut found), before, "before the calls of {text:?}");
    for (name, arguments) in calls {
        assert_eq!(found.next(), Some(Part::Call((*name).to_owned())), "{text:?}");
        let Some(Part::Arguments(json)) = found.next() else { panic!("no arguments in {text:?}") };
        let json: Value = serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error}: {json}"));
        assert_eq!(json, *arguments, "{text:?}");
        assert_eq!(found.next(), Some(Part::CallEnd), "{text:?}");
    }
    assert_eq!(text_of(&mut found), after, "after the calls of {text:?}");
    assert_eq!(found.next(), None, "{text:?}");
}

#[test]
fn hermes() {
    let check = |text: &str, before: &str, calls: &[(&str, Value)], after: &str| {
        check(ToolFormat::Hermes, text, before, calls, after)
    };
    let one = r#"<tool_call>
{"name": "weather", "arguments": {"city": "Köln }\" <tool_call>", "where": {"a": [1, {"b": 2}]}}}
</tool_call>"#;
    let arguments = json!({"city": "Köln }\" <tool_call>", "where": {"a": [1, {"b": 2}]}});
    check(one, "", &[("weather", arguments.clone())], "");
    let calls = [("weather", arguments.clone()), ("weather", arguments.clone())];
    check(&format!("Let me see.\n\n{one}\n{one}\n"), "Let me see.", &calls, "");
    check(&format!("{one} Done."), "", &[("weather", arguments)], " Done.");
    // Order, other keys, arguments as text, and none at all.
    let time = r#"<tool_call>{"id": [1, "}"], "arguments": {"days": 1}, "name": "time", "x": 1}</tool_call>"#;
    check(time, "", &[("time", json!({"days": 1}))], "");
    let text = r#"<tool_call>{"name": "time", "arguments": "{\"days\": 1}"}</tool_call>"#;
    check(text, "", &[("time", json!({"days": 1}))], "");
    check(r#"<tool_call>{"name": "time"}"#, "", &[("time", json!({}))], "");
    // What is none is content, to the byte.
    for text in [
        "a < b <tool <tool_cal",
        "<tool_call>no</tool_call>",
        "<tool_call>{\"nam\": \"time\"}</tool_call>",
        "<tool_call>[]",
        "  x\n</tool_call> \n",
        "<tool_call>{\"name\": 5}",
        "<tool_call>{\"name\": \"ti",
        " \n ",
    ] {
        assert_eq!(parse(ToolFormat::Hermes, text), [content(text)]);
    }
    // What breaks off keeps what there was.
    let broken = parse(ToolFormat::Hermes, r#"<tool_call>{"name": "time", "arguments": {"days": "#);
    let kept = Part::Arguments("{\"days\": ".to_owned());
    assert_eq!(broken, [Part::Call("time".to_owned()), kept, Part::CallEnd]);
}

#[test]
fn llama() {
    let check = |text: &str, before: &str, calls: &[(&str, Value)], after: &str| {
        check(ToolFormat::Llama, text, before, calls, after)
    };
    let call = r#"{"name": "weather", "parameters": {"city": "Bonn"}}"#;
    let found = ("weather", json!({"city": "Bonn"}));
    check(call, "", std::slice::from_ref(&found), "");
    check(&format!("<|python_tag|>{call}<|eom_id|>"), "", std::slice::from_ref(&found), "");
    check(&format!("{call}; {call}"), "", &[found.clone(), found.clone()], "");
    check(&format!(" {call} and"), "", std::slice::from_ref(&found), " and");
    let typed = r#"{"type": "function", "name": "weather", "parameters": {"city": "Bonn"}}"#;
    check(typed, "", &[found], "");
    // Another object is an answer, and so is one within a text.
    for text in [r#"{"name": "Ada", "parameters": {}}"#, r#"{"a": 1}"#, "{", r#"See {"name": "time"}"#] {
        check(text, text, &[], "");
    }
}

#[test]
fn mistral() {
    let check = |text: &str, before: &str, calls: &[(&str, Value)], after: &str| {
        check(ToolFormat::Mistral, text, before, calls, after)
    };
    let (weather, time) = (("weather", json!({"city": "Lyon"})), ("time", json!({})));
    let array = r#"[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Lyon"}}, {"name": "time", "arguments": {}}]"#;
    check(array, "", &[weather.clone(), time.clone()], "");
    check(&format!("{array}</s>"), "", &[weather.clone(), time.clone()], "");
    let named = r#"[TOOL_CALLS]weather[ARGS]{"city": "Lyon"}[TOOL_CALLS]time[CALL_ID]abcdefgh1[ARGS]{}"#;
    check(&format!("Yes. {named}"), "Yes.", &[weather.clone(), time], "");
    check(r#"[TOOL_CALLS] weather{"city": "Lyon"}"#, "", &[weather], "");
    let cut = r#"[TOOL_CALLS][{"name": "time", "arguments": {}}, "#;
    check(cut, "", &[("time", json!({}))], "");
    check("[TOOL_CALLS]weather", "[TOOL_CALLS]weather", &[], "");
}

#[test]
fn phi() {
    let text = r#"<|tool_call|>[{"name": "time", "arguments": {"days": 2}}, {"name": "weather", "arguments": {"city": "x"}}]<|/tool_call|>"#;
    let calls = [("time", json!({"days": 2})), ("weather", json!({"city": "x"}))];
    check(ToolFormat::Phi, text, "", &calls, "");
    check(ToolFormat::Phi, &text.replace("<|tool_call|>", "functools"), "", &calls, "");
}

#[test]
fn deepseek() {
    let check = |text: &str, before: &str, calls: &[(&str, Value)], after: &str| {
        check(ToolFormat::DeepSeek, text, before, calls, after)
    };
    let calls = [("time", json!({"days": 2})), ("weather", json!({"city": "x"}))];
    let fenced = "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{\"days\": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"x\"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    check(fenced, "I look.", &calls, "");
    let plain = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>{\"days\": 2}<｜tool▁call▁end｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"x\"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    check(plain, "", &calls, "");
    check("```json\n{}\n```", "```json\n{}\n```", &[], "");
}

#[test]
fn qwen_coder() {
    let check = |text: &str, before: &str, calls: &[(&str, Value)], after: &str| {
        check(ToolFormat::QwenCoder, text, before, calls, after)
    };
    let body = "<function=weather>\n<parameter=city>\nKö\"ln\n</p> & <b>\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=units>\nnull\n</parameter>\n<parameter=where>\n{\"a\": [1]}\n</parameter>\n<parameter=more>\n7\n</parameter>\n</function>";
    let arguments =
        json!({"city": "Kö\"ln\n</p> & <b>", "days": 3, "units": null, "where": {"a": [1]}, "more": "7"});
    let found = ("weather", arguments);
    check(&format!("Ok\n<tool_call>\n{body}\n</tool_call>"), "Ok", std::slice::from_ref(&found), "");
    check(&format!("{body}\n</tool_call>\n"), "", &[found], "");
    check("<tool_call>\n<function=time>\n</function>\n</tool_call>", "", &[("time", json!({}))], "");
    let text =
        "<tool_call><function=time><parameter=city>a</parameter><parameter=days>many</parameter></function>";
    check(text, "", &[("time", json!({"city": "a", "days": "many"}))], "");
    check("<tool_call>\n{}", "<tool_call>\n{}", &[], "");
}

#[test]
fn gemma() {
    let arguments =
        json!({"city": "a, {b}: \"c\"\n", "days": 3, "where": {"x": [1, "two", true], "y": {}}, "z": "w"});
    let body = |quote: &str| {
        format!(
            "call:weather{{city:{quote}a, {{b}}: \"c\"\n{quote},days:3,where:{{x:[1,{quote}two{quote},true],y:{{}}}},z:w}}"
        )
    };
    let calls = [("weather", arguments)];
    let text = format!("<start_function_call>{}<end_function_call>", body("<escape>"));
    check(ToolFormat::FunctionGemma, &text, "", &calls, "");
    let text = format!("Hm <|tool_call>{}<tool_call|>", body("<|\"|>"));
    check(ToolFormat::Gemma, &text, "Hm", &calls, "");
    check(ToolFormat::Gemma, "<|tool_call>call:time{}<tool_call|>", "", &[("time", json!({}))], "");
    check(ToolFormat::Gemma, "<|tool_call>what", "<|tool_call>what", &[], "");
}

#[test]
fn formats_are_known_by_their_templates() {
    let check = |source: &str, expected| assert_eq!(ToolFormat::of_template(source), expected, "{source}");
    check("<tool_call></tool_call>", Some(ToolFormat::Hermes));
    check("<tool_call><function=x>", Some(ToolFormat::QwenCoder));
    check("'[TOOL_CALLS]' '[ARGS]'", Some(ToolFormat::MistralArgs));
    check("'[TOOL_CALLS]['", Some(ToolFormat::Mistral));
    check("<|tool_call|>", Some(ToolFormat::Phi));
    check("<|tool_call>", Some(ToolFormat::Gemma));
    check("<｜tool▁call▁begin｜>function```json", Some(ToolFormat::DeepSeek));
    check("<｜tool▁call▁begin｜>", Some(ToolFormat::DeepSeekPlain));
    check("<|python_tag|>", Some(ToolFormat::Llama));
    check("{{ messages }}", None);
}

#[test]
fn what_is_held_back_is_bounded() {
    let mut parser = ToolParser::new(ToolFormat::Hermes, tools());
    let mut out = Parts::default();
    let endless = format!("<tool_call>{{\"other\": \"{}", "x".repeat(CALL_HELD_BYTES_MAX));
    parser.push(&endless, &mut out);
    assert_eq!(out.0, [content(&endless)]);
    let mut parser = ToolParser::new(ToolFormat::Mistral, tools());
    let mut out = Parts::default();
    let endless = format!("[TOOL_CALLS]{}", "x".repeat(2000));
    parser.push(&endless, &mut out);
    assert_eq!(out.0, [content(&endless)]);
}

/// Pieces of calls in all formats, in any order, and other text.
fn fragment() -> impl Strategy<Value = String> {
    let markers = ToolFormat::ALL.iter().flat_map(|format| format.syntax().shown()).map(str::to_owned);
    let others = [
        "{\"name\": \"time\", \"arguments\": {\"days\": 1}}",
        "{\"name\": \"weather\", \"parameters\": {",
        "{\"name\": ",
        "\"arguments\"",
        "call:time{city:",
        "weather[ARGS]{\"city\": \"é\"}",
        "function<｜tool▁sep｜>time\n```json\n{}",
        "<function=time>\n<parameter=city>\n",
        "\n</parameter>\n",
        "</function>",
        "}",
        "[",
        "]",
        "{",
        ",",
        "\"",
        "\\",
        ": ",
        "\n",
        " ",
        "<",
        "é",
        "text",
        "null",
    ];
    prop::sample::select(markers.chain(others.map(str::to_owned)).collect::<Vec<_>>())
}

proptest! {
    #[test]
    fn cuts_change_nothing_and_text_is_kept(
        fragments in vec(fragment(), 0..14),
        format in prop::sample::select(ToolFormat::ALL.to_vec()),
        cuts in vec(0..400_usize, 0..6),
    ) {
        let text = fragments.concat();
        let whole = parts(format, [text.as_str()]);
        let mut cuts: Vec<usize> = cuts.into_iter().filter(|&cut| text.is_char_boundary(cut)).collect();
        cuts.push(text.len());
        cuts.sort_unstable();
        let mut from = 0;
        let pieces: Vec<&str> = cuts.iter().map(|&cut| { let piece = &text[from..cut]; from = cut; piece }).collect();
        prop_assert_eq!(&parts(format, pieces), &whole);
        // Calls begin and end in turn, with arguments between.
        let mut open = false;
        for part in &whole {
            match part {
                Part::Call(_) => { prop_assert!(!open); open = true; }
                Part::CallEnd => { prop_assert!(open); open = false; }
                Part::Arguments(_) => prop_assert!(open),
                Part::Content(_) | Part::Reasoning(_) => prop_assert!(!open),
            }
        }
        prop_assert!(!open);
        if !whole.iter().any(|part| matches!(part, Part::Call(_))) {
            let joined = whole.iter().map(|part| if let Part::Content(text) = part { text.as_str() } else { "" });
            prop_assert_eq!(joined.collect::<String>(), text);
        }
    }

    #[test]
    fn reasoning_is_told_apart_wherever_it_is_cut(
        thought in "[a<>/ \nthink]{0,20}",
        answer in "[b<>/ \nthink]{0,20}",
        start in prop::sample::select(vec![Start::Before, Start::Inside, Start::Over]),
        opened: bool,
        closed: bool,
        cut in 0..60_usize,
    ) {
        let format = ReasoningFormat { open: "<think>", close: "</think>" };
        let open = if opened { "\n<think>\n" } else { "" };
        let close = if closed { "\n</think>\n\n" } else { "" };
        let text = format!("{open}{thought}{close}{answer}");
        let run = |pieces: &[&str]| {
            let mut parser = AnswerParser { reasoning: Some(ReasoningParser::new(format, start)), ..AnswerParser::default() };
            let mut out = Parts::default();
            pieces.iter().for_each(|piece| parser.push(piece, &mut out));
            parser.finish(&mut out);
            out.0
        };
        let whole = run(&[&text]);
        let cut = (0..=cut.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        prop_assert_eq!(run(&[&text[..cut], &text[cut..]]), whole.clone());
        let chars: Vec<String> = text.chars().map(String::from).collect();
        let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
        prop_assert_eq!(run(&chars), whole.clone());
        if start == Start::Over {
            prop_assert_eq!(whole, if text.is_empty() { vec![] } else { vec![content(&text)] });
        } else if start == Start::Before && opened && closed && !thought.contains("</think>") {
            let (thought, answer) = (thought.trim(), answer.trim_start());
            let reasoning = (!thought.is_empty()).then(|| Part::Reasoning(thought.to_owned()));
            let answer = (!answer.is_empty()).then(|| content(answer));
            prop_assert_eq!(whole, reasoning.into_iter().chain(answer).collect::<Vec<_>>());
        }
    }
}
