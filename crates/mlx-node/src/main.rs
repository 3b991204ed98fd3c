//! `mlx-node`: the program. Flags, file and environment become settings, settings become parts, parts run.
//!
//! `serve` hosts a node, a router and the HTTP endpoint in one process and starts `engine`, the process that owns
//! the model; everything else is a command that ends by itself. Exit codes: 0 done, 1 failed, 2 wrong usage or settings.

mod cli;
mod config;
mod hardware;
mod key;
mod logging;
mod settings;
mod status;
mod values;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
