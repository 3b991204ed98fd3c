//! What several protocols write as a text where it is short, and as an array where it is not.

use schemars::JsonSchema;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{SeqAccess, Visitor, value::SeqAccessDeserializer},
};
use std::{fmt, marker::PhantomData};

/// A text, or an array of `T`.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub(crate) enum TextOr<T> {
    Text(String),
    Many(Vec<T>),
}

impl<T> Default for TextOr<T> {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl<T> TextOr<T> {
    /// The array, or one of what a text stands for.
    pub(crate) fn many(self, of_text: impl FnOnce(String) -> T) -> Vec<T> {
        match self {
            Self::Text(text) => vec![of_text(text)],
            Self::Many(many) => many,
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for TextOr<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for TextOrVisitor<T> {
            type Value = TextOr<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of objects")
            }

            fn visit_str<E>(self, text: &str) -> Result<TextOr<T>, E> {
                Ok(TextOr::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, elements: A) -> Result<TextOr<T>, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(elements)).map(TextOr::Many)
            }
        }
        deserializer.deserialize_any(TextOrVisitor(PhantomData))
    }
}
