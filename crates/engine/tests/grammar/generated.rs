//! Schemas of many kinds from a seed, their instances, and instances that were changed a little.
//!
//! Keys are written in the order in which a schema names them, then others: a grammar fixes that, a schema does not.

use crate::Random;
use serde_json::{Map, Value, json};

const KEYS: &[&str] = &["a", "name", "id", "tags", "zip code", "größe", "x\"y"];
const STRINGS: &[&str] =
    &["", "a", "abc", "hello world", "grüße", "line\nbreak", "quote\"d", "🌍 and more text"];
const PATTERNS: &[(&str, &[&str])] = &[
    ("^[a-z]+$", &["a", "hello"]),
    ("^[A-Z]{2}[0-9]{3}$", &["AB123", "ZZ000"]),
    ("^(yes|no)$", &["yes", "no"]),
    ("^\\d{1,3}(\\.\\d{1,3}){3}$", &["10.0.0.1", "255.255.255.255"]),
];
const FORMATS: &[(&str, &[&str])] = &[
    ("date", &["2024-02-28", "1999-12-31"]),
    ("uuid", &["123e4567-e89b-12d3-a456-426614174000"]),
    ("ipv4", &["127.0.0.1", "8.8.8.8"]),
];

/// A schema of at most so many levels; arrays and objects within it may refer to a list that refers to itself.
pub(crate) fn schema(random: &mut Random, depth: usize) -> Value {
    let mut schema = part(random, depth);
    let defs = json!({
        "point": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
            "required": ["x", "y"],
            "additionalProperties": false
        },
        "list": {"type": "array", "items": {"$ref": "#/$defs/list"}, "maxItems": 3}
    });
    if let Some(object) = schema.as_object_mut() {
        object.insert("$defs".to_owned(), defs);
    }
    schema
}

fn part(random: &mut Random, depth: usize) -> Value {
    match random.below(if depth == 0 { 8 } else { 13 }) {
        0 => string(random),
        1 => number(random, "integer"),
        2 => number(random, "number"),
        3 => json!({"type": "boolean"}),
        4 => json!({"enum": [random.pick(STRINGS), random.below(100), null, [1, "two"], true]}),
        5 => json!({"const": random.pick(&[json!("fixed"), json!(17), json!({"a": [null]})])}),
        6 => json!({"type": [random.pick(&["string", "integer"]), "null"]}),
        7 => json!({"$ref": random.pick(&["#/$defs/point", "#/$defs/list"])}),
        8 | 9 => object(random, depth),
        10 => array(random, depth),
        11 => {
            let first = part(random, depth - 1);
            json!({"prefixItems": [first, part(random, depth - 1)], "type": "array", "items": false, "minItems": 2})
        }
        _ => {
            let first = part(random, depth - 1);
            json!({"anyOf": [first, part(random, depth - 1), {"type": "null"}]})
        }
    }
}

fn string(random: &mut Random) -> Value {
    match random.below(4) {
        0 => json!({"type": "string"}),
        1 => {
            let least = random.below(4);
            json!({"type": "string", "minLength": least, "maxLength": least + random.below(12)})
        }
        2 => json!({"type": "string", "pattern": random.pick(PATTERNS).0}),
        _ => json!({"type": "string", "format": random.pick(FORMATS).0}),
    }
}

fn number(random: &mut Random, kind: &str) -> Value {
    let least = random.below(400) as i64 - 200;
    let most = least + random.below(300) as i64;
    match random.below(4) {
        0 => json!({"type": kind}),
        1 => json!({"type": kind, "minimum": least}),
        2 => json!({"type": kind, "minimum": least, "maximum": most}),
        _ => json!({"type": kind, "exclusiveMinimum": least, "exclusiveMaximum": most + 2}),
    }
}

fn object(random: &mut Random, depth: usize) -> Value {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for key in KEYS.iter().filter(|_| random.one_in(2)).collect::<Vec<_>>() {
        properties.insert((*key).to_owned(), part(random, depth - 1));
        if random.one_in(2) {
            required.push(*key);
        }
    }
    let mut schema = json!({"type": "object", "properties": properties, "required": required});
    match random.below(3) {
        0 => {}
        1 => schema["additionalProperties"] = json!(false),
        _ => schema["additionalProperties"] = json!({"type": "integer"}),
    }
    schema
}

fn array(random: &mut Random, depth: usize) -> Value {
    let mut schema = json!({"type": "array", "items": part(random, depth - 1)});
    if random.one_in(2) {
        let least = random.below(3);
        schema["minItems"] = json!(least);
        schema["maxItems"] = json!(least + random.below(4));
    }
    schema
}

/// An instance of a schema that [`schema`] made.
pub(crate) fn instance(schema: &Value, random: &mut Random, depth: usize) -> Value {
    if let Some(name) = schema.get("$ref").and_then(Value::as_str) {
        let many = if depth == 0 { 1 } else { 4 };
        return match name {
            "#/$defs/point" => json!({"x": random.below(100), "y": -(random.below(100) as i64)}),
            _ => {
                let list = json!({"$ref": "#/$defs/list"});
                (0..random.below(many)).map(|_| instance(&list, random, depth - 1)).collect()
            }
        };
    }
    if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        return random.pick(values).clone();
    }
    if let Some(value) = schema.get("const") {
        return value.clone();
    }
    if let Some(parts) = schema.get("anyOf").and_then(Value::as_array) {
        return instance(random.pick(parts), random, depth);
    }
    if let Some(kinds) = schema.get("type").and_then(Value::as_array) {
        return instance(&json!({"type": random.pick(kinds)}), random, depth);
    }
    let number = |name: &str| schema.get(name).and_then(Value::as_i64);
    match schema["type"].as_str().unwrap_or("null") {
        "string" => {
            let examples = |of: &[(&str, &'static [&'static str])], name: &str| {
                let asked = schema.get(name).and_then(Value::as_str)?;
                of.iter().find(|(text, _)| *text == asked).map(|(_, examples)| *examples)
            };
            if let Some(texts) = examples(PATTERNS, "pattern").or_else(|| examples(FORMATS, "format")) {
                return json!(random.pick(texts));
            }
            let least = number("minLength").unwrap_or(0) as usize;
            let most = number("maxLength").unwrap_or(30) as usize;
            let text: String = random.pick(STRINGS).chars().chain("filling it up".chars()).collect();
            json!(text.chars().take(least + random.below(most - least + 1)).collect::<String>())
        }
        kind @ ("integer" | "number") => {
            let least =
                number("minimum").or_else(|| number("exclusiveMinimum").map(|it| it + 1)).unwrap_or(-1000);
            let most = number("maximum")
                .or_else(|| number("exclusiveMaximum").map(|it| it - 1))
                .unwrap_or(least + 5000);
            let whole = least + random.below((most - least) as usize + 1) as i64;
            if kind == "number" && whole < most && random.one_in(2) {
                return json!(whole as f64 + [0.5, 0.25, 0.125][random.below(3)]);
            }
            json!(whole)
        }
        "boolean" => json!(random.one_in(2)),
        "array" => {
            if let Some(parts) = schema.get("prefixItems").and_then(Value::as_array) {
                return parts.iter().map(|part| instance(part, random, depth.saturating_sub(1))).collect();
            }
            let least = number("minItems").unwrap_or(0) as usize;
            let most = number("maxItems").unwrap_or(3) as usize;
            let count = least + random.below(most - least + 1);
            (0..count).map(|_| instance(&schema["items"], random, depth.saturating_sub(1))).collect()
        }
        "object" => {
            let mut object = Map::new();
            let required = schema["required"].as_array().cloned().unwrap_or_default();
            for (key, part) in schema["properties"].as_object().into_iter().flatten() {
                if required.contains(&json!(key)) || random.one_in(2) {
                    object.insert(key.clone(), instance(part, random, depth.saturating_sub(1)));
                }
            }
            if schema.get("additionalProperties").is_none_or(Value::is_object) && random.one_in(3) {
                object.insert("more".to_owned(), json!(7));
            }
            Value::Object(object)
        }
        _ => Value::Null,
    }
}

/// The same with one thing changed somewhere.
pub(crate) fn changed(value: &Value, random: &mut Random) -> Value {
    let other = |random: &mut Random| {
        let others =
            [json!("other"), json!(-123_456), json!(1.5), json!([]), json!({}), json!(null), json!(false)];
        random.pick(&others).clone()
    };
    match value {
        Value::Array(items) if !items.is_empty() && !random.one_in(3) => {
            let mut items = items.clone();
            let at = random.below(items.len());
            match random.below(3) {
                0 => drop(items.remove(at)),
                1 => items.push(other(random)),
                _ => items[at] = changed(&items[at], random),
            }
            Value::Array(items)
        }
        Value::Object(fields) if !fields.is_empty() && !random.one_in(3) => {
            let mut fields = fields.clone();
            let key = random.pick(&fields.keys().cloned().collect::<Vec<_>>()).clone();
            match random.below(3) {
                0 => drop(fields.shift_remove(&key)),
                1 => drop(fields.insert("unheard of".to_owned(), other(random))),
                _ => {
                    let value = changed(&fields[&key], random);
                    fields.insert(key, value);
                }
            }
            Value::Object(fields)
        }
        Value::String(text) if random.one_in(2) => json!(format!("{text}{text}0")),
        Value::Number(_) if random.one_in(2) => json!(random.below(100_000) as i64 - 50_000),
        _ => other(random),
    }
}
