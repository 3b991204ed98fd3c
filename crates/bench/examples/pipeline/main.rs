//! What a pipeline's overlap gains, and whether its passes take as long as the formula says that micro-batches are chosen by.
//!
//!     pipeline MODEL [--delays 0,0.5,5] [--stages 2] [--prompt 2048] [--slice 128]
//!     pipeline MODEL --gpu [--stages 2]
//!
//! Real ranks on this machine, each on a core of its own (Linux), over MLX's ring, which goes through tunnels as between
//! nodes; a relay delivers every datagram of these so many milliseconds later. Of each delay: a prompt read in slices that
//! follow each other closely, and the same ones one after another; and rows decoded in 1 to 4 passes in flight, with what
//! [`StageTimes::cycle_s`] says of them by what ranks told of the same passes. With `--gpu`, rank i on GPU i, without
//! tunnels: tokens a second of 1 and 16 rows, and those of one rank with the whole model.
//!
//! Prints a JSON line for each delay and one with the worst of all.
#![expect(clippy::print_stdout, reason = "what the program prints is its result")]

mod passes;
mod ways;

use engine::{Model, StageTimes};
use mlx::{
    Dequantize, DeviceChoice, LoadSettings,
    distributed::{Backend, Group, RingPlace},
    pipeline::{self, Head},
};
use passes::Passes;
use serde::{Deserialize, Serialize};
use std::{
    error::Error,
    io::{BufRead, BufReader},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener},
    ops::Range,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};
use ways::Ways;

type Failure = Box<dyn Error>;

/// Tells a process that it is a rank, and what to measure: a [`Job`].
const VARIABLE: &str = "BENCH_PIPELINE_JOB";
/// Begins the line with a rank's figures, among what libraries print.
const MARK: &str = "figures: ";
/// Rows that are decoded.
const ROWS: [usize; 2] = [8, 16];
/// Times that each is decoded.
const ROUNDS: usize = 3;
/// Passes in flight that are tried.
const GROUPS_MAX: usize = 4;
/// What is chosen may take so much longer than the best that was tried: less is not told apart from noise, and the choice
/// asks for a gain of 3 %.
const CHOICE_SLACK: f64 = 1.05;
/// Sequences of the models.
const SLOTS: usize = 16;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Job {
    model: PathBuf,
    /// The layer after the last one of each rank; of one rank alone there is no ring.
    ends: Vec<usize>,
    prompt: usize,
    slice: usize,
    gpu: bool,
}

/// Of one delay.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Figures {
    /// Milliseconds once around, as the head measured it.
    around_ms: f64,
    /// Of each stage milliseconds of passes with 1, 8 and 16 rows, as measured at the start and as learned in the end.
    start_ms: Vec<[f64; 3]>,
    learned_ms: Vec<[f64; 3]>,
    /// Seconds of the prompt in slices one after another, and overlapping.
    prefill_s: [f64; 2],
    prefill_speedup: f64,
    decode: Vec<Decode>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Decode {
    rows: usize,
    /// Measured and expected milliseconds from a row's token to its next one, by passes in flight from 1: of each the round
    /// in which it was shortest, and what was expected by what ranks told during that.
    cycle_ms: Vec<[f64; 2]>,
    /// The largest error of what was expected.
    error: f64,
    /// Passes that the pipeline chooses, and whether that is the best of those tried.
    chosen: usize,
    chosen_is_best: bool,
}

/// Of a whole model or a pipeline on GPUs: tokens a second, by rows.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Rates(Vec<(usize, f64)>);

fn main() -> Result<(), Failure> {
    if let Ok(job) = std::env::var(VARIABLE) {
        return rank(&serde_json::from_str(&job)?);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let model = arguments.first().filter(|first| !first.starts_with('-'));
    let model = PathBuf::from(model.ok_or("usage: pipeline MODEL [--delays MS,…] [--stages N] [--gpu]")?);
    let value = |name: &str, default: &str| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)).map_or(default, String::as_str).to_owned()
    };
    let stages: usize = value("--stages", "2").parse()?;
    let layers = mlx::checkpoint::inspect(&model, None)?.layers;
    let ends = (1..=stages).map(|stage| stage * layers / stages).collect();
    let (prompt, slice) = (value("--prompt", "2048").parse()?, value("--slice", "128").parse()?);
    let job = Job { model, ends, prompt, slice, gpu: arguments.iter().any(|argument| argument == "--gpu") };
    if job.gpu { on_gpus(&job) } else { with_delays(&job, &value("--delays", "0,0.5,5")) }
}

fn with_delays(job: &Job, delays: &str) -> Result<(), Failure> {
    let mut all = Vec::new();
    for delay in delays.split(',') {
        let delay_ms: f64 = delay.trim().parse()?;
        let figures: Figures = run(job, Duration::from_secs_f64(delay_ms / 1000.0))?;
        println!("{}", serde_json::json!({ "delay_ms": delay_ms, "figures": figures }));
        all.push(figures);
    }
    let decodes = || all.iter().flat_map(|figures| &figures.decode);
    let summary = serde_json::json!({
        "stages": job.ends.len(),
        "prefill_speedup_2_stages": all.iter().map(|figures| figures.prefill_speedup).fold(f64::INFINITY, f64::min),
        "decode_cycle_error": decodes().map(|decode| decode.error).fold(0.0, f64::max),
        "choice_is_best": decodes().all(|decode| decode.chosen_is_best),
    });
    println!("{summary}");
    Ok(())
}

fn on_gpus(job: &Job) -> Result<(), Failure> {
    let whole = Job { ends: job.ends.last().copied().into_iter().collect(), ..job.clone() };
    let Rates(one) = run(&whole, Duration::ZERO)?;
    let Rates(several) = run(job, Duration::ZERO)?;
    println!(
        "{}",
        serde_json::json!({
            "stages": job.ends.len(),
            "one_rank_tokens_per_s": one,
            "pipeline_tokens_per_s": several,
        })
    );
    Ok(())
}

/// A rank's process, which ends with this one.
struct Rank(Child);

impl Drop for Rank {
    fn drop(&mut self) {
        // Fails only where it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts all ranks, with every link delayed, and gives what the head measured.
fn run<T: for<'de> Deserialize<'de>>(job: &Job, delay: Duration) -> Result<T, Failure> {
    let folder = std::env::temp_dir().join(format!("bench-pipeline-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let ranks = job.ends.len();
    let listeners =
        (0..ranks).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<Vec<_>, _>>()?;
    let addresses: Vec<SocketAddrV4> =
        listeners.iter().map(|listener| v4(listener.local_addr()?)).collect::<Result<_, _>>()?;
    drop(listeners);
    let mut ways = Ways::new(delay)?;
    let mut members = Vec::new();
    for rank in 0..ranks {
        let mut seen = addresses.clone();
        let next = (rank + 1) % ranks;
        if !job.gpu {
            seen[next] = ways.open(addresses[next])?;
        }
        let hostfile = folder.join(format!("hosts-{rank}.json"));
        std::fs::write(&hostfile, RingPlace::hostfile(&seen))?;
        let program = std::env::current_exe()?;
        let mut command = match cfg!(target_os = "linux") && !job.gpu {
            true => {
                let mut command = Command::new("taskset");
                command.args(["-c", &rank.to_string()]).arg(program);
                command
            }
            false => Command::new(program),
        };
        command.env(VARIABLE, serde_json::to_string(job)?);
        if job.gpu {
            command.env("CUDA_VISIBLE_DEVICES", rank.to_string());
        }
        RingPlace { rank, hostfile }.apply(&mut command);
        members.push(Rank(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?));
    }
    let head = members[0].0.stdout.take().ok_or("a rank without output")?;
    for line in BufReader::new(head).lines() {
        if let Some(figures) = line?.strip_prefix(MARK) {
            return Ok(serde_json::from_str(figures)?);
        }
    }
    Err("the head ended without figures".into())
}

fn v4(address: SocketAddr) -> Result<SocketAddrV4, Failure> {
    match address {
        SocketAddr::V4(address) => Ok(address),
        SocketAddr::V6(address) => Err(format!("{address} is no IPv4 address").into()),
    }
}

/// One rank's process.
fn rank(job: &Job) -> Result<(), Failure> {
    let settings = LoadSettings {
        model: job.model.clone(),
        name: "model".to_owned(),
        slots: SLOTS,
        context_tokens: Some(job.prompt.max(1024)),
        kv_bytes: Some(1 << 30),
        kv_bits: None,
        verify: false,
        dequantize: Dequantize::Auto,
        device: if job.gpu { DeviceChoice::Gpu } else { DeviceChoice::Cpu },
    };
    let starts = std::iter::once(0).chain(job.ends.iter().copied());
    let ranges: Vec<Range<usize>> = starts.zip(&job.ends).map(|(start, &end)| start..end).collect();
    if ranges.len() == 1 {
        let (mut model, _) = mlx::load(&settings, &mut |_, _| ())?;
        return tell(&rates(&mut Passes::new(&mut *model))?);
    }
    let group = Group::join(Backend::Ring)?;
    if group.rank() > 0 {
        pipeline::run_stage(&settings, group, &ranges, None, &mut |_| ())?;
        return Ok(());
    }
    let (mut head, _) = pipeline::load_head(&settings, group, &ranges, None, &mut |_, _| ())?;
    match job.gpu {
        true => tell(&rates(&mut Passes::new(&mut head))?),
        false => tell(&figures(&mut Passes::new(&mut head), job)?),
    }
}

fn tell(figures: &impl Serialize) -> Result<(), Failure> {
    println!("\n{MARK}{}", serde_json::to_string(figures)?);
    Ok(())
}

fn rates<M: Model + ?Sized>(passes: &mut Passes<'_, M>) -> Result<Rates, Failure> {
    let rate = |rows: usize| Ok::<_, Failure>((rows, rows as f64 / passes.decode_as_chosen(rows)?));
    Ok(Rates([1, SLOTS].into_iter().map(rate).collect::<Result<_, _>>()?))
}

/// Of each stage milliseconds of passes with 1, 8 and 16 rows.
fn stage_ms(times: &StageTimes) -> Vec<[f64; 3]> {
    let stages = times.stages.iter().map(|stage| {
        let of =
            |rows: u32| stage.iter().find(|entry| entry.0 == rows).map_or(f64::NAN, |entry| entry.1 * 1e3);
        [of(1), of(8), of(16)]
    });
    stages.collect()
}

fn figures(passes: &mut Passes<'_, Head>, job: &Job) -> Result<Figures, Failure> {
    let mut decode = Vec::new();
    let start_ms = stage_ms(passes.model().times());
    // Of several rounds the fastest counts: the machine is not always equally fast.
    let mut cycles_s = [[[f64::INFINITY; 2]; GROUPS_MAX]; ROWS.len()];
    for _ in 0..ROUNDS {
        for (rows, cycles_s) in ROWS.into_iter().zip(&mut cycles_s) {
            for (groups, least_s) in (1..).zip(cycles_s) {
                let measured = passes.decode(rows, groups)?;
                if measured < least_s[0] {
                    *least_s = [measured, passes.model().times().cycle_s(rows as u32, groups as u32)];
                }
            }
        }
    }
    for (rows, cycles_s) in ROWS.into_iter().zip(cycles_s) {
        let cycle_ms: Vec<[f64; 2]> = cycles_s.iter().map(|both| both.map(|seconds| seconds * 1e3)).collect();
        let error = cycle_ms.iter().map(|[measured, expected]| (expected / measured - 1.0).abs());
        let best = cycles_s.iter().map(|both| both[0]).fold(f64::INFINITY, f64::min);
        let chosen = passes.groups(rows);
        decode.push(Decode {
            rows,
            error: error.fold(0.0, f64::max),
            chosen,
            chosen_is_best: cycles_s[chosen - 1][0] <= best * CHOICE_SLACK,
            cycle_ms,
        });
    }
    let apart = passes.read(job.prompt, job.slice, 1)?;
    let flights = passes.flights();
    let together = passes.read(job.prompt, job.slice, flights)?;
    let times = passes.model().times();
    Ok(Figures {
        around_ms: times.links_s * 1e3,
        start_ms,
        learned_ms: stage_ms(times),
        prefill_s: [apart, together],
        prefill_speedup: apart / together,
        decode,
    })
}
