//! Whether a model's files hold what was published, on request: each is read whole and held to its SHA-256.
//!
//! What that should be is told by the hub's cache, whose links lead to files named by it, or by a `SHA256SUMS` beside the
//! files, as `sha256sum` writes it.

use super::LoadError;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fmt::Write,
    fs::{self, File},
    io::Read,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::sync_channel,
    },
    thread,
};

/// The list of sums beside a model's files.
const SUMS: &str = "SHA256SUMS";
/// Hexadecimal digits of a SHA-256.
const DIGITS: usize = 64;
/// Files read at a time: a disk's queue is full with fewer.
const THREADS_MAX: usize = 8;
/// Bytes read at a time by each.
const PIECE_BYTES: usize = 4 << 20;
/// Reports that may wait to be looked at.
const REPORTS_MAX: usize = 64;

/// A file and the sum that it should have.
#[derive(Debug)]
struct Expected {
    path: PathBuf,
    sum: String,
    bytes: u64,
}

/// Reads every file of the model at `model`, a folder or a `.gguf` file, whose sum is known, several at a time.
/// Returns the bytes that were read.
///
/// # Errors
/// [`LoadError`] naming the file whose sum is another, that cannot be read, or of whose weights no sum is known.
pub fn verify(model: &Path, progress: &mut dyn FnMut(&str, f32)) -> Result<u64, LoadError> {
    let files = expected(model)?;
    let total: u64 = files.iter().map(|file| file.bytes).sum();
    let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(THREADS_MAX);
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        let (sender, reports) = sync_channel(REPORTS_MAX);
        for _ in 0..threads.min(files.len()) {
            let (sender, files, next) = (sender.clone(), &files, &next);
            scope.spawn(move || {
                while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // Nobody listens any more after an error.
                    let result = check(file, &mut |bytes| sender.send(Ok(bytes)).is_ok());
                    if let Err(error) = result {
                        drop(sender.send(Err(error)));
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut done = 0;
        for report in reports {
            done += report?;
            progress("checksums", done as f32 / total.max(1) as f32);
        }
        Ok(total)
    })
}

/// Reads a file, telling of each piece; false from `tell` ends it.
fn check(file: &Expected, tell: &mut dyn FnMut(u64) -> bool) -> Result<(), LoadError> {
    let failed = |error| LoadError::io(&file.path, error);
    let mut from = File::open(&file.path).map_err(failed)?;
    let (mut hash, mut piece) = (Sha256::new(), vec![0; PIECE_BYTES]);
    loop {
        let count = from.read(&mut piece).map_err(failed)?;
        if count == 0 {
            break;
        }
        hash.update(&piece[..count]);
        if !tell(count as u64) {
            return Ok(());
        }
    }
    let found = hash.finalize().iter().fold(String::with_capacity(DIGITS), |mut text, byte| {
        // Writing to a text does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    });
    if found == file.sum {
        return Ok(());
    }
    let reason = format!("its SHA-256 is {found}, and should be {}; download it again", file.sum);
    Err(LoadError::damaged(&file.path, reason))
}

/// The files of a model whose sums are known: all that hold weights, and perhaps more.
fn expected(model: &Path) -> Result<Vec<Expected>, LoadError> {
    let failed = |error| LoadError::io(model, error);
    let (folder, paths) = if model.is_dir() {
        let entries = fs::read_dir(model).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let mut paths: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
        paths.sort();
        (model, paths)
    } else {
        (model.parent().unwrap_or(model), vec![model.to_owned()])
    };
    let listed = listed(&folder.join(SUMS))?;
    let mut files = Vec::new();
    for path in paths {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let weights = name.ends_with(".safetensors") || name.ends_with(".gguf");
        match listed.get(name).cloned().or_else(|| named_by_sum(&path)) {
            Some(sum) => {
                let bytes = fs::metadata(&path).map_err(|error| LoadError::io(&path, error))?.len();
                files.push(Expected { path, sum, bytes });
            }
            None if weights => {
                let reason = format!(
                    "nothing says what its SHA-256 should be: it is not in a hub's cache, and no {SUMS} beside it names it"
                );
                return Err(LoadError::unsupported(&path, reason));
            }
            None => {}
        }
    }
    Ok(files)
}

/// The sum in the name of the file that a link in a hub's cache leads to.
fn named_by_sum(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    target.file_name()?.to_str().filter(|name| is_sum(name)).map(str::to_owned)
}

fn is_sum(text: &str) -> bool {
    text.len() == DIGITS && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Names and sums of a `sha256sum` file; none where there is no such file.
fn listed(path: &Path) -> Result<BTreeMap<String, String>, LoadError> {
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let text = fs::read_to_string(path).map_err(|error| LoadError::io(path, error))?;
    let line = |line: &str| {
        let (sum, name) = line.split_once([' ', '\t'])?;
        let name = name.trim_start().trim_start_matches('*');
        is_sum(sum).then(|| (name.to_owned(), sum.to_owned()))
    };
    let lines = text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty());
    lines
        .map(|(at, text)| {
            line(text).ok_or_else(|| {
                LoadError::damaged(path, format!("line {} is {text:?}, not a SHA-256 and a name", at + 1))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of "abc" (FIPS 180-2, B.1).
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn files_are_held_to_their_sums() {
        let check = |sums: Option<&str>, linked: Option<&str>, wanted: Result<u64, &str>| {
            let folder = tempfile::tempdir().unwrap();
            let weights = folder.path().join("model.safetensors");
            match linked {
                Some(name) => {
                    let blob = folder.path().join("blobs").join(name);
                    fs::create_dir(blob.parent().unwrap()).unwrap();
                    fs::write(&blob, "abc").unwrap();
                    std::os::unix::fs::symlink(&blob, &weights).unwrap();
                }
                None => fs::write(&weights, "abc").unwrap(),
            }
            fs::write(folder.path().join("config.json"), "{}").unwrap();
            if let Some(sums) = sums {
                fs::write(folder.path().join(SUMS), sums).unwrap();
            }
            let mut last = 0.0;
            let found = verify(folder.path(), &mut |_, done| last = done);
            match (found, wanted) {
                (Ok(bytes), Ok(wanted)) => assert_eq!((bytes, last), (wanted, 1.0)),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (found, wanted) => panic!("{found:?} for {wanted:?}"),
            }
        };
        let other = ABC.replace("7816", "7817");
        check(Some(&format!("{ABC}  model.safetensors\n\n")), None, Ok(3));
        check(Some(&format!("{ABC} *model.safetensors\n")), None, Ok(3));
        check(Some(&format!("{other}  model.safetensors\n")), None, Err(ABC));
        check(Some(&format!("{ABC}  another\n")), None, Err("no SHA256SUMS beside it"));
        check(Some("model.safetensors"), None, Err("line 1"));
        check(None, None, Err("model.safetensors"));
        check(None, Some(ABC), Ok(3));
        check(None, Some(&other), Err("download it again"));
        check(None, Some("0123456789abcdef0123456789abcdef01234567"), Err("nothing says"));
    }
}
