//! The official MLX wheels: which one, where from, and that it is the right one.

use std::{
    env, fs,
    io::{self, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use sha2::{Digest, Sha256};

use crate::blas;

/// The MLX that mlx-c 0.7.0 pins.
pub(crate) const MLX_VERSION: &str = "0.32.2";

/// One platform's wheel.
#[derive(Debug, PartialEq, Eq)]
struct Wheel {
    package: &'static str,
    /// pip's name for the platform.
    platform: &'static str,
    sha256: &'static str,
}

/// Hashes of the files as PyPI has them.
const WHEELS: &[Wheel] = &[
    Wheel {
        package: "mlx-metal",
        platform: "macosx_14_0_arm64",
        sha256: "3825fff379dbc107dd3413e564a06caeaa24819910ec49c0439e454c06a1b9b8",
    },
    Wheel {
        package: "mlx-metal",
        platform: "macosx_15_0_arm64",
        sha256: "55a369250d220b2cf10213a87a2ac1b1a420608c5b35b1df4e7147ac8e32f121",
    },
    // Has the kernels for the M5's matrix units, too.
    Wheel {
        package: "mlx-metal",
        platform: "macosx_26_0_arm64",
        sha256: "e6abeac9ac5265830c9c1541b6f96e9be37a85c2446763a46ad466c63a3837ab",
    },
    Wheel {
        package: "mlx-cpu",
        platform: "manylinux_2_35_x86_64",
        sha256: "fc5d31b90fc4f457b2f9614ed45651a567d22a6a11a03d114a90a4e10bdd8878",
    },
    Wheel {
        package: "mlx-cpu",
        platform: "manylinux_2_35_aarch64",
        sha256: "d0f94625588b51a878786dd51cec5617894ce586cf3c94645ce1b64e24c27c0b",
    },
    Wheel {
        package: "mlx-cuda-13",
        platform: "manylinux_2_35_x86_64",
        sha256: "335094ccd1c0c6dc3e09c8caba207c8180602bacc0c38ba20c1d81e9456ab394",
    },
    Wheel {
        package: "mlx-cuda-13",
        platform: "manylinux_2_35_aarch64",
        sha256: "49b1a25df9021f3b519a534fd39a32a5cdbf93a1b265a31e59671c2d9fc9f4a2",
    },
];

/// The folder with the target's `include/` and `lib/`, unpacked into `cache` unless it is there already.
pub(crate) fn unpacked(cache: &Path) -> Result<PathBuf, String> {
    let wheel = Wheel::for_target()?;
    let folder = cache.join(wheel.stem());
    // Written last, with the hash of the wheel; a folder without it is not ours to trust.
    let done = folder.join("complete");
    let is_done = || fs::read_to_string(&done).is_ok_and(|hash| hash == wheel.sha256);
    if !is_done() {
        // Builds of other profiles may be at the same work: each in a folder of its own, the first to finish wins.
        let work = cache.join(format!(".{}-{}", wheel.stem(), std::process::id()));
        let unpacked = wheel.unpack(&work);
        if unpacked.is_ok() && fs::rename(work.join("unpacked"), &folder).is_err() && !is_done() {
            let _ = fs::remove_dir_all(&folder);
            let _ = fs::rename(work.join("unpacked"), &folder);
        }
        let _ = fs::remove_dir_all(&work);
        unpacked?;
        if !is_done() {
            return Err(format!("cannot put {} into {}", wheel.file(), folder.display()));
        }
    }
    println!("cargo::rerun-if-changed={}", done.display());
    if variable("CARGO_CFG_TARGET_OS") == "linux" {
        let libraries = folder.join(format!("{}.libs", wheel.package.replace('-', "_")));
        blas::use_openblas(&libraries, &variable("CARGO_CFG_TARGET_ARCH"))
            .map_err(|error| format!("cannot replace the BLAS in {}: {error}", libraries.display()))?;
    }
    Ok(folder.join("mlx"))
}

impl Wheel {
    fn for_target() -> Result<&'static Self, String> {
        let (os, arch) = (variable("CARGO_CFG_TARGET_OS"), variable("CARGO_CFG_TARGET_ARCH"));
        let backend = variable("MLX_BACKEND");
        let platform = match os.as_str() {
            "macos" => format!("macosx_{}_0_", macos_version()?),
            "linux" => "manylinux_2_35_".to_owned(),
            _ => String::new(),
        } + if os == "macos" && arch == "aarch64" { "arm64" } else { &arch };
        let package = match (os.as_str(), backend.as_str()) {
            ("macos", "" | "metal") => "mlx-metal",
            ("linux", "" | "cpu") => "mlx-cpu",
            ("linux", "cuda") => "mlx-cuda-13",
            _ => "",
        };
        WHEELS.iter().find(|wheel| wheel.package == package && wheel.platform == platform).ok_or_else(|| {
            format!(
                "there is no MLX wheel for {arch} {os} with MLX_BACKEND={backend:?}: \
                 use cpu or cuda on Linux, metal on a Mac with Apple silicon, or set MLX_DIR to an MLX of your own"
            )
        })
    }

    fn stem(&self) -> String {
        format!("{}-{MLX_VERSION}-py3-none-{}", self.package.replace('-', "_"), self.platform)
    }

    fn file(&self) -> String {
        format!("{}.whl", self.stem())
    }

    /// Leaves the wheel's contents in `unpacked` inside `work`.
    fn unpack(&self, work: &Path) -> Result<(), String> {
        let within =
            |error: io::Error| format!("cannot unpack {} into {}: {error}", self.file(), work.display());
        let _ = fs::remove_dir_all(work);
        fs::create_dir_all(work).map_err(within)?;
        unzip(&self.archive(work)?, &work.join("unpacked"))?;
        fs::write(work.join("unpacked/complete"), self.sha256).map_err(within)
    }

    /// The wheel's file, its hash checked: from `MLX_WHEEL_DIR`, or fetched into `work`.
    fn archive(&self, work: &Path) -> Result<PathBuf, String> {
        let own = env::var_os("MLX_WHEEL_DIR").map(|folder| Path::new(&folder).join(self.file()));
        let archive = match own.filter(|path| path.exists()) {
            Some(path) => path,
            None => self.fetch(work)?,
        };
        let found =
            sha256(&archive).map_err(|error| format!("cannot read {}: {error}", archive.display()))?;
        if found == self.sha256 {
            Ok(archive)
        } else {
            Err(format!("{} has SHA-256 {found}, and {} is expected", archive.display(), self.sha256))
        }
    }

    fn fetch(&self, to: &Path) -> Result<PathBuf, String> {
        let offline = format!(
            "without a network, put {} into a folder and set MLX_WHEEL_DIR to it, or set MLX_DIR to an MLX {MLX_VERSION}",
            self.file()
        );
        let pip = Command::new("python3").args(["-m", "pip", "--version"]).stdin(Stdio::null()).output();
        match pip {
            Err(error) => {
                return Err(format!(
                    "python3 is needed to fetch {} ({error}): install python3 and python3-pip\n{offline}",
                    self.file()
                ));
            }
            Ok(output) if !output.status.success() => {
                let said = String::from_utf8_lossy(&output.stderr);
                return Err(format!(
                    "pip is needed to fetch {} ({}): install python3-pip\n{offline}",
                    self.file(),
                    said.trim()
                ));
            }
            Ok(_) => {}
        }
        let output = Command::new("python3")
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"])
            .args(["--platform", self.platform, "--dest"])
            .arg(to)
            .arg(format!("{}=={MLX_VERSION}", self.package))
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("cannot run pip: {error}"))?;
        let archive = to.join(self.file());
        if output.status.success() && archive.exists() {
            return Ok(archive);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(format!("pip could not fetch {}:\n{}\n{offline}", self.file(), said.trim()))
    }
}

/// The major version of the oldest macOS that the program is to run on, of those with a wheel.
fn macos_version() -> Result<u32, String> {
    let asked = variable("MLX_MACOS");
    let version = if !asked.is_empty() {
        asked
    } else if cfg!(target_os = "macos") {
        let output = Command::new("sw_vers").arg("-productVersion").output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    } else {
        "14".to_owned()
    };
    let major = version.trim().split('.').next().and_then(|major| major.parse::<u32>().ok());
    match major {
        Some(14) => Ok(14),
        Some(15..=25) => Ok(15),
        Some(26..) => Ok(26),
        _ => Err(format!("MLX needs macOS 14 or later, not {version:?} (MLX_MACOS can be 14, 15 or 26)")),
    }
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn unzip(archive: &Path, to: &Path) -> Result<(), String> {
    fs::File::open(archive)
        .map_err(zip::result::ZipError::from)
        .and_then(zip::ZipArchive::new)
        .and_then(|mut zip| zip.extract(to))
        .map_err(|error| format!("cannot unpack {}: {error}", archive.display()))
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_default()
}
