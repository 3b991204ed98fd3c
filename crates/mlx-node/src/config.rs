//! Where settings come from: a TOML file, flags over it, `MLX_NODE_*` variables over both.
//!
//! One list names every setting with its type, its default and its text for `--help`; a [`Config`] holds what one
//! source says, and [`Config::over`] lays one over another. What is missing at the end takes its default.

use crate::keys::KeyEntry;
use crate::pipelines::Pipeline;
use crate::values::{
    Auto, Bytes, Dequantize, Device, Limit, List, LogFilter, LogFormat, NamedFormat, Origin, Secret, Setting,
    Share, Span,
};
use router::Policy;
use std::{
    ffi::OsString,
    net::SocketAddr,
    ops::Range,
    path::{Path, PathBuf},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};
use types::Role;

/// Begins the names of the environment variables that are settings.
pub(crate) const VARIABLE_PREFIX: &str = "MLX_NODE_";
/// The variable that names the file; not a setting, since it says where settings are.
const VARIABLE_FILE: &str = "MLX_NODE_CONFIG";
/// The name of the tables that are pipelines.
const PIPELINE: &str = "pipeline";
/// The name of the tables that are keys.
pub(crate) const KEY: &str = "key";
/// Bytes of a configuration file: no list in it is long.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why the settings cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, message: String },
    #[error("{}:{line}: {message}", path.display())]
    Line { path: PathBuf, line: usize, message: String },
    #[error("environment variable {name}: {message}")]
    Variable { name: String, message: String },
}

macro_rules! settings {
    ($($(#[doc = $doc:literal])+ $name:ident: $type:ty = $default:literal, $placeholder:literal;)+) => {
        /// What one source says; none where it says nothing.
        #[derive(Debug, Clone, Default, clap::Args)]
        pub(crate) struct Config {
            $(
                $(#[doc = $doc])+
                #[arg(
                    long, value_name = $placeholder, help_heading = "Settings",
                    value_parser = <$type as Setting>::parse,
                    require_equals = <$type as Setting>::SWITCH,
                    num_args = usize::from(!<$type as Setting>::SWITCH)..=1,
                    default_missing_value = "true",
                )]
                pub(crate) $name: Option<$type>,
            )+
            /// Each `[[pipeline]]` of the file.
            #[arg(skip)]
            pub(crate) pipelines: Vec<Pipeline>,
            /// Each `[[key]]` of the file.
            #[arg(skip)]
            pub(crate) keys: Vec<KeyEntry>,
        }

        /// Every setting with a value.
        #[derive(Debug, Clone)]
        pub(crate) struct Values {
            $($(#[doc = $doc])+ pub(crate) $name: $type,)+
            /// Each `[[pipeline]]` of the file.
            pub(crate) pipelines: Vec<Pipeline>,
            /// Each `[[key]]` of the file.
            pub(crate) keys: Vec<KeyEntry>,
        }

        impl Config {
            /// The names of all settings, as in the file.
            pub(crate) const NAMES: &[&str] = &[$(stringify!($name)),+];

            fn set(&mut self, name: &str, text: &str) -> Result<(), String> {
                match name {
                    $(stringify!($name) => self.$name = Some(<$type as Setting>::parse(text)?),)+
                    _ => return Err(unknown("setting", name, Self::NAMES)),
                }
                Ok(())
            }

            /// What `self` says, and what `under` says where `self` says nothing.
            pub(crate) fn over(self, under: Self) -> Self {
                let pipelines = if self.pipelines.is_empty() { under.pipelines } else { self.pipelines };
                let keys = if self.keys.is_empty() { under.keys } else { self.keys };
                Self { $($name: self.$name.or(under.$name),)+ pipelines, keys }
            }

            /// Whether nothing is said at all.
            pub(crate) fn is_empty(&self) -> bool {
                self.pipelines.is_empty() && self.keys.is_empty() $(&& self.$name.is_none())+
            }

            /// Fills in the defaults.
            pub(crate) fn resolve(self) -> Values {
                Values {
                    $($name: self.$name.unwrap_or_else(|| {
                        <$type as Setting>::parse($default).expect("a test parses every default")
                    }),)+
                    pipelines: self.pipelines,
                    keys: self.keys,
                }
            }
        }

        impl Values {
            /// Names and values as TOML, in the order of the list; secrets are not shown.
            pub(crate) fn shown(&self) -> Vec<(&'static str, String)> {
                vec![$((stringify!($name), self.$name.to_toml())),+]
            }

            /// The names of settings whose values are others in `other`; tables by theirs.
            pub(crate) fn differing(&self, other: &Self) -> Vec<&'static str> {
                let mut names = Vec::new();
                $(if self.$name != other.$name { names.push(stringify!($name)); })+
                if self.pipelines != other.pipelines { names.push(PIPELINE); }
                if self.keys != other.keys { names.push(KEY); }
                names
            }

            /// Takes one setting's value over from `other`.
            pub(crate) fn take(&mut self, name: &str, other: &Self) {
                match name {
                    $(stringify!($name) => self.$name.clone_from(&other.$name),)+
                    PIPELINE => self.pipelines.clone_from(&other.pipelines),
                    KEY => self.keys.clone_from(&other.keys),
                    _ => {}
                }
            }
        }
    };
}

settings! {
    /// Name of the cluster; nodes of other clusters on the same network are ignored
    cluster: String = "home", "NAME";
    /// Name of this node for people [auto: the host's name]
    name: Auto<String> = "auto", "NAME";
    /// What this process does: node (hosts an engine), router (routes and serves HTTP), or both
    roles: List<Role> = "node,router", "ROLES";
    /// The model to serve: a folder, a .gguf file, or a hub id such as mlx-community/Llama-3.2-1B-Instruct-4bit
    model: String = "", "PATH|ID";
    /// Name that clients call the model by [auto: the hub id, or the name of the file or folder]
    model_name: Auto<String> = "auto", "NAME";
    /// Never ask the hub for anything; use only what was downloaded before
    offline: bool = "false", "BOOL";
    /// Address and UDP port for other nodes
    listen: SocketAddr = "0.0.0.0:7415", "IP:PORT";
    /// Address and port of the HTTP endpoint
    http: SocketAddr = "127.0.0.1:8080", "IP:PORT";
    /// Keys that HTTP clients must present one of, or their hashes (`mlx-node key new --http`); empty: anybody who reaches the endpoint is served
    api_keys: List<Secret> = "", "KEY,…";
    /// PEM file with the certificate that HTTP is served with over TLS, and its chain; empty: plain HTTP
    tls_cert: String = "", "FILE";
    /// PEM file with the certificate's private key
    tls_key: String = "", "FILE";
    /// Serve everybody also where `http` is reachable from other machines
    allow_anonymous: bool = "false", "BOOL";
    /// Keep what each key's requests leave in the prefix caches from those of all others
    cache_per_key: bool = "false", "BOOL";
    /// Requests by the minute that each key may make; without keys, all clients together
    key_requests_per_minute: Limit = "none", "N";
    /// Tokens of prompts and answers by the minute that each key may use
    key_tokens_per_minute: Limit = "none", "N";
    /// Requests of each key that are answered at a time
    key_concurrency: Limit = "none", "N";
    /// Origins of web pages whose scripts may use the endpoint; `*`: all
    cors_origins: List<Origin> = "", "ORIGIN,…";
    /// How models write calls of tools, where that is not as their chat templates say: hermes, qwen_coder, llama, mistral, mistral_args, phi, deepseek, deepseek_plain, function_gemma, gemma
    tool_formats: List<NamedFormat> = "", "MODEL=FORMAT,…";
    /// Serve /metrics without a key, for a Prometheus that has none
    open_metrics: bool = "false", "BOOL";
    /// File with the cluster key, made by `mlx-node key new` [auto: cluster.key beside the configuration file in ~/.config/mlx-cluster]
    key_file: Auto<PathBuf> = "auto", "FILE";
    /// The cluster key itself, instead of a file; as a flag it shows in the list of processes
    cluster_key: Secret = "", "KEY";
    /// Find other nodes over mDNS
    mdns: bool = "true", "BOOL";
    /// Network interfaces for mDNS, by name; empty: all but the loopback
    interfaces: List<String> = "", "NAME,…";
    /// Other nodes by address, for networks without multicast
    peers: List<String> = "", "HOST:PORT,…";
    /// How a node is chosen for a request: cost; or, to compare with, greedy_ttft, lmetric, prefix_hash, least_work, round_robin, sglang_rule, smg_spill, llmd_322
    route_policy: Policy = "cost", "POLICY";
    /// The longest that a request waits at a router for a node with room
    queue_time: Span = "30 s", "TIME";
    /// Requests that are generated at once
    max_batch: u32 = "16", "N";
    /// Tokens of prompt and output together [auto: what the model was made for]
    max_context: Auto<u32> = "auto", "TOKENS";
    /// Memory for keys and values of all requests together [auto: what the model leaves]
    kv_memory: Auto<Bytes> = "auto", "SIZE";
    /// Bits of keys and values: 8 or 4; packed ones take a half or a quarter of the memory, and longer to compute with [auto: as they are computed]
    kv_bits: Auto<u32> = "auto", "N";
    /// Check the model's files against their SHA-256 before they are loaded
    verify: bool = "false", "BOOL";
    /// Expand quantized weights when the model is loaded: auto (on the CPU), never, always
    dequantize: Dequantize = "auto", "WHEN";
    /// Where the model runs: auto (the GPU where there is one), cpu, gpu
    device: Device = "auto", "DEVICE";
    /// Time to a request's first token that the scheduler aims for, unless the request says otherwise
    ttft_target: Span = "1 s", "TIME";
    /// Time for each further token that the scheduler aims for, unless the request says otherwise
    tpot_target: Span = "100 ms", "TIME";
    /// Keep what was read and written for later requests that begin alike
    prefix_cache: bool = "true", "BOOL";
    /// Guess tokens ahead where that is expected to make answers faster (young: off by default)
    speculation: bool = "false", "BOOL";
    /// How long a session is kept after its last request
    session_ttl: Span = "30 min", "TIME";
    /// Share of the memory for keys and values that sessions may keep, from 0 to 1
    session_quota: Share = "0.5", "SHARE";
    /// How long running requests may take to finish after SIGTERM or SIGINT
    drain_timeout: Span = "60 s", "TIME";
    /// Which log lines are written, such as `info` or `warn,node=debug`
    log: LogFilter = "info", "FILTER";
    /// How log lines look: human, json
    log_format: LogFormat = "human", "FORMAT";
}

/// Reads all sources: `flags` lie over the file, variables over both. `file` is what `--config` said.
///
/// # Errors
/// A file that is missing though named, a value that is wrong, a name that is no setting.
pub(crate) fn load(
    file: Option<&Path>,
    flags: Config,
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Values, ConfigError> {
    let (variables, variable_file) = from_variables(variables)?;
    let named = variable_file.or_else(|| file.map(Path::to_path_buf));
    let path = named.or_else(|| usual_files().into_iter().find(|path| path.is_file()));
    let under = path.map_or_else(|| Ok(Config::default()), |path| from_file(&path))?;
    Ok(variables.over(flags).over(under).resolve())
}

/// The file that [`load`] reads, if any; `file` is what `--config` said.
pub(crate) fn used_file(file: Option<&Path>) -> Option<PathBuf> {
    let named = std::env::var_os(VARIABLE_FILE).map(PathBuf::from).or_else(|| file.map(Path::to_path_buf));
    named.or_else(|| usual_files().into_iter().find(|path| path.is_file()))
}

/// `~/.config/mlx-cluster`, where the configuration and the cluster key are looked for; none without a home.
pub(crate) fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("XDG_CONFIG_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
    let home = std::env::var_os("HOME").filter(|path| !path.is_empty());
    folder.or_else(|| home.map(|home| Path::new(&home).join(".config"))).map(|path| path.join("mlx-cluster"))
}

fn usual_files() -> Vec<PathBuf> {
    let own = folder().map(|folder| folder.join("cluster.toml"));
    [Some(PathBuf::from("cluster.toml")), own].into_iter().flatten().collect()
}

fn from_file(path: &Path) -> Result<Config, ConfigError> {
    let file = |message: String| ConfigError::File { path: path.to_path_buf(), message };
    let bytes = std::fs::metadata(path).map_err(|error| file(error.to_string()))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(file(format!("{bytes} bytes; a configuration has at most {FILE_BYTES_MAX}")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| file(error.to_string()))?;
    from_toml(&text, path)
}

/// Reads the text of a file; `path` is for messages.
pub(crate) fn from_toml(text: &str, path: &Path) -> Result<Config, ConfigError> {
    let at = |offset: usize, message: String| {
        let line =
            text.as_bytes()[..offset.min(text.len())].iter().filter(|&&byte| byte == b'\n').count() + 1;
        ConfigError::Line { path: path.to_path_buf(), line, message }
    };
    let table = DeTable::parse(text)
        .map_err(|error| at(error.span().map_or(0, |span| span.start), error.message().to_owned()))?;
    let mut entries: Vec<_> = table.get_ref().iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    let mut config = Config::default();
    for (key, value) in entries {
        let name: &str = key.get_ref();
        let own = |(offset, message): (Option<usize>, String)| {
            at(offset.unwrap_or_else(|| key.span().start), message)
        };
        if name == PIPELINE {
            config.pipelines = tables(PIPELINE, value, Pipeline::parse).map_err(own)?;
            continue;
        }
        if name == KEY {
            config.keys = tables(KEY, value, KeyEntry::parse).map_err(own)?;
            continue;
        }
        let known = Config::NAMES.contains(&name);
        let result = if known {
            plain_text(value.get_ref())
                .and_then(|text| config.set(name, &text).map_err(|expected| refused(name, &text, &expected)))
        } else {
            Err(unknown("setting", name, Config::NAMES))
        };
        result.map_err(|message| at(key.span().start, message))?;
    }
    Ok(config)
}

/// All tables of a name, such as `[[pipeline]]`; an error says at which byte of the file it is, where that is known.
fn tables<T>(
    name: &str,
    value: &Spanned<DeValue<'_>>,
    parse: impl Fn(&DeTable<'_>, &Range<usize>) -> Result<T, (usize, String)>,
) -> Result<Vec<T>, (Option<usize>, String)> {
    let other = || (None, format!("{name}: write [[{name}]] above its settings, once for each {name}"));
    let DeValue::Array(items) = value.get_ref() else { return Err(other()) };
    let read = |item: &Spanned<DeValue<'_>>| {
        let DeValue::Table(table) = item.get_ref() else { return Err(other()) };
        parse(table, &item.span()).map_err(|(offset, message)| (Some(offset), message))
    };
    items.iter().map(read).collect()
}

fn from_variables(
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> Result<(Config, Option<PathBuf>), ConfigError> {
    let mut config = Config::default();
    let mut file = None;
    for (name, value) in variables {
        let Some(name) = name.to_str().filter(|name| name.starts_with(VARIABLE_PREFIX)) else { continue };
        if name == VARIABLE_FILE {
            file = Some(PathBuf::from(value));
            continue;
        }
        let variable = |message| ConfigError::Variable { name: name.to_owned(), message };
        let setting = name[VARIABLE_PREFIX.len()..].to_ascii_lowercase();
        let text = value.to_str().ok_or_else(|| variable("the value is not UTF-8".to_owned()))?;
        let known = Config::NAMES.contains(&setting.as_str());
        let result = config.set(&setting, text);
        result
            .map_err(|expected| if known { refused(&setting, text, &expected) } else { expected })
            .map_err(variable)?;
    }
    Ok((config, file))
}

/// The text form of a TOML value.
pub(crate) fn plain_text(value: &DeValue<'_>) -> Result<String, String> {
    Ok(match value {
        DeValue::String(text) => text.to_string(),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Integer(number) if number.radix() == 10 => number.as_str().to_owned(),
        DeValue::Float(number) => number.as_str().to_owned(),
        DeValue::Array(items) => {
            let texts = items.iter().map(|item| match item.get_ref() {
                DeValue::String(text) if !text.contains(',') => Ok(text.to_string()),
                DeValue::String(text) => Err(format!("{text:?}: an item of a list must not contain a comma")),
                other => Err(format!("a list of texts is expected, not of {}", other.type_str())),
            });
            texts.collect::<Result<Vec<_>, _>>()?.join(",")
        }
        other => {
            return Err(format!("a text, number, truth value or list is expected, not {}", other.type_str()));
        }
    })
}

/// The message for a wrong value; a secret is not repeated.
fn refused(name: &str, text: &str, expected: &str) -> String {
    if ["api_keys", "cluster_key", KEY].contains(&name) {
        return format!("{name}: {expected}");
    }
    format!("{name} = {text:?}: {expected}")
}

/// The message for a name that is not one of `names`.
pub(crate) fn unknown(what: &str, name: &str, names: &[&str]) -> String {
    /// Names less alike than this are no help.
    const LIKENESS_MIN: f64 = 0.7;
    let likeness = |candidate: &&&str| strsim::jaro_winkler(name, candidate);
    let nearest = names.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest.filter(|candidate| likeness(candidate) >= LIKENESS_MIN) {
        Some(nearest) => format!("unknown {what} {name:?}; did you mean {nearest:?}?"),
        None => format!("unknown {what} {name:?}; cluster.example.toml lists all of them"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../../cluster.example.toml");

    fn toml(text: &str) -> Result<Config, String> {
        from_toml(text, Path::new("c.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn the_example_lists_every_setting_with_its_default() {
        let example = toml(EXAMPLE).expect("the example is valid").resolve().shown();
        assert_eq!(example, Config::default().resolve().shown());
        // Each stands once at the start of a line, in the order of the list.
        let written: Vec<&str> = EXAMPLE
            .lines()
            .filter(|l| !l.starts_with('#'))
            .filter_map(|l| l.split_once(" = "))
            .map(|p| p.0)
            .collect();
        assert_eq!(written, Config::NAMES);
    }

    #[test]
    fn what_is_shown_can_be_read_back() {
        let shown = Config::default().resolve().shown();
        let text: String = shown.iter().map(|(name, value)| format!("{name} = {value}\n")).collect();
        assert_eq!(toml(&text).expect("valid").resolve().shown(), shown);
    }

    #[test]
    fn errors_name_line_value_and_remedy() {
        let check = |text: &str, expected: &str| {
            assert_eq!(toml(text).expect_err(text), format!("c.toml:{expected}"));
        };
        check("\nmax_batsh = 8", "2: unknown setting \"max_batsh\"; did you mean \"max_batch\"?");
        check("zzz = 1", "1: unknown setting \"zzz\"; cluster.example.toml lists all of them");
        check(
            "# a\n\nmax_batch = 0",
            "3: max_batch = \"0\": a whole number from 1 to 4294967295 is expected",
        );
        check(
            "session_quota = 1.5",
            "1: session_quota = \"1.5\": a number from 0 to 1 is expected, such as 0.5",
        );
        check("mdns = \"maybe\"", "1: mdns = \"maybe\": true or false is expected");
        check("peers = [1]", "1: a list of texts is expected, not of integer");
        check(
            "cluster_key = \"a b\"",
            "1: cluster_key: a text without spaces or control characters is expected",
        );
        check("[node]\nx = 1", "1: unknown setting \"node\"; did you mean \"model\"?");
        assert!(toml("cluster = \"a\"\ncluster = \"b\"").expect_err("twice").starts_with("c.toml:2: "));
        assert!(toml("a = = 1").expect_err("no TOML").starts_with("c.toml:1: "));
    }

    #[test]
    fn variables_lie_over_flags_and_flags_over_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("c.toml");
        std::fs::write(&path, "cluster = \"file\"\nname = \"file\"\nmodel = \"file\"").expect("written");
        let flags = Config {
            cluster: Some("flag".to_owned()),
            name: Some(Auto::Fixed("flag".to_owned())),
            ..Config::default()
        };
        let variables =
            [("MLX_NODE_CLUSTER", "variable"), ("PATH", "/bin")].map(|(k, v)| (k.into(), v.into()));
        let values = load(Some(&path), flags, variables.into_iter()).expect("valid");
        assert_eq!(values.cluster, "variable");
        assert_eq!(values.name, Auto::Fixed("flag".to_owned()));
        assert_eq!(values.model, "file");
        assert_eq!(values.max_batch, 16);
    }

    #[test]
    fn wrong_variables_are_errors() {
        let check = |name: &str, value: &str, expected: &str| {
            let variables = [(name.into(), value.into())].into_iter();
            let error = from_variables(variables).expect_err("wrong").to_string();
            assert_eq!(error, format!("environment variable {name}: {expected}"));
        };
        check("MLX_NODE_MODLE", "x", "unknown setting \"modle\"; did you mean \"model\"?");
        check(
            "MLX_NODE_HTTP",
            "8080",
            "http = \"8080\": an IP address and a port are expected, such as 127.0.0.1:8080",
        );
        check(
            "MLX_NODE_API_KEYS",
            "a b",
            "api_keys: a text without spaces or control characters is expected",
        );
    }
}
