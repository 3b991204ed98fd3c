//! Compiles mlx-c against a prebuilt MLX and generates bindings.
//!
//! MLX comes from `MLX_DIR` (a folder with `include/` and `lib/`) or else from the official wheel for the target
//! ([`wheel`]), unpacked once for all profiles under the target folder. mlx-c's sources are those inside the published
//! `mlx-sys` package, which Cargo fetches for `upstream/Cargo.toml` ([`mlx_c`]).
//!
//! Read from the environment:
//! - `MLX_DIR`: an MLX of your own, of [`wheel::MLX_VERSION`];
//! - `MLX_BACKEND`: `cpu` (default) or `cuda` on Linux, `metal` on macOS;
//! - `MLX_MACOS`: the oldest macOS (`14`, `15`, `26`) to run on; default is the building Mac's own, or 14 elsewhere;
//! - `MLX_WHEEL_DIR`: a folder of wheels to look into before asking pip, for building without a network.

mod blas;
mod mlx_c;
mod wheel;

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            for line in message.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    for variable in ["MLX_DIR", "MLX_BACKEND", "MLX_MACOS", "MLX_WHEEL_DIR"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    for source in ["compat.h", "upstream/Cargo.toml", "upstream/Cargo.lock"] {
        println!("cargo::rerun-if-changed={source}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by Cargo"));
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by Cargo"));

    let mlx = match env::var_os("MLX_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => own_mlx(Path::new(&dir))?,
        None => wheel::unpacked(&cache(&out))?,
    };
    let sources = mlx_c::sources(&here)?;
    let compat = here.join("compat.h");
    mlx_c::compile(&sources, &mlx, &compat)?;
    mlx_c::generate_bindings(&sources, &compat, &out.join("bindings.rs"))?;

    // Cargo puts search paths inside the profile's folder, and no others, on the library path of what it runs.
    let link = out.join("mlx");
    relink(&mlx, &link).map_err(|error| format!("cannot link {}: {error}", link.display()))?;
    println!("cargo::rustc-link-search=native={}", link.join("lib").display());
    println!("cargo::rustc-link-lib=dylib=mlx");
    // For dependents (DEP_MLX_*): C++ against MLX's headers, and an rpath for the program.
    println!("cargo::metadata=include={}", mlx.join("include").display());
    println!("cargo::metadata=lib={}", mlx.join("lib").display());
    println!("cargo::metadata=version={}", wheel::MLX_VERSION);
    println!("cargo::metadata=mlx_c={}", sources.display());
    println!("cargo::metadata=compat={}", compat.display());
    Ok(())
}

fn own_mlx(dir: &Path) -> Result<PathBuf, String> {
    let header = dir.join("include/mlx/version.h");
    let text = fs::read_to_string(&header)
        .map_err(|error| format!("MLX_DIR={}: cannot read {}: {error}", dir.display(), header.display()))?;
    let number = |name: &str| {
        text.lines()
            .find_map(|line| {
                line.strip_prefix("#define MLX_VERSION_")?.strip_prefix(name)?.trim().parse::<u32>().ok()
            })
            .map_or_else(|| "?".to_owned(), |number| number.to_string())
    };
    let version = format!("{}.{}.{}", number("MAJOR"), number("MINOR"), number("PATCH"));
    if version != wheel::MLX_VERSION {
        return Err(format!(
            "MLX_DIR={} holds MLX {version}, and mlx-c needs {}",
            dir.display(),
            wheel::MLX_VERSION
        ));
    }
    println!("cargo::rerun-if-changed={}", header.display());
    fs::canonicalize(dir).map_err(|error| format!("MLX_DIR={}: {error}", dir.display()))
}

/// Where the unpacked wheels lie: the outermost folder above `out` that Cargo marked as its own, so that profiles and
/// targets share them and `cargo clean -p` leaves them alone.
fn cache(out: &Path) -> PathBuf {
    let target = out.ancestors().filter(|folder| folder.join("CACHEDIR.TAG").exists()).last();
    target.unwrap_or(out).join("mlx-wheels")
}

/// Makes `link` point at `to`, whatever it was before; other processes see the old one or the new one.
fn relink(to: &Path, link: &Path) -> io::Result<()> {
    if fs::read_link(link).is_ok_and(|old| old == to) {
        return Ok(());
    }
    let new = link.with_extension(format!("new-{}", std::process::id()));
    let _ = fs::remove_file(&new);
    std::os::unix::fs::symlink(to, &new)?;
    fs::rename(&new, link)
}

/// Files of one extension in a folder, sorted.
fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    let read =
        || -> io::Result<Vec<PathBuf>> { fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect() };
    let mut found = read().map_err(|error| format!("cannot read {}: {error}", folder.display()))?;
    found.retain(|path| path.extension().is_some_and(|found| found == extension));
    found.sort();
    Ok(found)
}
