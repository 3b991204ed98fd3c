//! A field that is known but not supported: just enough of its value to tell whether it asks for anything.

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

/// The value of a field that cannot be honoured yet, without its contents.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) enum Given {
    /// Absent, `null`, `[]` or `{}`.
    #[default]
    Nothing,
    Bool(bool),
    Number(f64),
    Text(String),
    /// An array with elements, and the only one if it is a string.
    List(Option<String>),
    /// An object and the value of its `type`, if that is a string.
    Object(Option<String>),
}

impl Given {
    pub(crate) fn is_nothing(&self) -> bool {
        *self == Self::Nothing
    }

    /// Nothing, or `false`.
    pub(crate) fn is_off(&self) -> bool {
        matches!(self, Self::Nothing | Self::Bool(false))
    }

    /// Nothing, or `true`.
    pub(crate) fn is_on(&self) -> bool {
        matches!(self, Self::Nothing | Self::Bool(true))
    }

    /// Nothing, or this number.
    pub(crate) fn is_number(&self, number: f64) -> bool {
        self.is_nothing() || *self == Self::Number(number)
    }

    /// Nothing, or one of these texts.
    pub(crate) fn is_text(&self, texts: &[&str]) -> bool {
        self.is_nothing() || matches!(self, Self::Text(text) if texts.contains(&text.as_str()))
    }

    /// Nothing, or an array with only this text.
    pub(crate) fn is_list_of(&self, text: &str) -> bool {
        self.is_nothing() || matches!(self, Self::List(Some(found)) if found == text)
    }
}

/// The value as it may be repeated in an error.
impl fmt::Display for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Characters of a client's text that an error repeats.
        const SHOWN_CHARS_MAX: usize = 64;
        match self {
            Self::Nothing => f.write_str("null"),
            Self::Bool(value) => value.fmt(f),
            Self::Number(value) => value.fmt(f),
            Self::Text(text) => {
                let shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
                write!(f, "{shown:?}")
            }
            Self::List(_) => f.write_str("[…]"),
            Self::Object(None) => f.write_str("{…}"),
            Self::Object(Some(kind)) => write!(f, "{{\"type\": {kind:?}, …}}"),
        }
    }
}

impl<'de> Deserialize<'de> for Given {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(GivenVisitor)
    }
}

struct GivenVisitor;

impl<'de> Visitor<'de> for GivenVisitor {
    type Value = Given;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Given, E> {
        Ok(Given::Nothing)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Given, E> {
        Ok(Given::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Given, E> {
        Ok(Given::Number(value as f64))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Given, E> {
        Ok(Given::Number(value as f64))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Given, E> {
        Ok(Given::Number(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Given, E> {
        Ok(Given::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Given, A::Error> {
        let only = match elements.next_element::<Given>()? {
            None => return Ok(Given::Nothing),
            Some(Given::Text(text)) => Some(text),
            Some(_) => None,
        };
        let mut others = false;
        while elements.next_element::<IgnoredAny>()?.is_some() {
            others = true;
        }
        Ok(Given::List(only.filter(|_| !others)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Given, A::Error> {
        let mut given = Given::Nothing;
        let mut kind = None;
        while let Some(key) = entries.next_key::<String>()? {
            if key == "type" {
                if let Given::Text(text) = entries.next_value::<Given>()? {
                    kind = Some(text);
                }
            } else {
                entries.next_value::<IgnoredAny>()?;
            }
            given = Given::Object(kind.clone());
        }
        Ok(given)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_only_what_matters() {
        let check = |json: &str, expected: Given| {
            assert_eq!(serde_json::from_str::<Given>(json).unwrap(), expected, "{json}");
        };
        check("null", Given::Nothing);
        check("[]", Given::Nothing);
        check("{}", Given::Nothing);
        check("[{\"a\": 1}, 2]", Given::List(None));
        check("[\"text\", 2]", Given::List(None));
        check("[\"text\"]", Given::List(Some("text".to_owned())));
        check("{\"type\": \"text\", \"x\": [1]}", Given::Object(Some("text".to_owned())));
        check("{\"x\": {\"type\": \"text\"}}", Given::Object(None));
        check("1.5", Given::Number(1.5));
    }
}
