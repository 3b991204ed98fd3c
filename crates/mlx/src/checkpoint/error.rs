//! Why a model could not be loaded: every message names the file or tensor, the value found and what to do.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why a model's files could not be opened, or do not hold what the model needs.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file or folder is not there.
    #[error("{}: there is no such file ({needed_for})", path.display())]
    MissingFile {
        /// Where it should be.
        path: PathBuf,
        /// What it is needed for.
        needed_for: String,
    },
    /// The system refused to read it.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not what its name says: cut off, overwritten or not that format at all.
    #[error("{}: damaged: {reason}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// The file is sound but uses something that is not supported here.
    #[error("{}: not supported: {reason}", path.display())]
    Unsupported {
        /// Which file.
        path: PathBuf,
        /// What it uses, and what to use instead.
        reason: String,
    },
    /// A model family that is not implemented.
    #[error("the model type {model_type:?} is not supported; supported: {}", supported.join(", "))]
    UnsupportedModelType {
        /// As the model's files name it.
        model_type: String,
        /// What there is.
        supported: Vec<&'static str>,
    },
    /// The configuration asks for something that is not supported here, or contradicts itself.
    #[error("the model's configuration: {reason}")]
    Config {
        /// The setting, its value and what would do.
        reason: String,
    },
    /// A tensor that the model needs is in none of its files.
    #[error("the tensor {name:?} is missing from {origin}")]
    MissingTensor {
        /// Its name, as Hugging Face names it.
        name: String,
        /// The file or index that should have it.
        origin: String,
    },
    /// A tensor is there but not as the configuration says.
    #[error("the tensor {name:?} in {origin} {reason}")]
    Tensor {
        /// Its name.
        name: String,
        /// The file that holds it.
        origin: String,
        /// What it is and what it should be.
        reason: String,
    },
    /// The weights do not fit.
    #[error("the model needs {:.1} GB of memory and {:.1} GB are available", gigabytes(*needed), gigabytes(*available))]
    TooLittleMemory {
        /// Bytes that it needs.
        needed: u64,
        /// Bytes that there are.
        available: u64,
    },
    /// MLX refused.
    #[error("{what}: {message}")]
    Mlx {
        /// What was being done.
        what: String,
        /// What MLX said.
        message: String,
    },
}

impl LoadError {
    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), reason: reason.into() }
    }

    pub(crate) fn unsupported(path: &Path, reason: impl Into<String>) -> Self {
        Self::Unsupported { path: path.to_owned(), reason: reason.into() }
    }
}

impl From<mlx_rs::error::Exception> for LoadError {
    fn from(error: mlx_rs::error::Exception) -> Self {
        Self::Mlx { what: "preparing the weights".to_owned(), message: error.what().to_owned() }
    }
}

fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}
