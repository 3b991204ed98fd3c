//! `mlx-node key`: makes keys, of the cluster and for HTTP, and names or hashes them without showing them.
#![expect(clippy::print_stdout, reason = "what the command prints is its result")]

use crate::{
    config::{self, Values},
    settings::{KEY_FILE_NAME, read_keys},
};
use api::KeyHash;
use std::{
    fs::{self, OpenOptions},
    io::{self, BufRead, Write},
    path::{Path, PathBuf},
};
use transport::{ClusterKey, ClusterKeys};

/// What an HTTP key that is made here begins with: scanners for secrets know the first part.
const HTTP_PREFIX: &str = "sk-mlx-";
/// Random bytes of an HTTP key: nobody finds it from its hash.
const HTTP_KEY_BYTES: usize = 32;
/// Shorter keys are likely to be words that somebody thought up, which can be found from a hash by trying.
const HTTP_KEY_CHARS_MIN: usize = 20;

/// Why a key was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NewKeyError {
    #[error("there is no home folder to put the key into: name a file with --out")]
    NoFolder,
    #[error("{} is there already; a new key would lock out every machine that has the old one (remove the file first, or name another with --out)", .0.display())]
    Exists(PathBuf),
    #[error("{}: {error}", path.display())]
    Write { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Random(#[from] transport::GenerateKeyError),
}

/// `key new`: writes a new key, readable by its owner only.
pub(crate) fn new(out: Option<PathBuf>) -> Result<(), NewKeyError> {
    let usual = || config::folder().map(|folder| folder.join(KEY_FILE_NAME));
    let path = out.or_else(usual).ok_or(NewKeyError::NoFolder)?;
    let key = ClusterKey::generate()?;
    write_new(&path, &key)?;
    println!("{}", path.display());
    println!("fingerprint {}", key.fingerprint());
    println!("Copy this file to every machine of the cluster; whoever has it belongs to the cluster.");
    Ok(())
}

fn write_new(path: &Path, key: &ClusterKey) -> Result<(), NewKeyError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AlreadyExists => NewKeyError::Exists(path.to_path_buf()),
        _ => NewKeyError::Write { path: path.to_path_buf(), error },
    };
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path).map_err(failed)?;
    writeln!(file, "{}", key.reveal()).and_then(|()| file.sync_all()).map_err(failed)
}

/// `key new --http`: prints a new key for HTTP, and the hash that the configuration needs of it. It is kept nowhere.
///
/// # Errors
/// No random numbers.
pub(crate) fn new_http() -> Result<(), String> {
    let mut bytes = [0; HTTP_KEY_BYTES];
    getrandom::fill(&mut bytes).map_err(|error| format!("the system gives no random numbers: {error}"))?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let key = format!("{HTTP_PREFIX}{digits}");
    println!("{key}");
    println!("{}", KeyHash::of(key.as_bytes()));
    println!(
        "The first line is for who asks, and shown this once; the second is for api_keys or a [[key]] in cluster.toml."
    );
    Ok(())
}

/// `key hash`: reads a key and prints its hash.
///
/// # Errors
/// Nothing to read, or no key.
#[expect(clippy::print_stderr, reason = "advice, beside the result")]
pub(crate) fn hash() -> Result<(), String> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).map_err(|error| format!("standard input: {error}"))?;
    let key = line.trim();
    if key.is_empty() || key.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err("a key without spaces is expected on standard input".to_owned());
    }
    if key.chars().count() < HTTP_KEY_CHARS_MIN {
        eprintln!(
            "mlx-node: a key this short can be found from its hash by trying; `mlx-node key new --http` makes a better one"
        );
    }
    println!("{}", KeyHash::of(key.as_bytes()));
    Ok(())
}

/// `key fingerprint`: prints the fingerprints of the keys in `file`, or of those that the settings name, the own one first.
///
/// # Errors
/// What is wrong with the key, or that there is none.
pub(crate) fn fingerprint(file: Option<PathBuf>, values: Values) -> Result<(), String> {
    let setting = Some(values.cluster_key.0).filter(|key| file.is_none() && !key.is_empty());
    let keys = match setting {
        Some(text) => {
            let keys = text.split(',').map(str::parse).collect::<Result<Vec<ClusterKey>, _>>();
            keys.map_err(|error| format!("cluster_key: {error}"))?
        }
        None => {
            let usual = || config::folder().map(|folder| folder.join(KEY_FILE_NAME));
            let path = file.or_else(|| values.key_file.fixed()).or_else(usual);
            let path = path.ok_or("there is no home folder to look for the key in: name its file")?;
            let ClusterKeys { own, other } = read_keys(&path).map_err(|error| error.to_string())?;
            [own].into_iter().chain(other).collect()
        }
    };
    for key in keys {
        println!("{}", key.fingerprint());
    }
    Ok(())
}

/// Whether others than its owner may read the file.
pub(crate) fn is_exposed(path: &Path) -> bool {
    #[cfg(unix)]
    return fs::metadata(path)
        .is_ok_and(|metadata| std::os::unix::fs::MetadataExt::mode(&metadata) & 0o077 != 0);
    #[cfg(not(unix))]
    return false;
}
