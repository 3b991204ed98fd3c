//! Downloads the files of one commit into the cache.
//!
//! `hf-hub`'s calls block for as long as the network lets them, so each runs on a thread of its own that reports every
//! piece it receives; the caller waits for reports, and not longer than [`HubSettings::stall_max`] for one.

use super::{HubError, HubId, HubSettings};
use hf_hub::{
    Cache, Repo, RepoType,
    api::{
        Progress,
        sync::{Api, ApiBuilder, ApiError},
    },
};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::mpsc::{RecvTimeoutError, sync_channel},
    thread,
};

/// With waits that double from a second, half a minute: a restarted router is back by then.
const FRUITLESS_TRIES_MAX: u32 = 5;
/// Reports of a download that may wait to be looked at.
const REPORTS_MAX: usize = 64;

/// The files of one commit of a model.
pub(super) struct Downloader<'a> {
    id: &'a HubId,
    settings: &'a HubSettings,
    api: Api,
    /// The model at its commit.
    repo: Repo,
    commit: String,
    /// Tries of one thing that bring nothing new; tries that do are not counted.
    fruitless_max: u32,
    /// Names of all files at the top of the commit.
    pub(super) files: Vec<String>,
}

impl<'a> Downloader<'a> {
    /// Asks the hub for the commit that the revision stands for, and for its files: once where an answer can be done
    /// without.
    pub(super) fn new(id: &'a HubId, settings: &'a HubSettings, once: bool) -> Result<Self, HubError> {
        let failed = |reason: String| HubError::Failed {
            endpoint: settings.endpoint.clone(),
            what: id.to_string(),
            reason,
        };
        let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
            .with_endpoint(settings.endpoint.clone())
            .with_token(settings.token.clone())
            .with_progress(false)
            .with_retries(0)
            .build();
        let api = api.map_err(|error| failed(error.to_string()))?;
        let mut this = Self {
            id,
            settings,
            api,
            repo: id.repo(),
            commit: String::new(),
            fruitless_max: if once { 1 } else { FRUITLESS_TRIES_MAX },
            files: Vec::new(),
        };
        let info = this.tried(&id.to_string(), &mut |_| {}, |api, repo, _| Ok(api.repo(repo).info()?))?;
        if info.sha.is_empty() || !info.sha.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(failed(format!("it names the commit {:?}", info.sha)));
        }
        this.repo = Repo::with_revision(id.name.clone(), RepoType::Model, info.sha.clone());
        this.commit = info.sha;
        this.fruitless_max = FRUITLESS_TRIES_MAX;
        this.files = info.siblings.into_iter().map(|file| file.rfilename).collect();
        Ok(this)
    }

    /// The path of a file in the cache, downloaded if it is not there. `name` is a plain file name.
    pub(super) fn file(&self, name: &str, progress: &mut dyn FnMut(&str, f32)) -> Result<PathBuf, HubError> {
        let path = self.folder().join(name);
        if path.exists() {
            return Ok(path);
        }
        let (what, message) = (format!("{}/{name}", self.id), format!("downloading {name}"));
        let style =
            ProgressStyle::with_template("{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}");
        // Hidden by itself where standard error is no terminal.
        let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(name.to_owned());
        let mut show = |(done, total): (u64, u64)| {
            bar.set_length(total);
            bar.set_position(done);
            progress(&message, if total == 0 { 0.0 } else { done.min(total) as f32 / total as f32 });
        };
        let (name, cache, link) = (name.to_owned(), self.settings.cache.clone(), path.clone());
        let result = self.tried(&what, &mut show, move |api, repo, report| {
            download(&api, repo, &cache, &name, &link, report)
        });
        bar.finish_and_clear();
        result.map(|()| path)
    }

    /// Records that the revision stands for this commit, now that all of it is there.
    pub(super) fn finish(&self) -> Result<PathBuf, HubError> {
        let recorded = self.cache(self.id.repo()).create_ref(&self.commit);
        recorded.map_err(|source| HubError::Io { path: self.settings.cache.clone(), source })?;
        Ok(self.folder())
    }

    fn folder(&self) -> PathBuf {
        self.cache(self.repo.clone()).pointer_path(&self.commit)
    }

    fn cache(&self, repo: Repo) -> hf_hub::CacheRepo {
        Cache::new(self.settings.cache.clone()).repo(repo)
    }

    /// Does `work` on a thread until it succeeds or trying again is no use.
    fn tried<T: Send + 'static>(
        &self,
        what: &str,
        show: &mut dyn FnMut((u64, u64)),
        work: impl Fn(Api, Repo, Report) -> Result<T, Failure> + Clone + Send + 'static,
    ) -> Result<T, HubError> {
        let (endpoint, what) = (self.settings.endpoint.clone(), what.to_owned());
        let (mut fruitless, mut furthest) = (0, 0);
        loop {
            let mut done = 0;
            let outcome = self.watched(work.clone(), &mut |(now, total)| {
                done = now;
                show((now, total));
            });
            let reason = match outcome {
                Ok(value) => return Ok(value),
                Err(Failure::Missing) => return Err(HubError::NotFound { endpoint, what }),
                Err(Failure::Refused(status)) => return Err(HubError::Refused { endpoint, what, status }),
                Err(Failure::Cache(path, source)) => return Err(HubError::Io { path, source }),
                Err(Failure::Final(reason)) => return Err(HubError::Failed { endpoint, what, reason }),
                Err(Failure::Other(size, reason)) => {
                    // Another process downloads it: as good as if we did, while it gets on.
                    done = done.max(size);
                    reason
                }
                Err(Failure::Transient(reason)) => reason,
            };
            fruitless = if done > furthest { 0 } else { fruitless + 1 };
            furthest = furthest.max(done);
            if fruitless >= self.fruitless_max {
                return Err(HubError::Failed { endpoint, what, reason });
            }
            tracing::warn!(%reason, "downloading {what}: trying again");
            thread::sleep(self.settings.retry_wait * 2_u32.pow(fruitless));
        }
    }

    fn watched<T: Send + 'static>(
        &self,
        work: impl FnOnce(Api, Repo, Report) -> Result<T, Failure> + Send + 'static,
        show: &mut dyn FnMut((u64, u64)),
    ) -> Result<T, Failure> {
        let (sender, reports) = sync_channel(REPORTS_MAX);
        let progress = sender.clone();
        // Nobody listens any more after a stall.
        let send = Box::new(move |done, total| drop(progress.send(Event::At(done, total))));
        let report = Report { send, done: 0, total: 0 };
        let (api, repo) = (self.api.clone(), self.repo.clone());
        // Not joined: after a stall it may hang for as long as the network likes; it owns nothing that is waited for.
        thread::spawn(move || sender.send(Event::End(work(api, repo, report))));
        loop {
            match reports.recv_timeout(self.settings.stall_max) {
                Ok(Event::At(done, total)) => show((done, total)),
                Ok(Event::End(result)) => return result,
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = self.settings.stall_max.as_secs_f32();
                    return Err(Failure::Final(format!("nothing came for {seconds} s")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::Final("the download broke off".to_owned()));
                }
            }
        }
    }
}

/// What a downloading thread says.
enum Event<T> {
    /// Bytes that are there, and bytes in all.
    At(u64, u64),
    End(Result<T, Failure>),
}

/// Why one try failed.
#[derive(Debug)]
enum Failure {
    /// 404.
    Missing,
    /// 401 or 403.
    Refused(u16),
    /// The next try may do better.
    Transient(String),
    /// Another process holds the file's lock and has got that far.
    Other(u64, String),
    /// The disk's fault.
    Cache(PathBuf, io::Error),
    /// No use trying again.
    Final(String),
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        match error {
            ApiError::RequestError(error) => match *error {
                ureq::Error::StatusCode(404) => Self::Missing,
                ureq::Error::StatusCode(status @ (401 | 403)) => Self::Refused(status),
                ureq::Error::StatusCode(status) if status != 429 && status < 500 => {
                    Self::Final(format!("HTTP status {status}"))
                }
                // What rustls makes of a certificate that it does not trust.
                ureq::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
                    Self::Final(error.to_string())
                }
                error => Self::Transient(error.to_string()),
            },
            ApiError::IoError(error) => match error.kind() {
                io::ErrorKind::StorageFull
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::ReadOnlyFilesystem
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::NotFound => Self::Final(format!("the cache cannot be written: {error}")),
                _ => Self::Transient(error.to_string()),
            },
            ApiError::LockAcquisition(lock) => {
                let size = fs::metadata(lock.with_extension("part")).map_or(0, |part| part.len());
                Self::Other(size, format!("another process holds {}", lock.display()))
            }
            error => Self::Final(error.to_string()),
        }
    }
}

/// Sends each step of a download to whoever waits for it.
struct Report {
    send: Box<dyn Fn(u64, u64) + Send>,
    done: u64,
    total: u64,
}

fn download(
    api: &Api,
    repo: Repo,
    cache: &Path,
    name: &str,
    link: &Path,
    report: Report,
) -> Result<(), Failure> {
    let files = Cache::new(cache.to_owned()).repo(repo.clone());
    let repo = api.repo(repo);
    let facts = api.metadata(&repo.url(name))?;
    let (etag, size) = (facts.etag(), facts.size() as u64);
    if etag.is_empty() || !etag.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return Err(Failure::Final(format!("the hub gave the file the tag {etag:?}")));
    }
    let blob = files.blob_path(etag);
    let bytes = |path: &Path| fs::metadata(path).map_or(0, |facts| facts.len());
    if bytes(&blob) == size && blob.exists() {
        // The same contents under another commit: only the name is new.
        let target = Path::new("../../blobs").join(etag);
        let parent = link.parent().unwrap_or(cache);
        let linked = fs::create_dir_all(parent).and_then(|()| std::os::unix::fs::symlink(target, link));
        return match linked {
            Err(error) if !link.exists() => Err(Failure::Cache(link.to_owned(), error)),
            _ => Ok(()),
        };
    }
    let part = blob.with_extension("part");
    // A part as long as the whole or longer is of no use: the rest of it cannot be asked for.
    if bytes(&part) >= size {
        let _ = fs::remove_file(&part);
    }
    let path = repo.download_with_progress(name, report)?;
    let found = bytes(&path);
    if found != size {
        for path in [&path, &blob] {
            fs::remove_file(path).map_err(|error| Failure::Cache(path.clone(), error))?;
        }
        return Err(Failure::Transient(format!("it should have {size} bytes and has {found}")));
    }
    Ok(())
}

impl Progress for Report {
    fn init(&mut self, size: usize, _name: &str) {
        (self.done, self.total) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.send)(self.done, self.total);
    }

    fn finish(&mut self) {}
}
