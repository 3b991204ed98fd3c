//! What guessing tokens ahead gains, in real time: the same requests with and without it, on texts that repeat themselves
//! and on texts that do not.

use crate::LoadBenchError;
use engine::{Engine, EngineSettings, Model};
use serde::Serialize;
use std::{collections::BTreeMap, time::Instant};
use types::{
    CacheScope, GenerateDraft, GenerateError, GenerateRequest, OutputRules, RequestId, SamplingParams,
    Service, Speculation, TokenEvent, TokenId, TokenReport, Usage,
};

/// Of each measurement the best of so many counts: others only ever take time away.
const ROUNDS: usize = 3;

/// What a reader of code or of a letter would copy.
const CODE: [&str; 6] = [
    "def area_of_circle(radius):\n    return 3.14159 * radius * radius\n",
    "def area_of_square(side):\n    result = side * side\n    return result\n",
    "def mean(values):\n    total = 0\n    for value in values:\n        total = total + value\n    return total / len(values)\n",
    "def largest(values):\n    best = values[0]\n    for value in values:\n        if value > best:\n            best = value\n    return best\n",
    "def count_words(text):\n    words = text.split()\n    return len(words)\n",
    "def reverse(text):\n    letters = list(text)\n    letters.reverse()\n    return \"\".join(letters)\n",
];
const LETTER: [&str; 6] = [
    "The committee met on Tuesday morning to discuss the repair of the old stone bridge.",
    "Two engineers reported that the northern arch had moved by eleven millimetres since the spring.",
    "The mayor asked whether the market could be held on the other side of the river until then.",
    "Nobody objected, although the bakers feared that they would lose their Saturday customers.",
    "It was agreed that work should begin in October, after the harvest festival was over.",
    "The minutes were read aloud, corrected in two places, and signed by all who were present.",
];
/// What nothing is copied for.
const QUESTIONS: [&str; 8] = [
    "Once upon a time, a fox who lived behind the mill",
    "The best way to learn a new language is",
    "Dear neighbour, I am writing to you because",
    "In the year 2090 the people of the harbour town",
    "To make soup for six people, first",
    "Light travels faster than sound, which explains why",
    "My grandmother always said that a good garden",
    "The history of the bicycle begins with",
];

/// What to measure.
#[derive(Debug, Clone)]
pub struct SpeculationBenchSettings {
    /// Rows at once, one measurement each.
    pub batches: Vec<usize>,
    /// Tokens of each answer.
    pub new_tokens: u32,
    /// How the engine schedules.
    pub engine: EngineSettings,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct SpeculationFigures {
    /// Whether all answers were the same with and without guesses.
    pub same_text: bool,
    /// Tokens a second with guesses over those without, on texts that are copied, with one row.
    pub copy_heavy_ratio_1: Option<f64>,
    /// The same with four.
    pub copy_heavy_ratio_4: Option<f64>,
    /// With sixteen.
    pub copy_heavy_ratio_16: Option<f64>,
    /// The least such ratio on texts without repetition.
    pub plain_ratio_min: f64,
    /// Each measurement.
    pub measurements: Vec<SpeculationMeasurement>,
}

/// One kind of text with one number of rows.
#[derive(Debug, Clone, Serialize)]
pub struct SpeculationMeasurement {
    /// `code`, `letter` or `plain`.
    pub text: &'static str,
    /// Rows at once.
    pub rows: usize,
    /// Tokens a second of all rows once each has its first one: without guesses, and with.
    pub tokens_per_s: [f64; 2],
    /// The second over the first.
    pub ratio: f64,
    /// Guesses that came true, and those that did not.
    pub guesses: [u32; 2],
    /// Answers that differ.
    pub different: usize,
}

/// Measures each kind of text with each number of rows, with and without guesses by turns; `encode` makes tokens of a text.
///
/// # Errors
/// What the engine refuses, and what the model reports.
pub fn speculation_bench(
    mut model: Box<dyn Model>,
    encode: &dyn Fn(&str) -> Vec<TokenId>,
    settings: &SpeculationBenchSettings,
) -> Result<SpeculationFigures, LoadBenchError> {
    while model.prepare()? {}
    let name = model.card().name.clone();
    let mut drive = Drive { engine: Engine::new(model, settings.engine.clone()), name, next: 0 };
    let mut measurements = Vec::new();
    for &rows in &settings.batches {
        for text in ["code", "letter", "plain"] {
            let prompts: Vec<_> = (0..rows).map(|row| encode(&prompt(text, row))).collect();
            measurements.push(drive.compare(text, &prompts, settings.new_tokens)?);
        }
    }
    let copied = |rows: usize| {
        let of = |m: &&SpeculationMeasurement| m.rows == rows && m.text != "plain";
        measurements.iter().filter(of).map(|m| m.ratio).reduce(f64::min)
    };
    let plain = measurements.iter().filter(|m| m.text == "plain").map(|m| m.ratio);
    Ok(SpeculationFigures {
        same_text: measurements.iter().all(|m| m.different == 0),
        copy_heavy_ratio_1: copied(1),
        copy_heavy_ratio_4: copied(4),
        copy_heavy_ratio_16: copied(16),
        plain_ratio_min: plain.fold(f64::INFINITY, f64::min),
        measurements,
    })
}

/// What a row is to go on with: the same parts in another order for each row, and the beginning of them again.
fn prompt(text: &str, row: usize) -> String {
    let turned = |parts: &[&'static str]| -> Vec<&'static str> {
        (0..parts.len()).map(|at| parts[(at + row) % parts.len()]).collect()
    };
    match text {
        "code" => {
            let parts = turned(&CODE);
            format!(
                "# Version {row} of the file\n{}\n# The same file again, unchanged\n{}",
                parts.join("\n"),
                parts[0]
            )
        }
        "letter" => {
            let parts = turned(&LETTER);
            format!("Letter {row}: {} Word for word once more: {}", parts.join(" "), parts[0])
        }
        _ => QUESTIONS[row % QUESTIONS.len()].to_owned() + &" and".repeat(row / QUESTIONS.len()),
    }
}

struct Drive {
    engine: Engine,
    name: String,
    next: u128,
}

/// What a round brought.
struct Round {
    texts: Vec<Vec<TokenId>>,
    tokens_per_s: f64,
    guesses: [u32; 2],
}

impl Drive {
    fn compare(
        &mut self,
        text: &'static str,
        prompts: &[Vec<TokenId>],
        new_tokens: u32,
    ) -> Result<SpeculationMeasurement, LoadBenchError> {
        // Shapes are built by the first of each kind.
        for guessing in [false, true] {
            self.round(prompts, new_tokens, guessing)?;
        }
        let mut best: [Option<Round>; 2] = [None, None];
        let mut different = 0;
        for _ in 0..ROUNDS {
            for (guessing, best) in [false, true].into_iter().zip(&mut best) {
                let round = self.round(prompts, new_tokens, guessing)?;
                if best.as_ref().is_none_or(|best| round.tokens_per_s > best.tokens_per_s) {
                    *best = Some(round);
                }
            }
            if let [Some(without), Some(with)] = &best {
                let differs = without.texts.iter().zip(&with.texts).filter(|(a, b)| a != b).count();
                different = differs.max(different);
            }
        }
        let [Some(without), Some(with)] = best else { unreachable!("rounds were run") };
        Ok(SpeculationMeasurement {
            text,
            rows: prompts.len(),
            tokens_per_s: [without.tokens_per_s, with.tokens_per_s],
            ratio: with.tokens_per_s / without.tokens_per_s,
            guesses: with.guesses,
            different,
        })
    }

    /// All prompts at once, each round with a cache of its own: neither prompts nor answers of another one are known.
    fn round(
        &mut self,
        prompts: &[Vec<TokenId>],
        new_tokens: u32,
        guessing: bool,
    ) -> Result<Round, LoadBenchError> {
        let first = self.next;
        for prompt in prompts {
            let draft = GenerateDraft {
                id: RequestId(self.next),
                model: self.name.clone(),
                prompt: prompt.clone(),
                sampling: SamplingParams::greedy(),
                max_tokens: new_tokens,
                stop_tokens: Vec::new(),
                ignore_eos: true,
                service: Service::default(),
                cache: CacheScope { salt: Some(format!("round {first}")), session: None },
                output: Vec::new(),
                rules: OutputRules::default(),
                report: TokenReport::default(),
                speculation: Speculation { enabled: guessing, prediction: Vec::new() },
            };
            self.next += 1;
            let request = GenerateRequest::try_from(draft)
                .map_err(|error| GenerateError::Invalid { message: error.to_string(), param: None })?;
            self.engine.submit(Instant::now(), request)?;
        }
        let mut texts: BTreeMap<RequestId, Vec<TokenId>> = BTreeMap::new();
        let (mut begin, mut before) = (None, 0);
        let mut guesses = [0; 2];
        while !self.engine.is_idle() {
            let mut events = Vec::new();
            self.engine.step(Instant::now(), &mut events)?;
            self.engine.observe(Instant::now());
            for (id, event) in events {
                match event {
                    TokenEvent::Tokens { tokens, .. } => texts.entry(id).or_default().extend(tokens),
                    TokenEvent::Finished(finish) => {
                        let Usage { accepted_drafts, rejected_drafts, .. } = finish.usage;
                        guesses = [guesses[0] + accepted_drafts, guesses[1] + rejected_drafts];
                    }
                    TokenEvent::Started { .. } | TokenEvent::Prompt { .. } => {}
                }
            }
            if begin.is_none() && texts.len() == prompts.len() {
                begin = Some(Instant::now());
                before = texts.values().map(Vec::len).sum();
            }
        }
        let written: usize = texts.values().map(Vec::len).sum();
        let seconds = begin.map_or(f64::INFINITY, |begin| begin.elapsed().as_secs_f64());
        let tokens_per_s = (written - before) as f64 / seconds;
        Ok(Round { texts: texts.into_values().collect(), tokens_per_s, guesses })
    }
}
