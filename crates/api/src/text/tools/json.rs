//! JSON in a text that arrives character by character: where a value ends, and what a string says.

/// Finds the end of a value. What is between its brackets is not looked at.
#[derive(Debug, Default)]
pub(super) struct JsonValue {
    depth: usize,
    in_string: bool,
    escaped: bool,
    begun: bool,
}

/// Where a character is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Before the value: white space.
    Before,
    /// In it.
    Inside,
    /// It is the value's last one.
    Last,
    /// After the value, which the character before ended.
    Past,
    /// Where no value can be.
    Nowhere,
}

impl JsonValue {
    pub(super) fn feed(&mut self, char: char) -> Place {
        if self.in_string {
            match char {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => {
                    self.in_string = false;
                    return self.inside();
                }
                _ => {}
            }
            return Place::Inside;
        }
        match char {
            _ if char.is_whitespace() && !self.begun => return Place::Before,
            '"' if self.depth > 0 || !self.begun => self.in_string = true,
            '{' | '[' if self.depth > 0 || !self.begun => self.depth += 1,
            '}' | ']' if self.depth > 0 => {
                self.depth -= 1;
                return self.inside();
            }
            _ if self.depth > 0 => {}
            // A number or a word.
            ',' | '}' | ']' => return if self.begun { Place::Past } else { Place::Nowhere },
            _ if char.is_whitespace() => return Place::Past,
            _ if char.is_alphanumeric() || matches!(char, '-' | '+' | '.') => {}
            _ => return Place::Nowhere,
        }
        self.begun = true;
        Place::Inside
    }

    fn inside(&self) -> Place {
        if self.depth == 0 { Place::Last } else { Place::Inside }
    }
}

/// The text of a JSON string literal; none if it is none.
pub(super) fn unquote(literal: &str) -> Option<String> {
    serde_json::from_str(literal).ok()
}

/// A text as JSON writes it within quotes.
pub(super) fn escape(text: &str) -> String {
    let literal = serde_json::Value::from(text).to_string();
    literal[1..literal.len() - 1].to_owned()
}
