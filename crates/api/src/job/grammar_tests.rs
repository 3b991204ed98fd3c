//! Each format's grammar allows what the format's parser reads, token by token, and nothing that breaks the schema.

use super::*;
use crate::text::{AnswerParser, Part, Parts, tools::ToolParser};
use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::Value;
use std::sync::Arc;

/// Bytes, an end, and some special tokens.
const END: u32 = 256;
const SPECIAL: [(&str, u32); 11] = [
    ("[TOOL_CALLS]", 257),
    ("[ARGS]", 258),
    ("<|python_tag|>", 259),
    ("[THINK]", 260),
    ("[/THINK]", 261),
    ("<escape>", 262),
    ("<|channel|>", 263),
    ("<|message|>", 264),
    ("<|end|>", 265),
    ("<|start|>", 266),
    ("<|constrain|>", 267),
];

fn special() -> Vec<(String, u32)> {
    SPECIAL.iter().map(|&(text, id)| (text.to_owned(), id)).collect()
}

thread_local! {
    static FACTORY: ParserFactory = {
        let mut words: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        words.push(b"\xff<end>".to_vec());
        words.extend(SPECIAL.iter().map(|(text, _)| [b"\xff", text.as_bytes()].concat()));
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, END), &words);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &[]).expect("a factory");
        factory.quiet();
        factory
    };
}

fn matcher(grammar: &Grammar) -> Matcher {
    let grammar = match grammar {
        Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        Grammar::JsonSchema(schema) => {
            TopLevelGrammar::from_json_schema(serde_json::from_str(schema).expect("JSON"))
        }
        Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
    };
    Matcher::new(FACTORY.with(|factory| factory.create_parser(grammar)))
}

/// A text in tokens: its markers as special tokens.
fn tokens(text: &str) -> Vec<u32> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        match SPECIAL.iter().find(|(special, _)| rest.starts_with(special)) {
            Some((special, id)) => {
                tokens.push(*id);
                rest = &rest[special.len()..];
            }
            None => {
                tokens.extend(rest.as_bytes()[..first.len_utf8()].iter().map(|&byte| u32::from(byte)));
                rest = &rest[first.len_utf8()..];
            }
        }
    }
    tokens
}

/// How many bytes of a text the grammar allows, and whether it may end after all of them.
#[track_caller]
fn allowed(grammar: &Grammar, text: &str) -> (usize, bool) {
    let mut matcher = matcher(grammar);
    if let Some(error) = matcher.get_error() {
        panic!("{error}\n{grammar:?}");
    }
    for (index, &token) in tokens(text).iter().enumerate() {
        if matcher.is_stopped() || !matcher.compute_mask().expect("a mask").is_allowed(token) {
            return (index, false);
        }
        matcher.consume_token(token).expect("it was allowed");
    }
    (tokens(text).len(), matcher.is_stopped() || matcher.is_accepting().expect("no error"))
}

fn tools(strict: bool) -> Vec<Tool> {
    let parameters = serde_json::json!({
        "type": "object", "additionalProperties": false, "required": ["city"],
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]},
            "more": {"type": "array", "items": {"type": "number"}}},
    });
    let tool = |name: &str, parameters| Tool { name: name.to_owned(), description: None, parameters, strict };
    vec![tool("weather", Some(parameters)), tool("time", None)]
}

fn grammar(format: ToolFormat, choice: ToolChoice, reasoning: Reasoning) -> Grammar {
    let tools = tools(choice == ToolChoice::Auto);
    let conversation = Conversation { tools: tools.clone(), tool_choice: choice, ..Conversation::default() };
    of(&conversation, &tools, format, reasoning, &special()).expect("a grammar")
}

/// The calls that a format's parser finds.
fn calls(format: ToolFormat, text: &str) -> Vec<(String, Value)> {
    let mut parser =
        AnswerParser { tools: Some(ToolParser::new(format, tools(false).into())), ..AnswerParser::default() };
    let mut parts = Parts::default();
    parser.push(text, &mut parts);
    parser.finish(&mut parts);
    let mut found = Vec::new();
    for part in parts.0 {
        match part {
            Part::Call(name) => found.push((name, Value::Null)),
            Part::Arguments(json) => {
                found.last_mut().expect("a call").1 = serde_json::from_str(&json).expect("JSON")
            }
            _ => {}
        }
    }
    found
}

/// A call of `weather`, one of `time` after it, and a call of which the last character breaks the schema.
fn samples(format: ToolFormat) -> (String, String, String) {
    let body = "{\"city\": \"Köln\", \"days\": 3}";
    let (one, two, wrong): (String, String, String) = match format {
        ToolFormat::Hermes => (
            format!("<tool_call>\n{{\"name\": \"weather\", \"arguments\": {body}}}\n</tool_call>"),
            "\n<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>".into(),
            "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": 5".into(),
        ),
        ToolFormat::QwenCoder => (
            "<tool_call>\n<function=weather>\n<parameter=city>\nKö\nln\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>".into(),
            "\n<tool_call>\n<function=time>\n</function>\n</tool_call>".into(),
            "<tool_call>\n<function=weather>\n<parameter=d".into(),
        ),
        ToolFormat::Llama => (
            format!("{{\"name\": \"weather\", \"parameters\": {body}}}"),
            "; {\"name\": \"time\", \"parameters\": {}}".into(),
            "{\"name\": \"weather\", \"parameters\": {\"city\": 5".into(),
        ),
        ToolFormat::Mistral => (
            format!("[TOOL_CALLS][{{\"name\": \"weather\", \"arguments\": {body}}}]"),
            String::new(),
            "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": 5".into(),
        ),
        ToolFormat::MistralArgs => (
            format!("[TOOL_CALLS]weather[ARGS]{body}"),
            "[TOOL_CALLS]time[ARGS]{}".into(),
            "[TOOL_CALLS]weather[ARGS]{\"city\": 5".into(),
        ),
        ToolFormat::Phi => (
            format!("<|tool_call|>[{{\"name\": \"weather\", \"arguments\": {body}}}]<|/tool_call|>"),
            String::new(),
            "<|tool_call|>[{\"name\": \"weather\", \"arguments\": {\"city\": 5".into(),
        ),
        ToolFormat::DeepSeek => (
            format!("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{body}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
            String::new(),
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": 5".into(),
        ),
        ToolFormat::DeepSeekPlain => (
            format!("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{body}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
            String::new(),
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": 5".into(),
        ),
        ToolFormat::FunctionGemma => (
            "<start_function_call>call:weather{city:<escape>Köln<escape>,days:3,unit:<escape>C<escape>,more:[1,2]}<end_function_call>".into(),
            "<start_function_call>call:time{}<end_function_call>".into(),
            "<start_function_call>call:weather{city:5".into(),
        ),
        ToolFormat::Gemma => (
            "<|tool_call>call:weather{city:<|\"|>Köln<|\"|>,days:3}<tool_call|>".into(),
            "<|tool_call>call:time{x:{a:[1,<|\"|>b<|\"|>]}}<tool_call|>".into(),
            "<|tool_call>call:weather{city:5".into(),
        ),
    };
    (one, two, wrong)
}

#[test]
fn forced_calls() {
    for format in ToolFormat::ALL {
        let (one, two, wrong) = samples(format);
        let required = grammar(format, ToolChoice::Required, None);
        let both = format!("{one}{two}");
        for text in [&one, &both] {
            assert_eq!(
                allowed(&required, text),
                (tokens(text).len(), true),
                "{format:?} {text}\n{required:?}"
            );
        }
        assert_eq!(allowed(&required, &wrong).0, tokens(&wrong).len() - 1, "{format:?} {wrong}");
        assert_eq!(allowed(&required, "Hello"), (0, false), "{format:?}");
        assert_eq!(allowed(&required, ""), (0, false), "{format:?}");
        let found = calls(format, &both);
        assert_eq!(found[0].0, "weather", "{format:?}");
        assert_eq!(found[0].1["days"], 3, "{format:?}");
        assert_eq!(found.len(), 1 + usize::from(!two.is_empty()), "{format:?}");
        let named = grammar(format, ToolChoice::Named("weather".to_owned()), None);
        assert_eq!(allowed(&named, &one), (tokens(&one).len(), true), "{format:?}");
        if !two.is_empty() {
            assert!(allowed(&named, &both).0 < tokens(&both).len(), "{format:?}: one call only");
        }
    }
}

#[test]
fn free_text_until_a_call_begins() {
    for format in ToolFormat::ALL {
        let (one, two, wrong) = samples(format);
        let auto = grammar(format, ToolChoice::Auto, None);
        let before = if format == ToolFormat::Llama { "" } else { "I look. <tool [x] {\n" };
        for text in
            ["", "Hello {\"a\": 1} <b> [1]", &format!("{before}{one}"), &format!("{before}{one}{two}")]
        {
            assert_eq!(allowed(&auto, text), (tokens(text).len(), true), "{format:?} {text}\n{auto:?}");
        }
        let wrong = format!("{before}{wrong}");
        assert_eq!(allowed(&auto, &wrong).0, tokens(&wrong).len() - 1, "{format:?} {wrong}");
    }
}

#[test]
fn reasoning_before_it() {
    let think = ReasoningFormat { open: "<think>", close: "</think>" };
    let special = ReasoningFormat { open: "[THINK]", close: "[/THINK]" };
    let schema = serde_json::json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false});
    let shaped = |shape: Shape, reasoning: Reasoning| {
        let conversation = Conversation { shape, ..Conversation::default() };
        of(&conversation, &[], ToolFormat::Hermes, reasoning, &self::special()).expect("a grammar")
    };
    let lark = "start: object\nobject: %json {\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"integer\"}}, \"required\": [\"a\"], \"additionalProperties\": false}";
    for shape in [
        Shape::JsonSchema(schema),
        Shape::Lark(lark.to_owned()),
        Shape::Regex("\\{\"a\": [0-9]+\\}".to_owned()),
    ] {
        for format in [think, special] {
            let (open, close) = (format.open, format.close);
            let check = |start: Start, text: &str, expected: bool| {
                let grammar = shaped(shape.clone(), Some((format, start)));
                let found = allowed(&grammar, text) == (tokens(text).len(), true);
                assert_eq!(found, expected, "{start:?} {text}\n{grammar:?}");
            };
            let answer = "{\"a\": 1}";
            check(Start::Inside, &format!("Hm {{\"b\": </thin k> \n{close}\n\n{answer}"), true);
            check(Start::Inside, answer, false);
            check(Start::Inside, &format!("Hm{close}no"), false);
            check(Start::Before, answer, true);
            check(Start::Before, &format!("{open}\nHm\n{close}\n\n{answer}"), true);
            check(Start::Before, &format!("Hm {answer}"), false);
            check(Start::Over, answer, true);
            check(Start::Over, &format!("{open}Hm{close}{answer}"), false);
        }
    }
    for format in ToolFormat::ALL {
        let one = samples(format).0;
        for (reasoning, thought) in [
            ((think, Start::Inside), "So </think>\n\n"),
            ((think, Start::Before), "<think>So</think>\n\n"),
            ((special, Start::Before), "[THINK]So[/THINK]"),
        ] {
            for choice in [ToolChoice::Required, ToolChoice::Auto] {
                let is_bare = format == ToolFormat::Llama && choice == ToolChoice::Auto;
                if is_bare && reasoning == (think, Start::Before) {
                    // Free from its first character on: what follows is not looked at.
                    continue;
                }
                let grammar = grammar(format, choice, Some(reasoning));
                let text = format!("{thought}{one}");
                assert_eq!(
                    allowed(&grammar, &text),
                    (tokens(&text).len(), true),
                    "{format:?} {text}\n{grammar:?}"
                );
            }
        }
    }
}

#[test]
fn one_of_some_texts() {
    let grammar =
        of_shape(&Shape::Choice(vec!["yes".to_owned(), "no, \"so\"\n".to_owned()])).expect("a grammar");
    assert_eq!(allowed(&grammar, "yes"), (3, true));
    assert_eq!(allowed(&grammar, "no, \"so\"\n"), (9, true));
    assert_eq!(allowed(&grammar, "no."), (2, false));
}

#[test]
fn messages_with_headers() {
    let of = |choice: ToolChoice, strict: bool, shape: Shape| {
        let tools = tools(strict);
        let conversation =
            Conversation { tools: tools.clone(), tool_choice: choice, shape, ..Conversation::default() };
        of_harmony(&conversation, &tools, &special())
    };
    assert_eq!(of(ToolChoice::Auto, false, Shape::Free), None);
    let thought = "<|channel|>analysis<|message|>Hm {<|end|><|start|>assistant";
    let call = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\": \"x\"}";
    let wrong = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\": 5";
    let required = of(ToolChoice::Required, false, Shape::Free).expect("a grammar");
    let auto = of(ToolChoice::Auto, true, Shape::Free).expect("a grammar");
    let object = of(ToolChoice::None, false, Shape::JsonObject).expect("a grammar");
    let check = |grammar: &Grammar, text: &str, expected: bool| {
        let found = allowed(grammar, text) == (tokens(text).len(), true);
        assert_eq!(found, expected, "{text}\n{grammar:?}");
    };
    for before in ["", thought] {
        check(&required, &format!("{before}{call}"), true);
        check(&required, &format!("{before}{wrong}"), false);
        check(&required, &format!("{before}<|channel|>final<|message|>Yes"), false);
        check(&auto, &format!("{before}{call}"), true);
        check(
            &auto,
            &format!("{before}<|channel|>commentary<|message|>So.<|end|><|start|>assistant{call}"),
            true,
        );
        check(&auto, &format!("{before}<|channel|>final<|message|>Yes"), true);
        check(&object, &format!("{before}<|channel|>final<|message|>{{\"a\": 1}}"), true);
        check(&object, &format!("{before}<|channel|>final<|message|>Yes"), false);
    }
}

#[test]
fn a_shape_or_a_call() {
    let schema = serde_json::json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false});
    for format in ToolFormat::ALL {
        let tools = tools(false);
        let shape = Shape::JsonSchema(schema.clone());
        let conversation = Conversation { tools: tools.clone(), shape, ..Conversation::default() };
        let grammar = of(&conversation, &tools, format, None, &special()).expect("a grammar");
        let (one, ..) = samples(format);
        for text in [one.as_str(), "{\"a\": 1}"] {
            assert_eq!(allowed(&grammar, text), (tokens(text).len(), true), "{format:?} {text}\n{grammar:?}");
        }
        for text in ["Hello", "{\"b\": 1}", "{\"a\": \"x\"}"] {
            assert!(allowed(&grammar, text).0 < text.len(), "{format:?} {text}");
        }
    }
}
