//! Tools and calls of them, as OpenAI's chat has them.

use super::values::Object;
use crate::{
    error::ApiError,
    job::{Tool, ToolCall, ToolChoice},
};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, de::Error};
use serde_json::Value;

/// An entry of `tools`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub(crate) struct ToolJson {
    #[serde(rename = "type")]
    _type: FunctionType,
    function: Object<FunctionJson>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
struct FunctionJson {
    name: String,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    parameters: Option<Value>,
    #[serde(default)]
    strict: Option<bool>,
}

/// `"function"`: no other kind of tool is known.
#[derive(Debug, Clone, Copy)]
pub(super) struct FunctionType;

impl<'de> Deserialize<'de> for FunctionType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "function" => Ok(Self),
            kind => Err(D::Error::custom(format!("{kind:?} is not supported; only \"function\" is"))),
        }
    }
}

impl From<ToolJson> for Tool {
    fn from(tool: ToolJson) -> Self {
        let Object(function) = tool.function;
        Self {
            name: function.name,
            description: function.description,
            parameters: function.parameters.filter(|parameters| !parameters.is_null()),
            strict: function.strict.unwrap_or(false),
        }
    }
}

/// An entry of a message's `tool_calls`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
pub(crate) struct ToolCallJson {
    #[serde(default)]
    id: Option<String>,
    #[serde(rename = "type", default)]
    _type: Option<FunctionType>,
    function: Object<CalledJson>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
struct CalledJson {
    name: String,
    /// A JSON text; some clients send the object itself.
    #[serde(default)]
    arguments: Option<Value>,
}

impl ToolCallJson {
    /// The call; `param` is what the client calls it.
    pub(crate) fn check(self, param: &str) -> Result<ToolCall, ApiError> {
        let Object(called) = self.function;
        let arguments = match called.arguments {
            None | Some(Value::Null) => "{}".to_owned(),
            Some(Value::String(text)) => text,
            Some(object @ Value::Object(_)) => object.to_string(),
            Some(other) => {
                let param = format!("{param}.function.arguments");
                let message = format!("{param} is {other}; it must be JSON text");
                return Err(ApiError::Parameter { param, message });
            }
        };
        Ok(ToolCall { id: self.id.unwrap_or_default(), name: called.name, arguments })
    }
}

/// `tool_choice`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ToolChoiceJson(pub(crate) ToolChoice);

impl<'de> Deserialize<'de> for ToolChoiceJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const ALLOWED: &str =
            "\"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}";
        let value = Value::deserialize(deserializer)?;
        let choice = match value.as_str() {
            Some("none") => Some(ToolChoice::None),
            Some("auto") => Some(ToolChoice::Auto),
            Some("required") => Some(ToolChoice::Required),
            Some(_) => None,
            None => {
                let name = value.get("function").and_then(|function| function.get("name"));
                let named =
                    name.and_then(Value::as_str).filter(|_| value.get("type") == Some(&"function".into()));
                named.map(|name| ToolChoice::Named(name.to_owned()))
            }
        };
        let wrong = || {
            let shown: String = value.to_string().chars().take(64).collect();
            D::Error::custom(format!("{shown} is not allowed; it must be {ALLOWED}"))
        };
        choice.map(Self).ok_or_else(wrong)
    }
}
