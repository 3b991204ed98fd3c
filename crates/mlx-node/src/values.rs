//! The values that settings take: each is parsed once, from one text form that file, flags and environment share.

use serde::{Deserialize, Serialize};
use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

/// A type that a setting can have.
pub(crate) trait Setting: Clone + Send + Sync + 'static {
    /// Whether the flag alone, without a value, means `true`.
    const SWITCH: bool = false;

    /// Reads the text form; the error says what was expected, not what was given.
    fn parse(text: &str) -> Result<Self, String>;

    /// The value as TOML, which [`Setting::parse`] reads back; secrets are not shown.
    fn to_toml(&self) -> String;
}

/// Quotes a text for TOML; JSON's escapes are a subset of TOML's.
pub(crate) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

impl Setting for String {
    fn parse(text: &str) -> Result<Self, String> {
        if text.chars().any(char::is_control) {
            return Err("a text without control characters is expected".to_owned());
        }
        Ok(text.to_owned())
    }

    fn to_toml(&self) -> String {
        quoted(self)
    }
}

impl Setting for bool {
    const SWITCH: Self = true;

    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| "true or false is expected".to_owned())
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }
}

impl Setting for u32 {
    fn parse(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(number) if number > 0 => Ok(number),
            _ => Err(format!("a whole number from 1 to {} is expected", Self::MAX)),
        }
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }
}

impl Setting for SocketAddr {
    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| "an IP address and a port are expected, such as 127.0.0.1:8080".to_owned())
    }

    fn to_toml(&self) -> String {
        quoted(&self.to_string())
    }
}

impl Setting for PathBuf {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("a path is expected".to_owned());
        }
        Ok(text.into())
    }

    fn to_toml(&self) -> String {
        quoted(&self.to_string_lossy())
    }
}

impl Setting for types::Role {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "node" => Ok(Self::Node),
            "router" => Ok(Self::Router),
            _ => Err("\"node\" or \"router\" is expected".to_owned()),
        }
    }

    fn to_toml(&self) -> String {
        quoted(match self {
            Self::Node => "node",
            Self::Router => "router",
        })
    }
}

impl Setting for router::Policy {
    fn parse(text: &str) -> Result<Self, String> {
        let names = Self::ALL.map(|(_, name)| name).join(", ");
        text.parse().map_err(|_| format!("one of {names} is expected"))
    }

    fn to_toml(&self) -> String {
        quoted(&self.to_string())
    }
}

/// A value, or the program's own choice, written `auto`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Auto<T> {
    /// Chosen by the program.
    Auto,
    /// Chosen by the operator.
    Fixed(T),
}

impl<T> Auto<T> {
    pub(crate) fn fixed(self) -> Option<T> {
        match self {
            Self::Auto => None,
            Self::Fixed(value) => Some(value),
        }
    }
}

impl<T: Setting> Setting for Auto<T> {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        T::parse(text).map(Self::Fixed).map_err(|expected| format!("\"auto\", or {expected}"))
    }

    fn to_toml(&self) -> String {
        match self {
            Self::Auto => quoted("auto"),
            Self::Fixed(value) => value.to_toml(),
        }
    }
}

/// A number that is not to be exceeded, or `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit(pub(crate) Option<u32>);

impl Setting for Limit {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        u32::parse(text).map(|limit| Self(Some(limit))).map_err(|expected| format!("\"none\", or {expected}"))
    }

    fn to_toml(&self) -> String {
        self.0.map_or_else(|| quoted("none"), |limit| limit.to_string())
    }
}

/// An origin as browsers send it: scheme, host and, where it is not the scheme's own, port; or `*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin(pub(crate) String);

impl Setting for Origin {
    fn parse(text: &str) -> Result<Self, String> {
        let rest = text.split_once("://").map_or("", |(_, rest)| rest);
        let host = !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
        if text == "*" || host && text.is_ascii() && !text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Ok(Self(text.to_owned()));
        }
        Err("\"*\" or an origin is expected, in lower case and without a path, such as http://localhost:3000"
            .to_owned())
    }

    fn to_toml(&self) -> String {
        quoted(&self.0)
    }
}

/// How a model writes calls of tools: the model's name, `=`, and the format's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamedFormat {
    pub(crate) model: String,
    pub(crate) format: api::ToolFormat,
}

impl Setting for NamedFormat {
    fn parse(text: &str) -> Result<Self, String> {
        let names = || api::ToolFormat::ALL.map(api::ToolFormat::name).join(", ");
        let parsed = text.rsplit_once('=').and_then(|(model, name)| {
            let format = api::ToolFormat::ALL.into_iter().find(|format| format.name() == name.trim())?;
            Some(Self { model: model.trim().to_owned(), format })
        });
        let parsed = parsed.filter(|parsed| !parsed.model.is_empty());
        parsed.ok_or_else(|| format!("MODEL=FORMAT is expected, with one of {}", names()))
    }

    fn to_toml(&self) -> String {
        quoted(&format!("{}={}", self.model, self.format.name()))
    }
}

/// Several values: an array in TOML, separated by commas elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct List<T>(pub(crate) Vec<T>);

impl<T: Setting> Setting for List<T> {
    fn parse(text: &str) -> Result<Self, String> {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        items.map(T::parse).collect::<Result<_, _>>().map(Self)
    }

    fn to_toml(&self) -> String {
        format!("[{}]", self.0.iter().map(Setting::to_toml).collect::<Vec<_>>().join(", "))
    }
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(pub(crate) String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "Secret(none)" } else { "Secret(…)" })
    }
}

impl Setting for Secret {
    fn parse(text: &str) -> Result<Self, String> {
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err("a text without spaces or control characters is expected".to_owned());
        }
        Ok(Self(text.to_owned()))
    }

    fn to_toml(&self) -> String {
        quoted(if self.0.is_empty() { "" } else { "(not shown)" })
    }
}

/// A part of a whole, from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Share(pub(crate) f64);

impl Setting for Share {
    fn parse(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(share) if (0.0..=1.0).contains(&share) => Ok(Self(share)),
            _ => Err("a number from 0 to 1 is expected, such as 0.5".to_owned()),
        }
    }

    fn to_toml(&self) -> String {
        format!("{:?}", self.0)
    }
}

/// A number of bytes, written with a unit: `512 MiB`, `8GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) u64);

const BYTE_UNITS: [(&str, u64); 8] = [
    ("B", 1),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

impl Setting for Bytes {
    fn parse(text: &str) -> Result<Self, String> {
        let expected = || "a size with its unit is expected, such as \"512 MiB\" or \"8 GB\"".to_owned();
        let (number, unit) = number_and_unit(text).ok_or_else(expected)?;
        let scale = BYTE_UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
        let bytes = scale.map_or(0.0, |&(_, scale)| number * scale as f64);
        // 2^53: past it an f64 no longer holds every byte, and no machine has so many.
        if (1.0..9.0e15).contains(&bytes) { Ok(Self(bytes as u64)) } else { Err(expected()) }
    }

    fn to_toml(&self) -> String {
        let exact = |&&(_, scale): &&(&str, u64)| self.0.is_multiple_of(scale);
        let (unit, scale) =
            BYTE_UNITS.iter().filter(exact).max_by_key(|(_, scale)| *scale).unwrap_or(&BYTE_UNITS[0]);
        quoted(&format!("{} {unit}", self.0 / scale))
    }
}

/// A length of time, written with a unit: `250 ms`, `30 s`, `5 min`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

/// Units of time in milliseconds.
const TIME_UNITS: [(&str, f64); 4] = [("ms", 1.0), ("s", 1e3), ("min", 60e3), ("h", 3600e3)];
/// No setting makes sense beyond a week.
const SPAN_MS_MAX: f64 = 7.0 * 24.0 * 3600e3;

impl Setting for Span {
    fn parse(text: &str) -> Result<Self, String> {
        let expected = || "a time with its unit (ms, s, min, h) is expected, such as \"30 s\"".to_owned();
        let (number, unit) = number_and_unit(text).ok_or_else(expected)?;
        let scale = TIME_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(expected)?.1;
        let ms = number * scale;
        if (1.0..=SPAN_MS_MAX).contains(&ms) {
            Ok(Self(Duration::from_millis(ms as u64)))
        } else {
            Err("a time from 1 ms to 168 h is expected".to_owned())
        }
    }

    fn to_toml(&self) -> String {
        let ms = self.0.as_millis();
        quoted(&if ms.is_multiple_of(1000) { format!("{} s", ms / 1000) } else { format!("{ms} ms") })
    }
}

fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    Some((text[..digits].parse().ok()?, text[digits..].trim()))
}

/// A filter of log lines, such as `info` or `warn,node=debug`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LogFilter(pub(crate) String);

impl Setting for LogFilter {
    fn parse(text: &str) -> Result<Self, String> {
        match tracing_subscriber::EnvFilter::builder().parse(text) {
            Ok(_) if !text.is_empty() => Ok(Self(text.to_owned())),
            _ => Err("a log filter is expected, such as \"info\" or \"warn,node=debug\"".to_owned()),
        }
    }

    fn to_toml(&self) -> String {
        quoted(&self.0)
    }
}

macro_rules! choice {
    ($(#[doc = $doc:literal])+ $name:ident { $($(#[doc = $item_doc:literal])+ $item:ident = $text:literal),+ $(,)? }) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub(crate) enum $name { $($(#[doc = $item_doc])+ #[serde(rename = $text)] $item),+ }

        impl Setting for $name {
            fn parse(text: &str) -> Result<Self, String> {
                match text {
                    $($text => Ok(Self::$item),)+
                    _ => Err(format!("one of {} is expected", [$($text),+].map(quoted).join(", "))),
                }
            }

            fn to_toml(&self) -> String {
                quoted(match self { $(Self::$item => $text),+ })
            }
        }
    };
}

choice! {
    /// Whether quantized weights are expanded when a model is loaded.
    Dequantize {
        /// On the CPU, where quantized products are slow.
        Auto = "auto",
        /// Keep them as stored.
        Never = "never",
        /// Expand them wherever they run.
        Always = "always",
    }
}

choice! {
    /// Where a model runs.
    Device {
        /// On the GPU where MLX has one.
        Auto = "auto",
        /// On the CPU.
        Cpu = "cpu",
        /// On the GPU, or not at all.
        Gpu = "gpu",
    }
}

choice! {
    /// What a pipeline is for.
    Goal {
        /// Most tokens a second of all requests.
        Throughput = "throughput",
        /// The next token of a single request as soon as possible.
        Latency = "latency",
    }
}

choice! {
    /// How a pipeline's ranks reach each other.
    Links {
        /// Through tunnels between the nodes.
        Tunnel = "tunnel",
        /// Over TCP, on a network that is to be trusted.
        Direct = "direct",
        /// Over Thunderbolt with RDMA.
        Jaccl = "jaccl",
    }
}

choice! {
    /// How log lines look.
    LogFormat {
        /// For people.
        Human = "human",
        /// One JSON object a line.
        Json = "json",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_forms() {
        fn check<T: Setting + PartialEq + fmt::Debug>(text: &str, expected: Option<(T, &str)>) {
            let parsed = T::parse(text).ok();
            assert_eq!(parsed, expected.as_ref().map(|(value, _)| value.clone()), "{text:?}");
            if let Some((value, toml)) = expected {
                assert_eq!(value.to_toml(), toml, "{text:?}");
            }
        }
        check("512 MiB", Some((Bytes(512 << 20), "\"512 MiB\"")));
        check("8gb", Some((Bytes(8_000_000_000), "\"8 GB\"")));
        check("1.5GiB", Some((Bytes(3 << 29), "\"1536 MiB\"")));
        for bad in ["512", "-1 MB", "", "MiB", "0 B", "1e9 GB", "9999999 TiB", "1 MiBs", "1..5 MB"] {
            check::<Bytes>(bad, None);
        }
        check("250ms", Some((Span(Duration::from_millis(250)), "\"250 ms\"")));
        check("5 min", Some((Span(Duration::from_secs(300)), "\"300 s\"")));
        for bad in ["5", "0 s", "2 weeks", "-1 s", "200 h", "nan s"] {
            check::<Span>(bad, None);
        }
        check("0.25", Some((Share(0.25), "0.25")));
        check("1", Some((Share(1.0), "1.0")));
        check("0", Some((Share(0.0), "0.0")));
        for bad in ["-0.1", "1.01", "half", "50%", "nan", "inf", ""] {
            check::<Share>(bad, None);
        }
        check("auto", Some((Auto::<u32>::Auto, "\"auto\"")));
        check("7", Some((Auto::Fixed(7), "7")));
        check::<Auto<u32>>("0", None);
        check("a, b,,c", Some((List(["a", "b", "c"].map(str::to_owned).to_vec()), r#"["a", "b", "c"]"#)));
        check(
            "node,router",
            Some((List(vec![types::Role::Node, types::Role::Router]), r#"["node", "router"]"#)),
        );
        check::<List<types::Role>>("node,leader", None);
        check("none", Some((Limit(None), "\"none\"")));
        check("60", Some((Limit(Some(60)), "60")));
        check::<Limit>("0", None);
        for good in
            ["*", "http://localhost:3000", "https://chat.example", "app://obsidian.md", "http://[::1]:8"]
        {
            check(good, Some((Origin(good.to_owned()), &quoted(good))));
        }
        for bad in
            ["", "localhost", "http://", "http://x/", "https://Example.org", "http://a b", "https://ä.de"]
        {
            check::<Origin>(bad, None);
        }
        let format = NamedFormat { model: "org/a=b".to_owned(), format: api::ToolFormat::QwenCoder };
        check("org/a=b = qwen_coder", Some((format, "\"org/a=b=qwen_coder\"")));
        check::<NamedFormat>("org/a", None);
        check::<NamedFormat>("=hermes", None);
        check::<NamedFormat>("a=Hermes", None);
        check("never", Some((Dequantize::Never, "\"never\"")));
        check::<Device>("tpu", None);
        check("warn,node=debug", Some((LogFilter("warn,node=debug".to_owned()), "\"warn,node=debug\"")));
        check::<LogFilter>("node=loudly", None);
    }

    #[test]
    fn secrets_are_not_shown() {
        let secret = Secret::parse("hunter2").expect("valid");
        assert!(!format!("{secret:?}{}", secret.to_toml()).contains("hunter2"));
    }
}
