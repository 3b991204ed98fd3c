//! `mlx-node doctor`: looks for what keeps a cluster from working, and says for each thing what to do about it.
//!
//! `local` looks at this machine, `network` at others. Both only look: what is asked of a running cluster changes nothing
//! but that its routers see a node without a model for a moment.
#![expect(clippy::print_stdout, reason = "what the command prints is its result")]

mod local;
mod network;

use crate::{
    config::Values,
    endpoint::{AskError, Endpoint},
    settings::Settings,
};
use serde::Serialize;
use serde_json::{Value, json};
use std::{path::Path, time::Duration};

/// How to look.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DoctorArguments {
    /// Seconds to listen for other nodes
    #[arg(long, value_name = "S", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// May be as it is meant to be.
    Note,
    /// Something does not work.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    level: Level,
    /// What was looked at.
    about: &'static str,
    said: String,
    /// What to do about it.
    remedy: Option<String>,
}

/// All that was found, in order.
#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, about: &'static str, said: impl Into<String>) {
        self.0.push(Finding { level: Level::Ok, about, said: said.into(), remedy: None });
    }

    fn note(&mut self, about: &'static str, said: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding { level: Level::Note, about, said: said.into(), remedy: Some(remedy.into()) });
    }

    fn problem(&mut self, about: &'static str, said: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding { level: Level::Problem, about, said: said.into(), remedy: Some(remedy.into()) });
    }

    fn problems(&self) -> usize {
        self.0.iter().filter(|finding| finding.level == Level::Problem).count()
    }

    fn text(&self) -> String {
        let mut out = String::new();
        for Finding { level, about, said, remedy } in &self.0 {
            let level = match level {
                Level::Ok => "ok     ",
                Level::Note => "note   ",
                Level::Problem => "PROBLEM",
            };
            out.push_str(&format!("{level}  {about}: {said}\n"));
            if let Some(remedy) = remedy {
                out.push_str(&format!("         → {remedy}\n"));
            }
        }
        out.push_str(&match self.problems() {
            0 => "No problem was found.\n".to_owned(),
            1 => "1 problem was found.\n".to_owned(),
            problems => format!("{problems} problems were found.\n"),
        });
        out
    }
}

/// Looks and prints; the number of problems.
pub(crate) async fn run(values: &Values, file: Option<&Path>, arguments: &DoctorArguments) -> usize {
    let mut findings = Findings::default();
    local::file(&mut findings, file);
    match Settings::resolve(values.clone()) {
        Ok(settings) => {
            findings.ok("settings", format!("node {:?} of cluster {:?}", settings.name, settings.cluster));
            look(&mut findings, values, settings, Duration::from_secs(arguments.seconds)).await;
        }
        // The message says what to do.
        Err(error) => {
            findings.problem("settings", error.to_string(), "mlx-node config check tells when they are right")
        }
    }
    let problems = findings.problems();
    if arguments.json {
        println!("{}", json!({ "findings": findings.0, "problems": problems }));
    } else {
        print!("{}", findings.text());
    }
    problems
}

async fn look(findings: &mut Findings, values: &Values, settings: Settings, time: Duration) {
    local::key(findings, &settings);
    local::model(findings, &settings);
    let cluster = endpoint(findings, values, &settings).await;
    local::firewall(findings);
    network::look(findings, &settings, cluster.as_ref(), time).await;
    if let Some(cluster) = &cluster {
        network::nodes(findings, cluster);
    }
}

/// Whether the endpoint of this machine answers, and what it knows; its ports, where it does not.
async fn endpoint(findings: &mut Findings, values: &Values, settings: &Settings) -> Option<Value> {
    if !settings.roles.contains(&types::Role::Router) {
        findings.ok("endpoint", "this machine is to be no router: it has no endpoint");
        return None;
    }
    let endpoint = match Endpoint::of(values) {
        Ok(endpoint) => endpoint,
        Err(error) => {
            findings.problem("endpoint", error.to_string(), "name the certificate's file with --tls-cert");
            return None;
        }
    };
    match endpoint.get_json("/v1/cluster").await {
        Ok(cluster) => {
            findings.ok("endpoint", format!("{} answers", endpoint.url()));
            Some(cluster)
        }
        Err(AskError::Unreachable { .. }) => {
            local::ports(findings, settings);
            None
        }
        Err(error) => {
            let remedy = "another program may have the port: choose another one with --http";
            findings.problem("endpoint", error.to_string(), remedy);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_have_their_remedies() {
        let mut findings = Findings::default();
        findings.ok("key", "there");
        findings.note("mDNS", "nobody", "wait");
        assert!(findings.text().ends_with("No problem was found.\n"));
        findings.problem("port", "taken", "take another");
        let expected = "\
ok       key: there
note     mDNS: nobody
         → wait
PROBLEM  port: taken
         → take another
1 problem was found.
";
        assert_eq!(findings.text(), expected);
    }
}
