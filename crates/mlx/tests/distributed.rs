//! Groups of real processes over the ring: this test starts itself, a process for each member.
#![expect(clippy::print_stdout, reason = "a member's output is read by the test that started it")]

use mlx::distributed::{Backend, Group, GroupError, RingPlace};
use mlx_rs::{Array, Dtype, ops::concatenate};
use std::{
    io::{BufRead, BufReader},
    net::{SocketAddrV4, TcpListener},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

/// Tells a process that it is a member, and what to do.
const PLAY: &str = "MLX_TEST_PLAY";
/// A neighbour notices a lost member at once; the bound is for a busy machine.
const NOTICED_WITHIN: Duration = Duration::from_secs(10);

/// Not a test by itself: one member's process.
#[test]
#[ignore = "one member's process: `cargo test -p mlx --test distributed` starts it for each member"]
fn member() {
    let Ok(play) = std::env::var(PLAY) else { return };
    let group = match Group::join(Backend::Ring) {
        Ok(group) => group,
        Err(error) => return println!("\nerror: {error}"),
    };
    match play.as_str() {
        "exchange" => exchange(&group),
        "until an error" => until_an_error(&group),
        other => println!("\nerror: unknown play {other}"),
    }
}

/// Everything a member can do, once.
fn exchange(group: &Group) {
    let (rank, size) = (group.rank() as i32, group.size() as i32);
    let own = Array::from_slice(&[rank, 10 * rank], &[1, 2]);
    let sum = group.all_sum(&own).expect("a sum");
    let all = group.all_gather(&own).expect("all of them");
    sum.eval().expect("a sum");
    all.eval().expect("all of them");
    let total = size * (size - 1) / 2;
    assert_eq!(sum.as_slice::<i32>(), [total, 10 * total]);
    let expected: Vec<i32> = (0..size).flat_map(|rank| [rank, 10 * rank]).collect();
    assert_eq!((all.shape(), all.as_slice::<i32>()), ([size, 2].as_slice(), expected.as_slice()));
    // Once around the circle; everybody appends its rank.
    let (next, before) = ((rank + 1) % size, (rank + size - 1) % size);
    let start = Array::from_slice(&[0.5_f32], &[1]);
    let appended = |array: &Array, count: i32| {
        let own = Array::from_slice(&[rank as f32], &[1]);
        let result = concatenate(&[array.clone(), own], 0).expect("concatenated");
        assert_eq!(result.shape(), [count]);
        result
    };
    if rank == 0 {
        group.send(&start, next as usize).expect("sent").eval().expect("sent");
        let back = group.recv(&[size], Dtype::Float32, before as usize).expect("received");
        back.eval().expect("received");
        let expected: Vec<f32> = std::iter::once(0.5).chain((1..size).map(|rank| rank as f32)).collect();
        assert_eq!(back.as_slice::<f32>(), expected);
    } else {
        let got = group.recv(&[rank], Dtype::Float32, before as usize).expect("received");
        group.send(&appended(&got, rank + 1), next as usize).expect("sent").eval().expect("sent");
    }
    let own = group.rank();
    assert!(matches!(group.send(&start, own), Err(GroupError::NoNeighbour { .. })));
    assert!(matches!(group.send(&start, group.size()), Err(GroupError::NoNeighbour { .. })));
    println!("\ndone: {rank} of {size}");
}

/// Works until another member is lost, and lives on.
fn until_an_error(group: &Group) {
    println!("\njoined");
    loop {
        let sum = group.all_sum(&Array::from_slice(&[1.0_f32], &[1])).expect("a sum");
        if let Err(error) = sum.eval() {
            return println!("\nlost: {}", error.what());
        }
    }
}

struct Member {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Member {
    fn start(place: Option<&RingPlace>, play: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["member", "--exact", "--ignored", "--nocapture", "--test-threads=1"]).env(PLAY, play);
        if let Some(place) = place {
            place.apply(&mut command);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("started");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, output }
    }

    /// The next line that a member wrote itself.
    fn next_line(&mut self) -> String {
        loop {
            let mut line = String::new();
            let bytes = self.output.read_line(&mut line).expect("readable");
            assert!(bytes > 0, "a member ended without a word");
            let said = ["joined", "lost: ", "done: ", "error: "];
            if said.iter().any(|said| line.starts_with(said)) {
                return line.trim_end().to_owned();
            }
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Members of one group on this machine, and their hostfile.
fn start(folder: &tempfile::TempDir, size: usize, play: &str) -> Vec<Member> {
    let listeners: Vec<_> = (0..size).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port")).collect();
    let address = |listener: &TcpListener| match listener.local_addr() {
        Ok(std::net::SocketAddr::V4(address)) => address,
        other => panic!("{other:?}"),
    };
    let addresses: Vec<SocketAddrV4> = listeners.iter().map(address).collect();
    drop(listeners);
    let hostfile = folder.path().join("hosts.json");
    std::fs::write(&hostfile, RingPlace::hostfile(&addresses)).expect("written");
    let place = |rank| RingPlace { rank, hostfile: hostfile.clone() };
    (0..size).map(|rank| Member::start(Some(&place(rank)), play)).collect()
}

#[test]
fn members_exchange_arrays() {
    for size in 2..=4 {
        let folder = tempfile::tempdir().expect("a folder");
        let mut members = start(&folder, size, "exchange");
        for (rank, member) in members.iter_mut().enumerate() {
            assert_eq!(member.next_line(), format!("done: {rank} of {size}"));
        }
    }
}

#[test]
fn neighbours_of_a_lost_member_get_an_error_and_live() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut members = start(&folder, 3, "until an error");
    for member in &mut members {
        assert_eq!(member.next_line(), "joined");
    }
    members[1].child.kill().expect("killed");
    let killed = Instant::now();
    for member in [0, 2] {
        let line = members[member].next_line();
        assert!(line.starts_with("lost: ") && line.contains("[ring]"), "{line}");
        // It went on after its error, to the end of its program.
        let status = members[member].child.wait().expect("ended");
        assert!(status.success(), "{status}");
    }
    assert!(killed.elapsed() < NOTICED_WITHIN, "{:?}", killed.elapsed());
}

#[test]
fn who_belongs_to_no_group_is_told() {
    let line = Member::start(None, "exchange").next_line();
    assert!(line.starts_with("error: joining a group over \"ring\" failed: "), "{line}");
    assert!(!line.contains("does not say why"), "{line}");
}
