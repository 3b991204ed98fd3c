//! Processes of a pipeline, as a node starts them: one that measures, and a head and a stage that find each other, tell that
//! they live, generate, and end with their parent.
//!
//! `MLX_TEST_MODEL` names the `.gguf` file (`scripts/fetch-test-model` prints where it is); without it these skip.
#![expect(clippy::print_stdout, reason = "why a test is skipped")]

use bytes::BytesMut;
use mlx::distributed::RingPlace;
use std::{
    io::{Read, Write},
    net::{SocketAddr, SocketAddrV4, TcpListener},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};
use types::{
    CacheScope, GenerateDraft, OutputRules, RequestId, SamplingParams, Service, Speculation, TokenEvent,
    TokenReport,
};
use wire::{Decoder, EngineCommand, EngineReport, FrameClass};

/// A debug build on a busy machine, several times over.
const PATIENCE: Duration = Duration::from_secs(60);

struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    reports: Receiver<EngineReport>,
}

impl Process {
    fn start(task: &str, place: Option<&RingPlace>) -> Option<Self> {
        let Some(model) = std::env::var_os("MLX_TEST_MODEL") else {
            println!("skipped: MLX_TEST_MODEL is not set (scripts/fetch-test-model)");
            return None;
        };
        let model = serde_json::Value::from(model.to_string_lossy().into_owned());
        let settings = format!(
            r#"{{"model": {model}, "name": "small", "slots": 4, "context_tokens": 1024, "kv_bytes": null, "kv_bits": null,
            "verify": false, "dequantize": "auto", "device": "cpu", "ttft_target": {{"secs": 1, "nanos": 0}},
            "tpot_target": {{"secs": 1, "nanos": 0}}, "prefix_cache": true, "speculation": false,
            "session_ttl": {{"secs": 60, "nanos": 0}}, "session_quota": 0.5, "log": "warn", "log_format": "human",
            "task": {task}}}"#
        );
        let mut command = Command::new(env!("CARGO_BIN_EXE_mlx-node"));
        command.args(["engine", "--settings", &settings]).stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(place) = place {
            place.apply(&mut command);
        }
        let mut child = command.spawn().expect("the program runs");
        let mut stdout = child.stdout.take().expect("piped");
        let (sender, reports) = channel();
        thread::spawn(move || {
            let decoder = Decoder::<EngineReport>::new(FrameClass::Engine);
            let (mut buffer, mut chunk) = (BytesMut::new(), vec![0; 1 << 16]);
            while let Ok(count @ 1..) = stdout.read(&mut chunk) {
                buffer.extend_from_slice(&chunk[..count]);
                while let Some(report) = decoder.next(&mut buffer).expect("frames") {
                    if sender.send(report).is_err() {
                        return;
                    }
                }
            }
        });
        let stdin = child.stdin.take();
        Some(Self { child, stdin, reports })
    }

    /// What it tells up to the first report that is `last`.
    fn until(&self, last: impl Fn(&EngineReport) -> bool) -> Vec<EngineReport> {
        let mut told = Vec::new();
        while !told.last().is_some_and(&last) {
            told.push(self.reports.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("only told {told:?}")));
        }
        told
    }

    fn ended_within(&mut self, most: Duration) -> bool {
        let begin = Instant::now();
        while begin.elapsed() < most {
            if self.child.try_wait().expect("ours").is_some() {
                return true;
            }
            thread::sleep(Duration::from_millis(20));
        }
        false
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn places(folder: &tempfile::TempDir) -> [RingPlace; 2] {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
    let addresses: Vec<SocketAddrV4> = listeners
        .iter()
        .map(|listener| match listener.local_addr().expect("bound") {
            SocketAddr::V4(address) => address,
            SocketAddr::V6(address) => panic!("{address}"),
        })
        .collect();
    let hostfile = folder.path().join("hosts.json");
    std::fs::write(&hostfile, RingPlace::hostfile(&addresses)).expect("written");
    [0, 1].map(|rank| RingPlace { rank, hostfile: hostfile.clone() })
}

const RANK: &str = r#"{"rank": {"layers": [[0, 12], [12, 30]], "kv_tokens": 2048, "jaccl": false}}"#;

#[test]
fn a_profile_is_measured_and_told() {
    let Some(mut process) = Process::start(r#"{"measure": {"rows": 2}}"#, None) else { return };
    let told = process.until(|report| matches!(report, EngineReport::Profile(_)));
    let Some(EngineReport::Profile(profile)) = told.last() else { panic!("{told:?}") };
    assert_eq!(profile.layer_bytes.len(), 30);
    assert!(process.ended_within(PATIENCE));
}

#[test]
fn ranks_join_beat_serve_and_end_with_their_parent() {
    let folder = tempfile::tempdir().expect("a folder");
    let [first, second] = places(&folder);
    let Some(mut head) = Process::start(RANK, Some(&first)) else { return };
    // A rank that waits for the others lives, and says so.
    head.until(|report| matches!(report, EngineReport::Beat { .. }));
    let mut stage = Process::start(RANK, Some(&second)).expect("as before");
    let told = stage.until(|report| matches!(report, EngineReport::StageReady));
    let joined = told.iter().position(|report| *report == EngineReport::Joined).expect("joined");
    let loading = told.iter().position(|report| matches!(report, EngineReport::Loading { .. }));
    assert!(loading.is_some_and(|loading| joined < loading), "{told:?}");
    let told = head.until(|report| matches!(report, EngineReport::Ready { .. }));
    assert!(told.contains(&EngineReport::Joined), "{told:?}");

    let draft = GenerateDraft {
        id: RequestId(1),
        model: "small".to_owned(),
        prompt: vec![1, 2, 3],
        sampling: SamplingParams::greedy(),
        max_tokens: 8,
        stop_tokens: Vec::new(),
        ignore_eos: true,
        service: Service::default(),
        cache: CacheScope::default(),
        output: Vec::new(),
        rules: OutputRules::default(),
        report: TokenReport::default(),
        speculation: Speculation::default(),
    };
    let request = EngineCommand::Submit(Box::new(draft.try_into().expect("valid")));
    let mut frames = BytesMut::new();
    wire::encode(FrameClass::Engine, &request, &mut frames).expect("small");
    head.stdin.as_mut().expect("open").write_all(&frames).expect("heard");
    let over =
        |report: &EngineReport| matches!(report, EngineReport::Event { event: TokenEvent::Finished(_), .. });
    let told = head.until(over);
    let tokens = told.iter().map(|report| match report {
        EngineReport::Event { event: TokenEvent::Tokens { tokens, .. }, .. } => tokens.len(),
        _ => 0,
    });
    assert_eq!(tokens.sum::<usize>(), 8, "{told:?}");
    let before = stage.until(|report| matches!(report, EngineReport::Beat { passes: 8.. }));
    assert!(!before.is_empty());

    // Its parent is gone: it ends, and tells the other rank, which ends too.
    head.stdin = None;
    assert!(head.ended_within(Duration::from_secs(5)), "the head lives on");
    assert!(stage.ended_within(Duration::from_secs(5)), "the stage lives on");
}

/// Inside MLX, where it waits for the other rank.
#[test]
fn a_rank_that_waits_for_others_ends_with_its_parent() {
    for rank in 0..2 {
        let folder = tempfile::tempdir().expect("a folder");
        let Some(mut process) = Process::start(RANK, Some(&places(&folder)[rank])) else { return };
        process.until(|report| matches!(report, EngineReport::Beat { .. }));
        process.stdin = None;
        assert!(process.ended_within(Duration::from_secs(5)), "rank {rank} lives on");
    }
}

/// Another rank is lost in the middle of everything: with its parent, a rank ends in any case.
#[test]
fn a_rank_whose_neighbour_is_killed_ends_by_itself_or_with_its_parent() {
    for killed in 0..2 {
        let folder = tempfile::tempdir().expect("a folder");
        let places = places(&folder);
        let Some(mut ranks) =
            places.iter().map(|place| Process::start(RANK, Some(place))).collect::<Option<Vec<_>>>()
        else {
            return;
        };
        ranks[1].until(|report| matches!(report, EngineReport::StageReady));
        ranks[0].until(|report| matches!(report, EngineReport::Ready { .. }));
        ranks[killed].child.kill().expect("ours");
        let left = &mut ranks[1 - killed];
        let by_itself = left.ended_within(Duration::from_secs(1));
        left.stdin = None;
        assert!(by_itself || left.ended_within(Duration::from_secs(3)), "rank {} lives on", 1 - killed);
    }
}
