//! Reads one tensor of a `.gguf` file into MLX arrays, changing only how its numbers are laid out.
//!
//! GGUF interleaves a block's scale with its codes; MLX keeps codes, scales and biases apart. The affine form
//! `code · scale + bias` holds these without a second rounding; `gguf_groups` reads the other kinds:
//!
//! | kind | block of 32 | code | bias |
//! | --- | --- | --- | --- |
//! | Q4_0 | scale f16, 16 bytes | nibble; low nibbles are elements 0–15, high ones 16–31 | −8 · scale |
//! | Q4_1 | scale f16, bias f16, 16 bytes | likewise | as stored |
//! | Q8_0 | scale f16, 32 × i8 | byte + 128 | −128 · scale |

use super::packed::{Mode, Packed, Packing};
use super::{
    LoadError, Weight,
    gguf::{Encoding, TensorInfo},
    gguf_groups::Groups,
};
use mlx_rs::{Array, Dtype};
use std::{
    ffi::c_void,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// Elements that share a scale once a block of any kind is read.
pub(crate) const GROUP_SIZE: i32 = 32;
/// Bytes read at a time: bounds what is held besides the result, large enough for sequential reads.
const CHUNK_BYTES: u64 = 16 << 20;

/// An open `.gguf` file that tensors are read from.
#[derive(Debug)]
pub(crate) struct DataFile {
    pub(crate) path: PathBuf,
    file: File,
}

impl DataFile {
    pub(crate) fn open(path: &Path) -> Result<Self, LoadError> {
        let file = File::open(path).map_err(|error| LoadError::io(path, error))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Reads `tensor`. With `unpermute_heads`, the rows of each head go from GGUF's order for llama (the two RoPE
    /// halves interleaved) back to Hugging Face's (one half after the other).
    pub(crate) fn read(
        &self,
        tensor: &TensorInfo,
        unpermute_heads: Option<usize>,
    ) -> Result<Weight, LoadError> {
        let failed = |error| LoadError::io(&self.path, error);
        let rows = tensor.shape.first().map_or(1, |&rows| rows as usize);
        let order = unpermute_heads.map(|heads| half_order(rows, heads));
        let order = order.as_deref();
        let shape = &tensor.shape[..];
        match tensor.encoding {
            Encoding::F32 => {
                let mut values: Vec<u32> = Vec::with_capacity((tensor.bytes / 4) as usize);
                self.chunks(tensor, |bytes| values.extend(le_words(bytes))).map_err(failed)?;
                self.array(tensor, &reordered(values, order, rows), shape, Dtype::Float32).map(Weight::Dense)
            }
            Encoding::F16 | Encoding::Bf16 => {
                let mut values: Vec<u16> = Vec::with_capacity((tensor.bytes / 2) as usize);
                self.chunks(tensor, |bytes| values.extend(le_halves(bytes))).map_err(failed)?;
                let dtype = if tensor.encoding == Encoding::F16 { Dtype::Float16 } else { Dtype::Bfloat16 };
                self.array(tensor, &reordered(values, order, rows), shape, dtype).map(Weight::Dense)
            }
            Encoding::Q5_0
            | Encoding::Q5_1
            | Encoding::Q2_K
            | Encoding::Q3_K
            | Encoding::Q4_K
            | Encoding::Q5_K
            | Encoding::Q6_K => {
                let mut groups = Groups::default();
                self.chunks(tensor, |bytes| groups.push(tensor.encoding, bytes)).map_err(failed)?;
                Ok(Weight::Packed(groups.packed(tensor, unpermute_heads)?))
            }
            Encoding::Q4_0 | Encoding::Q4_1 | Encoding::Q8_0 => {
                let mut blocks = Blocks::with_capacity(tensor);
                self.chunks(tensor, |bytes| blocks.push(tensor.encoding, bytes)).map_err(failed)?;
                let (bits, words_per_block) = if tensor.encoding == Encoding::Q8_0 { (8, 8) } else { (4, 4) };
                let with_last = |per_block| {
                    let mut shape = shape.to_vec();
                    if let Some(last) = shape.last_mut() {
                        *last = *last / GROUP_SIZE * per_block;
                    }
                    shape
                };
                let groups = with_last(1);
                Ok(Weight::Packed(Packed {
                    words: self.array(
                        tensor,
                        &reordered(blocks.words, order, rows),
                        &with_last(words_per_block),
                        Dtype::Uint32,
                    )?,
                    scales: self.array(
                        tensor,
                        &reordered(blocks.scales, order, rows),
                        &groups,
                        Dtype::Float16,
                    )?,
                    biases: Some(self.array(
                        tensor,
                        &reordered(blocks.biases, order, rows),
                        &groups,
                        Dtype::Float16,
                    )?),
                    packing: Packing { group_size: GROUP_SIZE, bits, mode: Mode::Affine },
                }))
            }
        }
    }

    /// [`Self::read`] of a tensor that must not be quantized.
    pub(crate) fn read_dense(
        &self,
        tensor: &TensorInfo,
        unpermute_heads: Option<usize>,
    ) -> Result<Array, LoadError> {
        match self.read(tensor, unpermute_heads)? {
            Weight::Dense(array) => Ok(array),
            Weight::Packed(_) => Err(LoadError::Tensor {
                name: tensor.name.clone(),
                origin: self.path.display().to_string(),
                reason: format!("is quantized ({:?}); a dense one is needed", tensor.encoding),
            }),
        }
    }

    /// Hands the tensor's bytes to `take`, in pieces of whole blocks.
    fn chunks(&self, tensor: &TensorInfo, mut take: impl FnMut(&[u8])) -> io::Result<()> {
        let (_, block_bytes) = tensor.encoding.block();
        let mut file = &self.file;
        file.seek(SeekFrom::Start(tensor.offset))?;
        let mut left = tensor.bytes;
        let mut buffer = vec![0; (CHUNK_BYTES / block_bytes * block_bytes).min(left) as usize];
        while left > 0 {
            let length = left.min(buffer.len() as u64);
            let chunk = &mut buffer[..length as usize];
            file.read_exact(chunk)?;
            take(chunk);
            left -= length;
        }
        Ok(())
    }

    #[expect(unsafe_code, reason = "the safe constructors need Rust types for f16 and bf16")]
    fn array<T: Plain>(
        &self,
        tensor: &TensorInfo,
        values: &[T],
        shape: &[i32],
        dtype: Dtype,
    ) -> Result<Array, LoadError> {
        let elements = shape.iter().map(|&length| length as usize).product::<usize>();
        assert_eq!(
            (elements, T::BYTES),
            (values.len(), dtype_bytes(dtype)),
            "the header's sizes were checked"
        );
        // SAFETY: `values` holds exactly as many elements of exactly `dtype`'s size as `shape` says, aligned for them
        // (both asserted above), and MLX copies them before it returns.
        let array = unsafe { Array::from_raw_data(values.as_ptr().cast::<c_void>(), shape, dtype) };
        if array.as_ptr().ctx.is_null() {
            let what = format!("{}: tensor {:?}", self.path.display(), tensor.name);
            return Err(LoadError::Mlx { what, message: "MLX could not allocate it".to_owned() });
        }
        Ok(array)
    }
}

/// Integers whose bits stand for the elements of an array.
trait Plain: Copy {
    const BYTES: usize = size_of::<Self>();
}
impl Plain for u16 {}
impl Plain for u32 {}

fn dtype_bytes(dtype: Dtype) -> usize {
    if matches!(dtype, Dtype::Float16 | Dtype::Bfloat16) { 2 } else { 4 }
}

/// Codes, scales and biases of a tensor, in order.
struct Blocks {
    words: Vec<u32>,
    scales: Vec<u16>,
    biases: Vec<u16>,
}

impl Blocks {
    fn with_capacity(tensor: &TensorInfo) -> Self {
        let (_, block_bytes) = tensor.encoding.block();
        let blocks = (tensor.bytes / block_bytes) as usize;
        let words = blocks * if tensor.encoding == Encoding::Q8_0 { 8 } else { 4 };
        Self {
            words: Vec::with_capacity(words),
            scales: Vec::with_capacity(blocks),
            biases: Vec::with_capacity(blocks),
        }
    }

    fn push(&mut self, encoding: Encoding, bytes: &[u8]) {
        let (_, block_bytes) = encoding.block();
        for block in bytes.chunks_exact(block_bytes as usize) {
            let scale = u16::from_le_bytes([block[0], block[1]]);
            self.scales.push(scale);
            match encoding {
                Encoding::Q4_0 => {
                    self.biases.push(times_minus_power_of_two(scale, 3));
                    self.words.extend(nibble_words(&block[2..]));
                }
                Encoding::Q4_1 => {
                    self.biases.push(u16::from_le_bytes([block[2], block[3]]));
                    self.words.extend(nibble_words(&block[4..]));
                }
                _ => {
                    self.biases.push(times_minus_power_of_two(scale, 7));
                    // Adding 128 to a byte flips its highest bit.
                    self.words.extend(le_words(&block[2..]).map(|word| word ^ 0x8080_8080));
                }
            }
        }
    }
}

/// Four words of eight codes each, the first code in the lowest bits, from 16 bytes of nibbles.
fn nibble_words(bytes: &[u8]) -> [u32; 4] {
    let pack = |nibbles: &[u8], shift: u32| {
        nibbles.iter().rev().fold(0, |word, &byte| word << 4 | u32::from(byte >> shift & 15))
    };
    [pack(&bytes[..8], 0), pack(&bytes[8..16], 0), pack(&bytes[..8], 4), pack(&bytes[8..16], 4)]
}

/// −2^`power` times an f16, as MLX's own arithmetic would give it: exact, or infinite where out of range.
fn times_minus_power_of_two(half: u16, power: u16) -> u16 {
    const INFINITY: u16 = 0x7c00;
    let (sign, magnitude) = (half & 0x8000, half & 0x7fff);
    let negated = sign ^ 0x8000;
    if magnitude >= INFINITY {
        return negated | magnitude;
    }
    let (mut exponent, mut fraction) = (magnitude >> 10, magnitude & 0x3ff);
    let mut left = power;
    // A subnormal grows by shifting until it has its hidden bit.
    while exponent == 0 && left > 0 && fraction != 0 {
        fraction <<= 1;
        left -= 1;
        if fraction & 0x400 != 0 {
            (exponent, fraction) = (1, fraction & 0x3ff);
        }
    }
    if exponent == 0 {
        return negated | fraction;
    }
    if exponent + left >= 31 { negated | INFINITY } else { negated | (exponent + left) << 10 | fraction }
}

fn le_words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
}

fn le_halves(bytes: &[u8]) -> impl Iterator<Item = u16> + '_ {
    bytes.chunks_exact(2).map(|half| u16::from_le_bytes([half[0], half[1]]))
}

/// For each row of the result, the row of the file: row `i` of half `j` of a head is the file's row `2i + j`.
pub(crate) fn half_order(rows: usize, heads: usize) -> Vec<usize> {
    let head = rows / heads;
    (0..rows).map(|row| row / head * head + row % head % (head / 2) * 2 + row % head / (head / 2)).collect()
}

pub(crate) fn reordered<T: Copy>(values: Vec<T>, order: Option<&[usize]>, rows: usize) -> Vec<T> {
    let Some(order) = order else { return values };
    let row = values.len() / rows;
    order.iter().flat_map(|&from| &values[from * row..][..row]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::gguf::Header;
    use crate::checkpoint::gguf_writer::GgufWriter;
    use mlx_rs::ops::dequantize;

    /// Bytes that look random but are the same each time, with scales that are ordinary f16 numbers.
    fn blocks(encoding: Encoding, count: usize) -> Vec<u8> {
        let (_, size) = encoding.block();
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let mut out = Vec::new();
        for _ in 0..count {
            let start = out.len();
            out.extend((0..size).map(|_| next()));
            for at in if encoding == Encoding::Q4_1 { &[1, 3][..] } else { &[1] } {
                out[start + at] = out[start + at] & 0x83 | 0x28;
            }
        }
        out
    }

    fn float(half: &[u8]) -> f32 {
        let bits = u16::from_le_bytes([half[0], half[1]]);
        let (exponent, fraction) = (i32::from(bits >> 10 & 31), f32::from(bits & 0x3ff) / 1024.0);
        let value = if exponent == 0 {
            fraction * 2_f32.powi(-14)
        } else {
            (1.0 + fraction) * 2_f32.powi(exponent - 15)
        };
        if bits & 0x8000 == 0 { value } else { -value }
    }

    /// What the format's description says a block holds.
    fn expected(encoding: Encoding, bytes: &[u8]) -> Vec<f32> {
        let (_, size) = encoding.block();
        let value = |block: &[u8], index: usize| match encoding {
            Encoding::Q8_0 => float(block) * f32::from(block[2 + index] as i8),
            _ => {
                let codes = &block[if encoding == Encoding::Q4_1 { 4 } else { 2 }..];
                let code = f32::from(if index < 16 { codes[index] & 15 } else { codes[index - 16] >> 4 });
                if encoding == Encoding::Q4_1 {
                    float(block) * code + float(&block[2..])
                } else {
                    float(block) * (code - 8.0)
                }
            }
        };
        bytes.chunks(size as usize).flat_map(|block| (0..32).map(move |index| value(block, index))).collect()
    }

    #[test]
    fn checkpoint_gguf_blocks_hold_what_the_file_holds() {
        for encoding in [Encoding::Q4_0, Encoding::Q4_1, Encoding::Q8_0] {
            let bytes = blocks(encoding, 8 * 2);
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.gguf");
            std::fs::write(&path, GgufWriter::new().tensor("w.weight", &[8, 64], encoding, &bytes).finish())
                .unwrap();
            let tensor = Header::open(&path).unwrap().tensors.remove(0);
            let weight = DataFile::open(&path).unwrap().read(&tensor, None).unwrap();
            let Weight::Packed(Packed { words, scales, biases: Some(biases), packing }) = weight else {
                panic!("quantized")
            };
            let Packing { group_size, bits, .. } = packing;
            let dense = |array: &Array| array.as_dtype(Dtype::Float32).unwrap();
            let values =
                dequantize(&words, dense(&scales), Some(&dense(&biases)), Some(group_size), Some(bits))
                    .unwrap();
            assert_eq!(values.shape(), [8, 64]);
            let expected = expected(encoding, &bytes);
            for (index, (one, two)) in values.as_slice::<f32>().iter().zip(&expected).enumerate() {
                assert!(
                    (one - two).abs() <= 1e-6 * two.abs().max(1.0),
                    "{encoding:?} {index}: {one} for {two}"
                );
            }

            // MLX's own loader makes the very same triplet.
            let theirs = mlx_rs::io::GgufFile::load(&path).unwrap();
            for (name, ours) in [("w.weight", &words), ("w.scales", &scales), ("w.biases", &biases)] {
                let theirs = theirs.get_array(name).unwrap().unwrap();
                assert_eq!(
                    (theirs.dtype(), theirs.shape()),
                    (ours.dtype(), ours.shape()),
                    "{encoding:?} {name}"
                );
                assert!(theirs.eq_values(ours).unwrap(), "{encoding:?} {name}");
            }
        }
    }

    #[test]
    fn checkpoint_gguf_biases_are_exact() {
        for half in 0..=u16::MAX {
            let value = float(&half.to_le_bytes());
            for power in [3, 7] {
                let got = times_minus_power_of_two(half, power);
                if half & 0x7c00 == 0x7c00 {
                    assert_eq!(got, half ^ 0x8000);
                    continue;
                }
                let wanted = -value * f32::from(1_u16 << power);
                if wanted.abs() > 65504.0 {
                    assert_eq!(got & 0x7fff, 0x7c00);
                } else {
                    assert_eq!(float(&got.to_le_bytes()), wanted, "{half:04x}");
                }
            }
        }
    }

    #[test]
    fn checkpoint_gguf_heads_are_put_back_in_order() {
        // Two heads of four rows: GGUF holds them as (half 0, half 1) pairs.
        assert_eq!(half_order(8, 2), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(
            reordered(vec![0, 1, 2, 3, 4, 5, 6, 7], Some(&half_order(4, 1)), 4),
            [0, 1, 4, 5, 2, 3, 6, 7]
        );
        assert_eq!(reordered(vec![1, 2, 3], None, 3), [1, 2, 3]);
    }
}
