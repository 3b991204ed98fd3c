//! `mlx-node bench router`: routing policies side by side over simulated nodes, in virtual time; no engine, no network.
#![expect(clippy::print_stdout, reason = "what the command prints is its result")]

use crate::{EXIT_FAILED, EXIT_USAGE, failed};
use ::bench::{RouterBenchSettings, RouterReport, Source, chart, router_bench};
use router::{Policy, RivalSettings};
use std::path::PathBuf;
use std::process::ExitCode;
use types::limits;

/// What to simulate.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RouterArguments {
    /// A trace: Mooncake's .jsonl or Azure's .csv; otherwise --workload
    #[arg(long, value_name = "FILE", conflicts_with = "workload")]
    trace: Option<PathBuf>,
    /// Requests that are made up: chats, agents or zipf
    #[arg(long, value_name = "NAME", default_value = "chats", value_parser = parse_workload)]
    workload: Source,
    /// Simulated nodes
    #[arg(long, default_value_t = 4)]
    nodes: usize,
    /// Nodes of four speeds in turn (6000, 4000, 2000 and 1200 prompt tokens a second) instead of one (4000)
    #[arg(long)]
    unequal: bool,
    /// Policies to compare [default: all]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = str::parse::<Policy>)]
    policy: Vec<Policy>,
    /// Seeds of the runs, as 101-112 or 1,2,3
    #[arg(long, value_name = "SEEDS", default_value = "1", value_parser = parse_seeds)]
    seeds: Seeds,
    /// Requests of each run [default: all of a trace, otherwise 1000 for each node]
    #[arg(long)]
    requests: Option<usize>,
    /// Work offered, as a share of what the nodes can do if all prefixes are found: arrivals are stretched to that
    #[arg(long, default_value_t = 0.6, conflicts_with = "as_recorded")]
    load: f64,
    /// Leave arrivals as they were recorded
    #[arg(long)]
    as_recorded: bool,
    /// KV of each node as a share of what all prompts bring [default: of a trace as much as all nodes can share out,
    /// otherwise 131072 tokens]
    #[arg(long)]
    kv_share: Option<f64>,
    /// Divide a trace's lengths by this
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    length_divisor: u32,
    /// Use the rules to compare with as they are published, instead of tuned to these workloads
    #[arg(long)]
    published: bool,
    /// Runs at once [default: as many as the machine has cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Write a chart of the times to the first token, as SVG
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone)]
struct Seeds(Vec<u64>);

fn parse_workload(value: &str) -> Result<Source, String> {
    match value {
        "chats" => Ok(Source::Chats),
        "agents" => Ok(Source::Agents),
        "zipf" => Ok(Source::Zipf),
        _ => Err(format!("{value:?} is no workload; there are chats, agents and zipf")),
    }
}

/// Seeds of one command: each is a run of every policy.
const SEEDS_MAX: usize = 1000;

fn parse_seeds(value: &str) -> Result<Seeds, String> {
    let number = |text: &str| text.trim().parse::<u64>().map_err(|_| format!("{text:?} is no seed"));
    let seeds = match value.split_once('-') {
        Some((first, last)) => (number(first)?..=number(last)?).take(SEEDS_MAX + 1).collect(),
        None => value.split(',').map(number).collect::<Result<Vec<u64>, _>>()?,
    };
    if seeds.is_empty() || seeds.len() > SEEDS_MAX {
        return Err(format!("{value:?} names {} seeds; from 1 to {SEEDS_MAX} are possible", seeds.len()));
    }
    Ok(Seeds(seeds))
}

/// Simulates, prints a table or JSON, and draws.
///
/// # Errors
/// The exit code; what was wrong has been said.
pub(crate) fn router(arguments: RouterArguments) -> Result<(), ExitCode> {
    let RouterArguments { nodes, load, .. } = arguments;
    let usage = |what: String| Err(failed(EXIT_USAGE, what));
    if !(1..=limits::NODES_MAX).contains(&nodes) {
        return usage(format!("--nodes is {nodes}; from 1 to {} are possible", limits::NODES_MAX));
    }
    if !(0.01..=10.0).contains(&load) {
        return usage(format!("--load is {load}; from 0.01 to 10 is possible"));
    }
    if let Some(share) = arguments.kv_share.filter(|share| !(0.0..=100.0).contains(share)) {
        return usage(format!("--kv-share is {share}; from 0 to 100 is possible"));
    }
    if arguments.requests == Some(0) {
        return usage("--requests is 0; at least 1 is needed".to_owned());
    }
    let all = || Policy::ALL.map(|(policy, _)| policy).to_vec();
    let settings = RouterBenchSettings {
        source: arguments.trace.map_or(arguments.workload, Source::Trace),
        nodes,
        unequal: arguments.unequal,
        policies: if arguments.policy.is_empty() { all() } else { arguments.policy },
        seeds: arguments.seeds.0,
        requests: arguments.requests,
        load: (!arguments.as_recorded).then_some(load),
        kv_share: arguments.kv_share,
        divisor: arguments.length_divisor,
        rivals: if arguments.published { RivalSettings::default() } else { RivalSettings::TUNED },
        threads: arguments
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get)),
    };
    let report = router_bench(&settings).map_err(|error| failed(EXIT_FAILED, error))?;
    if let Some(path) = arguments.chart {
        std::fs::write(&path, chart(std::slice::from_ref(&report)))
            .map_err(|error| failed(EXIT_FAILED, format!("cannot write {}: {error}", path.display())))?;
    }
    if arguments.json {
        println!("{}", serde_json::to_string(&report).expect("plain data"));
    } else {
        print_table(&report);
    }
    Ok(())
}

fn print_table(report: &RouterReport) {
    println!(
        "{}: {} requests, {} {} nodes; a single cache with their memory would find {:.1} %",
        report.workload,
        report.requests,
        report.nodes,
        if report.unequal { "unequal" } else { "equal" },
        report.single_cache_hit_rate * 100.0
    );
    println!(
        "{:<12} {:>9} {:>8} {:>8} {:>8} {:>8} {:>6} {:>9} {:>10}",
        "policy", "TTFT mean", "p50", "p90", "p99", "e2e mean", "hits", "imbalance", "completed"
    );
    for (policy, one) in &report.policies {
        println!(
            "{policy:<12} {:>9.3} {:>8.3} {:>8.3} {:>8.3} {:>8.3} {:>4.1} % {:>9.2} {:>8.1} %",
            one.ttft_mean_s,
            one.ttft_p50_s,
            one.ttft_p90_s,
            one.ttft_p99_s,
            one.e2e_mean_s,
            one.hit_rate * 100.0,
            one.imbalance,
            one.completed_of_offered * 100.0
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_and_workloads() {
        let check = |value: &str, expected: Result<&[u64], &str>| match (parse_seeds(value), expected) {
            (Ok(Seeds(seeds)), Ok(expected)) => assert_eq!(seeds, expected),
            (Err(error), Err(expected)) => assert!(error.contains(expected), "{error}"),
            other => panic!("{value}: {other:?}"),
        };
        check("7", Ok(&[7]));
        check("1,5", Ok(&[1, 5]));
        check("101-103", Ok(&[101, 102, 103]));
        check("3-1", Err("names 0 seeds"));
        check("1-100000000000", Err("names 1001 seeds"));
        check("x", Err("\"x\" is no seed"));
        assert_eq!(parse_workload("agents"), Ok(Source::Agents));
        assert!(parse_workload("fast").is_err());
    }
}
