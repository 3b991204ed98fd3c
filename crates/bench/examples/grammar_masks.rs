//! What grammars cost: masks at a vocabulary of 128,000 tokens, and tokens a second of 16 rows with 16 schemas against 16
//! without. The last line is JSON.
//!
//!     cargo run --release -p bench --example grammar_masks [MODEL]
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use engine::{
    Engine, EngineSettings,
    grammar::{Grammars, Vocabulary},
};
use mlx::{Dequantize, DeviceChoice, LoadSettings};
use serde_json::json;
use std::{
    collections::BTreeSet,
    error::Error,
    path::PathBuf,
    time::{Duration, Instant},
};
use types::{
    CacheScope, GenerateDraft, GenerateRequest, Grammar, OutputRules, RequestId, SamplingDraft, Service,
    Speculation, TokenEvent, TokenId, TokenReport,
};

/// Tokens of the made-up vocabulary.
const VOCABULARY: usize = 128_000;
/// Tokens of one text, and texts of each schema, over which masks are measured.
const TEXT_TOKENS: usize = 300;
const TEXTS: usize = 4;
/// Rows, tokens of each, and how often each side is measured.
const ROWS: u64 = 16;
const NEW_TOKENS: u32 = 128;
const ROUNDS: usize = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let mut figures = masks()?;
    if let Some(model) = std::env::args_os().nth(1) {
        figures.extend(rows(model.into())?);
    }
    println!("{}", serde_json::Value::Object(figures));
    Ok(())
}

type Figures = serde_json::Map<String, serde_json::Value>;

/// Sixteen kinds of records, each in a list that does not end soon.
fn schemas() -> Vec<Grammar> {
    let fields = [
        r#""name": {"type": "string"}"#,
        r#""age": {"type": "integer", "minimum": 0, "maximum": 130}"#,
        r#""tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3}"#,
        r#""note": {"type": "string", "maxLength": 80}"#,
    ];
    let kinds = [
        r#"{"type": "string"}"#,
        r#"{"type": "number"}"#,
        r#"{"type": "string", "pattern": "^[A-Z][a-z]+ [0-9]{1,4}$"}"#,
        r#"{"type": "object", "additionalProperties": {"type": "string"}}"#,
    ];
    let schema = |at: usize| {
        let (some, kind) = (fields[..=at / 4].join(", "), kinds[at % 4]);
        let item = format!(
            r#"{{"type": "object", "properties": {{{some}, "more": {kind}}}, "required": ["more"]}}"#
        );
        Grammar::JsonSchema(format!(r#"{{"type": "array", "minItems": 200, "items": {item}}}"#))
    };
    (0..16).map(schema).collect()
}

/// Bytes, numbers, and words of syllables with and without a space before them, as byte-level vocabularies have them.
fn vocabulary() -> Vocabulary {
    const SYLLABLES: &[&str] = &[
        "a", "be", "con", "de", "en", "for", "ing", "li", "ment", "no", "over", "pre", "ri", "sta", "tion",
        "un", "ver", "wo", "ex", "ly", "ß", "é", "日", "本",
    ];
    const MARKS: &[&str] =
        &["\"", ",", ":", "{", "}", "[", "]", " ", "\n", ".", "-", "\\", "=", "(", ")", ";"];
    let mut words: Vec<Vec<u8>> = (0..=255_u8).map(|byte| vec![byte]).collect();
    let mut seen: BTreeSet<Vec<u8>> = words.iter().cloned().collect();
    let mut put = |word: String| {
        if words.len() < VOCABULARY - 1 && seen.insert(word.clone().into_bytes()) {
            words.push(word.into_bytes());
        }
    };
    (0..1000).for_each(|number| put(number.to_string()));
    for one in MARKS {
        for two in MARKS {
            put(format!("{one}{two}"));
            MARKS.iter().for_each(|three| put(format!("{one}{two}{three}")));
        }
    }
    let mut random = fastrand::Rng::with_seed(5);
    for at in 0.. {
        let word: String = (0..1 + at % 5).map(|_| SYLLABLES[random.usize(..SYLLABLES.len())]).collect();
        put(if at % 2 == 0 { format!(" {word}") } else { word });
        if at > 40 * VOCABULARY {
            break;
        }
    }
    // What is left are long runs of spaces and lines.
    (1..=80).for_each(|count| put(" ".repeat(count)));
    words.push(Vec::new());
    let end = words.len() as TokenId - 1;
    Vocabulary::new(words, vec![end])
}

fn masks() -> Result<Figures, Box<dyn Error>> {
    let began = Instant::now();
    let vocabulary = vocabulary();
    println!("a vocabulary of {} tokens, made in {:?}", vocabulary.size(), began.elapsed());
    let began = Instant::now();
    let mut grammars = Grammars::new(&vocabulary)?;
    println!("read in {:?}", began.elapsed());
    let mut random = fastrand::Rng::with_seed(9);
    let (mut compile_ms, mut mask_ms, mut consume_ms, mut clone_ms) = (vec![], vec![], vec![], vec![]);
    for grammar in schemas() {
        let began = Instant::now();
        let first = grammars.compile(&grammar)?;
        compile_ms.push(ms(began.elapsed()));
        for _ in 0..TEXTS {
            let began = Instant::now();
            let mut matcher = first.clone();
            clone_ms.push(ms(began.elapsed()));
            for _ in 0..TEXT_TOKENS {
                let began = Instant::now();
                let mask = matcher.mask()?;
                mask_ms.push(ms(began.elapsed()));
                let allowed: Vec<TokenId> = (0..vocabulary.size())
                    .filter(|&token| mask.allows(token) && !vocabulary.word(token).is_empty())
                    .collect();
                // As models do: rather a mark that goes on in the structure than one more word.
                let short: Vec<TokenId> =
                    allowed.iter().copied().filter(|&token| vocabulary.word(token).len() < 3).collect();
                let from = if random.u8(..) < 100 && !short.is_empty() { &short } else { &allowed };
                let token = from[random.usize(..from.len())];
                let began = Instant::now();
                matcher.consume(token)?;
                consume_ms.push(ms(began.elapsed()));
            }
        }
    }
    let mut figures = Figures::new();
    figures.insert("vocabulary".to_owned(), vocabulary.size().into());
    for (what, mut times) in
        [("compile", compile_ms), ("clone", clone_ms), ("mask", mask_ms), ("consume", consume_ms)]
    {
        times.sort_unstable_by(f64::total_cmp);
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
        let figure = json!({"n": times.len(), "mean": rounded(mean), "p50": rounded(at(0.5)),
            "p99": rounded(at(0.99)), "max": rounded(at(1.0))});
        figures.insert(format!("{what}_ms"), figure);
    }
    Ok(figures)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// To a thousandth.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

fn rows(model: PathBuf) -> Result<Figures, Box<dyn Error>> {
    let settings = LoadSettings {
        model,
        name: "model".to_owned(),
        slots: ROWS as usize,
        context_tokens: Some(4096),
        kv_bytes: Some(1 << 30),
        kv_bits: None,
        verify: false,
        dequantize: Dequantize::Auto,
        device: DeviceChoice::Auto,
    };
    let (model, assets) = mlx::load(&settings, &mut |_, _| ())?;
    let card = model.card().clone();
    let vocabulary =
        Vocabulary::from_tokenizer_json(&assets.tokenizer_json, card.vocab_size, &card.eos_tokens)?;
    let mut grammars = Grammars::new(&vocabulary)?;
    let settings = EngineSettings { prefix_cache: false, ..EngineSettings::default() };
    let mut engine = Engine::new(model, settings);
    while engine.prepare()? {}
    let schemas = schemas();
    let mut rates = [Vec::new(), Vec::new()];
    let mut id = 0;
    for _ in 0..=ROUNDS {
        for (constrained, rates) in rates.iter_mut().enumerate() {
            for row in 0..ROWS {
                id += 1;
                let grammar = (constrained == 1).then(|| schemas[row as usize].clone());
                let sampling = SamplingDraft { temperature: 0.7, seed: row, ..SamplingDraft::default() };
                let draft = GenerateDraft {
                    id: RequestId(id),
                    model: card.name.clone(),
                    prompt: (0..64).map(|at| (at * 977 + row as u32 * 31) % card.vocab_size).collect(),
                    sampling: sampling.try_into()?,
                    max_tokens: NEW_TOKENS,
                    stop_tokens: Vec::new(),
                    ignore_eos: true,
                    service: Service::default(),
                    cache: CacheScope::default(),
                    output: Vec::new(),
                    rules: OutputRules { grammar: grammar.clone(), min_tokens: 0 },
                    report: TokenReport::default(),
                    speculation: Speculation::default(),
                };
                let request = GenerateRequest::try_from(draft)?;
                match grammar {
                    Some(grammar) => {
                        engine.submit_under(Instant::now(), request, grammars.compile(&grammar)?)?
                    }
                    None => engine.submit(Instant::now(), request)?,
                }
            }
            // From when all rows decode on.
            let (mut first, mut tokens, mut begun) = (BTreeSet::new(), 0_u32, None);
            let mut last = Instant::now();
            while !engine.is_idle() {
                let mut events = Vec::new();
                engine.step(Instant::now(), &mut events)?;
                last = Instant::now();
                engine.observe(last);
                for (id, event) in events {
                    if let TokenEvent::Tokens { .. } = event {
                        first.insert(id);
                        tokens += u32::from(begun.is_some());
                    }
                }
                if begun.is_none() && first.len() == ROWS as usize {
                    begun = Some(last);
                }
            }
            let seconds = begun.map_or(0.0, |begun| (last - begun).as_secs_f64());
            rates.push(f64::from(tokens) / seconds);
        }
    }
    // The first round warms up.
    let median = |rates: &mut Vec<f64>| {
        rates.remove(0);
        rates.sort_unstable_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    println!("tokens/s of each round: free {:.1?}, under grammars {:.1?}", rates[0], rates[1]);
    let [free, under] = [median(&mut rates[0]), median(&mut rates[1])];
    let figure = json!({"rows": ROWS, "free": rounded(free), "under_schemas": rounded(under),
        "ratio": rounded(under / free)});
    Ok(Figures::from_iter([("tokens_per_s".to_owned(), figure)]))
}
