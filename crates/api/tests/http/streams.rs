//! Answers, whole and streamed, to the byte.

use crate::support::*;
use std::sync::Arc;
use types::*;

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Two events for "Hé!", the first with half of the é.
fn hello() -> Vec<TokenEvent> {
    let events = [
        TokenEvent::Tokens { index: 0, tokens: vec![72, 0xc3], logprobs: Vec::new() },
        TokenEvent::Tokens { index: 2, tokens: vec![0xa9], logprobs: Vec::new() },
        TokenEvent::Tokens { index: 3, tokens: vec![33], logprobs: Vec::new() },
        finished(FinishReason::Stop, 5),
    ];
    events.to_vec()
}

async fn answer(script: Script, path: &str, body: &str) -> Answer {
    ask(Cluster::new(&["org/tiny"], Some(TEMPLATE), script).app(), post(path, body.to_owned())).await
}

#[tokio::test]
async fn chat_stream() {
    let body = r#"{"model":"org/tiny","messages":[{"role":"user","content":"Hi"}],"stream":true,"stream_options":{"include_usage":true}}"#;
    let cluster = Cluster::new(&["org/tiny"], Some(TEMPLATE), Script::Events(hello()));
    let answer = ask(cluster.app(), post("/v1/chat/completions", body)).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.header("content-type"), "text/event-stream");
    assert_eq!(answer.header("x-mlx-route"), "mini ?n?code; affinity; matched=32");
    let head = r#""id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,"model":"org/tiny","system_fingerprint":"FP""#;
    let chunk = |delta: &str, reason: &str| {
        format!(
            r#"data: {{{head},"choices":[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}],"usage":null}}"#
        )
    };
    let fingerprint = format!("fp_{:012x}", cluster.models[0].root.0 >> 80);
    let expected = [
        chunk(r#"{"role":"assistant","content":""}"#, "null"),
        chunk(r#"{"content":"H"}"#, "null"),
        chunk(r#"{"content":"é"}"#, "null"),
        chunk(r#"{"content":"!"}"#, "null"),
        chunk("{}", "\"stop\""),
        format!(
            r#"data: {{{head},"choices":[],"usage":{{"prompt_tokens":20,"completion_tokens":5,"total_tokens":25,"prompt_tokens_details":{{"cached_tokens":8}}}}}}"#
        ),
        "data: [DONE]".to_owned(),
    ];
    let expected = expected.join("\n\n") + "\n\n";
    assert_eq!(answer.stable_text().replace(&fingerprint, "FP"), expected);

    // The prompt is the template's, with its special tokens as such, and the rest of the context may be filled.
    let asked = cluster.asked_once();
    let mut prompt = vec![256];
    prompt.extend("user\nHi".bytes().map(u32::from));
    prompt.extend([257, 10, 256]);
    prompt.extend("assistant\n".bytes().map(u32::from));
    assert_eq!(asked.prompt, prompt);
    assert_eq!(asked.max_tokens, CONTEXT - prompt.len() as u32);
    assert_eq!(asked.sampling.temperature, 1.0);
    assert_eq!(asked.id.to_string(), answer.header("x-request-id"));
}

#[tokio::test]
async fn chat_whole() {
    let body =
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":"Hi"}]}],"unheard_of":{"a":[1]}}"#;
    let answer = answer(Script::Events(hello()), "/v1/chat/completions", body).await;
    assert_eq!(answer.status(), 200, "{}", answer.text);
    let json = answer.json();
    assert_eq!(json["object"], "chat.completion");
    let message = serde_json::json!({"role": "assistant", "content": "Hé!", "refusal": null});
    let choice =
        serde_json::json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "stop"});
    assert_eq!(json["choices"], serde_json::json!([choice]));
    assert_eq!(json["usage"]["total_tokens"], 25);
    assert_eq!(json["usage"]["prompt_tokens_details"]["cached_tokens"], 8);
    assert_eq!(json["id"], format!("chatcmpl-{}", answer.header("x-request-id")));
    assert_eq!(answer.header("x-mlx-route"), "mini ?n?code; affinity; matched=32");
}

#[tokio::test]
async fn completions_stream_without_usage() {
    let script = Script::Events(vec![tokens(0, "ab"), finished(FinishReason::Length, 2)]);
    let answer = answer(script, "/v1/completions", r#"{"prompt":"x","stream":true}"#).await;
    let lines: Vec<&str> = answer.text.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(lines.len(), 3, "{}", answer.text);
    let choice = |line: &str| {
        let json: serde_json::Value = serde_json::from_str(&line["data: ".len()..]).unwrap();
        assert_eq!(json["object"], "text_completion");
        assert!(json.get("usage").is_none());
        json["choices"][0].clone()
    };
    let expected = serde_json::json!({"index": 0, "text": "ab", "logprobs": null, "finish_reason": null});
    assert_eq!(choice(lines[0]), expected);
    let expected = serde_json::json!({"index": 0, "text": "", "logprobs": null, "finish_reason": "length"});
    assert_eq!(choice(lines[1]), expected);
    assert_eq!(lines[2], "data: [DONE]");
}

#[tokio::test]
async fn several_prompts() {
    let script = Script::Events(vec![tokens(0, "ab"), finished(FinishReason::Length, 2)]);
    for (prompt, expected) in [
        (r#"["x","yz"]"#, vec![vec![120], vec![121, 122]]),
        ("[[1,2],[3]]", vec![vec![1, 2], vec![3]]),
        ("[7,8]", vec![vec![7, 8]]),
    ] {
        for stream in [false, true] {
            let cluster = Cluster::new(&["tiny"], None, script.clone());
            let body = format!(
                r#"{{"prompt":{prompt},"stream":{stream},"stream_options":{{"include_usage":true}}}}"#
            );
            let answer = ask(cluster.app(), post("/v1/completions", body)).await;
            assert_eq!(answer.status(), 200, "{}", answer.text);
            let asked = cluster.asked.lock().unwrap();
            assert_eq!(asked.iter().map(|request| request.prompt.clone()).collect::<Vec<_>>(), expected);
            assert!(asked.iter().all(|request| request.max_tokens == 16));
            let mut seeds: Vec<u64> = asked.iter().map(|request| request.sampling.seed).collect();
            seeds.dedup();
            assert_eq!(seeds.len(), expected.len(), "texts without a seed are drawn independently");
            let usage = if stream {
                let lines: Vec<&str> = answer.text.lines().filter(|line| !line.is_empty()).collect();
                assert_eq!(lines.len(), 2 * expected.len() + 2);
                for index in 0..expected.len() {
                    let of_choice =
                        |line: &&&str| line.contains(&format!("\"choices\":[{{\"index\":{index},"));
                    assert_eq!(lines.iter().filter(of_choice).count(), 2);
                }
                serde_json::from_str::<serde_json::Value>(&lines[lines.len() - 2]["data: ".len()..]).unwrap()
            } else {
                let json = answer.json();
                assert_eq!(json["choices"].as_array().unwrap().len(), expected.len());
                assert_eq!(json["choices"][expected.len() - 1]["text"], "ab");
                json
            };
            assert_eq!(usage["usage"]["completion_tokens"], 2 * expected.len());
        }
    }
}

#[tokio::test]
async fn stop_strings_cut_cancel_and_count() {
    for stream in [false, true] {
        let mut events = vec![TokenEvent::Started { cached_tokens: 1 }];
        events.extend(each_token("one END two"));
        events.push(finished(FinishReason::Length, 11));
        let cluster = Cluster::new(&["tiny"], None, Script::Events(events));
        let body = format!(
            r#"{{"prompt":"x","stream":{stream},"stream_options":{{"include_usage":true}},"stop":[" END","zzz"],"max_tokens":50}}"#
        );
        let answer = ask(cluster.app(), post("/v1/completions", body)).await;
        assert_eq!(*cluster.cancelled.borrow(), 1, "the rest is not generated");
        if stream {
            let texts: Vec<String> = answer
                .text
                .lines()
                .filter_map(|line| line.strip_prefix("data: {"))
                .map(|line| serde_json::from_str::<serde_json::Value>(&format!("{{{line}")).unwrap())
                .filter_map(|json| Some(json["choices"][0]["text"].as_str()?.to_owned()))
                .collect();
            // Nothing between "e" and the end: what was held back became a stop.
            assert_eq!(texts, ["o", "n", "e", ""]);
            assert!(answer.text.contains(r#""finish_reason":"stop""#));
            assert!(
                answer.text.contains(r#""prompt_tokens_details":{"cached_tokens":1}"#),
                "{}",
                answer.text
            );
        } else {
            let json = answer.json();
            assert_eq!(json["choices"][0]["text"], "one");
            assert_eq!(json["choices"][0]["finish_reason"], "stop");
            assert_eq!(json["usage"]["completion_tokens"], 7);
            assert_eq!(json["usage"]["prompt_tokens"], 1);
            assert_eq!(json["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
        }
    }
}

/// The end of a text releases what was held back, and events with several tokens stop at the right one.
#[tokio::test]
async fn stop_strings_at_the_edges() {
    let check = async |events: Vec<TokenEvent>, text: &str, reason: &str, completion_tokens: u64| {
        let body = r#"{"prompt":"x","stop":"END"}"#;
        let json = answer(Script::Events(events), "/v1/completions", body).await.json();
        assert_eq!(json["choices"][0]["text"], text);
        assert_eq!(json["choices"][0]["finish_reason"], reason);
        assert_eq!(json["usage"]["completion_tokens"], completion_tokens);
    };
    check(vec![tokens(0, "aEN"), finished(FinishReason::Length, 3)], "aEN", "length", 3).await;
    check(vec![tokens(0, "aENDbc"), finished(FinishReason::Length, 6)], "a", "stop", 4).await;
    check(vec![tokens(0, "END"), finished(FinishReason::Length, 3)], "", "stop", 3).await;
    check(vec![finished(FinishReason::Stop, 1)], "", "stop", 1).await;
}

#[tokio::test]
async fn a_failure_in_mid_stream_is_an_event() {
    let lost = GenerateError::NodeLost { tokens: 2, reason: "silent for 2 s".to_owned() };
    let check = async |events: Vec<TokenEvent>, status: u16, code: &str| {
        let body = r#"{"prompt":"x","stream":true}"#;
        let streamed = answer(Script::Events(events.clone()), "/v1/completions", body).await;
        assert_eq!(streamed.status(), 200);
        assert!(!streamed.text.contains("[DONE]"), "{}", streamed.text);
        let last = streamed.text.trim_end().lines().last().unwrap();
        let json: serde_json::Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(json["error"]["code"], code);
        let whole = answer(Script::Events(events), "/v1/completions", r#"{"prompt":"x"}"#).await;
        assert_eq!(whole.status(), status);
        assert_eq!(whole.json(), json, "the same error either way");
    };
    check(vec![tokens(0, "ab"), finished(FinishReason::Failed(lost), 2)], 502, "node_lost").await;
    check(vec![tokens(0, "ab"), finished(FinishReason::Cancelled, 2)], 503, "cancelled").await;
    check(vec![tokens(0, "ab")], 500, "engine_failed").await;
    check(vec![tokens(0, "ab"), tokens(3, "c")], 500, "engine_failed").await;
}

#[tokio::test(start_paused = true)]
async fn silent_streams_are_kept_alive() {
    use futures_util::StreamExt;
    use tower::ServiceExt;
    let cluster = Cluster::new(&["tiny"], None, Script::Hang(Vec::new()));
    let request = post("/v1/completions", r#"{"prompt":"x","stream":true}"#);
    let mut body = cluster.app().oneshot(request).await.unwrap().into_body().into_data_stream();
    let started = tokio::time::Instant::now();
    for turn in 1..4 {
        assert_eq!(body.next().await.unwrap().unwrap(), ": keep-alive\n\n");
        assert_eq!(started.elapsed().as_secs(), 15 * turn);
    }
    drop(body);
    assert_eq!(*cluster.cancelled.borrow(), 1);
}

#[tokio::test]
async fn parameters_arrive() {
    let cluster =
        Cluster::new(&["tiny"], Some(TEMPLATE), Script::Events(vec![finished(FinishReason::Stop, 1)]));
    let body = r#"{"model":"", "messages":[{"role":"user","content":"x","name":"n"}], "temperature":0.5,
        "top_p":0.9, "top_k":-1, "min_p":0.1, "repetition_penalty":1.1, "presence_penalty":-1,
        "frequency_penalty":1, "logit_bias":{"5":-100,"3":1.5}, "seed":-1, "stop":null, "stop_token_ids":[10],
        "ignore_eos":true, "max_completion_tokens":7, "user":"u", "n":1, "tools":[], "logprobs":false,
        "response_format":{"type":"text"}, "tool_choice":"none", "modalities":["text"]}"#;
    let answer = ask(cluster.app(), post("/v1/chat/completions", body)).await;
    assert_eq!(answer.status(), 200, "{}", answer.text);
    let asked = cluster.asked_once();
    let expected = SamplingDraft {
        temperature: 0.5,
        top_p: 0.9,
        top_k: 0,
        min_p: 0.1,
        repetition_penalty: 1.1,
        presence_penalty: -1.0,
        frequency_penalty: 1.0,
        logit_bias: vec![(3, 1.5), (5, -100.0)],
        seed: u64::MAX,
    };
    assert_eq!(*asked.sampling, expected);
    assert_eq!((asked.max_tokens, asked.ignore_eos), (7, true));
    assert_eq!(asked.stop_tokens, [10]);
    assert_eq!(asked.model, "tiny");
}

#[tokio::test]
async fn a_tokenizer_is_loaded_once() {
    let cluster = Cluster::new(&["a", "b"], None, Script::Events(vec![finished(FinishReason::Stop, 1)]));
    let app = cluster.app();
    let asks = (0..16).map(|turn| {
        let model = ["a", "b"][turn % 2];
        ask(app.clone(), post("/v1/completions", format!(r#"{{"model":"{model}","prompt":"x"}}"#)))
    });
    for answer in futures_util::future::join_all(asks).await {
        assert_eq!(answer.status(), 200);
    }
    assert_eq!(cluster.loads.load(std::sync::atomic::Ordering::Relaxed), 1);
}

/// Prompts large enough to be encoded elsewhere are encoded the same.
#[tokio::test]
async fn large_prompts() {
    let script = Script::Events(vec![finished(FinishReason::Stop, 1)]);
    let mut cluster = Arc::into_inner(Cluster::new(&["tiny"], None, script)).unwrap();
    cluster.models[0].context_tokens = 1 << 20;
    let cluster = Arc::new(cluster);
    let body = format!(r#"{{"prompt":"{}"}}"#, "é".repeat(10_000));
    assert_eq!(ask(cluster.app(), post("/v1/completions", body)).await.status(), 200);
    assert_eq!(cluster.asked_once().prompt, [0xc3, 0xa9].repeat(10_000));
}
