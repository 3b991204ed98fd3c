//! Where the hub and its cache are, from the same variables that Hugging Face's own tools read.

use std::{env, fmt, fs, path::PathBuf, time::Duration};

/// The hub, unless `HF_ENDPOINT` names another.
const ENDPOINT: &str = "https://huggingface.co";
/// Without a byte for this long a connection counts as dead: TCP alone may not notice for hours.
const STALL_MAX: Duration = Duration::from_secs(60);
/// The first wait before trying again; each next one is twice as long.
const RETRY_WAIT: Duration = Duration::from_secs(1);

/// How to reach a hub and where to keep what it gives.
#[derive(Clone)]
pub struct HubSettings {
    /// Its address, without a slash at the end.
    pub endpoint: String,
    /// The folder that holds `models--organisation--name` folders.
    pub cache: PathBuf,
    /// Sent to the hub only; never shown.
    pub token: Option<String>,
    /// Use what the cache holds, and nothing else.
    pub offline: bool,
    /// How long a download may stand still.
    pub stall_max: Duration,
    /// The first wait before trying again.
    pub retry_wait: Duration,
}

impl HubSettings {
    /// Reads `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` (or the token file that logging in leaves) and
    /// `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        Self::from_variables(|name| env::var(name).ok().filter(|value| !value.is_empty()))
    }

    pub(super) fn from_variables(get: impl Fn(&str) -> Option<String>) -> Self {
        let path = |name: &str| get(name).map(PathBuf::from);
        let home = path("HF_HOME").unwrap_or_else(|| {
            let user = || env::home_dir().unwrap_or_else(|| PathBuf::from(".")).join(".cache");
            path("XDG_CACHE_HOME").unwrap_or_else(user).join("huggingface")
        });
        let token = get("HF_TOKEN").or_else(|| fs::read_to_string(home.join("token")).ok());
        let truthy = |value: String| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str());
        Self {
            endpoint: get("HF_ENDPOINT")
                .unwrap_or_else(|| ENDPOINT.to_owned())
                .trim_end_matches('/')
                .to_owned(),
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            offline: get("HF_HUB_OFFLINE").is_some_and(truthy),
            stall_max: STALL_MAX,
            retry_wait: RETRY_WAIT,
        }
    }
}

impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}
