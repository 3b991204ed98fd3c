//! Weights whose elements share scales, in each of MLX's packings, and what is computed with them.
#![expect(
    unsafe_code,
    reason = "calls of the C API, each with its conditions beside it; mlx-rs has no packings"
)]

use crate::raw;
use mlx_rs::{
    Array, Dtype, Stream,
    error::{Exception, Result},
    ops::{concatenate, stack},
};
use std::{ffi::CStr, fmt};

/// What codes and scales stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `code · scale + bias`.
    Affine,
    /// E2M1 codes, E8M0 scales of 32.
    Mxfp4,
    /// E2M1 codes, E4M3 scales of 16.
    Nvfp4,
    /// E4M3 codes, E8M0 scales of 32.
    Mxfp8,
}

impl Mode {
    /// All that MLX knows.
    pub(crate) const ALL: [Self; 4] = [Self::Affine, Self::Mxfp4, Self::Nvfp4, Self::Mxfp8];

    /// As a `config.json` and MLX name it.
    pub fn name(self) -> &'static str {
        self.c_name().to_str().unwrap_or_default()
    }

    /// The one of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    fn c_name(self) -> &'static CStr {
        match self {
            Self::Affine => c"affine",
            Self::Mxfp4 => c"mxfp4",
            Self::Nvfp4 => c"nvfp4",
            Self::Mxfp8 => c"mxfp8",
        }
    }

    /// The only group size and bits that there are, for all but affine packing.
    pub fn fixed(self) -> Option<(i32, i32)> {
        match self {
            Self::Affine => None,
            Self::Mxfp4 => Some((32, 4)),
            Self::Nvfp4 => Some((16, 4)),
            Self::Mxfp8 => Some((32, 8)),
        }
    }
}

/// How the codes of a matrix are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Elements that share a scale.
    pub group_size: i32,
    /// Bits of a code.
    pub bits: i32,
    /// What codes and scales stand for.
    pub mode: Mode,
}

/// Groups of affine packing.
pub(crate) const GROUP_SIZES: [i32; 3] = [32, 64, 128];
/// Bits of affine packing.
pub(crate) const BITS: [i32; 6] = [2, 3, 4, 5, 6, 8];

impl Packing {
    /// Whether MLX has it.
    pub fn exists(self) -> bool {
        match self.mode.fixed() {
            Some(fixed) => fixed == (self.group_size, self.bits),
            None => GROUP_SIZES.contains(&self.group_size) && BITS.contains(&self.bits),
        }
    }
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { group_size, bits, mode } = self;
        match mode {
            Mode::Affine => write!(f, "affine, {bits} bits in groups of {group_size}"),
            mode => write!(f, "{}", mode.name()),
        }
    }
}

/// Matrices `[.., out, in]` whose codes are packed into 32-bit words.
#[derive(Debug, Clone)]
pub struct Packed {
    /// `[.., out, in · bits / 32]`, u32.
    pub words: Array,
    /// `[.., out, in / group_size]`; of one byte each where the packing is not affine.
    pub scales: Array,
    /// Like the scales; affine packing has them.
    pub biases: Option<Array>,
    /// How the codes are packed.
    pub packing: Packing,
}

impl Packed {
    /// Packs `dense`, whose last axis is a multiple of the group.
    ///
    /// # Errors
    /// MLX's, where it has no such packing.
    pub(crate) fn of(dense: &Array, packing: Packing) -> Result<Self> {
        let stream = Stream::thread_local_or_default();
        let none = Missing::new();
        let parts = raw::call_many(&[], |res, _| {
            // SAFETY: live handles; `res` is filled with references of its own.
            unsafe {
                mlx_sys::mlx_quantize(
                    res,
                    dense.as_ptr(),
                    some(packing.group_size),
                    some(packing.bits),
                    packing.mode.c_name().as_ptr(),
                    none.0,
                    stream.as_ptr(),
                )
            }
        });
        let mut parts = parts.unwrap_or_default().into_iter();
        match (parts.next(), parts.next()) {
            (Some(words), Some(scales)) => Ok(Self { words, scales, biases: parts.next(), packing }),
            _ => Err(Exception::custom(format!("{:?} cannot be packed as {packing:?}", dense.shape()))),
        }
    }

    /// `[.., out, in]`.
    pub(crate) fn shape(&self) -> Vec<i32> {
        let mut shape = self.words.shape().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = *last * 32 / self.packing.bits;
        }
        shape
    }

    /// `x [.., in]` times the transpose of the one matrix.
    pub(crate) fn product(&self, x: &Array) -> Result<Array> {
        let stream = Stream::thread_local_or_default();
        let biases = Optional::new(self.biases.as_ref());
        raw::call("quantized_matmul", x, |res| {
            // SAFETY: live handles; `res` is filled.
            unsafe {
                mlx_sys::mlx_quantized_matmul(
                    res,
                    x.as_ptr(),
                    self.words.as_ptr(),
                    self.scales.as_ptr(),
                    biases.handle(),
                    true,
                    some(self.packing.group_size),
                    some(self.packing.bits),
                    self.packing.mode.c_name().as_ptr(),
                    stream.as_ptr(),
                )
            }
        })
    }

    /// Each `x [.., rows, in]` times the transpose of the matrix that `indices` names for it.
    pub(crate) fn gathered_product(&self, x: &Array, indices: &Array, sorted: bool) -> Result<Array> {
        let stream = Stream::thread_local_or_default();
        let (biases, none) = (Optional::new(self.biases.as_ref()), Missing::new());
        raw::call("gather_qmm", x, |res| {
            // SAFETY: live handles; `res` is filled.
            unsafe {
                mlx_sys::mlx_gather_qmm(
                    res,
                    x.as_ptr(),
                    self.words.as_ptr(),
                    self.scales.as_ptr(),
                    biases.handle(),
                    none.0,
                    indices.as_ptr(),
                    true,
                    some(self.packing.group_size),
                    some(self.packing.bits),
                    self.packing.mode.c_name().as_ptr(),
                    sorted,
                    stream.as_ptr(),
                )
            }
        })
    }

    /// The matrices with every element written out.
    pub(crate) fn dense(&self, dtype: Dtype) -> Result<Array> {
        let stream = Stream::thread_local_or_default();
        // Affine ones come in the type of their scales, the others in the one that is asked for: both in f32, so that
        // the only rounding is the one to `dtype`.
        let exact = self.cast(Dtype::Float32)?;
        let (biases, none) = (Optional::new(exact.biases.as_ref()), Missing::new());
        let affine = self.packing.mode == Mode::Affine;
        let wanted =
            mlx_sys::mlx_optional_dtype { value: Dtype::Float32 as mlx_sys::mlx_dtype, has_value: !affine };
        let dense = raw::call("dequantize", &self.words, |res| {
            // SAFETY: live handles; `res` is filled.
            unsafe {
                mlx_sys::mlx_dequantize(
                    res,
                    exact.words.as_ptr(),
                    exact.scales.as_ptr(),
                    biases.handle(),
                    some(self.packing.group_size),
                    some(self.packing.bits),
                    self.packing.mode.c_name().as_ptr(),
                    none.0,
                    wanted,
                    stream.as_ptr(),
                )
            }
        })?;
        if dtype == Dtype::Float32 { Ok(dense) } else { dense.as_dtype(dtype) }
    }

    /// With scales and biases of that type, in which products are computed; scales of one byte stay.
    pub(crate) fn cast(&self, dtype: Dtype) -> Result<Self> {
        if self.packing.mode != Mode::Affine {
            return Ok(self.clone());
        }
        let cast = |array: &Array| {
            if array.dtype() == dtype { Ok(array.clone()) } else { array.as_dtype(dtype) }
        };
        self.each(cast, |words| Ok(words.clone()))
    }

    /// Those rows of the one matrix.
    pub(crate) fn rows(&self, rows: &Array) -> Result<Self> {
        self.each(|array| array.take_axis(rows, 0), |words| words.take_axis(rows, 0))
    }

    /// Matrices of one packing side by side along `axis`.
    pub(crate) fn joined(parts: &[Self], axis: i32) -> Result<Self> {
        Self::combined(parts, |arrays| concatenate(arrays, axis))
    }

    /// Matrices of one packing and shape, one behind another.
    pub(crate) fn stacked(parts: &[Self]) -> Result<Self> {
        Self::combined(parts, |arrays| stack(arrays, 0))
    }

    /// Every array.
    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        [&self.words, &self.scales].into_iter().chain(&self.biases)
    }

    fn combined(parts: &[Self], combine: impl Fn(&[&Array]) -> Result<Array>) -> Result<Self> {
        let [first, ..] = parts else { return Err(Exception::custom("no weights to put together")) };
        let words: Vec<_> = parts.iter().map(|part| &part.words).collect();
        let scales: Vec<_> = parts.iter().map(|part| &part.scales).collect();
        let biases: Option<Vec<_>> = parts.iter().map(|part| part.biases.as_ref()).collect();
        Ok(Self {
            words: combine(&words)?,
            scales: combine(&scales)?,
            biases: biases.map(|biases| combine(&biases)).transpose()?,
            packing: first.packing,
        })
    }

    fn each(
        &self,
        scales: impl Fn(&Array) -> Result<Array>,
        words: impl FnOnce(&Array) -> Result<Array>,
    ) -> Result<Self> {
        Ok(Self {
            words: words(&self.words)?,
            scales: scales(&self.scales)?,
            biases: self.biases.as_ref().map(scales).transpose()?,
            packing: self.packing,
        })
    }
}

fn some(value: i32) -> mlx_sys::mlx_optional_int {
    mlx_sys::mlx_optional_int { value, has_value: true }
}

/// The empty handle that stands for an array that is not there.
struct Missing(mlx_sys::mlx_array);

impl Missing {
    fn new() -> Self {
        // SAFETY: an empty handle, freed with this.
        Self(unsafe { mlx_sys::mlx_array_new() })
    }
}

impl Drop for Missing {
    fn drop(&mut self) {
        // SAFETY: made in `new`, not used afterwards.
        unsafe { mlx_sys::mlx_array_free(self.0) };
    }
}

/// An array that may not be there.
enum Optional<'a> {
    There(&'a Array),
    Missing(Missing),
}

impl<'a> Optional<'a> {
    fn new(array: Option<&'a Array>) -> Self {
        array.map_or_else(|| Self::Missing(Missing::new()), Self::There)
    }

    fn handle(&self) -> mlx_sys::mlx_array {
        match self {
            Self::There(array) => array.as_ptr(),
            Self::Missing(missing) => missing.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_rs::ops::all_close;

    #[test]
    fn every_packing_multiplies_as_its_dense_form() {
        let key = mlx_rs::random::key(5).unwrap();
        let dense = mlx_rs::random::normal::<f32>(&[3, 16, 128], None, None, &key).unwrap();
        let x = mlx_rs::random::normal::<f32>(&[2, 1, 128], None, None, &key).unwrap();
        let affine = [2, 3, 4, 5, 6, 8].map(|bits| Packing { group_size: 64, bits, mode: Mode::Affine });
        let others = Mode::ALL
            .into_iter()
            .filter_map(|mode| mode.fixed().map(|(group_size, bits)| Packing { group_size, bits, mode }));
        for packing in affine.into_iter().chain(others) {
            let packed = Packed::of(&dense, packing).unwrap();
            assert_eq!(packed.shape(), [3, 16, 128], "{packing:?}");
            assert_eq!(packed.biases.is_some(), packing.mode == Mode::Affine, "{packing:?}");
            let whole = packed.dense(Dtype::Float32).unwrap();
            let indices = Array::from_slice(&[2_u32, 0], &[2]);
            let ours = packed.gathered_product(&x, &indices, false).unwrap();
            let theirs = x.matmul(whole.take_axis(&indices, 0).unwrap().swap_axes(1, 2).unwrap()).unwrap();
            assert!(all_close(&ours, &theirs, 1e-4, 1e-4, false).unwrap(), "{packing:?} {ours} {theirs}");
            let one = packed.rows(&Array::from_slice(&[1], &[1])).unwrap();
            assert_eq!(one.shape(), [1, 16, 128]);
        }
        let odd = Packing { group_size: 64, bits: 7, mode: Mode::Affine };
        assert!(Packed::of(&dense, odd).is_err());
    }
}
