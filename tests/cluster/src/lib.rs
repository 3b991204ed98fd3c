//! What tests of whole processes need: nodes that are started and ended, networks of their own, an HTTP client.
//!
//! Everything a test starts ends with it, also when it fails: processes are killed by id, namespaces removed by name.
//! The program under test is `mlx-node` beside the test's own binary (`cargo build -p mlx-node`, same profile), or the
//! one that `MLX_NODE_BIN` names; the model is `MLX_TEST_MODEL`, or what `scripts/fetch-test-model` left under `target`.

mod http;
mod network;
mod node;

pub use http::{Answer, Client, Sse, StreamEnd};
pub use network::stray_connection;
pub use network::{Network, Place};
pub use node::{NodeProcess, NodeSpec, free_port, has_ended, is_alive, new_key, ring_address, show, signal};

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// The model all tests serve; none where it was not fetched, and then the test says so and passes.
pub fn model() -> Option<PathBuf> {
    const NAME: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
    let named = std::env::var_os("MLX_TEST_MODEL").map(PathBuf::from);
    let path = named.unwrap_or_else(|| target_folder().join("test-models").join(NAME));
    if path.exists() {
        return Some(path);
    }
    skip(&format!("no model at {}: run scripts/fetch-test-model", path.display()));
    None
}

/// The program under test.
///
/// # Panics
/// Where it was not built.
pub fn binary() -> PathBuf {
    let named = std::env::var_os("MLX_NODE_BIN").map(PathBuf::from);
    let path = named.unwrap_or_else(|| profile_folder().join("mlx-node"));
    assert!(path.is_file(), "{} is missing: cargo build -p mlx-node", path.display());
    path
}

/// Says why a test checks nothing here.
pub fn skip(why: &str) {
    #![expect(clippy::print_stderr, reason = "the only way for a test to say that it was skipped")]
    eprintln!("skipped: {why}");
}

/// Waits until `condition` gives a value.
///
/// # Panics
/// Where it does not within `at_most`.
pub fn wait_for<T>(what: &str, at_most: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + at_most;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {at_most:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// `target/debug` or `target/release`: the folder above the test binary's `deps`.
fn profile_folder() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own file");
    test.parent().and_then(Path::parent).expect("a test lies in target/PROFILE/deps").to_path_buf()
}

fn target_folder() -> PathBuf {
    profile_folder().parent().expect("a profile's folder lies in target").to_path_buf()
}
