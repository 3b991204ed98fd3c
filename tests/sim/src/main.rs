//! Runs seeds, on all of the machine's cores, and says how to run one again that fails.
#![expect(clippy::print_stdout, reason = "a program")]

use clap::Parser;
use sim::{Outcome, Scenario, Stats, run};
use std::{
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

/// Runs the cluster in virtual time, with faults that seeds stand for.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first one.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// This one only, with its trace.
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(seed) = arguments.seed {
        tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
        let scenario = Scenario::random(seed);
        println!("{scenario:#?}");
        let outcome = run(&scenario, None);
        print!("{}", outcome.trace);
        println!("{:?}, packets: {:016x}", outcome.stats, outcome.sent);
        return said(seed, &outcome);
    }
    let began = Instant::now();
    let next = AtomicU64::new(arguments.first);
    let all = Mutex::new((0, Stats::default()));
    let end = arguments.first + arguments.seeds;
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let outcome = run(&Scenario::random(seed), None);
                    let failed = said(seed, &outcome) != ExitCode::SUCCESS;
                    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                    *all = (all.0 + u32::from(failed), all.1.and(outcome.stats));
                }
            });
        }
    });
    let (failed, stats) = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (seeds, seconds) = (arguments.seeds, began.elapsed().as_secs_f64());
    println!("{stats:?}");
    println!("{{\"seeds\": {seeds}, \"failed\": {failed}, \"seconds\": {seconds:.1}}}");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn said(seed: u64, outcome: &Outcome) -> ExitCode {
    if outcome.breaches.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("seed {seed} fails (again with: scripts/test-sim --seed {seed})");
    for breach in &outcome.breaches {
        println!("  {breach}");
    }
    ExitCode::FAILURE
}
