//! A model named on the command line becomes a path: a local one as it is, a hub id by downloading it.
//!
//! Downloads go through `hf-hub` into the cache that all of Hugging Face's tools share, a commit at a time: the branch is
//! asked for its commit first, all files are taken from that commit, and the branch is recorded in the cache only
//! when they are complete. This module adds what `hf-hub` leaves open: waits that end, retries that resume,
//! sizes that are checked, blobs that are not fetched twice.

mod download;
mod settings;
#[cfg(test)]
mod tests;

pub use settings::HubSettings;

use crate::checkpoint::{INDEX, SINGLE, shards_of_index};
use download::Downloader;
use hf_hub::{Cache, Repo, RepoType};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Small files of a model, each taken where the hub has it.
const FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
];
/// The branch of an id that names none.
const MAIN: &str = "main";
/// Bytes of an organisation's or a model's name: the hub's own bound.
const NAME_BYTES_MAX: usize = 96;

/// Why a name did not become a path.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// It looks like a path, but nothing is there.
    #[error("{}: there is no such file or folder", path.display())]
    NoSuchPath {
        /// As given.
        path: PathBuf,
    },
    /// Neither a path nor an id.
    #[error("{model:?} is neither an existing path nor a hub id of the form organisation/model[@revision]")]
    NotAModel {
        /// As given.
        model: String,
    },
    /// Nothing may be downloaded, and the cache is not enough.
    #[error("offline, and the cache {} does not hold {model} whole: {missing}", cache.display())]
    Offline {
        /// The id.
        model: String,
        /// The cache that was searched.
        cache: PathBuf,
        /// What is missing.
        missing: String,
    },
    /// The hub does not have it.
    #[error("{endpoint} has no {what}")]
    NotFound {
        /// The hub.
        endpoint: String,
        /// A model at a revision, or a file of it.
        what: String,
    },
    /// The hub does not give it to us.
    #[error(
        "{endpoint} refuses {what} (HTTP {status}): it does not exist, or it is private or gated; \
         set HF_TOKEN to a token of an account that may read it"
    )]
    Refused {
        /// The hub.
        endpoint: String,
        /// A model at a revision, or a file of it.
        what: String,
        /// 401 or 403.
        status: u16,
    },
    /// The hub has the model, but not in a form that can be loaded.
    #[error("{model} cannot be loaded: {reason}")]
    Unusable {
        /// The id.
        model: String,
        /// What it lacks.
        reason: String,
    },
    /// The hub or the way to it failed, and trying again did not help.
    #[error("cannot download {what} from {endpoint}: {reason}")]
    Failed {
        /// The hub.
        endpoint: String,
        /// A model at a revision, or a file of it.
        what: String,
        /// What was seen last.
        reason: String,
    },
    /// The cache cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The path of a model: `model` itself where it is one, otherwise the folder in the cache that a hub id is downloaded to.
///
/// `offline` forbids the network, as `HF_HUB_OFFLINE` does. The other settings are [`HubSettings::from_env`]'s.
/// `progress` hears which file is being downloaded and how far it is, 0 to 1; on a terminal a bar is shown too.
///
/// # Errors
/// [`HubError`] naming what is not there.
pub fn resolve(model: &str, offline: bool, progress: &mut dyn FnMut(&str, f32)) -> Result<PathBuf, HubError> {
    let mut settings = HubSettings::from_env();
    settings.offline |= offline;
    resolve_with(model, &settings, progress)
}

/// [`resolve`] with settings of the caller's.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_with(
    model: &str,
    settings: &HubSettings,
    progress: &mut dyn FnMut(&str, f32),
) -> Result<PathBuf, HubError> {
    let path = match (model.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(model),
    };
    if path.exists() {
        return Ok(path);
    }
    if model.starts_with(['.', '/', '~']) || model.ends_with(".gguf") {
        return Err(HubError::NoSuchPath { path });
    }
    let id = HubId::parse(model).ok_or_else(|| HubError::NotAModel { model: model.to_owned() })?;
    let cached = cached(&id, settings);
    if settings.offline {
        let (model, cache) = (id.to_string(), settings.cache.clone());
        return cached.map_err(|missing| HubError::Offline { model, cache, missing });
    }
    match (fetch(&id, settings, cached.is_ok(), progress), cached) {
        (Err(error @ HubError::Failed { .. }), Ok(folder)) => {
            tracing::warn!(%error, folder = %folder.display(), "using the cached version of {id}");
            Ok(folder)
        }
        (found, _) => found,
    }
}

/// `organisation/model[@revision]`, safe to put into paths and addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
struct HubId {
    name: String,
    revision: String,
}

impl HubId {
    fn parse(text: &str) -> Option<Self> {
        let plain = |part: &str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            (1..=NAME_BYTES_MAX).contains(&part.len())
                && part.bytes().all(allowed)
                && !part.starts_with('.')
                && !part.contains("..")
        };
        let (name, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let (organisation, model) = name.split_once('/')?;
        let sound = plain(organisation) && plain(model) && revision.split('/').all(plain);
        sound.then(|| Self { name: name.to_owned(), revision: revision.to_owned() })
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.name.clone(), RepoType::Model, self.revision.clone())
    }
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)?;
        if self.revision == MAIN { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

/// The folder of a whole model in the cache, or what is missing.
fn cached(id: &HubId, settings: &HubSettings) -> Result<PathBuf, String> {
    let cache = Cache::new(settings.cache.clone()).repo(id.repo());
    let recorded = cache.get(FILES[0]).and_then(|file| file.parent().map(Path::to_owned));
    // A revision may be a commit, which needs no record.
    let folder = recorded.unwrap_or_else(|| cache.pointer_path(&id.revision));
    let missing =
        |name: &str| if folder.join(name).exists() { Ok(()) } else { Err(format!("{name} is missing")) };
    missing(FILES[0])?;
    missing("tokenizer.json")?;
    match fs::read_to_string(folder.join(INDEX)) {
        Ok(text) => shards_of_index(&text)?.values().try_for_each(|shard| missing(shard))?,
        Err(_) => missing(SINGLE)?,
    }
    Ok(folder)
}

fn fetch(
    id: &HubId,
    settings: &HubSettings,
    is_cached: bool,
    progress: &mut dyn FnMut(&str, f32),
) -> Result<PathBuf, HubError> {
    progress(&format!("looking for {id}"), 0.0);
    let hub = Downloader::new(id, settings, is_cached)?;
    let unusable = |reason: String| HubError::Unusable { model: id.to_string(), reason };
    let has = |name: &str| hub.files.iter().any(|file| file == name);
    for name in ["config.json", "tokenizer.json"] {
        if !has(name) {
            return Err(unusable(format!("it has no {name}")));
        }
    }
    let weights = [INDEX, SINGLE].into_iter().find(|name| has(name));
    let Some(weights) = weights else {
        let ours = |file: &&String| file.ends_with(".gguf");
        let reason = match hub.files.iter().find(ours) {
            Some(file) => format!("it has no {SINGLE}, but {file:?}: download that file and give its path"),
            None => format!("it has neither {SINGLE} nor {INDEX}"),
        };
        return Err(unusable(reason));
    };
    for name in FILES.into_iter().filter(|name| has(name)) {
        hub.file(name, progress)?;
    }
    let path = hub.file(weights, progress)?;
    if weights == INDEX {
        let text = fs::read_to_string(&path).map_err(|source| HubError::Io { path, source })?;
        let shards = shards_of_index(&text).map_err(|reason| unusable(format!("{INDEX}: {reason}")))?;
        let shards: std::collections::BTreeSet<_> = shards.into_values().collect();
        for shard in shards {
            hub.file(&shard, progress)?;
        }
    }
    hub.finish()
}
