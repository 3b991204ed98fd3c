//! Raw bindings to mlx-c 0.7.0 (MLX 0.32.2).
#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals, clippy::all, missing_docs)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
