//! Every refusal: status, code, parameter, and words that say what to do.

use crate::support::*;
use api::{Access, ApiSettings};
use axum::{Router, body::Body, http::Request};
use types::*;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn ok() -> Script {
    Script::Events(vec![finished(FinishReason::Stop, 1)])
}

/// One request, one refusal: status, code, param (`""` for null) and a part of the message.
async fn check(
    app: Router,
    request: Request<Body>,
    status: u16,
    code: &str,
    param: &str,
    message: &str,
) -> Answer {
    let answer = ask(app, request).await;
    let json = answer.json();
    let error = &json["error"];
    assert_eq!(answer.status(), status, "{json}");
    assert_eq!(error["code"], code, "{json}");
    assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{json}");
    assert!(error["message"].as_str().unwrap().contains(message), "{json} lacks {message:?}");
    assert!(error["type"].is_string(), "{json}");
    assert_eq!(answer.header("x-request-id").len(), 32);
    answer
}

#[tokio::test]
async fn bodies() {
    let cluster = Cluster::new(&["tiny"], Some("{{ messages[0].content }}"), ok());
    for (path, body, code, param, message) in [
        (CHAT, "", "invalid_json", "", "line 1 column 0"),
        (CHAT, "{\"messages\": [}", "invalid_json", "", "line 1 column 15"),
        (CHAT, "{\"messages\": []} x", "invalid_json", "", "trailing characters"),
        (CHAT, "[]", "invalid_type", ".", "expected an object"),
        (CHAT, "{}", "invalid_type", "messages", "missing field `messages`"),
        (CHAT, r#"{"messages": 1}"#, "invalid_type", "messages", "expected a sequence"),
        (CHAT, r#"{"messages": []}"#, "invalid_value", "messages", "at least one"),
        (CHAT, r#"{"messages": [["user", "x"]]}"#, "invalid_type", "messages[0]", "expected an object"),
        (CHAT, r#"{"messages": [{"role": "user"}]}"#, "invalid_value", "messages[0].content", "missing"),
        (
            CHAT,
            r#"{"messages": [{"role": "x", "content": ""}]}"#,
            "invalid_type",
            "messages[0].role",
            "unknown variant `x`",
        ),
        (
            CHAT,
            r#"{"messages": [{"role": "user", "content": 5}]}"#,
            "invalid_type",
            "messages[0].content",
            "5",
        ),
        (
            CHAT,
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]}"#,
            "invalid_type",
            "messages[0].content[1].type",
            "\"image_url\" is not supported yet",
        ),
        (
            CHAT,
            r#"{"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}"#,
            "invalid_type",
            "messages[0].tool_calls[0].function",
            "missing field `function`",
        ),
        (CHAT, r#"{"messages": [{"role": "user", "content": ""}]}"#, "invalid_value", "messages", "empty"),
        (TEXT, "{}", "invalid_type", "prompt", "missing field `prompt`"),
        (TEXT, r#"{"prompt": ""}"#, "invalid_value", "prompt", "empty"),
        (TEXT, r#"{"prompt": []}"#, "invalid_type", "prompt", "empty array"),
        (TEXT, r#"{"prompt": ["a", 1]}"#, "invalid_type", "prompt[1]", "1"),
        (TEXT, r#"{"prompt": [1, 259]}"#, "invalid_value", "prompt", "259"),
        (TEXT, r#"{"prompt": [1, -2]}"#, "invalid_type", "prompt[1]", "-2"),
    ] {
        check(cluster.app(), post(path, body), 400, code, param, message).await;
    }
    assert!(cluster.asked.lock().unwrap().is_empty(), "nothing was generated");
}

#[tokio::test]
async fn parameters() {
    let long_salt = format!(r#""cache_salt": "{}""#, "x".repeat(limits::CACHE_SALT_BYTES_MAX + 1));
    let cluster = Cluster::new(&["tiny"], Some("{{ messages[0].content }}"), ok());
    for (fields, code, param, message) in [
        (r#""temperature": 3"#, "invalid_value", "temperature", "temperature is 3"),
        (r#""temperature": "hot""#, "invalid_type", "temperature", "\"hot\""),
        (r#""top_p": 1.5"#, "invalid_value", "top_p", "top_p is 1.5"),
        (r#""top_k": -2"#, "invalid_value", "top_k", "top_k is -2"),
        (r#""min_p": 1.5"#, "invalid_value", "min_p", "min_p is 1.5"),
        (r#""repetition_penalty": 0"#, "invalid_value", "repetition_penalty", "is 0"),
        (r#""presence_penalty": 2.5"#, "invalid_value", "presence_penalty", "is 2.5"),
        (r#""frequency_penalty": -3"#, "invalid_value", "frequency_penalty", "is -3"),
        (r#""logit_bias": {"1": 101}"#, "invalid_value", "logit_bias", "101"),
        (r#""logit_bias": {"x": 1}"#, "invalid_type", "logit_bias", "\"x\""),
        (r#""logit_bias": {"259": 1}"#, "invalid_value", "logit_bias", "259"),
        (r#""max_tokens": 0"#, "invalid_value", "max_tokens", "max_tokens is 0"),
        (r#""max_tokens": -1"#, "invalid_value", "max_tokens", "max_tokens is -1"),
        (r#""max_completion_tokens": 2000000"#, "invalid_value", "max_completion_tokens", "2000000"),
        (
            r#""max_tokens": 1000"#,
            "context_length_exceeded",
            "",
            "1 tokens and max_tokens is 1000, but the model's context is 1000",
        ),
        (
            r#""max_completion_tokens": 1000"#,
            "context_length_exceeded",
            "",
            "1 tokens and max_completion_tokens is 1000, but the model's context is 1000",
        ),
        (r#""seed": 1.5"#, "invalid_type", "seed", "1.5"),
        (r#""stop": [1]"#, "invalid_type", "stop[0]", "1"),
        (r#""stop": """#, "invalid_value", "stop", "stop[0] has 0 bytes"),
        (
            r#""stop": ["a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a"]"#,
            "invalid_value",
            "stop",
            "17",
        ),
        (r#""stop_token_ids": [259]"#, "invalid_value", "stop_token_ids", "259"),
        (r#""session_id": 1"#, "invalid_type", "session_id", "1"),
        (r#""session_id": """#, "invalid_value", "session_id", "\"\" is no session id"),
        (r#""session_id": "two words""#, "invalid_value", "session_id", "\"two words\""),
        (r#""cache_salt": 1"#, "invalid_type", "cache_salt", "1"),
        (&long_salt, "invalid_value", "cache_salt", "cache_salt has 257 bytes; at most 256 are allowed"),
        (r#""priority": "urgent""#, "invalid_type", "priority", "\"urgent\", expected \"low\", \"normal\""),
        (r#""priority": 1.5"#, "invalid_type", "priority", "1.5"),
        (r#""ttft_target_ms": 0"#, "invalid_value", "ttft_target_ms", "is 0; it must be from 1 to 3600000"),
        (r#""ttft_target_ms": 1.5"#, "invalid_type", "ttft_target_ms", "1.5"),
        (r#""tpot_target_ms": -5"#, "invalid_value", "tpot_target_ms", "tpot_target_ms is -5"),
        (r#""tpot_target_ms": 3600001"#, "invalid_value", "tpot_target_ms", "tpot_target_ms is 3600001"),
        (r#""stream": 1"#, "invalid_type", "stream", "1"),
        (r#""stream_options": {"include_usage": 1}"#, "invalid_type", "stream_options.include_usage", "1"),
        (r#""n": 0"#, "invalid_value", "n", "n is 0; it must be from 1 to 128"),
        (r#""n": 129"#, "invalid_value", "n", "n is 129"),
        (r#""n": 1.5"#, "invalid_type", "n", "1.5"),
        (r#""min_tokens": -1"#, "invalid_value", "min_tokens", "min_tokens is -1"),
        (
            r#""max_tokens": 4, "min_tokens": 5"#,
            "invalid_value",
            "min_tokens",
            "min_tokens is 5; it must be at most max_tokens, which is 4",
        ),
        (
            r#""max_completion_tokens": 4, "min_tokens": 5"#,
            "invalid_value",
            "min_tokens",
            "min_tokens is 5; it must be at most max_completion_tokens, which is 4",
        ),
        (
            r#""max_completion_tokens": 4, "max_tokens": 9, "min_tokens": 5"#,
            "invalid_value",
            "min_tokens",
            "it must be at most max_completion_tokens, which is 4",
        ),
        (
            r#""min_tokens": 1000"#,
            "invalid_value",
            "min_tokens",
            "min_tokens is 1000; without max_tokens the answer has at most",
        ),
        (r#""prompt_logprobs": 21"#, "invalid_value", "prompt_logprobs", "from 0 to 20"),
        (r#""prompt_logprobs": 1, "stream": true"#, "invalid_value", "prompt_logprobs", "streamed"),
        (r#""bad_words": ["x"]"#, "unsupported_parameter", "bad_words", "not supported"),
        (r#""allowed_token_ids": [1]"#, "unsupported_parameter", "allowed_token_ids", "not supported"),
        (r#""response_format": {"type": "xml"}"#, "invalid_type", "response_format.type", "xml"),
        (
            r#""response_format": {"type": "json_schema"}"#,
            "invalid_value",
            "response_format.json_schema.schema",
            "is missing",
        ),
        (
            r#""response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}"#,
            "invalid_value",
            "response_format.json_schema.schema",
            "is 5; it must be a JSON schema",
        ),
        (r#""guided_json": "{""#, "invalid_value", "guided_json", "not valid JSON"),
        (r#""guided_json": {}, "guided_regex": "a""#, "invalid_value", "guided_regex", "exclude one another"),
        (r#""guided_choice": []"#, "invalid_value", "guided_choice", "0 texts"),
        (r#""structured_outputs": {"regex": 5}"#, "invalid_type", "structured_outputs.regex", "5"),
        (
            r#""structured_outputs": {"regex": "a", "choice": ["b"]}"#,
            "invalid_value",
            "choice",
            "regex and choice exclude one another",
        ),
    ] {
        let chat = format!(r#"{{"messages": [{{"role": "user", "content": "x"}}], {fields}}}"#);
        check(cluster.app(), post(CHAT, chat), 400, code, param, message).await;
        let text = format!(r#"{{"prompt": "x", {fields}}}"#);
        check(cluster.app(), post(TEXT, text), 400, code, param, message).await;
    }
    for (path, fields, param) in [
        (CHAT, r#""chat_template": "x""#, "chat_template"),
        (CHAT, r#""functions": [{"name": "x"}]"#, "functions"),
        (CHAT, r#""audio": {"voice": "x"}"#, "audio"),
        (CHAT, r#""modalities": ["text", "audio"]"#, "modalities"),
        (CHAT, r#""reasoning_effort": "high""#, "reasoning_effort"),
        (TEXT, r#""use_beam_search": true"#, "use_beam_search"),
        (TEXT, r#""suffix": "x""#, "suffix"),
    ] {
        let body =
            format!(r#"{{"messages": [{{"role": "user", "content": "x"}}], "prompt": "x", {fields}}}"#);
        check(cluster.app(), post(path, body), 400, "unsupported_parameter", param, param).await;
    }
    assert!(cluster.asked.lock().unwrap().is_empty(), "nothing was generated");
}

#[tokio::test]
async fn models_and_context() {
    let two = Cluster::new(&["a/x", "b"], None, ok());
    let prompt = |model: &str| post(TEXT, format!(r#"{{"model": {model}, "prompt": "x"}}"#));
    check(two.app(), prompt("\"c\""), 404, "model_not_found", "model", "a/x, b").await;
    check(two.app(), prompt("null"), 400, "model_required", "model", "a/x, b").await;
    assert_eq!(ask(two.app(), prompt("\"a/x\"")).await.status(), 200);
    check(two.app(), get("/v1/models/c"), 404, "model_not_found", "model", "\"c\"").await;
    let chat = post(CHAT, r#"{"model": "b", "messages": [{"role": "user", "content": "x"}]}"#);
    check(two.app(), chat, 400, "no_chat_template", "messages", "/v1/completions").await;

    let long = format!(r#"{{"model": "b", "prompt": "{}"}}"#, "x".repeat(1000));
    let message = "the prompt has 1000 tokens";
    check(two.app(), post(TEXT, long), 400, "context_length_exceeded", "", message).await;

    let raising = Cluster::new(&["a"], Some("{{ raise_exception('no system here') }}"), ok());
    let chat = post(CHAT, r#"{"messages": [{"role": "system", "content": "x"}]}"#);
    check(raising.app(), chat, 400, "chat_template_error", "messages", "no system here").await;

    let none = Cluster::new(&[], None, ok());
    let answer = check(none.app(), prompt("\"a\""), 503, "no_node", "", "mini is loading its model").await;
    assert_eq!(answer.header("retry-after"), "1");
    check(none.app(), get("/ready"), 503, "no_node", "", "mini is loading its model").await;
    assert_eq!(ask(none.app(), get("/health")).await.status(), 200);
}

#[tokio::test]
async fn refusals_of_the_cluster() {
    let unavailable = GenerateError::Unavailable { model: "tiny".to_owned(), reason: "draining".to_owned() };
    for (error, status, code, retry_after) in [
        (GenerateError::Busy { retry_after_ms: 2100 }, 429, "queue_full", "3"),
        (GenerateError::Busy { retry_after_ms: 0 }, 429, "queue_full", "1"),
        (unavailable, 503, "no_node", "1"),
        (GenerateError::NodeLost { tokens: 0, reason: "x".to_owned() }, 502, "node_lost", ""),
        (GenerateError::Engine { message: "x".to_owned() }, 500, "engine_failed", ""),
        (GenerateError::Invalid { message: "x".to_owned(), param: None }, 400, "invalid_value", ""),
    ] {
        for stream in [false, true] {
            let app = Cluster::new(&["tiny"], None, Script::Refuse(error.clone())).app();
            let body = format!(r#"{{"prompt": "x", "stream": {stream}}}"#);
            let answer = check(app, post(TEXT, body), status, code, "", "").await;
            assert_eq!(answer.header("retry-after"), retry_after);
        }
    }
}

#[tokio::test]
async fn routes_and_sizes() {
    let app = Cluster::new(&["tiny"], None, ok()).app();
    check(app.clone(), get("/v1/nothing"), 404, "unknown_url", "", "/v1/nothing").await;
    let answer = check(app.clone(), get(TEXT), 405, "method_not_allowed", "", "GET").await;
    assert_eq!(answer.header("allow"), "POST");
    let body = format!(r#"{{"prompt": "{}"}}"#, "x".repeat(limits::HTTP_BODY_BYTES_MAX));
    check(app.clone(), post(TEXT, body), 413, "body_too_large", "", "16777216 bytes").await;
    let models = ask(app.clone(), get("/v1/models")).await.json();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][0]["created"], 1_700_000_000);
    assert_eq!(ask(app.clone(), get("/v1/cluster")).await.json()["nodes"][0]["name"], "mini");
    assert_eq!(ask(app, get("/ready")).await.json()["models"][0], "tiny");
    let slash = Cluster::new(&["org/tiny"], None, ok()).app();
    for path in ["/v1/models/org/tiny", "/v1/models/org%2Ftiny"] {
        assert_eq!(ask(slash.clone(), get(path)).await.json()["id"], "org/tiny");
    }
}

#[tokio::test]
async fn keys() {
    let cluster = Cluster::new(&["tiny"], None, ok());
    let settings =
        ApiSettings { access: Access::of_keys(["first", "second"]).into(), ..ApiSettings::default() };
    let app = cluster.app_with(settings);
    let with = |value: Option<&str>, path: &str| {
        let builder = Request::get(path);
        let builder =
            value.into_iter().fold(builder, |builder, value| builder.header("authorization", value));
        builder.body(Body::empty()).unwrap()
    };
    for value in
        [None, Some("first"), Some("Basic first"), Some("Bearer firs"), Some("Bearer third"), Some("Bearer ")]
    {
        let message =
            if value.is_some_and(|value| value.starts_with("Bearer")) { "not valid" } else { "needed" };
        let answer = check(app.clone(), with(value, "/v1/models"), 401, "invalid_api_key", "", message).await;
        assert_eq!(answer.header("www-authenticate"), "Bearer");
        assert!(!answer.text.contains("first"));
        assert_eq!(ask(app.clone(), with(value, "/health")).await.status(), 200);
    }
    for value in ["Bearer first", "bearer second"] {
        assert_eq!(ask(app.clone(), with(Some(value), "/v1/models")).await.status(), 200);
    }
}
