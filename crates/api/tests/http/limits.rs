//! Bounds on heads and on what a key may ask for, other origins, and errors as other protocols write them.

use crate::support::*;
use api::{Access, ApiSettings, RateLimits};
use axum::{Router, body::Body, http::Request};
use futures_util::stream;
use http_body_util::BodyExt;
use serde_json::json;
use tower::ServiceExt;
use types::*;

const TEXT: &str = "/v1/completions";
const ASK: &str = r#"{"prompt":"x"}"#;

fn ok() -> Script {
    Script::Events(vec![tokens(0, "ab"), finished(FinishReason::Length, 2)])
}

fn keyed(rates: RateLimits) -> Router {
    let mut access = Access::of_keys(["first", "second"]);
    access.keys.iter_mut().for_each(|key| key.rates = rates);
    Cluster::new(&["tiny"], None, ok())
        .app_with(ApiSettings { access: access.into(), ..ApiSettings::default() })
}

fn with(request: Request<Body>, headers: &[(&str, &str)]) -> Request<Body> {
    let (mut parts, body) = request.into_parts();
    for &(name, value) in headers {
        let name: axum::http::HeaderName = name.parse().unwrap();
        parts.headers.insert(name, value.parse().unwrap());
    }
    Request::from_parts(parts, body)
}

fn of(key: &str) -> Request<Body> {
    with(post(TEXT, ASK), &[("authorization", &format!("Bearer {key}"))])
}

async fn refused(app: &Router, request: Request<Body>, message: &str, retry_after: &str) {
    let answer = ask(app.clone(), request).await;
    let error = &answer.json()["error"];
    assert_eq!((answer.status(), &error["code"]), (429, &json!("rate_limit_exceeded")), "{error}");
    assert_eq!(error["type"], "rate_limit_error");
    assert!(error["message"].as_str().unwrap().contains(message), "{error}");
    assert_eq!(answer.header("retry-after"), retry_after);
}

#[tokio::test]
async fn heads() {
    let app = Cluster::new(&["tiny"], None, ok()).app();
    let long = format!("/v1/models/{}", "x".repeat(8 << 10));
    let answer = ask(app.clone(), get(&long)).await;
    assert_eq!((answer.status(), &answer.json()["error"]["code"]), (431, &json!("headers_too_large")));
    let expected = "the path and query have 8203 bytes; at most 8192 are allowed";
    assert_eq!(answer.json()["error"]["message"], expected);
    let answer = ask(app, with(get("/v1/models"), &[("x-long", &"x".repeat(32 << 10))])).await;
    assert_eq!(answer.status(), 431);
    assert_eq!(answer.json()["error"]["message"], "the headers have 32774 bytes; at most 32768 are allowed");
}

#[tokio::test(start_paused = true)]
async fn bodies_that_do_not_arrive() {
    let app = Cluster::new(&["tiny"], None, ok()).app();
    for path in [TEXT, "/v1/chat/completions", "/v1/responses", "/tokenize"] {
        let body = Body::from_stream(stream::pending::<Result<String, std::io::Error>>());
        let answer = ask(app.clone(), post(path, body)).await;
        assert_eq!((answer.status(), &answer.json()["error"]["code"]), (408, &json!("body_timeout")));
        assert_eq!(answer.json()["error"]["message"], "the body did not arrive within 30 s");
    }
}

#[tokio::test]
async fn requests_by_the_minute() {
    let app = keyed(RateLimits { requests_per_minute: Some(2), ..RateLimits::default() });
    for key in ["first", "second"] {
        for _ in 0..2 {
            let answer = ask(app.clone(), of(key)).await;
            assert_eq!(answer.status(), 200);
        }
        refused(&app, of(key), "use 2 requests by the minute", "30").await;
        // What costs nothing is not counted.
        let list = with(get("/v1/models"), &[("authorization", &format!("Bearer {key}"))]);
        assert_eq!(ask(app.clone(), list).await.status(), 200);
    }
}

#[tokio::test]
async fn tokens_by_the_minute() {
    // Each request reads one token and writes two.
    let app = keyed(RateLimits { tokens_per_minute: Some(5), ..RateLimits::default() });
    for _ in 0..2 {
        assert_eq!(ask(app.clone(), of("first")).await.status(), 200);
    }
    refused(&app, of("first"), "use 5 tokens by the minute", "24").await;
    assert_eq!(ask(app, of("second")).await.status(), 200);
}

#[tokio::test]
async fn requests_at_a_time() {
    let rates = RateLimits { concurrent: Some(1), ..RateLimits::default() };
    let access = Access { rates, ..Access::default() }.into();
    let settings = ApiSettings { access, ..ApiSettings::default() };
    let app = Cluster::new(&["tiny"], None, Script::Hang(vec![tokens(0, "ab")])).app_with(settings);
    let stream = || post(TEXT, r#"{"prompt":"x","stream":true}"#);
    let mut running = app.clone().oneshot(stream()).await.unwrap();
    assert!(running.body_mut().frame().await.is_some());
    refused(&app, stream(), "have 1 requests answered at a time", "1").await;
    drop(running);
    assert_eq!(app.clone().oneshot(stream()).await.unwrap().status(), 200);
}

#[tokio::test]
async fn other_origins() {
    let cors_origins = vec!["http://localhost:3000".to_owned()];
    let access = Access::of_keys(["k"]).into();
    let settings = ApiSettings { cors_origins, access, ..ApiSettings::default() };
    let app = Cluster::new(&["tiny"], None, ok()).app_with(settings);
    let preflight = |origin: &str| {
        let request = Request::options(TEXT).body(Body::empty()).unwrap();
        let headers = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization,x-stainless-os"),
        ];
        with(request, &headers)
    };
    let answer = ask(app.clone(), preflight("http://localhost:3000")).await;
    assert_eq!(answer.status(), 204);
    assert_eq!(answer.header("access-control-allow-origin"), "http://localhost:3000");
    assert_eq!(answer.header("access-control-allow-headers"), "authorization,x-stainless-os");
    assert_eq!(answer.header("access-control-allow-methods"), "GET, POST, DELETE");
    assert_eq!(answer.header("vary"), "origin");
    let answer = ask(app.clone(), preflight("http://localhost:3001")).await;
    assert_eq!((answer.status(), answer.header("access-control-allow-origin")), (401, ""));

    // A page may read a refusal too.
    let answer = ask(app.clone(), with(post(TEXT, ASK), &[("origin", "http://localhost:3000")])).await;
    assert_eq!(answer.status(), 401);
    assert_eq!(answer.header("access-control-allow-origin"), "http://localhost:3000");
    let headers = [("origin", "http://evil.example"), ("authorization", "Bearer k")];
    let answer = ask(app, with(post(TEXT, ASK), &headers)).await;
    assert_eq!((answer.status(), answer.header("access-control-allow-origin")), (200, ""));

    let off = Cluster::new(&["tiny"], None, ok()).app();
    let answer = ask(off, preflight("http://localhost:3000")).await;
    assert_eq!((answer.status(), answer.header("access-control-allow-origin")), (405, ""));
    let all = ApiSettings { cors_origins: vec!["*".to_owned()], ..ApiSettings::default() };
    let all = Cluster::new(&["tiny"], None, ok()).app_with(all);
    let answer = ask(all, with(get("/v1/models"), &[("origin", "null")])).await;
    assert_eq!(answer.header("access-control-allow-origin"), "null");
    assert_eq!(answer.header("access-control-expose-headers"), "x-request-id, x-mlx-route, retry-after");
}

#[tokio::test]
async fn errors_of_other_protocols() {
    let app = keyed(RateLimits::default());
    let answer = ask(app.clone(), post("/v1/messages", ASK)).await;
    let message = "an API key is needed, as `Authorization: Bearer …`";
    let expected = json!({
        "type": "error", "error": {"type": "authentication_error", "message": message},
        "request_id": answer.header("x-request-id"),
    });
    assert_eq!((answer.status(), answer.json()), (401, expected));
    let answer = ask(app.clone(), post("/api/chat", ASK)).await;
    assert_eq!((answer.status(), answer.json()), (401, json!({"error": message})));
    // Anthropic's clients send their key in a header of its own.
    let answer = ask(app.clone(), with(get("/v1/models"), &[("x-api-key", "second")])).await;
    assert_eq!(answer.status(), 200);
    let headers = [("x-api-key", "third"), ("authorization", "Bearer fourth")];
    assert_eq!(ask(app, with(get("/v1/models"), &headers)).await.status(), 401);
}

/// Bodies as deep as may be are read, one level more is told of; schemas have a bound of their own, wherever they stand.
#[tokio::test]
async fn depths() {
    let cluster = Cluster::new(&["tiny"], Some("{{ messages[0].content }}"), ok());
    let app = cluster.app();
    let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    let body = |field: &str, levels: usize| {
        let field = field.replace('S', &nested(levels));
        format!(
            r#"{{"prompt": "x", "messages": [{{"role": "user", "content": "x"}}], "input": "x", "tokens": [1], "max_tokens": 2, {field}}}"#
        )
    };
    let paths = ask(app.clone(), get("/openapi.json")).await.json()["paths"].clone();
    let posts = paths.as_object().unwrap().iter().filter(|(_, path)| path.get("post").is_some());
    let posts: Vec<&String> = posts.map(|(name, _)| name).collect();
    assert!(posts.len() > 10, "{posts:?}");
    for path in posts {
        // Nobody looks at what is in a field that nobody knows.
        let answer = ask(app.clone(), post(path, body(r#""unknown": S"#, 100_000))).await;
        assert!(answer.status() < 500, "{path}: {}", answer.text);
    }
    // The body itself is the first level, and what is around `S` more.
    for (path, field, around) in [
        ("/v1/chat/completions", r#""chat_template_kwargs": {"a": S}"#, 2),
        ("/v1/completions", r#""guided_json": S"#, 1),
        ("/v1/responses", r#""tools": [{"type": "function", "name": "f", "parameters": S}]"#, 3),
        ("/v1/messages", r#""tools": [{"name": "f", "input_schema": S}]"#, 3),
        ("/api/chat", r#""format": S"#, 1),
    ] {
        let most = limits::JSON_DEPTH_MAX - around;
        let too_deep = "the body is not valid JSON: it is nested more than 127 levels deep at line 1";
        let answer = ask(app.clone(), post(path, body(field, most))).await;
        assert!(!answer.text.contains(too_deep), "{path}: {}", answer.text);
        for levels in [most + 1, 100_000] {
            let answer = ask(app.clone(), post(path, body(field, levels))).await;
            assert_eq!(answer.status(), 400, "{path}: {}", answer.text);
            assert!(answer.text.contains(too_deep), "{path}: {}", answer.text);
        }
    }

    let schema = |levels: usize| {
        // `{"items": …}` of so many levels.
        format!("{}{{}}{}", r#"{"items": "#.repeat(levels - 1), "}".repeat(levels - 1))
    };
    let cases: [(&str, &str, &str); 9] = [
        (
            "/v1/chat/completions",
            r#""response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": S}}"#,
            "response_format has a schema that",
        ),
        ("/v1/chat/completions", r#""guided_json": S"#, "guided_json has a schema that"),
        (
            "/v1/chat/completions",
            r#""structured_outputs": {"json": S}"#,
            "structured_outputs has a schema that",
        ),
        (
            "/v1/chat/completions",
            r#""tools": [{"type": "function", "function": {"name": "f", "parameters": S}}]"#,
            "tools[0].function.parameters",
        ),
        ("/v1/completions", r#""guided_json": S"#, "guided_json has a schema that"),
        (
            "/v1/responses",
            r#""text": {"format": {"type": "json_schema", "name": "x", "schema": S}}"#,
            "text.format has a schema that",
        ),
        (
            "/v1/responses",
            r#""tools": [{"type": "function", "name": "f", "parameters": S}]"#,
            "tools[0].parameters",
        ),
        ("/v1/messages", r#""tools": [{"name": "f", "input_schema": S}]"#, "tools.0.input_schema"),
        ("/api/chat", r#""format": S"#, "format has a schema that"),
    ];
    for (path, field, what) in cases {
        let asked = match path {
            "/v1/completions" => r#""prompt": "x""#,
            "/v1/responses" => r#""input": "x""#,
            _ => r#""messages": [{"role": "user", "content": "x"}]"#,
        };
        let body = |levels: usize| {
            let field = field.replace('S', &schema(levels));
            format!(r#"{{{asked}, "max_tokens": 2, "stream": false, {field}}}"#)
        };
        let most = limits::SCHEMA_DEPTH_MAX;
        assert_eq!(ask(app.clone(), post(path, body(most))).await.status(), 200, "{path} {field}");
        let answer = ask(app.clone(), post(path, body(most + 1))).await;
        assert_eq!(answer.status(), 400, "{path} {field}");
        let expected = format!("{what} is nested 65 levels deep; at most 64 are allowed");
        assert!(answer.text.contains(&expected), "{path} {field}: {} lacks {expected:?}", answer.text);
    }
}
