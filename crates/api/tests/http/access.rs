//! Hashed keys, what each is good for, limits of its own, and who may administer.

use crate::support::*;
use api::{Access, ApiKey, ApiSettings, ApiState, KeyHash, RateLimits, Scopes, SharedAccess};
use axum::{Router, body::Body, http::Request};
use serde_json::json;
use std::sync::{Arc, atomic::Ordering};
use types::*;

const TEXT: &str = "/v1/completions";
const ASK: &str = r#"{"prompt":"x"}"#;
const RELOAD: &str = "/v1/admin/reload";
const DRAIN: &str = "/v1/admin/drain";

fn app(access: impl Into<SharedAccess>) -> (Router, Arc<Operator>) {
    let script = Script::Events(vec![tokens(0, "ab"), finished(FinishReason::Length, 2)]);
    let cluster = Cluster::new(&["tiny"], None, script);
    let operator = Arc::<Operator>::default();
    let app = api::app(ApiState {
        generate: cluster.clone(),
        embed: cluster.clone(),
        directory: cluster.clone(),
        sessions: cluster,
        operate: operator.clone(),
        settings: ApiSettings { access: access.into(), ..ApiSettings::default() },
    });
    (app, operator)
}

fn key(key: &str, models: bool, admin: bool, rates: RateLimits) -> ApiKey {
    let hash = KeyHash::of(key.as_bytes()).to_string().parse().unwrap();
    ApiKey { hash, name: key.to_owned(), scopes: Scopes { models, admin }, rates }
}

fn with(request: Request<Body>, name: &'static str, value: &str) -> Request<Body> {
    let (mut parts, body) = request.into_parts();
    parts.headers.insert(name, value.parse().unwrap());
    Request::from_parts(parts, body)
}

fn of(key: &str, request: Request<Body>) -> Request<Body> {
    with(request, "authorization", &format!("Bearer {key}"))
}

#[tokio::test]
async fn scopes() {
    let none = RateLimits::default();
    let keys =
        vec![key("user", true, false, none), key("admin", false, true, none), key("both", true, true, none)];
    let (app, operator) = app(Access { keys, ..Access::default() });
    // Who, and what they may: ask, look, administer.
    for (who, asks, looks, administers) in [
        ("user", 200, 200, 403),
        ("admin", 403, 200, 200),
        ("both", 200, 200, 200),
        ("nobody", 401, 401, 401),
    ] {
        for (request, expected) in [
            (post(TEXT, ASK), asks),
            (get("/v1/sessions"), asks),
            (get("/v1/cluster"), looks),
            (get("/metrics"), looks),
            (post(DRAIN, ""), administers),
        ] {
            let path = request.uri().clone();
            let answer = ask(app.clone(), of(who, request)).await;
            assert_eq!(answer.status(), expected, "{who} at {path}");
            if expected == 403 {
                let error = &answer.json()["error"];
                assert_eq!(error["code"], "insufficient_scope");
                let scope = if path.path() == DRAIN { "\"admin\"" } else { "\"use\"" };
                assert!(error["message"].as_str().unwrap().contains(scope), "{error}");
            }
        }
    }
    assert_eq!(operator.drains.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn settings_are_reloaded_or_left() {
    let (app, operator) =
        app(Access { keys: vec![key("a", false, true, RateLimits::default())], ..Access::default() });
    let answer = ask(app.clone(), of("a", post(RELOAD, ""))).await;
    let expected = json!({"object": "admin.reload", "applied": ["key"], "restart": ["model"]});
    assert_eq!((answer.status(), answer.json()), (200, expected));
    let answer = ask(app.clone(), of("a", post(RELOAD, ""))).await;
    let error = &answer.json()["error"];
    assert_eq!((answer.status(), &error["code"]), (400, &json!("invalid_settings")));
    assert!(error["message"].as_str().unwrap().contains("cluster.toml:3: max_batch"), "{error}");
    assert_eq!(ask(app, of("a", get(RELOAD))).await.status(), 405);
    assert_eq!(operator.reloads.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn without_keys_only_this_machine_administers() {
    let (open, operator) = app(Access::default());
    let answer = ask(open.clone(), post(DRAIN, "")).await;
    assert_eq!((answer.status(), &answer.json()["error"]["code"]), (403, &json!("no_admin_key")));
    assert_eq!(ask(open, post(TEXT, ASK)).await.status(), 200);
    assert_eq!(operator.drains.load(Ordering::Relaxed), 0);

    let (loopback, operator) = app(Access { open_admin: true, ..Access::default() });
    // A page of any origin reaches the loopback through its reader's browser.
    for origin in ["http://evil.example", "http://127.0.0.1:8080", "null"] {
        assert_eq!(ask(loopback.clone(), with(post(DRAIN, ""), "origin", origin)).await.status(), 403);
    }
    assert_eq!(operator.drains.load(Ordering::Relaxed), 0);
    assert_eq!(ask(loopback, post(DRAIN, "")).await.status(), 200);
    assert_eq!(operator.drains.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn each_key_has_its_own_limits() {
    let limit = |requests| RateLimits { requests_per_minute: requests, ..RateLimits::default() };
    let keys = vec![
        key("one", true, false, limit(Some(1))),
        key("two", true, false, limit(Some(2))),
        key("any", true, false, limit(None)),
    ];
    let (app, _) = app(Access { keys, ..Access::default() });
    for (who, expected) in [("one", [200, 429, 429]), ("two", [200, 200, 429]), ("any", [200; 3])] {
        for expected in expected {
            assert_eq!(ask(app.clone(), of(who, post(TEXT, ASK))).await.status(), expected, "{who}");
        }
    }
}

#[tokio::test]
async fn keys_and_limits_change_while_it_serves() {
    let shared = SharedAccess::new(Access::of_keys(["old"]));
    let (app, _) = app(shared.clone());
    assert_eq!(ask(app.clone(), of("old", post(TEXT, ASK))).await.status(), 200);
    assert_eq!(ask(app.clone(), of("new", post(TEXT, ASK))).await.status(), 401);
    let rates = RateLimits { requests_per_minute: Some(1), ..RateLimits::default() };
    shared.replace(Access { keys: vec![key("new", true, false, rates)], ..Access::default() });
    assert_eq!(ask(app.clone(), of("old", post(TEXT, ASK))).await.status(), 401);
    assert_eq!(ask(app.clone(), of("new", post(TEXT, ASK))).await.status(), 200);
    assert_eq!(ask(app, of("new", post(TEXT, ASK))).await.status(), 429);
}
