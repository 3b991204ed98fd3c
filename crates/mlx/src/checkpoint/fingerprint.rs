//! A cheap name for a set of weights: two nodes that serve the same files agree on it without reading all of them.

use super::LoadError;
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
    time::UNIX_EPOCH,
};
use types::BlockHash;

/// Pieces of each file that are read, evenly spread from its first byte to its last.
const SAMPLES: u64 = 32;
/// Bytes of each piece. The first covers the header of most files; all together take milliseconds.
const SAMPLE_BYTES: u64 = 64 << 10;

/// A file of weights and what its header says of its tensors.
#[derive(Debug)]
pub(crate) struct WeightFile<'a> {
    pub(crate) path: &'a Path,
    pub(crate) tensors: Vec<String>,
}

/// Sizes and dates of files, and the hash of what they hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    pub(crate) hash: BlockHash,
    pub(crate) bytes: u64,
    pub(crate) created_s: u64,
}

impl Fingerprint {
    /// Hashes the configuration and, of each file in order: its size, its tensors' names, types and shapes, and samples
    /// of its bytes. Neither paths nor dates go in, so copies of a model on two machines are the same.
    pub(crate) fn of(config: &str, files: &[WeightFile<'_>]) -> Result<Self, LoadError> {
        let mut parts = vec![b"weights 1".to_vec(), config.as_bytes().to_vec()];
        let (mut bytes, mut created_s) = (0, 0);
        for WeightFile { path, tensors } in files {
            let failed = |error| LoadError::io(path, error);
            let mut file = File::open(path).map_err(failed)?;
            let facts = file.metadata().map_err(failed)?;
            let size = facts.len();
            bytes += size;
            let changed = facts.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            created_s = created_s.max(changed.map_or(0, |time| time.as_secs()));

            parts.push(size.to_le_bytes().to_vec());
            parts.push(tensors.join("\n").into_bytes());
            let last = size.saturating_sub(SAMPLE_BYTES);
            for sample in 0..SAMPLES {
                // In two steps: no product of a file's size.
                let start = last / (SAMPLES - 1) * sample + last % (SAMPLES - 1) * sample / (SAMPLES - 1);
                file.seek(SeekFrom::Start(start)).map_err(failed)?;
                let mut piece = vec![0; SAMPLE_BYTES.min(size) as usize];
                file.read_exact(&mut piece).map_err(failed)?;
                parts.push(piece);
                if last == 0 {
                    break;
                }
            }
        }
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        Ok(Self { hash: BlockHash::root(&parts), bytes, created_s })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoint_fingerprint_sees_contents_not_places() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let print = |folder: &Path, config: &str, bytes: &[u8]| {
            let path = folder.join("model.safetensors");
            std::fs::write(&path, bytes).unwrap();
            Fingerprint::of(config, &[WeightFile { path: &path, tensors: vec!["a F32 [1]".to_owned()] }])
                .unwrap()
        };
        let long = vec![7; (SAMPLE_BYTES * (SAMPLES + 3)) as usize];
        let original = print(one.path(), "{}", &long);
        assert_eq!(original.hash, print(two.path(), "{}", &long).hash);
        assert_eq!(original.bytes, long.len() as u64);
        assert!(original.created_s > 1_700_000_000);
        assert_ne!(original.hash, print(one.path(), "{ }", &long).hash);
        assert_ne!(original.hash, print(one.path(), "{}", &long[1..]).hash);
        for at in [0, long.len() / 2, long.len() - 1] {
            let mut changed = long.clone();
            // The middle lies between two samples' starts, at most one sample away from both.
            changed[at..].iter_mut().take(2 * SAMPLE_BYTES as usize).for_each(|byte| *byte = 8);
            assert_ne!(original.hash, print(one.path(), "{}", &changed).hash, "a change at {at}");
        }
        assert_eq!(print(one.path(), "{}", b"tiny").bytes, 4);
        assert_eq!(print(one.path(), "{}", b"").bytes, 0);
    }
}
