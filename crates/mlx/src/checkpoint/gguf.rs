//! Reads the header of a `.gguf` file: metadata and the list of tensors, nothing of their data.
//!
//! The file is not trusted: every length is checked against what is left of the file and against a bound before
//! anything is allocated for it, and every tensor is known to lie inside the file before it is ever read.

use super::LoadError;
use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufReader, Read},
    path::Path,
};

/// Bytes of the whole header. The largest known vocabularies with merges and scores take 30 MB.
const HEADER_BYTES_MAX: u64 = 256 << 20;
/// Bytes of one string. Chat templates, the longest ones, stay under 100 kB.
const STRING_BYTES_MAX: u64 = 4 << 20;
/// Elements of one metadata array; vocabularies have under 300,000 entries, merge lists under 600,000.
const ARRAY_LEN_MAX: u64 = 4 << 20;
/// Metadata entries; real files have under 100.
const METADATA_MAX: u64 = 4096;
/// Tensors; a dense model of 200 layers has 2,000.
const TENSORS_MAX: u64 = 1 << 16;
/// Dimensions of a tensor: the format's own bound.
const DIMENSIONS_MAX: u32 = 4;
/// Where tensor data is aligned to, unless the metadata says otherwise.
const ALIGNMENT_DEFAULT: u64 = 32;
/// Elements reserved before any were read, so that a false length allocates next to nothing.
const RESERVED_MAX: u64 = 4096;

/// A parsed header.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, Value>,
    pub(crate) tensors: Vec<TensorInfo>,
}

/// A metadata value; integers and floats of all widths are one kind each.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Int(i128),
    /// As stored: f32 values are kept as such, since 1e-5 in f32 should print as 1e-5.
    Float32(f32),
    Float64(f64),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    Ints(Vec<i64>),
    Floats(Vec<f64>),
}

/// How a tensor's elements are stored, as GGUF names it.
#[expect(non_camel_case_types, reason = "GGUF's names")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Encoding {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// One tensor of the file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TensorInfo {
    pub(crate) name: String,
    /// Outermost dimension first, as everywhere but in GGUF.
    pub(crate) shape: Vec<i32>,
    pub(crate) encoding: Encoding,
    /// From the start of the file.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl Encoding {
    /// Whether elements share scales.
    pub(crate) fn quantized(self) -> bool {
        self.block().0 > 1
    }

    /// (elements, bytes) of one block.
    pub(crate) fn block(self) -> (u64, u64) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2_K => (256, 84),
            Self::Q3_K => (256, 110),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
        }
    }

    fn from_id(id: u32) -> Result<Self, &'static str> {
        Ok(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            30 => Self::Bf16,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            9 => return Err("Q8_1"),
            15 => return Err("Q8_K"),
            16..=19 | 21..=23 | 29 => return Err("an IQ type"),
            20 => return Err("IQ4_NL"),
            24..=27 => return Err("an integer type"),
            28 => return Err("F64"),
            34 | 35 => return Err("a ternary type"),
            39 => return Err("MXFP4"),
            _ => return Err("an unknown type"),
        })
    }
}

impl Header {
    /// Reads the header of the file at `path`.
    ///
    /// # Errors
    /// [`LoadError`] naming the file and what is wrong with it.
    pub(crate) fn open(path: &Path) -> Result<Self, LoadError> {
        let file = File::open(path).map_err(|error| LoadError::io(path, error))?;
        let size = file.metadata().map_err(|error| LoadError::io(path, error))?.len();
        Self::read(BufReader::with_capacity(1 << 20, file), size).map_err(|error| match error {
            HeaderError::Io(source) => LoadError::io(path, source),
            HeaderError::Damaged(reason) => LoadError::damaged(path, reason),
            HeaderError::Unsupported(reason) => LoadError::unsupported(path, reason),
        })
    }

    fn read(from: impl Read, size: u64) -> Result<Self, HeaderError> {
        let mut input = Input { from, at: 0, size };
        let magic = input.array::<4>("the magic number")?;
        if &magic != b"GGUF" {
            return damaged(format!("it starts with {magic:02x?}, not with \"GGUF\""));
        }
        match input.u32("the version")? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err(HeaderError::Unsupported("it is a big-endian GGUF file".to_owned()));
            }
            version => {
                return Err(HeaderError::Unsupported(format!("GGUF version {version}; 2 and 3 are known")));
            }
        }
        let tensors = input.count("the number of tensors", TENSORS_MAX)?;
        let entries = input.count("the number of metadata entries", METADATA_MAX)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entries {
            let key = input.string("a metadata key")?;
            let value = input.value(&key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return damaged(format!("the metadata has {key:?} twice"));
            }
        }
        let raw = (0..tensors).map(|_| input.tensor()).collect::<Result<Vec<_>, _>>()?;

        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT_DEFAULT,
            Some(Value::Int(value)) if (1..=1 << 20).contains(value) && value.count_ones() == 1 => {
                *value as u64
            }
            Some(other) => return damaged(format!("general.alignment is {other:?}, not a power of two")),
        };
        let data = input.at.next_multiple_of(alignment);
        let tensors = raw.into_iter().map(|tensor| tensor.place(data, size)).collect::<Result<_, _>>()?;
        Ok(Self { metadata, tensors })
    }
}

#[derive(Debug)]
enum HeaderError {
    Io(std::io::Error),
    Damaged(String),
    Unsupported(String),
}

fn damaged<T>(reason: String) -> Result<T, HeaderError> {
    Err(HeaderError::Damaged(reason))
}

/// A tensor's entry, its place not yet checked.
struct RawTensor {
    name: String,
    dimensions: Vec<u64>,
    encoding: Encoding,
    offset: u64,
}

impl RawTensor {
    fn place(self, data: u64, size: u64) -> Result<TensorInfo, HeaderError> {
        let Self { name, dimensions, encoding, offset } = self;
        let (block_len, block_bytes) = encoding.block();
        let row = dimensions.first().copied().unwrap_or(1);
        if row % block_len != 0 {
            return damaged(format!("tensor {name:?} is {encoding:?} with rows of {row} elements"));
        }
        let elements = dimensions.iter().try_fold(1_u64, |product, &length| product.checked_mul(length));
        let bytes = elements.and_then(|elements| (elements / block_len).checked_mul(block_bytes));
        let start = data.checked_add(offset);
        let end = bytes.and_then(|bytes| start?.checked_add(bytes));
        let (Some(bytes), Some(start), Some(end)) = (bytes, start, end) else {
            return damaged(format!("tensor {name:?} has the impossible shape {dimensions:?}"));
        };
        if end > size {
            return damaged(format!(
                "tensor {name:?} ends at byte {end}, but the file has {size}; its download may be incomplete"
            ));
        }
        let shape = dimensions.iter().rev().map(|&length| i32::try_from(length)).collect::<Result<_, _>>();
        match shape {
            Ok(shape) => Ok(TensorInfo { name, shape, encoding, offset: start, bytes }),
            Err(_) => damaged(format!("tensor {name:?} has the impossible shape {dimensions:?}")),
        }
    }
}

/// What is left of the header, and how far the file goes.
struct Input<R> {
    from: R,
    at: u64,
    size: u64,
}

impl<R: Read> Input<R> {
    /// Asserts that `bytes` more can follow.
    fn expect(&mut self, bytes: u64, what: &str) -> Result<(), HeaderError> {
        let end = self.at.saturating_add(bytes);
        if end > self.size {
            return damaged(format!(
                "{what} at byte {} would end at byte {end}, but the file has {}; its download may be incomplete",
                self.at, self.size
            ));
        }
        if end > HEADER_BYTES_MAX {
            return damaged(format!("the header is longer than {HEADER_BYTES_MAX} bytes"));
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], HeaderError> {
        self.expect(N as u64, what)?;
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes).map_err(HeaderError::Io)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, HeaderError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, HeaderError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &str, max: u64) -> Result<u64, HeaderError> {
        let at = self.at;
        let count = self.u64(what)?;
        if count > max {
            return damaged(format!("{what} at byte {at} is {count}, over {max}"));
        }
        Ok(count)
    }

    fn string(&mut self, what: &str) -> Result<String, HeaderError> {
        let at = self.at;
        let length = self.count(what, STRING_BYTES_MAX)?;
        self.expect(length, what)?;
        let mut bytes = vec![0; length as usize];
        self.from.read_exact(&mut bytes).map_err(HeaderError::Io)?;
        self.at += length;
        String::from_utf8(bytes).or_else(|_| damaged(format!("{what} at byte {at} is not UTF-8")))
    }

    fn value(&mut self, key: &str) -> Result<Value, HeaderError> {
        const ARRAY: u32 = 9;
        match self.u32(key)? {
            ARRAY => self.list(key),
            kind => self.scalar(kind, key),
        }
    }

    fn scalar(&mut self, kind: u32, key: &str) -> Result<Value, HeaderError> {
        Ok(match kind {
            0 => Value::Int(self.array::<1>(key)?[0].into()),
            1 => Value::Int(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Int(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Int(self.u32(key)?.into()),
            5 => Value::Int(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float32(f32::from_le_bytes(self.array(key)?)),
            7 => Value::Bool(self.array::<1>(key)?[0] != 0),
            8 => Value::String(self.string(key)?),
            10 => Value::Int(self.u64(key)?.into()),
            11 => Value::Int(i64::from_le_bytes(self.array(key)?).into()),
            12 => Value::Float64(f64::from_le_bytes(self.array(key)?)),
            other => return damaged(format!("{key:?} has the unknown value type {other}")),
        })
    }

    fn list(&mut self, key: &str) -> Result<Value, HeaderError> {
        let kind = self.u32(key)?;
        let length = self.count(key, ARRAY_LEN_MAX)?;
        let reserved = length.min(RESERVED_MAX) as usize;
        let (mut strings, mut ints, mut floats) = (Vec::new(), Vec::new(), Vec::new());
        match kind {
            8 => strings.reserve(reserved),
            6 | 12 => floats.reserve(reserved),
            _ => ints.reserve(reserved),
        }
        for _ in 0..length {
            match self.scalar(kind, key)? {
                Value::String(text) => strings.push(text),
                Value::Float32(value) => floats.push(value.into()),
                Value::Float64(value) => floats.push(value),
                Value::Bool(value) => ints.push(value.into()),
                Value::Int(value) => match i64::try_from(value) {
                    Ok(value) => ints.push(value),
                    Err(_) => return damaged(format!("{key:?} holds {value}, which is out of range")),
                },
                Value::Strings(_) | Value::Ints(_) | Value::Floats(_) => {
                    return damaged(format!("{key:?} is an array of arrays"));
                }
            }
        }
        Ok(match kind {
            8 => Value::Strings(strings),
            6 | 12 => Value::Floats(floats),
            _ => Value::Ints(ints),
        })
    }

    fn tensor(&mut self) -> Result<RawTensor, HeaderError> {
        let name = self.string("a tensor's name")?;
        let rank = self.u32(&name)?;
        if rank > DIMENSIONS_MAX {
            return damaged(format!("tensor {name:?} has {rank} dimensions, over {DIMENSIONS_MAX}"));
        }
        let dimensions = (0..rank).map(|_| self.u64(&name)).collect::<Result<Vec<_>, _>>()?;
        let id = self.u32(&name)?;
        let encoding = Encoding::from_id(id).map_err(|known| {
            HeaderError::Unsupported(format!(
                "tensor {name:?} is stored as {known} (GGML type {id}); use a file with Q2_K to Q6_K, Q4_0 to Q8_0, \
                 F16, BF16 or F32 tensors, or the model in MLX's own safetensors"
            ))
        })?;
        let offset = self.u64(&name)?;
        Ok(RawTensor { name, dimensions, encoding, offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::gguf_writer::{GgufWriter, sample};
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<Header, HeaderError> {
        Header::read(bytes, bytes.len() as u64)
    }

    fn message(bytes: &[u8]) -> String {
        match read(bytes) {
            Err(HeaderError::Damaged(reason) | HeaderError::Unsupported(reason)) => reason,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn checkpoint_gguf_header_is_read_whole() {
        let bytes = GgufWriter::new()
            .value("a.int", Value::Int(7))
            .value("a.float", Value::Float32(1e-5))
            .value("a.bool", Value::Bool(true))
            .value("a.text", Value::String("Ġword".to_owned()))
            .value("a.texts", Value::Strings(vec!["x".to_owned(), String::new()]))
            .value("a.ints", Value::Ints(vec![-1, 3]))
            .value("a.floats", Value::Floats(vec![0.5]))
            .tensor("one", &[3, 64], Encoding::Q4_0, &[7; 3 * 2 * 18])
            .tensor("two", &[5], Encoding::F32, &[1; 20])
            .finish();
        let header = read(&bytes).unwrap();
        assert_eq!(header.metadata["a.int"], Value::Int(7));
        assert_eq!(header.metadata["a.float"], Value::Float32(1e-5));
        assert_eq!(header.metadata["a.texts"], Value::Strings(vec!["x".to_owned(), String::new()]));
        assert_eq!(header.metadata["a.ints"], Value::Ints(vec![-1, 3]));
        assert_eq!(header.metadata.len(), 7);
        let [one, two] = &header.tensors[..] else { panic!("two tensors") };
        assert_eq!((&one.shape[..], one.bytes), (&[3, 64][..], 108));
        assert_eq!(bytes[one.offset as usize..][..108], [7; 108]);
        assert_eq!((two.encoding, &two.shape[..], two.bytes), (Encoding::F32, &[5][..], 20));
        assert_eq!(bytes[two.offset as usize..][..20], [1; 20]);
    }

    #[test]
    fn checkpoint_gguf_refusals_say_what_is_wrong() {
        let good = sample().finish();
        assert!(read(&good).is_ok());
        assert!(message(b"PK\x03\x04 a zip").contains("not with \"GGUF\""));
        assert!(message(b"GG").contains("the file has 2"));
        let with_version = |version: u32| [&good[..4], &version.to_le_bytes(), &good[8..]].concat();
        assert!(message(&with_version(1)).contains("version 1"));
        assert!(message(&with_version(3_u32.swap_bytes())).contains("big-endian"));
        assert!(message(&good[..good.len() - 1]).contains("download may be incomplete"));
        let k_quant = GgufWriter::new().raw_tensor("blk.0.ffn_up.weight", &[2, 256], 15, &[0; 584]).finish();
        let text = message(&k_quant);
        assert!(
            text.contains("blk.0.ffn_up.weight") && text.contains("Q8_K") && text.contains("Q8_0"),
            "{text}"
        );
        let huge = GgufWriter::new().raw_tensor("x", &[i64::MAX as u64, 2, 2], 0, &[]).finish();
        assert!(message(&huge).contains("impossible shape"));
        let twice = GgufWriter::new().value("k", Value::Int(1)).value("k", Value::Int(1)).finish();
        assert!(message(&twice).contains("twice"));
        let mut many = good.clone();
        many[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(message(&many).contains("the number of tensors"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn checkpoint_gguf_truncated_header_is_refused(cut in 0.0..1.0_f64) {
            let good = sample().finish();
            let cut = (good.len() as f64 * cut) as usize;
            prop_assert!(read(&good[..cut]).is_err());
        }

        #[test]
        fn checkpoint_gguf_garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(&bytes);
            let _ = read(&[&b"GGUF\x03\0\0\0"[..], &bytes].concat());
        }

        #[test]
        fn checkpoint_gguf_changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
            let mut bytes = sample().finish();
            for (index, byte) in changes {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(header) = read(&bytes) {
                prop_assert!(header.tensors.iter().all(|tensor| tensor.offset + tensor.bytes <= bytes.len() as u64));
            }
        }
    }
}
