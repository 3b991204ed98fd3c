//! 128-bit ids, shown as 32 hexadecimal digits.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::{borrow::Cow, fmt, str::FromStr};

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an id: expected 32 hexadecimal digits")]
pub struct ParseIdError {
    /// The text as given.
    pub text: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u128);

        /// As its digits where people or JavaScript read it: numbers of theirs have 53 bits.
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    Cow::<'_, str>::deserialize(deserializer)?.parse().map_err(D::Error::custom)
                } else {
                    u128::deserialize(deserializer).map(Self)
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:032x})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
                let value = u128::from_str_radix(text, 16).ok().filter(|_| digits);
                value.map(Self).ok_or_else(|| ParseIdError { text: text.to_owned() })
            }
        }
    };
}

id! {
    /// One request, from the HTTP endpoint to the engine step; in every span.
    RequestId
}
id! {
    /// One `mlx-node` on one machine; drawn at random at its start.
    NodeId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_reject() {
        let id = RequestId(0xfeed);
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "12", "+0000000000000000000000000000feed", "zz00000000000000000000000000feed"] {
            assert_eq!(bad.parse::<NodeId>(), Err(ParseIdError { text: bad.to_owned() }));
        }
    }
}
