//! What is asked: requests with arrival times, from traces or made up, the same for the same seed.
//!
//! All are open loop: who asks does not wait for an answer. Arrivals have a part that is stretched, so that the work
//! comes to a given share of what the nodes can do, and a part that is not: the time between turns of one session.

use fastrand::Rng;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use types::{BLOCK_TOKENS, BlockHash};

/// Tokens of a block in Mooncake's traces.
const MOONCAKE_BLOCK_TOKENS: usize = 512;
/// Tokens that clients ask for at most, where a trace does not say: the router does not know how long answers will be.
const MAX_TOKENS: u32 = 1024;

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Seconds from the beginning, to be stretched.
    pub start_s: f64,
    /// Seconds after that, not to be stretched.
    pub offset_s: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub output_tokens: u32,
    /// Tokens that the client allows.
    pub max_tokens: u32,
    /// The prompt's full blocks.
    pub hashes: Vec<BlockHash>,
    /// The blocks that prompt and answer fill beyond those.
    pub output_hashes: Vec<BlockHash>,
    /// Whose it is.
    pub session: Option<u64>,
}

/// Requests in order of arrival.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    /// For tables.
    pub name: String,
    /// Ordered by arrival as long as nothing is stretched.
    pub requests: Vec<Request>,
    /// KV that each node has; none: as much as lets all nodes together hold what all prompts bring.
    pub node_kv_tokens: Option<usize>,
}

/// Where requests come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A trace: Mooncake's `.jsonl`, Azure's `.csv`.
    Trace(PathBuf),
    /// Chats of several turns, over a few system prompts.
    Chats,
    /// Agents: a long prefix that many share, many short turns.
    Agents,
    /// Single questions behind prefixes of which few are popular.
    Zipf,
}

/// What is wrong with a trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Neither kind.
    #[error("{path} is no trace: its name ends in neither .jsonl (Mooncake) nor .csv (Azure)")]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// A line that does not fit.
    #[error("{path}:{line}: {what}")]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// Nothing in it.
    #[error("{path} has no requests")]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

impl Source {
    /// The requests; `seed` makes up what the source does not fix, `count` bounds how many there are.
    ///
    /// # Errors
    /// [`TraceError`].
    pub(crate) fn load(&self, seed: u64, count: usize, divisor: u32) -> Result<Workload, TraceError> {
        let mut rng = Rng::with_seed(seed);
        let (name, mut requests, node_kv_tokens) = match self {
            Self::Trace(path) => {
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                (name, trace(path, &mut rng, divisor)?, None)
            }
            Self::Chats => ("chats".to_owned(), chats(&mut rng, count), Some(1 << 17)),
            Self::Agents => ("agents".to_owned(), agents(&mut rng, count), Some(1 << 17)),
            Self::Zipf => ("zipf".to_owned(), zipf(&mut rng, count), Some(1 << 17)),
        };
        requests.truncate(count);
        Ok(Workload { name, requests, node_kv_tokens })
    }
}

/// Hashes of made-up text: `content` names what a block holds.
fn next(parent: BlockHash, content: u64) -> BlockHash {
    let mixed = |value: u64| {
        let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    };
    let (low, high) = (parent.0 as u64, (parent.0 >> 64) as u64);
    let first = mixed(low.wrapping_add(mixed(content.wrapping_add(0x9e37_79b9_7f4a_7c15))));
    let second = mixed(high ^ first.rotate_left(17) ^ content);
    BlockHash(u128::from(second) << 64 | u128::from(first))
}

/// A text that grows, as hashes of its full blocks.
#[derive(Debug, Clone)]
struct Text {
    tokens: usize,
    hashes: Vec<BlockHash>,
    /// What the block being filled holds so far.
    content: u64,
}

impl Text {
    const EMPTY: Self = Self { tokens: 0, hashes: Vec::new(), content: 0 };

    /// Appends so many tokens of what `content` names.
    fn add(&mut self, tokens: usize, content: u64) {
        let end = self.tokens + tokens;
        while self.tokens < end {
            let step = (BLOCK_TOKENS - self.tokens % BLOCK_TOKENS).min(end - self.tokens);
            self.content = self.content.rotate_left(9) ^ content.wrapping_add(self.tokens as u64);
            self.tokens += step;
            if self.tokens.is_multiple_of(BLOCK_TOKENS) {
                let parent = self.hashes.last().copied().unwrap_or(BlockHash(0));
                self.hashes.push(next(parent, self.content));
                self.content = 0;
            }
        }
    }
}

/// A request for `output` tokens after `text`, which then has them.
fn ask(text: &mut Text, output: usize, content: u64, times: (f64, f64), session: Option<u64>) -> Request {
    let (prompt_tokens, hashes) = (text.tokens, text.hashes.clone());
    text.add(output, content);
    Request {
        start_s: times.0,
        offset_s: times.1,
        prompt_tokens: prompt_tokens as u32,
        output_tokens: output as u32,
        max_tokens: MAX_TOKENS.max((output as u32).next_power_of_two()),
        output_hashes: text.hashes[hashes.len()..].to_vec(),
        hashes,
        session,
    }
}

fn exponential(rng: &mut Rng, mean: f64) -> f64 {
    -mean * (1.0 - rng.f64()).ln()
}

/// Around `mean`, from half of it to twice: what people type and models answer varies about so.
fn about(rng: &mut Rng, mean: usize) -> usize {
    let factor = (rng.f64() * 2.0 - 1.0).exp2();
    ((mean as f64 * factor) as usize).max(1)
}

/// An index drawn with probability proportional to 1 / (index + 1)^exponent.
fn popular(rng: &mut Rng, count: usize, exponent: f64) -> usize {
    let weight = |index: usize| ((index + 1) as f64).powf(-exponent);
    let mut left = rng.f64() * (0..count).map(weight).sum::<f64>();
    (0..count)
        .find(|&index| {
            left -= weight(index);
            left <= 0.0
        })
        .unwrap_or(count - 1)
}

/// Sessions of several turns.
struct Turns {
    /// Prefixes and their tokens.
    prefixes: usize,
    prefix_tokens: usize,
    /// How unequal their popularity is.
    exponent: f64,
    turns: usize,
    /// Tokens that each turn adds.
    added: usize,
    output: usize,
    /// Seconds between turns.
    think_s: f64,
}

fn sessions(rng: &mut Rng, count: usize, turns: &Turns) -> Vec<Request> {
    let sizes: Vec<usize> = (0..turns.prefixes).map(|_| about(rng, turns.prefix_tokens)).collect();
    let salt = rng.u64(..);
    let (mut requests, mut start_s) = (Vec::new(), 0.0);
    while requests.len() < count {
        start_s += exponential(rng, 1.0);
        let (prefix, session) = (popular(rng, turns.prefixes, turns.exponent), rng.u64(..));
        let mut text = Text::EMPTY;
        text.add(sizes[prefix], salt ^ prefix as u64);
        let mut offset_s = 0.0;
        for _ in 0..about(rng, turns.turns) {
            text.add(about(rng, turns.added), rng.u64(..));
            let output = about(rng, turns.output);
            requests.push(ask(&mut text, output, rng.u64(..), (start_s, offset_s), Some(session)));
            offset_s += turns.think_s / 2.0 + exponential(rng, turns.think_s / 2.0);
        }
    }
    requests
}

fn chats(rng: &mut Rng, count: usize) -> Vec<Request> {
    let turns = Turns {
        prefixes: 4,
        prefix_tokens: 2000,
        exponent: 0.5,
        turns: 6,
        added: 150,
        output: 150,
        think_s: 20.0,
    };
    sessions(rng, count, &turns)
}

fn agents(rng: &mut Rng, count: usize) -> Vec<Request> {
    let turns = Turns {
        prefixes: 8,
        prefix_tokens: 8000,
        exponent: 0.9,
        turns: 20,
        added: 400,
        output: 80,
        think_s: 5.0,
    };
    sessions(rng, count, &turns)
}

fn zipf(rng: &mut Rng, count: usize) -> Vec<Request> {
    let turns = Turns {
        prefixes: 200,
        prefix_tokens: 1500,
        exponent: 1.1,
        turns: 1,
        added: 200,
        output: 100,
        think_s: 1.0,
    };
    sessions(rng, count, &turns)
}

fn trace(path: &Path, rng: &mut Rng, divisor: u32) -> Result<Vec<Request>, TraceError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| TraceError::Read { path: path.to_owned(), source })?;
    let requests = match path.extension().and_then(|extension| extension.to_str()) {
        Some("jsonl") => mooncake(path, &text, divisor)?,
        Some("csv") => azure(path, &text, rng, divisor)?,
        _ => return Err(TraceError::Kind { path: path.to_owned() }),
    };
    if requests.is_empty() {
        return Err(TraceError::Empty { path: path.to_owned() });
    }
    Ok(requests)
}

#[derive(Debug, Deserialize)]
struct MooncakeLine {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

fn mooncake(path: &Path, text: &str, divisor: u32) -> Result<Vec<Request>, TraceError> {
    let per_id = (MOONCAKE_BLOCK_TOKENS / divisor as usize / BLOCK_TOKENS).max(1);
    // Of each chain of ids, the hashes: most requests go on where another was.
    let mut known: BTreeMap<(BlockHash, u64), Vec<BlockHash>> = BTreeMap::new();
    let mut requests = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |what: String| TraceError::Line { path: path.to_owned(), line: index + 1, what };
        let line: MooncakeLine = serde_json::from_str(line).map_err(|error| wrong(error.to_string()))?;
        let prompt_tokens = (line.input_length / divisor).max(1);
        let output_tokens = (line.output_length / divisor).max(1);
        let mut hashes: Vec<BlockHash> = Vec::new();
        for id in line.hash_ids {
            let mut parent = hashes.last().copied().unwrap_or(BlockHash(0));
            let blocks = known.entry((parent, id)).or_insert_with(|| {
                let chain = (0..per_id).map(|_| {
                    parent = next(parent, id);
                    parent
                });
                chain.collect()
            });
            hashes.extend_from_slice(blocks);
        }
        hashes.truncate(prompt_tokens as usize / BLOCK_TOKENS);
        requests.push(Request {
            start_s: line.timestamp / 1e3,
            offset_s: 0.0,
            prompt_tokens,
            output_tokens,
            max_tokens: MAX_TOKENS.max(output_tokens.next_power_of_two()),
            hashes,
            output_hashes: Vec::new(),
            session: None,
        });
    }
    Ok(requests)
}

fn azure(path: &Path, text: &str, rng: &mut Rng, divisor: u32) -> Result<Vec<Request>, TraceError> {
    let mut first_s = None;
    let mut requests = Vec::new();
    for (index, line) in text.lines().enumerate().skip(1).filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |what: &str| TraceError::Line {
            path: path.to_owned(),
            line: index + 1,
            what: format!("{what} in {line:?}"),
        };
        let mut fields = line.trim().split(',');
        let mut field = || fields.next().ok_or_else(|| wrong("a field is missing"));
        let at_s = seconds(field()?).ok_or_else(|| wrong("no time"))?;
        let mut tokens = || field()?.parse::<u32>().map_err(|_| wrong("no number of tokens"));
        let (context, generated) = (tokens()? / divisor, tokens()? / divisor);
        let mut prompt = Text::EMPTY;
        prompt.add(context.max(1) as usize, rng.u64(..));
        // The trace spans less than a day; a night in it is one of midnight.
        let since = (at_s - *first_s.get_or_insert(at_s)).rem_euclid(86_400.0);
        requests.push(ask(&mut prompt, generated.max(1) as usize, rng.u64(..), (since, 0.0), None));
    }
    Ok(requests)
}

/// Seconds of the day of `2023-11-16 18:17:03.9799600`.
fn seconds(time: &str) -> Option<f64> {
    let mut parts = time.split_once(' ')?.1.split(':').map(|part| part.parse::<f64>().ok());
    let (hours, minutes, seconds) = (parts.next()??, parts.next()??, parts.next()??);
    Some(hours * 3600.0 + minutes * 60.0 + seconds)
}
