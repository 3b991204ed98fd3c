//! This machine: files and who may read them, the model, ports, the firewall.

use super::Findings;
use crate::{
    config, key,
    settings::{KeyOrigin, Settings},
};
use std::{
    io::ErrorKind,
    net::{TcpListener, UdpSocket},
    path::Path,
    process::Command,
};

/// Settings that nobody else should read.
const SECRETS: [&str; 3] = ["api_keys", "cluster_key", "[[key]]"];

/// The configuration file, and whether others may read secrets in it. `named` is what `--config` said.
pub(super) fn file(findings: &mut Findings, named: Option<&Path>) {
    let Some(path) = config::used_file(named) else {
        findings.ok("configuration", "no file: flags, variables and defaults are all there is");
        return;
    };
    let shown = path.display();
    // That it can be read was found before.
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let secrets = SECRETS.iter().any(|name| text.lines().any(|line| line.trim_start().starts_with(name)));
    if secrets && key::is_exposed(&path) {
        findings.problem(
            "configuration",
            format!("{shown} has keys, and other users of this machine may read it"),
            format!("chmod 600 {shown}"),
        );
    } else {
        findings.ok("configuration", shown.to_string());
    }
}

/// The cluster key.
pub(super) fn key(findings: &mut Findings, settings: &Settings) {
    let fingerprint = settings.keys.fingerprints().join(", also taken: ");
    match &settings.key_origin {
        KeyOrigin::Random(_) => findings.note(
            "cluster key",
            "there is none: this machine runs alone",
            "run mlx-node key new once, and copy the file that it names to every machine",
        ),
        KeyOrigin::File(path) if key::is_exposed(path) => findings.problem(
            "cluster key",
            format!("other users of this machine may read {}", path.display()),
            format!("chmod 600 {}", path.display()),
        ),
        KeyOrigin::File(path) => {
            findings.ok("cluster key", format!("fingerprint {fingerprint}, from {}", path.display()));
        }
        KeyOrigin::Setting => {
            findings.ok("cluster key", format!("fingerprint {fingerprint}, from cluster_key"));
        }
    }
}

/// Whether the model is here.
pub(super) fn model(findings: &mut Findings, settings: &Settings) {
    let Some(model) = &settings.model else {
        findings.ok("model", "this machine is to be a router only");
        return;
    };
    match mlx::hub::resolve(&model.source, true, &mut |_, _| {}) {
        Ok(path) => findings.ok("model", format!("{} is at {}", model.source, path.display())),
        Err(error @ mlx::hub::HubError::Offline { .. }) if !model.offline => findings.note(
            "model",
            format!("it is fetched when it is first needed: {error}"),
            format!("mlx-node pull {}", model.source),
        ),
        Err(error) => {
            findings.problem("model", error.to_string(), "give another one with --model, or pull it")
        }
    }
}

/// Whether the ports can be had by an `mlx-node` that is not running.
pub(super) fn ports(findings: &mut Findings, settings: &Settings) {
    let mut port =
        |about, setting: &str, address: std::net::SocketAddr, tried: std::io::Result<()>| match tried {
            Ok(()) => findings.note(
                about,
                format!("{address} is free, and mlx-node is not running here"),
                "start it: mlx-node serve",
            ),
            Err(error) if error.kind() == ErrorKind::AddrInUse => findings.problem(
                about,
                format!("another program has {address}"),
                format!("end it, or choose another port with --{setting}"),
            ),
            Err(error) => findings.problem(
                about,
                format!("{address} cannot be had: {error}"),
                format!("choose another address with --{setting}"),
            ),
        };
    port("endpoint", "http", settings.http, TcpListener::bind(settings.http).map(drop));
    port("port for nodes", "listen", settings.listen, UdpSocket::bind(settings.listen).map(drop));
}

/// macOS' own firewall asks for each program once; a no is easily forgotten.
pub(super) fn firewall(findings: &mut Findings) {
    const TOOL: &str = "/usr/libexec/ApplicationFirewall/socketfilterfw";
    if !cfg!(target_os = "macos") {
        return;
    }
    let state = Command::new(TOOL).arg("--getglobalstate").output();
    let state = state.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    if state.contains("enabled") {
        findings.note(
            "firewall",
            "macOS' firewall is on",
            "allow incoming connections to mlx-node in System Settings, Network, Firewall, Options",
        );
    } else {
        findings.ok("firewall", "macOS' firewall is off");
    }
}
