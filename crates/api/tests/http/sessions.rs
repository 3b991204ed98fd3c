//! Who is told of which sessions, and what a request says of its session, its cache and its urgency.

use crate::support::*;
use api::{Access, ApiSettings};
use axum::{body::Body, http::Request};
use std::sync::Arc;
use types::*;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const KEYS: [&str; 2] = ["first", "second"];

fn cluster() -> Arc<Cluster> {
    let script = Script::Events(vec![tokens(0, "ab"), finished(FinishReason::Length, 2)]);
    Cluster::new(&["tiny"], Some("{{ messages[0].content }}"), script)
}

fn settings(cache_per_key: bool) -> ApiSettings {
    ApiSettings { access: Access::of_keys(KEYS).into(), cache_per_key, ..ApiSettings::default() }
}

fn session(client: ClientId, id: &str, node: u128) -> NodeSession {
    let id = id.to_owned().try_into().unwrap();
    let session = SessionInfo { client, id, tokens: 64 * node as u32, idle_s: 1.5, expires_in_s: 30.0 };
    NodeSession { node: NodeId(node), node_name: format!("mac-{node}"), session }
}

fn of(key: Option<&str>, method: &str, path: &str) -> Request<Body> {
    let builder = Request::builder().method(method).uri(path);
    let builder = key
        .into_iter()
        .fold(builder, |builder, key| builder.header("authorization", format!("Bearer {key}")));
    builder.body(Body::empty()).unwrap()
}

#[tokio::test]
async fn a_client_sees_its_own_sessions() {
    let cluster = cluster();
    let [first, second] = KEYS.map(|key| ClientId::of_key(key.as_bytes()));
    let sessions = vec![session(first, "a", 1), session(first, "b/c", 2), session(second, "a", 2)];
    *cluster.sessions.lock().unwrap() = SessionAnswers { sessions, incomplete: vec!["mac-9".to_owned()] };
    let app = cluster.app_with(settings(false));
    let list = |key| of(Some(key), "GET", "/v1/sessions");
    let json = ask(app.clone(), list("first")).await.json();
    let entry = |id: &str, node: u32| {
        serde_json::json!({
            "id": id, "object": "session", "node": format!("mac-{node}"), "tokens": 64 * node, "idle_s": 1.5,
            "expires_in_s": 30.0,
        })
    };
    let expected = [entry("a", 1), entry("b/c", 2)];
    assert_eq!(json, serde_json::json!({"object": "list", "data": expected, "incomplete": ["mac-9"]}));
    let json = ask(app.clone(), list("second")).await.json();
    assert_eq!(json["data"], serde_json::json!([entry("a", 2)]));

    for path in ["/v1/sessions/b/c", "/v1/sessions/b%2Fc"] {
        let answer = ask(app.clone(), of(Some("first"), "DELETE", path)).await;
        assert_eq!(answer.status(), 200, "{}", answer.text);
        let expected = serde_json::json!({
            "id": "b/c", "object": "session.deleted", "deleted": true, "data": [entry("b/c", 2)],
            "incomplete": ["mac-9"],
        });
        assert_eq!(answer.json(), expected);
    }
    let id = || "b/c".to_owned().try_into().unwrap();
    let asked = cluster.asked_sessions.lock().unwrap().clone();
    assert_eq!(asked.last(), Some(&SessionRequest::End { client: first, id: id() }));
    assert_eq!(ask(app, of(None, "GET", "/v1/sessions")).await.status(), 401);

    // Without keys all are one client.
    *cluster.sessions.lock().unwrap() =
        SessionAnswers { sessions: vec![session(ClientId(0), "a", 1)], incomplete: Vec::new() };
    let json = ask(cluster.app(), of(None, "GET", "/v1/sessions")).await.json();
    assert_eq!(json, serde_json::json!({"object": "list", "data": [entry("a", 1)], "incomplete": []}));
}

#[tokio::test]
async fn sessions_that_are_not_there() {
    let cluster = cluster();
    let second = ClientId::of_key(b"second");
    let sessions = vec![session(second, "a", 1)];
    let check = async |incomplete: &[&str], path: &str, status: u16, code: &str, message: &str| {
        *cluster.sessions.lock().unwrap() = SessionAnswers {
            sessions: sessions.clone(),
            incomplete: incomplete.iter().map(|&name| name.to_owned()).collect(),
        };
        let answer = ask(cluster.app_with(settings(false)), of(Some("first"), "DELETE", path)).await;
        let json = answer.json();
        assert_eq!(answer.status(), status, "{json}");
        assert_eq!(json["error"]["code"], code);
        assert_eq!(json["error"]["message"], message);
        answer
    };
    let message = "there is no session \"a\"";
    let answer = check(&[], "/v1/sessions/a", 404, "session_not_found", message).await;
    assert_eq!(answer.json()["error"]["param"], "session_id");
    let message = "the session \"a\" is not on the nodes that answered, and mac-1, mac-2 did not answer";
    let answer = check(&["mac-1", "mac-2"], "/v1/sessions/a", 503, "nodes_silent", message).await;
    assert_eq!(answer.header("retry-after"), "1");
    let message = "\"two words\" is no session id: 1 to 64 visible ASCII characters are allowed";
    check(&[], "/v1/sessions/two%20words", 400, "invalid_value", message).await;
    let answer = ask(cluster.app(), of(None, "POST", "/v1/sessions")).await;
    assert_eq!(answer.status(), 405);
}

/// What one request with these fields asks the cluster for.
async fn asked(settings: ApiSettings, header: Option<&str>, path: &str, fields: &str) -> GenerateRequest {
    let cluster = cluster();
    let body = match path {
        CHAT => format!(r#"{{"messages": [{{"role": "user", "content": "x"}}]{fields}}}"#),
        _ => format!(r#"{{"prompt": "x"{fields}}}"#),
    };
    let mut request = post(path, body);
    let headers = request.headers_mut();
    if !settings.access.get().keys.is_empty() {
        let key = KEYS[1];
        headers.insert("authorization", format!("Bearer {key}").parse().unwrap());
    }
    if let Some(name) = header {
        headers.insert("x-session-id", name.parse().unwrap());
    }
    let answer = ask(cluster.app_with(settings), request).await;
    assert_eq!(answer.status(), 200, "{}", answer.text);
    cluster.asked_once()
}

#[tokio::test]
async fn what_a_request_says_arrives() {
    let session = |name: &str| Some(name.to_owned().try_into().unwrap());
    for path in [CHAT, TEXT] {
        let none = asked(ApiSettings::default(), None, path, "").await;
        assert_eq!((none.service, &none.cache), (Service::default(), &CacheScope::default()));
        let nulls = r#", "session_id": null, "cache_salt": null, "priority": null, "ttft_target_ms": null"#;
        let nulls = asked(ApiSettings::default(), None, path, nulls).await;
        assert_eq!((nulls.service, &nulls.cache), (Service::default(), &CacheScope::default()));

        let fields = r#", "session_id": "chat-1", "cache_salt": "salt", "priority": "high", "ttft_target_ms": 500,
            "tpot_target_ms": 3600000"#;
        let all = asked(settings(false), Some("other"), path, fields).await;
        let service = Service {
            client: ClientId::of_key(b"second"),
            priority: Priority::High,
            ttft_target_ms: Some(500),
            tpot_target_ms: Some(3_600_000),
            affinity: Some(AffinityKey::new(ClientId::of_key(b"second"), "chat-1")),
        };
        assert_eq!(all.service, service);
        let cache = CacheScope { salt: Some("salt".to_owned()), session: session("chat-1") };
        assert_eq!(all.cache, cache, "the field wins over the header");

        let header = asked(ApiSettings::default(), Some("chat/2"), path, r#", "priority": 3"#).await;
        assert_eq!(header.cache.session, session("chat/2"));
        assert_eq!(header.service.priority, Priority::Low);

        let apart = asked(settings(true), None, path, fields).await;
        assert_eq!(apart.cache, cache.of_client(service.client));
        let apart = asked(settings(true), None, path, "").await;
        assert_eq!(apart.cache, CacheScope::default().of_client(service.client));
    }
}

#[tokio::test]
async fn a_header_that_names_no_session_is_refused() {
    let cluster = cluster();
    for name in ["", "two words", "käse"] {
        let mut request = post(TEXT, r#"{"prompt": "x"}"#);
        let value = axum::http::HeaderValue::from_bytes(name.as_bytes()).unwrap();
        request.headers_mut().insert("x-session-id", value);
        let answer = ask(cluster.app(), request).await;
        let json = answer.json();
        assert_eq!((answer.status(), &json["error"]["param"]), (400, &"x-session-id".into()), "{json}");
        assert!(json["error"]["message"].as_str().unwrap().contains(&format!("{name:?}")), "{json}");
    }
    assert!(cluster.asked.lock().unwrap().is_empty());
}
