//! Compiles mlx-c against a prebuilt MLX and generates bindings.
//!
//! MLX comes from `MLX_DIR` (a folder with `include/` and `lib/`) or else from the official wheel of
//! [`MLX_VERSION`] for the target, fetched with pip into Cargo's output folder. mlx-c's sources are those inside the
//! published `mlx-sys` package, which Cargo fetches for `upstream/Cargo.toml`.

use std::{
    env,
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

/// The MLX that mlx-c 0.7.0 pins.
const MLX_VERSION: &str = "0.32.2";

fn main() {
    for variable in ["MLX_DIR", "MLX_BACKEND"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed=compat.h");
    println!("cargo::rerun-if-changed=upstream/Cargo.toml");

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by Cargo"));
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by Cargo"));
    let mlx = env::var_os("MLX_DIR").map_or_else(|| fetch_wheel(&out), PathBuf::from);
    let mlx_c = mlx_c_sources(&here);
    let compat = here.join("compat.h");

    compile(&mlx_c, &mlx, &compat);
    generate_bindings(&mlx_c, &compat, &out.join("bindings.rs"));

    let lib = mlx.join("lib");
    println!("cargo::rustc-link-search=native={}", lib.display());
    println!("cargo::rustc-link-lib=dylib=mlx");
    // For dependents (DEP_MLX_*): C++ against MLX's headers, and an rpath for the program.
    println!("cargo::metadata=include={}", mlx.join("include").display());
    println!("cargo::metadata=lib={}", lib.display());
    println!("cargo::metadata=version={MLX_VERSION}");
}

/// The wheel that carries MLX for the target, and pip's name for the platform.
fn wheel() -> (String, &'static str) {
    let variable = |name| env::var(name).unwrap_or_default();
    let target = (variable("CARGO_CFG_TARGET_OS"), variable("CARGO_CFG_TARGET_ARCH"));
    let (package, platform) = match (target.0.as_str(), target.1.as_str(), variable("MLX_BACKEND").as_str()) {
        ("macos", "aarch64", "" | "metal") => ("mlx-metal", "macosx_14_0_arm64"),
        ("linux", "x86_64", "" | "cpu") => ("mlx-cpu", "manylinux_2_35_x86_64"),
        ("linux", "aarch64", "" | "cpu") => ("mlx-cpu", "manylinux_2_35_aarch64"),
        ("linux", "x86_64", "cuda") => ("mlx-cuda-13", "manylinux_2_35_x86_64"),
        ("linux", "aarch64", "cuda") => ("mlx-cuda-13", "manylinux_2_35_aarch64"),
        (os, arch, backend) => panic!("no MLX wheel for {arch} {os} with MLX_BACKEND={backend:?}"),
    };
    (format!("{package}=={MLX_VERSION}"), platform)
}

fn fetch_wheel(out: &Path) -> PathBuf {
    let unpacked = out.join("wheel");
    let done = unpacked.join("complete");
    if !done.exists() {
        let (wheel, platform) = wheel();
        let _ = fs::remove_dir_all(&unpacked);
        fs::create_dir_all(&unpacked).expect("output folder is writable");
        let status = Command::new("python3")
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"])
            .args(["--platform", platform, "--dest"])
            .arg(&unpacked)
            .arg(&wheel)
            .status()
            .unwrap_or_else(|error| panic!("python3 is needed to fetch {wheel}: {error}"));
        assert!(
            status.success(),
            "pip could not fetch {wheel}; set MLX_DIR to an MLX {MLX_VERSION} of your own"
        );
        let archive = files(&unpacked, "whl").pop().expect("pip left a wheel");
        zip::ZipArchive::new(fs::File::open(&archive).expect("wheel opens"))
            .and_then(|mut zip| zip.extract(&unpacked))
            .unwrap_or_else(|error| panic!("cannot unpack {}: {error}", archive.display()));
        fs::remove_file(archive).expect("wheel is ours");
        use_fast_blas(&unpacked);
        fs::write(done, wheel).expect("output folder is writable");
    }
    unpacked.join("mlx")
}

/// The Linux wheels bring the reference BLAS; put the system's OpenBLAS in its place where there is one.
fn use_fast_blas(unpacked: &Path) {
    const OPENBLAS: &str = "/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3";
    if !Path::new(OPENBLAS).exists() {
        return;
    }
    for entry in fs::read_dir(unpacked).into_iter().flatten().flatten() {
        for library in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            if library.file_name().to_string_lossy().starts_with("libblas-") {
                let path = library.path();
                fs::remove_file(&path).expect("library is ours");
                #[cfg(unix)]
                std::os::unix::fs::symlink(OPENBLAS, path).expect("output folder is writable");
            }
        }
    }
}

/// `src/mlx-c` of the published package that `upstream/Cargo.toml` pins.
fn mlx_c_sources(here: &Path) -> PathBuf {
    let output = Command::new(env::var_os("CARGO").expect("set by Cargo"))
        .args(["metadata", "--format-version=1", "--manifest-path"])
        .arg(here.join("upstream/Cargo.toml"))
        // Flags for our target are none of this inner Cargo's business.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let manifest = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "mlx-sys")
        .and_then(|package| package["manifest_path"].as_str())
        .expect("upstream/Cargo.toml depends on mlx-sys");
    Path::new(manifest).with_file_name("src").join("mlx-c")
}

fn compile(mlx_c: &Path, mlx: &Path, compat: &Path) {
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .warnings(false)
        .include(mlx_c)
        .flag("-isystem")
        .flag(mlx.join("include"))
        .flag("-include")
        .flag(compat)
        .files(files(&mlx_c.join("mlx/c"), "cpp"))
        .compile("mlxc");
}

fn generate_bindings(mlx_c: &Path, compat: &Path, to: &Path) {
    let mut builder = bindgen::Builder::default()
        .clang_arg(format!("-I{}", mlx_c.display()))
        .clang_args(["-include", &compat.display().to_string()]);
    // Half types in function signatures; older libclangs want telling.
    builder = match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
        Ok("aarch64") => builder.clang_arg("-march=armv8.6-a+bf16"),
        Ok("x86_64") => builder.clang_args(["-Xclang", "-fallow-half-arguments-and-returns"]),
        _ => builder,
    };
    for header in files(&mlx_c.join("mlx/c"), "h") {
        builder = builder.header(header.display().to_string());
    }
    builder
        .generate()
        .expect("mlx-c's headers parse (libclang is needed)")
        .write_to_file(to)
        .expect("output folder is writable");
}

/// Files of one extension in a folder, sorted.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let read = |folder: &Path| -> io::Result<Vec<PathBuf>> {
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect()
    };
    let mut found = read(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    found.retain(|path| path.extension() == Some(OsStr::new(extension)));
    found.sort();
    found
}
