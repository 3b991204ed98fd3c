//! `mlx-node status`, `nodes`, `models` and `plan`: what a running endpoint knows, as tables or as JSON.
#![expect(clippy::print_stdout, reason = "what the commands print is their result")]

use crate::{
    config::Values,
    endpoint::{AskError, Endpoint},
    plan,
    table::{NONE, columns, compact},
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write, stdout},
    time::Duration,
};

/// How often `--watch` looks.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Clears a terminal and goes to its upper left corner.
const CLEAR: &str = "\x1b[H\x1b[2J\x1b[3J";

/// What to show of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Sight {
    /// The cluster and a line for each node.
    Status,
    /// All that is known of each node.
    Nodes,
    /// What is served.
    Models,
    /// How pipelines are divided: all, or those of the model that is called so.
    Plan(Option<String>),
}

impl Sight {
    fn path(&self) -> &'static str {
        match self {
            Self::Status | Self::Nodes | Self::Plan(_) => "/v1/cluster",
            Self::Models => "/v1/models",
        }
    }

    fn table(&self, answer: &Value, cluster: &Value) -> String {
        match self {
            Self::Status => status(cluster),
            Self::Nodes => nodes(cluster),
            Self::Models => models(answer, cluster),
            Self::Plan(model) => plan::shown(cluster, model.as_deref()),
        }
    }
}

/// Prints it once, or again and again until Ctrl-C.
pub(crate) async fn show(values: &Values, sight: Sight, json: bool, watch: bool) -> Result<(), AskError> {
    let endpoint = Endpoint::of(values)?;
    loop {
        let answer = endpoint.get_json(sight.path()).await?;
        if json {
            match &sight {
                Sight::Plan(model) => {
                    let plans = plan::plans(&answer, model.as_deref());
                    println!("{}", Value::from_iter(plans.into_iter().cloned()));
                }
                Sight::Status | Sight::Nodes | Sight::Models => println!("{answer}"),
            }
        } else {
            let cluster = match &sight {
                Sight::Models => endpoint.get_json("/v1/cluster").await?,
                Sight::Status | Sight::Nodes | Sight::Plan(_) => answer.clone(),
            };
            let clear = if watch && stdout().is_terminal() { CLEAR } else { "" };
            print!("{clear}{}", sight.table(&answer, &cluster));
        }
        // Where nobody reads any more there is nobody to tell.
        if stdout().flush().is_err() || !watch {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(WATCH_INTERVAL) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => NONE.to_owned(),
        other => other.to_string(),
    }
}

pub(crate) fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

pub(crate) fn number(value: &Value, shown: impl Fn(f64) -> String) -> String {
    value.as_f64().map_or_else(|| NONE.to_owned(), shown)
}

pub(crate) fn milliseconds(seconds: f64) -> String {
    format!("{:.1} ms", seconds * 1e3)
}

fn state(node: &Value) -> String {
    let engine = &node["engine"];
    let state = if engine["state"].is_null() { text(engine) } else { text(&engine["state"]) };
    if node["avoided"] == true { format!("{state}, avoided") } else { state }
}

fn model_names(node: &Value) -> String {
    let names: Vec<String> = list(&node["models"]).map(|model| text(&model["name"])).collect();
    if names.is_empty() { NONE.to_owned() } else { names.join(", ") }
}

fn address(node: &Value) -> String {
    if node["local"] == true { "this process".to_owned() } else { text(&node["address"]) }
}

fn slots(node: &Value) -> String {
    let load = &node["load"];
    number(&load["slots"], |slots| format!("{}/{slots}", text(&load["running"])))
}

/// The cluster as text: a line each for itself and for every node, and the last requests that moved.
fn status(cluster: &Value) -> String {
    let row = |node: &Value| {
        let rtt = number(&node["rtt_s"], milliseconds);
        let waiting = text(&node["load"]["waiting"]);
        let hardware = text(&node["hardware"]);
        [
            text(&node["name"]),
            state(node),
            model_names(node),
            slots(node),
            waiting,
            rtt,
            address(node),
            hardware,
        ]
    };
    let rows: Vec<_> = list(&cluster["nodes"]).map(row).collect();
    let mut out = format!(
        "cluster {}: {} requests in flight, {} waiting{}\n",
        text(&cluster["cluster"]),
        text(&cluster["in_flight"]),
        text(&cluster["waiting"]),
        if cluster["draining"] == true { ", leaving" } else { "" }
    );
    let heads = ["NODE", "STATE", "MODELS", "RUNNING", "WAITING", "RTT", "ADDRESS", "HARDWARE"];
    out.push_str(&columns(heads, &rows));
    for moved in list(&cluster["recent_moves"]) {
        out.push_str(&format!(
            "{} s ago: request {} {} from {} to {} after {} tokens: {}\n",
            number(&moved["age_s"], |age| format!("{age:.0}")),
            text(&moved["request"]),
            text(&moved["kind"]).replace('_', " "),
            text(&moved["from"]),
            text(&moved["to"]),
            text(&moved["tokens"]),
            text(&moved["why"])
        ));
    }
    out
}

/// All that is known of each node.
fn nodes(cluster: &Value) -> String {
    let row = |node: &Value| {
        let (load, prediction) = (&node["load"], &node["prediction"]);
        let kv = number(&load["kv_tokens"][1], |all| {
            let used = load["kv_tokens"][0].as_f64().unwrap_or(0.0);
            format!("{}/{}", compact(used), compact(all))
        });
        let learned = prediction["requests"].as_f64().filter(|requests| *requests > 0.0);
        let off = learned.map_or_else(
            || NONE.to_owned(),
            |_| number(&prediction["error"], |error| format!("{:.0} %", error * 100.0)),
        );
        [
            text(&node["name"]),
            state(node),
            text(&node["hardware"]),
            model_names(node),
            slots(node),
            kv,
            number(&load["cached_kv_tokens"], compact),
            number(&load["rates"]["prefill_tokens_per_s"], |rate| format!("{}/s", compact(rate))),
            number(&load["decode_step_s"][0], milliseconds),
            number(&node["rtt_s"], milliseconds),
            off,
            text(&node["version"]),
            address(node),
        ]
    };
    let rows: Vec<_> = list(&cluster["nodes"]).map(row).collect();
    let heads = [
        "NODE", "STATE", "HARDWARE", "MODELS", "RUNNING", "KV", "CACHED", "READS", "STEP", "RTT", "OFF",
        "VERSION", "ADDRESS",
    ];
    columns(heads, &rows)
}

/// What is served, and by whom.
fn models(answer: &Value, cluster: &Value) -> String {
    let mut holders: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for node in list(&cluster["nodes"]) {
        for model in list(&node["models"]) {
            holders.entry(text(&model["name"])).or_default().push(text(&node["name"]));
        }
    }
    let row = |model: &Value| {
        let name = text(&model["id"]);
        let nodes = holders.get(&name).map_or_else(|| NONE.to_owned(), |nodes| nodes.join(", "));
        [name, text(&model["max_model_len"]), nodes]
    };
    let rows: Vec<_> = list(&answer["data"]).map(row).collect();
    if rows.is_empty() {
        return "no model can be asked now\n".to_owned();
    }
    columns(["MODEL", "CONTEXT", "NODES"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn cluster() -> Value {
        json!({
            "cluster": "home", "in_flight": 2, "waiting": 0,
            "nodes": [
                { "name": "one", "local": true, "address": null, "hardware": "M4", "engine": { "state": "ready" },
                  "models": [{ "name": "smol" }], "rtt_s": null, "version": "0.1.0", "avoided": true,
                  "load": { "running": 2, "slots": 16, "waiting": 1, "kv_tokens": [1200, 64000],
                            "cached_kv_tokens": 500, "rates": { "prefill_tokens_per_s": 2345.0 },
                            "decode_step_s": [0.0125, 0.02] },
                  "prediction": { "requests": 3, "error": 0.125 } },
                { "name": "second", "local": false, "address": "10.0.0.2:7415", "hardware": "M1",
                  "engine": { "state": "loading" }, "models": [], "load": null, "rtt_s": 0.0012,
                  "prediction": { "requests": 0, "error": 0.0 }, "version": "0.1.0" },
            ],
        })
    }

    #[test]
    fn nodes_are_shown_in_columns() {
        let expected = "\
cluster home: 2 requests in flight, 0 waiting
NODE    STATE           MODELS  RUNNING  WAITING  RTT     ADDRESS        HARDWARE
one     ready, avoided  smol    2/16     1        -       this process   M4
second  loading         -       -        -        1.2 ms  10.0.0.2:7415  M1
";
        assert_eq!(status(&cluster()), expected);
        let expected = "\
NODE    STATE           HARDWARE  MODELS  RUNNING  KV        CACHED  READS   STEP     RTT     OFF   VERSION  ADDRESS
one     ready, avoided  M4        smol    2/16     1.2k/64k  500     2.3k/s  12.5 ms  -       12 %  0.1.0    this process
second  loading         M1        -       -        -         -       -       -        1.2 ms  -     0.1.0    10.0.0.2:7415
";
        assert_eq!(nodes(&cluster()), expected);
    }

    #[test]
    fn moves_and_models_are_told() {
        let moved = json!({ "request": "0a", "kind": "hedge_won", "from": "a", "to": "b", "tokens": 7,
                            "why": "silent", "age_s": 3.2 });
        let shown = status(&json!({ "cluster": "c", "in_flight": 0, "waiting": 0, "draining": true,
                                    "nodes": [], "recent_moves": [moved] }));
        assert!(shown.starts_with("cluster c: 0 requests in flight, 0 waiting, leaving\n"), "{shown}");
        assert!(
            shown.ends_with("3 s ago: request 0a hedge won from a to b after 7 tokens: silent\n"),
            "{shown}"
        );
        let answer = json!({ "data": [{ "id": "smol", "max_model_len": 2048 }] });
        assert_eq!(models(&answer, &cluster()), "MODEL  CONTEXT  NODES\nsmol   2048     one\n");
        assert_eq!(models(&json!({ "data": [] }), &cluster()), "no model can be asked now\n");
    }
}
