//! A conversation becomes a prompt: its template's, or for a template that knows no tools, with these told of in text.

use super::{Conversation, Job, Message, Shape, Tool, ToolChoice, grammar, start::resolve};
use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    openai::request::Role,
    prompt::{
        ArgumentsAs, ChatTemplate, ModelText, TemplateCall, TemplateError, TemplateInput, TemplateMessage,
    },
    text::{AnswerFormat, tools::ToolFormat},
};
use serde_json::{Value, json};
use std::sync::Arc;
use types::ModelCard;

impl Conversation {
    /// Checks everything and reads the prompt. `body_bytes` is how large the request was, which says where to work on it.
    pub(crate) async fn job(
        mut self,
        state: &AppState,
        caller: &Caller,
        body_bytes: usize,
    ) -> Result<Job, ApiError> {
        self.check()?;
        let card = resolve(state, self.model.as_deref())?;
        let mut parameters = std::mem::take(&mut self.parameters).check(&card, caller)?;
        let text = state.texts.get(&card).await?;
        let continues = self.continue_final_message;
        let forced = matches!(self.tool_choice, ToolChoice::Required | ToolChoice::Named(_));
        let grammar_param = if forced || self.shape == Shape::Free { "tools" } else { self.shape_param };
        let (model, chosen) = (card.clone(), state.settings.tool_formats.get(&card.name).copied());
        let render = move |text: &ModelText| self.render(text, &model, chosen);
        let (prompt, (format, grammar)) = state.texts.read(&text, body_bytes, render).await?;
        parameters.rules.grammar = grammar;
        Ok(Job {
            id: caller.id,
            card,
            text,
            prompts: vec![prompt],
            prompt_param: "messages",
            continues,
            max_tokens_default: None,
            format,
            grammar_param,
            parameters,
        })
    }

    /// The prompt, how the answer is to be read, and what it must be like.
    fn render(
        self,
        text: &ModelText,
        card: &ModelCard,
        chosen: Option<ToolFormat>,
    ) -> Result<(String, (AnswerFormat, Option<types::Grammar>)), ApiError> {
        let model = || card.name.clone();
        let Some(template) = text.template() else {
            return Err(ApiError::NoChatTemplate { model: model() });
        };
        if let Some(value) = self.reasoning_effort.as_ref().filter(|_| !template.knows_reasoning_effort()) {
            let value = format!("{value:?}");
            return Err(ApiError::UnknownToTemplate { param: "reasoning_effort", value, model: model() });
        }
        let tools: Arc<[Tool]> = if self.has_tools() { self.tools.clone().into() } else { Arc::new([]) };
        let format = chosen.or_else(|| template.tool_format()).unwrap_or(ToolFormat::Hermes);
        let input = self.template_input(template, &tools, format);
        let last = self.messages.last().map(|message| message.content.clone());
        let rendered = template.render(input).map_err(|error| match error {
            TemplateError::Reserved(_) => ApiError::parameter("chat_template_kwargs", error.to_string()),
            TemplateError::Syntax(message) | TemplateError::Render(message) => {
                ApiError::Template { model: model(), message }
            }
        })?;
        let prompt = match last.filter(|_| self.continue_final_message) {
            None => rendered,
            Some(last) => cut_after(rendered, &last)
                .ok_or_else(|| ApiError::Template { model: model(), message: LAST_CHANGED.to_owned() })?,
        };
        let reasoning = template.reasoning().map(|format| {
            let start = format.after_prompt(&prompt, self.continue_final_message);
            (format, start)
        });
        let special = text.special_tokens();
        let grammar = grammar::of(&self, &tools, format, reasoning, special)?;
        let answer = AnswerFormat { reasoning, tools: (!tools.is_empty()).then_some((format, tools)) };
        Ok((prompt, (answer, grammar)))
    }

    /// What the template is given.
    fn template_input(&self, template: &ChatTemplate, tools: &[Tool], format: ToolFormat) -> TemplateInput {
        let short_ids = format.syntax().short_ids;
        let told = template.knows_tools();
        let mut messages: Vec<TemplateMessage> =
            self.messages.iter().map(|message| template_message(message, template, short_ids)).collect();
        if !told {
            in_text(&mut messages, tools);
        }
        let mut kwargs = self.template_kwargs.clone();
        if let Some(thinking) = self.thinking {
            for name in ["enable_thinking", "thinking"] {
                kwargs.entry(name).or_insert(thinking.into());
            }
        }
        TemplateInput {
            messages,
            tools: (told && !tools.is_empty()).then(|| tools.iter().map(Tool::to_template).collect()),
            add_generation_prompt: self.add_generation_prompt,
            reasoning_effort: self.reasoning_effort.clone(),
            kwargs,
        }
    }
}

const LAST_CHANGED: &str = "it changes the last message, so continue_final_message is impossible";

/// The text up to the end of the last message's content, with which templates end but for markers of their own.
fn cut_after(mut rendered: String, last: &str) -> Option<String> {
    let (found, length) = match rendered.rfind(last) {
        Some(found) => (found, last.len()),
        // Templates trim.
        None => (rendered.rfind(last.trim())?, last.trim().len()),
    };
    rendered.truncate(found + length);
    Some(rendered)
}

fn template_message(message: &Message, template: &ChatTemplate, short_ids: bool) -> TemplateMessage {
    let id = |id: &str| if short_ids { short_id(id) } else { id.to_owned() };
    let calls = message.tool_calls.iter().map(|call| {
        let parsed = serde_json::from_str(&call.arguments).ok();
        let arguments = match (template.arguments_as(), parsed) {
            (ArgumentsAs::Object, Some(Value::Object(object))) => Value::Object(object),
            // Some clients send nothing for nothing.
            (ArgumentsAs::Object, None) if call.arguments.trim().is_empty() => json!({}),
            _ => Value::from(call.arguments.as_str()),
        };
        TemplateCall::new(id(&call.id), call.name.clone(), arguments)
    });
    TemplateMessage {
        role: message.role,
        content: message.content.clone(),
        name: message.name.clone(),
        tool_calls: calls.collect(),
        tool_call_id: message.tool_call_id.as_deref().map(id),
        reasoning_content: message.reasoning.clone(),
    }
}

/// An id as Mistral's templates demand it: itself, if it is nine letters and digits.
fn short_id(id: &str) -> String {
    if id.len() == 9 && id.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return id.to_owned();
    }
    crate::text::short_id(id.as_bytes())
}

/// Tells of tools, calls and answers in the text of messages, for templates that know nothing of them.
fn in_text(messages: &mut Vec<TemplateMessage>, tools: &[Tool]) {
    for message in messages.iter_mut() {
        for call in std::mem::take(&mut message.tool_calls) {
            let TemplateCall { function, .. } = call;
            let arguments = match function.arguments {
                Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
                other => other,
            };
            let call = json!({"name": function.name, "arguments": arguments});
            if !message.content.is_empty() {
                message.content.push('\n');
            }
            message.content.push_str(&format!("<tool_call>\n{call}\n</tool_call>"));
        }
        if message.role == Role::Tool {
            message.role = Role::User;
            message.content = format!("<tool_response>\n{}\n</tool_response>", message.content);
        }
    }
    // Answers to several calls are one message of the user's.
    messages.dedup_by(|later, earlier| {
        let answers = |message: &TemplateMessage| {
            message.role == Role::User && message.content.starts_with("<tool_response>\n")
        };
        let joined = answers(later) && answers(earlier);
        if joined {
            earlier.content.push('\n');
            earlier.content.push_str(&later.content);
        }
        joined
    });
    if tools.is_empty() {
        return;
    }
    let list: Vec<String> = tools.iter().map(|tool| tool.to_template().to_string()).collect();
    let told = format!(
        "You may call tools. Each is described by one line of JSON:\n<tools>\n{}\n</tools>\nTo call one, write its name \
         and its arguments as JSON between these tags:\n<tool_call>\n{{\"name\": NAME, \"arguments\": \
         ARGUMENTS}}\n</tool_call>",
        list.join("\n")
    );
    match messages.first_mut() {
        Some(first) if matches!(first.role, Role::System | Role::Developer) => {
            first.content.push_str("\n\n");
            first.content.push_str(&told);
        }
        _ => {
            let system = Message::new(Role::System, told);
            messages.insert(0, TemplateMessage::text(system.role, system.content));
        }
    }
}
