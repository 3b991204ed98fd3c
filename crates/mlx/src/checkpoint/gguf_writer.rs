//! Writes small `.gguf` files for tests.

use super::gguf::{Encoding, Value};

const ALIGNMENT: usize = 32;

/// Collects metadata and tensors.
#[derive(Debug, Clone, Default)]
pub(crate) struct GgufWriter {
    entries: u64,
    metadata: Vec<u8>,
    tensors: u64,
    infos: Vec<u8>,
    data: Vec<u8>,
}

impl GgufWriter {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn value(mut self, key: &str, value: Value) -> Self {
        self.entries += 1;
        text(&mut self.metadata, key);
        let out = &mut self.metadata;
        let mut put = |kind: u32, bytes: &[u8]| {
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        };
        match value {
            Value::Int(value) => put(4, &u32::try_from(value).unwrap().to_le_bytes()),
            Value::Float32(value) => put(6, &value.to_le_bytes()),
            Value::Float64(value) => put(12, &value.to_le_bytes()),
            Value::Bool(value) => put(7, &[value.into()]),
            Value::String(value) => {
                put(8, &[]);
                text(out, &value);
            }
            Value::Strings(values) => {
                put(9, &[]);
                put_list(out, 8, values.len());
                values.iter().for_each(|value| text(out, value));
            }
            Value::Ints(values) => {
                put(9, &[]);
                put_list(out, 5, values.len());
                values.iter().for_each(|&value| out.extend(i32::try_from(value).unwrap().to_le_bytes()));
            }
            Value::Floats(values) => {
                put(9, &[]);
                put_list(out, 6, values.len());
                values.iter().for_each(|&value| out.extend((value as f32).to_le_bytes()));
            }
        }
        self
    }

    /// `shape` outermost first.
    pub(crate) fn tensor(self, name: &str, shape: &[u64], encoding: Encoding, data: &[u8]) -> Self {
        let id = match encoding {
            Encoding::Q5_0 => 6,
            Encoding::Q5_1 => 7,
            Encoding::Q2_K => 10,
            Encoding::Q3_K => 11,
            Encoding::Q4_K => 12,
            Encoding::Q5_K => 13,
            Encoding::Q6_K => 14,
            Encoding::F32 => 0,
            Encoding::F16 => 1,
            Encoding::Q4_0 => 2,
            Encoding::Q4_1 => 3,
            Encoding::Q8_0 => 8,
            Encoding::Bf16 => 30,
        };
        self.raw_tensor(name, shape, id, data)
    }

    pub(crate) fn raw_tensor(mut self, name: &str, shape: &[u64], id: u32, data: &[u8]) -> Self {
        self.tensors += 1;
        text(&mut self.infos, name);
        self.infos.extend(u32::try_from(shape.len()).unwrap().to_le_bytes());
        shape.iter().rev().for_each(|length| self.infos.extend(length.to_le_bytes()));
        self.infos.extend(id.to_le_bytes());
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(data);
        self
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(self.tensors.to_le_bytes());
        out.extend(self.entries.to_le_bytes());
        out.extend(self.metadata);
        out.extend(self.infos);
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out.extend(self.data);
        out
    }
}

/// A file with every kind of value and two tensors.
pub(crate) fn sample() -> GgufWriter {
    GgufWriter::new()
        .value("general.architecture", Value::String("llama".to_owned()))
        .value("some.count", Value::Int(3))
        .value("some.list", Value::Strings(vec!["one".to_owned(), "two".to_owned()]))
        .value("some.numbers", Value::Ints(vec![1, 2, 3]))
        .tensor("a.weight", &[2, 32], Encoding::Q8_0, &[1; 68])
        .tensor("b.weight", &[4], Encoding::F32, &[2; 16])
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_list(out: &mut Vec<u8>, kind: u32, length: usize) {
    out.extend(kind.to_le_bytes());
    out.extend((length as u64).to_le_bytes());
}
