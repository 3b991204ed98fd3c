//! The fields that say what an answer must be like: OpenAI's `response_format`, vLLM's `guided_…` and `structured_outputs`.

use super::{request::syntax_message, values::Object};
use crate::{error::ApiError, job::Shape, limits::TEXTS_MAX};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

/// All of them; one at most may be given.
#[derive(Debug, Clone, Default)]
pub(crate) struct ShapeFields {
    pub(crate) response_format: Option<Object<ResponseFormat>>,
    pub(crate) guided_json: Option<Value>,
    pub(crate) guided_regex: Option<String>,
    pub(crate) guided_choice: Option<Vec<String>>,
    pub(crate) guided_grammar: Option<String>,
    pub(crate) structured_outputs: Option<Object<StructuredOutputs>>,
}

/// `response_format`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub(crate) struct ResponseFormat {
    #[serde(rename = "type")]
    kind: ResponseKind,
    #[serde(default)]
    json_schema: Option<Object<NamedSchema>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum ResponseKind {
    Text,
    JsonObject,
    JsonSchema,
}

/// `response_format.json_schema`. Strict or not, the schema holds.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
struct NamedSchema {
    #[serde(default)]
    schema: Option<Value>,
}

/// vLLM's `structured_outputs`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub(crate) struct StructuredOutputs {
    #[serde(default)]
    json: Option<Value>,
    #[serde(default)]
    regex: Option<String>,
    #[serde(default)]
    choice: Option<Vec<String>>,
    #[serde(default)]
    grammar: Option<String>,
    #[serde(default)]
    json_object: Option<bool>,
    #[serde(default)]
    structural_tag: Option<Value>,
}

impl ShapeFields {
    /// What the answer must be like, and the field that says so.
    pub(crate) fn check(self) -> Result<(Shape, &'static str), ApiError> {
        let mut found = Vec::new();
        if let Some(Object(format)) = self.response_format {
            found.extend(format.check()?.map(|shape| (shape, "response_format")));
        }
        if let Some(schema) = self.guided_json {
            found.push((schema_of("guided_json", schema)?, "guided_json"));
        }
        found.extend(self.guided_regex.map(|regex| (Shape::Regex(regex), "guided_regex")));
        if let Some(choices) = self.guided_choice {
            found.push((choice("guided_choice", choices)?, "guided_choice"));
        }
        found.extend(self.guided_grammar.map(|lark| (Shape::Lark(lark), "guided_grammar")));
        if let Some(Object(outputs)) = self.structured_outputs {
            found.extend(outputs.check()?.map(|shape| (shape, "structured_outputs")));
        }
        only(found)
    }
}

impl ResponseFormat {
    fn check(self) -> Result<Option<Shape>, ApiError> {
        match (self.kind, self.json_schema.and_then(|Object(named)| named.schema)) {
            (ResponseKind::Text, _) => Ok(None),
            (ResponseKind::JsonObject, _) => Ok(Some(Shape::JsonObject)),
            (ResponseKind::JsonSchema, Some(schema)) => {
                schema_of("response_format.json_schema.schema", schema).map(Some)
            }
            (ResponseKind::JsonSchema, None) => {
                let param = "response_format.json_schema.schema";
                Err(ApiError::parameter(param, format!("{param} is missing; the type json_schema needs it")))
            }
        }
    }
}

impl StructuredOutputs {
    fn check(self) -> Result<Option<Shape>, ApiError> {
        if let Some(value) = self.structural_tag.filter(|value| !value.is_null()) {
            let param = "structured_outputs.structural_tag".to_owned();
            return Err(ApiError::Unsupported { param, value: value.to_string() });
        }
        let mut found = Vec::new();
        if let Some(schema) = self.json {
            found.push((schema_of("structured_outputs.json", schema)?, "json"));
        }
        found.extend(self.regex.map(|regex| (Shape::Regex(regex), "regex")));
        if let Some(choices) = self.choice {
            found.push((choice("structured_outputs.choice", choices)?, "choice"));
        }
        found.extend(self.grammar.map(|lark| (Shape::Lark(lark), "grammar")));
        if self.json_object == Some(true) {
            found.push((Shape::JsonObject, "json_object"));
        }
        only(found).map(|(shape, _)| (shape != Shape::Free).then_some(shape))
    }
}

fn only(mut found: Vec<(Shape, &'static str)>) -> Result<(Shape, &'static str), ApiError> {
    if let [_, (_, second), ..] = found.as_slice() {
        let names: Vec<&str> = found.iter().map(|(_, name)| *name).collect();
        let message = format!("{} exclude one another; leave all but one out", names.join(" and "));
        return Err(ApiError::parameter(second, message));
    }
    Ok(found.pop().unwrap_or((Shape::Free, "response_format")))
}

/// A schema, as JSON or as its text.
fn schema_of(param: &str, value: Value) -> Result<Shape, ApiError> {
    let value = match value {
        Value::String(text) => serde_json::from_str(&text).map_err(|error| {
            let message = format!("{param} is not valid JSON: {}", syntax_message(&error));
            ApiError::parameter(param, message)
        })?,
        other => other,
    };
    if value.is_object() || value.is_boolean() {
        return Ok(Shape::JsonSchema(value));
    }
    Err(ApiError::parameter(param, format!("{param} is {value}; it must be a JSON schema, an object")))
}

fn choice(param: &str, choices: Vec<String>) -> Result<Shape, ApiError> {
    if choices.is_empty() || choices.len() > TEXTS_MAX || choices.iter().any(String::is_empty) {
        let count = choices.len();
        let message = format!("{param} has {count} texts; it must have 1 to {TEXTS_MAX}, none of them empty");
        return Err(ApiError::parameter(param, message));
    }
    Ok(Shape::Choice(choices))
}
