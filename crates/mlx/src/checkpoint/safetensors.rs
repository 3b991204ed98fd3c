//! Checks a safetensors file's header against the file before MLX maps its tensors, and opens them lazily.

use super::{LoadError, tensors::Entry};
use mlx_rs::{Array, Stream, with_stream};
use serde::Deserialize;
use std::{collections::BTreeMap, fs::File, io::Read, path::Path, rc::Rc};

/// Bytes of a header. A model of 100,000 tensors has 12 MB; the format's own library stops at 100 MB.
const HEADER_BYTES_MAX: u64 = 64 << 20;
/// What the header's length takes.
const PREFIX_BYTES: u64 = 8;
const DIMENSIONS_MAX: usize = 8;

/// What a file's header says of one tensor.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct TensorHeader {
    pub(crate) dtype: String,
    pub(crate) shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Reads and checks the header of the file at `path`.
///
/// # Errors
/// [`LoadError`] where it is cut off, damaged, or holds a type that MLX cannot load.
pub(crate) fn read_header(path: &Path) -> Result<BTreeMap<String, TensorHeader>, LoadError> {
    let failed = |error| LoadError::io(path, error);
    let mut file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let mut prefix = [0; PREFIX_BYTES as usize];
    if size < PREFIX_BYTES {
        return Err(LoadError::damaged(path, format!("it has only {size} bytes")));
    }
    file.read_exact(&mut prefix).map_err(failed)?;
    let length = u64::from_le_bytes(prefix);
    if length > HEADER_BYTES_MAX.min(size - PREFIX_BYTES) {
        let reason = format!(
            "its first 8 bytes announce a header of {length} bytes, but the file has {size}; \
             it is cut off or not a safetensors file"
        );
        return Err(LoadError::damaged(path, reason));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text).map_err(failed)?;
    let mut entries: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&text)
        .map_err(|error| LoadError::damaged(path, format!("its header is not JSON: {error}")))?;
    entries.remove("__metadata__");
    let data = size - PREFIX_BYTES - length;
    let check = |(name, value)| check_tensor(path, data, name, value);
    entries.into_iter().map(check).collect()
}

/// Opens all tensors of a file that [`read_header`] found sound; nothing is read until they are evaluated.
///
/// # Errors
/// [`LoadError::Mlx`] where MLX refuses all the same.
pub(crate) fn open_tensors(path: &Path, into: &mut BTreeMap<String, Entry>) -> Result<(), LoadError> {
    // Reading is the CPU's work on every backend: Metal has no kernel for it.
    let arrays = with_stream(&Stream::cpu(), || Array::load_safetensors(path))
        .map_err(|error| LoadError::Mlx { what: path.display().to_string(), message: error.to_string() })?;
    let file: Rc<Path> = path.into();
    into.extend(arrays.into_iter().map(|(name, array)| (name, Entry::Lazy { array, file: file.clone() })));
    Ok(())
}

fn check_tensor(
    path: &Path,
    data: u64,
    name: String,
    value: serde_json::Value,
) -> Result<(String, TensorHeader), LoadError> {
    let header: TensorHeader = serde_json::from_value(value)
        .map_err(|error| LoadError::damaged(path, format!("its header's entry {name:?}: {error}")))?;
    let width = match header.dtype.as_str() {
        "BOOL" | "U8" | "I8" => 1,
        "U16" | "I16" | "F16" | "BF16" => 2,
        "U32" | "I32" | "F32" => 4,
        "U64" | "I64" => 8,
        other => {
            let reason =
                format!("tensor {name:?} is stored as {other}; F32, F16, BF16 and MLX's quantization are");
            return Err(LoadError::unsupported(path, reason));
        }
    };
    let (start, end) = header.data_offsets;
    let bytes = header.shape.iter().try_fold(width, |product: u64, &length| {
        i32::try_from(length).ok().and_then(|_| product.checked_mul(length))
    });
    if header.shape.len() > DIMENSIONS_MAX || start > end || bytes != Some(end - start) {
        let reason = format!(
            "tensor {name:?} is {} of {:?}, which does not fit its bytes {start}..{end}",
            header.dtype, header.shape
        );
        return Err(LoadError::damaged(path, reason));
    }
    if end > data {
        let reason = format!(
            "tensor {name:?} ends at byte {end} of the data, but there are {data}; its download may be incomplete"
        );
        return Err(LoadError::damaged(path, reason));
    }
    Ok((name, header))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
    }

    fn check(bytes: &[u8], words: &[&str]) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        std::fs::write(&path, bytes).unwrap();
        let found = read_header(&path);
        if words.is_empty() {
            assert!(found.is_ok(), "{found:?}");
        } else {
            let error = found.unwrap_err().to_string();
            assert!(
                error.contains("model.safetensors") && words.iter().all(|word| error.contains(word)),
                "{error}"
            );
        }
    }

    #[test]
    fn checkpoint_safetensors_header_is_checked() {
        let good =
            r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#;
        check(&file(good, 24), &[]);
        check(&file(good, 23), &["\"a\"", "incomplete"]);
        check(&file(good, 24)[..40], &["cut off"]);
        check(b"GGUF", &["only 4 bytes"]);
        check(b"version https://git-lfs.github.com/spec/v1\n", &["not a safetensors file"]);
        check(&file("{\"a\": nonsense", 0), &["not JSON"]);
        check(&file(r#"{"a":{"dtype":"F32","shape":[2]}}"#, 8), &["\"a\"", "data_offsets"]);
        check(&file(r#"{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}"#, 2), &["F8_E4M3"]);
        check(&file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 8), &["does not fit"]);
        check(&file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8), &["does not fit"]);
        let huge =
            format!(r#"{{"a":{{"dtype":"F32","shape":[{0},{0},{0}],"data_offsets":[0,4]}}}}"#, i32::MAX);
        check(&file(&huge, 4), &["does not fit"]);
    }
}
