//! mlx
pub mod checkpoint;
pub mod hub;
