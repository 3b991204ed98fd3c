//! Anthropic's `/v1/messages` over a scripted cluster.

use crate::support::*;
use serde_json::{Value, json};
use types::*;

const PATH: &str = "/v1/messages";
const SAID: &str =
    r#"<think>Hm.</think>So: <tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>"#;
const TOOL: &str = r#"{"name": "add", "description": "Adds", "input_schema": {"type": "object"}}"#;

fn body(fields: &str) -> String {
    format!(r#"{{"max_tokens": 200, "messages": [{{"role": "user", "content": "2+3?"}}]{fields}}}"#)
}

#[tokio::test]
async fn a_whole_message() {
    let cluster = Cluster::new(&["tiny"], Some(AGENT), agent_says(SAID));
    let answer = ask(cluster.app(), post(PATH, body(&format!(r#", "tools": [{TOOL}]"#)))).await;
    let json = answer.json();
    assert_eq!(answer.status(), 200, "{json}");
    assert_eq!(json["id"], format!("msg_{}", answer.header("x-request-id")));
    assert_eq!((&json["type"], &json["role"]), (&json!("message"), &json!("assistant")));
    let content = &json["content"];
    assert_eq!(content[0], json!({"type": "thinking", "thinking": "Hm.", "signature": ""}));
    assert_eq!(content[1], json!({"type": "text", "text": "So:"}));
    assert_eq!((&content[2]["name"], &content[2]["input"]), (&json!("add"), &json!({"a": 2, "b": 3})));
    assert_eq!((&json["stop_reason"], &json["stop_sequence"]), (&json!("tool_use"), &Value::Null));
    let usage = json!({
        "input_tokens": 12, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 8,
        "output_tokens": SAID.len() + 1,
    });
    assert_eq!(json["usage"], usage);
    assert!(answer.header("x-mlx-route").contains("matched=32"));
    let prompt = prompt_text(&cluster.asked_once());
    assert!(
        prompt.starts_with(r#"T[{"type": "function""#) && prompt.ends_with("user:2+3?\nassistant:"),
        "{prompt}"
    );
}

#[tokio::test]
async fn a_streamed_message() {
    let cluster = Cluster::new(&["tiny"], Some(AGENT), agent_says(SAID));
    let streamed = body(&format!(r#", "stream": true, "tools": [{TOOL}]"#));
    let answer = ask(cluster.app(), post(PATH, streamed)).await;
    assert_eq!(answer.header("content-type"), "text/event-stream");
    let events = sse(&answer.text);
    assert!(events.iter().all(|(name, data)| data["type"] == name.as_str()));
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    let mut distinct = names.clone();
    distinct.dedup();
    let block = ["content_block_start", "content_block_delta", "content_block_stop"];
    let expected =
        [&["message_start"][..], &block, &block, &block, &["message_delta", "message_stop"]].concat();
    assert_eq!(distinct, expected);
    let prompt_tokens = cluster.asked_once().prompt.len();
    let start = &events[0].1["message"];
    assert_eq!((&start["usage"]["input_tokens"], &start["content"]), (&json!(prompt_tokens), &json!([])));
    let joined = |field: &str| {
        let deltas = events.iter().filter_map(|(_, data)| data["delta"][field].as_str());
        deltas.collect::<String>()
    };
    assert_eq!((joined("thinking"), joined("text")), ("Hm.".to_owned(), "So:".to_owned()));
    let input: Value = serde_json::from_str(&joined("partial_json")).unwrap();
    assert_eq!(input, json!({"a": 2, "b": 3}));
    let indexes: Vec<&Value> = events
        .iter()
        .filter(|(name, _)| name == "content_block_start")
        .map(|(_, data)| &data["index"])
        .collect();
    assert_eq!(indexes, [0, 1, 2]);
    let delta = &events[events.len() - 2].1;
    assert_eq!(delta["delta"], json!({"stop_reason": "tool_use", "stop_sequence": null}));
    assert_eq!(delta["usage"]["output_tokens"], SAID.len() + 1);
}

#[tokio::test]
async fn how_a_message_stops() {
    let script = |reason| Script::Events(vec![tokens(0, "one two"), finished(reason, 7)]);
    for (reason, fields, stop, sequence, text) in [
        (FinishReason::Stop, "", "end_turn", Value::Null, "one two"),
        (FinishReason::Length, "", "max_tokens", Value::Null, "one two"),
        (FinishReason::Stop, r#", "stop_sequences": [" t"]"#, "stop_sequence", json!(" t"), "one"),
    ] {
        let cluster = Cluster::new(&["tiny"], Some(AGENT), script(reason));
        let json = ask(cluster.app(), post(PATH, body(fields))).await.json();
        assert_eq!((&json["stop_reason"], &json["stop_sequence"]), (&json!(stop), &sequence));
        assert_eq!(json["content"], json!([{"type": "text", "text": text}]));
    }
    let broken = Script::Events(vec![
        tokens(0, "a"),
        finished(FinishReason::Failed(GenerateError::Engine { message: "x".to_owned() }), 1),
    ]);
    let cluster = Cluster::new(&["tiny"], Some(AGENT), broken);
    let events = sse(&ask(cluster.app(), post(PATH, body(r#", "stream": true"#))).await.text);
    let (name, data) = events.last().unwrap();
    assert_eq!(
        (name.as_str(), &data["type"], &data["error"]["type"]),
        ("error", &json!("error"), &json!("api_error"))
    );
}

#[tokio::test]
async fn what_is_said_becomes_a_prompt() {
    let check = async |fields: &str, prompt: &str| {
        let cluster = Cluster::new(&["tiny"], Some(AGENT), agent_says("x"));
        let answer = ask(cluster.app(), post(PATH, format!(r#"{{"max_tokens": 5, {fields}}}"#))).await;
        assert_eq!(answer.status(), 200, "{}", answer.text);
        let asked = cluster.asked_once();
        assert_eq!((prompt_text(&asked).as_str(), asked.max_tokens), (prompt, 5), "{fields}");
        // Its tokens can be counted beforehand, also without a bound on the answer.
        let count = post("/v1/messages/count_tokens", format!("{{{fields}}}"));
        assert_eq!(ask(cluster.app(), count).await.json(), json!({"input_tokens": asked.prompt.len()}));
    };
    let user = r#""messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]"#;
    check(user, "user:a\nb\nassistant:").await;
    check(&format!(r#""system": "be", {user}"#), "system:be\nuser:a\nb\nassistant:").await;
    let blocks = r#""system": [{"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}}]"#;
    check(&format!("{blocks}, {user}"), "system:be\nuser:a\nb\nassistant:").await;
    let turns = r#""messages": [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "so"},
            {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 2}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "5"}]},
            {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": true},
            {"type": "text", "text": "well?"}]}]"#;
    let expected = "user:2+3?\nassistant:<think>hm</think>so<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 2}}</tool_call>\n\
                    tool:5=t1\ntool:Error: no=t2\nuser:well?\nassistant:";
    check(turns, expected).await;
    let prefilled =
        r#""messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is"}]"#;
    check(prefilled, "user:a\nassistant:It is").await;
}

#[tokio::test]
async fn refusals() {
    let one = |message: &str| format!(r#"{{"max_tokens": 1, "messages": [{message}]}}"#);
    let image = one(r#"{"role": "user", "content": [{"type": "image", "source": {}}]}"#);
    let result = one(r#"{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}"#);
    let calls = one(
        r#"{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "x", "input": {}}]}"#,
    );
    let speaker = one(r#"{"role": "other", "content": ""}"#);
    let answer = one(r#"{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "thinking", "thinking": "x"}]}]}"#);
    let none = one(r#"{"role": "user", "content": "x"}"#).replace(": 1,", ": 0,");
    let many = none.replace(": 0,", ": 100000,");
    let (other, hot) = (body(r#", "model": "other""#), body(r#", "temperature": 3"#));
    const INVALID: &str = "invalid_request_error";
    for (request, status, kind, message) in [
        (r#"{"messages": [{"role": "user", "content": "x"}]}"#, 400, INVALID, "max_tokens is missing"),
        (r#"{"max_tokens": 1}"#, 400, INVALID, "missing field `messages`"),
        (r#"{"max_tokens": 1, "messages": []}"#, 400, INVALID, "at least one"),
        (&image, 400, INVALID, "image"),
        (&result, 400, INVALID, "messages.0.content.0 is a block of type \"tool_result\""),
        (&none, 400, INVALID, "max_tokens is 0"),
        (&many, 400, INVALID, "and max_tokens is 100000, but"),
        (&calls, 400, INVALID, "messages.0.content: a last turn"),
        (&speaker, 400, INVALID, "messages.0.role: unknown variant"),
        (&answer, 400, INVALID, "messages.0.content.0.content.0 is a block of type \"thinking\""),
        (&other, 404, "not_found_error", "other"),
        (&hot, 400, INVALID, "3"),
    ] {
        let cluster = Cluster::new(&["tiny"], Some(AGENT), agent_says("x"));
        let answer = ask(cluster.app(), post(PATH, request.to_owned())).await;
        let json = answer.json();
        assert_eq!((answer.status(), &json["error"]["type"]), (status, &json!(kind)), "{request}: {json}");
        assert!(json["error"]["message"].as_str().unwrap().contains(message), "{request}: {json}");
        assert_eq!(
            (&json["type"], &json["request_id"]),
            (&json!("error"), &json!(answer.header("x-request-id")))
        );
    }
    for (fields, message) in [
        (r#", "tools": [{"type": "web_search_20250305", "name": "web_search"}]"#, "web_search_20250305"),
        (r#", "tool_choice": {"type": "any"}"#, "there are no tools"),
        (r#", "tool_choice": {"type": "some"}"#, "some"),
        (r#", "thinking": {"type": "sometimes"}"#, "sometimes"),
        (r#", "mcp_servers": [{"url": "x"}]"#, "mcp_servers"),
        (
            r#", "system": [{"type": "thinking", "thinking": "x"}]"#,
            "system.0 is a block of type \"thinking\"",
        ),
        (r#", "stop_sequences": [""]"#, "stop_sequences.0 has 0 bytes"),
        (r#", "stop_sequences": [1]"#, "stop_sequences.0: invalid type"),
        (r#", "tools": [{"name": "a b"}]"#, "tools.0.name is \"a b\""),
        (r#", "tools": [{}]"#, "tools.0.name: missing"),
        (r#", "tools": [{"name": "a", "input_schema": 1}]"#, "tools.0.input_schema must be"),
        (r#", "output_config": {"effort": "low"}"#, "output_config.effort = \"low\""),
    ] {
        let cluster = Cluster::new(&["tiny"], Some(AGENT), agent_says("x"));
        let answer = ask(cluster.app(), post(PATH, body(fields))).await;
        assert_eq!(answer.status(), 400, "{fields}");
        assert!(answer.text.contains(&message.replace('"', "\\\"")), "{fields}: {}", answer.text);
    }
}
