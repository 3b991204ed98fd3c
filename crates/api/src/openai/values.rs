//! Values that OpenAI's API writes in more than one way, each parsed into one type.

use crate::limits::PROMPTS_MAX;
use serde::de::{
    Deserialize, Deserializer, Error, MapAccess, SeqAccess, Unexpected, Visitor,
    value::{MapAccessDeserializer, SeqAccessDeserializer},
};
use std::{fmt, marker::PhantomData};
use types::{Priority, TokenId, limits};

/// A `T` from a JSON object only: serde's derive would also take its fields as an array.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(entries)).map(Object)
            }
        }
        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

/// A string or an array of strings.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Strings(pub(crate) Vec<String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringsVisitor;
        impl<'de> Visitor<'de> for StringsVisitor {
            type Value = Strings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of strings")
            }

            fn visit_str<E>(self, text: &str) -> Result<Strings, E> {
                Ok(Strings(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, elements: A) -> Result<Strings, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(elements)).map(Strings)
            }
        }
        deserializer.deserialize_any(StringsVisitor)
    }
}

/// What `/v1/completions` may be asked to continue, or what is to become vectors: `MAX` texts at most.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Prompts<const MAX: usize = PROMPTS_MAX> {
    Texts(Vec<String>),
    Tokens(Vec<Vec<TokenId>>),
}

impl<'de, const MAX: usize> Deserialize<'de> for Prompts<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptsVisitor<const MAX: usize>;
        impl<'de, const MAX: usize> Visitor<'de> for PromptsVisitor<MAX> {
            type Value = Prompts<MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, an array of strings, an array of token ids or an array of such arrays")
            }

            fn visit_str<E>(self, text: &str) -> Result<Prompts<MAX>, E> {
                Ok(Prompts::Texts(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Prompts<MAX>, A::Error> {
                let Some(first) = elements.next_element::<Element>()? else {
                    return Err(A::Error::custom("an empty array; at least one prompt is needed"));
                };
                let too_many = || A::Error::custom(format!("more than {MAX} prompts"));
                match first {
                    Element::Text(text) => {
                        let mut texts = vec![text];
                        while let Some(text) = elements.next_element()? {
                            if texts.len() == MAX {
                                return Err(too_many());
                            }
                            texts.push(text);
                        }
                        Ok(Prompts::Texts(texts))
                    }
                    Element::Tokens(tokens) => {
                        let mut prompts = vec![tokens];
                        while let Some(Tokens(tokens)) = elements.next_element()? {
                            if prompts.len() == MAX {
                                return Err(too_many());
                            }
                            prompts.push(tokens);
                        }
                        Ok(Prompts::Tokens(prompts))
                    }
                    Element::Token(token) => {
                        let tokens = read_tokens(vec![token], &mut elements)?;
                        Ok(Prompts::Tokens(vec![tokens]))
                    }
                }
            }
        }
        deserializer.deserialize_any(PromptsVisitor::<MAX>)
    }
}

/// The first element of an array of prompts, which decides what the others must be.
enum Element {
    Text(String),
    Token(TokenId),
    Tokens(Vec<TokenId>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or an array of token ids")
            }

            fn visit_str<E>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Element, E> {
                Err(E::custom(format!("{value} is not a token id")))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Element, E> {
                TokenId::try_from(value)
                    .map(Element::Token)
                    .map_err(|_| E::custom(format!("{value} is not a token id")))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Element, A::Error> {
                read_tokens(Vec::new(), &mut elements).map(Element::Tokens)
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

struct Tokens(Vec<TokenId>);

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TokensVisitor;
        impl<'de> Visitor<'de> for TokensVisitor {
            type Value = Tokens;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of token ids")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Tokens, A::Error> {
                read_tokens(Vec::new(), &mut elements).map(Tokens)
            }
        }
        deserializer.deserialize_seq(TokensVisitor)
    }
}

fn read_tokens<'de, A: SeqAccess<'de>>(
    mut tokens: Vec<TokenId>,
    elements: &mut A,
) -> Result<Vec<TokenId>, A::Error> {
    while let Some(token) = elements.next_element()? {
        if tokens.len() == limits::PROMPT_TOKENS_MAX {
            let message = format!("more than {} tokens in one prompt", limits::PROMPT_TOKENS_MAX);
            return Err(A::Error::custom(message));
        }
        tokens.push(token);
    }
    Ok(tokens)
}

/// `logit_bias`: token ids, written as strings, to what is added to their logits.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct LogitBias(pub(crate) Vec<(TokenId, f32)>);

impl<'de> Deserialize<'de> for LogitBias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LogitBiasVisitor;
        impl<'de> Visitor<'de> for LogitBiasVisitor {
            type Value = LogitBias;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of token ids to numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<LogitBias, A::Error> {
                let mut biases = Vec::new();
                while let Some((key, bias)) = entries.next_entry::<String, f32>()? {
                    let token = key
                        .parse()
                        .map_err(|_| A::Error::custom(format!("the key {key:?} is not a token id")))?;
                    if biases.len() == limits::LOGIT_BIAS_MAX {
                        let message = format!("more than {} entries", limits::LOGIT_BIAS_MAX);
                        return Err(A::Error::custom(message));
                    }
                    biases.push((token, bias));
                }
                Ok(LogitBias(biases))
            }
        }
        deserializer.deserialize_map(LogitBiasVisitor)
    }
}

/// A seed: OpenAI's are signed, others' unsigned; both keep their 64 bits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Seed(pub(crate) u64);

impl<'de> Deserialize<'de> for Seed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SeedVisitor;
        impl Visitor<'_> for SeedVisitor {
            type Value = Seed;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a 64-bit integer")
            }

            fn visit_i64<E>(self, value: i64) -> Result<Seed, E> {
                Ok(Seed(value.cast_unsigned()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Seed, E> {
                Ok(Seed(value))
            }
        }
        deserializer.deserialize_any(SeedVisitor)
    }
}

/// A priority: a word, or vLLM's integer, of which lower ones come earlier and 0 is usual.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct PriorityValue(pub(crate) Priority);

impl<'de> Deserialize<'de> for PriorityValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PriorityVisitor;
        impl Visitor<'_> for PriorityVisitor {
            type Value = PriorityValue;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "\"low\", \"normal\", \"high\" or an integer (negative: earlier, positive: later)",
                )
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<PriorityValue, E> {
                match text {
                    "low" => Ok(PriorityValue(Priority::Low)),
                    "normal" => Ok(PriorityValue(Priority::Normal)),
                    "high" => Ok(PriorityValue(Priority::High)),
                    _ => Err(E::invalid_value(Unexpected::Str(text), &self)),
                }
            }

            fn visit_i64<E>(self, value: i64) -> Result<PriorityValue, E> {
                Ok(PriorityValue(match value {
                    ..0 => Priority::High,
                    0 => Priority::Normal,
                    1.. => Priority::Low,
                }))
            }

            fn visit_u64<E>(self, value: u64) -> Result<PriorityValue, E> {
                Ok(PriorityValue(if value == 0 { Priority::Normal } else { Priority::Low }))
            }
        }
        deserializer.deserialize_any(PriorityVisitor)
    }
}

/// Whether tokens are guessed ahead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SpeculationValue {
    /// Where it pays.
    #[default]
    Auto,
    Off,
}

/// A message's content as one text. Text parts are joined with a line break, which keeps what were separate blocks apart.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Content(pub(crate) String);

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of text parts")
            }

            fn visit_str<E>(self, text: &str) -> Result<Content, E> {
                Ok(Content(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Content, A::Error> {
                let mut joined: Option<String> = None;
                while let Some(part) = parts.next_element::<Object<ContentPart>>()? {
                    match &mut joined {
                        None => joined = Some(part.0.text),
                        Some(text) => {
                            text.push('\n');
                            text.push_str(&part.0.text);
                        }
                    }
                }
                Ok(Content(joined.unwrap_or_default()))
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

#[derive(serde::Deserialize)]
struct ContentPart {
    #[serde(rename = "type")]
    _type: PartType,
    text: String,
}

/// The kind of a content part; only text can be read.
struct PartType;

impl<'de> Deserialize<'de> for PartType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let kind = String::deserialize(deserializer)?;
        if kind == "text" {
            Ok(Self)
        } else {
            Err(D::Error::custom(format!("content of type {kind:?} is not supported yet; only \"text\" is")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_told_apart() {
        let check = |json: &str, expected: Prompts| {
            assert_eq!(serde_json::from_str::<Prompts>(json).unwrap(), expected, "{json}");
        };
        check("\"a\"", Prompts::Texts(vec!["a".to_owned()]));
        check("[\"a\", \"b\"]", Prompts::Texts(vec!["a".to_owned(), "b".to_owned()]));
        check("[1, 2]", Prompts::Tokens(vec![vec![1, 2]]));
        check("[[1], [2, 3]]", Prompts::Tokens(vec![vec![1], vec![2, 3]]));
        for bad in ["[]", "[1, \"a\"]", "[\"a\", 1]", "[[1], 2]", "[-1]", "[4294967296]", "1", "{}", "null"] {
            assert!(serde_json::from_str::<Prompts>(bad).is_err(), "{bad}");
        }
        let many = serde_json::to_string(&vec!["a"; PROMPTS_MAX + 1]).unwrap();
        assert!(serde_json::from_str::<Prompts>(&many).is_err());
    }

    #[test]
    fn priorities_are_words_or_numbers() {
        let check = |json: &str, expected: Option<Priority>| {
            let parsed = serde_json::from_str::<PriorityValue>(json).ok();
            assert_eq!(parsed, expected.map(PriorityValue), "{json}");
        };
        check("\"low\"", Some(Priority::Low));
        check("\"normal\"", Some(Priority::Normal));
        check("\"high\"", Some(Priority::High));
        check("-1", Some(Priority::High));
        check("-9223372036854775808", Some(Priority::High));
        check("0", Some(Priority::Normal));
        check("1", Some(Priority::Low));
        check("18446744073709551615", Some(Priority::Low));
        for bad in ["\"urgent\"", "\"0\"", "1.5", "true", "[]", "null"] {
            check(bad, None);
        }
    }

    #[test]
    fn content_parts_are_joined() {
        let json = r#"[{"type":"text","text":"a"},{"type":"text","text":"b"}]"#;
        assert_eq!(serde_json::from_str::<Content>(json).unwrap().0, "a\nb");
        assert_eq!(serde_json::from_str::<Content>("[]").unwrap().0, "");
    }
}
