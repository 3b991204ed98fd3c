//! Vectors of texts, in OpenAI's words and in Ollama's.

use crate::support::*;
use serde_json::{Value, json};
use types::*;

fn app() -> axum::Router {
    Cluster::new(&["embed", "tiny"], None, Script::Events(vec![finished(FinishReason::Stop, 1)])).app()
}

async fn asked(path: &str, body: &Value) -> (u16, Value) {
    let answer = ask(app(), post(path, body.to_string())).await;
    (answer.status(), answer.json())
}

fn numbers(value: &Value) -> Vec<f32> {
    value
        .as_array()
        .expect("numbers")
        .iter()
        .map(|number| number.as_f64().expect("a number") as f32)
        .collect()
}

/// What the scripted model makes of these tokens.
fn vectors(inputs: &[&[TokenId]]) -> Vec<Vec<f32>> {
    inputs.iter().map(|input| embedding(input)).collect()
}

#[tokio::test]
async fn every_kind_of_input_becomes_vectors_in_order() {
    let check = async |input: Value, expected: &[&[TokenId]]| {
        let (status, json) = asked("/v1/embeddings", &json!({"model": "embed", "input": input})).await;
        assert_eq!(status, 200, "{json}");
        let data = json["data"].as_array().expect("data");
        let got: Vec<Vec<f32>> = data.iter().map(|item| numbers(&item["embedding"])).collect();
        assert_eq!(got, vectors(expected), "{input}");
        for (index, item) in data.iter().enumerate() {
            assert_eq!((&item["index"], &item["object"]), (&json!(index), &json!("embedding")));
        }
        let tokens: usize = expected.iter().map(|input| input.len()).sum();
        assert_eq!(json["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
        assert_eq!((&json["object"], &json["model"]), (&json!("list"), &json!("embed")));
    };
    check(json!("ab"), &[&[97, 98]]).await;
    check(json!(["ab", "c"]), &[&[97, 98], &[99]]).await;
    check(json!([5, 6]), &[&[5, 6]]).await;
    check(json!([[5, 6], [7]]), &[&[5, 6], &[7]]).await;
    // More than one question to the cluster, and still in order.
    let many: Vec<Vec<TokenId>> = (0..100).map(|index| vec![index + 1, index]).collect();
    check(json!(many), &many.iter().map(Vec::as_slice).collect::<Vec<_>>()).await;
}

#[tokio::test]
async fn vectors_are_written_and_cut_as_asked() {
    let body = json!({"model": "embed", "input": "ab", "encoding_format": "base64"});
    let (_, json) = asked("/v1/embeddings", &body).await;
    let expected = "AAAAPwAAAD8AAAA/AAAAPw==";
    // Half each: the scripted model makes that of this text.
    assert_eq!(embedding(&[97, 98]), [0.5; 4]);
    assert_eq!(json["data"][0]["embedding"], expected);
    let body = json!({"model": "embed", "input": "ab", "dimensions": 1, "encoding_format": "float"});
    let (_, json) = asked("/v1/embeddings", &body).await;
    assert_eq!(numbers(&json["data"][0]["embedding"]), [1.0]);
}

#[tokio::test]
async fn ollama_gets_its_own_words() {
    let (status, json) = asked("/api/embed", &json!({"model": "embed", "input": ["ab", "c"]})).await;
    assert_eq!(status, 200, "{json}");
    let got: Vec<Vec<f32>> = json["embeddings"].as_array().expect("vectors").iter().map(numbers).collect();
    assert_eq!(got, vectors(&[&[97, 98], &[99]]));
    assert_eq!((&json["model"], &json["prompt_eval_count"]), (&json!("embed"), &json!(3)));
    // Cut to the context unless told otherwise; the end stays.
    let long = format!("{}z", "a".repeat(CONTEXT as usize));
    let (status, json) = asked("/api/embed", &json!({"model": "embed", "input": long})).await;
    assert_eq!((status, &json["prompt_eval_count"]), (200, &json!(CONTEXT)));
    let body = json!({"model": "embed", "input": long, "truncate": false});
    let (status, json) = asked("/api/embed", &body).await;
    let expected = json!({"error": "input 0 has 1001 tokens; the model's context is 1000 tokens"});
    assert_eq!((status, json), (400, expected));
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let check = async |path: &str, change: Value, param: &str, message: &str| {
        let mut body = json!({"model": "embed", "input": "ab"});
        body.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        let (status, json) = asked(path, &body).await;
        let error = &json["error"];
        assert_eq!((status, &error["param"], &error["message"]), (400, &json!(param), &json!(message)));
    };
    let path = "/v1/embeddings";
    let wrong = "the model \"tiny\" generates texts (/v1/chat/completions); it makes no vectors of them";
    check(path, json!({"model": "tiny"}), "model", wrong).await;
    let wrong = "the model \"embed\" makes vectors of texts (/v1/embeddings); it does not generate";
    check("/v1/completions", json!({"prompt": "ab"}), "model", wrong).await;
    check(path, json!({"dimensions": 5}), "dimensions", "dimensions is 5; it must be from 1 to 4").await;
    check(path, json!({"dimensions": 0}), "dimensions", "dimensions is 0; it must be from 1 to 4").await;
    check(path, json!({"input": ""}), "input", "input 0 is empty").await;
    check(path, json!({"input": ["a", ""]}), "input", "input 1 is empty").await;
    let long = "input 0 has 1001 tokens; the model's context is 1000 tokens";
    check(path, json!({"input": "a".repeat(1001)}), "input", long).await;
    let (status, json) = asked(path, &json!({"model": "embed", "input": vec!["a"; 2049]})).await;
    assert_eq!(status, 400, "{json}");
    assert!(json["error"]["message"].as_str().is_some_and(|said| said.contains("2048")), "{json}");
    for body in [
        json!({"model": "embed"}),
        json!({"model": "embed", "input": "a", "encoding_format": "hex"}),
        json!({"model": "embed", "input": []}),
        json!({"model": "embed", "input": [300]}),
    ] {
        let (status, json) = asked(path, &body).await;
        assert_eq!(status, 400, "{body}: {json}");
    }
    let (status, json) = asked(path, &json!({"model": "other", "input": "a"})).await;
    assert_eq!((status, &json["error"]["code"]), (404, &json!("model_not_found")));
}
