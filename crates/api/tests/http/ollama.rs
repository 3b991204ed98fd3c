//! Ollama's API over a scripted cluster.

use crate::support::*;
use serde_json::json;
use types::*;

fn ok() -> Script {
    Script::Events(vec![tokens(0, "ab"), finished(FinishReason::Length, 2)])
}

#[tokio::test]
async fn models() {
    let cluster = Cluster::new(&["org/tiny", "other"], Some("{{ messages }}"), ok());
    let tags = ask(cluster.app(), get("/api/tags")).await.json();
    let names: Vec<_> = tags["models"].as_array().unwrap().iter().map(|model| &model["model"]).collect();
    assert_eq!(names, ["org/tiny", "other"]);
    assert_eq!(tags["models"][0]["modified_at"], "2023-11-14T22:13:20Z");
    assert_eq!(tags["models"][0]["digest"], format!("{:032x}", cluster.models[0].root.0));
    for field in ["model", "name"] {
        let answer = ask(cluster.app(), post("/api/show", format!(r#"{{"{field}": "org/tiny"}}"#))).await;
        let shown = answer.json();
        assert_eq!((answer.status(), &shown["template"]), (200, &json!("{{ messages }}")));
        assert_eq!(shown["model_info"]["mlx.context_length"], CONTEXT);
    }
    let answer = ask(cluster.app(), post("/api/show", r#"{"model": "third"}"#)).await;
    let error = "the model \"third\" does not exist; this cluster serves: org/tiny, other";
    assert_eq!((answer.status(), answer.json()), (404, json!({"error": error})));
    let version = ask(cluster.app(), get("/api/version")).await.json();
    assert_eq!(version, json!({"version": env!("CARGO_PKG_VERSION")}));
}

const SAID: &str =
    r#"<think>Hm.</think>So: <tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>"#;
const CHAT: &str = r#""messages": [{"role": "user", "content": "2+3?"}],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]"#;

fn lines(text: &str) -> Vec<serde_json::Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn chats() {
    let cluster = Cluster::new(&["tiny"], Some(AGENT), agent_says(SAID));
    let whole = ask(cluster.app(), post("/api/chat", format!(r#"{{{CHAT}, "stream": false}}"#))).await.json();
    let message = &whole["message"];
    assert_eq!((&message["role"], &message["content"]), (&json!("assistant"), &json!("So:")));
    assert_eq!(message["thinking"], "Hm.");
    let call = json!({"name": "add", "arguments": {"a": 2, "b": 3}});
    assert_eq!(message["tool_calls"][0]["function"], call);
    assert_eq!((&whole["done"], &whole["done_reason"]), (&json!(true), &json!("stop")));
    assert_eq!((&whole["prompt_eval_count"], &whole["eval_count"]), (&json!(20), &json!(SAID.len() + 1)));
    assert!(whole["total_duration"].as_u64().unwrap() > 0);

    // Streamed unless told otherwise.
    let answer = ask(cluster.app(), post("/api/chat", format!("{{{CHAT}}}"))).await;
    assert_eq!(answer.header("content-type"), "application/x-ndjson");
    let lines = lines(&answer.text);
    let joined = |field: &str| {
        let pieces = lines.iter().filter_map(|line| line["message"][field].as_str());
        pieces.collect::<String>()
    };
    assert_eq!((joined("content"), joined("thinking")), ("So:".to_owned(), "Hm.".to_owned()));
    let calls: Vec<_> = lines.iter().filter_map(|line| line["message"]["tool_calls"].as_array()).collect();
    assert_eq!((calls.len(), &calls[0][0]["function"]), (1, &call));
    assert!(lines.iter().rev().skip(1).all(|line| line["done"] == false && line.get("eval_count").is_none()));
    assert_eq!(lines.last().unwrap()["eval_count"], SAID.len() + 1);
}

#[tokio::test]
async fn texts() {
    let cluster = Cluster::new(&["tiny"], Some(AGENT), ok());
    let check = async |fields: &str, prompt: &str| {
        let cluster = Cluster::new(&["tiny"], Some(AGENT), ok());
        let answer = ask(cluster.app(), post("/api/generate", format!(r#"{{"prompt": "a"{fields}}}"#))).await;
        let lines = lines(&answer.text);
        let text: String = lines.iter().filter_map(|line| line["response"].as_str()).collect();
        assert_eq!((text.as_str(), &lines.last().unwrap()["done_reason"]), ("ab", &json!("length")));
        assert_eq!(prompt_text(&cluster.asked_once()), prompt);
        cluster.asked_once()
    };
    check("", "user:a\nassistant:").await;
    check(r#", "system": "be""#, "system:be\nuser:a\nassistant:").await;
    check(r#", "raw": true"#, "a").await;
    let options = r#", "options": {"num_predict": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1,
        "seed": -1, "repeat_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": 0.5, "num_ctx": 4096},
        "keep_alive": "5m", "format": {"type": "integer"}, "think": false"#;
    let asked = check(options, "user:a\nassistant:").await;
    let sampling = &asked.sampling;
    assert_eq!((asked.max_tokens, sampling.temperature, sampling.top_k), (7, 0.5, 3));
    assert_eq!((sampling.top_p, sampling.min_p, sampling.seed), (0.5, 0.1, u64::MAX));
    assert_eq!((sampling.repetition_penalty, sampling.presence_penalty), (1.5, 0.25));
    assert_eq!(sampling.frequency_penalty, 0.5);
    assert!(asked.rules.grammar.is_some());
    let all = check(r#", "options": {"num_predict": -1}"#, "user:a\nassistant:").await;
    assert_eq!(all.max_tokens, CONTEXT - all.prompt.len() as u32);
    // What asks for nothing is whether the model is there.
    for path in ["/api/generate", "/api/chat"] {
        let loaded = ask(cluster.app(), post(path, r#"{"model": "tiny"}"#)).await.json();
        assert_eq!((&loaded["done"], &loaded["done_reason"]), (&json!(true), &json!("load")));
    }
    assert!(cluster.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn refusals() {
    for (path, fields, status, message) in [
        ("/api/chat", r#""model": "other", "messages": [{"role": "user", "content": "x"}]"#, 404, "other"),
        (
            "/api/chat",
            r#""messages": [{"role": "user", "content": "x", "images": ["x"]}]"#,
            400,
            "messages[0].images",
        ),
        ("/api/chat", r#""messages": [{"role": "user", "content": "x"}], "format": "xml""#, 400, "xml"),
        ("/api/chat", r#""messages": [{"role": "user", "content": "x"}], "think": 5"#, 400, "think is 5"),
        ("/api/generate", r#""prompt": "x", "suffix": "y""#, 400, "suffix"),
        ("/api/generate", r#""prompt": "x", "context": [1]"#, 400, "context"),
        ("/api/generate", r#""prompt": "x", "options": {"mirostat": 2}"#, 400, "options.mirostat"),
        ("/api/generate", r#""prompt": "x", "options": {"temperature": 9}"#, 400, "options.temperature is 9"),
        (
            "/api/generate",
            r#""prompt": "x", "options": {"temperature": "hot"}"#,
            400,
            "options.temperature: invalid type",
        ),
        ("/api/generate", r#""prompt": "x", "options": {"num_predict": 0}"#, 400, "options.num_predict is 0"),
        (
            "/api/generate",
            r#""prompt": "x", "options": {"num_predict": 100000}"#,
            400,
            "and options.num_predict is 100000",
        ),
        (
            "/api/generate",
            r#""prompt": "x", "options": {"repeat_penalty": 0}"#,
            400,
            "options.repeat_penalty is 0",
        ),
        ("/api/generate", r#""prompt": "x", "options": {"stop": [""]}"#, 400, "options.stop[0] has 0 bytes"),
        ("/api/generate", r#""prompt": "x", "think": "high""#, 400, "think = \"high\""),
        (
            "/api/chat",
            r#""messages": [{"role": "user", "content": 5}]"#,
            400,
            "messages[0].content: invalid type",
        ),
        ("/api/chat", r#""messages": [{"content": "x"}]"#, 400, "messages[0].role: missing"),
        ("/api/generate", r#""prompt": 5"#, 400, "5"),
    ] {
        let cluster = Cluster::new(&["tiny"], Some(AGENT), ok());
        let answer = ask(cluster.app(), post(path, format!("{{{fields}}}"))).await;
        let json = answer.json();
        assert_eq!(answer.status(), status, "{fields}: {json}");
        let error = json["error"].as_str().unwrap_or_else(|| panic!("{json}"));
        assert!(error.contains(message), "{fields}: {error}");
        assert_eq!(json.as_object().unwrap().len(), 1, "{json}");
    }
    let broken = finished(FinishReason::Failed(GenerateError::Engine { message: "x".to_owned() }), 1);
    let cluster = Cluster::new(&["tiny"], Some(AGENT), Script::Events(vec![tokens(0, "a"), broken]));
    let answer = ask(cluster.app(), post("/api/generate", r#"{"prompt": "x"}"#)).await;
    let last = lines(&answer.text).pop().unwrap();
    assert_eq!(last, json!({"error": "the engine failed: x"}));
}
