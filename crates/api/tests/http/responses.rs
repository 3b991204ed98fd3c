//! OpenAI's `/v1/responses` over a scripted cluster.

use crate::support::*;
use api::{Access, ApiSettings};
use axum::{
    Router,
    body::Body,
    http::{Method, Request},
};
use serde_json::{Value, json};
use types::*;

const PATH: &str = "/v1/responses";
const SAID: &str =
    r#"<think>Hm.</think>So: <tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>"#;
const TOOL: &str = r#""tools": [{"type": "function", "name": "add", "parameters": {"type": "object"}}]"#;

fn request(method: Method, path: &str) -> Request<Body> {
    Request::builder().method(method).uri(path).body(Body::empty()).unwrap()
}

async fn create(app: &Router, fields: &str) -> Value {
    let answer = ask(app.clone(), post(PATH, format!("{{{fields}}}"))).await;
    assert_eq!(answer.status(), 200, "{fields}: {}", answer.text);
    answer.json()
}

#[tokio::test]
async fn a_whole_response() {
    let cluster = Cluster::new(&["tiny"], Some(AGENT), agent_says(SAID));
    let json = create(&cluster.app(), &format!(r#""input": "2+3?", "metadata": {{"k": "v"}}, {TOOL}"#)).await;
    assert_eq!((&json["object"], &json["status"]), (&json!("response"), &json!("completed")));
    let output = json["output"].as_array().unwrap();
    let kinds: Vec<&Value> = output.iter().map(|item| &item["type"]).collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call"]);
    assert_eq!(output[0]["content"], json!([{"type": "reasoning_text", "text": "Hm."}]));
    let part = json!({"type": "output_text", "text": "So:", "annotations": [], "logprobs": []});
    assert_eq!(output[1]["content"], json!([part]));
    let arguments: Value = serde_json::from_str(output[2]["arguments"].as_str().unwrap()).unwrap();
    assert_eq!((&output[2]["name"], arguments), (&json!("add"), json!({"a": 2, "b": 3})));
    let usage = &json["usage"];
    assert_eq!((&usage["input_tokens"], &usage["total_tokens"]), (&json!(20), &json!(21 + SAID.len())));
    assert_eq!(usage["input_tokens_details"]["cached_tokens"], 8);
    assert_eq!(json["metadata"], json!({"k": "v"}));
    assert_eq!((&json["truncation"], &json["tool_choice"]), (&json!("disabled"), &json!("auto")));
}

#[tokio::test]
async fn a_streamed_response_says_the_same() {
    for (said, reason) in [(SAID, FinishReason::Stop), ("ab", FinishReason::Length), ("", FinishReason::Stop)]
    {
        let mut events = each_token(said);
        events.push(finished(reason, 9));
        let cluster = Cluster::new(&["tiny"], Some(AGENT), Script::Events(events));
        let app = cluster.app();
        let fields = format!(r#""input": "2+3?", {TOOL}"#);
        let mut whole = create(&app, &fields).await;
        let answer = ask(app.clone(), post(PATH, format!(r#"{{{fields}, "stream": true}}"#))).await;
        let events = sse(&answer.text);
        for (index, (name, data)) in events.iter().enumerate() {
            assert_eq!((&data["type"], &data["sequence_number"]), (&json!(name), &json!(index)));
        }
        assert_eq!(
            (events[0].0.as_str(), events[1].0.as_str()),
            ("response.created", "response.in_progress")
        );
        assert_eq!(events[0].1["response"]["status"], "in_progress");
        let mut last = events.last().unwrap().1["response"].clone();
        // The same but for ids, which have the request's, and the time.
        let anonymous = |response: &mut Value| {
            response["created_at"] = Value::Null;
            response["id"] = Value::Null;
            for item in response["output"].as_array_mut().unwrap() {
                item["id"] = Value::Null;
                if item["type"] == "function_call" {
                    item["call_id"] = Value::Null;
                }
            }
        };
        let kept = ask(app, request(Method::GET, &format!("{PATH}/{}", last["id"].as_str().unwrap()))).await;
        assert_eq!(kept.json(), last);
        anonymous(&mut whole);
        anonymous(&mut last);
        assert_eq!(last, whole, "{said:?}");
        // Items that were told of one by one are those of the whole.
        let done = events.iter().filter(|(name, _)| name == "response.output_item.done");
        assert_eq!(done.count(), last["output"].as_array().unwrap().len());
        let deltas = |name: &str| {
            let deltas = events.iter().filter(|event| event.0 == name);
            deltas.filter_map(|(_, data)| data["delta"].as_str()).collect::<String>()
        };
        let text: String = if said == SAID { "So:".to_owned() } else { said.to_owned() };
        assert_eq!(deltas("response.output_text.delta"), text);
        if said == SAID {
            assert_eq!(deltas("response.reasoning_text.delta"), "Hm.");
            let call = last["output"][2]["arguments"].as_str().unwrap();
            assert_eq!(deltas("response.function_call_arguments.delta"), call);
        }
        let name = if said == "ab" { "response.incomplete" } else { "response.completed" };
        assert_eq!(events.last().unwrap().0, name);
    }
}

#[tokio::test]
async fn a_response_is_continued() {
    let cluster = Cluster::new(&["tiny"], Some(AGENT), agent_says("<think>t</think>five"));
    let app = cluster.app();
    let first = create(&app, r#""input": "2+3?", "instructions": "be""#).await;
    let second = format!(r#""input": "and?", "previous_response_id": {}"#, first["id"]);
    let second = create(&app, &second).await;
    assert_eq!(second["previous_response_id"], first["id"]);
    let third = format!(
        r#""input": [{{"type": "function_call_output", "call_id": "c", "output": "9"}}], "previous_response_id": {}"#,
        second["id"]
    );
    create(&app, &third).await;
    let asked = cluster.asked.lock().unwrap();
    let prompts: Vec<String> = asked.iter().map(prompt_text).collect();
    let said = "assistant:<think>t</think>five\n";
    // Instructions hold for one response only.
    let expected = [
        "system:be\nuser:2+3?\nassistant:".to_owned(),
        format!("user:2+3?\n{said}user:and?\nassistant:"),
        format!("user:2+3?\n{said}user:and?\n{said}tool:9=c\nassistant:"),
    ];
    assert_eq!(prompts, expected);
}

#[tokio::test]
async fn responses_are_kept_by_client() {
    let cluster = Cluster::new(&["tiny"], Some(AGENT), agent_says("x"));
    let access = Access::of_keys(["first", "second"]).into();
    let app = cluster.app_with(ApiSettings { access, ..ApiSettings::default() });
    let of = |key: &str, mut request: Request<Body>| {
        request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        request
    };
    let input = r#"{"input": [{"role": "user", "content": "a"}, {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]}, {"role": "user", "content": "c"}]}"#;
    let made = ask(app.clone(), of("first", post(PATH, input))).await.json();
    let id = made["id"].as_str().unwrap();
    let path = format!("{PATH}/{id}");
    let got = ask(app.clone(), of("first", request(Method::GET, &path))).await;
    assert_eq!((got.status(), got.json()), (200, made.clone()));
    let items =
        ask(app.clone(), of("first", request(Method::GET, &format!("{path}/input_items")))).await.json();
    let contents: Vec<&Value> =
        items["data"].as_array().unwrap().iter().map(|item| &item["content"]).collect();
    assert_eq!(contents, [&json!("c"), &json!([{"type": "output_text", "text": "b"}]), &json!("a")]);
    assert_eq!((&items["object"], &items["has_more"]), (&json!("list"), &json!(false)));
    assert_eq!(items["first_id"], items["data"][0]["id"]);
    for (query, status, expected) in [
        ("order=asc&limit=2", 200, json!(["a", [{"type": "output_text", "text": "b"}]])),
        (&format!("order=asc&after={}", items["data"][1]["id"].as_str().unwrap()), 200, json!(["c"])),
        ("limit=0", 400, json!("limit")),
        ("limit=x", 400, json!("query")),
        ("order=up", 400, json!("query")),
        ("after=x", 400, json!("after")),
    ] {
        let asked = request(Method::GET, &format!("{path}/input_items?{query}"));
        let answer = ask(app.clone(), of("first", asked)).await;
        let json = answer.json();
        let told = match json["data"].as_array() {
            Some(data) => data.iter().map(|item| item["content"].clone()).collect(),
            None => json["error"]["param"].clone(),
        };
        assert_eq!((answer.status(), told), (status, expected), "{query}: {json}");
        assert_eq!(json["has_more"].as_bool().unwrap_or_default(), query.ends_with("limit=2"));
    }

    let missing = async |key: &str, asked: Request<Body>, param: &str| {
        let answer = ask(app.clone(), of(key, asked)).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status(), &error["code"]), (404, &json!("response_not_found")), "{error}");
        assert_eq!(error["param"], param);
        assert!(error["message"].as_str().unwrap().contains("the router that made a response"), "{error}");
    };
    missing("second", request(Method::GET, &path), "response_id").await;
    missing("second", request(Method::DELETE, &path), "response_id").await;
    missing("second", request(Method::GET, &format!("{path}/input_items")), "response_id").await;
    let body = format!(r#"{{"input": "x", "previous_response_id": "{id}"}}"#);
    missing("second", post(PATH, body), "previous_response_id").await;
    let unkept = ask(app.clone(), of("first", post(PATH, r#"{"input": "x", "store": false}"#))).await.json();
    let unkept = format!("{PATH}/{}", unkept["id"].as_str().unwrap());
    missing("first", request(Method::GET, &unkept), "response_id").await;

    let deleted = ask(app.clone(), of("first", request(Method::DELETE, &path))).await.json();
    assert_eq!(deleted, json!({"id": id, "object": "response", "deleted": true}));
    missing("first", request(Method::GET, &path), "response_id").await;
}

#[tokio::test]
async fn what_must_be_of_a_schema() {
    let cluster = Cluster::new(&["tiny"], Some("{{ messages[0].content }}"), agent_says("x"));
    let schema = r#""text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "integer"}, "strict": true}}"#;
    let json = create(&cluster.app(), &format!(r#""input": "x", {schema}"#)).await;
    assert_eq!(json["text"]["format"]["schema"], json!({"type": "integer"}));
    let grammar = cluster.asked_once().rules.grammar.clone();
    assert_eq!(grammar, Some(Grammar::JsonSchema(r#"{"type":"integer"}"#.to_owned())));
}

#[tokio::test]
async fn refusals() {
    for (fields, code, param, message) in [
        ("", "invalid_value", "input", "input is empty"),
        (r#""input": []"#, "invalid_value", "input", "input is empty"),
        (r#""input": 5"#, "invalid_type", "input", "5"),
        (r#""input": [{"type": "item_reference", "id": "x"}]"#, "invalid_type", "input[0]", "item_reference"),
        (r#""input": [{"role": "user"}]"#, "invalid_type", "input[0].content", "missing field `content`"),
        (
            r#""input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]"#,
            "invalid_type",
            "input[0]",
            "input_image",
        ),
        (r#""input": "x", "truncation": "auto""#, "unsupported_parameter", "truncation", "auto"),
        (r#""input": "x", "background": true"#, "unsupported_parameter", "background", "true"),
        (r#""input": "x", "include": ["x"]"#, "unsupported_parameter", "include[0]", "\"x\""),
        (r#""input": "x", "conversation": "c""#, "unsupported_parameter", "conversation", "c"),
        (r#""input": "x", "top_logprobs": 2"#, "invalid_value", "top_logprobs", "2"),
        (
            r#""input": "x", "tools": [{"type": "web_search"}]"#,
            "unsupported_parameter",
            "tools[0].type",
            "web_search",
        ),
        (r#""input": "x", "tool_choice": "some""#, "invalid_type", "tool_choice", "some"),
        (r#""input": "x", "tool_choice": "required""#, "invalid_value", "tool_choice", "there are no tools"),
        (r#""input": "x", "temperature": 3"#, "invalid_value", "temperature", "temperature is 3"),
        (
            r#""input": "x", "max_output_tokens": 0"#,
            "invalid_value",
            "max_output_tokens",
            "max_output_tokens is 0; it must be from 1",
        ),
        (r#""input": "x", "max_output_tokens": 9.5"#, "invalid_type", "max_output_tokens", "9.5"),
        (
            r#""input": "x", "max_output_tokens": 100000"#,
            "context_length_exceeded",
            "",
            "and max_output_tokens is 100000, but",
        ),
        (
            r#""input": "x", "reasoning": {"effort": "low"}"#,
            "unsupported_parameter",
            "reasoning.effort",
            "low",
        ),
        (
            r#""input": "x", "tools": [{"type": "function", "name": "a b"}]"#,
            "invalid_value",
            "tools[0].name",
            "tools[0].name is \"a b\"",
        ),
        (
            r#""input": "x", "tools": [{"type": "function", "name": "a", "parameters": 1}]"#,
            "invalid_value",
            "tools[0].parameters",
            "tools[0].parameters must be a JSON schema",
        ),
    ] {
        let cluster = Cluster::new(&["tiny"], Some(AGENT), agent_says("x"));
        let answer = ask(cluster.app(), post(PATH, format!("{{{fields}}}"))).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status(), &error["code"]), (400, &json!(code)), "{fields}: {error}");
        assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{fields}: {error}");
        assert!(error["message"].as_str().unwrap().contains(message), "{fields}: {error}");
    }
}
