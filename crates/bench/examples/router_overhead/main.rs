//! The parts of `scripts/compare-router` that must be fast: who asks, and who answers at once.
//!
//!     router_overhead load ADDRESS CONNECTIONS REQUESTS PROMPT_BYTES json|sse SEED
//!     router_overhead worker ADDRESS
//!     router_overhead node HTTP_ADDRESS ROUTER_ADDRESS KEY_FILE MODEL
//!
//! `load` prints the latencies of its requests as one JSON line. `worker` is what SGLang's gateways route to: an HTTP server
//! that answers with one token. `node` is what our router routes to: a whole node with an HTTP endpoint, whose engine (this
//! program as `engine MODEL`) draws a token in no time, and whose tokenizer is that of the model.
#![expect(clippy::print_stdout, reason = "what the program prints is its result")]

mod http;
mod load;
mod node;
mod worker;

use load::LoadArguments;
use std::{error::Error, path::Path, process::ExitCode};

/// As `mlx-node` has it.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: &str = "usage: router_overhead load ADDRESS CONNECTIONS REQUESTS PROMPT_BYTES json|sse SEED | worker ADDRESS | \
                     node HTTP_ADDRESS ROUTER_ADDRESS KEY_FILE MODEL | engine MODEL";

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["load", address, connections, requests, prompt_bytes, kind @ ("json" | "sse"), seed] => {
            let arguments = LoadArguments {
                address: address.parse()?,
                connections: connections.parse()?,
                requests: requests.parse()?,
                prompt_bytes: prompt_bytes.parse()?,
                stream: *kind == "sse",
                seed: seed.parse()?,
            };
            println!("{}", serde_json::to_string(&load::run(arguments)?)?);
        }
        ["worker", address] => worker::run(address.parse()?)?,
        ["node", http, router, key, model] => node::run(http.parse()?, router, Path::new(key), model)?,
        ["engine", model] => return Ok(node::engine(Path::new(model))?),
        _ => return Err(USAGE.into()),
    }
    Ok(ExitCode::SUCCESS)
}
