//! Compiles the CPU operations of `cpp/`, where they are used: on macOS MLX's own are vectorized.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=cpp");
    println!("cargo::rustc-check-cfg=cfg(native_cpu)");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return;
    }
    // From mlx-sys: MLX's headers and mlx-c's.
    let folder = |name: &str| {
        env::var_os(name).map(PathBuf::from).unwrap_or_else(|| panic!("{name} is set by mlx-sys"))
    };
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .opt_level(3)
        .flag_if_supported("-Wno-unused-variable")
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        .include(folder("DEP_MLX_MLX_C"))
        .flag("-isystem")
        .flag(folder("DEP_MLX_INCLUDE"))
        .flag("-include")
        .flag(folder("DEP_MLX_COMPAT"))
        .file("cpp/native.cpp")
        .compile("mlx_node_native");
    println!("cargo::rustc-cfg=native_cpu");
}
