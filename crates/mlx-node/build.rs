//! Tells the linker where the program looks for MLX: `../lib` beside its own folder, as `scripts/package` lays it out,
//! and then, unless the program is to be moved (`MLX_NODE_RELOCATABLE`), the MLX that it is linked against.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=MLX_NODE_RELOCATABLE");
    let origin = match env::var("CARGO_CFG_TARGET_OS").as_deref() {
        Ok("macos") => "@executable_path",
        _ => "$ORIGIN",
    };
    rpath(&format!("{origin}/../lib"));
    if env::var_os("MLX_NODE_RELOCATABLE").is_none() {
        // From crates/mlx-sys.
        rpath(&env::var("DEP_MLX_LIB").expect("mlx-sys is a dependency and says where MLX is"));
    }
}

fn rpath(path: &str) {
    // A cross build for macOS has the linker called by its own name, otherwise a C compiler passes the option on.
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    if flags.contains("linker-flavor=ld64") {
        println!("cargo::rustc-link-arg-bins=-rpath");
        println!("cargo::rustc-link-arg-bins={path}");
    } else {
        println!("cargo::rustc-link-arg-bins=-Wl,-rpath,{path}");
    }
}
