//! The program from outside, as far as it gets without a model: what it prints, and how it ends.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Output, Stdio},
};

/// Runs the program in `folder`, which is its home too.
fn run(folder: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    run_with(folder, arguments, variables, "")
}

/// The same with something to read.
fn run_with(folder: &Path, arguments: &[&str], variables: &[(&str, &str)], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_mlx-node"))
        .args(arguments)
        .envs(variables.iter().copied())
        .env("HOME", folder)
        .env("XDG_CONFIG_HOME", folder.join("config"))
        .env("HF_HOME", folder.join("hub"))
        // A hub that is not there: no test asks the real one.
        .env("HF_ENDPOINT", "http://127.0.0.1:1")
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let mut stdin = child.stdin.take().expect("piped");
    // A program that ends without reading is no failure.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("the program ends")
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
fn without_an_endpoint_commands_say_so() {
    let folder = tempfile::tempdir().expect("a folder");
    for command in ["status", "nodes", "models", "chat hello", "bench serve"] {
        // Port 1 of the loopback: nobody serves HTTP there.
        let arguments: Vec<&str> = command.split(' ').chain(["--http", "127.0.0.1:1"]).collect();
        let output = run(folder.path(), &arguments, &[]);
        assert_eq!(output.status.code(), Some(3), "{command}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("nothing answers at http://127.0.0.1:1"), "{command}");
        assert!(output.stdout.is_empty(), "{command}");
    }
}

#[test]
fn commands_show_what_an_endpoint_answers() {
    let folder = tempfile::tempdir().expect("a folder");
    const CLUSTER: &str = r#"{"cluster":"c","nodes":[{"name":"n","engine":{"state":"ready"},"models":[{"name":"m","vocab_size":9,"eos_tokens":[1]}]}],"in_flight":0,"waiting":0}"#;
    const CHAT: &str = concat!(
        "data: {\"choices\":[{\"delta\":{\"content\":\"Hi \"}}]}\n\n: still there\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"you\"}}]}\n\ndata: [DONE]\n\n",
    );
    const TEXT: &str = concat!(
        "data: {\"choices\":[{\"text\":\"a\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":4,\"completion_tokens\":1}}\n\ndata: [DONE]\n\n",
    );
    let address = endpoint::serve(&[
        ("GET /v1/cluster ", 200, CLUSTER),
        ("GET /v1/models ", 200, r#"{"data":[{"id":"m","max_model_len":99}]}"#),
        ("POST /v1/chat/completions ", 200, CHAT),
        ("POST /v1/completions ", 200, TEXT),
    ]);
    let check = |command: &str, expected: &[&str]| {
        let arguments: Vec<&str> = command.split(' ').chain(["--http", &address]).collect();
        let output = run(folder.path(), &arguments, &[]);
        let said = text(&output.stdout);
        assert!(output.status.success(), "{command}: {}", text(&output.stderr));
        for part in expected {
            assert!(said.contains(part), "{command}: {part:?} is not in {said}");
        }
    };
    check("status", &["cluster c: 0 requests in flight", "n     ready  m"]);
    check("status --json", &[CLUSTER]);
    check("nodes", &["NODE", "VERSION"]);
    check("models", &["m      99       n"]);
    check("chat hello", &["Hi you\n"]);
    let piped = run_with(folder.path(), &["chat", "--http", &address], &[], "hello\nthere\n");
    assert_eq!((piped.status.code(), text(&piped.stdout).as_str()), (Some(0), "Hi you\n"));
    let bench = "bench serve --rate 100 --count 3 --prompt-tokens 4";
    check(
        bench,
        &["m: 3 requests at 100 a second, 3 answered, 0 failed", "0 of 12 prompt tokens cached", "3 met"],
    );
    check(&format!("{bench} --json"), &[r#""answered":3,"failed":0"#, r#""share":1.0"#]);
}

#[test]
fn what_an_endpoint_refuses_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    const REFUSAL: &str = r#"{"error":{"message":"all places are taken"}}"#;
    let address = endpoint::serve(&[
        ("GET /v1/cluster ", 401, REFUSAL),
        ("GET /v1/models ", 200, r#"{"data":[{"id":"m"}]}"#),
        ("POST /v1/chat/completions ", 429, REFUSAL),
    ]);
    let check = |command: &str, expected: &str| {
        let arguments: Vec<&str> = command.split(' ').chain(["--http", &address]).collect();
        let output = run(folder.path(), &arguments, &[]);
        assert_eq!(output.status.code(), Some(1), "{command}");
        assert!(text(&output.stderr).contains(expected), "{command}: {}", text(&output.stderr));
    };
    check("status", "give a key with --api-keys");
    check("chat hello", "429: all places are taken");
    let empty = run_with(folder.path(), &["chat", "--http", &address], &[], " \n");
    assert_eq!(empty.status.code(), Some(1));
    assert!(text(&empty.stderr).contains("nothing was said"), "{}", text(&empty.stderr));
}

#[cfg(unix)]
#[test]
fn the_doctor_finds_what_is_wrong_and_says_what_to_do() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("m.gguf"), "").expect("written");
    let made = run(folder.path(), &["key", "new"], &[]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let key = folder.path().join("config/mlx-cluster/cluster.key");
    let doctor = |http: &str, model: &str, arguments: &[&str]| {
        let usual = ["doctor", "--seconds", "1", "--mdns=false", "--listen", "127.0.0.1:0"];
        let arguments = [&usual[..], &["--http", http, "--model", model], arguments].concat();
        let output = run(folder.path(), &arguments, &[]);
        (output.status.code(), text(&output.stdout))
    };
    let check = |http: &str, model: &str, arguments: &[&str], code: i32, expected: &[&str]| {
        let (ended, said) = doctor(http, model, arguments);
        assert_eq!(ended, Some(code), "{http} {model} {arguments:?}: {said}");
        for part in expected {
            assert!(said.contains(part), "{http} {model} {arguments:?}: {part:?} is not in {said}");
        }
    };
    let free = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.local_addr().expect("bound").to_string()
    };
    let well = ["ok       cluster key: fingerprint", "ok       model:", "is free", "No problem was found."];
    check(&free, "./m.gguf", &[], 0, &well);
    check(&free, "./none", &[], 1, &["PROBLEM  model: ./none", "1 problem was found."]);
    let silent = ["127.0.0.1:1 does not answer", "→ start mlx-node there"];
    check(&free, "./m.gguf", &["--peers", "127.0.0.1:1"], 1, &silent);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("bound").to_string();
    // Somebody has it, and answers nothing.
    check(&taken, "./m.gguf", &[], 1, &["PROBLEM  endpoint:", "→ another program may have the port"]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("changed");
    let (code, said) = doctor(&free, "./m.gguf", &["--json"]);
    let json: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!((code, &json["problems"]), (Some(1), &1.into()), "{said}");
    let remedy = json["findings"]
        .as_array()
        .into_iter()
        .flatten()
        .find_map(|finding| (finding["level"] == "problem").then(|| finding["remedy"].as_str())?);
    assert!(remedy.is_some_and(|remedy| remedy.starts_with("chmod 600 ")), "{said}");
}

#[test]
fn pull_names_what_is_here_and_what_is_not() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("m.gguf"), "").expect("written");
    let output = run(folder.path(), &["pull", "./m.gguf"], &[]);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(0), "./m.gguf\n"));
    let output = run(folder.path(), &["pull", "--model", "./m.gguf", "--json"], &[]);
    assert_eq!(text(&output.stdout), "{\"model\":\"./m.gguf\",\"path\":\"./m.gguf\"}\n");
    let output = run(folder.path(), &["pull", "org/model", "--offline"], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("offline"), "{}", text(&output.stderr));
    assert_eq!(run(folder.path(), &["pull"], &[]).status.code(), Some(2));
}

#[test]
fn shells_are_told_of_the_commands() {
    let folder = tempfile::tempdir().expect("a folder");
    for shell in ["bash", "zsh", "fish"] {
        let output = run(folder.path(), &["completions", shell], &[]);
        assert!(output.status.success() && text(&output.stdout).contains("doctor"), "{shell}");
        assert!(!text(&output.stdout).contains("run one engine"), "{shell}");
    }
    assert_eq!(run(folder.path(), &["completions", "sh"], &[]).status.code(), Some(2));
}

/// An endpoint that was written down.
mod endpoint {
    use std::{
        io::{BufRead, BufReader, Read, Write},
        net::{TcpListener, TcpStream},
    };

    /// Answers requests by the beginning of their first lines, for as long as the test runs.
    pub(crate) fn serve(answers: &'static [(&str, u16, &str)]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // What a client does not wait for is no matter.
                std::thread::spawn(move || answer(stream, answers).ok());
            }
        });
        address
    }

    fn answer(mut stream: TcpStream, answers: &[(&str, u16, &str)]) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut lines = Vec::new();
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 || line == "\r\n" {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or(0);
            }
            lines.push(line);
        }
        reader.take(length).read_to_end(&mut Vec::new())?;
        let first = lines.first().map_or("", String::as_str);
        let found = answers.iter().find(|(begin, ..)| first.starts_with(begin));
        let (_, status, body) = found.unwrap_or(&("", 404, "{}"));
        write!(
            stream,
            "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
    }
}

/// A `systemctl` that writes down how it was called and answers as the file beside it says.
#[cfg(target_os = "linux")]
#[test]
fn a_service_is_installed_looked_at_and_removed() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    let unit = at("config/systemd/user/mlx-node.service");
    let path = |with: &str| vec![("PATH".to_owned(), at(with).display().to_string())];
    let service = |arguments: &[&str], path: &[(String, String)], code: i32, expected: &str| {
        let variables: Vec<(&str, &str)> = path.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        let output = run(folder.path(), arguments, &variables);
        let said = text(&output.stdout) + &text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {expected:?} is not in\n{said}");
    };
    // Nothing to run, nothing that would run, nobody to run it: each is said, and nothing is left.
    service(&["service", "install"], &path("none"), 2, "no configuration file");
    fs::write(at("cluster.toml"), "max_batch = 4\n").expect("written");
    service(&["service", "install"], &path("none"), 2, "no model is set");
    fs::write(at("cluster.toml"), "model = \"org/model\"\ndrain_timeout = \"20 s\"\n").expect("written");
    service(&["--max-batch", "2", "service", "install"], &path("none"), 2, "instead of giving flags");
    service(&["service", "install"], &path("none"), 1, "systemd is not to be had");
    service(&["service", "uninstall"], &path("none"), 0, "not installed");
    service(&["service", "status"], &path("none"), 1, "not installed");
    assert!(!unit.exists());

    let systemctl = at("bin/systemctl");
    fs::create_dir(at("bin")).expect("made");
    let answers = |script: &str| {
        let log = at("called").display().to_string();
        fs::write(&systemctl, format!("#!/bin/sh\necho \"$*\" >>'{log}'\n{script}\n")).expect("written");
        fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o700)).expect("made a program");
    };
    let called = || {
        let log = fs::read_to_string(at("called")).unwrap_or_default();
        let _ = fs::remove_file(at("called"));
        log
    };
    answers("case $* in *enable*) echo no such unit >&2; exit 1 ;; esac");
    service(&["service", "install"], &path("bin"), 1, "no such unit");
    assert!(!unit.exists(), "a unit that does not start is not left behind");
    called();

    answers("echo ActiveState=active");
    service(&["service", "install"], &path("bin"), 0, "installed");
    assert_eq!(
        called(),
        "--user show-environment\n--user daemon-reload\n--user enable --now mlx-node.service\n"
    );
    let written = fs::read_to_string(&unit).expect("installed");
    let config = fs::canonicalize(at("cluster.toml")).expect("there");
    let line = format!("serve --config \"{}\"", config.display());
    assert!(written.contains(&line) && written.contains("TimeoutStopSec=30\n"), "{written}");
    service(&["service", "install"], &path("bin"), 1, "is there already");
    service(&["service", "status"], &path("bin"), 0, "runs");
    answers("echo ActiveState=failed");
    service(&["service", "status"], &path("bin"), 1, "ActiveState=failed");
    called();
    service(&["service", "uninstall"], &path("bin"), 0, "removed");
    assert_eq!(called(), "--user disable --now mlx-node.service\n--user daemon-reload\n");
    assert!(!unit.exists() && at("cluster.toml").exists());
}
