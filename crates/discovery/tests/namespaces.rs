//! Two machines on one cable: two network namespaces joined by a veth pair, a process of this test in each. Needs Linux,
//! root and iproute2; elsewhere it says so and stops.
#![cfg(target_os = "linux")]

use discovery::{DiscoverySettings, PeerEvent, start};
use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};
use tokio::sync::watch;
use types::{NodeId, Role};

/// Tells a child which machine it is.
const MACHINE: &str = "DISCOVERY_TEST_MACHINE";
/// From a process's start until it has found the other one.
const FOUND_WITHIN: Duration = Duration::from_secs(10);

#[test]
fn two_machines_find_each_other_and_hear_the_goodbye() {
    let network = match Network::new() {
        Ok(network) => network,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let mut one = Machine::start(&network, 1);
    let mut two = Machine::start(&network, 2);
    let found = one.next_line();
    assert_eq!(found, format!("found {} [Router]: 10.99.0.2:7802", NodeId(2 << 96)));
    assert_eq!(two.next_line(), format!("found {} [Router]: 10.99.0.1:7801", NodeId(1 << 96)));
    two.stop();
    assert_eq!(one.next_line(), format!("lost {}", NodeId(2 << 96)));
    // It comes back, as a machine that was switched off and on.
    let mut two = Machine::start(&network, 2);
    assert_eq!(one.next_line(), found);
    two.stop();
    one.stop();
}

/// Not a test by itself: one machine's process, until its input ends.
#[test]
#[ignore = "one machine's process: `cargo test -p discovery --test namespaces` starts it in a network namespace"]
fn machine() {
    let Ok(machine) = std::env::var(MACHINE) else { return };
    let machine: u8 = machine.parse().expect("a number");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (stop, stopped) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            let _ = stop.send(());
        });
        let mut discovery = start(DiscoverySettings {
            cluster: "home".to_owned(),
            id: NodeId(u128::from(machine) << 96),
            name: "the same name".to_owned(),
            fingerprints: watch::channel(vec!["0011223344556677".to_owned()]).1,
            roles: vec![Role::Router],
            port: 7800 + u16::from(machine),
            mdns: true,
            peers: Vec::new(),
            interfaces: vec![format!("veth{machine}")],
        })
        .expect("starts");
        tokio::pin!(stopped);
        loop {
            tokio::select! {
                _ = &mut stopped => break,
                event = discovery.next() => match event.expect("runs") {
                    PeerEvent::Found { id, addresses, roles } => {
                        // Link-local IPv6 addresses come and go at first; the first IPv4 one is what counts.
                        if addresses[0].is_ipv4() {
                            println!("event: found {} {roles:?}: {}", id, addresses[0]);
                        }
                    }
                    PeerEvent::Configured { .. } => {}
                    PeerEvent::Lost { id } => println!("event: lost {id}"),
                    PeerEvent::Ignored { instance, reason } => println!("event: ignored {instance}: {reason}"),
                },
            }
        }
        discovery.shutdown().await;
    });
}

/// Two namespaces and the cable between them; removed when dropped.
struct Network {
    names: [String; 2],
}

impl Network {
    fn new() -> Result<Self, String> {
        let names = [1, 2].map(|machine| format!("discovery-{}-{machine}", std::process::id()));
        let network = Self { names };
        let [one, two] = &network.names;
        for name in [one, two] {
            ip(&["netns", "add", name])?;
        }
        ip(&["-n", one, "link", "add", "veth1", "type", "veth", "peer", "name", "veth2", "netns", two])?;
        for (name, interface, address) in [(one, "veth1", "10.99.0.1/24"), (two, "veth2", "10.99.0.2/24")] {
            ip(&["-n", name, "address", "add", address, "dev", interface])?;
            ip(&["-n", name, "link", "set", interface, "up"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        Ok(network)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            // Missing where making it failed.
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output().map_err(|error| format!("ip: {error}"))?;
    let said = || format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    if output.status.success() { Ok(()) } else { Err(said()) }
}

/// A process in a namespace; killed when dropped.
struct Machine {
    child: Child,
    lines: mpsc::Receiver<String>,
    last: Option<String>,
}

impl Machine {
    fn start(network: &Network, machine: usize) -> Self {
        let program = std::env::current_exe().expect("this program");
        let mut child = Command::new("ip")
            .args(["netns", "exec", &network.names[machine - 1]])
            .arg(program)
            .args(["--exact", "machine", "--ignored", "--nocapture"])
            .env(MACHINE, machine.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("ip runs, it did before");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if let Some(event) = line.strip_prefix("event: ")
                    && sender.send(event.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        Self { child, lines, last: None }
    }

    /// The next event that differs from the one before (addresses behind the first may change).
    fn next_line(&mut self) -> String {
        loop {
            let line = self.lines.recv_timeout(FOUND_WITHIN).expect("an event in time");
            if self.last.as_ref() != Some(&line) {
                self.last = Some(line.clone());
                return line;
            }
        }
    }

    fn stop(&mut self) {
        drop(self.child.stdin.take());
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            if let Some(status) = self.child.try_wait().expect("a child of ours") {
                assert!(status.success(), "{status}");
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("it does not stop");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
