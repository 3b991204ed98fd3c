//! Models on MLX: weights, KV, the forward pass, sampling. The only crate that touches an `Array`.
//!
//! [`load()`] turns a model's files into an [`engine::Model`]; everything it returns belongs to the calling thread, since
//! MLX's streams and caches are thread-local.

mod attention;
pub mod checkpoint;
pub mod distributed;
mod embed;
pub mod hub;
mod kernels;
mod kv;
mod layers;
mod load;
mod logprobs;
mod models;
mod native;
mod passes;
pub mod pipeline;
mod products;
mod raw;
mod rope;
mod runner;
mod sampler;
mod selftest;
mod step;

pub use checkpoint::LoadError;
pub use embed::{AnyModel, load_any};
pub use load::{Dequantize, DeviceChoice, LoadSettings, load};
pub use models::SUPPORTED;
