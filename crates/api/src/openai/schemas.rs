//! JSON schemas of values that are parsed by hand.

use super::{
    given::Given,
    tools::{FunctionType, ToolChoiceJson},
    values::{Content, LogitBias, Object, PriorityValue, Prompts, Seed, Strings},
};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use std::borrow::Cow;
use types::TokenId;

macro_rules! schemas {
    ($($type:ident = $schema:tt)+) => {
        $(impl JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        })+
    };
}

schemas! {
    Given = {"type": "null", "description": "Refused, unless it asks for nothing"}
    FunctionType = {"const": "function"}
    Strings = {"anyOf": [
        {"type": "string", "minLength": 1, "maxLength": 1024},
        {"type": "array", "maxItems": 16, "items": {"type": "string", "minLength": 1, "maxLength": 1024}},
    ]}
    Prompts = {"anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": TokenId::MAX}, "minItems": 1},
        {
            "type": "array", "minItems": 1,
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": TokenId::MAX}, "minItems": 1},
        },
    ]}
    LogitBias = {
        "type": "object", "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }
    Seed = {"type": "integer", "minimum": i64::MIN, "maximum": u64::MAX}
    PriorityValue = {"anyOf": [{"enum": ["low", "normal", "high"]}, {"type": "integer"}]}
    Content = {"anyOf": [
        {"type": "string"},
        {"type": "array", "items": {
            "type": "object", "required": ["type", "text"],
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        }},
    ]}
    ToolChoiceJson = {"anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object", "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object", "required": ["name"], "properties": {"name": {"type": "string"}},
                },
            },
        },
    ]}
}

/// The schema of what is in it, which is an object's.
impl<T: JsonSchema> JsonSchema for Object<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}
