//! `mlx-node`: the program.
fn main() {}
