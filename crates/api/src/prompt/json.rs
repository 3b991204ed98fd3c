//! JSON as Python's `json.dumps` writes it: what chat templates expect of `tojson`.

use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};
use std::{fmt::Write, io};

/// How it is written; `default()` is `json.dumps(value, ensure_ascii=False)`.
#[derive(Debug, Default)]
pub(crate) struct JsonStyle {
    /// Spaces for each level; none: one line.
    pub(crate) indent: Option<usize>,
    /// What is between things, and after keys.
    pub(crate) separators: Option<(String, String)>,
    /// Keys in the order of their code points.
    pub(crate) sort_keys: bool,
    /// Everything but ASCII as `\u` and four digits.
    pub(crate) ensure_ascii: bool,
}

/// Writes `value` in this style.
pub(crate) fn to_json(value: &impl Serialize, style: JsonStyle) -> Result<String, serde_json::Error> {
    let JsonStyle { indent, separators, sort_keys, ensure_ascii } = style;
    let item = if indent.is_some() { "," } else { ", " };
    let (item, key) = separators.unwrap_or_else(|| (item.to_owned(), ": ".to_owned()));
    let formatter = Python { indent, item, key, level: 0, is_empty: true };
    let mut out = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut out, formatter);
    if sort_keys {
        let mut value = serde_json::to_value(value)?;
        value.sort_all_objects();
        value.serialize(&mut serializer)?;
    } else {
        value.serialize(&mut serializer)?;
    }
    let text = String::from_utf8(out).expect("serde_json writes UTF-8");
    Ok(if ensure_ascii { to_ascii(&text) } else { text })
}

/// Outside of strings JSON has only ASCII.
fn to_ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        if char.is_ascii() {
            out.push(char);
            continue;
        }
        for unit in char.encode_utf16(&mut [0; 2]) {
            let _ = write!(out, "\\u{unit:04x}");
        }
    }
    out
}

struct Python {
    indent: Option<usize>,
    item: String,
    key: String,
    level: usize,
    /// Whether what is open has nothing yet.
    is_empty: bool,
}

impl Python {
    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, mark: &[u8]) -> io::Result<()> {
        (self.level, self.is_empty) = (self.level + 1, true);
        writer.write_all(mark)
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, mark: &[u8]) -> io::Result<()> {
        self.level -= 1;
        if !self.is_empty {
            self.line(writer)?;
        }
        self.is_empty = false;
        writer.write_all(mark)
    }

    fn next<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.is_empty = false;
        self.line(writer)
    }

    fn line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            None => Ok(()),
            Some(spaces) => write!(writer, "\n{:1$}", "", spaces * self.level),
        }
    }
}

impl Formatter for Python {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn writes_as_python_does() {
        // Made with Python 3.11's json.dumps(value, ensure_ascii=False, …).
        let check = |style: JsonStyle, expected: &str| {
            let value =
                json!({"b": [1, 2.5, null], "a": {"é<>&'": "x\n\"y\""}, "e": [], "o": {}, "l": [[], [1]]});
            assert_eq!(to_json(&value, style).unwrap(), expected);
        };
        let plain = JsonStyle::default;
        let line = r#"{"b": [1, 2.5, null], "a": {"é<>&'": "x\n\"y\""}, "e": [], "o": {}, "l": [[], [1]]}"#;
        check(plain(), line);
        check(
            JsonStyle { indent: Some(2), ..plain() },
            "{\n  \"b\": [\n    1,\n    2.5,\n    null\n  ],\n  \"a\": {\n    \"é<>&'\": \"x\\n\\\"y\\\"\"\n  },\n  \"e\": [],\n  \"o\": {},\n  \"l\": [\n    [],\n    [\n      1\n    ]\n  ]\n}",
        );
        let tight = Some((",".to_owned(), ":".to_owned()));
        check(
            JsonStyle { separators: tight, sort_keys: true, ensure_ascii: true, ..plain() },
            r#"{"a":{"\u00e9<>&'":"x\n\"y\""},"b":[1,2.5,null],"e":[],"l":[[],[1]],"o":{}}"#,
        );
        assert_eq!(to_ascii("\"😀\""), r#""\ud83d\ude00""#);
    }
}
