//! The command line: which command, with which settings over those of the file.
#![expect(clippy::print_stdout, reason = "what the commands print is their result")]

use crate::{
    EXIT_FAILED, EXIT_USAGE, bench, bench_router,
    config::{self, Config, Values},
    engine, failed, inspect, key, serve,
    settings::Settings,
    status,
};
use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode};

/// One OpenAI-compatible endpoint out of the Macs on a network.
///
/// Without a command, `serve`. Settings come from a file, flags over it, and environment variables named
/// `MLX_NODE_` and the setting's name in capitals over both.
#[derive(Debug, Parser)]
#[command(name = "mlx-node", version)]
struct Cli {
    /// Configuration file [default: ./cluster.toml, else ~/.config/mlx-cluster/cluster.toml, where there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Config,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve: host a node, a router and the HTTP endpoint
    Serve {
        #[command(flatten)]
        settings: Config,
    },
    /// Run one engine on stdin and stdout; started by `serve`
    #[command(hide = true)]
    Engine {
        /// Settings, as JSON
        #[arg(long)]
        settings: String,
    },
    /// Make or name the key that all machines of a cluster share
    #[command(subcommand)]
    Key(KeyCommand),
    /// Show the nodes of the cluster as a running endpoint sees them
    Status {
        /// Print the endpoint's answer as it is
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        settings: Config,
    },
    /// Say what a model is, how much memory it needs and how much of it this machine can serve
    Inspect {
        #[command(flatten)]
        arguments: inspect::InspectArguments,
        #[command(flatten)]
        settings: Box<Config>,
    },
    /// Pack a model's weights into fewer bits and write it as a folder that MLX's tools load too
    Convert {
        #[command(flatten)]
        arguments: inspect::ConvertArguments,
        #[command(flatten)]
        settings: Box<Config>,
    },
    /// Measure this machine
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Check or show the settings
    #[command(subcommand)]
    Config(ConfigCommand),
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Prefill and decode rates of the model at several batch sizes, in a process of their own
    Engine {
        #[command(flatten)]
        arguments: bench::EngineArguments,
        #[command(flatten)]
        settings: Box<Config>,
    },
    /// Routing policies over simulated nodes, on traces or made-up requests, in virtual time
    Router {
        #[command(flatten)]
        arguments: Box<bench_router::RouterArguments>,
    },
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make a new key, in a file that only you can read
    New {
        /// Where to; never overwritten [default: ~/.config/mlx-cluster/cluster.key]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Print a key's fingerprint, which tells keys apart and nothing else
    Fingerprint {
        /// The key's file [default: the one that the settings name]
        file: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Say whether `serve` would accept the settings
    Check {
        #[command(flatten)]
        settings: Config,
    },
    /// Print every setting as it stands, secrets left out, as a configuration file
    Show {
        #[command(flatten)]
        settings: Config,
    },
}

/// Runs what the command line says.
pub(crate) fn run() -> ExitCode {
    let Cli { config: file, settings: top, command } = Cli::parse();
    let load = |flags: Config| {
        config::load(file.as_deref(), flags.over(top.clone()), std::env::vars_os())
            .map_err(|error| failed(EXIT_USAGE, error))
    };
    let outcome = match command {
        None => load(Config::default()).and_then(serve::run),
        Some(Command::Serve { settings }) => load(settings).and_then(serve::run),
        Some(Command::Engine { settings }) => return engine::run(&settings),
        Some(Command::Key(KeyCommand::New { out })) => {
            key::new(out).map_err(|error| failed(EXIT_FAILED, error))
        }
        Some(Command::Key(KeyCommand::Fingerprint { file })) => load(Config::default())
            .and_then(|values| key::fingerprint(file, values).map_err(|error| failed(EXIT_FAILED, error))),
        Some(Command::Status { json, settings }) => load(settings)
            .and_then(|values| status::show(&values, json).map_err(|error| failed(EXIT_FAILED, error))),
        Some(Command::Inspect { arguments, settings }) => {
            load(*settings).and_then(|values| inspect::inspect(&values, &arguments))
        }
        Some(Command::Convert { arguments, settings }) => {
            load(*settings).and_then(|values| inspect::convert(&values, &arguments))
        }
        Some(Command::Bench(BenchCommand::Engine { arguments, settings })) => {
            load(*settings).and_then(|values| bench::engine(&values, &arguments))
        }
        Some(Command::Bench(BenchCommand::Router { arguments })) => bench_router::router(*arguments),
        Some(Command::Config(ConfigCommand::Check { settings })) => load(settings).and_then(check),
        Some(Command::Config(ConfigCommand::Show { settings })) => load(settings).map(|values| show(&values)),
    };
    outcome.err().unwrap_or(ExitCode::SUCCESS)
}

fn check(values: Values) -> Result<(), ExitCode> {
    let settings = Settings::resolve(values).map_err(|error| failed(EXIT_USAGE, error))?;
    println!("the settings are valid: node {:?} of cluster {:?}", settings.name, settings.cluster);
    Ok(())
}

fn show(values: &Values) {
    for (name, value) in values.shown() {
        println!("{name} = {value}");
    }
}
