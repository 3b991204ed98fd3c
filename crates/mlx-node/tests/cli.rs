//! The program from outside, as far as it gets without a model: what it prints, and how it ends.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

/// Runs the program in `folder`, which is its home too.
fn run(folder: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mlx-node"))
        .args(arguments)
        .envs(variables.iter().copied())
        .env("HOME", folder)
        .env("XDG_CONFIG_HOME", folder.join("config"))
        .env("HF_HOME", folder.join("hub"))
        // A hub that is not there: no test asks the real one.
        .env("HF_ENDPOINT", "http://127.0.0.1:1")
        .current_dir(folder)
        .output()
        .expect("the program runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn what_cannot_work_is_said_in_a_line_before_anything_is_served() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, contents: &[u8]| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("in the folder")).expect("made");
        fs::write(path, contents).expect("written");
    };
    file("damaged.gguf", b"GGUF\x03\0\0\0\xff\xff");
    file("text.gguf", b"this is no model");
    fs::create_dir(folder.path().join("empty")).expect("made");
    file("strange/config.json", br#"{"model_type": "perceptron", "vocab_size": 8}"#);
    file("strange/tokenizer.json", br#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#);
    file("strange/model.safetensors", b"\x02\0\0\0\0\0\0\0{}");
    file("bad.toml", b"model = \"m\"\nmax_batsh = 8\n");
    let check = |arguments: &[&str], code: i32, expected: &[&str]| {
        let arguments = [&["--http", "127.0.0.1:0", "--log", "error"], arguments].concat();
        let output = run(folder.path(), &arguments, &[]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        let last = said.lines().last().unwrap_or_default();
        for part in expected {
            assert!(last.contains(part), "{arguments:?}: {part:?} is not in the last line of\n{said}");
        }
    };
    check(&["--model", "./missing"], 1, &["./missing", "no such file or folder"]);
    check(&["--model", "missing.gguf"], 1, &["missing.gguf", "no such file or folder"]);
    check(&["--model", "no/such/model/id"], 1, &["no/such/model/id"]);
    check(&["--model", "org/model", "--offline"], 1, &["org/model", "offline"]);
    check(&["--model", "empty"], 1, &["empty", "config.json"]);
    check(&["--model", "damaged.gguf"], 1, &["damaged.gguf"]);
    check(&["--model", "text.gguf"], 1, &["text.gguf"]);
    check(&["--model", "strange"], 1, &["perceptron", "not supported"]);
    check(&["--config", "bad.toml"], 2, &["bad.toml:2", "max_batsh", "max_batch"]);
    check(&["--config", "none.toml"], 2, &["none.toml"]);
    check(&[], 2, &["no model is set"]);
}

#[test]
fn an_address_that_others_reach_needs_keys_or_consent() {
    let folder = tempfile::tempdir().expect("a folder");
    let check = |arguments: &[&str], code: i32| {
        let arguments = [&["config", "check", "--model", "m"], arguments].concat();
        let output = run(folder.path(), &arguments, &[]);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output.stderr));
        assert_eq!(code == 2, text(&output.stderr).contains("allow_anonymous"), "{arguments:?}");
    };
    check(&[], 0);
    check(&["--http", "0.0.0.0:8080"], 2);
    check(&["--http", "192.168.1.2:8080"], 2);
    check(&["--http", "0.0.0.0:8080", "--api-keys", "k"], 0);
    check(&["--http", "0.0.0.0:8080", "--allow-anonymous"], 0);
    check(&["--http", "[::1]:8080"], 0);
}

#[test]
fn variables_override_flags_and_flags_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = "model = \"file\"\ncluster = \"file\"\nname = \"file\"\n";
    fs::write(folder.path().join("cluster.toml"), file).expect("written");
    let output = run(
        folder.path(),
        &["config", "show", "--name", "flag", "--cluster", "flag", "--api-keys", "hidden-key"],
        &[("MLX_NODE_NAME", "variable")],
    );
    let shown = text(&output.stdout);
    for line in ["model = \"file\"", "cluster = \"flag\"", "name = \"variable\"", "http = \"127.0.0.1:8080\""]
    {
        assert!(shown.lines().any(|shown| shown == line), "{line} is not in\n{shown}");
    }
    assert!(!shown.contains("hidden-key"), "{shown}");
    let output = run(folder.path(), &["config", "show"], &[("MLX_NODE_NAEM", "x")]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("did you mean \"name\"?"), "{}", text(&output.stderr));
}

#[cfg(unix)]
#[test]
fn a_new_key_is_private_and_never_overwritten() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a folder");
    let made = run(folder.path(), &["key", "new"], &[]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let file = folder.path().join("config/mlx-cluster/cluster.key");
    assert_eq!(fs::metadata(&file).expect("made").permissions().mode() & 0o777, 0o600);
    let key = fs::read_to_string(&file).expect("a key");
    assert!(!text(&made.stdout).contains(key.trim()), "the key itself is not printed");

    let again = run(folder.path(), &["key", "new"], &[]);
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("is there already"));
    assert_eq!(fs::read_to_string(&file).expect("a key"), key);

    let fingerprint = text(&run(folder.path(), &["key", "fingerprint"], &[]).stdout);
    assert_eq!(fingerprint.trim().len(), 16, "{fingerprint}");
    assert!(text(&made.stdout).contains(fingerprint.trim()));
    let other = run(folder.path(), &["key", "fingerprint"], &[("MLX_NODE_CLUSTER_KEY", "nonsense")]);
    assert_eq!(other.status.code(), Some(1));
}

#[test]
fn status_without_an_endpoint_says_so() {
    let folder = tempfile::tempdir().expect("a folder");
    // Port 1 of the loopback: nobody serves HTTP there.
    let output = run(folder.path(), &["status", "--http", "127.0.0.1:1"], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("nothing answers at http://127.0.0.1:1"));
}
