//! What is counted, and the page that shows it.

use crate::support::*;
use api::{Access, ApiSettings};
use axum::{Router, body::Body, http::Request};
use futures_util::StreamExt;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tower::ServiceExt;
use types::*;

/// Prometheus' text as names with labels and their values; panics where it is not as Prometheus reads it.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let is_name = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    let mut samples = BTreeMap::new();
    let mut families: BTreeMap<&str, &str> = BTreeMap::new();
    let mut family = "";
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split(' ').next().unwrap();
            assert!(is_name(family) && help.len() > family.len() + 1, "{line}");
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(name, family, "{line}");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(families.insert(name, kind), None, "a family begins once: {line}");
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let name = series.split('{').next().unwrap();
        let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{line} is not of {family}"));
        match families[family] {
            "histogram" => assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{line}"),
            _ => assert_eq!(suffix, "", "{line}"),
        }
        assert!(is_name(name) && series.matches('"').count() % 2 == 0, "{line}");
        let value = value.parse().unwrap_or_else(|error| panic!("{error}: {line}"));
        assert_eq!(samples.insert(series.to_owned(), value), None, "a series is there once: {line}");
    }
    samples
}

async fn metrics(app: &Router) -> BTreeMap<String, f64> {
    let answer = ask(app.clone(), get("/metrics")).await;
    assert_eq!(answer.status(), 200);
    assert!(answer.header("content-type").starts_with("text/plain; version=0.0.4"));
    parse(&answer.text)
}

/// "ab" in two events, the second after 250 ms, and an end after as long again.
fn paced() -> Script {
    let events = [
        TokenEvent::Started { cached_tokens: 8 },
        tokens(0, "a"),
        tokens(1, "b"),
        finished(FinishReason::Stop, 3),
    ];
    Script::Paced(events.to_vec(), Duration::from_millis(250))
}

#[tokio::test(start_paused = true)]
async fn requests_are_counted_and_timed() {
    let app = Cluster::new(&["tiny"], None, paced()).app();
    for _ in 0..2 {
        let body = r#"{"prompt":"0123456789","stream":true}"#;
        assert_eq!(ask(app.clone(), post("/v1/completions", body)).await.status(), 200);
    }
    ask(app.clone(), post("/v1/completions", "{")).await;
    ask(app.clone(), get("/no/such")).await;
    let all = metrics(&app).await;
    let check = |series: &str, expected: f64| {
        assert_eq!(all.get(series), Some(&expected), "{series} in {all:#?}");
    };
    check(r#"mlx_request_success_total{model_name="tiny",finished_reason="stop"}"#, 2.0);
    check(r#"mlx_request_success_total{model_name="tiny",finished_reason="length"}"#, 0.0);
    check(r#"mlx_prompt_tokens_total{model_name="tiny"}"#, 20.0);
    check(r#"mlx_generation_tokens_total{model_name="tiny"}"#, 4.0);
    check(r#"mlx_prefix_cache_queries_total{model_name="tiny"}"#, 20.0);
    check(r#"mlx_prefix_cache_hits_total{model_name="tiny"}"#, 16.0);
    check(r#"mlx_routes_total{node="mini ünïcode",reason="affinity"}"#, 2.0);
    check(r#"mlx_time_to_first_token_seconds_sum{model_name="tiny"}"#, 1.0);
    check(r#"mlx_time_to_first_token_seconds_bucket{model_name="tiny",le="0.25"}"#, 0.0);
    check(r#"mlx_time_to_first_token_seconds_bucket{model_name="tiny",le="0.5"}"#, 2.0);
    check(r#"mlx_inter_token_latency_seconds_sum{model_name="tiny"}"#, 0.5);
    check(r#"mlx_inter_token_latency_seconds_count{model_name="tiny"}"#, 2.0);
    check(r#"mlx_request_time_per_output_token_seconds_sum{model_name="tiny"}"#, 0.5);
    check(r#"mlx_e2e_request_latency_seconds_sum{model_name="tiny"}"#, 2.0);
    check(r#"mlx_request_queue_time_seconds_count{model_name="tiny"}"#, 2.0);
    check(r#"mlx_request_prompt_tokens_sum{model_name="tiny"}"#, 20.0);
    check(r#"mlx_request_generation_tokens_sum{model_name="tiny"}"#, 4.0);
    check(r#"http_requests_total{handler="/v1/completions",method="POST",status="200"}"#, 2.0);
    check(r#"http_requests_total{handler="/v1/completions",method="POST",status="400"}"#, 1.0);
    check(r#"http_requests_total{handler="none",method="GET",status="404"}"#, 1.0);
    check(r#"mlx_router_moves_total{kind="resumed"}"#, 0.0);
    let id = "00000000000000000000000000000001";
    check(&format!(r#"mlx_node_state{{node="mini",node_id="{id}",state="ready"}}"#), 1.0);
    check(&format!(r#"mlx_node_avoided{{node="mini",node_id="{id}"}}"#), 0.0);
}

#[tokio::test]
async fn ends_have_reasons() {
    let check = async |script: Script, body: &str, expected: &str| {
        let app = Cluster::new(&["tiny"], None, script).app();
        ask(app.clone(), post("/v1/completions", body.to_owned())).await;
        let all = metrics(&app).await;
        assert_eq!(all.get(expected), Some(&1.0), "{expected} in {all:#?}");
        let ends = |(series, count): (&String, &f64)| {
            let end = ["mlx_request_success_total", "mlx_request_failure_total"];
            end.iter().any(|name| series.starts_with(name)).then_some(*count)
        };
        assert_eq!(all.iter().filter_map(ends).sum::<f64>(), 1.0, "{all:#?}");
    };
    let events = |events: &[TokenEvent]| Script::Events(events.to_vec());
    let length = events(&[tokens(0, "ab"), finished(FinishReason::Length, 2)]);
    let success =
        |reason| format!(r#"mlx_request_success_total{{model_name="tiny",finished_reason="{reason}"}}"#);
    let failure = |reason| format!(r#"mlx_request_failure_total{{model_name="tiny",reason="{reason}"}}"#);
    check(length.clone(), r#"{"prompt":"x"}"#, &success("length")).await;
    // The rest is not generated; it was no abort all the same.
    check(length, r#"{"prompt":"x","stop":"a"}"#, &success("stop")).await;
    check(Script::Refuse(GenerateError::Busy { retry_after_ms: 1 }), r#"{"prompt":"x"}"#, &failure("busy"))
        .await;
    let lost = GenerateError::NodeLost { tokens: 1, reason: "silent".to_owned() };
    let lost = events(&[tokens(0, "a"), finished(FinishReason::Failed(lost), 1)]);
    check(lost, r#"{"prompt":"x"}"#, &failure("node_lost")).await;
}

/// The next event of a stream.
async fn next_event(body: &mut axum::body::BodyDataStream) -> serde_json::Value {
    let bytes = body.next().await.unwrap().unwrap();
    let text = std::str::from_utf8(&bytes).unwrap();
    serde_json::from_str(text.strip_prefix("data: ").unwrap().trim_end()).unwrap()
}

async fn events(app: &Router) -> axum::body::BodyDataStream {
    let response = app.clone().oneshot(get("/v1/cluster/events")).await.unwrap();
    assert_eq!(response.status(), 200);
    response.into_body().into_data_stream()
}

#[tokio::test(start_paused = true)]
async fn requests_are_shown_while_they_run_and_never_what_they_say() {
    let script = Script::Hang(vec![TokenEvent::Started { cached_tokens: 2 }, tokens(0, "secret")]);
    let cluster = Cluster::new(&["tiny"], None, script);
    let app = cluster
        .app_with(ApiSettings { access: Access::of_keys(["hidden"]).into(), ..ApiSettings::default() });
    let with_key = |mut request: Request<Body>| {
        request.headers_mut().insert("authorization", "Bearer hidden".parse().unwrap());
        request
    };
    let request = with_key(post("/v1/completions", r#"{"prompt":"0123456789","stream":true}"#));
    let mut answer = app.clone().oneshot(request).await.unwrap().into_body().into_data_stream();
    answer.next().await.unwrap().unwrap();
    let response = app.clone().oneshot(with_key(get("/v1/cluster/events"))).await.unwrap();
    let mut body = response.into_body().into_data_stream();
    let shown = next_event(&mut body).await;
    assert_eq!((&shown["running"], &shown["cluster"]["cluster"]), (&1.into(), &"home".into()));
    let one = &shown["requests"][0];
    let told =
        ["model", "state", "node", "reason", "tokens", "prompt_tokens", "cached_tokens", "matched_tokens"];
    let told: Vec<_> = told.iter().map(|name| one[*name].to_string()).collect();
    assert_eq!(
        told,
        [r#""tiny""#, r#""writing""#, r#""mini ünïcode""#, r#""affinity""#, "6", "10", "2", "32"]
    );
    let text = shown.to_string();
    for secret in ["secret", "0123456789", "hidden"] {
        assert!(!text.contains(secret), "{secret} is in {text}");
    }
    drop(answer);
    let ended = loop {
        let shown = next_event(&mut body).await;
        if shown["running"] == 0 {
            break shown;
        }
    };
    assert_eq!((&ended["requests"][0]["state"], &ended["totals"]["failed"]), (&"abort".into(), &1.into()));
    assert_eq!(
        ended["history"]["tokens"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum::<u64>(),
        6
    );
}

#[tokio::test(start_paused = true)]
async fn readers_are_bounded_and_slow_ones_dropped() {
    let app = Cluster::new(&["tiny"], None, paced()).app();
    let mut readers = Vec::new();
    for _ in 0..64 {
        readers.push(events(&app).await);
    }
    let refused = ask(app.clone(), get("/v1/cluster/events")).await;
    assert_eq!((refused.status(), refused.header("retry-after")), (503, "1"));
    assert_eq!(refused.json()["error"]["code"], "too_many_readers");
    // Nobody but the first reads on; the others are dropped, and their places are free.
    for _ in 0..10 {
        next_event(&mut readers[0]).await;
    }
    let mut late = events(&app).await;
    next_event(&mut late).await;
    let mut seen = 0;
    while let Some(event) = readers[1].next().await {
        event.unwrap();
        seen += 1;
    }
    assert!((1..=4).contains(&seen), "what was buffered comes, and then the end: {seen}");
}

#[tokio::test(start_paused = true)]
async fn streams_end_when_the_router_leaves() {
    let mut cluster = Arc::into_inner(Cluster::new(&["tiny"], None, paced())).unwrap();
    cluster.view.draining = true;
    let mut body = events(&Arc::new(cluster).app()).await;
    assert_eq!(next_event(&mut body).await["cluster"]["draining"], true);
    assert!(body.next().await.is_none());
}

#[tokio::test]
async fn the_page_needs_no_key_and_its_figures_do() {
    let cluster = Cluster::new(&["tiny"], None, paced());
    let settings = ApiSettings { access: Access::of_keys(["k"]).into(), ..ApiSettings::default() };
    let app = cluster.app_with(settings.clone());
    let page = ask(app.clone(), get("/")).await;
    assert_eq!((page.status(), page.header("content-type")), (200, "text/html; charset=utf-8"));
    let policy = page.header("content-security-policy");
    assert!(
        policy.starts_with("default-src 'none'; script-src 'self';") && !policy.contains("unsafe"),
        "{policy}"
    );
    // Everything that the page asks for is there, and nothing is asked of anybody else.
    let mut files = 0;
    for part in page.text.split('"').filter(|part| part.starts_with("/dashboard/")) {
        let file = ask(app.clone(), get(part)).await;
        assert_eq!(file.status(), 200, "{part}");
        assert!(!file.text.is_empty() && file.header("etag") == page.header("etag"));
        files += 1;
    }
    assert!(files >= 3 && !page.text.contains("://"), "{}", page.text);
    let mut again = get("/dashboard/style.css");
    again.headers_mut().insert("if-none-match", page.header("etag").parse().unwrap());
    let again = ask(app.clone(), again).await;
    assert_eq!((again.status(), again.text.as_str()), (304, ""));
    for path in ["/metrics", "/v1/cluster/events", "/v1/cluster", "/dashboard/none.js"] {
        assert_eq!(ask(app.clone(), get(path)).await.status(), 401, "{path}");
    }
    let open = cluster.app_with(ApiSettings {
        access: Access { open_metrics: true, ..Access::of_keys(["k"]) }.into(),
        ..settings
    });
    assert_eq!(ask(open.clone(), get("/metrics")).await.status(), 200);
    assert_eq!(ask(open, get("/v1/cluster/events")).await.status(), 401);
}
