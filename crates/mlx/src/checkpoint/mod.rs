//! A model's files, opened: a folder of safetensors or a `.gguf` file becomes a [`Checkpoint`].

mod error;

pub use error::LoadError;
