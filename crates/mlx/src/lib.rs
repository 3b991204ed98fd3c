//! mlx
