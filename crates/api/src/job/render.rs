//! A conversation becomes a prompt: its template's, or for a template that knows no tools, with these told of in text.

use super::{Conversation, Job, Message, Shape, Tool, ToolChoice, grammar, start::resolve};
use crate::{
    AppState,
    caller::Caller,
    error::ApiError,
    openai::request::Role,
    prompt::{
        ArgumentsAs, ChatTemplate, ModelText, TemplateCall, TemplateError, TemplateInput, TemplateMessage,
        ToolsAs,
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
        mut self,
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
            return Err(ApiError::UnknownToTemplate {
                param: "reasoning_effort".to_owned(),
                value,
                model: model(),
            });
        }
        // Several calls could not be told of in the next turn.
        self.parallel_tool_calls &= !template.one_call();
        let tools: Arc<[Tool]> = if self.has_tools() { self.tools.clone().into() } else { Arc::new([]) };
        let format = chosen.or_else(|| format_of(template)).unwrap_or(ToolFormat::Hermes);
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
        let special = text.special_tokens();
        let one_call = !self.parallel_tool_calls;
        if template.is_harmony() {
            let grammar = grammar::of_harmony(&self, &tools, special);
            let answer = AnswerFormat { harmony: true, one_call, ..AnswerFormat::default() };
            return Ok((prompt, (answer, grammar)));
        }
        let reasoning = template.reasoning().map(|format| {
            let start = format.after_prompt(&prompt, self.continue_final_message);
            (format, start)
        });
        let grammar = grammar::of(&self, &tools, format, reasoning, special);
        let tools = (!tools.is_empty()).then_some((format, tools));
        let answer = AnswerFormat { reasoning, tools, one_call, ..AnswerFormat::default() };
        Ok((prompt, (answer, grammar)))
    }

    /// What the template is given.
    fn template_input(&self, template: &ChatTemplate, tools: &[Tool], format: ToolFormat) -> TemplateInput {
        let short_ids = format.syntax().short_ids;
        let mut messages: Vec<TemplateMessage> =
            self.messages.iter().map(|message| template_message(message, template, short_ids)).collect();
        if template.arguments_as().is_none() {
            calls_in_content(&mut messages);
        }
        let mut variable = None;
        if !tools.is_empty() {
            let described = tools.iter().map(Tool::to_template);
            match template.tools_as() {
                ToolsAs::Variable => variable = Some(described.collect()),
                ToolsAs::Message => {
                    let list = Value::Array(described.collect()).to_string();
                    system(&mut messages).tools = Some(list);
                }
                ToolsAs::Content => tools_in_content(system(&mut messages), described, format),
            }
        }
        let mut kwargs = self.template_kwargs.clone();
        if let Some(thinking) = self.thinking {
            for name in ["enable_thinking", "thinking"] {
                kwargs.entry(name).or_insert(thinking.into());
            }
        }
        TemplateInput {
            messages,
            tools: variable,
            add_generation_prompt: self.add_generation_prompt,
            reasoning_effort: self.reasoning_effort.clone(),
            kwargs,
        }
    }
}

const LAST_CHANGED: &str = "it changes the last message, so going on with it is impossible";

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
            (Some(ArgumentsAs::Object) | None, Some(Value::Object(object))) => Value::Object(object),
            // Some clients send nothing for nothing.
            (Some(ArgumentsAs::Object) | None, None) if call.arguments.trim().is_empty() => json!({}),
            _ => Value::from(call.arguments.as_str()),
        };
        TemplateCall::new(id(&call.id), call.name.clone(), arguments)
    });
    let mut told = TemplateMessage::text(message.role, message.content.clone());
    told.name.clone_from(&message.name);
    told.tool_calls = calls.collect();
    told.tool_call_id = message.tool_call_id.as_deref().map(id);
    told.reasoning_content.clone_from(&message.reasoning);
    told
}

/// An id as Mistral's templates demand it: itself, if it is nine letters and digits.
fn short_id(id: &str) -> String {
    if id.len() == 9 && id.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return id.to_owned();
    }
    crate::text::short_id(id.as_bytes())
}

/// How the model of a template writes calls: as the template says; where it says nothing of calls, as it is told to.
fn format_of(template: &ChatTemplate) -> Option<ToolFormat> {
    match (template.tool_format(), template.tools_as()) {
        // Phi-4's says where tools stand, and not how they are called.
        (None, ToolsAs::Message) => Some(ToolFormat::Phi),
        (format, _) => format,
    }
}

/// The system message; one is made where there is none.
fn system(messages: &mut Vec<TemplateMessage>) -> &mut TemplateMessage {
    if messages.first().is_none_or(|first| !matches!(first.role, Role::System | Role::Developer)) {
        messages.insert(0, TemplateMessage::text(Role::System, String::new()));
    }
    &mut messages[0]
}

/// Tells of tools in the system message's content, for templates that have no place for them.
fn tools_in_content(system: &mut TemplateMessage, tools: impl Iterator<Item = Value>, format: ToolFormat) {
    let list: Vec<String> = tools.map(|tool| tool.to_string()).collect();
    if !system.content.is_empty() {
        system.content.push_str("\n\n");
    }
    system.content.push_str(&format!(
        "You may call tools. Each is described by one line of JSON:\n<tools>\n{}\n</tools>\nTo call one, write this, with \
         its name for NAME and its arguments as a JSON object for ARGUMENTS:\n{}",
        list.join("\n"),
        format.syntax().example
    ));
}

/// Writes calls and their answers into the content of messages, for templates that leave them out.
fn calls_in_content(messages: &mut Vec<TemplateMessage>) {
    for message in messages.iter_mut() {
        for call in std::mem::take(&mut message.tool_calls) {
            let TemplateCall { function, .. } = call;
            let call = json!({"name": function.name, "arguments": function.arguments});
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
}
