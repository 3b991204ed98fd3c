//! Downloads from a hub on the loopback device that can misbehave.

use super::*;
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const ID: &str = "some-org/Some.Model-1";

/// What the hub holds and how it treats requests.
#[derive(Debug, Default)]
struct Shelf {
    commit: String,
    files: BTreeMap<String, Vec<u8>>,
    /// Answers every request with this status.
    status: Option<u16>,
    /// Sends so many bytes of a body over 1000 bytes long and closes, this many times.
    breaks: (usize, u32),
    /// Sends the whole file, whatever part was asked for, this many times.
    ignores_range: u32,
    /// Says nothing any more in the middle of a body over 1000 bytes long.
    stalls: bool,
    /// (path, first byte asked for, authorization) of each request.
    seen: Vec<(String, Option<usize>, Option<String>)>,
}

#[derive(Debug)]
struct TestHub {
    shelf: Arc<Mutex<Shelf>>,
    settings: HubSettings,
    folder: tempfile::TempDir,
}

impl TestHub {
    fn start() -> Self {
        let shelf = Shelf { commit: COMMIT.to_owned(), files: model(5000), ..Shelf::default() };
        let shelf = Arc::new(Mutex::new(shelf));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let served = shelf.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let served = served.clone();
                thread::spawn(move || serve(stream, &served));
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let settings = HubSettings {
            endpoint,
            cache: folder.path().join("hub"),
            token: None,
            offline: false,
            stall_max: Duration::from_secs(20),
            retry_wait: Duration::from_millis(1),
        };
        Self { shelf, settings, folder }
    }

    fn with(self, change: impl FnOnce(&mut Shelf)) -> Self {
        change(&mut self.shelf.lock().unwrap());
        self
    }

    fn resolve(&self, model: &str) -> Result<PathBuf, HubError> {
        resolve_with(model, &self.settings, &mut |what, fraction| {
            assert!(!what.is_empty() && (0.0..=1.0).contains(&fraction), "{what} {fraction}");
        })
    }

    /// Resolves and compares every file that should be there.
    fn check(&self, model: &str) -> PathBuf {
        let folder = self.resolve(model).unwrap();
        for (name, bytes) in &self.shelf.lock().unwrap().files {
            if name != "README.md" {
                assert!(fs::read(folder.join(name)).unwrap() == *bytes, "{name} differs");
            }
        }
        folder
    }

    /// First bytes asked for of a file's contents.
    fn starts(&self, file: &str) -> Vec<usize> {
        let shelf = self.shelf.lock().unwrap();
        shelf
            .seen
            .iter()
            .filter(|(path, ..)| path.ends_with(file))
            .filter_map(|(_, start, _)| *start)
            .collect()
    }

    fn refused(&self, model: &str, words: &[&str]) {
        let error = self.resolve(model).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?} not in {error:?}");
    }
}

/// A model in two shards, one of them `size` bytes long.
fn model(size: usize) -> BTreeMap<String, Vec<u8>> {
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    let file = |name: &str, bytes: &[u8]| (name.to_owned(), bytes.to_vec());
    let large: Vec<u8> = (0..size).map(|at| (at * 7 % 251) as u8).collect();
    BTreeMap::from([
        file("config.json", b"{}"),
        file("tokenizer.json", b"{\"model\": {}}"),
        file("README.md", b"not needed"),
        file(INDEX, index.as_bytes()),
        file("model-00001-of-00002.safetensors", &large),
        file("model-00002-of-00002.safetensors", b"small"),
    ])
}

fn serve(stream: TcpStream, shelf: &Mutex<Shelf>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    while let Some(first) = lines.next() {
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let headers: Vec<String> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
        let header = |name: &str| {
            let found = headers.iter().find(|line| line.to_lowercase().starts_with(name));
            found.and_then(|line| Some(line.split_once(": ")?.1.to_owned()))
        };
        let range = header("range:").and_then(|range| {
            let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
            Some((start.parse::<usize>().ok()?, end.parse::<usize>().ok()))
        });
        let asked = range.filter(|range| *range != (0, Some(0))).map(|(start, _)| start);
        shelf.lock().unwrap().seen.push((path.clone(), asked, header("authorization:")));
        if answer(&stream, shelf, &path, range).is_none() {
            return;
        }
    }
}

/// Writes a response; `None` where the connection is to be closed.
fn answer(
    mut stream: &TcpStream,
    shelf: &Mutex<Shelf>,
    path: &str,
    range: Option<(usize, Option<usize>)>,
) -> Option<()> {
    let mut shelf = shelf.lock().unwrap();
    let commit = shelf.commit.clone();
    let plain = |status: &str, body: &[u8]| {
        [format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
    };
    if let Some(status) = shelf.status {
        return stream.write_all(&plain(&format!("{status} Status"), b"no")).ok();
    }
    if path.starts_with(&format!("/api/models/{ID}/revision/")) && !path.ends_with("nowhere") {
        let siblings: Vec<_> =
            shelf.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"sha": commit, "siblings": siblings}).to_string();
        return stream.write_all(&plain("200 OK", body.as_bytes())).ok();
    }
    let name = path.strip_prefix(&format!("/{ID}/resolve/{commit}/"));
    let Some((name, bytes)) = name.and_then(|name| Some((name, shelf.files.get(name)?.clone()))) else {
        return stream.write_all(&plain("404 Not Found", b"")).ok();
    };
    let etag = format!(
        "{:x}",
        bytes.iter().fold(name.len() as u64, |sum, &byte| sum.wrapping_mul(31) + u64::from(byte))
    );
    let (mut start, end) = range.unwrap_or((0, None));
    let end = end.map_or(bytes.len(), |end| end + 1);
    if start > 0 && shelf.ignores_range > 0 {
        shelf.ignores_range -= 1;
        start = 0;
    }
    if start >= bytes.len() {
        return stream.write_all(&plain("416 Range Not Satisfiable", b"")).ok();
    }
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nX-Repo-Commit: {commit}\r\nETag: \"{etag}\"\r\nContent-Length: {}\r\n\
         Content-Range: bytes {start}-{}/{}\r\n\r\n",
        end - start,
        end - 1,
        bytes.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    let body = &bytes[start..end];
    if body.len() > 1000 && (shelf.stalls || shelf.breaks.1 > 0) {
        stream.write_all(&body[..shelf.breaks.0]).ok()?;
        if shelf.stalls {
            drop(shelf);
            thread::sleep(Duration::from_secs(20));
            return None;
        }
        shelf.breaks.1 -= 1;
        return None;
    }
    stream.write_all(body).ok()
}

#[test]
fn hub_downloads_what_is_needed_once() {
    let hub = TestHub::start();
    let folder = hub.check(ID);
    assert!(folder.ends_with(format!("models--some-org--Some.Model-1/snapshots/{COMMIT}")), "{folder:?}");
    assert!(!folder.join("README.md").exists());
    let requests = hub.shelf.lock().unwrap().seen.len();
    assert_eq!(hub.check(&format!("{ID}@main")), folder);
    assert_eq!(hub.shelf.lock().unwrap().seen.len(), requests + 1, "only the commit is asked for again");
    assert!(hub.shelf.lock().unwrap().seen.iter().all(|(_, _, token)| token.is_none()));

    // Offline, the same folder; and a hub that is down is no reason to stop either.
    let offline =
        HubSettings { offline: true, endpoint: "http://127.0.0.1:1".to_owned(), ..hub.settings.clone() };
    assert_eq!(resolve_with(ID, &offline, &mut |_, _| ()).unwrap(), folder);
    let down = HubSettings { offline: false, retry_wait: Duration::from_secs(600), ..offline };
    assert_eq!(resolve_with(ID, &down, &mut |_, _| ()).unwrap(), folder, "at once");
    fs::remove_file(folder.join("model-00002-of-00002.safetensors")).unwrap();
    let offline = HubSettings { offline: true, ..down };
    let error = resolve_with(ID, &offline, &mut |_, _| ()).unwrap_err().to_string();
    assert!(error.contains(ID) && error.contains("model-00002-of-00002.safetensors is missing"), "{error}");
}

#[test]
fn hub_fetches_only_what_changed_with_a_commit() {
    let hub = TestHub::start();
    let old = hub.check(ID);
    let hub = hub.with(|shelf| {
        shelf.commit = COMMIT.replace('0', "f");
        shelf.files.insert("config.json".to_owned(), b"{\"new\": 1}".to_vec());
    });
    assert_ne!(hub.check(ID), old);
    assert_eq!(hub.starts("model-00001-of-00002.safetensors").len(), 1, "the shard is the same blob");
    assert_eq!(hub.starts("config.json").len(), 2);
}

#[test]
fn hub_interrupted_download_is_resumed() {
    let hub = TestHub::start().with(|shelf| shelf.breaks = (1500, 2));
    hub.check(ID);
    assert_eq!(hub.starts("model-00001-of-00002.safetensors"), [0, 1500, 3000]);

    // Also by the next process, where the first one gave up.
    let hub = TestHub::start().with(|shelf| shelf.breaks = (0, 1000));
    hub.refused(ID, &["model-00001-of-00002.safetensors", "cannot download"]);
    let cache = hub.settings.cache.join("models--some-org--Some.Model-1");
    let part = fs::read_dir(cache.join("blobs"))
        .unwrap()
        .flatten()
        .find(|file| file.path().extension().is_some_and(|end| end == "part"));
    let large = model(5000).remove("model-00001-of-00002.safetensors").unwrap();
    fs::write(part.unwrap().path(), &large[..4000]).unwrap();
    assert!(!cache.join("refs/main").exists(), "an incomplete commit is not recorded");
    let hub = hub.with(|shelf| shelf.breaks = (0, 0));
    hub.check(ID);
    assert_eq!(hub.starts("model-00001-of-00002.safetensors").last(), Some(&4000));
}

#[test]
fn hub_that_ignores_ranges_does_no_damage() {
    let hub = TestHub::start().with(|shelf| (shelf.breaks, shelf.ignores_range) = ((1500, 1), 1));
    hub.check(ID);
    assert_eq!(hub.starts("model-00001-of-00002.safetensors"), [0, 1500, 0]);
}

#[test]
fn hub_refusals_say_what_to_do() {
    let status = |status| TestHub::start().with(|shelf| shelf.status = Some(status));
    status(401).refused(ID, &["http://127.0.0.1", ID, "401", "HF_TOKEN"]);
    status(403).refused(ID, &["403", "HF_TOKEN"]);
    status(404).refused(ID, &["has no", ID]);
    status(400).refused(ID, &["cannot download", "400"]);
    status(503).refused(ID, &["cannot download", "503"]);
    let hub = TestHub::start();
    hub.refused(&format!("{ID}@nowhere"), &["has no", "@nowhere"]);
    let without =
        |name: &'static str| TestHub::start().with(|shelf| assert!(shelf.files.remove(name).is_some()));
    without("config.json").refused(ID, &[ID, "config.json"]);
    without(INDEX).refused(ID, &[ID, INDEX, SINGLE]);
    without("model-00002-of-00002.safetensors").refused(ID, &["has no", "model-00002-of-00002.safetensors"]);
    let hub = without(INDEX).with(|shelf| drop(shelf.files.insert("x.Q4_0.gguf".to_owned(), Vec::new())));
    hub.refused(ID, &["x.Q4_0.gguf", "give its path"]);
}

#[test]
fn hub_stall_ends() {
    let mut hub = TestHub::start().with(|shelf| (shelf.breaks, shelf.stalls) = ((500, 0), true));
    hub.settings.stall_max = Duration::from_millis(300);
    let start = Instant::now();
    hub.refused(ID, &["model-00001-of-00002.safetensors", "nothing came for 0.3 s"]);
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn hub_token_is_sent_and_never_shown() {
    let mut hub = TestHub::start();
    hub.settings.token = Some("hf_secret".to_owned());
    hub.check(ID);
    let shelf = hub.shelf.lock().unwrap();
    assert!(shelf.seen.iter().all(|(_, _, token)| token.as_deref() == Some("Bearer hf_secret")));
    assert!(!format!("{:?}", hub.settings).contains("secret"));
}

#[test]
fn hub_paths_come_first() {
    let hub = TestHub::start();
    let folder = hub.folder.path().to_str().unwrap();
    assert_eq!(hub.resolve(folder).unwrap(), Path::new(folder));
    for path in ["./nothing", "/nothing/at/all", "~/nothing-of-that-name", "some/model.gguf"] {
        hub.refused(path, &["no such file", path.trim_start_matches("~/")]);
    }
    for text in ["gpt2", "a/b/c", "", "a/..", "a/b@", "a/b@../x", "a b/c", "-/é"] {
        hub.refused(text, &[&format!("{text:?}"), "organisation/model"]);
    }
    assert!(hub.shelf.lock().unwrap().seen.is_empty());
    let offline = HubSettings { offline: true, ..hub.settings.clone() };
    let error = resolve_with(ID, &offline, &mut |_, _| ()).unwrap_err().to_string();
    assert!(["offline", ID, "config.json is missing"].iter().all(|word| error.contains(word)), "{error}");
}

#[test]
fn hub_settings_are_those_of_other_tools() {
    let read = |variables: &[(&str, &str)]| {
        let variables = BTreeMap::from_iter(variables.iter().copied());
        HubSettings::from_variables(|name| variables.get(name).map(|value| (*value).to_owned()))
    };
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("token"), "hf_file\n").unwrap();
    let settings =
        read(&[("HF_HOME", home.path().to_str().unwrap()), ("HF_ENDPOINT", "https://mirror.example/")]);
    assert_eq!(settings.cache, home.path().join("hub"));
    assert_eq!(
        (settings.endpoint.as_str(), settings.token.as_deref()),
        ("https://mirror.example", Some("hf_file"))
    );
    let settings = read(&[("XDG_CACHE_HOME", "/c"), ("HF_TOKEN", " hf_own "), ("HF_HUB_OFFLINE", "YES")]);
    assert_eq!(settings.cache, Path::new("/c/huggingface/hub"));
    assert_eq!((settings.token.as_deref(), settings.offline), (Some("hf_own"), true));
    let settings = read(&[("HF_HUB_CACHE", "/d"), ("HF_HOME", "/e"), ("HF_HUB_OFFLINE", "0")]);
    assert_eq!((settings.cache.as_path(), settings.token, settings.offline), (Path::new("/d"), None, false));
    assert_eq!(settings.endpoint, "https://huggingface.co");
}
