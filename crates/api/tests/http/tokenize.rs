//! Texts and conversations in tokens, and back.

use crate::support::*;
use serde_json::{Value, json};
use types::*;

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}";

fn app() -> axum::Router {
    let script = Script::Events(vec![finished(FinishReason::Stop, 1)]);
    Cluster::new(&["tiny"], Some(TEMPLATE), script).app()
}

#[tokio::test]
async fn tokens_of_texts_and_conversations() {
    let check = async |body: &str, tokens: &[u32], strings: Value| {
        let answer = ask(app(), post("/tokenize", body.to_owned())).await;
        let expected = json!({
            "count": tokens.len(), "max_model_len": CONTEXT, "tokens": tokens, "token_strs": strings,
        });
        assert_eq!((answer.status(), answer.json()), (200, expected), "{body}");
    };
    check(r#"{"prompt": "ab"}"#, &[97, 98], Value::Null).await;
    let body = r#"{"model": "tiny", "prompt": "a é<|im_end|>", "add_special_tokens": false, "return_token_strs": true}"#;
    check(body, &[97, 32, 0xc3, 0xa9, 257], json!(["a", "Ġ", "Ã", "©", "<|im_end|>"])).await;
    check(r#"{"prompt": ""}"#, &[], Value::Null).await;
    let messages = r#""messages": [{"role": "user", "content": "a"}]"#;
    check(&format!("{{{messages}}}"), &[256, 97, 257, 256], Value::Null).await;
    let body = format!(r#"{{{messages}, "add_generation_prompt": false, "return_token_strs": true}}"#);
    check(&body, &[256, 97, 257], json!(["<|im_start|>", "a", "<|im_end|>"])).await;
}

#[tokio::test]
async fn texts_of_tokens() {
    let answer = ask(app(), post("/detokenize", r#"{"tokens": [256, 97, 195, 169, 257]}"#)).await;
    assert_eq!((answer.status(), answer.json()), (200, json!({"prompt": "<|im_start|>aé<|im_end|>"})));
    let answer = ask(app(), post("/detokenize", r#"{"tokens": []}"#)).await;
    assert_eq!(answer.json(), json!({"prompt": ""}));
}

#[tokio::test]
async fn refusals() {
    for (path, body, status, param, message) in [
        ("/tokenize", "{}", 400, "prompt", "missing field `prompt`"),
        ("/tokenize", r#"{"prompt": 5}"#, 400, "prompt", "5"),
        ("/tokenize", r#"{"messages": []}"#, 400, "messages", "at least one"),
        ("/tokenize", r#"{"prompt": "a", "return_token_strs": 1}"#, 400, "return_token_strs", "1"),
        ("/tokenize", r#"{"model": "other", "prompt": "a"}"#, 404, "model", "other"),
        ("/detokenize", "{}", 400, "tokens", "missing field `tokens`"),
        ("/detokenize", r#"{"tokens": [259]}"#, 400, "tokens", "259"),
        ("/detokenize", r#"{"tokens": [-1]}"#, 400, "tokens[0]", "-1"),
        ("/detokenize", r#"{"tokens": "a"}"#, 400, "tokens", "expected a sequence"),
    ] {
        let answer = ask(app(), post(path, body)).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status(), error["param"].as_str()), (status, Some(param)), "{body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(message), "{body}: {error}");
    }
    assert_eq!(ask(app(), get("/tokenize")).await.status(), 405);
}
