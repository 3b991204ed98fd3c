//! The tensors of a checkpoint under Hugging Face's names, handed out one by one as the model is built.
//!
//! Safetensors stay lazy MLX arrays until they are evaluated; tensors of a `.gguf` file are read when they are taken.

use super::packed::{Mode, Packed, Packing};
use super::{LoadError, gguf::TensorInfo, gguf_blocks::DataFile, quantization::Quantization};
use mlx_rs::{Array, Dtype, error::Exception};
use std::{collections::BTreeMap, path::Path, rc::Rc};

/// A matrix of `[out, in]`, or several `[n, out, in]`, dense or packed.
#[derive(Debug, Clone)]
pub enum Weight {
    /// Elements as they are.
    Dense(Array),
    /// Elements that share scales.
    Packed(Packed),
}

impl Weight {
    /// `[.., out, in]` of what it stands for (whatever rank a dense array has).
    pub fn shape(&self) -> Vec<i32> {
        match self {
            Self::Dense(array) => array.shape().to_vec(),
            Self::Packed(packed) => packed.shape(),
        }
    }

    /// Bytes of all its arrays.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Dense(array) => array.nbytes() as u64,
            Self::Packed(packed) => packed.arrays().map(|array| array.nbytes() as u64).sum(),
        }
    }

    /// Every element written out.
    pub(crate) fn dense(&self, dtype: Dtype) -> Result<Array, Exception> {
        match self {
            Self::Dense(array) if array.dtype() == dtype => Ok(array.clone()),
            Self::Dense(array) => array.as_dtype(dtype),
            Self::Packed(packed) => packed.dense(dtype),
        }
    }

    /// Those rows of the one matrix.
    pub(crate) fn rows(&self, rows: &Array) -> Result<Self, Exception> {
        match self {
            Self::Dense(array) => array.take_axis(rows, 0).map(Self::Dense),
            Self::Packed(packed) => packed.rows(rows).map(Self::Packed),
        }
    }
}

/// What one matrix or vector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) elements: u64,
    /// In the file, scales and biases included.
    pub(crate) bytes: u64,
    pub(crate) packing: Option<Packing>,
}

impl Size {
    /// Bytes once it is loaded, dense elements of so many each.
    pub(crate) fn loaded(&self, dequantize: bool, element: u64) -> u64 {
        match self.packing {
            Some(_) if !dequantize => self.bytes,
            _ => self.elements * element,
        }
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

    /// Arrays under their names, with what a configuration says of their quantization.
    #[cfg(test)]
    pub(crate) fn of_arrays(
        arrays: impl IntoIterator<Item = (String, Array)>,
        config: &serde_json::Value,
    ) -> Result<Self, LoadError> {
        let file: Rc<Path> = Path::new("memory").into();
        let lazy = |(name, array)| (name, Entry::Lazy { array, file: file.clone() });
        let quantization = Quantization::parse(config, &file)?;
        Ok(Self::new(arrays.into_iter().map(lazy).collect(), quantization, "memory".to_owned()))
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

    /// Every name, in order.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The shape of what is under a name, as it is stored.
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<i32>> {
        self.entries.get(name).map(|entry| match entry {
            Entry::Lazy { array, .. } => array.shape().to_vec(),
            Entry::Gguf { tensor, .. } => tensor.shape.clone(),
        })
    }

    /// What each matrix or vector holds, told by shapes alone, by the name of its largest tensor.
    pub(crate) fn sizes(&self) -> Vec<(&str, Size)> {
        let mut sizes = Vec::new();
        let elements = |shape: &[i32]| shape.iter().map(|&length| u64::from(length.unsigned_abs())).product();
        for (name, entry) in &self.entries {
            let array = match entry {
                Entry::Gguf { tensor, .. } => {
                    let packing = tensor.encoding.packing();
                    let elements: u64 = elements(&tensor.shape);
                    // A scale and a bias of two bytes for each group, as it is once read.
                    let bytes = packing.map_or(tensor.bytes, |packing| {
                        let (bits, group) = (packing.bits.unsigned_abs(), packing.group_size.unsigned_abs());
                        elements * u64::from(bits) / 8 + elements / u64::from(group) * 4
                    });
                    sizes.push((name.as_str(), Size { elements, bytes, packing }));
                    continue;
                }
                Entry::Lazy { array, .. } => array,
            };
            let prefix = name.strip_suffix(".weight").unwrap_or_default();
            let scales = self.entries.get(&format!("{prefix}.scales"));
            if let (Some(Entry::Lazy { array: scales, .. }), Some(packing)) =
                (scales, self.quantization.of(prefix))
            {
                let arrays = if packing.mode == Mode::Affine { 2 } else { 1 };
                let size = Size {
                    elements: elements(array.shape()) * 32 / u64::from(packing.bits.unsigned_abs()),
                    bytes: (array.nbytes() + arrays * scales.nbytes()) as u64,
                    packing: Some(packing),
                };
                sizes.push((name.as_str(), size));
            } else if let Some(scales) =
                name.strip_suffix("_blocks").and_then(|prefix| self.entries.get(&format!("{prefix}_scales")))
            {
                let scales = match scales {
                    Entry::Lazy { array, .. } => array.nbytes(),
                    Entry::Gguf { .. } => 0,
                };
                let packing = Some(Packing { group_size: 32, bits: 4, mode: Mode::Mxfp4 });
                let bytes = (array.nbytes() + scales) as u64;
                sizes.push((name.as_str(), Size { elements: 2 * elements(array.shape()), bytes, packing }));
            } else if !["scales", "biases"].iter().any(|part| name.ends_with(&format!(".{part}")))
                && !name.ends_with("_scales")
            {
                let bytes = array.nbytes() as u64;
                let size = Size { elements: elements(array.shape()), bytes, packing: None };
                sizes.push((name.as_str(), size));
            }
        }
        sizes
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

    /// A dense tensor, which stays.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub(crate) fn get(&self, name: &str) -> Result<Array, LoadError> {
        match self.entries.get(name) {
            Some(Entry::Lazy { array, .. }) => Ok(array.clone()),
            Some(Entry::Gguf { file, tensor, unpermute_heads }) => file.read_dense(tensor, *unpermute_heads),
            None => Err(self.missing(name)),
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
        let Some(packing) = self.quantization.of(prefix) else {
            return Err(refused(format!("has {scales_name:?}, but config.json says it is not quantized")));
        };
        let affine = packing.mode == Mode::Affine;
        let scales = self.take(&scales_name)?;
        let biases = if affine { Some(self.take(&biases_name)?) } else { None };
        let packed = Packed { words: array, scales, biases, packing };
        let mut groups = packed.shape();
        let columns = groups.last().copied().unwrap_or_default();
        if let Some(last) = groups.last_mut() {
            *last = columns / packing.group_size;
        }
        let Packed { words, scales, biases, .. } = &packed;
        let fits = words.dtype() == Dtype::Uint32
            && columns % packing.group_size == 0
            && scales.shape() == groups
            && (affine || scales.dtype() == Dtype::Uint8)
            && biases.as_ref().is_none_or(|biases| biases.shape() == groups);
        if !fits {
            return Err(refused(format!(
                "is {:?} of {:?} with scales {:?} of {:?}, which is not what config.json says: {} with {} bits in \
                 groups of {}",
                words.dtype(),
                words.shape(),
                scales.dtype(),
                scales.shape(),
                packing.mode.name(),
                packing.bits,
                packing.group_size
            )));
        }
        Ok(Weight::Packed(packed))
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
