//! Holds the repository to its own rules: which crate may use which, how long a file may be, and what is named where.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Edges between the workspace's crates, dev-dependencies on `testkit` aside (design: "Crates and allowed edges").
const EDGES: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("engine", &["types"]),
    ("mlx", &["engine", "types", "mlx-sys"]),
    ("router", &["types"]),
    ("wire", &["types"]),
    ("transport", &["wire", "types"]),
    ("discovery", &["types"]),
    ("node", &["engine", "router", "transport", "discovery", "wire", "types"]),
    ("api", &["types"]),
    // All but testkit; mlx-sys because its metadata holds the rpath.
    (
        "mlx-node",
        &[
            "types",
            "engine",
            "mlx",
            "router",
            "wire",
            "transport",
            "discovery",
            "node",
            "api",
            "bench",
            "mlx-sys",
        ],
    ),
    // The last four for what it compares whole processes with, and for ranks joined as nodes join them.
    ("bench", &["types", "engine", "mlx", "router", "api", "node", "transport", "wire"]),
    // Only ever a dev-dependency of the others.
    ("testkit", &["types", "engine"]),
    ("mlx-sys", &[]),
    ("mach-sys", &[]),
];

/// May use any crate, nothing uses it.
const TEST_CRATES: &[&str] = &["cluster-tests"];

/// Twelve and the two build adapters.
const CRATES_MAX: usize = 14;

/// A file is looked at again at 500 lines, and split before it has more than this.
const LINES_MAX: usize = 800;

#[test]
fn crates_use_only_what_the_design_allows() {
    let mut faults = Faults::default();
    let packages = packages();
    let members: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    for package in packages.iter().filter(|package| !TEST_CRATES.contains(&package.name.as_str())) {
        let Some((_, allowed)) = EDGES.iter().find(|(name, _)| *name == package.name) else {
            faults
                .add(&package.manifest, format_args!("crate {} is not in the design's table", package.name));
            continue;
        };
        for (used, dev) in package.uses.iter().filter(|(used, _)| members.contains(used.as_str())) {
            let fine = allowed.contains(&used.as_str()) || (*dev && used == "testkit");
            if !fine {
                faults.add(
                    &package.manifest,
                    format_args!("{} may not depend on {used} (allowed: {allowed:?})", package.name),
                );
            }
        }
    }
    let gone: Vec<&str> =
        EDGES.iter().map(|(name, _)| *name).filter(|name| !members.contains(name)).collect();
    assert!(gone.is_empty(), "crates of the table that the workspace does not have: {gone:?}");
    assert!(EDGES.len() <= CRATES_MAX, "more crates need a change of the design first");
    faults.check();
}

#[test]
fn edges_have_no_cycle() {
    let mut done: BTreeSet<&str> = BTreeSet::new();
    while done.len() < EDGES.len() {
        let next: Vec<&str> = EDGES
            .iter()
            .filter(|(name, uses)| !done.contains(name) && uses.iter().all(|used| done.contains(used)))
            .map(|(name, _)| *name)
            .collect();
        assert!(!next.is_empty(), "the table of edges has a cycle beyond {done:?}");
        done.extend(next);
    }
}

#[test]
fn files_are_short() {
    let mut faults = Faults::default();
    for file in rust_files() {
        let lines = file.text.lines().count();
        if lines > LINES_MAX {
            faults.add(&file.path, format_args!("{lines} lines, at most {LINES_MAX}"));
        }
    }
    faults.check();
}

#[test]
fn crates_have_a_module_doc() {
    let mut faults = Faults::default();
    for package in packages() {
        let roots = ["src/lib.rs", "src/main.rs"].map(|file| package.manifest.with_file_name(file));
        let roots: Vec<&PathBuf> = roots.iter().filter(|file| file.exists()).collect();
        if roots.is_empty() {
            faults.add(&package.manifest, "neither src/lib.rs nor src/main.rs");
        }
        for file in roots {
            if !read(file).starts_with("//! ") {
                faults.add(file, "no module doc (`//!`) first, which says what the crate is for");
            }
        }
    }
    faults.check();
}

/// bincode is no longer developed, and is to be replaceable by changing one file.
#[test]
fn bincode_is_named_in_one_file() {
    let mut naming = rust_files();
    naming
        .retain(|file| file.path.components().any(|part| part.as_os_str() == "src") && file.names("bincode"));
    let naming: Vec<PathBuf> = naming.into_iter().map(|file| file.path).collect();
    assert!(naming.len() <= 1, "bincode is named in more than one file: {naming:?}");
}

#[test]
fn only_node_names_ractor() {
    let mut faults = Faults::default();
    for package in packages() {
        if package.name != "node" && package.uses.iter().any(|(used, _)| used.starts_with("ractor")) {
            faults.add(&package.manifest, "depends on ractor, which belongs to crates/node alone");
        }
    }
    faults.find("ractor", &["crates/node/"]);
    faults.check();
}

#[test]
fn unsafe_code_stays_where_it_belongs() {
    let mut faults = Faults::default();
    faults.find("unsafe", &["crates/mlx/", "crates/mlx-sys/", "crates/mach-sys/"]);
    faults.check();
}

/// Such names mean nothing, or something else, on another machine.
#[test]
fn no_file_names_a_machine() {
    // Put together here, so that this file does not name them itself.
    let hosts = [["crates", "io"], ["pypi", "org"], ["pythonhosted", "org"], ["npmjs", "org"]];
    let hosts = hosts.map(|parts| parts.join("."));
    let folders = ["work", "home", "root", "Users", "opt/wheels"].map(|first| format!("/{first}/"));
    let mut faults = Faults::default();
    for path in tracked() {
        // Written by Cargo, which names its registry.
        if path.file_name().is_some_and(|name| name == "Cargo.lock") {
            continue;
        }
        let Ok(text) = fs::read_to_string(root().join(&path)) else { continue };
        for (number, line) in text.lines().enumerate() {
            let host = hosts.iter().find(|host| names_host(line, host));
            let folder = folders.iter().find(|folder| names_folder(line, folder));
            if let Some(found) = host.or(folder) {
                faults.add(&path, format_args!("line {} names {found}", number + 1));
            }
        }
    }
    faults.check();
}

#[test]
fn the_checks_see_what_they_look_for() {
    let file = |text: &str| File { path: PathBuf::new(), text: text.to_owned() };
    assert!(file("    unsafe { f() }").names("unsafe"));
    assert!(file("use ractor::Actor;").names("ractor"));
    assert!(file("f(\"text\"); unsafe { g() }").names("unsafe"));
    assert!(!file("// unsafe in a comment").names("unsafe"));
    assert!(!file("let text = \"unsafe\";").names("unsafe"));
    assert!(!file("#![deny(unsafe_code)]").names("unsafe"));

    let host = ["pypi", "org"].join(".");
    assert!(names_host(&format!("https://{host}/simple"), &host));
    assert!(names_host(&format!("https://index.{host}"), &host));
    assert!(!names_host("[patch.crates-io]", &["crates", "io"].join(".")));

    let folder = format!("/{}/", "work");
    assert!(names_folder(&format!("cd {folder}main"), &folder));
    assert!(names_folder(&format!("\"{folder}main\""), &folder));
    assert!(!names_folder(&format!("$out{folder}x"), &folder));
    assert!(!names_folder(&format!("../a{folder}x"), &folder));
}

/// An address, so not `patch.crates-io` and the like, which are Cargo's own words.
fn names_host(line: &str, host: &str) -> bool {
    line.match_indices(host).any(|(at, _)| line[..at].ends_with("://") || line[..at].ends_with('.'))
}

/// An absolute path, so not a part of a relative one, nor of one that begins with a variable.
fn names_folder(line: &str, folder: &str) -> bool {
    let part = |before: char| before.is_alphanumeric() || "-_.~*/}])>$".contains(before);
    line.match_indices(folder).any(|(at, _)| !line[..at].ends_with(part))
}

#[derive(Debug)]
struct Package {
    name: String,
    manifest: PathBuf,
    /// Name, and whether it is a dev-dependency.
    uses: BTreeSet<(String, bool)>,
}

fn packages() -> Vec<Package> {
    let output = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("metadata lists packages");
    let text = |value: &serde_json::Value| value.as_str().expect("a string").to_owned();
    let dependency = |used: &serde_json::Value| (text(&used["name"]), used["kind"] == "dev");
    packages
        .iter()
        .map(|package| Package {
            name: text(&package["name"]),
            manifest: PathBuf::from(text(&package["manifest_path"])),
            uses: package["dependencies"].as_array().expect("a list").iter().map(dependency).collect(),
        })
        .collect()
}

#[derive(Debug)]
struct File {
    path: PathBuf,
    text: String,
}

impl File {
    /// Whether the code, comments and strings aside, has `word` as a word of its own.
    fn names(&self, word: &str) -> bool {
        let in_word = |c: char| c.is_alphanumeric() || c == '_';
        self.text.lines().any(|line| {
            let code = line.split("//").next().unwrap_or_default();
            let code = code.replace("\\\"", "").replace("'\"'", "");
            // Every other piece between quotes is a string, as far as one line shows.
            code.split('"').step_by(2).any(|code| code.split(|c| !in_word(c)).any(|found| found == word))
        })
    }
}

fn rust_files() -> Vec<File> {
    let mut paths = tracked();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    assert!(paths.len() >= CRATES_MAX, "found {} Rust files", paths.len());
    paths.into_iter().map(|path| File { text: read(&root().join(&path)), path }).collect()
}

/// Every file that git has or would add, relative to the repository's root.
fn tracked() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8(output.stdout).expect("file names are UTF-8");
    names.split_terminator('\0').map(PathBuf::from).filter(|path| root().join(path).is_file()).collect()
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Everything that is wrong, said at once.
#[derive(Debug, Default)]
struct Faults(BTreeMap<PathBuf, Vec<String>>);

impl Faults {
    fn add(&mut self, path: &Path, what: impl fmt::Display) {
        self.0.entry(path.to_owned()).or_default().push(what.to_string());
    }

    /// Adds the files outside `folders` whose code has `word`.
    fn find(&mut self, word: &str, folders: &[&str]) {
        for file in rust_files() {
            if !folders.iter().any(|folder| file.path.starts_with(folder)) && file.names(word) {
                self.add(&file.path, format_args!("names {word}, which belongs in {folders:?}"));
            }
        }
    }

    fn check(self) {
        let said: Vec<String> = self
            .0
            .iter()
            .flat_map(|(path, faults)| faults.iter().map(move |fault| format!("{}: {fault}", path.display())))
            .collect();
        assert!(said.is_empty(), "\n{}", said.join("\n"));
    }
}
