//! `mlx-node key`: makes a cluster key, and names one without showing it.
#![expect(clippy::print_stdout, reason = "what the command prints is its result")]

use crate::{
    config::{self, Values},
    settings::{KEY_FILE_NAME, read_key},
};
use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};
use transport::ClusterKey;

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

/// `key fingerprint`: prints the fingerprint of the key in `file`, or of the one that the settings name.
///
/// # Errors
/// What is wrong with the key, or that there is none.
pub(crate) fn fingerprint(file: Option<PathBuf>, values: Values) -> Result<(), String> {
    let setting = Some(values.cluster_key.0).filter(|key| file.is_none() && !key.is_empty());
    let key = match setting {
        Some(text) => text.parse::<ClusterKey>().map_err(|error| format!("cluster_key: {error}"))?,
        None => {
            let usual = || config::folder().map(|folder| folder.join(KEY_FILE_NAME));
            let path = file.or_else(|| values.key_file.fixed()).or_else(usual);
            let path = path.ok_or("there is no home folder to look for the key in: name its file")?;
            read_key(&path).map_err(|error| error.to_string())?
        }
    };
    println!("{}", key.fingerprint());
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
