//! Several answers to a prompt, and how probable their tokens were.

use crate::support::*;
use serde_json::{Value, json};
use types::*;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const TEMPLATE: &str = "{% for m in messages %}{{ m.content }}{% endfor %}";

fn chat(more: Value) -> String {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body.to_string()
}

#[tokio::test]
async fn each_choice_is_drawn_on_its_own() {
    let script = || Script::Each(vec![says("a"), says("bb"), says("ccc")]);
    for (path, body) in [
        (CHAT, chat(json!({"n": 3, "seed": 7}))),
        (TEXT, json!({"prompt": "Hi", "n": 3, "seed": 7}).to_string()),
    ] {
        let cluster = Cluster::new(&["m"], Some(TEMPLATE), script());
        let json = ask(cluster.app(), post(path, body)).await.json();
        let text = |choice: &Value| {
            choice["text"].as_str().or_else(|| choice["message"]["content"].as_str()).unwrap().to_owned()
        };
        let texts: Vec<String> = json["choices"].as_array().unwrap().iter().map(text).collect();
        assert_eq!(texts, ["a", "bb", "ccc"]);
        // The prompt counts once, all answers count.
        assert_eq!(
            (&json["usage"]["prompt_tokens"], &json["usage"]["completion_tokens"]),
            (&20.into(), &9.into())
        );
        let asked = cluster.asked.lock().unwrap();
        let mut seeds: Vec<u64> = asked.iter().map(|request| request.sampling.seed).collect();
        assert_eq!(seeds[0], 7, "the first is what one alone would be");
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 3);
        assert!(asked.iter().all(|request| request.prompt == asked[0].prompt));
    }
    let cluster = Cluster::new(&["m"], Some(TEMPLATE), script());
    let body = chat(json!({"n": 3, "stream": true, "stream_options": {"include_usage": true}}));
    let events = ask(cluster.app(), post(CHAT, body)).await.events();
    for (index, text) in ["a", "bb", "ccc"].iter().enumerate() {
        let of_choice: Vec<&Value> = events
            .iter()
            .map(|event| &event["choices"][0])
            .filter(|choice| choice["index"] == index)
            .collect();
        assert_eq!(of_choice[0]["delta"]["role"], "assistant");
        let joined: String =
            of_choice.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!((joined.as_str(), &of_choice.last().unwrap()["finish_reason"]), (*text, &"stop".into()));
    }
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 9);
}

#[tokio::test]
async fn prompts_and_choices_are_numbered() {
    let script = Script::Each(vec![says("a"), says("b"), says("c"), says("d")]);
    let cluster = Cluster::new(&["m"], None, script);
    let body = json!({"prompt": ["x", "y"], "n": 2}).to_string();
    let json = ask(cluster.app(), post(TEXT, body)).await.json();
    let choices = json["choices"].as_array().unwrap();
    let found: Vec<(u64, &str)> = choices
        .iter()
        .map(|choice| (choice["index"].as_u64().unwrap(), choice["text"].as_str().unwrap()))
        .collect();
    assert_eq!(found, [(0, "a"), (1, "b"), (2, "c"), (3, "d")]);
    assert_eq!(
        (&json["usage"]["prompt_tokens"], &json["usage"]["completion_tokens"]),
        (&40.into(), &8.into())
    );
    let asked = cluster.asked.lock().unwrap();
    let prompts: Vec<u32> = asked.iter().map(|request| request.prompt[0]).collect();
    assert_eq!(prompts, [120, 120, 121, 121]);
}

#[tokio::test]
async fn the_best_are_the_most_probable() {
    let script = Script::Each(vec![says_with("low", -3.0), says_with("best", -0.1), says_with("good", -1.0)]);
    let cluster = Cluster::new(&["m"], None, script);
    let json =
        ask(cluster.app(), post(TEXT, json!({"prompt": "x", "n": 2, "best_of": 3}).to_string())).await.json();
    let texts: Vec<&str> =
        json["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["best", "good"]);
    assert_eq!(json["usage"]["completion_tokens"], 4 + 5 + 5, "what was drawn in vain counts");
    assert!(json["choices"][0]["logprobs"].is_null(), "nobody asked");
    assert_eq!(
        cluster.asked.lock().unwrap()[0].report,
        TokenReport { logprobs: Some(0), prompt_logprobs: None }
    );
    let check = async |body: Value, param: &str, message: &str| {
        let answer = ask(cluster.app(), post(TEXT, body.to_string())).await;
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status(), &error["param"]), (400, &param.into()), "{error}");
        assert!(error["message"].as_str().unwrap().contains(message), "{error}");
    };
    check(json!({"prompt": "x", "n": 3, "best_of": 2}), "best_of", "best_of is 2; it must be from 3 to 128")
        .await;
    check(json!({"prompt": "x", "best_of": 2, "stream": true}), "best_of", "equal in a stream").await;
    check(json!({"prompt": ["x", "y"], "n": 65}), "n", "n is 65 for 2 prompts; at most 128").await;
}

/// "é" in two tokens, then "a", each with two alternatives.
fn told() -> Vec<TokenEvent> {
    let logprobs =
        vec![probable(-0.5, &[(0xc3, -0.5), (97, -1.5)]), probable(-2.0, &[(98, -0.25), (97, -1.0)])];
    vec![
        TokenEvent::Tokens { index: 0, tokens: vec![0xc3, 0xa9], logprobs },
        TokenEvent::Tokens { index: 2, tokens: vec![97], logprobs: vec![probable(f32::NEG_INFINITY, &[])] },
        finished(FinishReason::Stop, 4),
    ]
}

#[tokio::test]
async fn a_chat_tells_of_its_tokens() {
    let token = |token: &str, logprob: f64, bytes: &[u8], top: Value| json!({"token": token, "logprob": logprob, "bytes": bytes, "top_logprobs": top});
    let top =
        |token: &str, logprob: f64, byte: u8| json!({"token": token, "logprob": logprob, "bytes": [byte]});
    let expected = [
        token("\u{fffd}", -0.5, &[0xc3], json!([top("\u{fffd}", -0.5, 0xc3), top("a", -1.5, 97)])),
        token("\u{fffd}", -2.0, &[0xa9], json!([top("b", -0.25, 98), top("a", -1.0, 97)])),
        token("a", -9999.0, &[97], json!([])),
    ];
    let cluster = Cluster::new(&["m"], Some(TEMPLATE), Script::Events(told()));
    let json =
        ask(cluster.app(), post(CHAT, chat(json!({"logprobs": true, "top_logprobs": 2})))).await.json();
    assert_eq!(json["choices"][0]["logprobs"], json!({"content": expected, "refusal": null}));
    assert_eq!(cluster.asked_once().report, TokenReport { logprobs: Some(2), prompt_logprobs: None });
    let body = chat(json!({"logprobs": true, "top_logprobs": 2, "stream": true}));
    let events = ask(cluster.app(), post(CHAT, body)).await.events();
    let streamed = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(streamed.flatten().cloned().collect::<Vec<_>>(), expected);
    // They come with their text.
    let of_text = events.iter().find(|event| event["choices"][0]["delta"]["content"] == "é").unwrap();
    assert_eq!(of_text["choices"][0]["logprobs"]["content"].as_array().unwrap().len(), 2);
    let answer = ask(cluster.app(), post(CHAT, chat(json!({"top_logprobs": 2})))).await;
    assert_eq!((answer.status(), &answer.json()["error"]["param"]), (400, &"top_logprobs".into()));
    let answer = ask(cluster.app(), post(CHAT, chat(json!({"logprobs": true, "top_logprobs": 21})))).await;
    assert_eq!((answer.status(), &answer.json()["error"]["param"]), (400, &"top_logprobs".into()));
}

#[tokio::test]
async fn tokens_of_a_stop_string_are_not_told() {
    let cluster = Cluster::new(&["m"], None, Script::Events(says_with("one END two", -1.0)));
    for stream in [false, true] {
        let body = json!({"prompt": "x", "stop": "END", "logprobs": 0, "stream": stream}).to_string();
        let answer = ask(cluster.app(), post(TEXT, body)).await;
        let choices = if stream { answer.events() } else { vec![answer.json()] };
        let tokens = choices.iter().filter_map(|event| event["choices"][0]["logprobs"]["tokens"].as_array());
        let tokens: Vec<&str> = tokens.flatten().map(|token| token.as_str().unwrap()).collect();
        assert_eq!(tokens, ["o", "n", "e", " "]);
    }
    let body = json!({"prompt": "x", "stop": "END", "include_stop_str_in_output": true}).to_string();
    let json = ask(cluster.app(), post(TEXT, body)).await.json();
    assert_eq!(
        (&json["choices"][0]["text"], &json["choices"][0]["finish_reason"]),
        (&"one END".into(), &"stop".into())
    );
}

/// The prompt "ab", as the engine tells of it, and one token.
fn echoed() -> Vec<TokenEvent> {
    vec![
        TokenEvent::Prompt { index: 0, logprobs: vec![None] },
        TokenEvent::Prompt { index: 1, logprobs: vec![Some(probable(-0.5, &[(99, -0.25)]))] },
        TokenEvent::Started { cached_tokens: 0 },
        TokenEvent::Tokens { index: 0, tokens: vec![99], logprobs: vec![probable(-0.125, &[(99, -0.125)])] },
        finished(FinishReason::Length, 1),
    ]
}

/// What lm-eval's `local-completions` asks for.
#[tokio::test]
async fn prompts_are_echoed_with_their_logprobs() {
    let logprobs = |tokens: usize| {
        let all = json!({
            "tokens": ["a", "b", "c"], "token_logprobs": [null, -0.5, -0.125],
            "top_logprobs": [null, {"b": -0.5, "c": -0.25}, {"c": -0.125}], "text_offset": [0, 1, 2],
        });
        let cut = all
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, values)| (name.clone(), json!(values.as_array().unwrap()[..tokens])));
        Value::Object(cut.collect())
    };
    for (max_tokens, text, completion_tokens) in [(1, "abc", 1), (0, "ab", 0)] {
        for prompt in [json!([[97, 98]]), json!("ab"), json!([97, 98])] {
            let cluster = Cluster::new(&["m"], None, Script::Events(echoed()));
            let body = json!({"prompt": prompt, "echo": true, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0, "seed": 1});
            let json = ask(cluster.app(), post(TEXT, body.to_string())).await.json();
            let expected = json!({"index": 0, "text": text, "logprobs": logprobs(text.len()), "finish_reason": "length"});
            assert_eq!(json["choices"], json!([expected]));
            assert_eq!(json["usage"]["completion_tokens"], completion_tokens);
            let asked = cluster.asked_once();
            assert_eq!(asked.report, TokenReport { logprobs: Some(1), prompt_logprobs: Some(1) });
            assert_eq!(asked.max_tokens, 1);
            let mut body = body;
            body["stream"] = true.into();
            let cluster = Cluster::new(&["m"], None, Script::Events(echoed()));
            let events = ask(cluster.app(), post(TEXT, body.to_string())).await.events();
            let joined: String =
                events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
            assert_eq!(joined, text);
            for field in ["tokens", "token_logprobs", "text_offset"] {
                let joined =
                    events.iter().filter_map(|event| event["choices"][0]["logprobs"][field].as_array());
                assert_eq!(Value::Array(joined.flatten().cloned().collect()), logprobs(text.len())[field]);
            }
        }
    }
    let cluster = Cluster::new(&["m"], None, Script::Events(says("c")));
    let json = ask(cluster.app(), post(TEXT, json!({"prompt": "ab", "echo": true}).to_string())).await.json();
    assert_eq!((&json["choices"][0]["text"], &json["choices"][0]["logprobs"]), (&"abc".into(), &Value::Null));
    let answer = ask(cluster.app(), post(TEXT, json!({"prompt": "ab", "max_tokens": 0}).to_string())).await;
    assert_eq!((answer.status(), &answer.json()["error"]["param"]), (400, &"max_tokens".into()));
}

#[tokio::test]
async fn prompts_are_told_of_as_vllm_does() {
    let expected = json!([null, {
        "98": {"logprob": -0.5, "rank": null, "decoded_token": "b"},
        "99": {"logprob": -0.25, "rank": 1, "decoded_token": "c"},
    }]);
    let cluster = Cluster::new(&["m"], Some("ab"), Script::Events(echoed()));
    let json = ask(cluster.app(), post(TEXT, json!({"prompt": "ab", "prompt_logprobs": 1}).to_string()))
        .await
        .json();
    assert_eq!(json["choices"][0]["prompt_logprobs"], expected);
    assert_eq!(json["choices"][0]["text"], "c");
    let json = ask(cluster.app(), post(CHAT, chat(json!({"prompt_logprobs": 1})))).await.json();
    assert_eq!(json["prompt_logprobs"], expected);
}

#[tokio::test]
async fn special_tokens_may_show() {
    let events = vec![
        TokenEvent::Tokens { index: 0, tokens: vec![97, 256, 98], logprobs: Vec::new() },
        finished(FinishReason::Stop, 4),
    ];
    for (skip, text) in [(true, "ab"), (false, "a<|im_start|>b")] {
        let cluster = Cluster::new(&["m"], None, Script::Events(events.clone()));
        let body = json!({"prompt": "x", "skip_special_tokens": skip}).to_string();
        assert_eq!(ask(cluster.app(), post(TEXT, body)).await.json()["choices"][0]["text"], text);
    }
}
