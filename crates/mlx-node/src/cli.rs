//! The command line: which command, with which settings over those of the file.
#![expect(clippy::print_stdout, reason = "what the commands print is their result")]

use crate::{
    EXIT_FAILED, EXIT_UNREACHABLE, EXIT_USAGE, administer, bench, bench_router, bench_serve,
    chat::{self, ChatError},
    config::{Config, Values},
    doctor,
    endpoint::AskError,
    engine, failed, inspect, key, pull,
    reload::Source,
    serve, service,
    settings::{Settings, served_name},
    status::{self, Sight},
    values::Auto,
};
use clap::{CommandFactory, Parser, Subcommand};
use std::{
    future::Future,
    io,
    path::{Path, PathBuf},
    process::ExitCode,
};

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
    /// Make or name the key that all machines of a cluster share, or keys for HTTP clients
    #[command(subcommand)]
    Key(KeyCommand),
    /// Show the cluster as a running endpoint sees it
    Status {
        #[command(flatten)]
        shown: Shown,
        #[command(flatten)]
        settings: Config,
    },
    /// Show all that a running endpoint knows of its nodes
    Nodes {
        #[command(flatten)]
        shown: Shown,
        #[command(flatten)]
        settings: Config,
    },
    /// Show how pipelines are divided between their members and what is expected of that, or why there is none; with --model
    /// only that model's
    Plan {
        #[command(flatten)]
        shown: Shown,
        #[command(flatten)]
        settings: Config,
    },
    /// Show what can be asked, and which nodes serve it
    Models {
        #[command(flatten)]
        shown: Shown,
        #[command(flatten)]
        settings: Config,
    },
    /// Talk with a model of a running endpoint; --model-name names another than the first
    Chat {
        #[command(flatten)]
        arguments: chat::ChatArguments,
        #[command(flatten)]
        settings: Box<Config>,
    },
    /// Fetch a model's files before they are needed, and print where they are
    Pull {
        /// A hub id such as mlx-community/Llama-3.2-1B-Instruct-4bit [default: the model of the settings]
        id: Option<String>,
        /// Print one JSON object
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
    /// Have a running endpoint's process finish what it does and end, as SIGTERM would
    Drain {
        #[command(flatten)]
        settings: Config,
    },
    /// Look for what keeps a cluster from working, and say what to do about it
    Doctor {
        #[command(flatten)]
        arguments: doctor::DoctorArguments,
        #[command(flatten)]
        settings: Config,
    },
    /// Print what makes a shell complete commands and settings
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Have the system run `serve` at every login
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Measure this machine
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Check or show the settings
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// How answers of an endpoint are shown.
#[derive(Debug, Clone, Copy, clap::Args)]
struct Shown {
    /// Print the endpoint's answer as it is; a line for each look
    #[arg(long)]
    json: bool,
    /// Look again every second, until Ctrl-C
    #[arg(long)]
    watch: bool,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Prefill and decode rates of the model at several batch sizes, in a process of their own; with --speculation what
    /// guessing tokens ahead gains instead
    Engine {
        #[command(flatten)]
        arguments: bench::EngineArguments,
        #[command(flatten)]
        settings: Box<Config>,
    },
    /// A running endpoint under requests that come independently of each other; --model-name names the model
    Serve {
        #[command(flatten)]
        arguments: bench_serve::ServeArguments,
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
        /// Make a key for HTTP clients instead, and print it and its hash
        #[arg(long, conflicts_with = "out")]
        http: bool,
    },
    /// Print the hash of an HTTP key, which is read from standard input
    Hash,
    /// Print a key's fingerprint, which tells keys apart and nothing else
    Fingerprint {
        /// The key's file [default: the one that the settings name]
        file: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
enum ServiceCommand {
    /// Install and start it for this user, with the settings of the configuration file
    Install,
    /// Stop and remove it; requests that run are finished first
    Uninstall,
    /// Say whether it is installed and runs
    Status,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Say whether `serve` would accept the settings
    Check {
        #[command(flatten)]
        settings: Config,
    },
    /// Have a running endpoint's process read its settings again, and say what it took over and what needs a restart
    Apply {
        /// Print the endpoint's answer as it is
        #[arg(long)]
        json: bool,
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
    let source = |flags: Config| Source { file: file.clone(), flags: flags.over(top.clone()) };
    let load = |flags: Config| source(flags).load().map_err(|error| failed(EXIT_USAGE, error));
    let serve_with = |source: Source| {
        let values = source.load().map_err(|error| failed(EXIT_USAGE, error))?;
        serve::run(source, values)
    };
    let outcome = match command {
        None => serve_with(source(Config::default())),
        Some(Command::Serve { settings }) => serve_with(source(settings)),
        Some(Command::Drain { settings }) => {
            load(settings).and_then(|values| block_on(administer::drain(&values))?.map_err(failed_to_ask))
        }
        Some(Command::Config(ConfigCommand::Apply { json, settings })) => load(settings)
            .and_then(|values| block_on(administer::reload(&values, json))?.map_err(failed_to_ask)),
        Some(Command::Engine { settings }) => return engine::run(&settings),
        Some(Command::Key(KeyCommand::New { http: true, .. })) => {
            key::new_http().map_err(|error| failed(EXIT_FAILED, error))
        }
        Some(Command::Key(KeyCommand::New { out, .. })) => {
            key::new(out).map_err(|error| failed(EXIT_FAILED, error))
        }
        Some(Command::Key(KeyCommand::Hash)) => key::hash().map_err(|error| failed(EXIT_FAILED, error)),
        Some(Command::Key(KeyCommand::Fingerprint { file })) => load(Config::default())
            .and_then(|values| key::fingerprint(file, values).map_err(|error| failed(EXIT_FAILED, error))),
        Some(Command::Inspect { arguments, settings }) => {
            load(*settings).and_then(|values| inspect::inspect(&values, &arguments))
        }
        Some(Command::Convert { arguments, settings }) => {
            load(*settings).and_then(|values| inspect::convert(&values, &arguments))
        }
        Some(Command::Status { shown, settings }) => {
            load(settings).and_then(|values| show_sight(&values, Sight::Status, shown))
        }
        Some(Command::Nodes { shown, settings }) => {
            load(settings).and_then(|values| show_sight(&values, Sight::Nodes, shown))
        }
        Some(Command::Plan { shown, settings }) => {
            // Asked for here: a file says what this node serves, not what is to be shown.
            let asked = settings.model_name.clone().and_then(Auto::fixed);
            let asked = asked.or_else(|| settings.model.as_deref().map(served_name));
            load(settings).and_then(|values| show_sight(&values, Sight::Plan(asked), shown))
        }
        Some(Command::Models { shown, settings }) => {
            load(settings).and_then(|values| show_sight(&values, Sight::Models, shown))
        }
        Some(Command::Chat { arguments, settings }) => load(*settings).and_then(|values| {
            block_on(chat::run(&values, &arguments))?.map_err(|error| match error {
                ChatError::Ask(error) => failed_to_ask(error),
                error => failed(EXIT_FAILED, error),
            })
        }),
        Some(Command::Pull { id, json, settings }) => load(settings).and_then(|values| {
            pull::run(&values, id, json).map_err(|error| match error {
                pull::PullError::Settings(error) => failed(EXIT_USAGE, error),
                error => failed(EXIT_FAILED, error),
            })
        }),
        Some(Command::Doctor { arguments, settings }) => load(settings).and_then(|values| {
            match block_on(doctor::run(&values, file.as_deref(), &arguments))? {
                0 => Ok(()),
                _ => Err(ExitCode::from(EXIT_FAILED)),
            }
        }),
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "mlx-node", &mut io::stdout());
            Ok(())
        }
        Some(Command::Service(command)) => run_service(&command, file.as_deref(), &top),
        Some(Command::Bench(BenchCommand::Serve { arguments, settings })) => {
            load(*settings).and_then(|values| {
                block_on(bench_serve::run(&values, &arguments))?.map_err(|error| match error {
                    bench_serve::ServeBenchError::Ask(error) => failed_to_ask(error),
                    error => failed(EXIT_FAILED, error),
                })
            })
        }
        Some(Command::Bench(BenchCommand::Engine { arguments, settings })) => {
            // Asked for here: a file that turns it on does not ask to measure it.
            let speculation = settings.speculation == Some(true);
            load(*settings).and_then(|values| bench::engine(&values, &arguments, speculation))
        }
        Some(Command::Bench(BenchCommand::Router { arguments })) => bench_router::router(*arguments),
        Some(Command::Config(ConfigCommand::Check { settings })) => load(settings).and_then(check),
        Some(Command::Config(ConfigCommand::Show { settings })) => load(settings).map(|values| show(&values)),
    };
    outcome.err().unwrap_or(ExitCode::SUCCESS)
}

/// Runs a command that waits for others, on this thread.
fn block_on<T>(command: impl Future<Output = T>) -> Result<T, ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime
        .map_err(|error| failed(EXIT_FAILED, format_args!("the system gives no event queue: {error}")))?;
    let outcome = runtime.block_on(command);
    // A thread that reads a terminal is not waited for.
    runtime.shutdown_background();
    Ok(outcome)
}

fn run_service(command: &ServiceCommand, file: Option<&Path>, flags: &Config) -> Result<(), ExitCode> {
    let outcome = match command {
        ServiceCommand::Install => service::install(file, flags).map(|()| true),
        ServiceCommand::Uninstall => service::uninstall().map(|()| true),
        ServiceCommand::Status => service::status(),
    };
    match outcome {
        Ok(true) => Ok(()),
        Ok(false) => Err(ExitCode::from(EXIT_FAILED)),
        Err(error) => Err(failed(if error.is_usage() { EXIT_USAGE } else { EXIT_FAILED }, error)),
    }
}

fn failed_to_ask(error: AskError) -> ExitCode {
    let code = if matches!(error, AskError::Unreachable { .. }) { EXIT_UNREACHABLE } else { EXIT_FAILED };
    failed(code, error)
}

fn show_sight(values: &Values, sight: Sight, shown: Shown) -> Result<(), ExitCode> {
    block_on(status::show(values, sight, shown.json, shown.watch))?.map_err(failed_to_ask)
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
    for key in &values.keys {
        println!("\n[[key]]");
        for (name, value) in key.shown() {
            println!("{name} = {value}");
        }
    }
    for pipeline in &values.pipelines {
        println!("\n[[pipeline]]");
        for (name, value) in pipeline.shown() {
            println!("{name} = {value}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::error::ErrorKind;
    use std::{collections::BTreeSet, fs};

    /// Every command line that a text shows: lines that begin with the program, and the same between backticks. An
    /// explanation begins after two blanks or at a `#`; brackets mean that a part may be left out.
    fn shown(text: &str) -> Vec<Vec<String>> {
        let inline = text.split('`').skip(1).step_by(2).map(|code| code.replace('\n', " "));
        text.lines()
            .map(str::to_owned)
            .chain(inline)
            .filter_map(|line| {
                let line = line.trim();
                (line == "mlx-node" || line.starts_with("mlx-node ")).then(|| {
                    let command = line.split("  ").next().unwrap_or_default();
                    let command = command.split(" #").next().unwrap_or_default().replace(['[', ']'], "");
                    command.split_whitespace().filter(|&word| word != "…").map(str::to_owned).collect()
                })
            })
            .collect()
    }

    /// Why the program would not take a line; parts that a line leaves out do not matter.
    fn refused(words: &[String]) -> Option<String> {
        match Cli::try_parse_from(words) {
            Ok(_) => None,
            Err(error) => match error.kind() {
                ErrorKind::MissingRequiredArgument
                | ErrorKind::MissingSubcommand
                | ErrorKind::DisplayHelp
                | ErrorKind::DisplayVersion
                | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => None,
                _ => Some(error.to_string()),
            },
        }
    }

    fn flags(command: &clap::Command, into: &mut BTreeSet<String>) {
        into.extend(
            command.get_arguments().filter_map(|argument| Some(format!("--{}", argument.get_long()?))),
        );
        for command in command.get_subcommands() {
            flags(command, into);
        }
    }

    #[test]
    fn documents_show_commands_that_exist() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let mut files = vec![root.join("README.md"), root.join("SECURITY.md"), root.join("crates/README.md")];
        let docs = fs::read_dir(root.join("docs")).expect("there").map(|entry| entry.expect("read").path());
        files.extend(docs.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
        let mut known = BTreeSet::new();
        flags(&Cli::command(), &mut known);
        let mut commands = 0;
        for file in files {
            let text = fs::read_to_string(&file).expect("there");
            for words in shown(&text) {
                commands += 1;
                assert_eq!(refused(&words), None, "{}: {}", file.display(), words.join(" "));
            }
            // Settings named by their variables, programs of this repository.
            for word in text.split(|c: char| !(c.is_alphanumeric() || "_-/.".contains(c))) {
                if let Some(setting) = word.strip_prefix("MLX_NODE_").filter(|setting| !setting.is_empty()) {
                    let setting = setting.to_ascii_lowercase();
                    let is_known = Config::NAMES.contains(&setting.as_str())
                        || ["config", "relocatable"].contains(&setting.as_str());
                    assert!(is_known, "{}: {word}", file.display());
                }
                let program = word.trim_end_matches(['.', '/']);
                if program.starts_with("scripts/") {
                    assert!(root.join(program).exists(), "{}: {program}", file.display());
                }
            }
            // A flag alone between backticks is one of ours; the measurements' page names other programs' flags, too.
            if file.ends_with("docs/performance.md") {
                continue;
            }
            for code in text.split('`').skip(1).step_by(2).filter(|code| code.starts_with("--")) {
                let flag = code.split([' ', '=', '\n']).next().unwrap_or_default();
                assert!(known.contains(flag), "{}: {flag}", file.display());
            }
        }
        assert!(
            commands >= 20,
            "only {commands} commands were found: is it still looked for them as they are written?"
        );
    }

    #[test]
    fn commands_that_do_not_exist_are_found() {
        let check = |text: &str, expected: &[&str], taken: bool| {
            let found = shown(text);
            assert_eq!(found, [expected], "{text:?}");
            assert_eq!(refused(&found[0]).is_none(), taken, "{text:?}");
        };
        check("    mlx-node status [--watch]    looks", &["mlx-node", "status", "--watch"], true);
        check(
            "so `mlx-node bench\nserve … --rate 4` does",
            &["mlx-node", "bench", "serve", "--rate", "4"],
            true,
        );
        check("    mlx-node convert   # packs", &["mlx-node", "convert"], true);
        check("    mlx-node status --wach", &["mlx-node", "status", "--wach"], false);
        check("`mlx-node stats`", &["mlx-node", "stats"], false);
        check("mlx-node --max-batch many", &["mlx-node", "--max-batch", "many"], false);
    }
}
