//! What templates get from Python where Jinja runs in it, and minijinja has otherwise or not at all.

use minijinja::{
    Environment, Error, ErrorKind, Output, State, Value, escape_formatter, filters,
    value::{Rest, ValueKind},
};
use minijinja_contrib::pycompat;
use std::fmt::Write;

/// Makes an environment behave so.
pub(super) fn add_to(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(method);
    environment.set_formatter(write);
    environment.add_filter("string", |value: &Value| text(value));
    environment.add_filter("int", int);
    environment.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    // To minijinja, nothing is a list without elements.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
}

/// What `{{ … }}` writes: lists and mappings as Python shows them.
fn write(out: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map => out.write_str(&text(value)).map_err(Error::from),
        _ => escape_formatter(out, state, value),
    }
}

/// Python's `str`.
fn text(value: &Value) -> String {
    if value.kind() == ValueKind::String {
        return value.to_string();
    }
    let mut out = String::new();
    repr(value, &mut out);
    out
}

/// Python's `repr`.
fn repr(value: &Value, out: &mut String) {
    match value.kind() {
        ValueKind::String => repr_of_text(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq => {
            out.push('[');
            for (index, element) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if index == 0 { "" } else { ", " });
                repr(&element, out);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if index == 0 { "" } else { ", " });
                repr(&key, out);
                out.push_str(": ");
                repr(&value.get_item(&key).unwrap_or_default(), out);
            }
            out.push('}');
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
}

fn repr_of_text(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for char in text.chars() {
        match char {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if char == quote => out.extend(['\\', char]),
            _ if char.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(char));
            }
            _ => out.push(char),
        }
    }
    out.push(quote);
}

/// A number, or what is given for what is none: 0.
fn int(state: &State<'_, '_>, value: &Value, default: Option<Value>) -> Result<Value, Error> {
    match filters::int(state, value) {
        Err(_) if !value.is_undefined() => Ok(default.unwrap_or_else(|| Value::from(0))),
        number => number,
    }
}

fn method(state: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), name) {
        (Some(text), "rsplit") => rsplit(text, args),
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// `rsplit(separator, at most so often)`.
fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, Rest(more)): (Option<&str>, Rest<i64>) = minijinja::value::from_args(args)?;
    let pieces = match more.as_slice() {
        [] => usize::MAX,
        [count] => usize::try_from(*count).map_or(usize::MAX, |count| count.saturating_add(1)),
        _ => return Err(Error::from(ErrorKind::TooManyArguments)),
    };
    let mut split: Vec<&str> = match separator {
        Some("") => return Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
        Some(separator) => text.rsplitn(pieces, separator).collect(),
        None if pieces == usize::MAX => return Ok(text.split_whitespace().collect()),
        None => {
            let message = "rsplit with a number of splits needs a separator";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    };
    split.reverse();
    Ok(split.into_iter().collect())
}
