//! JSON as Python's `json.dumps(value, ensure_ascii=False, indent=…)` writes it: what chat templates expect of `tojson`.

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};
use std::io;

/// Writes `value` in one line, or with this many spaces for each level.
pub(crate) fn to_json(value: &impl Serialize, indent: Option<usize>) -> Result<String, serde_json::Error> {
    let mut out = Vec::new();
    match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut out, OneLine(CompactFormatter)))?,
        Some(spaces) => {
            let indent = " ".repeat(spaces);
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter))?;
        }
    }
    Ok(String::from_utf8(out).expect("serde_json writes UTF-8"))
}

/// One line with `", "` and `": "` between things.
struct OneLine(CompactFormatter);

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_null<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.write_null(writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn writes_as_python_does() {
        let value = json!({"b": [1, 2.5, null], "a": {"é<>&'": "x\n\"y\""}, "e": [], "o": {}});
        // Both made with Python 3.11's json.dumps(value, ensure_ascii=False[, indent=2]).
        let line = r#"{"b": [1, 2.5, null], "a": {"é<>&'": "x\n\"y\""}, "e": [], "o": {}}"#;
        assert_eq!(to_json(&value, None).unwrap(), line);
        let indented = "{\n  \"b\": [\n    1,\n    2.5,\n    null\n  ],\n  \"a\": {\n    \"é<>&'\": \"x\\n\\\"y\\\"\"\n  },\n  \"e\": [],\n  \"o\": {}\n}";
        assert_eq!(to_json(&value, Some(2)).unwrap(), indented);
    }
}
