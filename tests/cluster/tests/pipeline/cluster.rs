//! A cluster whose nodes hold one model together, and what is asked of it.

use cluster_tests::{Client, Network, NodeProcess, NodeSpec, model, new_key, wait_for};
use serde_json::{Value, json};
use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

/// The model's name in the cluster.
pub(crate) const MODEL: &str = "small";
/// Tokens of an answer where something is to happen meanwhile.
pub(crate) const LONG_TOKENS: usize = 120;
/// Members measure, and load in a debug build beside each other on two cores, which may be busy with something else too.
pub(crate) const FORMED_TIME_MAX: Duration = Duration::from_secs(180);
/// As long as a test waits for a stream.
pub(crate) const QUEUE_TIME: &str = "240 s";
/// A stream that takes longer hangs.
const STREAM_TIME_MAX: Duration = Duration::from_secs(240);

/// How ranks reach each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Links {
    Tunnel,
    Direct,
}

/// A member's configuration, who gives so many MiB.
pub(crate) fn pipeline_file(model: &Path, members: &[impl AsRef<str>], memory: u32, links: Links) -> String {
    let members: Vec<&str> = members.iter().map(AsRef::as_ref).collect();
    let links = match links {
        Links::Tunnel => "tunnel",
        Links::Direct => "direct",
    };
    format!(
        "max_batch = 8\n[[pipeline]]\nmodel = {:?}\nmembers = {members:?}\nkv_tokens = 4096\nforced = true\n\
         memory = \"{memory} MiB\"\nlinks = \"{links}\"\n",
        model.to_string_lossy()
    )
}

pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) specs: Vec<NodeSpec>,
    pub(crate) nodes: Vec<NodeProcess>,
    _router: NodeProcess,
    _folder: tempfile::TempDir,
    // Last, so that the processes in it are gone before it goes.
    pub(crate) network: Network,
}

impl Cluster {
    /// The first of the members that give so many MiB; none, with a message, where it cannot be had.
    pub(crate) fn start(memory: &[u32], started: usize, links: Links) -> Option<Self> {
        let members = memory.len() as u8;
        let model = model()?;
        let network = Network::new(members + 1)?;
        let folder = tempfile::tempdir().expect("a folder");
        let key = new_key();
        // A machine that is busy measures itself as slow, and nothing is to be refused for that.
        let spec = |index: u8, name: &str, roles: &str| {
            let spec = NodeSpec::at(&network, index, name, roles, &key).flag("queue-time", QUEUE_TIME);
            if links == Links::Tunnel {
                return spec;
            }
            // Found over mDNS, they may be connected by IPv6, which a ring without tunnels has no use for.
            let others = (0..=members).filter(|other| *other != index);
            let others = others.map(|other| format!("{}:7415", network.place(other).1));
            spec.flag("mdns", "false").flag("peers", &others.collect::<Vec<_>>().join(","))
        };
        let router = spec(members, "router", "router").start();
        let names: Vec<String> = (0..members).map(|index| format!("n{index}")).collect();
        let specs: Vec<NodeSpec> = (0..members)
            .map(|index| {
                let file = folder.path().join(format!("{index}.toml"));
                let text = pipeline_file(&model, &names, memory[usize::from(index)], links);
                std::fs::write(&file, text).expect("written");
                spec(index, &names[usize::from(index)], "node,router")
                    .flag("config", &file.to_string_lossy())
                    .flag("model-name", MODEL)
            })
            .collect();
        let nodes = specs.iter().take(started).map(NodeSpec::start).collect();
        Some(Self { client: router.client.clone(), specs, nodes, _router: router, _folder: folder, network })
    }

    pub(crate) fn start_last(&mut self) {
        self.nodes.push(self.specs[self.nodes.len()].start());
    }

    pub(crate) fn wait_all_there(&self) {
        wait_for("all members are there", FORMED_TIME_MAX, || {
            (seen(&self.client).len() == self.nodes.len()).then_some(())
        });
    }

    /// The stages of what serves; none where nothing does.
    pub(crate) fn stages(&self) -> Vec<Stage> {
        stages(&self.client)
    }

    pub(crate) fn wait_formed(&self, least: usize) {
        wait_for(&format!("{least} members serve"), FORMED_TIME_MAX, || {
            (self.stages().len() >= least).then_some(())
        });
    }
}

fn seen(client: &Client) -> Vec<Value> {
    let Ok(answer) = client.get("/v1/cluster") else { return Vec::new() };
    answer.json()["nodes"].as_array().cloned().unwrap_or_default()
}

/// The stages of what serves, as an endpoint knows it; none where nothing does.
pub(crate) fn stages(client: &Client) -> Vec<Stage> {
    let nodes = seen(client);
    let serves = |node: &&Value| node["engine"]["state"] == "ready" && node["pipeline"]["phase"] == "running";
    let stages = nodes.iter().find(serves).map(|node| node["pipeline"]["plan"]["stages"].clone());
    let bound = |stage: &Value, at: usize| stage["layers"][at].as_u64().expect("a number");
    let stages = stages.as_ref().and_then(Value::as_array).cloned().unwrap_or_default();
    let stage = |stage: &Value| Stage {
        node: stage["name"].as_str().expect("a name").to_owned(),
        layers: bound(stage, 1) - bound(stage, 0),
    };
    stages.iter().map(stage).collect()
}

pub(crate) struct Stage {
    pub(crate) node: String,
    pub(crate) layers: u64,
}

pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) cached_tokens: u64,
}

pub(crate) fn prompts() -> Vec<Value> {
    let goldens: Vec<Value> =
        serde_json::from_str(include_str!("../../../goldens/smollm2.json")).expect("JSON");
    goldens.iter().map(|golden| golden["prompt"].clone()).collect()
}

/// All prompts at once.
pub(crate) fn answers(client: &Client, tokens: usize) -> Vec<Answer> {
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
pub(crate) fn ask(
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
