//! `mlx-node`: the program. Flags, file and environment become settings, settings become parts, parts run.
//!
//! `serve` hosts a node, a router and the HTTP endpoint in one process and starts `engine`, the process that owns
//! the model; everything else is a command that ends by itself. Exit codes: 0 done, 1 failed, 2 wrong usage or
//! settings, 3 no endpoint answers.

mod administer;
mod bench;
mod bench_router;
mod bench_serve;
mod bench_speculation;
mod chat;
mod cli;
mod config;
mod doctor;
mod endpoint;
mod engine;
mod hardware;
mod inspect;
mod key;
mod keys;
mod logging;
mod pinned;
mod pipelines;
mod plan;
mod pull;
mod reload;
mod serve;
mod service;
mod settings;
mod status;
mod table;
mod values;

use std::process::ExitCode;

/// A request makes and drops thousands of small things: templates, words, headers, packets.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The command failed.
const EXIT_FAILED: u8 = 1;
/// Flags, variables or the configuration file are wrong; clap's own code for it.
const EXIT_USAGE: u8 = 2;
/// Nothing answers where an endpoint should be.
const EXIT_UNREACHABLE: u8 = 3;

fn main() -> ExitCode {
    cli::run()
}

/// Says what went wrong, in one line, and gives the exit code.
#[expect(clippy::print_stderr, reason = "the last word of a program that fails, whether or not it logs")]
fn failed(code: u8, error: impl std::fmt::Display) -> ExitCode {
    eprintln!("mlx-node: {error}");
    ExitCode::from(code)
}
