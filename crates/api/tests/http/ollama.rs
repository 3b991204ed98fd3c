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
