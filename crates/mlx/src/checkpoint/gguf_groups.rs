//! The kinds of GGUF blocks whose scales are themselves packed, as codes with a scale and a bias for each few elements.
//!
//! | kind | elements a block, a scale | code | becomes |
//! | --- | --- | --- | --- |
//! | Q5_0, Q5_1 | 32, 32 | 5 bits | the same, exactly |
//! | Q4_K, Q5_K | 256, 32 | 4 or 5 bits | the same, scales rounded to f16 |
//! | Q6_K | 256, 16 | 6 bits | packed anew: 8 bits, groups of 32 |
//! | Q2_K, Q3_K | 256, 16 | 2 or 3 bits | packed anew: 4 bits, groups of 32 |
//!
//! MLX has no groups of 16: those are written out in f32, one tensor at a time, and packed anew.

use super::{
    gguf::{Encoding, TensorInfo},
    gguf_blocks::{GROUP_SIZE, half_order, reordered},
    packed::{Mode, Packed, Packing},
};
use mlx_rs::{Array, Dtype, error::Result};

/// A tensor's elements as `code · scale + bias`.
#[derive(Debug, Default)]
pub(crate) struct Groups {
    codes: Vec<u8>,
    scales: Vec<f32>,
    biases: Vec<f32>,
}

impl Encoding {
    /// How a matrix of that kind is packed once it is read; none where it is dense.
    pub(crate) fn packing(self) -> Option<Packing> {
        let bits = match self {
            Self::F32 | Self::F16 | Self::Bf16 => return None,
            Self::Q2_K | Self::Q3_K | Self::Q4_0 | Self::Q4_1 | Self::Q4_K => 4,
            Self::Q5_0 | Self::Q5_1 | Self::Q5_K => 5,
            Self::Q6_K | Self::Q8_0 => 8,
        };
        Some(Packing { group_size: GROUP_SIZE, bits, mode: Mode::Affine })
    }

    /// Whether reading it changes more than the layout.
    pub(crate) fn packed_anew(self) -> bool {
        matches!(self, Self::Q2_K | Self::Q3_K | Self::Q6_K)
    }
}

impl Groups {
    /// Elements that share a scale.
    fn size(encoding: Encoding) -> usize {
        if encoding.packed_anew() { 16 } else { GROUP_SIZE as usize }
    }

    /// Adds whole blocks.
    pub(crate) fn push(&mut self, encoding: Encoding, bytes: &[u8]) {
        let (_, block_bytes) = encoding.block();
        for block in bytes.chunks_exact(block_bytes as usize) {
            match encoding {
                Encoding::Q5_0 => self.five_bits(half(block, 0), None, &block[2..]),
                Encoding::Q5_1 => self.five_bits(half(block, 0), Some(half(block, 2)), &block[4..]),
                Encoding::Q2_K => self.two_bits(block),
                Encoding::Q3_K => self.three_bits(block),
                Encoding::Q4_K => self.nested(block, None, &block[16..]),
                Encoding::Q5_K => self.nested(block, Some(&block[16..48]), &block[48..]),
                _ => self.six_bits(block),
            }
        }
    }

    /// A fifth bit for each of 32, then 16 bytes of nibbles: low ones first.
    fn five_bits(&mut self, scale: f32, bias: Option<f32>, bits: &[u8]) {
        let high = u32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]);
        let nibbles = &bits[4..20];
        let low = nibbles.iter().map(|byte| byte & 15).chain(nibbles.iter().map(|byte| byte >> 4));
        self.codes.extend(low.enumerate().map(|(at, low)| low | ((high >> at & 1) as u8) << 4));
        self.scales.push(scale);
        self.biases.push(bias.unwrap_or(-16.0 * scale));
    }

    /// Q4_K and Q5_K: scales and minima of 6 bits each; 64 elements take 32 bytes of nibbles, and two bits of `high`.
    fn nested(&mut self, block: &[u8], high: Option<&[u8]>, nibbles: &[u8]) {
        let (scale, least) = (half(block, 0), half(block, 2));
        let packed = &block[4..16];
        for group in 0..8 {
            let (of_scale, of_least) = if group < 4 {
                (packed[group] & 63, packed[group + 4] & 63)
            } else {
                let both = packed[group + 4];
                (both & 15 | packed[group - 4] >> 6 << 4, both >> 4 | packed[group] >> 6 << 4)
            };
            self.scales.push(scale * f32::from(of_scale));
            self.biases.push(-least * f32::from(of_least));
            let bytes = &nibbles[group / 2 * 32..][..32];
            self.codes.extend(bytes.iter().enumerate().map(|(at, byte)| {
                let low = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
                low | high.map_or(0, |high| (high[at] >> group & 1) << 4)
            }));
        }
    }

    fn two_bits(&mut self, block: &[u8]) {
        let (scales, bits) = (&block[..16], &block[16..80]);
        let (scale, least) = (half(block, 80), half(block, 82));
        for (group, both) in scales.iter().enumerate() {
            self.scales.push(scale * f32::from(both & 15));
            self.biases.push(-least * f32::from(both >> 4));
            let (bytes, shift) = sixteen(bits, group);
            self.codes.extend(bytes.iter().map(|byte| byte >> shift & 3));
        }
    }

    fn three_bits(&mut self, block: &[u8]) {
        let (high, bits, packed) = (&block[..32], &block[32..96], &block[96..108]);
        let scale = half(block, 108);
        for group in 0..16 {
            let low = if group < 8 { packed[group] & 15 } else { packed[group - 8] >> 4 };
            let six = low | (packed[8 + group % 4] >> (2 * (group / 4)) & 3) << 4;
            let scale = scale * (f32::from(six) - 32.0);
            self.scales.push(scale);
            self.biases.push(-4.0 * scale);
            let (bytes, shift) = sixteen(bits, group);
            let high = &high[group % 2 * 16..];
            let third = |at: usize| (high[at] >> (group / 2) & 1) << 2;
            self.codes.extend(bytes.iter().enumerate().map(|(at, byte)| byte >> shift & 3 | third(at)));
        }
    }

    fn six_bits(&mut self, block: &[u8]) {
        let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
        let scale = half(block, 208);
        for (group, factor) in scales.iter().enumerate() {
            let scale = scale * f32::from(factor.cast_signed());
            self.scales.push(scale);
            self.biases.push(-32.0 * scale);
            // Of each half of the block: four runs of 32, of which the first two have the low nibbles.
            let (half, run, first) = (group / 8, group % 8 / 2, group % 2 * 16);
            let nibbles = &low[half * 64 + run % 2 * 32 + first..][..16];
            let pairs = &high[half * 32 + first..][..16];
            self.codes.extend(nibbles.iter().zip(pairs).map(|(nibble, pair)| {
                let nibble = if run < 2 { nibble & 15 } else { nibble >> 4 };
                nibble | (pair >> (2 * run) & 3) << 4
            }));
        }
    }

    /// The tensor as MLX packs it, with the rows of so many heads put in order.
    pub(crate) fn packed(self, tensor: &TensorInfo, unpermute_heads: Option<usize>) -> Result<Packed> {
        let encoding = tensor.encoding;
        let Some(packing) = encoding.packing() else { unreachable!("these kinds are packed") };
        let rows = tensor.shape.first().map_or(1, |&rows| rows as usize);
        let order = unpermute_heads.map(|heads| half_order(rows, heads));
        let size = Self::size(encoding);
        if encoding.packed_anew() {
            let groups = self.codes.chunks_exact(size).zip(self.scales.iter().zip(&self.biases));
            let value = |(codes, (scale, bias)): (&[u8], (&f32, &f32))| -> Vec<f32> {
                codes.iter().map(|&code| f32::from(code) * scale + bias).collect()
            };
            let values = reordered(groups.flat_map(value).collect(), order.as_deref(), rows);
            return Packed::of(&Array::from_slice(&values, &tensor.shape), packing)?.cast(Dtype::Float16);
        }
        let bits = packing.bits as usize;
        let words: Vec<u32> = self.codes.chunks_exact(size).flat_map(|codes| words(codes, bits)).collect();
        let of = |each: usize| {
            let mut shape = tensor.shape.clone();
            if let Some(last) = shape.last_mut() {
                *last = *last / GROUP_SIZE * each as i32;
            }
            shape
        };
        let order = order.as_deref();
        let halves = |values: Vec<f32>| {
            Array::from_slice(&reordered(values, order, rows), &of(1)).as_dtype(Dtype::Float16)
        };
        Ok(Packed {
            words: Array::from_slice(&reordered(words, order, rows), &of(bits)),
            scales: halves(self.scales)?,
            biases: Some(halves(self.biases)?),
            packing,
        })
    }
}

/// The bytes of group `group` of 16, two bits each, and how far they are shifted: 128 elements take 32 bytes.
fn sixteen(bits: &[u8], group: usize) -> (&[u8], usize) {
    (&bits[group / 8 * 32 + group % 2 * 16..][..16], group % 8 / 2 * 2)
}

/// 32 codes in as many words as they have bits, the first in the lowest bits.
fn words(codes: &[u8], bits: usize) -> Vec<u32> {
    let mut words = Vec::with_capacity(bits);
    let (mut held, mut count) = (0_u64, 0);
    for &code in codes {
        held |= u64::from(code) << count;
        count += bits;
        if count >= 32 {
            words.push(held as u32);
            held >>= 32;
            count -= 32;
        }
    }
    words
}

/// The f16 at a place.
fn half(bytes: &[u8], at: usize) -> f32 {
    let bits = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let (sign, exponent, fraction) = (bits >> 15, bits >> 10 & 31, bits & 0x3ff);
    let magnitude = match exponent {
        0 => f32::from(fraction) * 2_f32.powi(-24),
        31 => f32::from_bits(0x7f80_0000 | u32::from(fraction) << 13),
        _ => f32::from_bits((u32::from(exponent) + 112) << 23 | u32::from(fraction) << 13),
    };
    if sign == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Weight, gguf::Header, gguf_blocks::DataFile, gguf_writer::GgufWriter};
    use serde::Deserialize;

    #[derive(Deserialize)]
    struct Golden {
        kind: String,
        /// Of two rows of one block, or of eight.
        hex: String,
        values: Vec<f32>,
    }

    #[test]
    fn checkpoint_gguf_groups_hold_what_the_file_holds() {
        let goldens: Vec<Golden> =
            serde_json::from_str(include_str!("../../../../tests/goldens/gguf_blocks.json")).unwrap();
        let kinds = [
            ("Q5_0", Encoding::Q5_0),
            ("Q5_1", Encoding::Q5_1),
            ("Q2_K", Encoding::Q2_K),
            ("Q3_K", Encoding::Q3_K),
            ("Q4_K", Encoding::Q4_K),
            ("Q5_K", Encoding::Q5_K),
            ("Q6_K", Encoding::Q6_K),
        ];
        assert_eq!(goldens.len(), kinds.len());
        for (golden, (name, encoding)) in goldens.iter().zip(kinds) {
            assert_eq!(golden.kind, name);
            let digits = |at: usize| u8::from_str_radix(&golden.hex[2 * at..2 * at + 2], 16).unwrap();
            let bytes: Vec<u8> = (0..golden.hex.len() / 2).map(digits).collect();
            let mut groups = Groups::default();
            groups.push(encoding, &bytes);
            let size = Groups::size(encoding);
            for (at, (&code, wanted)) in groups.codes.iter().zip(&golden.values).enumerate() {
                let got = f32::from(code) * groups.scales[at / size] + groups.biases[at / size];
                assert!(
                    (got - wanted).abs() <= 1e-6 * wanted.abs().max(1.0),
                    "{name} {at}: {got} for {wanted}"
                );
            }
            // And as MLX packs it.
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.gguf");
            let writer = GgufWriter::new().tensor("w.weight", &[2, 256], encoding, &bytes);
            std::fs::write(&path, writer.finish()).unwrap();
            let tensor = Header::open(&path).unwrap().tensors.remove(0);
            let weight = DataFile::open(&path).unwrap().read(&tensor, None).unwrap();
            assert!(matches!(&weight, Weight::Packed(packed) if Some(packed.packing) == encoding.packing()));
            let values = weight.dense(Dtype::Float32).unwrap();
            let largest = golden.values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            // Of the range of a group: a step of 4 or 8 bits, or f16's rounding of the scale.
            let tolerance =
                largest * if matches!(encoding, Encoding::Q2_K | Encoding::Q3_K) { 0.14 } else { 0.01 };
            for (at, (got, wanted)) in values.as_slice::<f32>().iter().zip(&golden.values).enumerate() {
                assert!((got - wanted).abs() <= tolerance, "{name} {at}: {got} for {wanted}");
            }
        }
    }

    #[test]
    fn checkpoint_halves_are_read() {
        for (bits, value) in
            [(0x3c00_u16, 1.0), (0xc000, -2.0), (1, 2_f32.powi(-24)), (0x7bff, 65504.0), (0x8000, 0.0)]
        {
            assert_eq!(half(&bits.to_le_bytes(), 0), value, "{bits:04x}");
        }
        assert!(half(&0x7c00_u16.to_le_bytes(), 0).is_infinite());
    }
}
