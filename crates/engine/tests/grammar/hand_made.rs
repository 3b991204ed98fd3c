//! Schemas as applications have them, with instances of each side.

use serde_json::{Value, json};

/// Schema, valid and invalid instances.
type Case = (Value, Vec<Value>, Vec<Value>);

pub(crate) fn cases() -> Vec<Case> {
    let case = |schema: Value, valid: Value, invalid: Value| {
        let list = |value: Value| value.as_array().expect("a list").clone();
        (schema, list(valid), list(invalid))
    };
    vec![
        case(json!(true), json!([1, "a", [], {}, null, [{"a": [1.5e3]}]]), json!([])),
        case(json!({}), json!([1, "a", false, {"a": {"b": []}}]), json!([])),
        case(json!({"type": "object"}), json!([{}, {"any": ["thing", 1]}]), json!([[], "{}", 1, null])),
        case(json!({"type": "null"}), json!([null]), json!([0, "", "null", false])),
        case(json!({"type": "boolean"}), json!([true, false]), json!([0, 1, "true", null])),
        case(json!({"type": "integer"}), json!([0, -1, 123_456_789]), json!([1.5, "1", null])),
        case(json!({"type": "number"}), json!([0, -1.25, 1e10, 17]), json!(["1", null, [1]])),
        case(
            json!({"type": "integer", "minimum": 0, "maximum": 10}),
            json!([0, 7, 10]),
            json!([-1, 11, 100]),
        ),
        case(json!({"type": "integer", "multipleOf": 5}), json!([0, 5, -15, 100]), json!([1, 7, 101])),
        case(
            json!({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
            json!([0.5, 1, 0.001]),
            json!([0, 1.5, -1]),
        ),
        case(
            json!({"type": "string", "enum": ["a", "b c", "\"q\""]}),
            json!(["a", "b c", "\"q\""]),
            json!(["c", "", "b"]),
        ),
        case(
            json!({"enum": [1, "1", true, null, [1], {"a": 1}]}),
            json!([1, "1", true, null, [1], {"a": 1}]),
            json!([2, "2", false, [], {"a": 2}]),
        ),
        case(
            json!({"const": {"a": [1, {"b": null}]}}),
            json!([{"a": [1, {"b": null}]}]),
            json!([{"a": [1]}, {}, 1]),
        ),
        case(
            json!({"type": "string", "minLength": 2, "maxLength": 4}),
            json!(["ab", "äöü", "🌍🌍🌍🌍"]),
            json!(["", "a", "abcde", 12]),
        ),
        case(
            json!({"type": "string", "pattern": "^[a-z]+@[a-z]+\\.[a-z]{2,3}$"}),
            json!(["me@here.org", "a@b.de"]),
            json!(["me", "@b.de", "a@b.c", "A@b.de"]),
        ),
        case(
            json!({"type": "string", "format": "date"}),
            json!(["2024-02-29", "1970-01-01"]),
            json!(["2024-13-01", "yesterday", "2024-1-1"]),
        ),
        case(
            json!({"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3}),
            json!([["a"], ["a", "b", ""]]),
            json!([[], ["a", "b", "c", "d"], [1], "a"]),
        ),
        case(
            json!({"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
            json!([[], [[]], [[1, 2.5], [3]]]),
            json!([[1], [["a"]], {}]),
        ),
        case(
            json!({"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": false, "minItems": 2}),
            json!([["a", 1]]),
            json!([["a"], [1, "a"], ["a", 1, 2]]),
        ),
        case(json!({"type": ["string", "null"]}), json!(["a", null]), json!([1, [], false])),
        case(
            json!({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}),
            json!([1, [1, 2], []]),
            json!(["1", ["a"], {}]),
        ),
        case(
            json!({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}}, "required": ["name", "age"], "additionalProperties": false}),
            json!([{"name": "Ann", "age": 40}, {"name": "", "age": 0}]),
            json!([{"name": "Ann"}, {"name": "Ann", "age": -1}, {"name": 1, "age": 1}, {"name": "Ann", "age": 4, "more": 1}, {}]),
        ),
        case(
            json!({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}}),
            json!([{}, {"a": 1}, {"b": 2}, {"a": 1, "b": 2, "c": true}]),
            json!([{"a": "1"}, {"c": 1}, {"a": 1, "c": null}]),
        ),
        case(
            json!({"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}),
            json!([{"q": "x"}, {"q": "x", "free": [1]}]),
            json!([{}, {"q": 1}]),
        ),
        case(
            json!({"$defs": {"node": {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["value", "next"], "additionalProperties": false}}, "$ref": "#/$defs/node"}),
            json!([{"value": 1, "next": null}, {"value": 1, "next": {"value": 2, "next": {"value": 3, "next": null}}}]),
            json!([null, {"value": 1}, {"value": 1, "next": {"value": "2", "next": null}}, {"value": 1, "next": []}]),
        ),
        case(
            json!({"definitions": {"tree": {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#/definitions/tree"}}}, "required": ["children"], "additionalProperties": false}}, "$ref": "#/definitions/tree"}),
            json!([{"children": []}, {"children": [{"children": []}, {"children": [{"children": []}]}]}]),
            json!([{}, {"children": [1]}, {"children": [{}]}]),
        ),
        case(
            json!({"type": "object", "properties": {"tool": {"const": "search"}, "arguments": {"type": "object", "properties": {"query": {"type": "string"}, "top": {"type": "integer", "minimum": 1, "maximum": 50}}, "required": ["query"], "additionalProperties": false}}, "required": ["tool", "arguments"], "additionalProperties": false}),
            json!([{"tool": "search", "arguments": {"query": "x"}}, {"tool": "search", "arguments": {"query": "x", "top": 50}}]),
            json!([{"tool": "other", "arguments": {"query": "x"}}, {"tool": "search", "arguments": {"top": 5}}, {"tool": "search", "arguments": {"query": "x", "top": 51}}]),
        ),
        case(
            json!({"anyOf": [{"type": "object", "properties": {"kind": {"const": "circle"}, "r": {"type": "number"}}, "required": ["kind", "r"], "additionalProperties": false}, {"type": "object", "properties": {"kind": {"const": "square"}, "side": {"type": "number"}}, "required": ["kind", "side"], "additionalProperties": false}]}),
            json!([{"kind": "circle", "r": 1.5}, {"kind": "square", "side": 2}]),
            json!([{"kind": "circle", "side": 2}, {"kind": "square"}, {"kind": "oval", "r": 1}]),
        ),
        case(
            json!({"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]}]}),
            json!([{"a": 1, "b": "x"}]),
            json!([{"a": 1}, {"b": "x"}, {"a": "1", "b": "x"}]),
        ),
        case(
            json!({"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": false}),
            json!([{}, {"n_a": 1, "n_b": 2}]),
            json!([{"n_a": "1"}, {"a": 1}]),
        ),
    ]
}
