//! Reasoning, told apart from the answer.

use crate::support::*;
use serde_json::{Value, json};
use types::*;

const CHAT: &str = "/v1/chat/completions";
/// In the style of Qwen 3: reasoning may be turned off, which the prompt shows.
const QWEN: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}";
/// In the style of QwQ: the prompt begins it.
const QWQ: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{{ '' }}{% endif %}";

fn body(more: Value) -> String {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body.to_string()
}

/// Reasoning and content of a whole answer, and of a streamed one, which must be the same.
async fn answers(template: &str, text: &str, more: Value) -> (Value, Value, u64) {
    let cluster = Cluster::new(&["m"], Some(template), Script::Events(says(text)));
    let whole = ask(cluster.app(), post(CHAT, body(more.clone()))).await.json();
    let message = &whole["choices"][0]["message"];
    let mut streaming = more;
    streaming["stream"] = true.into();
    streaming["stream_options"] = json!({"include_usage": true});
    let events = ask(cluster.app(), post(CHAT, body(streaming))).await.events();
    let joined = |field: &str| {
        let deltas = events.iter().filter_map(|event| event["choices"][0]["delta"][field].as_str());
        deltas.collect::<String>()
    };
    assert_eq!(joined("content"), message["content"].as_str().unwrap_or_default());
    assert_eq!(joined("reasoning_content"), message["reasoning_content"].as_str().unwrap_or_default());
    let usage = &whole["usage"];
    assert_eq!(events.last().unwrap()["usage"], *usage);
    let tokens = usage["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
    (message["reasoning_content"].clone(), message["content"].clone(), tokens)
}

#[tokio::test]
async fn reasoning_has_a_field_of_its_own() {
    let text = "<think>\nHm, é.\n</think>\n\nYes.";
    let expected = ("Hm, é.".into(), "Yes.".into(), "<think>\nHm, é.\n</think>".len() as u64 - 6);
    let found = answers(QWEN, text, json!({})).await;
    assert_eq!((found.0, found.1), (expected.0, expected.1));
    // From the token that ends the opening marker to the one that ends the closing one.
    assert_eq!(found.2, expected.2);
    assert_eq!(answers(QWEN, "Yes.", json!({})).await, (Value::Null, "Yes.".into(), 0));
    let begun = answers(QWQ, "Hm.\n</think>\n\nYes.", json!({})).await;
    assert_eq!((begun.0, begun.1), ("Hm.".into(), "Yes.".into()));
    let endless = answers(QWQ, "Hm. <think", json!({})).await;
    assert_eq!((endless.0, endless.1, endless.2), ("Hm. <think".into(), "".into(), 10));
    // Where it is turned off, what looks like it is text.
    let off = json!({"chat_template_kwargs": {"enable_thinking": false}});
    let text = "<think>a</think>b";
    assert_eq!(answers(QWEN, text, off).await, (Value::Null, text.into(), 0));
}

#[tokio::test]
async fn a_grammar_begins_after_it() {
    let grammar = async |template: &str, more: Value| {
        let cluster = Cluster::new(&["m"], Some(template), Script::Events(says("{}")));
        let answer = ask(cluster.app(), post(CHAT, body(more))).await;
        assert_eq!(answer.status(), 200, "{}", answer.text);
        cluster.asked_once().rules.grammar.clone().unwrap()
    };
    let object = || json!({"response_format": {"type": "json_object"}});
    let begun = "start: mlx_reasoning MLX_SPACE? mlx_answer\nmlx_answer: %json {\"type\":\"object\"}\nmlx_reasoning[lazy]: /(?s:.*)<\\/think>/\nMLX_SPACE: /[ \\t\\r\\n]{1,8}/\n";
    assert_eq!(grammar(QWQ, object()).await, Grammar::Lark(begun.to_owned()));
    let Grammar::Lark(perhaps) = grammar(QWEN, object()).await else { panic!("Lark") };
    assert!(perhaps.starts_with("start: (\"<think>\" mlx_reasoning MLX_SPACE?)? mlx_answer\n"), "{perhaps}");
    let mut off = object();
    off["chat_template_kwargs"] = json!({"enable_thinking": false});
    assert_eq!(grammar(QWEN, off).await, Grammar::JsonSchema("{\"type\":\"object\"}".to_owned()));
    let regex = json!({"guided_regex": "a/b\\/c\n"});
    let Grammar::Lark(regex) = grammar(QWQ, regex).await else { panic!("Lark") };
    assert!(regex.contains("mlx_answer: /a\\/b\\/c\\n/\n"), "{regex}");
    let lark =
        json!({"guided_grammar": "start: \"start\" other # start\nother: /start/ start_2\nstart_2: \"x\""});
    let Grammar::Lark(lark) = grammar(QWQ, lark).await else { panic!("Lark") };
    assert!(lark.contains("mlx_start: \"start\" other # start\nother: /start/ start_2\n"), "{lark}");
}

#[tokio::test]
async fn the_last_message_may_be_continued() {
    let continued = json!({
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>So"}],
        "add_generation_prompt": false, "continue_final_message": true,
    });
    let cluster = Cluster::new(&["m"], Some(QWEN), Script::Events(says(" it is.</think>Yes.")));
    let answer = ask(cluster.app(), post(CHAT, continued.to_string())).await;
    assert_eq!(answer.status(), 200, "{}", answer.text);
    let message = &answer.json()["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&"it is.".into(), &"Yes.".into()));
    let prompt = cluster.asked_once().prompt.clone();
    assert!(prompt.ends_with(&"assistant\n<think>So".bytes().map(u32::from).collect::<Vec<_>>()));
    let check = async |more: Value, message: &str| {
        let mut body = continued.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = ask(cluster.app(), post(CHAT, body.to_string())).await;
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status(), &error["param"]), (400, &"continue_final_message".into()), "{error}");
        assert!(error["message"].as_str().unwrap().contains(message), "{error}");
    };
    check(json!({"add_generation_prompt": true}), "add_generation_prompt must be false").await;
    check(json!({"messages": [{"role": "assistant", "content": ""}]}), "must have content").await;
}

/// In the style of gpt-oss: the answer is several messages, each with a header.
#[tokio::test]
async fn messages_with_headers_are_told_apart() {
    const MARKERS: [&str; 5] = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>"];
    let template = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}{{ tools }}<|start|>assistant{# <|channel|> #}";
    let said = |text: &str| {
        let (mut tokens, mut rest) = (Vec::new(), text);
        while let Some(first) = rest.bytes().next() {
            let marker = MARKERS.iter().position(|marker| rest.starts_with(marker));
            tokens.push(marker.map_or_else(|| u32::from(first), |index| 259 + index as u32));
            rest = &rest[marker.map_or(1, |index| MARKERS[index].len())..];
        }
        let event = |(index, token)| TokenEvent::Tokens {
            index: index as u32,
            tokens: vec![token],
            logprobs: Vec::new(),
        };
        let mut events: Vec<TokenEvent> = tokens.into_iter().enumerate().map(event).collect();
        events.push(finished(FinishReason::Stop, 50));
        events
    };
    let tool = json!({"type": "function", "function": {"name": "time", "strict": true, "parameters": {"type": "object"}}});
    let answer = async |text: &str, more: Value| {
        let cluster = Cluster::with_special(&["m"], Some(template), Script::Events(said(text)), &MARKERS);
        let answer = ask(cluster.app(), post(CHAT, body(more))).await;
        assert_eq!(answer.status(), 200, "{}", answer.text);
        (answer.json(), cluster.asked_once().rules.grammar.clone())
    };
    let text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.";
    let (json, grammar) = answer(text, json!({})).await;
    let message = &json["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&"Hm.".into(), &"Yes.".into()));
    assert_eq!(json["usage"]["completion_tokens_details"]["reasoning_tokens"], 5);
    assert_eq!(grammar, None);
    let text = "<|channel|>commentary to=functions.time <|constrain|>json<|message|>{\"a\": 1}";
    let (json, grammar) = answer(text, json!({"tools": [tool]})).await;
    let choice = &json["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(
        choice["message"]["tool_calls"][0]["function"],
        json!({"name": "time", "arguments": "{\"a\": 1}"})
    );
    let Some(Grammar::Lark(lark)) = grammar else { panic!("a grammar") };
    assert!(
        lark.contains("<[259]> \"commentary to=functions.time \" <[263]> \"json\" <[260]> %json"),
        "{lark}"
    );
    let (json, _) = answer("Yes.", json!({})).await;
    assert_eq!(json["choices"][0]["message"]["content"], "Yes.");
}
