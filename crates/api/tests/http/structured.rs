//! What an answer must be like, in all the ways to say it.

use crate::support::*;
use serde_json::{Value, json};
use types::*;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn every_way_to_say_it_arrives() {
    let schema = json!({"type": "object", "properties": {"b": {"type": "string"}, "a": {}}});
    let json_schema = || Some(Grammar::JsonSchema(schema.to_string()));
    let lark = |text: &str| Some(Grammar::Lark(text.to_owned()));
    let regex = || Some(Grammar::Regex("a+".to_owned()));
    let object = || Some(Grammar::JsonSchema(r#"{"type":"object"}"#.to_owned()));
    let choices = || lark("start: mlx_answer\nmlx_answer: \"yes\" | \"n\\\"o\"\n");
    let named = |strict: bool| json!({"type": "json_schema", "json_schema": {"name": "x", "strict": strict, "schema": schema}});
    let cases = [
        (json!({"response_format": {"type": "text"}}), None),
        (json!({"response_format": {"type": "json_object"}}), object()),
        (json!({"response_format": named(true)}), json_schema()),
        (json!({"response_format": named(false)}), json_schema()),
        (json!({"guided_json": schema}), json_schema()),
        (json!({"guided_json": schema.to_string()}), json_schema()),
        (json!({"guided_regex": "a+"}), regex()),
        (json!({"guided_choice": ["yes", "n\"o"]}), choices()),
        (json!({"guided_grammar": "start: \"x\""}), lark("start: \"x\"")),
        (json!({"structured_outputs": {"json": schema}}), json_schema()),
        (json!({"structured_outputs": {"regex": "a+"}}), regex()),
        (json!({"structured_outputs": {"choice": ["yes", "n\"o"]}}), choices()),
        (json!({"structured_outputs": {"grammar": "start: \"x\""}}), lark("start: \"x\"")),
        (json!({"structured_outputs": {"json_object": true}}), object()),
        (json!({"structured_outputs": {}, "guided_json": null}), None),
    ];
    for (fields, expected) in cases {
        for (path, mut body) in [
            (CHAT, json!({"messages": [{"role": "user", "content": "Hi"}]})),
            (TEXT, json!({"prompt": "Hi"})),
        ] {
            body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            body["min_tokens"] = 2.into();
            let cluster = Cluster::new(&["m"], Some("{{ messages[0].content }}"), Script::Events(says("x")));
            let answer = ask(cluster.app(), post(path, body.to_string())).await;
            assert_eq!(answer.status(), 200, "{}", answer.text);
            let expected = OutputRules { grammar: expected.clone(), min_tokens: 2 };
            assert_eq!(cluster.asked_once().rules, expected, "{fields}");
        }
    }
}

/// What only the node that compiles a grammar can know, is told with the name of the field.
#[tokio::test]
async fn a_refusal_names_the_field() {
    let refused = |param: &str| GenerateError::Invalid {
        message: "\"oneOf\" is not supported".to_owned(),
        param: Some(param.to_owned()),
    };
    let check = async |fields: Value, script: Script, stream: bool, param: &str| {
        let mut body = json!({"prompt": "x", "stream": stream});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let answer = ask(Cluster::new(&["m"], None, script).app(), post(TEXT, body.to_string())).await;
        let json: Value = serde_json::from_str(answer.text.trim_start_matches("data: ").trim()).unwrap();
        assert_eq!(
            (&json["error"]["param"], &json["error"]["code"]),
            (&param.into(), &"invalid_value".into())
        );
        assert!(json["error"]["message"].as_str().unwrap().contains("\"oneOf\" is not supported"), "{json}");
    };
    let schema = || json!({"guided_json": {"oneOf": []}});
    check(schema(), Script::Refuse(refused("grammar")), false, "guided_json").await;
    check(schema(), Script::Refuse(refused("min_tokens")), false, "min_tokens").await;
    let late = vec![finished(FinishReason::Failed(refused("grammar")), 0)];
    check(schema(), Script::Events(late.clone()), false, "guided_json").await;
    check(json!({"response_format": {"type": "json_object"}}), Script::Events(late), true, "response_format")
        .await;
    let large = json!({"guided_regex": "a".repeat(limits::GRAMMAR_BYTES_MAX + 1)}).to_string();
    let body = large.replacen('{', r#"{"prompt": "x", "#, 1);
    let answer = ask(Cluster::new(&["m"], None, Script::Events(says("x"))).app(), post(TEXT, body)).await;
    assert_eq!((answer.status(), &answer.json()["error"]["param"]), (400, &"guided_regex".into()));
}
