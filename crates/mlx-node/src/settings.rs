//! Checks that settings make sense together and turns them into what the parts of the program take.

use crate::{
    config::{self, Values},
    hardware,
    keys::{self, KeysError},
    pipelines::{self, Pipeline, PipelinesError},
    values::{Auto, Dequantize, Device, LogFormat, NamedFormat, Origin, Secret},
};
use api::{Access, Certificate, CertificateError, RateLimits, ToolFormat};
use node::{DispatchSettings, engine_process::RankTask};
use router::RouterSettings;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};
use transport::{ClusterKey, ClusterKeys};
use types::Role;

/// Bytes of a cluster's or node's name: one string of an mDNS TXT record holds 255 with its key.
const NAME_BYTES_MAX: usize = 128;
/// Bytes of a key file; a key has 78.
const KEY_FILE_BYTES_MAX: u64 = 4096;
/// Bytes of a file with a certificate and its chain, or with its key.
const PEM_BYTES_MAX: u64 = 1 << 20;
/// The name of the cluster key's file in the configuration's folder.
pub(crate) const KEY_FILE_NAME: &str = "cluster.key";
/// Sequences that a model may keep open: each costs a slot of KV, and steps grow with them.
const MAX_BATCH_MAX: u32 = 1024;

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    #[error("{name} = {value:?}: 1 to {NAME_BYTES_MAX} bytes are expected")]
    Name { name: &'static str, value: String },
    #[error("roles = []: at least one of \"node\" and \"router\" is expected")]
    NoRoles,
    #[error(
        "no model is set: give a folder, a .gguf file or a hub id with --model, MLX_NODE_MODEL or `model` in \
         cluster.toml (or leave \"node\" out of roles)"
    )]
    NoModel,
    #[error("max_batch = {value}: at most {MAX_BATCH_MAX} are possible")]
    MaxBatch { value: u32 },
    #[error("kv_bits = {value}: 4, 8 or auto is expected")]
    KvBits { value: u32 },
    #[error(
        "http = \"{http}\" can be reached from other machines: set api_keys, or allow_anonymous = true to serve everybody"
    )]
    Open { http: SocketAddr },
    #[error(transparent)]
    ApiKeys(#[from] KeysError),
    #[error("{set} is set and {missing} is not: TLS needs both files")]
    HalfTls { set: &'static str, missing: &'static str },
    #[error("{name}: {path}: {message}")]
    Tls { name: &'static str, path: String, message: String },
    #[error("{}: it holds {count} keys; one is expected, or two while a cluster goes over to another", path.display())]
    KeyCount { path: PathBuf, count: usize },
    #[error(
        "cluster_key: {count} keys; one is expected, or two while a cluster goes over to another, with a comma between them"
    )]
    KeyCountSetting { count: usize },
    #[error("peers: {peer:?} is not host:port")]
    Peer { peer: String },
    #[error("cluster_key: {0}")]
    Key(transport::ParseKeyError),
    #[error("{}: {message}", path.display())]
    KeyFile { path: PathBuf, message: String },
    #[error("{what} needs the cluster key: make one with `mlx-node key new` and copy it to every machine")]
    NoKey { what: &'static str },
    #[error("{0}")]
    RandomKey(transport::GenerateKeyError),
    #[error(transparent)]
    Pipelines(#[from] PipelinesError),
}

/// Where the cluster key came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KeyOrigin {
    /// `cluster_key`.
    Setting,
    /// A file.
    File(PathBuf),
    /// Drawn for this process alone, which therefore has no peers; the file is where one was looked for.
    Random(Option<PathBuf>),
}

/// Everything `mlx-node serve` needs, checked.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) cluster: String,
    pub(crate) name: String,
    pub(crate) roles: Vec<Role>,
    pub(crate) model: Option<ModelSettings>,
    /// The pipeline whose model that is.
    pub(crate) pipeline: Option<Pipeline>,
    pub(crate) max_batch: u32,
    pub(crate) listen: SocketAddr,
    pub(crate) http: SocketAddr,
    /// Who may do what over HTTP.
    pub(crate) access: Access,
    /// What HTTP is served with over TLS, and what that was read from.
    pub(crate) tls: Option<(Certificate, TlsFiles)>,
    pub(crate) cache_per_key: bool,
    pub(crate) cors_origins: Vec<String>,
    pub(crate) tool_formats: BTreeMap<String, ToolFormat>,
    pub(crate) keys: ClusterKeys,
    pub(crate) key_origin: KeyOrigin,
    pub(crate) mdns: bool,
    pub(crate) interfaces: Vec<String>,
    pub(crate) peers: Vec<String>,
    pub(crate) dispatch: DispatchSettings,
    pub(crate) drain_timeout: Duration,
}

/// The model, before it is known where its files are.
#[derive(Debug)]
pub(crate) struct ModelSettings {
    /// A path or a hub id.
    pub(crate) source: String,
    pub(crate) offline: bool,
    /// What the engine process is told, but for the path.
    pub(crate) engine: EngineProcessSettings,
}

/// What the engine process is told, as JSON on its command line; nothing in it is secret.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct EngineProcessSettings {
    pub(crate) model: PathBuf,
    pub(crate) name: String,
    pub(crate) slots: u32,
    pub(crate) context_tokens: Option<u32>,
    pub(crate) kv_bytes: Option<u64>,
    pub(crate) kv_bits: Option<i32>,
    pub(crate) verify: bool,
    pub(crate) dequantize: Dequantize,
    pub(crate) device: Device,
    pub(crate) ttft_target: Duration,
    pub(crate) tpot_target: Duration,
    pub(crate) prefix_cache: bool,
    pub(crate) speculation: bool,
    pub(crate) session_ttl: Duration,
    pub(crate) session_quota: f64,
    pub(crate) log: String,
    pub(crate) log_format: LogFormat,
    /// What it is to do, if not to serve the whole model.
    #[serde(default)]
    pub(crate) task: Option<RankTask>,
}

impl Settings {
    /// Checks `values` and reads the cluster key.
    ///
    /// # Errors
    /// The first setting that cannot be used.
    pub(crate) fn resolve(values: Values) -> Result<Self, SettingsError> {
        let name = values.name.clone().fixed().unwrap_or_else(hardware::host_name);
        for (setting, value) in [("cluster", &values.cluster), ("name", &name)] {
            if value.is_empty() || value.len() > NAME_BYTES_MAX {
                return Err(SettingsError::Name { name: setting, value: value.clone() });
            }
        }
        let mut roles = values.roles.0.clone();
        roles.sort_unstable();
        roles.dedup();
        if roles.is_empty() {
            return Err(SettingsError::NoRoles);
        }
        let (model, pipeline) = match roles.contains(&Role::Node) {
            true => {
                let pipeline = pipelines::of_node(&values.pipelines, &name, &values.model)?.cloned();
                let model = pipeline.as_ref().map_or(&values.model, |pipeline| &pipeline.model).clone();
                (Some(model_settings(&Values { model, ..values.clone() })?), pipeline)
            }
            false => (None, None),
        };
        let rates = RateLimits {
            requests_per_minute: values.key_requests_per_minute.0,
            tokens_per_minute: values.key_tokens_per_minute.0,
            concurrent: values.key_concurrency.0,
        };
        let api_keys = keys::resolve(&values.api_keys.0, &values.keys, rates)?;
        let open = !values.http.ip().is_loopback() && api_keys.is_empty() && !values.allow_anonymous;
        let access = Access {
            keys: api_keys,
            rates,
            // Whoever reaches the loopback has an account on this machine, and could end the process as well.
            open_admin: values.http.ip().is_loopback(),
            open_metrics: values.open_metrics,
        };
        let tls = tls(&values.tls_cert, &values.tls_key)?;
        if roles.contains(&Role::Router) && open {
            return Err(SettingsError::Open { http: values.http });
        }
        for peer in &values.peers.0 {
            let valid = peer.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
            });
            if !valid {
                return Err(SettingsError::Peer { peer: peer.clone() });
            }
        }
        let (keys, key_origin) = cluster_keys(&values.cluster_key, values.key_file)?;
        let alone = matches!(key_origin, KeyOrigin::Random(_));
        if alone && !values.peers.0.is_empty() {
            return Err(SettingsError::NoKey { what: "peers" });
        }
        if alone && pipeline.is_some() {
            return Err(SettingsError::NoKey { what: "a pipeline" });
        }
        if alone && roles.len() < 2 {
            return Err(SettingsError::NoKey { what: "a process with one role" });
        }
        Ok(Self {
            cluster: values.cluster,
            name,
            roles,
            model,
            pipeline,
            max_batch: values.max_batch,
            // Nobody can come in without the key: no port that others could reach, or that could be taken.
            listen: if alone { (Ipv4Addr::LOCALHOST, 0).into() } else { values.listen },
            http: values.http,
            access,
            tls,
            cache_per_key: values.cache_per_key,
            cors_origins: values.cors_origins.0.into_iter().map(|Origin(origin)| origin).collect(),
            tool_formats: values
                .tool_formats
                .0
                .into_iter()
                .map(|NamedFormat { model, format }| (model, format))
                .collect(),
            keys,
            key_origin,
            mdns: values.mdns && !alone,
            interfaces: values.interfaces.0,
            peers: values.peers.0,
            dispatch: DispatchSettings {
                router: RouterSettings { policy: values.route_policy, ..RouterSettings::default() },
                wait_max: values.queue_time.0,
            },
            drain_timeout: values.drain_timeout.0,
        })
    }
}

/// What is set of the model.
///
/// # Errors
/// No model, or a batch that is too large.
pub(crate) fn model_settings(values: &Values) -> Result<ModelSettings, SettingsError> {
    if values.model.is_empty() {
        return Err(SettingsError::NoModel);
    }
    if values.max_batch > MAX_BATCH_MAX {
        return Err(SettingsError::MaxBatch { value: values.max_batch });
    }
    let kv_bits = match values.kv_bits {
        Auto::Auto => None,
        Auto::Fixed(4) => Some(4),
        Auto::Fixed(8) => Some(8),
        Auto::Fixed(value) => return Err(SettingsError::KvBits { value }),
    };
    let engine = EngineProcessSettings {
        model: PathBuf::new(),
        name: values.model_name.clone().fixed().unwrap_or_else(|| served_name(&values.model)),
        slots: values.max_batch,
        context_tokens: values.max_context.clone().fixed(),
        kv_bytes: values.kv_memory.clone().fixed().map(|bytes| bytes.0),
        kv_bits,
        verify: values.verify,
        dequantize: values.dequantize,
        device: values.device,
        ttft_target: values.ttft_target.0,
        tpot_target: values.tpot_target.0,
        prefix_cache: values.prefix_cache,
        speculation: values.speculation,
        session_ttl: values.session_ttl.0,
        session_quota: values.session_quota.0,
        log: values.log.0.clone(),
        log_format: values.log_format,
        task: None,
    };
    Ok(ModelSettings { source: values.model.clone(), offline: values.offline, engine })
}

/// The name clients use for a model that is given as `source`: a hub id as it is, of a path the last part.
pub(crate) fn served_name(source: &str) -> String {
    let path = Path::new(source);
    let gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    let looks_like_path = gguf || path.is_absolute() || source.starts_with('.') || path.exists();
    let last = if gguf { path.file_stem() } else { path.file_name() };
    match last {
        Some(last) if looks_like_path => last.to_string_lossy().into_owned(),
        _ => source.to_owned(),
    }
}

/// A certificate and its key as they were read, to tell whether they have changed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct TlsFiles {
    chain: Vec<u8>,
    key: Vec<u8>,
}

impl fmt::Debug for TlsFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsFiles")
    }
}

/// Reads the certificate that HTTP is served with, if any.
fn tls(cert: &str, key: &str) -> Result<Option<(Certificate, TlsFiles)>, SettingsError> {
    match (cert.is_empty(), key.is_empty()) {
        (true, true) => return Ok(None),
        (false, true) => return Err(SettingsError::HalfTls { set: "tls_cert", missing: "tls_key" }),
        (true, false) => return Err(SettingsError::HalfTls { set: "tls_key", missing: "tls_cert" }),
        (false, false) => {}
    }
    let failed = |name, path: &str, message| SettingsError::Tls { name, path: path.to_owned(), message };
    let read = |name, path: &str| {
        let bytes = std::fs::metadata(path).map_err(|error| failed(name, path, error.to_string()))?.len();
        if bytes > PEM_BYTES_MAX {
            return Err(failed(name, path, format!("{bytes} bytes are too many for PEM")));
        }
        std::fs::read(path).map_err(|error| failed(name, path, error.to_string()))
    };
    let files = TlsFiles { chain: read("tls_cert", cert)?, key: read("tls_key", key)? };
    let certificate = Certificate::from_pem(&files.chain, &files.key).map_err(|error| match error {
        CertificateError::Key(_) | CertificateError::Pair(_) => failed("tls_key", key, error.to_string()),
        error => failed("tls_cert", cert, error.to_string()),
    })?;
    Ok(Some((certificate, files)))
}

fn cluster_keys(setting: &Secret, file: Auto<PathBuf>) -> Result<(ClusterKeys, KeyOrigin), SettingsError> {
    if !setting.0.is_empty() {
        let keys = setting.0.split(',').map(str::parse).collect::<Result<Vec<_>, _>>();
        let keys = one_or_two(keys.map_err(SettingsError::Key)?);
        return Ok((keys.map_err(|count| SettingsError::KeyCountSetting { count })?, KeyOrigin::Setting));
    }
    let usual = config::folder().map(|folder| folder.join(KEY_FILE_NAME));
    let path = match file {
        Auto::Fixed(path) => Some(path),
        Auto::Auto => usual.clone().filter(|path| path.exists()),
    };
    let Some(path) = path else {
        let key = ClusterKey::generate().map_err(SettingsError::RandomKey)?;
        return Ok((key.into(), KeyOrigin::Random(usual)));
    };
    Ok((read_keys(&path)?, KeyOrigin::File(path)))
}

/// The first is the own one; or how many there are.
fn one_or_two(keys: Vec<ClusterKey>) -> Result<ClusterKeys, usize> {
    let count = keys.len();
    let mut keys = keys.into_iter();
    match (keys.next(), keys.next(), keys.next()) {
        (Some(own), other, None) => Ok(ClusterKeys { own, other }),
        _ => Err(count),
    }
}

/// Reads the keys in `path`: a line each, the own one first.
///
/// # Errors
/// A file that cannot be read or holds no key, or more than two.
pub(crate) fn read_keys(path: &Path) -> Result<ClusterKeys, SettingsError> {
    let failed = |message: String| SettingsError::KeyFile { path: path.to_path_buf(), message };
    let bytes = std::fs::metadata(path).map_err(|error| failed(error.to_string()))?.len();
    if bytes > KEY_FILE_BYTES_MAX {
        return Err(failed(format!("{bytes} bytes are too many for a cluster key")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let keys = lines.map(str::parse).collect::<Result<Vec<ClusterKey>, transport::ParseKeyError>>();
    let keys = keys.map_err(|error| failed(error.to_string()))?;
    if keys.is_empty() {
        return Err(failed(
            "it is empty: a cluster key is expected (`mlx-node key new` makes one)".to_owned(),
        ));
    }
    one_or_two(keys).map_err(|count| SettingsError::KeyCount { path: path.to_path_buf(), count })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::from_toml;

    /// Settings from a file's text, in a place where no key lies around.
    fn resolve(text: &str) -> Result<Settings, String> {
        let text =
            if text.contains("key_file") { text.to_owned() } else { format!("{}\n{text}", key_line()) };
        let values = from_toml(&text, Path::new("c.toml")).expect("valid").resolve();
        Settings::resolve(values).map_err(|error| error.to_string())
    }

    fn key_line() -> String {
        format!("cluster_key = \"{}\"", ClusterKey::generate().expect("random").reveal())
    }

    #[test]
    fn contradictions_are_named() {
        let check = |text: &str, expected: &str| {
            let error = resolve(text).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        };
        check("", "no model is set");
        check("model = \"m\"\n[[pipeline]]\nmodel = \"p\"", "leave `model` out");
        check(
            "name = \"n\"\n[[pipeline]]\nmodel = \"p\"\nmembers = [\"a\", \"b\"]",
            "node \"n\" is a member of no pipeline",
        );
        check("cluster = \"\"", "cluster = \"\": 1 to 128 bytes");
        check("roles = []", "roles = []");
        check("model = \"m\"\nmax_batch = 2000", "max_batch = 2000: at most 1024");
        check("model = \"m\"\nhttp = \"0.0.0.0:80\"", "set api_keys, or allow_anonymous = true");
        check("model = \"m\"\nhttp = \"[::]:80\"", "set api_keys, or allow_anonymous = true");
        check("model = \"m\"\npeers = [\"mac-2\"]", "\"mac-2\" is not host:port");
        check("model = \"m\"\npeers = [\"mac-2:0\"]", "\"mac-2:0\" is not host:port");
        check("model = \"m\"\nkey_file = \"/nonexistent/key\"", "/nonexistent/key: No such file");
        check("model = \"m\"\ntls_cert = \"c.pem\"", "tls_cert is set and tls_key is not");
        check("model = \"m\"\ntls_key = \"k.pem\"", "tls_key is set and tls_cert is not");
        check(
            "model = \"m\"\ntls_cert = \"/none/c\"\ntls_key = \"/none/k\"",
            "tls_cert: /none/c: No such file",
        );
    }

    #[test]
    fn the_model_of_a_pipeline_is_that_of_its_members() {
        let settings = resolve("[[pipeline]]\nmodel = \"org/p\"").expect("no other model is needed");
        assert_eq!(settings.pipeline.map(|pipeline| pipeline.model).as_deref(), Some("org/p"));
        let model = settings.model.expect("a node");
        assert_eq!((model.source.as_str(), model.engine.name.as_str()), ("org/p", "org/p"));
        let router = resolve("roles = [\"router\"]\n[[pipeline]]\nmodel = \"p\"").expect("no member");
        assert!(router.model.is_none() && router.pipeline.is_none());
    }

    #[test]
    fn another_address_needs_keys_or_consent() {
        for text in ["api_keys = [\"k\"]", "allow_anonymous = true", "roles = [\"node\"]"] {
            let settings = resolve(&format!("model = \"m\"\nhttp = \"0.0.0.0:80\"\n{text}")).expect(text);
            assert_eq!(settings.http.port(), 80);
        }
        assert_eq!(resolve("roles = [\"router\"]").expect("a router needs no model").roles, [Role::Router]);
    }

    #[test]
    fn a_broken_key_is_an_error_that_does_not_show_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        std::fs::write(&path, "mlxk1-5ec2e75ec2e7").expect("written");
        let error = resolve(&format!("model = \"m\"\nkey_file = {path:?}")).expect_err("broken");
        assert!(error.contains("digits") && !error.contains("5ec2e7"), "{error}");
    }

    #[test]
    fn a_key_file_holds_one_key_or_two() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        let keys = [(); 3].map(|()| ClusterKey::generate().expect("random"));
        let read = |text: String| {
            std::fs::write(&path, text).expect("written");
            read_keys(&path).map_err(|error| error.to_string())
        };
        let text =
            |keys: &[ClusterKey]| keys.iter().map(|key| format!("{}\n\n", key.reveal())).collect::<String>();
        assert_eq!(read(text(&keys[..1])).expect("one"), (&keys[0]).into());
        let two = read(text(&keys[..2])).expect("two");
        assert_eq!((two.own, two.other), (keys[0].clone(), Some(keys[1].clone())));
        assert!(read(text(&keys)).expect_err("three").contains("it holds 3 keys"));
        assert!(read(String::new()).expect_err("none").contains("it is empty"));
        let setting = Secret(format!("{},{}", keys[1].reveal(), keys[0].reveal()));
        let (two, _) = cluster_keys(&setting, Auto::Auto).expect("two");
        assert_eq!((two.own, two.other), (keys[1].clone(), Some(keys[0].clone())));
    }

    #[test]
    fn names_of_models() {
        let check = |source: &str, expected: &str| assert_eq!(served_name(source), expected);
        check("mlx-community/Llama-3.2-1B-Instruct-4bit", "mlx-community/Llama-3.2-1B-Instruct-4bit");
        check("/models/SmolLM2-135M.Q4_1.gguf", "SmolLM2-135M.Q4_1");
        check("./models/Llama-3.2/", "Llama-3.2");
        check("models/x.GGUF", "x");
    }
}
