//! `mlx-node bench serve`: an open loop of requests against a running endpoint. They come when they come, however long
//! those before them take, as people do; what the endpoint makes of it are times and goodput.
#![expect(clippy::print_stdout, reason = "what the command prints is its result")]

use crate::{
    config::Values,
    endpoint::{AskError, Endpoint, Events},
    table::columns,
};
use serde::Serialize;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant as TokioInstant, sleep_until, timeout},
};

/// Requests of one run: an hour at 25 a second.
const COUNT_MAX: u32 = 100_000;
/// Requests in flight at once, each with a socket; one that finds all taken is not sent, and counted.
const IN_FLIGHT_MAX: usize = 2048;
/// Tokens of a made-up prompt, or of an answer.
const TOKENS_MAX: u32 = 1 << 20;

/// What to ask, and how often.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ServeArguments {
    /// Requests a second, on average; they come independently of each other (a Poisson process)
    #[arg(long, value_name = "R", default_value_t = 2.0)]
    rate: f64,
    /// Requests in all
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=i64::from(COUNT_MAX)))]
    count: u32,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=i64::from(TOKENS_MAX)))]
    prompt_tokens: u32,
    /// Of those, tokens that all prompts have in common
    #[arg(long, value_name = "N", default_value_t = 0)]
    shared_tokens: u32,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=i64::from(TOKENS_MAX)))]
    output_tokens: u32,
    /// Milliseconds to the first token that are good enough
    #[arg(long, value_name = "MS", default_value_t = 1000.0)]
    slo_ttft_ms: f64,
    /// Milliseconds for each further token, on average over an answer, that are good enough
    #[arg(long, value_name = "MS", default_value_t = 100.0)]
    slo_tpot_ms: f64,
    /// Seconds after which a request counts as failed
    #[arg(long, value_name = "S", default_value_t = 300)]
    timeout_s: u64,
    /// Makes the same prompts come at the same times again
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeBenchError {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("--rate {0}: a number above 0 is expected")]
    Rate(f64),
    #[error("--shared-tokens {shared} are more than the {prompt} of a prompt")]
    Shared { shared: u32, prompt: u32 },
    #[error("no model can be asked now: mlx-node status tells why")]
    NoModel,
    #[error("{model:?} is not served; served are: {served}")]
    UnknownModel { model: String, served: String },
    #[error("no request was answered; the first said: {0}")]
    AllFailed(String),
}

/// What came of it.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    rate: f64,
    requests: u32,
    answered: usize,
    failed: usize,
    /// By what was said.
    failures: BTreeMap<String, usize>,
    seconds: f64,
    requests_per_s: f64,
    output_tokens_per_s: f64,
    prompt_tokens: u64,
    cached_tokens: u64,
    ttft_ms: Percentiles,
    tpot_ms: Percentiles,
    itl_ms: Percentiles,
    e2e_ms: Percentiles,
    slo: Slo,
    /// How much later than meant a request was sent, at most: if this is long, this machine was too slow to ask.
    sent_late_ms_max: f64,
}

#[derive(Debug, Serialize)]
struct Slo {
    ttft_ms: f64,
    tpot_ms: f64,
    /// Requests that met both.
    met: usize,
    /// Of all that were asked.
    share: f64,
    goodput_per_s: f64,
}

#[derive(Debug, Serialize)]
struct Percentiles {
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

impl Percentiles {
    /// By the nearest rank; zeros where there are no values.
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let rank = |share: f64| {
            let place = (share * values.len() as f64).ceil() as usize;
            values.get(place.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        Self { mean, p50: rank(0.5), p90: rank(0.9), p99: rank(0.99), max: rank(1.0) }
    }
}

/// One request's times.
#[derive(Debug)]
struct Answered {
    first: Duration,
    end: Duration,
    /// From each piece of text to the next.
    gaps: Vec<Duration>,
    tokens: u32,
    prompt_tokens: u64,
    cached_tokens: u64,
}

impl Answered {
    /// Seconds for each token after the first one.
    fn per_token_s(&self) -> Option<f64> {
        let between = self.end.saturating_sub(self.first).as_secs_f64();
        (self.tokens > 1).then(|| between / f64::from(self.tokens - 1))
    }
}

/// Asks, waits for all answers, prints.
pub(crate) async fn run(values: &Values, arguments: &ServeArguments) -> Result<(), ServeBenchError> {
    if !(arguments.rate.is_finite() && arguments.rate > 0.0) {
        return Err(ServeBenchError::Rate(arguments.rate));
    }
    if arguments.shared_tokens > arguments.prompt_tokens {
        let (shared, prompt) = (arguments.shared_tokens, arguments.prompt_tokens);
        return Err(ServeBenchError::Shared { shared, prompt });
    }
    let endpoint = Endpoint::of(values)?;
    let model = Model::find(&endpoint, values.model_name.clone().fixed()).await?;
    let mut random = fastrand::Rng::with_seed(arguments.seed);
    let shared: Vec<u32> = (0..arguments.shared_tokens).map(|_| model.token(&mut random)).collect();
    let places = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let mut asked = JoinSet::new();
    let started = TokioInstant::now();
    let mut due = started;
    let mut late = Duration::ZERO;
    let mut outcomes = Vec::new();
    for _ in 0..arguments.count {
        let own = (arguments.shared_tokens..arguments.prompt_tokens).map(|_| model.token(&mut random));
        let prompt: Vec<u32> = shared.iter().copied().chain(own).collect();
        sleep_until(due).await;
        late = late.max(due.elapsed());
        due += Duration::from_secs_f64(-(1.0 - random.f64()).ln() / arguments.rate);
        let Ok(place) = places.clone().try_acquire_owned() else {
            outcomes.push(Err(format!("not sent: {IN_FLIGHT_MAX} were in flight")));
            continue;
        };
        let body = json!({
            "model": model.name, "prompt": prompt, "max_tokens": arguments.output_tokens, "ignore_eos": true,
            "stream": true, "stream_options": { "include_usage": true },
        });
        let (endpoint, time_max) = (endpoint.clone(), Duration::from_secs(arguments.timeout_s));
        asked.spawn(async move {
            let _place = place;
            let seconds = time_max.as_secs();
            match timeout(time_max, ask(&endpoint, &body)).await {
                Ok(answered) => answered.map_err(|error| error.to_string()),
                Err(_) => Err(format!("not answered within {seconds} s")),
            }
        });
    }
    while let Some(outcome) = asked.join_next().await {
        outcomes.push(outcome.unwrap_or_else(|error| Err(error.to_string())));
    }
    let report = report(model.name, arguments, outcomes, started.elapsed(), late)?;
    if arguments.json {
        println!("{}", serde_json::to_string(&report).expect("numbers and texts"));
    } else {
        print!("{}", table(&report));
    }
    Ok(())
}

/// What is asked: prompts are tokens, drawn from its vocabulary.
struct Model {
    name: String,
    vocab_size: u32,
    eos_tokens: Vec<u64>,
}

impl Model {
    async fn find(endpoint: &Endpoint, named: Option<String>) -> Result<Self, ServeBenchError> {
        let cluster = endpoint.get_json("/v1/cluster").await?;
        let nodes = cluster["nodes"].as_array().into_iter().flatten();
        let ready = nodes.filter(|node| node["engine"]["state"] == "ready");
        let cards: Vec<&Value> =
            ready.flat_map(|node| node["models"].as_array().into_iter().flatten()).collect();
        let is_named = |card: &&&Value| named.as_deref().is_none_or(|name| card["name"] == *name);
        let Some(card) = cards.iter().find(is_named) else {
            let names = cards.iter().filter_map(|card| card["name"].as_str());
            let served = names.collect::<Vec<_>>().join(", ");
            return Err(match named {
                Some(model) if !served.is_empty() => ServeBenchError::UnknownModel { model, served },
                _ => ServeBenchError::NoModel,
            });
        };
        Ok(Self {
            name: card["name"].as_str().unwrap_or_default().to_owned(),
            vocab_size: card["vocab_size"].as_u64().and_then(|size| size.try_into().ok()).unwrap_or(1).max(1),
            eos_tokens: card["eos_tokens"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_u64)
                .collect(),
        })
    }

    /// One that ends no text.
    fn token(&self, random: &mut fastrand::Rng) -> u32 {
        let token = random.u32(0..self.vocab_size);
        if self.eos_tokens.contains(&u64::from(token)) { 0 } else { token }
    }
}

async fn ask(endpoint: &Endpoint, body: &Value) -> Result<Answered, AskError> {
    let started = Instant::now();
    let mut events: Events = endpoint.post("/v1/completions", body).await?;
    let (mut first, mut last) = (None, started);
    let mut gaps = Vec::new();
    let mut usage = Value::Null;
    while let Some(event) = events.next().await? {
        if event["usage"].is_object() {
            usage = event["usage"].clone();
        }
        let text = event["choices"][0]["text"].as_str().unwrap_or_default();
        if text.is_empty() {
            continue;
        }
        let now = Instant::now();
        match first {
            None => first = Some(now),
            Some(_) => gaps.push(now - last),
        }
        last = now;
    }
    let count = |value: &Value| value.as_u64().unwrap_or(0);
    Ok(Answered {
        first: first.unwrap_or(last) - started,
        end: last - started,
        gaps,
        tokens: count(&usage["completion_tokens"]) as u32,
        prompt_tokens: count(&usage["prompt_tokens"]),
        cached_tokens: count(&usage["prompt_tokens_details"]["cached_tokens"]),
    })
}

fn report(
    model: String,
    arguments: &ServeArguments,
    outcomes: Vec<Result<Answered, String>>,
    took: Duration,
    late: Duration,
) -> Result<Report, ServeBenchError> {
    let mut failures = BTreeMap::new();
    let mut first_failure = None;
    let mut answers = Vec::new();
    for outcome in outcomes {
        match outcome {
            Ok(answered) => answers.push(answered),
            Err(error) => {
                first_failure.get_or_insert_with(|| error.clone());
                *failures.entry(error).or_default() += 1;
            }
        }
    }
    if let (Some(error), []) = (first_failure, answers.as_slice()) {
        return Err(ServeBenchError::AllFailed(error));
    }
    let ms = |seconds: f64| seconds * 1e3;
    let (ttft_ms, tpot_ms) = (arguments.slo_ttft_ms, arguments.slo_tpot_ms);
    let is_good = |answer: &&Answered| {
        ms(answer.first.as_secs_f64()) <= ttft_ms && answer.per_token_s().is_none_or(|s| ms(s) <= tpot_ms)
    };
    let met = answers.iter().filter(is_good).count();
    let seconds = took.as_secs_f64();
    let times = |of: fn(&Answered) -> Duration| answers.iter().map(|one| ms(of(one).as_secs_f64())).collect();
    let gaps = answers.iter().flat_map(|answer| &answer.gaps).map(|gap| ms(gap.as_secs_f64()));
    Ok(Report {
        model,
        rate: arguments.rate,
        requests: arguments.count,
        answered: answers.len(),
        failed: failures.values().sum(),
        failures,
        seconds,
        requests_per_s: answers.len() as f64 / seconds,
        output_tokens_per_s: answers.iter().map(|answer| f64::from(answer.tokens)).sum::<f64>() / seconds,
        prompt_tokens: answers.iter().map(|answer| answer.prompt_tokens).sum(),
        cached_tokens: answers.iter().map(|answer| answer.cached_tokens).sum(),
        ttft_ms: Percentiles::of(times(|answer| answer.first)),
        tpot_ms: Percentiles::of(answers.iter().filter_map(Answered::per_token_s).map(ms).collect()),
        itl_ms: Percentiles::of(gaps.collect()),
        e2e_ms: Percentiles::of(times(|answer| answer.end)),
        slo: Slo {
            ttft_ms,
            tpot_ms,
            met,
            share: met as f64 / f64::from(arguments.count),
            goodput_per_s: met as f64 / seconds,
        },
        sent_late_ms_max: ms(late.as_secs_f64()),
    })
}

fn table(report: &Report) -> String {
    let row = |name: &str, values: &Percentiles| {
        let values = [values.mean, values.p50, values.p90, values.p99, values.max];
        let [mean, p50, p90, p99, max] = values.map(|value| format!("{value:.1}"));
        [name.to_owned(), mean, p50, p90, p99, max]
    };
    let rows = [
        row("time to first token", &report.ttft_ms),
        row("time per further token", &report.tpot_ms),
        row("between two pieces", &report.itl_ms),
        row("whole answer", &report.e2e_ms),
    ];
    let mut out = format!(
        "{}: {} requests at {} a second, {} answered, {} failed, in {:.1} s\n",
        report.model, report.requests, report.rate, report.answered, report.failed, report.seconds
    );
    out.push_str(&columns(["MILLISECONDS", "MEAN", "P50", "P90", "P99", "MAX"], &rows));
    out.push_str(&format!(
        "{:.2} requests and {:.1} tokens a second; {} of {} prompt tokens cached\n",
        report.requests_per_s, report.output_tokens_per_s, report.cached_tokens, report.prompt_tokens
    ));
    out.push_str(&format!(
        "goodput {:.2} requests a second: {} met {} ms and {} ms ({:.0} %)\n",
        report.slo.goodput_per_s,
        report.slo.met,
        report.slo.ttft_ms,
        report.slo.tpot_ms,
        report.slo.share * 100.0
    ));
    for (failure, count) in &report.failures {
        out.push_str(&format!("{count} × {failure}\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let values = Percentiles::of((1..=200).rev().map(f64::from).collect());
        assert_eq!((values.p50, values.p90, values.p99, values.max), (100.0, 180.0, 198.0, 200.0));
        assert_eq!(values.mean, 100.5);
        let none = Percentiles::of(Vec::new());
        assert_eq!((none.mean, none.p50, none.max), (0.0, 0.0, 0.0));
    }

    #[test]
    fn goodput_counts_what_met_both_targets() {
        use clap::Parser;
        #[derive(Parser)]
        struct Flags {
            #[command(flatten)]
            serve: ServeArguments,
        }
        let flags = ["x", "--count", "4", "--slo-ttft-ms", "100", "--slo-tpot-ms", "10"];
        let arguments = Flags::parse_from(flags).serve;
        let answer = |first_ms: u64, end_ms: u64, tokens: u32| {
            let (first, end) = (Duration::from_millis(first_ms), Duration::from_millis(end_ms));
            Ok(Answered { first, end, gaps: vec![end - first], tokens, prompt_tokens: 8, cached_tokens: 2 })
        };
        let outcomes =
            vec![answer(100, 200, 11), answer(101, 102, 2), answer(50, 500, 11), Err("busy".to_owned())];
        let report =
            |outcomes| report("m".to_owned(), &arguments, outcomes, Duration::from_secs(2), Duration::ZERO);
        let all = report(outcomes).expect("some were answered");
        assert_eq!((all.answered, all.failed, all.slo.met, all.slo.share), (3, 1, 1, 0.25));
        assert_eq!((all.slo.goodput_per_s, all.requests_per_s, all.output_tokens_per_s), (0.5, 1.5, 12.0));
        assert_eq!((all.prompt_tokens, all.cached_tokens), (24, 6));
        assert!(table(&all).contains("1 × busy"), "{}", table(&all));
        let error = report(vec![Err("busy".to_owned())]).expect_err("none was answered").to_string();
        assert!(error.contains("busy"), "{error}");
    }
}
