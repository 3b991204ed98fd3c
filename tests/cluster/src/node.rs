//! One `mlx-node` process: started with settings, watched, signalled, killed at the end.

use crate::{Client, Network, Place, binary, wait_for};
use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process};
use std::{
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// For the model to be loaded, in a debug build beside another engine on two cores.
const READY_TIME_MAX: Duration = Duration::from_secs(120);
/// For a process to end that has nothing left to do.
const EXIT_TIME_MAX: Duration = Duration::from_secs(20);

/// How a node is started.
#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Its name.
    pub name: String,
    /// Where it runs.
    pub place: Place,
    /// Where a client stands that talks to it.
    pub client: Place,
    /// Its HTTP address.
    pub http: SocketAddr,
    /// Its other settings, as flags.
    pub flags: Vec<String>,
}

impl NodeSpec {
    /// A node on the host's loopback, alone unless `flags` say more.
    pub fn local(name: &str, model: &Path) -> Self {
        let http = (Ipv4Addr::LOCALHOST, free_port()).into();
        Self { name: name.to_owned(), place: Place::Host, client: Place::Host, http, flags: Vec::new() }
            .flag("model", &model.to_string_lossy())
    }

    /// A node at that place of a network, of a cluster with that key.
    pub fn at(network: &Network, index: u8, name: &str, roles: &str, key: &str) -> Self {
        let (place, address) = network.place(index);
        let http = (address, 8080).into();
        Self { name: name.to_owned(), place, client: network.client(), http, flags: Vec::new() }
            .flag("roles", roles)
            .flag("cluster-key", key)
            .flag("allow-anonymous", "true")
    }

    /// Adds a setting.
    #[must_use]
    pub fn flag(mut self, name: &str, value: &str) -> Self {
        self.flags.push(format!("--{name}={value}"));
        self
    }

    /// Starts it.
    pub fn start(&self) -> NodeProcess {
        self.start_with(|_| {})
    }

    /// Starts it as a shell would: at the head of a process group, to which Ctrl-C goes.
    pub fn start_in_own_group(&self) -> NodeProcess {
        self.start_with(|command| {
            std::os::unix::process::CommandExt::process_group(command, 0);
        })
    }

    fn start_with(&self, prepare: impl FnOnce(&mut Command)) -> NodeProcess {
        let folder = tempfile::tempdir().expect("a folder for the node");
        let log = folder.path().join("log");
        let file = File::create(&log).expect("a log file");
        let mut command = self.place.command(&binary());
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("MLX_NODE_"))
        {
            command.env_remove(name);
        }
        command
            // Without a line for each of the polling requests.
            .args(["--name", &self.name, "--http", &self.http.to_string(), "--log=info,api::tag=warn"])
            .args(&self.flags)
            // No configuration or key of the person who runs the tests.
            .env("HOME", folder.path())
            .env("XDG_CONFIG_HOME", folder.path())
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a second handle to the log"))
            .stderr(file);
        prepare(&mut command);
        let started = Instant::now();
        let child = command.spawn().expect("mlx-node starts");
        let client = Client { address: self.http, place: self.client.clone(), key: None };
        NodeProcess { name: self.name.clone(), client, child, started, log, _folder: folder }
    }
}

/// A running node.
#[derive(Debug)]
pub struct NodeProcess {
    /// Its name.
    pub name: String,
    /// A client of its endpoint.
    pub client: Client,
    child: Child,
    started: Instant,
    log: PathBuf,
    _folder: tempfile::TempDir,
}

impl NodeProcess {
    /// Waits until it is ready; returns how long that took from its start.
    ///
    /// # Panics
    /// Where it ends or takes too long.
    pub fn wait_ready(&mut self) -> Duration {
        let deadline = self.started + READY_TIME_MAX;
        while !self.client.is_ready() {
            let ended = self.child.try_wait().expect("its state is known");
            assert!(ended.is_none(), "{} ended with {ended:?}:\n{}", self.name, self.log());
            assert!(Instant::now() < deadline, "{} is not ready:\n{}", self.name, self.log());
            thread::sleep(Duration::from_millis(20));
        }
        self.started.elapsed()
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(pid(self.child.id()), signal).expect("the process is there");
    }

    /// Sends a signal to its process group, of which it is the head.
    pub fn signal_group(&self, signal: Signal) {
        kill_process_group(pid(self.child.id()), signal).expect("the group is there");
    }

    /// Kills it and its engine where they stand, and waits for their end.
    pub fn kill(&mut self) {
        let engine = self.engine_pid();
        self.signal(Signal::KILL);
        if let Some(engine) = engine {
            // It may have seen its parent's end already.
            let _ = kill_process(pid(engine), Signal::KILL);
        }
        self.child.wait().expect("a killed process ends");
    }

    /// Stops it and its engine where they stand, or lets them go on.
    pub fn stop(&self, is_stopped: bool) {
        let signal = if is_stopped { Signal::STOP } else { Signal::CONT };
        self.signal(signal);
        if let Some(engine) = self.engine_pid() {
            // It may have ended just now.
            let _ = kill_process(pid(engine), signal);
        }
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// Where it takes too long.
    pub fn wait_exit(&mut self) -> ExitStatus {
        wait_for("the process ends", EXIT_TIME_MAX, || self.child.try_wait().expect("its state is known"))
    }

    /// The process id of the node itself.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process id of its engine; none while it has none.
    pub fn engine_pid(&self) -> Option<u32> {
        children_of(self.child.id()).into_iter().next()
    }

    /// The process id of its part in a pipeline; none while it has none, also while it measures itself.
    pub fn rank_pid(&self) -> Option<u32> {
        children_of(self.child.id()).into_iter().find(|child| ring_address(*child).is_some())
    }

    /// Kills its engine.
    ///
    /// # Panics
    /// Where it has none.
    pub fn kill_engine(&self) {
        self.signal_engine(Signal::KILL);
    }

    /// Sends its engine a signal.
    ///
    /// # Panics
    /// Where it has none.
    pub fn signal_engine(&self, signal: Signal) {
        let engine = self.engine_pid().expect("an engine runs");
        kill_process(pid(engine), signal).expect("the engine is there");
    }

    /// Kills it where it stands, and leaves its engine to itself.
    pub fn kill_alone(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().expect("a killed process ends");
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.kill();
        }
        if thread::panicking() {
            show(&format!("---- log of {} ----\n{}", self.name, self.log()));
        }
    }
}

/// Sends a process a signal; it may have ended.
pub fn signal(id: u32, signal: Signal) {
    let _ = kill_process(pid(id), signal);
}

/// Says something that belongs to a test's result.
#[expect(clippy::print_stderr, reason = "the test runner shows it with the failure")]
pub fn show(text: &str) {
    eprintln!("{text}");
}

/// A cluster's key, made by the program.
///
/// # Panics
/// Where it does not make one.
pub fn new_key() -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("key");
    let made = Command::new(binary()).args(["key", "new", "--out"]).arg(&file).output();
    assert!(made.expect("mlx-node runs").status.success());
    fs::read_to_string(file).expect("written").trim().to_owned()
}

/// The processes that `parent` started; one that has ended and was not waited for yet is none.
#[cfg(target_os = "linux")]
fn children_of(parent: u32) -> Vec<u32> {
    let parent = format!("PPid:\t{parent}");
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let ids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.filter(|id: &u32| {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        status.lines().any(|line| line == parent) && !status.contains("State:\tZ")
    })
    .collect()
}

#[cfg(not(target_os = "linux"))]
fn children_of(parent: u32) -> Vec<u32> {
    let listed = Command::new("pgrep").args(["-P", &parent.to_string()]).output();
    let listed = listed.map(|listed| listed.stdout).unwrap_or_default();
    String::from_utf8_lossy(&listed).lines().filter_map(|line| line.parse().ok()).collect()
}

/// Whether a process of that id is there.
pub fn is_alive(id: u32) -> bool {
    test_kill_process(pid(id)).is_ok()
}

/// Whether a process has ended, also one that nobody has waited for yet.
pub fn has_ended(id: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    !is_alive(id) || state == Some('Z')
}

/// Where a pipeline's rank waits for the one before it, by its environment; none where it is no rank.
pub fn ring_address(id: u32) -> Option<SocketAddr> {
    let environment = fs::read(format!("/proc/{id}/environ")).ok()?;
    let value = |name: &str| {
        let mut all =
            environment.split(|byte| *byte == 0).filter_map(|entry| std::str::from_utf8(entry).ok());
        all.find_map(|entry| entry.strip_prefix(name)?.strip_prefix('=').map(str::to_owned))
    };
    let rank: usize = value("MLX_RANK")?.parse().ok()?;
    let hosts: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(value("MLX_HOSTFILE")?).ok()?).ok()?;
    hosts[rank][0].as_str()?.parse().ok()
}

fn pid(id: u32) -> Pid {
    let id = i32::try_from(id).expect("process ids are small");
    Pid::from_raw(id).expect("no process has the id 0")
}

/// A port of the loopback that nobody has now, UDP or TCP.
pub fn free_port() -> u16 {
    let any = (Ipv4Addr::LOCALHOST, 0);
    loop {
        let udp = UdpSocket::bind(any).expect("a free UDP port");
        let port = udp.local_addr().expect("bound").port();
        if std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}
