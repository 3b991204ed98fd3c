//! Real nodes are killed, stopped and cut off in the middle of streams: no request is lost, no token comes twice or not
//! at all, and every text is what it is when nothing happens.
//!
//! Four nodes and a router of their own in namespaces; the client talks to the router. The prompts are those of
//! `tests/goldens`, whose tokens are nowhere near a tie: an answer that differs is wrong.
//! `scripts/test-faults` runs more streams than the ordinary test run and shows the figures.

use cluster_tests::{Client, Network, NodeProcess, NodeSpec, StreamEnd, model, new_key, wait_for};
use serde_json::{Value, json};
use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// The model's name in the cluster.
const MODEL: &str = "small";
const NODES: u8 = 4;
/// Streams at once: two for each node.
const CLIENTS: usize = 8;
/// Tokens of an answer.
const TOKENS: usize = 40;
/// The logits of two tokens that are closer may change places by rounding (`crates/mlx/tests/smollm2.rs`).
const TIE: f64 = 1e-3;
/// How long a node is stopped or cut off: longer than it takes to be lost.
const AWAY: Duration = Duration::from_secs(5);
/// How long a killed node is down.
const DOWN: Duration = Duration::from_millis(500);
/// For all nodes to be seen, on a busy machine.
const SEEN_TIME_MAX: Duration = Duration::from_secs(60);
/// What issue 4 allows a stopped node to cost others' first tokens.
const FROZEN_TTFT_S_MAX: f64 = 3.0;
/// What issue 4 allows a node that returns.
const READMITTED_S_MAX: f64 = 2.0;

struct Golden {
    prompt: Value,
    /// What the prompt gives when nothing happens, in the pieces in which it came.
    pieces: Vec<String>,
}

/// What a client saw.
struct Outcome {
    prompt: usize,
    node: String,
    sent: Instant,
    ttft: Option<Duration>,
    text: String,
    tokens: u64,
    end: StreamEnd,
}

/// A stream that is running: who began it, and how many pieces came.
type Running = Mutex<Vec<Option<(String, usize)>>>;

#[derive(Debug, Default)]
struct Figures {
    streams: usize,
    failed: usize,
    duplicated: usize,
    missing: usize,
    differing: usize,
    kills: usize,
    stops: usize,
    cuts: usize,
    /// Streams that a fault hit after their first token.
    hit: usize,
    ttft_frozen_s: Vec<f64>,
    readmitted_s: Vec<f64>,
}

impl Figures {
    fn json(&mut self) -> Value {
        self.ttft_frozen_s.sort_by(f64::total_cmp);
        let p99 = (self.ttft_frozen_s.len() * 99).div_ceil(100).checked_sub(1);
        json!({
            "streams": self.streams, "failed": self.failed, "duplicated": self.duplicated,
            "missing": self.missing, "differing": self.differing, "kills": self.kills,
            "stops": self.stops, "cuts": self.cuts, "hit": self.hit,
            "ttft_p99_during_freeze_s": p99.map(|at| self.ttft_frozen_s[at]),
            "readmitted_s": self.readmitted_s.iter().copied().reduce(f64::max),
        })
    }
}

#[test]
fn nobody_loses_a_token() {
    let number = |name: &str, usual: usize| {
        std::env::var(name).map_or(usual, |text| text.parse().expect("a whole number"))
    };
    let (streams, kills) = (number("FAULTS_STREAMS", 40), number("FAULTS_KILLS", 2));
    let Some(mut cluster) = Cluster::start() else { return };
    let goldens = cluster.goldens();
    let (running, outcomes) = (Running::new(vec![None; CLIENTS]), Mutex::new(Vec::new()));
    let (stop, next) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut figures = Figures::default();
    let client = cluster.client.clone();
    let frozen = thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        for slot in 0..CLIENTS {
            let (client, goldens, running, outcomes) = (&client, &goldens, &running, &outcomes);
            let (stop, next) = (&stop, &next);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let prompt = next.fetch_add(1, Ordering::Relaxed) % goldens.len();
                    let outcome = ask(client, &goldens[prompt].prompt, prompt, |node, pieces| {
                        running.lock().expect("no panic")[slot] = Some((node.to_owned(), pieces));
                    });
                    running.lock().expect("no panic")[slot] = None;
                    outcomes.lock().expect("no panic").push(outcome);
                }
            });
        }
        cluster.disturb(&mut figures, &running, &outcomes, (streams, kills))
    });
    let outcomes = outcomes.into_inner().expect("no panic");
    figures.streams = outcomes.len();
    let mut wrong = Vec::new();
    for outcome in &outcomes {
        let in_freeze = frozen.iter().any(|(from, to)| (*from..*to).contains(&outcome.sent));
        if in_freeze && let Some(ttft) = outcome.ttft {
            figures.ttft_frozen_s.push(ttft.as_secs_f64());
        }
        if let Some(what) = figures.count(outcome, &goldens[outcome.prompt].pieces) {
            wrong.push(what);
        }
    }
    let json = figures.json();
    let file = std::env::var_os("FAULTS_JSON");
    if let Some(file) = &file {
        std::fs::write(file, json.to_string()).expect("the file can be written");
    }
    assert!(wrong.is_empty(), "{json}\n{}", wrong.join("\n"));
    assert!(figures.hit > 0, "{json}: no fault hit a stream");
    // Times mean something on a machine that does nothing else: where they are asked for.
    let within =
        |value: &Value, most: f64| file.is_none() || value.as_f64().is_none_or(|value| value <= most);
    assert!(within(&json["ttft_p99_during_freeze_s"], FROZEN_TTFT_S_MAX), "{json}");
    assert!(within(&json["readmitted_s"], READMITTED_S_MAX), "{json}");
}

/// Ends the clients, also where the test fails: they are waited for.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Cluster {
    client: Client,
    specs: Vec<NodeSpec>,
    nodes: Vec<NodeProcess>,
    _router: NodeProcess,
    // Last, so that the processes in it are gone before it goes.
    network: Network,
}

impl Cluster {
    /// None, with a message, where it cannot be had.
    fn start() -> Option<Self> {
        let model = model()?;
        let network = Network::new(NODES + 1)?;
        let key = new_key();
        let router = NodeSpec::at(&network, NODES, "router", "router", &key).start();
        let specs: Vec<NodeSpec> = (0..NODES)
            .map(|index| {
                NodeSpec::at(&network, index, &format!("n{index}"), "node,router", &key)
                    .flag("model", &model.to_string_lossy())
                    .flag("model-name", MODEL)
                    .flag("max-batch", "4")
                    .flag("kv-memory", "256 MiB")
            })
            .collect();
        let mut nodes: Vec<NodeProcess> = specs.iter().map(NodeSpec::start).collect();
        for node in &mut nodes {
            node.wait_ready();
        }
        let client = router.client.clone();
        let cluster = Self { client, specs, nodes, _router: router, network };
        cluster.wait_all_seen();
        Some(cluster)
    }

    fn wait_all_seen(&self) {
        wait_for("all nodes are seen", SEEN_TIME_MAX, || {
            (self.client.ready_nodes().len() == usize::from(NODES)).then_some(())
        });
    }

    /// The prompts, and what they give when nothing happens.
    fn goldens(&self) -> Vec<Golden> {
        let goldens: Vec<Value> =
            serde_json::from_str(include_str!("../../goldens/smollm2.json")).expect("JSON");
        let golden = |golden: &Value| {
            let gaps = golden["gaps"].as_array().expect("gaps").iter().take(TOKENS);
            assert!(gaps.clone().all(|gap| gap.as_f64().expect("a number") > TIE), "a tie in {golden}");
            let mut pieces = Vec::new();
            let mut stream = open(&self.client, &golden["prompt"]).expect("connected");
            while let Some(Piece::Text(text)) = next_piece(&mut stream) {
                pieces.push(text);
            }
            assert!(!pieces.is_empty(), "{golden} gives nothing");
            Golden { prompt: golden["prompt"].clone(), pieces }
        };
        goldens.iter().map(golden).collect()
    }

    /// Kills, stops and cuts off nodes that are in the middle of streams, until there were enough; says when one was
    /// stopped.
    fn disturb(
        &mut self,
        figures: &mut Figures,
        running: &Running,
        outcomes: &Mutex<Vec<Outcome>>,
        (streams, kills): (usize, usize),
    ) -> Vec<(Instant, Instant)> {
        let mut frozen = Vec::new();
        // Two kills for each of the others: there are to be many.
        for round in 0.. {
            let done = outcomes.lock().expect("no panic").len();
            if done >= streams && figures.kills >= kills && figures.stops > 0 && figures.cuts > 0 {
                break;
            }
            let victim = wait_for("a node is in the middle of streams", SEEN_TIME_MAX, || {
                let running = running.lock().expect("no panic");
                let begun =
                    running.iter().flatten().filter(|(_, pieces)| (2..TOKENS * 2 / 3).contains(pieces));
                let mut begun: Vec<&String> = begun.map(|(node, _)| node).collect();
                begun.sort();
                // Each in turn, as far as they have any.
                let turn = begun.get(round % begun.len().max(1))?;
                self.nodes.iter().position(|node| node.name == **turn)
            });
            let name = self.nodes[victim].name.clone();
            let on_victim = |entry: &&(String, usize)| entry.0 == name && entry.1 > 0;
            figures.hit += running.lock().expect("no panic").iter().flatten().filter(on_victim).count();
            match round % 4 {
                0 | 2 => {
                    self.nodes[victim].kill();
                    thread::sleep(DOWN);
                    self.nodes[victim] = self.specs[victim].start();
                    self.nodes[victim].wait_ready();
                    let ready = Instant::now();
                    let used = wait_for("the node that returned has a request", SEEN_TIME_MAX, || {
                        let running = running.lock().expect("no panic");
                        running.iter().flatten().any(|entry| entry.0 == name).then(Instant::now)
                    });
                    figures.readmitted_s.push((used - ready).as_secs_f64());
                    figures.kills += 1;
                }
                1 => {
                    self.nodes[victim].stop(true);
                    let from = Instant::now();
                    thread::sleep(AWAY);
                    self.nodes[victim].stop(false);
                    frozen.push((from, Instant::now()));
                    figures.stops += 1;
                }
                _ => {
                    self.network.plug(victim as u8, false);
                    thread::sleep(AWAY);
                    self.network.plug(victim as u8, true);
                    figures.cuts += 1;
                }
            }
            self.wait_all_seen();
        }
        frozen
    }
}

fn open(client: &Client, prompt: &Value) -> std::io::Result<cluster_tests::Sse> {
    client.open(
        "/v1/completions",
        &json!({
            "model": MODEL, "prompt": prompt, "max_tokens": TOKENS,
            "temperature": 0, "ignore_eos": true, "stream": true, "stream_options": { "include_usage": true },
        }),
    )
}

enum Piece {
    Text(String),
    Tokens(u64),
    Other,
    End(StreamEnd),
}

/// The next event of a stream; none where it ended in order.
fn next_piece(stream: &mut cluster_tests::Sse) -> Option<Piece> {
    let broken = |what: String| Some(Piece::End(StreamEnd::Broken(what)));
    let data = match stream.next_event() {
        Ok(Some(data)) if data == "[DONE]" => return None,
        Ok(Some(data)) => data,
        Ok(None) => return broken("the stream ended without [DONE]".to_owned()),
        Err(error) => return broken(error.to_string()),
    };
    let Ok(event) = serde_json::from_str::<Value>(&data) else { return broken(format!("no JSON: {data}")) };
    if !event["error"].is_null() {
        return Some(Piece::End(StreamEnd::Error(event)));
    }
    if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
        return Some(Piece::Tokens(tokens));
    }
    match event["choices"][0]["text"].as_str() {
        Some(text) if !text.is_empty() => Some(Piece::Text(text.to_owned())),
        _ => Some(Piece::Other),
    }
}

fn ask(client: &Client, prompt: &Value, index: usize, mut progress: impl FnMut(&str, usize)) -> Outcome {
    let sent = Instant::now();
    let mut outcome = Outcome {
        prompt: index,
        node: String::new(),
        sent,
        ttft: None,
        text: String::new(),
        tokens: 0,
        end: StreamEnd::Finished("length".to_owned()),
    };
    let mut stream = match open(client, prompt) {
        Ok(stream) if stream.status == 200 => stream,
        Ok(stream) => {
            outcome.end = StreamEnd::Broken(format!("status {}", stream.status));
            return outcome;
        }
        Err(error) => {
            outcome.end = StreamEnd::Broken(error.to_string());
            return outcome;
        }
    };
    let route = stream.headers.get("x-mlx-route").cloned().unwrap_or_default();
    let node = (0..NODES).map(|index| format!("n{index}")).find(|name| route.contains(name.as_str()));
    outcome.node = node.unwrap_or(route);
    let mut pieces = 0;
    progress(&outcome.node, pieces);
    while let Some(piece) = next_piece(&mut stream) {
        match piece {
            Piece::Text(text) => {
                outcome.ttft.get_or_insert_with(|| sent.elapsed());
                outcome.text.push_str(&text);
                pieces += 1;
                progress(&outcome.node, pieces);
            }
            Piece::Tokens(tokens) => outcome.tokens = tokens,
            Piece::Other => {}
            Piece::End(end) => {
                outcome.end = end;
                break;
            }
        }
    }
    outcome
}

impl Figures {
    /// Counts what is wrong with an answer, and says so.
    fn count(&mut self, outcome: &Outcome, expected: &[String]) -> Option<String> {
        let Outcome { node, text, tokens, end, .. } = outcome;
        if !matches!(end, StreamEnd::Finished(_)) {
            self.failed += 1;
            return Some(format!("failed on {node} after {text:?}: {end:?}"));
        }
        let whole = expected.concat();
        if *text == whole && *tokens == TOKENS as u64 {
            return None;
        }
        match shift(&whole, text) {
            0 => self.differing += 1,
            chars if chars > 0 => self.duplicated += pieces_of(expected, chars as usize),
            chars => self.missing += pieces_of(expected, chars.unsigned_abs()),
        }
        Some(format!("{node}, {tokens} tokens:\n  {text:?} instead of\n  {whole:?}"))
    }
}

/// By how many bytes `got` is longer, or shorter, than `expected` where they differ first; 0 where it is another text.
fn shift(expected: &str, got: &str) -> isize {
    const ALIKE: usize = 12;
    let same = expected.char_indices().zip(got.chars()).take_while(|((_, one), other)| one == other);
    let at = same.last().map_or(0, |((at, one), _)| at + one.len_utf8());
    let (expected, got) = (&expected[at..], &got[at..]);
    let begin = |text: &str| text.chars().take(ALIKE).collect::<String>();
    match (expected.find(&begin(got)), got.find(&begin(expected))) {
        (Some(missing), _) if missing > 0 => -(missing as isize),
        (_, Some(extra)) if extra > 0 => extra as isize,
        _ => 0,
    }
}

/// About how many tokens so many bytes are; at least one.
fn pieces_of(pieces: &[String], bytes: usize) -> usize {
    (bytes * pieces.len()).div_ceil(pieces.concat().len().max(1)).max(1)
}

#[test]
fn what_is_wrong_is_told_apart() {
    let check = |got: &str, expected: isize| {
        let text = "one two three four five six seven eight nine ten";
        assert_eq!(shift(text, got), expected, "{got}");
    };
    check("one two three five six seven eight nine ten", -5);
    check("one two three four three four five six seven eight nine ten", 11);
    check("one two three four and so on and on and on", 0);
}
