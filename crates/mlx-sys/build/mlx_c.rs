//! mlx-c: where its sources are, compiling them, and bindings to them.

use std::{
    env, panic,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::files;

/// `src/mlx-c` of the published package that `upstream/Cargo.toml` pins.
pub(crate) fn sources(here: &Path) -> Result<PathBuf, String> {
    let manifest = here.join("upstream/Cargo.toml");
    // Cargo says where the package lies; with the network only when it was never fetched.
    let mut output = metadata(&manifest, &["--offline"])?;
    if !output.status.success() {
        output = metadata(&manifest, &[])?;
    }
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("cannot fetch the sources of mlx-c ({}):\n{}", manifest.display(), said.trim()));
    }
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).map_err(|error| format!("cargo metadata: {error}"))?;
    let package = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "mlx-sys")
        .and_then(|package| package["manifest_path"].as_str())
        .ok_or_else(|| format!("{} does not depend on mlx-sys", manifest.display()))?;
    Ok(Path::new(package).with_file_name("src").join("mlx-c"))
}

fn metadata(manifest: &Path, more: &[&str]) -> Result<Output, String> {
    Command::new(env::var_os("CARGO").expect("set by Cargo"))
        .args(["metadata", "--format-version=1", "--locked", "--manifest-path"])
        .arg(manifest)
        .args(more)
        // Flags for our target are none of this inner Cargo's business.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        .output()
        .map_err(|error| format!("cannot run cargo: {error}"))
}

pub(crate) fn compile(mlx_c: &Path, mlx: &Path, compat: &Path) -> Result<(), String> {
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .warnings(false)
        .include(mlx_c)
        .flag("-isystem")
        .flag(mlx.join("include"))
        .flag("-include")
        .flag(compat)
        .files(files(&mlx_c.join("mlx/c"), "cpp")?)
        .try_compile("mlxc")
        .map_err(|error| {
            format!(
                "a C++20 compiler is needed for mlx-c: install g++ 11 or later, or clang (macOS: xcode-select --install)\n\
                 {error}"
            )
        })
}

pub(crate) fn generate_bindings(mlx_c: &Path, compat: &Path, to: &Path) -> Result<(), String> {
    let mut builder = bindgen::Builder::default()
        .clang_arg(format!("-I{}", mlx_c.display()))
        .clang_args(["-include", &compat.display().to_string()]);
    // Half types in function signatures; older libclangs want telling.
    builder = match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
        Ok("aarch64") => builder.clang_arg("-march=armv8.6-a+bf16"),
        Ok("x86_64") => builder.clang_args(["-Xclang", "-fallow-half-arguments-and-returns"]),
        _ => builder,
    };
    for header in files(&mlx_c.join("mlx/c"), "h")? {
        builder = builder.header(header.display().to_string());
    }
    // bindgen panics where it finds no libclang.
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let generated = panic::catch_unwind(panic::AssertUnwindSafe(|| builder.generate()));
    panic::set_hook(hook);
    let bindings = generated
        .map_err(|payload| {
            let said = payload.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            format!(
                "libclang is needed for bindings to mlx-c: install libclang-dev (macOS: xcode-select --install), \
                 or set LIBCLANG_PATH to the folder that has it\n{said}"
            )
        })?
        .map_err(|error| format!("mlx-c's headers do not parse: {error}"))?;
    bindings.write_to_file(to).map_err(|error| format!("cannot write {}: {error}", to.display()))
}
