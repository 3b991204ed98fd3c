//! Chat templates: Jinja as Hugging Face's `apply_chat_template` sets it up.
//!
//! Blocks are trimmed, Python's string and dict methods work, `tojson` writes plain JSON, and `raise_exception`,
//! `strftime_now`, `break` and `continue` exist. Templates come with a model and are bounded in what they may execute.

use super::{
    clock,
    json::{JsonStyle, to_json},
    python,
};
use crate::{
    openai::request::Role,
    text::{HarmonyParser, ReasoningFormat, tools::ToolFormat},
};
use minijinja::{
    Environment, Error, ErrorKind, Value, context,
    value::{Kwargs, ValueKind},
};
use serde::Serialize;
use serde_json::{Value as Json, json};
use std::time::SystemTime;

/// Instructions that one rendering may take: some thousand messages, far below a second.
const FUEL_MAX: u64 = 20_000_000;
/// `chat_template_kwargs` that would replace what a request says elsewhere.
const RESERVED: [&str; 6] = ["messages", "tools", "documents", "bos_token", "eos_token", "chat_template"];
const NAME: &str = "chat";
/// Names that no template has by itself.
const PROBE: &str = "probed_tool";
const PROBE_KEY: &str = "probed_key";

/// A message as templates see it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct TemplateMessage {
    pub(crate) role: Role,
    pub(crate) content: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<TemplateCall>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tool_call_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    /// The same, as gpt-oss calls it; set where the template reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    thinking: Option<String>,
    /// Tools as a text, of a system message; for templates that want them there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tools: Option<String>,
}

impl TemplateMessage {
    /// A message that is only text.
    pub(crate) fn text(role: Role, content: String) -> Self {
        Self {
            role,
            content,
            name: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            reasoning_content: None,
            thinking: None,
            tools: None,
        }
    }
}

/// A call of a tool as templates see it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct TemplateCall {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    pub(crate) function: TemplateFunction,
}

/// What is called.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct TemplateFunction {
    pub(crate) name: String,
    pub(crate) arguments: Json,
}

impl TemplateCall {
    pub(crate) fn new(id: String, name: String, arguments: Json) -> Self {
        Self { id, kind: "function", function: TemplateFunction { name, arguments } }
    }
}

/// How a template takes the arguments of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ArgumentsAs {
    Object,
    /// The JSON text of one.
    Text,
}

/// How a template is told of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ToolsAs {
    /// In a variable.
    Variable,
    /// As a text in the system message's `tools`.
    Message,
    /// It has no place for them: they are told of in the system message's content.
    Content,
}

/// What a template is given.
#[derive(Debug, Default)]
pub(crate) struct TemplateInput {
    pub(crate) messages: Vec<TemplateMessage>,
    /// As OpenAI describes them.
    pub(crate) tools: Option<Vec<Json>>,
    pub(crate) add_generation_prompt: bool,
    pub(crate) reasoning_effort: Option<String>,
    pub(crate) kwargs: serde_json::Map<String, Json>,
}

/// Why a template gives no prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TemplateError {
    #[error("the chat template cannot be parsed: {0}")]
    Syntax(String),
    #[error("chat_template_kwargs may not have {0:?}")]
    Reserved(String),
    #[error("{0}")]
    Render(String),
}

/// A model's chat template, ready to render.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Value,
    knows_developer: bool,
    knows_reasoning_effort: bool,
    knows_thinking: bool,
    tools_as: ToolsAs,
    /// None where calls are left out.
    arguments_as: Option<ArgumentsAs>,
    one_call: bool,
    tool_format: Option<ToolFormat>,
    reasoning: Option<ReasoningFormat>,
    is_harmony: bool,
}

impl ChatTemplate {
    pub(crate) fn new(
        source: &str,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL_MAX));
        python::add_to(&mut environment);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, without_generation_blocks(source))
            .map_err(|error| TemplateError::Syntax(describe(&error)))?;
        let mut template = Self {
            environment,
            special_tokens: context! { bos_token, eos_token },
            knows_developer: source.contains("developer"),
            knows_reasoning_effort: source.contains("reasoning_effort"),
            knows_thinking: source.contains("message.thinking"),
            tools_as: ToolsAs::Variable,
            arguments_as: Some(ArgumentsAs::Object),
            one_call: false,
            tool_format: ToolFormat::of_template(source),
            reasoning: ReasoningFormat::of_template(source),
            is_harmony: HarmonyParser::is_of_template(source),
        };
        if source.contains("tool") {
            template.tools_as = template.probe_tools();
            template.arguments_as = template.probe_arguments();
            template.one_call = template.probe_one_call();
        } else {
            (template.tools_as, template.arguments_as) = (ToolsAs::Content, None);
        }
        Ok(template)
    }

    /// How the template is told of tools.
    pub(crate) fn tools_as(&self) -> ToolsAs {
        self.tools_as
    }

    /// How the template takes the arguments of calls; none where it leaves calls out.
    pub(crate) fn arguments_as(&self) -> Option<ArgumentsAs> {
        self.arguments_as
    }

    /// Whether the template takes no message with several calls, as Llama 3's.
    pub(crate) fn one_call(&self) -> bool {
        self.one_call
    }

    /// How the model writes calls, if the template says.
    pub(crate) fn tool_format(&self) -> Option<ToolFormat> {
        self.tool_format
    }

    /// Whether the model writes messages with headers, as gpt-oss does.
    pub(crate) fn is_harmony(&self) -> bool {
        self.is_harmony
    }

    /// How the model marks its reasoning, if the template says.
    pub(crate) fn reasoning(&self) -> Option<ReasoningFormat> {
        self.reasoning
    }

    /// Found out by telling of a tool.
    fn probe_tools(&self) -> ToolsAs {
        let tool = json!({"type": "function", "function": {"name": PROBE, "description": "",
            "parameters": {"type": "object", "properties": {}}}});
        let user = TemplateMessage::text(Role::User, "x".to_owned());
        let mut system = TemplateMessage::text(Role::System, "x".to_owned());
        system.tools = Some(json!([tool]).to_string());
        let tells = |messages: Vec<TemplateMessage>, tools: Option<Vec<Json>>| {
            let input =
                TemplateInput { messages, tools, add_generation_prompt: true, ..TemplateInput::default() };
            self.render(input).is_ok_and(|prompt| prompt.contains(PROBE))
        };
        if tells(vec![user.clone()], Some(vec![tool])) {
            ToolsAs::Variable
        } else if tells(vec![system, user], None) {
            ToolsAs::Message
        } else {
            ToolsAs::Content
        }
    }

    /// Found out by rendering a call.
    fn probe_arguments(&self) -> Option<ArgumentsAs> {
        if self.renders_calls(&json!({PROBE_KEY: "y"}), 1) {
            return Some(ArgumentsAs::Object);
        }
        let text = Json::from(json!({PROBE_KEY: "y"}).to_string());
        self.renders_calls(&text, 1).then_some(ArgumentsAs::Text)
    }

    /// Found out by rendering two.
    fn probe_one_call(&self) -> bool {
        let arguments = match self.arguments_as {
            None => return false,
            Some(ArgumentsAs::Object) => json!({PROBE_KEY: "y"}),
            Some(ArgumentsAs::Text) => Json::from(json!({PROBE_KEY: "y"}).to_string()),
        };
        !self.renders_calls(&arguments, 2)
    }

    /// Whether a message with calls that have these arguments shows in the prompt.
    fn renders_calls(&self, arguments: &Json, count: usize) -> bool {
        let ids = (0..count).map(|index| format!("abcdefgh{index}"));
        let call = |id: String| TemplateCall::new(id, PROBE.to_owned(), arguments.clone());
        let answer = |id: String| {
            let mut answer = TemplateMessage::text(Role::Tool, "1".to_owned());
            (answer.name, answer.tool_call_id) = (Some(PROBE.to_owned()), Some(id));
            answer
        };
        let mut called = TemplateMessage::text(Role::Assistant, String::new());
        called.tool_calls = ids.clone().map(call).collect();
        let mut messages = vec![TemplateMessage::text(Role::User, "x".to_owned()), called];
        messages.extend(ids.map(answer));
        let prompt = self.render(TemplateInput { messages, ..TemplateInput::default() });
        prompt.is_ok_and(|prompt| prompt.contains(PROBE) && prompt.contains(PROBE_KEY))
    }

    /// Whether the template reads `reasoning_effort`.
    pub(crate) fn knows_reasoning_effort(&self) -> bool {
        self.knows_reasoning_effort
    }

    /// The prompt that the messages make.
    pub(crate) fn render(&self, mut input: TemplateInput) -> Result<String, TemplateError> {
        if let Some(name) = input.kwargs.keys().find(|name| RESERVED.contains(&name.as_str())) {
            return Err(TemplateError::Reserved(name.clone()));
        }
        if !self.knows_developer {
            for message in &mut input.messages {
                if message.role == Role::Developer {
                    message.role = Role::System;
                }
            }
        }
        if self.knows_thinking {
            for message in &mut input.messages {
                message.thinking.clone_from(&message.reasoning_content);
            }
        }
        let TemplateInput { messages, tools, add_generation_prompt, reasoning_effort, mut kwargs } = input;
        if let Some(effort) = reasoning_effort {
            kwargs.entry("reasoning_effort").or_insert_with(|| effort.into());
        }
        let nothing = Value::from(());
        // The first to name a variable wins.
        let variables = context! {
            ..Value::from_serialize(&kwargs),
            ..context! { messages, add_generation_prompt, tools, documents => nothing },
            ..self.special_tokens.clone()
        };
        let template = self.environment.get_template(NAME).expect("added in new");
        template.render(variables).map_err(|error| TemplateError::Render(describe(&error)))
    }
}

/// The innermost message: what `raise_exception` was called with, or what went wrong and where.
fn describe(error: &Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) if error.kind() != ErrorKind::InvalidOperation => format!("{detail} (line {line})"),
        _ => detail,
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: &str) -> Result<String, Error> {
    clock::strftime(format, clock::unix_seconds(SystemTime::now())).ok_or_else(|| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know the format {format:?}"))
    })
}

/// `tojson` takes what Hugging Face's does.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<Value> = kwargs.get("indent")?;
    let indent = match indent {
        Some(indent) if indent.kind() == ValueKind::Number => Some(usize::try_from(indent)?),
        _ => None,
    };
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let separators = match separators.as_deref() {
        None => None,
        Some([item, key]) => Some((item.clone(), key.clone())),
        Some(other) => {
            let message = format!("tojson takes two separators, not {}", other.len());
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    };
    let flag = |name| kwargs.get::<Option<bool>>(name).map(|flag| flag.unwrap_or(false));
    let (sort_keys, ensure_ascii) = (flag("sort_keys")?, flag("ensure_ascii")?);
    kwargs.assert_all_used()?;
    to_json(value, JsonStyle { indent, separators, sort_keys, ensure_ascii })
        .map(Value::from)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}")))
}

/// Replaces `{% generation %}` … `{% endgeneration %}`, which mark an assistant's tokens for training, by blocks that do
/// nothing and trim alike.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(length) = tag.find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(length);
        let inner = tag[2..length - 2].trim_matches(['-', '+']).trim();
        match inner {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
