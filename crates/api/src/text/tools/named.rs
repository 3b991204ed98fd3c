//! Calls as a name, whatever is around it, and an object: the head ends where the object begins.

use super::{
    Step,
    json::{JsonValue, Place},
};
use crate::text::Parts;

/// Bytes of a head: markers, a type, an id and a name.
const HEAD_BYTES_MAX: usize = 512;

/// Reads one call.
#[derive(Debug)]
pub(crate) struct NamedCall {
    name_of: fn(&str) -> Option<&str>,
    head: String,
    /// Once the object has begun.
    value: Option<JsonValue>,
}

impl NamedCall {
    /// `name_of` finds the name in the head.
    pub(super) fn new(name_of: fn(&str) -> Option<&str>) -> Self {
        Self { name_of, head: String::new(), value: None }
    }

    pub(super) fn is_begun(&self) -> bool {
        self.value.is_some()
    }

    pub(super) fn feed(&mut self, char: char, out: &mut Parts) -> Step {
        let value = match &mut self.value {
            Some(value) => value,
            None if char != '{' => {
                self.head.push(char);
                return if self.head.len() > HEAD_BYTES_MAX { Step::Broken } else { Step::More };
            }
            None => {
                let name = (self.name_of)(&self.head).map(str::trim);
                let Some(name) = name.filter(|name| !name.is_empty()) else { return Step::Broken };
                out.call(name);
                self.value.insert(JsonValue::default())
            }
        };
        let place = value.feed(char);
        out.arguments(char.encode_utf8(&mut [0; 4]));
        if place == Place::Last {
            out.call_end();
            self.value = None;
            return Step::Done;
        }
        Step::More
    }
}
