//! The tensors of a checkpoint under Hugging Face's names, handed out one by one as the model is built.
//!
//! Safetensors stay lazy MLX arrays until they are evaluated; tensors of a `.gguf` file are read when they are taken.

use super::{
    LoadError,
    gguf::TensorInfo,
    gguf_blocks::DataFile,
    quantization::{Quantization, QuantizationParams},
};
use mlx_rs::Array;
use std::{collections::BTreeMap, path::Path, rc::Rc};

/// A matrix of `[out, in]`, dense or in MLX's affine quantization.
#[derive(Debug, Clone)]
pub enum Weight {
    /// Elements as they are.
    Dense(Array),
    /// Codes packed into 32-bit words, with a scale and a bias for each group of a row.
    Quantized {
        /// `[out, in · bits / 32]`, u32.
        words: Array,
        /// `[out, in / group_size]`.
        scales: Array,
        /// `[out, in / group_size]`.
        biases: Array,
        /// Elements that share a scale.
        group_size: i32,
        /// Bits of a code.
        bits: i32,
    },
}

impl Weight {
    /// `[out, in]` of the matrix it stands for (whatever rank a dense array has).
    pub fn shape(&self) -> Vec<i32> {
        match self {
            Self::Dense(array) => array.shape().to_vec(),
            Self::Quantized { words, bits, .. } => {
                let mut shape = words.shape().to_vec();
                if let Some(last) = shape.last_mut() {
                    *last = *last * 32 / bits;
                }
                shape
            }
        }
    }

    /// Bytes of all its arrays.
    pub fn bytes(&self) -> u64 {
        let arrays: &[&Array] = match self {
            Self::Dense(array) => &[array],
            Self::Quantized { words, scales, biases, .. } => &[words, scales, biases],
        };
        arrays.iter().map(|array| array.nbytes() as u64).sum()
    }
}

/// All tensors that were not taken yet.
#[derive(Debug)]
pub struct Tensors {
    entries: BTreeMap<String, Entry>,
    quantization: Quantization,
    /// Where a missing tensor should have been: a file's or an index's path.
    origin: String,
}

#[derive(Debug)]
pub(crate) enum Entry {
    /// An array of a safetensors file, or a vector of a `.gguf` file.
    Lazy { array: Array, file: Rc<Path> },
    /// A matrix of a `.gguf` file, with the heads whose rows are to be put in order.
    Gguf { file: Rc<DataFile>, tensor: TensorInfo, unpermute_heads: Option<usize> },
}

impl Entry {
    fn file(&self) -> String {
        match self {
            Self::Lazy { file, .. } => file.display().to_string(),
            Self::Gguf { file, .. } => file.path.display().to_string(),
        }
    }
}

impl Tensors {
    pub(crate) fn new(entries: BTreeMap<String, Entry>, quantization: Quantization, origin: String) -> Self {
        Self { entries, quantization, origin }
    }

    /// Whether a tensor of that name is there and was not taken.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Whether some of its matrices are quantized.
    pub(crate) fn quantized(&self) -> bool {
        self.entries.iter().any(|(name, entry)| match entry {
            Entry::Lazy { .. } => name.ends_with(".scales"),
            Entry::Gguf { tensor, .. } => tensor.encoding.quantized(),
        })
    }

    /// Takes a dense tensor.
    ///
    /// # Errors
    /// [`LoadError`] where it is missing, cannot be read, or is quantized.
    pub fn take(&mut self, name: &str) -> Result<Array, LoadError> {
        let entry = self.entries.remove(name).ok_or_else(|| self.missing(name))?;
        match entry {
            Entry::Lazy { array, .. } => Ok(array),
            Entry::Gguf { file, tensor, unpermute_heads } => file.read_dense(&tensor, unpermute_heads),
        }
    }

    /// Takes a dense tensor that some models do not have; `None` where it is not there.
    ///
    /// # Errors
    /// As [`Self::take`], where it is there.
    pub fn take_optional(&mut self, name: &str) -> Result<Option<Array>, LoadError> {
        if self.contains(name) { self.take(name).map(Some) } else { Ok(None) }
    }

    /// Takes a dense tensor that must have that shape.
    ///
    /// # Errors
    /// As [`Self::take`], and where its shape is another.
    pub fn take_shaped(&mut self, name: &str, shape: &[i32]) -> Result<Array, LoadError> {
        let origin = self.file_of(name);
        let array = self.take(name)?;
        check_shape(name, origin, array.shape(), shape)?;
        Ok(array)
    }

    /// Takes `<prefix>.weight`, with its `.scales` and `.biases` where it is quantized.
    ///
    /// # Errors
    /// [`LoadError`] where a part is missing, cannot be read, or parts do not fit together.
    pub fn weight(&mut self, prefix: &str) -> Result<Weight, LoadError> {
        let name = format!("{prefix}.weight");
        if let Some(Entry::Gguf { file, tensor, unpermute_heads }) = self.entries.get(&name) {
            let weight = file.read(tensor, *unpermute_heads)?;
            self.entries.remove(&name);
            return Ok(weight);
        }
        let (origin, [scales_name, biases_name]) =
            (self.file_of(&name), ["scales", "biases"].map(|part| format!("{prefix}.{part}")));
        let array = self.take(&name)?;
        if !self.contains(&scales_name) {
            return Ok(Weight::Dense(array));
        }
        let refused =
            |reason: String| LoadError::Tensor { name: name.clone(), origin: origin.clone(), reason };
        let Some(QuantizationParams { group_size, bits }) = self.quantization.of(prefix) else {
            return Err(refused(format!("has {scales_name:?}, but config.json says it is not quantized")));
        };
        let (scales, biases) = (self.take(&scales_name)?, self.take(&biases_name)?);
        let weight = Weight::Quantized { words: array, scales, biases, group_size, bits };
        if let Weight::Quantized { words, scales, biases, .. } = &weight {
            let mut groups = weight.shape();
            let columns = groups.last().copied().unwrap_or_default();
            if let Some(last) = groups.last_mut() {
                *last = columns / group_size;
            }
            let fits = words.dtype() == mlx_rs::Dtype::Uint32
                && columns % group_size == 0
                && scales.shape() == groups
                && biases.shape() == groups;
            if !fits {
                return Err(refused(format!(
                    "is {:?} of {:?} with scales {:?} and biases {:?}, which is not what config.json says: \
                     {bits} bits in groups of {group_size}",
                    words.dtype(),
                    words.shape(),
                    scales.shape(),
                    biases.shape()
                )));
            }
        }
        Ok(weight)
    }

    /// [`Self::weight`] that must stand for a matrix of that shape.
    ///
    /// # Errors
    /// As [`Self::weight`], and where its shape is another.
    pub fn weight_shaped(&mut self, prefix: &str, shape: [i32; 2]) -> Result<Weight, LoadError> {
        let name = format!("{prefix}.weight");
        let origin = self.file_of(&name);
        let weight = self.weight(prefix)?;
        check_shape(&name, origin, &weight.shape(), &shape)?;
        Ok(weight)
    }

    /// Names of tensors that nothing took, but for those that models leave behind on purpose (precomputed rotary
    /// frequencies).
    pub fn leftovers(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str).filter(|name| !name.ends_with("rotary_emb.inv_freq"))
    }

    fn missing(&self, name: &str) -> LoadError {
        LoadError::MissingTensor { name: name.to_owned(), origin: self.origin.clone() }
    }

    fn file_of(&self, name: &str) -> String {
        self.entries.get(name).map_or_else(|| self.origin.clone(), Entry::file)
    }
}

fn check_shape(name: &str, origin: String, found: &[i32], expected: &[i32]) -> Result<(), LoadError> {
    if found == expected {
        return Ok(());
    }
    let reason = format!("has the shape {found:?}; config.json asks for {expected:?}");
    Err(LoadError::Tensor { name: name.to_owned(), origin, reason })
}
