//! The Linux wheels bring the reference BLAS; an f32 product is some fifty times faster with OpenBLAS.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::relink;

/// Puts the system's OpenBLAS, where there is one, under the name of the BLAS in `libraries`, or the wheel's own back.
pub(crate) fn use_openblas(libraries: &Path, arch: &str) -> io::Result<()> {
    let openblas = candidates(arch).into_iter().find(|path| path.exists());
    match &openblas {
        Some(path) => println!("cargo::rerun-if-changed={}", path.display()),
        None => {
            println!(
                "cargo::warning=OpenBLAS is not installed, so MLX uses the reference BLAS, which is very slow: \
                 install libopenblas0-pthread and build again"
            );
            // Changes when a package is installed.
            let packages = Path::new("/var/lib/dpkg/status");
            if packages.exists() {
                println!("cargo::rerun-if-changed={}", packages.display());
            }
        }
    }
    for entry in fs::read_dir(libraries)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !name.starts_with("libblas-") || name.ends_with(".reference") {
            continue;
        }
        let reference = libraries.join(format!("{name}.reference"));
        if !reference.exists() {
            fs::rename(&path, &reference)?;
        }
        relink(openblas.as_deref().unwrap_or(&reference), &path)?;
    }
    Ok(())
}

/// Where distributions put a threaded OpenBLAS that is a BLAS by itself.
fn candidates(arch: &str) -> Vec<PathBuf> {
    let debian =
        |variant| PathBuf::from(format!("/usr/lib/{arch}-linux-gnu/openblas-{variant}/libblas.so.3"));
    vec![debian("pthread"), debian("openmp"), PathBuf::from("/usr/lib64/libopenblasp.so.0")]
}
