//! What an answer must be like, as one grammar: reasoning is free, then comes a text of the shape that was asked for, or a
//! call of a tool.
//!
//! Names that begin with `mlx_` are ours.

use super::{Conversation, Shape, Tool, ToolChoice};
use crate::text::{
    ReasoningFormat, Start,
    tools::{ANY_TEXT, CallGrammar, Lark, ToolFormat, literal, pattern},
};
use serde_json::json;
use std::{collections::BTreeMap, fmt::Write};
use types::{Grammar, TokenId};

/// The grammar of a conversation's answer; none where it is free.
pub(super) fn of(
    conversation: &Conversation,
    tools: &[Tool],
    format: ToolFormat,
    reasoning: Option<(ReasoningFormat, Start)>,
    special: &[(String, TokenId)],
) -> Option<Grammar> {
    let rules = Rules { special, text: String::new(), shared: BTreeMap::new() };
    let reasoning = reasoning.filter(|&(_, start)| start != Start::Over);
    let parallel = conversation.parallel_tool_calls;
    match wanted(conversation, tools) {
        Wanted::Anything => None,
        Wanted::Shape => rules.shape(&conversation.shape, reasoning),
        Wanted::ShapeOrCalls => {
            Some(rules.shape_or_calls(&conversation.shape, tools, format, parallel, reasoning))
        }
        Wanted::Calls(tools) => {
            // One that is named is called once.
            let parallel = parallel && conversation.tool_choice == ToolChoice::Required;
            Some(rules.calls(&tools, format, parallel, reasoning))
        }
        Wanted::FreeOrCalls => Some(rules.free_or_calls(tools, format, parallel, reasoning)),
    }
}

/// The same of a model that writes messages with headers.
pub(super) fn of_harmony(
    conversation: &Conversation,
    tools: &[Tool],
    special: &[(String, TokenId)],
) -> Option<Grammar> {
    let mut rules = Rules { special, text: String::new(), shared: BTreeMap::new() };
    let next = rules.terms("<|end|><|start|>assistant");
    let head = |rules: &Rules<'_>, channel: &str| rules.terms(&format!("<|channel|>{channel}<|message|>"));
    let thought = format!("{} {ANY_TEXT} {next}", head(&rules, "analysis"));
    let last = head(&rules, "final");
    let answer = match wanted(conversation, tools) {
        Wanted::Anything => return None,
        Wanted::Shape => {
            let body = rules.body(&conversation.shape);
            rules.rule("mlx_body", &body);
            format!("{last} mlx_body")
        }
        Wanted::ShapeOrCalls => {
            let body = rules.body(&conversation.shape);
            rules.rule("mlx_body", &body);
            format!("{last} mlx_body | {}", rules.harmony_calls(tools, false))
        }
        Wanted::Calls(tools) => rules.harmony_calls(&tools, true),
        Wanted::FreeOrCalls => {
            let said = format!("{} {ANY_TEXT} {next}", head(&rules, "commentary"));
            rules.rule("mlx_said", &said);
            format!("{last} {ANY_TEXT} | mlx_said? ({})", rules.harmony_calls(tools, false))
        }
    };
    rules.rule("mlx_thought", &thought);
    rules.rule("mlx_answer", &answer);
    Some(rules.finish("mlx_thought? mlx_answer"))
}

/// What is asked of an answer.
enum Wanted {
    Anything,
    /// A text of the shape that was asked for.
    Shape,
    /// The same, or calls.
    ShapeOrCalls,
    /// Calls of these tools and nothing else.
    Calls(Vec<Tool>),
    /// Text, or calls as their tools say.
    FreeOrCalls,
}

fn wanted(conversation: &Conversation, tools: &[Tool]) -> Wanted {
    match &conversation.tool_choice {
        ToolChoice::Required => Wanted::Calls(tools.to_vec()),
        ToolChoice::Named(name) => {
            Wanted::Calls(tools.iter().filter(|tool| tool.name == *name).cloned().collect())
        }
        ToolChoice::Auto if conversation.shape != Shape::Free && !tools.is_empty() => Wanted::ShapeOrCalls,
        ToolChoice::None | ToolChoice::Auto if conversation.shape != Shape::Free => Wanted::Shape,
        ToolChoice::Auto if tools.iter().any(|tool| tool.strict) => Wanted::FreeOrCalls,
        ToolChoice::None | ToolChoice::Auto => Wanted::Anything,
    }
}

/// The grammar of a text without messages.
pub(crate) fn of_shape(shape: &Shape) -> Option<Grammar> {
    Rules { special: &[], text: String::new(), shared: BTreeMap::new() }.shape(shape, None)
}

type Reasoning = Option<(ReasoningFormat, Start)>;

/// Rules, being written.
struct Rules<'a> {
    special: &'a [(String, TokenId)],
    text: String,
    /// Rules that several others name.
    shared: BTreeMap<&'static str, String>,
}

impl Rules<'_> {
    fn shape(mut self, shape: &Shape, reasoning: Reasoning) -> Option<Grammar> {
        match (shape, reasoning) {
            (Shape::Free, _) => return None,
            (Shape::JsonObject, None) => return Some(Grammar::JsonSchema(any_object().to_string())),
            (Shape::JsonSchema(schema), None) => return Some(Grammar::JsonSchema(schema.to_string())),
            (Shape::Regex(regex), None) => return Some(Grammar::Regex(regex.clone())),
            (Shape::Lark(lark), None) => return Some(Grammar::Lark(lark.clone())),
            (_, _) => {}
        }
        let body = self.body(shape);
        self.rule("mlx_answer", &body);
        let start = self.after_reasoning(reasoning, "mlx_answer");
        Some(self.finish(&start))
    }

    /// The terms of a shape.
    fn body(&mut self, shape: &Shape) -> String {
        match shape {
            Shape::Free => ANY_TEXT.to_owned(),
            Shape::JsonObject => json_terms(&any_object()),
            Shape::JsonSchema(schema) => json_terms(schema),
            Shape::Regex(regex) => format!("/{}/", slashed(regex)),
            Shape::Choice(choices) => {
                let choices: Vec<String> = choices.iter().map(|choice| literal(choice)).collect();
                choices.join(" | ")
            }
            Shape::Lark(lark) => {
                self.text.push_str(&renamed_start(lark));
                self.text.push('\n');
                "mlx_start".to_owned()
            }
        }
    }

    /// One call of one of these tools, in a message of its own.
    fn harmony_calls(&mut self, tools: &[Tool], exact: bool) -> String {
        let calls = tools.iter().map(|tool| {
            let mut lark = Lark::new(self.special, exact || tool.strict);
            let head =
                format!("<|channel|>commentary to=functions.{} <|constrain|>json<|message|>", tool.name);
            lark.text(&head).schema(tool);
            lark.finish().0
        });
        calls.collect::<Vec<_>>().join(" | ")
    }

    /// At least one call and nothing else.
    fn calls(mut self, tools: &[Tool], format: ToolFormat, parallel: bool, reasoning: Reasoning) -> Grammar {
        let grammar = format.grammar();
        let calls = self.call_rules(&grammar, tools, parallel, true);
        let trigger = self.terms(grammar.trigger);
        self.rule("mlx_answer", &format!("{trigger} {calls}"));
        let start = self.after_reasoning(reasoning, "mlx_answer");
        self.finish(&start)
    }

    /// A text of a shape, or calls and nothing else.
    fn shape_or_calls(
        mut self,
        shape: &Shape,
        tools: &[Tool],
        format: ToolFormat,
        parallel: bool,
        reasoning: Reasoning,
    ) -> Grammar {
        let body = self.body(shape);
        self.rule("mlx_text", &body);
        let grammar = format.grammar();
        let calls = self.call_rules(&grammar, tools, parallel, false);
        let trigger = self.terms(grammar.trigger);
        self.rule("mlx_answer", &format!("mlx_text | {trigger} {calls}"));
        let start = self.after_reasoning(reasoning, "mlx_answer");
        self.finish(&start)
    }

    /// Any text, until a call begins.
    fn free_or_calls(
        mut self,
        tools: &[Tool],
        format: ToolFormat,
        parallel: bool,
        reasoning: Reasoning,
    ) -> Grammar {
        let grammar = format.grammar();
        let calls = self.call_rules(&grammar, tools, parallel, false);
        let answer = if format.syntax().is_bare() {
            // Only at its beginning: anywhere else it is text.
            let first = pattern(grammar.trigger);
            format!("/[^\\s{first}](?s:.*)/ | {} {calls} | \"\"", literal(grammar.trigger))
        } else if self.is_special(grammar.trigger) {
            format!("{ANY_TEXT} ({} {calls})?", self.terms(grammar.trigger))
        } else {
            let head = format!("/(?s:.*){}/", pattern(grammar.trigger));
            self.rule("mlx_head[lazy]", &head);
            format!("{ANY_TEXT} | mlx_head {calls}")
        };
        self.rule("mlx_answer", &answer);
        let start = match reasoning {
            // What a model that may reason writes first is free anyway, unless its markers are no text.
            Some((format, Start::Before)) if !self.is_special(format.open) => "mlx_answer".to_owned(),
            reasoning => self.after_reasoning(reasoning, "mlx_answer"),
        };
        self.finish(&start)
    }

    /// Rules for calls of these tools after the trigger; their terms.
    fn call_rules(&mut self, grammar: &CallGrammar, tools: &[Tool], parallel: bool, exact: bool) -> String {
        let mut names = Vec::new();
        for (index, tool) in tools.iter().enumerate() {
            let mut lark = Lark::new(self.special, exact || tool.strict);
            (grammar.call)(&mut lark, tool);
            let (terms, shared) = lark.finish();
            self.shared.extend(shared);
            let name = format!("mlx_call_{index}");
            self.rule(&name, &terms);
            names.push(name);
        }
        self.rule("mlx_call", &names.join(" | "));
        let (before, after) = (self.terms(grammar.before), self.terms(grammar.after));
        let more =
            if parallel { format!("({} mlx_call)*", self.terms(grammar.between)) } else { String::new() };
        format!("{before} mlx_call {more} {after}")
    }

    /// The terms of an answer that may have reasoning before it.
    fn after_reasoning(&mut self, reasoning: Reasoning, answer: &str) -> String {
        let Some((format, start)) = reasoning else { return answer.to_owned() };
        let (name, body) = if self.is_special(format.close) {
            ("mlx_reasoning", format!("{ANY_TEXT} {}", self.terms(format.close)))
        } else {
            ("mlx_reasoning[lazy]", format!("/(?s:.*){}/", pattern(format.close)))
        };
        self.rule(name, &body);
        self.rule("MLX_SPACE", r"/[ \t\r\n]{1,8}/");
        let reasoning = "mlx_reasoning MLX_SPACE?";
        match start {
            Start::Inside => format!("{reasoning} {answer}"),
            Start::Before | Start::Over => format!("({} {reasoning})? {answer}", self.terms(format.open)),
        }
    }

    /// Whether a marker begins with a special token.
    fn is_special(&self, marker: &str) -> bool {
        self.special.iter().any(|(content, _)| marker.starts_with(content.as_str()))
    }

    /// A text with its special tokens as terms.
    fn terms(&self, text: &str) -> String {
        let mut lark = Lark::new(self.special, true);
        lark.text(text);
        lark.finish().0
    }

    fn rule(&mut self, head: &str, terms: &str) {
        writeln!(self.text, "{head}: {terms}").expect("a string");
    }

    fn finish(mut self, start: &str) -> Grammar {
        for (head, terms) in std::mem::take(&mut self.shared) {
            self.rule(head, &terms);
        }
        Grammar::Lark(format!("start: {start}\n{}", self.text))
    }
}

fn any_object() -> serde_json::Value {
    json!({"type": "object"})
}

fn json_terms(schema: &serde_json::Value) -> String {
    format!("%json {schema}")
}

/// A regular expression as it may stand between slashes.
fn slashed(regex: &str) -> String {
    let mut out = String::with_capacity(regex.len());
    let mut escaped = false;
    for char in regex.chars() {
        match char {
            '/' if !escaped => out.push_str("\\/"),
            '\n' if escaped => out.push('n'),
            '\n' => out.push_str("\\n"),
            _ => out.push(char),
        }
        escaped = char == '\\' && !escaped;
    }
    out
}

/// A Lark grammar whose rule `start` is called `mlx_start`: outside of strings, regular expressions and comments.
fn renamed_start(lark: &str) -> String {
    let mut out = String::with_capacity(lark.len() + 16);
    let mut chars = lark.char_indices().peekable();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' | '/' if !lark[at..].starts_with("//") => {
                out.push(char);
                let mut escaped = false;
                for (_, inner) in chars.by_ref() {
                    out.push(inner);
                    if (inner == char && !escaped) || inner == '\n' {
                        break;
                    }
                    escaped = inner == '\\' && !escaped;
                }
            }
            '/' | '#' => {
                out.push(char);
                for (_, inner) in chars.by_ref() {
                    out.push(inner);
                    if inner == '\n' {
                        break;
                    }
                }
            }
            _ if char.is_alphanumeric() || char == '_' => {
                let is_word = |char: char| char.is_alphanumeric() || matches!(char, '_' | '-');
                let mut word = String::from(char);
                while let Some((_, next)) = chars.next_if(|&(_, next)| is_word(next)) {
                    word.push(next);
                }
                out.push_str(if word == "start" { "mlx_start" } else { &word });
            }
            _ => out.push(char),
        }
    }
    out
}

#[cfg(test)]
#[path = "grammar_tests.rs"]
mod tests;
