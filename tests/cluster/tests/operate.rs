//! Operating real processes: keys that change while they serve, settings that are read again, TLS, a crowd of idle connections,
//! and an upgrade node by node.

use cluster_tests::{Client, NodeProcess, NodeSpec, StreamEnd, binary, free_port, model, new_key, wait_for};
use rustix::process::Signal;
use serde_json::json;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Duration,
};

const SOON: Duration = Duration::from_secs(15);
/// A certificate and its key, and another pair; `crates/api/tests/http/tls.rs` says how they were made.
const CERTIFICATES: [[&str; 2]; 2] = [
    [
        include_str!("../../../crates/api/tests/http/tls/one.cert.pem"),
        include_str!("../../../crates/api/tests/http/tls/one.key.pem"),
    ],
    [
        include_str!("../../../crates/api/tests/http/tls/two.cert.pem"),
        include_str!("../../../crates/api/tests/http/tls/two.key.pem"),
    ],
];

/// Writes a file that only its owner may read.
fn write_private(path: &Path, text: &str) {
    fs::write(path, text).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("its owner's");
}

/// A router without a model, alone on the loopback but for those with its key.
fn router(key: &str) -> NodeSpec {
    let spec = NodeSpec::local("router", Path::new("none"));
    NodeSpec { flags: Vec::new(), ..spec }
        .flag("roles", "router")
        .flag("cluster-key", key)
        .flag("mdns", "false")
        .flag("listen", &format!("127.0.0.1:{}", free_port()))
}

fn wait_alive(node: &NodeProcess) {
    wait_for("the endpoint answers", SOON, || {
        node.client.get("/health").is_ok_and(|answer| answer.status == 200).then_some(())
    });
}

/// Runs the program itself with arguments; whether it succeeded, and all that it said.
fn run(arguments: &[&str], key: Option<&str>) -> (bool, String) {
    let mut command = Command::new(binary());
    command.args(arguments).env_remove("MLX_NODE_API_KEYS");
    if let Some(key) = key {
        command.env("MLX_NODE_API_KEYS", key);
    }
    let output = command.output().expect("it runs");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

/// A new HTTP key and its hash, as the program makes them.
fn new_http_key() -> (String, String) {
    let (made, said) = run(&["key", "new", "--http"], None);
    assert!(made, "{said}");
    let mut lines = said.lines().map(str::to_owned);
    (lines.next().expect("a key"), lines.next().expect("a hash"))
}

#[test]
fn settings_are_read_again_and_what_needs_a_restart_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("cluster.toml");
    let ((admin, admin_hash), (alice, alice_hash)) = (new_http_key(), new_http_key());
    let keys = format!(
        "[[key]]\nkey = \"{admin_hash}\"\nscopes = [\"admin\"]\n[[key]]\nkey = \"{alice_hash}\"\nname = \"alice\"\n"
    );
    write_private(&file, &format!("api_keys = [\"plain\"]\n{keys}"));
    let node = router(&new_key()).flag("config", &file.to_string_lossy()).start();
    wait_alive(&node);
    let status = |key: &str, path: &str| node.client.with_key(key).get(path).expect("answered").status;
    assert_eq!(
        ["plain", &alice, &admin, "nobody"].map(|key| status(key, "/v1/cluster")),
        [200, 200, 200, 401]
    );
    let reload =
        |key: &str| node.client.with_key(key).post("/v1/admin/reload", &json!({})).expect("answered");
    assert_eq!(reload(&alice).status, 403);

    // Another key, a bound for one, more log lines, and something that cannot change now.
    write_private(
        &file,
        &format!("api_keys = [\"other\"]\nlog = \"debug\"\nmax_batch = 3\n{keys}requests_per_minute = 1\n"),
    );
    let answer = reload(&admin);
    assert_eq!(answer.status, 200, "{}", answer.body);
    // The log level is a flag of this process: that of the file does not count.
    assert_eq!(answer.json()["applied"], json!(["api_keys", "key"]), "{}", answer.body);
    assert_eq!(answer.json()["restart"], json!(["max_batch"]), "{}", answer.body);
    assert_eq!(["plain", "other"].map(|key| status(key, "/v1/cluster")), [401, 200]);
    let ask = || {
        let body = json!({"model": "m", "prompt": "x"});
        node.client.with_key(&alice).post("/v1/completions", &body).expect("answered").status
    };
    assert_ne!(ask(), 429);
    assert_eq!(ask(), 429);

    // A mistake changes nothing, by whatever way it is read; a second try names what still needs a restart.
    write_private(&file, &format!("max_batsh = 3\n{keys}"));
    let answer = reload(&admin);
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("cluster.toml:1: unknown setting"), "{}", answer.body);
    node.signal(Signal::HUP);
    let refusals = || node.log().matches("were not reloaded").count();
    wait_for("it is logged again", SOON, || (refusals() == 2).then_some(()));
    assert_eq!(status("other", "/v1/cluster"), 200);

    // Half a file does not open the endpoint to everybody.
    write_private(&file, "");
    let answer = reload(&admin);
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("needs a restart"), "{}", answer.body);
    assert_eq!(status("nobody", "/v1/cluster"), 401);

    write_private(&file, &format!("max_batch = 3\n{keys}"));
    let http = node.client.address.to_string();
    let (done, said) = run(&["config", "apply", "--http", &http], Some(&admin));
    assert!(done && said == "taken over: api_keys, key\nafter a restart: max_batch\n", "{said}");
    let (done, said) = run(&["config", "apply", "--http", &http], Some(&alice));
    assert!(!done && said.contains("403") && said.contains("\"admin\""), "{said}");
    assert_eq!(status("other", "/v1/cluster"), 401);
    assert!(!node.log().contains(&admin) && !node.log().contains(&alice));
}

#[test]
fn files_with_secrets_that_others_may_read_are_told_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let [file, key, cert, private] =
        ["cluster.toml", "key", "cert.pem", "key.pem"].map(|name| folder.path().join(name));
    fs::write(&cert, CERTIFICATES[0][0]).expect("written");
    let write = |mode: u32| {
        for (path, text) in
            [(&file, "api_keys = [\"plain\"]"), (&key, &new_key()), (&private, CERTIFICATES[0][1])]
        {
            fs::write(path, text).expect("written");
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
        }
    };
    let spec = router("");
    let spec =
        NodeSpec { flags: spec.flags.into_iter().filter(|flag| flag != "--cluster-key=").collect(), ..spec }
            .flag("config", &file.to_string_lossy())
            .flag("key-file", &key.to_string_lossy())
            .flag("tls-cert", &cert.to_string_lossy())
            .flag("tls-key", &private.to_string_lossy());
    for (mode, warnings) in [(0o600, 0), (0o640, 3), (0o604, 3)] {
        write(mode);
        let node = spec.start();
        wait_for("it serves", SOON, || node.log().contains("serving HTTP").then_some(()));
        let told = node.log().matches("chmod 600 ").count();
        assert_eq!(told, warnings, "{mode:o}: {}", node.log());
    }
}

#[test]
fn an_administrator_has_it_end() {
    let mut node = router(&new_key()).start();
    wait_alive(&node);
    let (done, said) = run(&["drain", "--http", &node.client.address.to_string()], None);
    assert!(done, "{said}");
    assert!(node.wait_exit().success());
}

#[test]
fn commands_speak_tls_and_the_certificate_changes_at_a_signal() {
    let folder = tempfile::tempdir().expect("a folder");
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| folder.path().join(name));
    let other = folder.path().join("other.pem");
    let write = |[chain, private]: [&str; 2]| {
        fs::write(&cert, chain).expect("written");
        write_private(&key, private);
    };
    write(CERTIFICATES[0]);
    fs::write(&other, CERTIFICATES[0][0]).expect("written");
    let node = router(&new_key())
        .flag("tls-cert", &cert.to_string_lossy())
        .flag("tls-key", &key.to_string_lossy())
        .start();
    let http = node.client.address.to_string();
    let status = |trusted: &Path| {
        run(&["nodes", "--json", "--http", &http, "--tls-cert", &trusted.to_string_lossy()], None)
    };
    wait_for("it answers over TLS", SOON, || status(&cert).0.then_some(()));
    assert!(node.client.get("/health").is_err(), "plain HTTP is not answered");
    if Command::new("curl").arg("--version").output().is_ok_and(|output| output.status.success()) {
        let url = format!("https://localhost:{}/health", node.client.address.port());
        let output =
            Command::new("curl").args(["-sS", "--cacert"]).arg(&cert).arg(&url).output().expect("it runs");
        assert!(String::from_utf8_lossy(&output.stdout).contains("alive"), "{output:?}");
    }

    // Half of a pair is a mistake, and the old one goes on.
    fs::write(&cert, CERTIFICATES[1][0]).expect("written");
    node.signal(Signal::HUP);
    wait_for("the mistake is logged", SOON, || node.log().contains("cannot be used together").then_some(()));
    assert!(status(&other).0);
    write(CERTIFICATES[1]);
    node.signal(Signal::HUP);
    wait_for("the new one is served", SOON, || status(&cert).0.then_some(()));
    let (done, said) = status(&other);
    assert!(!done && said.contains("tls_cert"), "{said}");
}

/// Asks for one stream after the other until it is told to stop; how many were whole, and how the others ended.
fn load(client: &Client, stop: &AtomicBool, whole: &AtomicUsize) -> Vec<StreamEnd> {
    let mut broken = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        match client.stream_chat("Tell me a story.", 30).map(|stream| stream.finish().1) {
            Ok(StreamEnd::Finished(_)) => _ = whole.fetch_add(1, Ordering::Relaxed),
            Ok(end) => broken.push(end),
            Err(error) => broken.push(StreamEnd::Broken(error.to_string())),
        }
    }
    broken
}

/// Two nodes that know each other by address, each with these settings beside.
fn two(model: &Path, flags: &[(&str, &str)]) -> [NodeSpec; 2] {
    let ports = [free_port(), free_port()];
    [("one", 0), ("two", 1)].map(|(name, at)| {
        let spec = NodeSpec::local(name, model)
            .flag("mdns", "false")
            .flag("listen", &format!("127.0.0.1:{}", ports[at]))
            .flag("peers", &format!("127.0.0.1:{}", ports[1 - at]));
        flags.iter().fold(spec, |spec, (name, value)| spec.flag(name, value))
    })
}

fn see_each_other(nodes: &[NodeProcess]) {
    for node in nodes {
        wait_for("both are seen", SOON, || (node.client.ready_nodes() == ["one", "two"]).then_some(()));
    }
}

#[test]
fn a_cluster_changes_its_key_under_load_and_without_an_outage() {
    let Some(model) = model() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("key");
    let (old, new) = (new_key(), new_key());
    write_private(&file, &old);
    let mut nodes = two(&model, &[("key-file", &file.to_string_lossy())]).map(|spec| spec.start());
    nodes.iter_mut().for_each(|node| _ = node.wait_ready());
    see_each_other(&nodes);
    let (stop, whole) = (AtomicBool::new(false), AtomicUsize::new(0));
    let broken = thread::scope(|scope| {
        let loads: Vec<_> = nodes
            .iter()
            .flat_map(|node| [&node.client; 2])
            .map(|client| scope.spawn(|| load(client, &stop, &whole)))
            .collect();
        // Both keys are taken, then the new one is shown, then the old one is taken back; nodes do it one after the other.
        for (step, keys) in [format!("{old}\n{new}"), format!("{new}\n{old}"), new.clone()].iter().enumerate()
        {
            write_private(&file, keys);
            for node in &nodes {
                node.signal(Signal::HUP);
                wait_for("the key is taken over", SOON, || {
                    (node.log().matches("settings were read again").count() > step).then_some(())
                });
                let before = whole.load(Ordering::Relaxed);
                wait_for("requests go on", SOON, || {
                    (whole.load(Ordering::Relaxed) > before + 2).then_some(())
                });
            }
            see_each_other(&nodes);
        }
        stop.store(true, Ordering::Relaxed);
        loads.into_iter().flat_map(|load| load.join().expect("it ends")).collect::<Vec<_>>()
    });
    assert_eq!(broken, [], "of {} whole ones beside", whole.load(Ordering::Relaxed));
    // Whoever has the old key only is out.
    let stranger = two(&model, &[("cluster-key", &old)])[0].clone();
    let mut stranger = NodeSpec { name: "stranger".to_owned(), ..stranger };
    let router = router(&new);
    let port =
        router.flags.iter().find_map(|flag| flag.strip_prefix("--listen=")).expect("it listens").to_owned();
    let other = router.start();
    wait_alive(&other);
    stranger.flags.retain(|flag| !flag.starts_with("--peers="));
    let mut stranger = stranger.flag("peers", &port).start();
    stranger.wait_ready();
    wait_for("it is refused", SOON, || stranger.log().contains("another cluster key").then_some(()));
}

#[test]
fn an_upgrade_node_by_node_under_load() {
    let Some(model) = model() else { return };
    let key = new_key();
    let specs = two(&model, &[("cluster-key", &key)]);
    let mut nodes = specs.clone().map(|spec| spec.start());
    nodes.iter_mut().for_each(|node| _ = node.wait_ready());
    see_each_other(&nodes);
    let (stops, whole) = ([AtomicBool::new(false), AtomicBool::new(false)], AtomicUsize::new(0));
    let clients = [nodes[0].client.clone(), nodes[1].client.clone()];
    for at in [0, 1] {
        // Clients are at the node that stays, as a balancer would have it; what the other one answers goes on.
        let stop = &stops[at];
        let broken = thread::scope(|scope| {
            let loads: Vec<_> =
                (0..4).map(|_| scope.spawn(|| load(&clients[1 - at], stop, &whole))).collect();
            thread::sleep(Duration::from_secs(2));
            nodes[at].signal(Signal::TERM);
            assert!(nodes[at].wait_exit().success(), "{}", nodes[at].log());
            nodes[at] = specs[at].start();
            nodes[at].wait_ready();
            see_each_other(&nodes);
            stop.store(true, Ordering::Relaxed);
            loads.into_iter().flat_map(|load| load.join().expect("it ends")).collect::<Vec<_>>()
        });
        assert_eq!(broken, [], "while {} was upgraded", nodes[at].name);
    }
    assert!(whole.load(Ordering::Relaxed) > 10, "{whole:?} requests are no load");
}

/// Its process is looked at in /proc.
#[cfg(target_os = "linux")]
mod crowd {
    use super::{SOON, router, wait_alive};
    use cluster_tests::new_key;
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    use std::{
        fs,
        io::{Read, Write},
        net::TcpStream,
        time::{Duration, Instant},
    };

    /// Resident memory of a process in bytes.
    fn resident_bytes(pid: u32) -> u64 {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("told");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    }

    #[test]
    fn ten_thousand_idle_connections_keep_nobody_out() {
        const CONNECTIONS: usize = 10_000;
        let limit = getrlimit(Resource::Nofile);
        let wanted = Rlimit { current: limit.maximum, maximum: limit.maximum };
        setrlimit(Resource::Nofile, wanted).expect("up to the hard limit");
        if limit.maximum.is_some_and(|most| most < CONNECTIONS as u64 + 500) {
            return cluster_tests::skip("this system gives too few descriptors");
        }
        let node = router(&new_key()).start();
        wait_alive(&node);
        let before = resident_bytes(node.pid());
        let (mut idle, mut slowest) = (Vec::with_capacity(CONNECTIONS), Duration::ZERO);
        for count in 0..CONNECTIONS {
            let mut stream = TcpStream::connect(node.client.address).expect("taken");
            if count % 2 == 0 {
                // It may be gone by the time that it speaks.
                let _ = stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-slow: ");
            }
            idle.push(stream);
            if count % 500 == 0 {
                let asked = Instant::now();
                assert_eq!(
                    node.client.get("/health").expect("answered").status,
                    200,
                    "beside {count} idle ones"
                );
                slowest = slowest.max(asked.elapsed());
            }
        }
        let after = resident_bytes(node.pid());
        let descriptors = fs::read_dir(format!("/proc/{}/fd", node.pid())).expect("it runs").count();
        cluster_tests::show(&format!(
            "{CONNECTIONS} idle connections: {} MiB more, {descriptors} descriptors, the slowest answer took {slowest:?}",
            (after.saturating_sub(before)) >> 20
        ));
        assert!(after.saturating_sub(before) < 200 << 20, "{before} bytes, then {after}");
        assert!(descriptors < 5000, "{descriptors} descriptors");
        assert!(slowest < Duration::from_secs(2), "{slowest:?}");
        // The first of them made room.
        idle[0].set_read_timeout(Some(SOON)).expect("set");
        assert!(matches!(idle[0].read(&mut [0; 1]), Ok(0) | Err(_)));
    }
}
