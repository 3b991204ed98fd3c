//! Templates in the style of well-known models render as Hugging Face renders them.

use super::*;

const LLAMA3: &str = "\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{%- if system_message %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system_message + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
";

const MISTRAL: &str = "\
{{ bos_token }}
{%- set ns = namespace(index=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ raise_exception('Only user and assistant roles are supported!') }}{%- endif -%}
{%- if (message['role'] == 'user') != (ns.index % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- set ns.index = ns.index + 1 -%}
{%- if message['role'] == 'user' -%}
{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
";

const QWEN25: &str = "\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == \"user\") or (message.role == \"system\" and not loop.first) or (message.role == \"assistant\" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == \"tool\" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != \"tool\") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != \"tool\") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
";

const SMOLLM2: &str = "\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helper.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}";

/// Renders `[role, content]` pairs; an error is shown after `error: `.
fn render(source: &str, messages: &[(Role, &str)], kwargs: serde_json::Value) -> String {
    let template = ChatTemplate::new(source, Some("<s>"), Some("</s>")).unwrap();
    let messages = messages.iter().map(|&(role, content)| TemplateMessage::text(role, content.to_owned()));
    let input = TemplateInput {
        messages: messages.collect(),
        tools: None,
        add_generation_prompt: true,
        reasoning_effort: Some("low".to_owned()),
        kwargs: kwargs.as_object().unwrap().clone(),
    };
    template.render(input).unwrap_or_else(|error| format!("error: {error}"))
}

#[test]
fn known_styles() {
    use Role::{Assistant as A, Developer as D, System as S, Tool as T, User as U};
    let check = |source, messages: &[(Role, &str)], expected: &str| {
        assert_eq!(render(source, messages, json!({})), expected);
    };
    check(
        LLAMA3,
        &[(S, " Be kind. "), (U, "Hi <b>&'\"")],
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi <b>&'\"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    );
    check(MISTRAL, &[(U, " Hi "), (A, "Yes?"), (U, "Ok")], "<s>[INST] Hi [/INST] Yes?</s>[INST] Ok [/INST]");
    check(MISTRAL, &[(S, "x")], "error: Only user and assistant roles are supported!");
    check(
        MISTRAL,
        &[(U, "x"), (U, "y")],
        "error: Conversation roles must alternate user/assistant/user/assistant/...",
    );
    check(
        QWEN25,
        &[(U, "Hi"), (T, "1"), (T, "2")],
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    );
    check(
        SMOLLM2,
        &[(U, "Hi")],
        "<|im_start|>system\nYou are a helper.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    );
    // A template that does not know OpenAI's newer name is told the old one.
    check(
        SMOLLM2,
        &[(D, "D"), (U, "Hi")],
        "<|im_start|>system\nD<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    );
}

#[test]
fn variables_of_the_request() {
    let messages = [(Role::User, "Hi")];
    let no_thinking = render(QWEN25, &messages, json!({"enable_thinking": false}));
    assert!(no_thinking.ends_with("assistant\n<think>\n\n</think>\n\n"), "{no_thinking:?}");
    assert_eq!(
        render("x", &messages, json!({"messages": []})),
        "error: chat_template_kwargs may not have \"messages\""
    );
    // As with vLLM, `chat_template_kwargs` have the last word.
    let kwargs = json!({"add_generation_prompt": false});
    assert_eq!(render("{{ add_generation_prompt }}", &messages, kwargs), "False");
}

#[test]
fn python_and_hugging_face_additions() {
    let check = |source: &str, expected: &str| {
        assert_eq!(
            render(source, &[(Role::User, "a</think>b")], json!({"t": {"k": ["<é>"], "n": null}})),
            expected
        );
    };
    check("{{ t | tojson }}", r#"{"k": ["<é>"], "n": null}"#);
    check("{{ t | tojson(indent=4) }}", "{\n    \"k\": [\n        \"<é>\"\n    ],\n    \"n\": null\n}");
    check("{{ messages[0].content.split('</think>')[-1].lstrip('\\n') }}", "b");
    check("{{ t.get('x', 'none') }}{% for k, v in t.items() %}{{ k }}{% endfor %}", "nonekn");
    check("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01");
    check("a\n  {% if true %}\n  b\n  {% endif %}\nc\n", "a\n  b\nc");
    check("a {%- generation -%} b {% endgeneration %}\nc", "ab c");
    check("{{ reasoning_effort }}", "low");
    // As Qwen 3, gpt-oss and Llama 3.x use them.
    check(
        "{% for n in [1, 2, 3][::-1] %}{{ n }}{% endfor %}{{ [1, 2, 3][1:] }}{{ 'abc'[:-1] }}",
        "321[2, 3]ab",
    );
    check("{% for m in messages[::-1] %}{{ loop.index0 }}{{ m.role }}{% endfor %}", "0user");
    check(
        "{{ 'a\nb'.split('\n')[0] }}{{ ' x'.lstrip() }}{{ 'abc'.startswith('ab') and 'abc'.endswith('c') }}",
        "axTrue",
    );
    check(
        "{% macro f(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{{ f(1) }}{{ t is mapping }}{{ 'x' is string }}",
        "12TrueTrue",
    );
    check(
        "{{ t.items() | list | length }}{{ t | dictsort | length }}{{ (t | tojson)[:-1] }}",
        "22{\"k\": [\"<é>\"], \"n\": null",
    );
    check(
        "{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b is defined }}",
        "4False",
    );
    check(
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ {'a': 1} | items | first | join }}",
        "1a1",
    );
    check(
        "{{ [1, 2] + [3] }}{{ [1, 2] | map('string') | join('-') }}{{ 1 if false else '' }}{{ none is none }}",
        "[1, 2, 3]1-2True",
    );
    check("{{ tools is none }}{{ tools is defined }}{{ missing is defined }}", "TrueTrueFalse");
    check("{{ strftime_now('%Y')|length }}", "4");
    check("{{ strftime_now('%Q') }}", "error: strftime_now does not know the format \"%Q\"");
    check("{{ missing.field }}", "error: undefined value (line 1)");
}

#[test]
fn how_tools_are_told_is_found_out() {
    let check = |source: &str, tools: ToolsAs, arguments: Option<ArgumentsAs>| {
        let template = ChatTemplate::new(source, None, None).unwrap();
        assert_eq!((template.tools_as(), template.arguments_as()), (tools, arguments), "{source}");
    };
    let calls = |arguments: &str| {
        format!(
            "{{% for m in messages %}}{{% if m.tool_calls is defined %}}{{% for c in m.tool_calls %}}{{{{ c.function.name }}}}{{{{ {arguments} }}}}{{% endfor %}}{{% else %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
        )
    };
    use ArgumentsAs::{Object, Text};
    check("{{ messages }}", ToolsAs::Content, None);
    check(QWEN25, ToolsAs::Variable, None);
    check(&calls("c.function.arguments | tojson"), ToolsAs::Content, Some(Object));
    check(&calls("'```json' + c.function.arguments + '```'"), ToolsAs::Content, Some(Text));
    check(&calls("c.function | tojson"), ToolsAs::Content, Some(Object));
    let either = "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson";
    check(&calls(either), ToolsAs::Content, Some(Object));
    check(
        &format!("{{{{ tools | tojson }}}}{}", calls("c.function.arguments.items() | list")),
        ToolsAs::Variable,
        Some(Object),
    );
    let one = calls("c.function.arguments | tojson");
    let one = format!(
        "{{% if messages[1].tool_calls|length > 1 %}}{{{{ raise_exception('one') }}}}{{% endif %}}{one}"
    );
    assert!(ChatTemplate::new(&one, None, None).unwrap().one_call());
    assert!(!ChatTemplate::new(&calls("c.function.arguments"), None, None).unwrap().one_call());
    let phi = "{% for m in messages %}{% if m.role == 'system' and 'tools' in m %}{{ '<|tool|>' + m['tools'] + '<|/tool|>' }}{% endif %}{{ m.content }}{% endfor %}";
    check(phi, ToolsAs::Message, None);
}

#[test]
fn bounds() {
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    assert_eq!(render(endless, &[], json!({})), "error: engine ran out of fuel (line 1)");
    let error = ChatTemplate::new("{% if %}", None, None).unwrap_err();
    assert!(matches!(error, TemplateError::Syntax(_)), "{error}");
}

/// What `tests/goldens/chat_templates.py` says of templates in the style of eight families, and of the language that they use.
#[test]
fn prompts_are_those_of_jinja2() {
    let golden: Json =
        serde_json::from_str(include_str!("../../../../tests/goldens/chat_templates.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 250, "{}", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        let [name, what] = ["template", "conversation"].map(|key| case[key].as_str().unwrap());
        let now = golden["now"].as_str().unwrap().to_owned();
        let source = golden["templates"][name].as_str().unwrap();
        let rendered = ChatTemplate::new(source, Some("<s>"), Some("</s>")).and_then(|mut template| {
            template.environment.add_function("strftime_now", move |_: String| now.clone());
            template.render(golden_input(&golden["conversations"][what], &case["variables"]))
        });
        let as_jinja2 = match (&rendered, case["prompt"].as_str(), case["error"].as_str()) {
            (Ok(prompt), Some(expected), _) => prompt == expected,
            (Err(TemplateError::Render(message)), None, Some(expected)) => message == expected,
            _ => false,
        };
        if !as_jinja2 {
            wrong.push(format!("{name}, {what}, {}:\n{rendered:?}\nbut jinja2: {case}", case["variables"]));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n\n"));
}

fn golden_input(conversation: &Json, variables: &Json) -> TemplateInput {
    let message = |json: &Json| {
        let text = |key: &str| json[key].as_str().map(str::to_owned);
        let role: Role = serde_json::from_value(json["role"].clone()).unwrap();
        let mut message = TemplateMessage::text(role, text("content").unwrap());
        let calls = json["tool_calls"].as_array().into_iter().flatten();
        let call = |call: &Json| {
            let [id, name] =
                [&call["id"], &call["function"]["name"]].map(|json| json.as_str().unwrap().to_owned());
            TemplateCall::new(id, name, call["function"]["arguments"].clone())
        };
        message.tool_calls = calls.map(call).collect();
        message.name = text("name");
        message.tool_call_id = text("tool_call_id");
        message.reasoning_content = text("reasoning_content");
        message.tools = text("tools");
        message
    };
    let mut kwargs = variables.as_object().unwrap().clone();
    TemplateInput {
        messages: conversation["messages"].as_array().unwrap().iter().map(message).collect(),
        tools: conversation["tools"].as_array().cloned(),
        add_generation_prompt: kwargs.remove("add_generation_prompt").unwrap().as_bool().unwrap(),
        reasoning_effort: None,
        kwargs,
    }
}
