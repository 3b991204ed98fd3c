//! `mlx-node status`: asks a running endpoint for `/v1/cluster` and shows it as a table, or as it came.
#![expect(clippy::print_stdout, reason = "what the command prints is its result")]

use crate::config::Values;
use serde_json::Value;
use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    time::Duration,
};

/// A running endpoint answers at once; past this it is not well.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);
/// Bytes of an answer: a thousand nodes with a few models each.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    #[error(
        "nothing answers at http://{address}: {error} (is mlx-node running there? --http names another address)"
    )]
    Unreachable { address: SocketAddr, error: std::io::Error },
    #[error("http://{address}/v1/cluster: {message}")]
    Answer { address: SocketAddr, message: String },
}

/// Prints how the cluster is, as the endpoint at `http` sees it.
pub(crate) fn show(values: &Values, json: bool) -> Result<(), StatusError> {
    let address = reachable(values.http);
    let key = values.api_keys.0.first().map(|key| key.0.as_str());
    let text = get(address, "/v1/cluster", key)?;
    if json {
        println!("{text}");
        return Ok(());
    }
    let invalid = |error: serde_json::Error| StatusError::Answer { address, message: error.to_string() };
    print!("{}", table(&serde_json::from_str(&text).map_err(invalid)?));
    Ok(())
}

/// Where to reach an endpoint that listens on `http`: loopback, if it listens everywhere.
fn reachable(http: SocketAddr) -> SocketAddr {
    let ip = match http.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, http.port())
}

/// GET over HTTP/1.0, which has no chunks and closes at the end; returns the body of a 200.
fn get(address: SocketAddr, path: &str, key: Option<&str>) -> Result<String, StatusError> {
    let unreachable = |error| StatusError::Unreachable { address, error };
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_TIME_MAX).map_err(unreachable)?;
    stream.set_read_timeout(Some(ANSWER_TIME_MAX)).map_err(unreachable)?;
    stream.set_write_timeout(Some(ANSWER_TIME_MAX)).map_err(unreachable)?;
    let authorization = key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
    let request =
        format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n{authorization}\r\n");
    stream.write_all(request.as_bytes()).map_err(unreachable)?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).map_err(unreachable)?;
    let answer = String::from_utf8_lossy(&answer);
    let broken = |message: &str| StatusError::Answer { address, message: message.to_owned() };
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| broken("the answer is no HTTP"))?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        Some("401") => Err(broken("401: give a key with --api-keys or MLX_NODE_API_KEYS")),
        _ => Err(broken(&format!("{}: {body}", head.lines().next().unwrap_or_default()))),
    }
}

/// The cluster as text: a line each for itself and for every node.
fn table(cluster: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let mut rows = vec![
        ["NODE", "STATE", "MODELS", "RUNNING", "WAITING", "RTT", "ADDRESS", "HARDWARE"].map(str::to_owned),
    ];
    for node in cluster["nodes"].as_array().into_iter().flatten() {
        let models: Vec<String> =
            node["models"].as_array().into_iter().flatten().map(|model| text(&model["name"])).collect();
        let engine = &node["engine"];
        let state = if engine["state"].is_null() { text(engine) } else { text(&engine["state"]) };
        let rtt = node["rtt_s"].as_f64().map_or_else(|| "-".to_owned(), |s| format!("{:.1} ms", s * 1e3));
        let local = node["local"].as_bool() == Some(true);
        let address = if local { "this process".to_owned() } else { text(&node["address"]) };
        let load = &node["load"];
        let row = [
            text(&node["name"]),
            state,
            if models.is_empty() { "-".to_owned() } else { models.join(", ") },
            load["slots"]
                .as_u64()
                .map_or_else(|| "-".to_owned(), |slots| format!("{}/{slots}", text(&load["running"]))),
            text(&load["waiting"]),
            rtt,
            address,
            text(&node["hardware"]),
        ];
        rows.push(row);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut out = format!(
        "cluster {}: {} requests in flight, {} waiting\n",
        text(&cluster["cluster"]),
        text(&cluster["in_flight"]),
        text(&cluster["waiting"])
    );
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_shown_in_columns() {
        let cluster = serde_json::json!({
            "cluster": "home", "in_flight": 2, "waiting": 0,
            "nodes": [
                { "name": "one", "local": true, "address": null, "hardware": "M4", "engine": { "state": "ready" },
                  "models": [{ "name": "smol" }], "load": { "running": 2, "slots": 16, "waiting": 1 }, "rtt_s": null },
                { "name": "second", "local": false, "address": "10.0.0.2:7415", "hardware": "M1",
                  "engine": { "state": "loading" }, "models": [], "load": null, "rtt_s": 0.0012 },
            ],
        });
        let expected = "\
cluster home: 2 requests in flight, 0 waiting
NODE    STATE    MODELS  RUNNING  WAITING  RTT     ADDRESS        HARDWARE
one     ready    smol    2/16     1        -       this process   M4
second  loading  -       -        -        1.2 ms  10.0.0.2:7415  M1
";
        assert_eq!(table(&cluster), expected);
    }
}
