//! Nodes that hold one model together, each with some of its layers: they answer as one process does, and whatever happens
//! to one of them, no request is lost and no process is left hanging.
//!
//! Members in namespaces of their own, whose ranks reach each other through tunnels between the nodes, and a router for the
//! client. The prompts are those of `tests/goldens`, whose tokens are nowhere near a tie: an answer that differs is wrong.
//! `scripts/test-pipeline` runs more trials than the ordinary test run and shows the figures.

use cluster_tests::{
    Client, Network, NodeProcess, NodeSpec, has_ended, model, new_key, show, stray_connection, wait_for,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{
    fmt::Write,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// The model's name in the cluster.
const MODEL: &str = "small";
/// Tokens of an answer.
const TOKENS: usize = 24;
/// The same where something is to happen meanwhile.
const LONG_TOKENS: usize = 120;
/// Members measure, and load in a debug build beside each other on two cores.
const FORMED_TIME_MAX: Duration = Duration::from_secs(90);
/// What issue 6 allows: every process of an epoch that lost a part is gone by then.
const GONE_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a member is stopped or cut off: longer than it takes to be lost.
const AWAY: Duration = Duration::from_secs(4);
/// A stream that takes longer hangs.
const STREAM_TIME_MAX: Duration = Duration::from_secs(120);

#[test]
fn stages_give_what_one_process_gives() {
    let Some(model) = model() else { return };
    let expected: Vec<String> = {
        let mut whole = NodeSpec::local("whole", &model)
            .flag("model-name", MODEL)
            .flag("max-batch", "8")
            .flag("kv-memory", "256 MiB")
            .flag("mdns", "false")
            .flag("listen", &format!("127.0.0.1:{}", cluster_tests::free_port()))
            .start();
        whole.wait_ready();
        answers(&whole.client, TOKENS).into_iter().map(|answer| answer.text).collect()
    };
    // In MiB, of which the whole model takes 900: so little that all are needed, and stages are of very different lengths.
    for memory in [&[210, 1000][..], &[210, 330, 400], &[250; 4]] {
        let members = memory.len();
        let Some(cluster) = Cluster::start(memory, members) else { return };
        cluster.wait_formed(members);
        for again in [false, true] {
            let answers = answers(&cluster.client, TOKENS);
            for (answer, expected) in answers.iter().zip(&expected) {
                assert_eq!(answer.text, *expected, "{members} stages, again: {again}");
            }
            // Blocks have 32 tokens; prompts that are shorter have nothing to hit.
            let cached: u64 = answers.iter().map(|answer| answer.cached_tokens).sum();
            assert!(!again || cached > 0, "{members} stages: nothing was cached");
        }
        let layers: Vec<u64> = cluster.stages().iter().map(|stage| stage.layers).collect();
        assert_eq!((layers.len(), layers.iter().sum::<u64>()), (members, 30), "{layers:?}");
        assert!(layers[0] < 8, "{layers:?}");
    }
}

#[test]
fn no_request_is_lost_and_nothing_hangs() {
    let trials = std::env::var("PIPELINE_TRIALS").map_or(1, |text| text.parse().expect("a whole number"));
    // Any three of them hold the model. One is not there at first: it is waited for, and then done without.
    let Some(mut cluster) = Cluster::start(&[320; 4], 3) else { return };
    cluster.wait_formed(3);
    let expected: Vec<String> =
        answers(&cluster.client, LONG_TOKENS).into_iter().map(|answer| answer.text).collect();
    cluster.start_last();
    let mut figures = Figures::default();
    for trial in 0..trials {
        for fault in Fault::ALL {
            figures.trials += 1;
            if let Err(what) = cluster.trial(fault, &expected, &mut figures) {
                figures.hung += 1;
                show(&format!("{fault:?}, trial {trial}: {what}"));
                figures.wrong.push(format!("{fault:?}, trial {trial}: {what}"));
            }
            cluster.wait_all_there();
            cluster.wait_formed(3);
        }
    }
    let json = json!({
        "fault_trials": figures.trials, "hung": figures.hung, "streams": figures.streams,
        "again_s_max": figures.again_s, "gone_s_max": figures.gone_s,
    });
    if let Some(file) = std::env::var_os("PIPELINE_JSON") {
        std::fs::write(file, json.to_string()).expect("the file can be written");
    }
    show(&json.to_string());
    assert!(figures.wrong.is_empty(), "{json}\n{}", figures.wrong.join("\n"));
}

/// What happens to a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The process of the head's rank dies.
    HeadRankKilled,
    /// A node dies; its rank is left without a parent.
    MemberKilled,
    /// The head's node dies.
    HeadKilled,
    /// A rank stops where it stands, and its node does not.
    RankStopped,
    /// A node and its rank stop where they stand, and go on later.
    MemberStopped,
    /// A node is cut off.
    LinkDown,
    /// Somebody connects to a rank's port as it is waiting for its neighbour.
    Stray,
}

impl Fault {
    const ALL: [Self; 7] = [
        Self::HeadRankKilled,
        Self::MemberKilled,
        Self::HeadKilled,
        Self::RankStopped,
        Self::MemberStopped,
        Self::LinkDown,
        Self::Stray,
    ];
}

#[derive(Debug, Default)]
struct Figures {
    trials: usize,
    /// Trials in which a request or a process was not as it has to be.
    hung: usize,
    streams: usize,
    /// The longest time from a fault to the end of all processes of its epoch, and to an engine that serves.
    gone_s: f64,
    again_s: f64,
    wrong: Vec<String>,
}

struct Cluster {
    client: Client,
    specs: Vec<NodeSpec>,
    nodes: Vec<NodeProcess>,
    _router: NodeProcess,
    _folder: tempfile::TempDir,
    // Last, so that the processes in it are gone before it goes.
    network: Network,
}

impl Cluster {
    /// The first of the members that give so many MiB; none, with a message, where it cannot be had.
    fn start(memory: &[u32], started: usize) -> Option<Self> {
        let members = memory.len() as u8;
        let model = model()?;
        let network = Network::new(members + 1)?;
        let folder = tempfile::tempdir().expect("a folder");
        let key = new_key();
        let router = NodeSpec::at(&network, members, "router", "router", &key).start();
        let names: Vec<String> = (0..members).map(|index| format!("n{index}")).collect();
        let specs: Vec<NodeSpec> = (0..members)
            .map(|index| {
                let file = folder.path().join(format!("{index}.toml"));
                let mut text =
                    format!("max_batch = 8\n[[pipeline]]\nmodel = {:?}\n", model.to_string_lossy());
                write!(text, "members = {names:?}\nkv_tokens = 4096\nforced = true\n").expect("a string");
                writeln!(text, "memory = \"{} MiB\"", memory[usize::from(index)]).expect("a string");
                std::fs::write(&file, text).expect("written");
                NodeSpec::at(&network, index, &names[usize::from(index)], "node,router", &key)
                    .flag("config", &file.to_string_lossy())
                    .flag("model-name", MODEL)
            })
            .collect();
        let nodes = specs.iter().take(started).map(NodeSpec::start).collect();
        Some(Self { client: router.client.clone(), specs, nodes, _router: router, _folder: folder, network })
    }

    fn start_last(&mut self) {
        self.nodes.push(self.specs[self.nodes.len()].start());
    }

    fn seen(&self) -> Vec<Value> {
        let Ok(answer) = self.client.get("/v1/cluster") else { return Vec::new() };
        answer.json()["nodes"].as_array().cloned().unwrap_or_default()
    }

    fn wait_all_there(&self) {
        wait_for("all members are there", FORMED_TIME_MAX, || {
            (self.seen().len() == self.nodes.len()).then_some(())
        });
    }

    /// The stages of what serves; none where nothing does.
    fn stages(&self) -> Vec<Stage> {
        let nodes = self.seen();
        let serves =
            |node: &&Value| node["engine"]["state"] == "ready" && node["pipeline"]["phase"] == "running";
        let stages = nodes.iter().find(serves).map(|node| node["pipeline"]["plan"]["stages"].clone());
        let bound = |stage: &Value, at: usize| stage["layers"][at].as_u64().expect("a number");
        let stages = stages.as_ref().and_then(Value::as_array).cloned().unwrap_or_default();
        let stage = |stage: &Value| Stage {
            node: stage["name"].as_str().expect("a name").to_owned(),
            layers: bound(stage, 1) - bound(stage, 0),
        };
        stages.iter().map(stage).collect()
    }

    fn wait_formed(&self, least: usize) {
        wait_for(&format!("{least} members serve"), FORMED_TIME_MAX, || {
            (self.stages().len() >= least).then_some(())
        });
    }

    /// Has something happen in the middle of streams, and looks what becomes of them.
    fn trial(&mut self, fault: Fault, expected: &[String], figures: &mut Figures) -> Result<(), String> {
        let begun = Arc::new(AtomicUsize::new(0));
        let streams: Vec<_> = prompts()
            .into_iter()
            .take(3)
            .map(|prompt| {
                let (client, begun) = (self.client.clone(), begun.clone());
                thread::spawn(move || ask(&client, &prompt, LONG_TOKENS, Some(&begun)))
            })
            .collect();
        figures.streams += streams.len();
        let count = streams.len();
        wait_for("all streams have begun", FORMED_TIME_MAX, || {
            (begun.load(Ordering::Relaxed) >= count).then_some(())
        });
        let stages = self.stages();
        let rank = match fault {
            Fault::HeadRankKilled | Fault::HeadKilled => 0,
            _ => 1 + figures.trials % 2,
        };
        let victim = &stages.get(rank).ok_or("nothing serves in the middle of streams")?.node;
        let victim = self.nodes.iter().position(|node| node.name == *victim).expect("one of them");
        let ranks: Vec<Option<u32>> = self.nodes.iter().map(NodeProcess::engine_pid).collect();
        let since = Instant::now();
        // Held open until the trial is over.
        let mut stray = None;
        match fault {
            Fault::HeadRankKilled => self.nodes[victim].kill_engine(),
            Fault::MemberKilled | Fault::HeadKilled => self.nodes[victim].signal(Signal::KILL),
            Fault::RankStopped => self.nodes[victim].signal_engine(Signal::STOP),
            Fault::MemberStopped => self.nodes[victim].stop(true),
            Fault::LinkDown => self.network.plug(victim as u8, false),
            Fault::Stray => {
                self.nodes[victim].kill_engine();
                // The next epoch may do without the victim: any of its ranks will do.
                let (place, port) = wait_for("a next rank has its place", FORMED_TIME_MAX, || {
                    self.nodes.iter().zip(&self.specs).zip(&ranks).find_map(|((node, spec), before)| {
                        let next = node.engine_pid().filter(|next| Some(*next) != *before)?;
                        cluster_tests::ring_address(next).map(|port| (&spec.place, port))
                    })
                });
                stray = stray_connection(place, port);
            }
        }
        // What a stopped or cut off node has is not to be had from outside; the others' must be gone.
        let away = matches!(fault, Fault::MemberStopped | Fault::LinkDown);
        let left = |ranks: &[Option<u32>]| {
            let others = ranks.iter().enumerate().filter(|(at, _)| !(away && *at == victim));
            others.filter_map(|(_, pid)| *pid).filter(|pid| !has_ended(*pid)).count()
        };
        while left(&ranks) > 0 && since.elapsed() < GONE_TIME_MAX {
            thread::sleep(Duration::from_millis(50));
        }
        let hang = left(&ranks);
        // A stranger had to wait for the next epoch's rank first.
        if fault != Fault::Stray {
            figures.gone_s = figures.gone_s.max(since.elapsed().as_secs_f64());
        }
        match fault {
            Fault::MemberKilled | Fault::HeadKilled => self.nodes[victim] = self.specs[victim].start(),
            Fault::MemberStopped | Fault::LinkDown => {
                thread::sleep(AWAY.saturating_sub(since.elapsed()));
                if fault == Fault::LinkDown {
                    self.network.plug(victim as u8, true);
                } else {
                    self.nodes[victim].stop(false);
                }
            }
            _ => {}
        }
        let mut wrong = String::new();
        for (at, stream) in streams.into_iter().enumerate() {
            match stream.join().expect("a client does not panic") {
                Ok(answer) if answer.text == expected[at] => {}
                Ok(answer) => {
                    write!(wrong, "stream {at}: {:?} instead of {:?}; ", answer.text, expected[at])
                        .expect("a string");
                }
                Err(why) => write!(wrong, "stream {at}: {why}; ").expect("a string"),
            }
        }
        drop(stray);
        figures.again_s = figures.again_s.max(since.elapsed().as_secs_f64());
        if hang > 0 {
            write!(wrong, "{hang} processes still there after {GONE_TIME_MAX:?}").expect("a string");
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }
}

struct Stage {
    node: String,
    layers: u64,
}

struct Answer {
    text: String,
    cached_tokens: u64,
}

fn prompts() -> Vec<Value> {
    let goldens: Vec<Value> = serde_json::from_str(include_str!("../../goldens/smollm2.json")).expect("JSON");
    goldens.iter().map(|golden| golden["prompt"].clone()).collect()
}

/// All prompts at once.
fn answers(client: &Client, tokens: usize) -> Vec<Answer> {
    let asked: Vec<_> = prompts()
        .into_iter()
        .map(|prompt| {
            let client = client.clone();
            thread::spawn(move || ask(&client, &prompt, tokens, None))
        })
        .collect();
    let answers = asked.into_iter().map(|asked| asked.join().expect("a client does not panic"));
    answers.map(|answer| answer.expect("an answer")).collect()
}

/// Streams an answer; counts it in `begun` once it has some text.
fn ask(
    client: &Client,
    prompt: &Value,
    tokens: usize,
    begun: Option<&AtomicUsize>,
) -> Result<Answer, String> {
    let since = Instant::now();
    let body = json!({
        "model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true,
        "stream": true, "stream_options": { "include_usage": true },
    });
    let mut stream = client.open("/v1/completions", &body).map_err(|error| error.to_string())?;
    if stream.status != 200 {
        return Err(format!("status {}", stream.status));
    }
    let (mut answer, mut written, mut pieces) = (Answer { text: String::new(), cached_tokens: 0 }, 0, 0);
    loop {
        let data = stream.next_event().map_err(|error| error.to_string())?;
        let data = data.ok_or("the stream ended without [DONE]")?;
        if data == "[DONE]" {
            break;
        }
        let event: Value = serde_json::from_str(&data).map_err(|error| format!("{error}: {data}"))?;
        if !event["error"].is_null() {
            return Err(format!("after {:?}: {event}", answer.text));
        }
        if let Some(count) = event["usage"]["completion_tokens"].as_u64() {
            written = count;
            answer.cached_tokens =
                event["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
        }
        if let Some(text) = event["choices"][0]["text"].as_str().filter(|text| !text.is_empty()) {
            answer.text.push_str(text);
            pieces += 1;
            if let Some(begun) = begun.filter(|_| pieces == 2) {
                begun.fetch_add(1, Ordering::Relaxed);
            }
        }
        if since.elapsed() > STREAM_TIME_MAX {
            return Err(format!("not over after {STREAM_TIME_MAX:?}"));
        }
    }
    if written != tokens as u64 {
        return Err(format!("{written} tokens instead of {tokens}"));
    }
    Ok(answer)
}
