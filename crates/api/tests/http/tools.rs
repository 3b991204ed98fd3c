//! Tools: told to the model, called by it, and answered.

use crate::support::*;
use api::{ApiSettings, ToolFormat};
use serde_json::{Value, json};
use types::*;

const CHAT: &str = "/v1/chat/completions";
/// In the style of Qwen 2.5.
const QWEN: &str = "{% if tools %}{% for tool in tools %}<tools>{{ tool | tojson }}</tools>{% endfor %}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}{% for call in m.tool_calls %}<tool_call>{\"name\": \"{{ call.function.name }}\", \"arguments\": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";
const PLAIN: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";
const CALL: &str = "Let me look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>";

fn tools() -> Value {
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    let tool = |name: &str, more: Value| {
        let mut function = json!({"name": name, "description": "d"});
        function.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"type": "function", "function": function})
    };
    json!([tool("weather", json!({"parameters": schema})), tool("time", json!({}))])
}

fn body(more: Value) -> String {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "tools": tools()});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body.to_string()
}

fn prompt_of(cluster: &Cluster) -> String {
    let text = |token: &u32| match *token {
        256 => "<|im_start|>".as_bytes().to_vec(),
        257 => "<|im_end|>".as_bytes().to_vec(),
        258 => "<s>".as_bytes().to_vec(),
        byte => vec![byte as u8],
    };
    String::from_utf8(cluster.asked_once().prompt.iter().flat_map(text).collect()).unwrap()
}

#[tokio::test]
async fn calls_are_found_in_the_answer() {
    let cluster = Cluster::new(&["m"], Some(QWEN), Script::Events(says(CALL)));
    let answer = ask(cluster.app(), post(CHAT, body(json!({})))).await;
    assert_eq!(answer.status(), 200, "{}", answer.text);
    let json = answer.json();
    let (message, calls) = (&json["choices"][0]["message"], &json["choices"][0]["message"]["tool_calls"]);
    assert_eq!(json["choices"][0]["finish_reason"], "tool_calls");
    assert_eq!(message["content"], "Let me look.");
    assert_eq!((&calls[0]["type"], &calls[0]["function"]["name"]), (&"function".into(), &"weather".into()));
    assert_eq!(calls[0]["function"]["arguments"], "{\"city\": \"Köln\"}");
    assert_eq!(
        (&calls[1]["function"]["name"], &calls[1]["function"]["arguments"]),
        (&"time".into(), &"{}".into())
    );
    let ids: Vec<&str> = (0..2).map(|call| calls[call]["id"].as_str().unwrap()).collect();
    assert!(ids[0] != ids[1] && ids.iter().all(|id| id.starts_with("call_") && id.len() == 29), "{ids:?}");
    // The model was told, and is free.
    let prompt = prompt_of(&cluster);
    assert!(
        prompt.starts_with("<tools>{\"type\": \"function\", \"function\": {\"name\": \"weather\""),
        "{prompt}"
    );
    assert_eq!(cluster.asked_once().rules, OutputRules::default());
}

#[tokio::test]
async fn calls_are_streamed_as_openai_streams_them() {
    let cluster = Cluster::new(&["m"], Some(QWEN), Script::Events(says(CALL)));
    let answer = ask(cluster.app(), post(CHAT, body(json!({"stream": true})))).await;
    let events = answer.events();
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]).collect();
    assert_eq!(*deltas[0], json!({"role": "assistant", "content": ""}));
    let content: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(content, "Let me look.");
    let calls: Vec<&Value> =
        deltas.iter().filter_map(|delta| delta.get("tool_calls").map(|calls| &calls[0])).collect();
    for (index, name, arguments) in [(0, "weather", "{\"city\": \"Köln\"}"), (1, "time", "{}")] {
        let of_call: Vec<&&Value> = calls.iter().filter(|call| call["index"] == index).collect();
        let first = of_call[0];
        assert!(first["id"].as_str().unwrap().starts_with("call_"));
        assert_eq!(first["type"], "function");
        assert_eq!(first["function"], json!({"name": name, "arguments": ""}));
        assert!(
            of_call[1..]
                .iter()
                .all(|call| call.get("id").is_none() && call["function"].get("name").is_none())
        );
        let joined: String =
            of_call.iter().map(|call| call["function"]["arguments"].as_str().unwrap()).collect();
        assert_eq!(joined, arguments);
    }
    // Token by token: the city's name did not come in one piece.
    assert!(calls.len() > 10, "{}", calls.len());
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    // An answer that begins with a call has no content.
    let cluster = Cluster::new(&["m"], Some(QWEN), Script::Events(says(&CALL["Let me look.\n".len()..])));
    let events = ask(cluster.app(), post(CHAT, body(json!({"stream": true})))).await.events();
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": null}));
}

#[tokio::test]
async fn one_call_may_be_the_last() {
    for stream in [false, true] {
        let cluster = Cluster::new(&["m"], Some(QWEN), Script::Events(says(CALL)));
        let body = body(json!({"parallel_tool_calls": false, "stream": stream}));
        let answer = ask(cluster.app(), post(CHAT, body)).await;
        assert_eq!(*cluster.cancelled.borrow(), 1, "the rest is not generated");
        assert!(answer.text.contains("\"finish_reason\":\"tool_calls\"") && answer.text.contains("weather"));
        assert!(!answer.text.contains("\"time\""), "{}", answer.text);
    }
}

#[tokio::test]
async fn a_call_that_is_none_is_content() {
    for text in
        ["<tool_call>{\"nam\"", "<tool_call> hello", "no call </tool_call>", "{\"name\": \"weather\"}"]
    {
        for stream in [false, true] {
            let cluster = Cluster::new(&["m"], Some(QWEN), Script::Events(says(text)));
            let answer = ask(cluster.app(), post(CHAT, body(json!({"stream": stream})))).await;
            let (content, reason) = if stream {
                let events = answer.events();
                let content =
                    events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
                let reason = events.last().unwrap()["choices"][0]["finish_reason"].clone();
                (content.collect(), reason)
            } else {
                let choice = answer.json()["choices"][0].clone();
                (choice["message"]["content"].as_str().unwrap().to_owned(), choice["finish_reason"].clone())
            };
            assert_eq!((content.as_str(), reason), (text, "stop".into()));
        }
    }
}

#[tokio::test]
async fn none_means_none() {
    let cluster = Cluster::new(&["m"], Some(QWEN), Script::Events(says(CALL)));
    let answer = ask(cluster.app(), post(CHAT, body(json!({"tool_choice": "none"})))).await;
    let choice = &answer.json()["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&CALL.into(), &"stop".into()));
    assert!(!prompt_of(&cluster).contains("weather"));
}

#[tokio::test]
async fn forced_calls_have_a_grammar() {
    let grammar = async |more: Value| {
        let cluster = Cluster::new(&["m"], Some(QWEN), Script::Events(says("")));
        let answer = ask(cluster.app(), post(CHAT, body(more))).await;
        assert_eq!(answer.status(), 200, "{}", answer.text);
        match cluster.asked_once().rules.grammar.clone() {
            Some(Grammar::Lark(lark)) => lark,
            other => format!("{other:?}"),
        }
    };
    let required = grammar(json!({"tool_choice": "required"})).await;
    assert!(required.contains("mlx_call: mlx_call_0 | mlx_call_1"), "{required}");
    assert!(required.contains("%json {\"type\":\"object\",\"properties\":{\"city\""), "{required}");
    assert!(required.contains("mlx_call)*"), "{required}");
    let one = grammar(json!({"tool_choice": "required", "parallel_tool_calls": false})).await;
    assert!(!one.contains(")*"), "{one}");
    let named = json!({"tool_choice": {"type": "function", "function": {"name": "time"}}});
    let named = grammar(named).await;
    assert!(named.contains("time") && !named.contains("weather") && !named.contains(")*"), "{named}");
    let mut strict = tools();
    strict[0]["function"]["strict"] = true.into();
    let strict = grammar(json!({"tools": strict})).await;
    assert!(strict.contains("mlx_head[lazy]") && strict.contains("\"properties\":{\"city\""), "{strict}");
    assert_eq!(grammar(json!({"tool_choice": "auto"})).await, "None");
    // A text of a shape, or a call; where there must be a call, there is no text.
    let object = json!({"type": "json_object"});
    let either = grammar(json!({"response_format": object})).await;
    assert!(either.contains("mlx_answer: mlx_text | \"<tool_call>\" "), "{either}");
    assert_eq!(grammar(json!({"response_format": object, "tool_choice": "required"})).await, required);
}

#[tokio::test]
async fn answers_go_back_through_the_template() {
    let messages = json!([
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Köln\"}"}},
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]);
    let cluster = Cluster::new(&["m"], Some(QWEN), Script::Events(says("Rain.")));
    let answer = ask(cluster.app(), post(CHAT, body(json!({"messages": messages})))).await;
    assert_eq!(answer.status(), 200, "{}", answer.text);
    let prompt = prompt_of(&cluster);
    let expected = "<|im_start|>assistant\n<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\"}}</tool_call><|im_end|>\n<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n";
    assert!(prompt.ends_with(expected.trim_end()), "{prompt}");
    // A template that knows no tools gets them as text.
    let cluster = Cluster::new(&["m"], Some(PLAIN), Script::Events(says(CALL)));
    let answer = ask(cluster.app(), post(CHAT, body(json!({"messages": messages})))).await;
    assert_eq!(answer.json()["choices"][0]["finish_reason"], "tool_calls");
    let prompt = prompt_of(&cluster);
    assert!(
        prompt.starts_with("<|im_start|>system\n") && prompt.contains("\"name\":\"weather\""),
        "{prompt}"
    );
    let expected = "<|im_start|>assistant\n<tool_call>\n{\"name\":\"weather\",\"arguments\":{\"city\":\"Köln\"}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n";
    assert!(prompt.ends_with(expected.trim_end()), "{prompt}");
}

/// Markers that are special tokens show for as long as somebody looks for them; ids are as the model's template wants them.
#[tokio::test]
async fn markers_may_be_special_tokens() {
    let template = "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}{% if call.id|length != 9 %}{{ raise_exception('nine') }}{% endif %}{{ call.function.arguments|tojson }}{{ call.id }}{% endfor %}]{% elif m.role == 'tool' %}{{ m.tool_call_id }}{% else %}{{ m.content }}{% endif %}{% endfor %}{{ tools }}";
    let mut events = vec![TokenEvent::Tokens { index: 0, tokens: vec![259], logprobs: Vec::new() }];
    let text = "[{\"name\": \"time\", \"arguments\": {}}]";
    events.push(TokenEvent::Tokens {
        index: 1,
        tokens: text.bytes().map(u32::from).collect(),
        logprobs: Vec::new(),
    });
    events.push(finished(FinishReason::Stop, 50));
    let cluster = Cluster::with_special(&["m"], Some(template), Script::Events(events), &["[TOOL_CALLS]"]);
    let messages = json!([
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [{"id": "call_long", "function": {"name": "time", "arguments": ""}},
            {"id": "another_call", "function": {"name": "time", "arguments": {"a": 1}}}]},
        {"role": "tool", "tool_call_id": "another_call", "content": "x"},
    ]);
    let required = body(json!({"messages": messages, "tool_choice": "required"}));
    let answer = ask(cluster.app(), post(CHAT, required)).await;
    assert_eq!(answer.status(), 200, "{}", answer.text);
    let call = &answer.json()["choices"][0]["message"]["tool_calls"][0];
    assert_eq!(call["function"]["name"], "time");
    let id = call["id"].as_str().unwrap();
    assert!(id.len() == 9 && id.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{id}");
    let Some(Grammar::Lark(lark)) = cluster.asked_once().rules.grammar.clone() else { panic!("a grammar") };
    assert!(lark.contains("mlx_answer: <[259]> \"[\" mlx_call"), "{lark}");
    // Without tools nobody looks for the marker, and it has no text.
    let plain = json!({"messages": [{"role": "user", "content": "Hi"}]}).to_string();
    let cluster = Cluster::with_special(&["m"], Some(template), cluster.script.clone(), &["[TOOL_CALLS]"]);
    let answer = ask(cluster.app(), post(CHAT, plain)).await;
    assert_eq!(answer.json()["choices"][0]["message"]["content"], text);
}

#[tokio::test]
async fn a_format_can_be_set_by_hand() {
    let cluster =
        Cluster::new(&["m"], Some(QWEN), Script::Events(says(r#"{"name": "time", "parameters": {}}"#)));
    let tool_formats = [("m".to_owned(), ToolFormat::Llama)].into();
    let app = cluster.app_with(ApiSettings { tool_formats, ..ApiSettings::default() });
    let json = ask(app, post(CHAT, body(json!({})))).await.json();
    assert_eq!(json["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "time");
}

#[tokio::test]
async fn what_cannot_be_meant_is_refused() {
    let check = async |more: Value, code: &str, param: &str, message: &str| {
        let cluster = Cluster::new(&["m"], Some(QWEN), Script::Events(says("")));
        let answer = ask(cluster.app(), post(CHAT, body(more))).await;
        let error = answer.json()["error"].clone();
        assert_eq!(
            (answer.status(), &error["code"], &error["param"]),
            (400, &code.into(), &param.into()),
            "{error}"
        );
        assert!(error["message"].as_str().unwrap().contains(message), "{error} lacks {message}");
        assert!(cluster.asked.lock().unwrap().is_empty());
    };
    let function = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
    check(json!({"tools": [{"type": "web_search"}]}), "invalid_type", "tools[0].type", "only \"function\"")
        .await;
    check(function(json!({})), "invalid_type", "tools[0].function.name", "missing field `name`").await;
    check(function(json!({"name": "a b"})), "invalid_value", "tools[0].function.name", "\"a b\"").await;
    let schema = json!({"name": "a", "parameters": 5});
    check(function(schema), "invalid_value", "tools[0].function.parameters", "a JSON schema").await;
    let twice = json!({"tools": [tools()[0], tools()[0]]});
    check(twice, "invalid_value", "tools[1].function.name", "as another tool's is").await;
    let many: Vec<Value> = (0..129)
        .map(|index| json!({"type": "function", "function": {"name": format!("t{index}")}}))
        .collect();
    check(json!({"tools": many}), "invalid_value", "tools", "129 entries").await;
    check(json!({"tool_choice": "maybe"}), "invalid_type", "tool_choice", "\"maybe\" is not allowed").await;
    check(json!({"tools": [], "tool_choice": "required"}), "invalid_value", "tool_choice", "no tools").await;
    let named = json!({"tool_choice": {"type": "function", "function": {"name": "x"}}});
    check(named, "invalid_value", "tool_choice", "the tools are: weather, time").await;
    let call = json!({"function": {"name": "x", "arguments": 5}});
    let messages = json!([{"role": "assistant", "tool_calls": [call]}]);
    check(
        json!({"messages": messages}),
        "invalid_value",
        "messages[0].tool_calls[0].function.arguments",
        "5",
    )
    .await;
    let messages = json!([{"role": "user", "content": "", "tool_calls": [{"function": {"name": "x"}}]}]);
    check(json!({"messages": messages}), "invalid_value", "messages[0].tool_calls", "only assistant").await;
}
