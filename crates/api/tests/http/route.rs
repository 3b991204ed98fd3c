//! Where requests would go, and what keeps those together that belong together.

use crate::support::*;
use types::*;

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}";

fn cluster() -> std::sync::Arc<Cluster> {
    Cluster::new(&["tiny"], Some(TEMPLATE), Script::Events(vec![finished(FinishReason::Stop, 1)]))
}

#[tokio::test]
async fn bodies_of_both_kinds_are_planned_and_not_sent() {
    let check = async |body: &str, prompts: &[&[u32]], max_tokens: u32| {
        let cluster = cluster();
        let answer = ask(cluster.app(), post("/v1/cluster/route", body.to_owned())).await;
        assert_eq!(answer.status(), 200, "{}", answer.text);
        let json = answer.json();
        assert_eq!(json["object"], "cluster.route");
        let planned = cluster.planned.lock().unwrap();
        let expected: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.to_vec()).collect();
        assert_eq!(planned.iter().map(|request| request.prompt.clone()).collect::<Vec<_>>(), expected);
        for (index, request) in planned.iter().enumerate() {
            assert_eq!(request.max_tokens, max_tokens);
            let data = &json["data"][index];
            assert_eq!((&data["model"], &data["waiting"]), (&"tiny".into(), &3.into()));
            assert_eq!(data["prompt_tokens"], request.prompt.len());
            assert_eq!((data["route"].is_null(), &data["wait_s"]), (true, &1.5.into()));
        }
        assert!(cluster.asked.lock().unwrap().is_empty(), "nothing is sent");
    };
    check(r#"{"model":"tiny","prompt":"ab"}"#, &[&[97, 98]], 16).await;
    check(r#"{"prompt":["a","b"],"max_tokens":5}"#, &[&[97], &[98]], 5).await;
    check(r#"{"messages":[{"role":"user","content":"a"}],"max_tokens":7}"#, &[&[256, 97]], 7).await;
}

#[tokio::test]
async fn what_cannot_be_planned_says_why() {
    let check = async |script: Script, body: &str, status: u16, code: &str| {
        let cluster = Cluster::new(&["tiny"], None, script);
        let answer = ask(cluster.app(), post("/v1/cluster/route", body.to_owned())).await;
        assert_eq!((answer.status(), &answer.json()["error"]["code"]), (status, &code.into()));
    };
    let none = || Script::Events(Vec::new());
    check(none(), "[]", 400, "invalid_type").await;
    check(none(), "{}", 400, "invalid_type").await;
    check(none(), r#"{"model":"other","prompt":"a"}"#, 404, "model_not_found").await;
    check(none(), r#"{"messages":[{"role":"user","content":"a"}]}"#, 400, "no_chat_template").await;
    let refuse = Script::Refuse(GenerateError::Busy { retry_after_ms: 1500 });
    check(refuse, r#"{"prompt":"a"}"#, 429, "queue_full").await;
}

#[tokio::test]
async fn sessions_and_users_belong_together() {
    let affinity = async |fields: &str| {
        let cluster = cluster();
        let body = format!(r#"{{"prompt":"a"{fields}}}"#);
        let answer = ask(cluster.app(), post("/v1/completions", body)).await;
        assert_eq!(answer.status(), 200, "{}", answer.text);
        cluster.asked_once().service.affinity
    };
    assert_eq!(affinity("").await, None);
    assert_eq!(affinity(r#","user":"""#).await, None);
    let of = |name: &str| Some(AffinityKey::new(ClientId::default(), name));
    assert_eq!(affinity(r#","user":"u""#).await, of("u"));
    assert_eq!(affinity(r#","user":"u","prompt_cache_key":"k""#).await, of("k"));
    assert_eq!(affinity(r#","user":"u","session_id":"s","prompt_cache_key":"k""#).await, of("s"));
    assert_ne!(of("u"), Some(AffinityKey::new(ClientId(1), "u")));
}
