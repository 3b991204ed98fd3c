//! An engine child without a model, for this crate's tests: real pipes, real time, made-up text.
//!
//! A name that begins with `embed` is of an embedder, each pass of which takes a step's time.
//! Arguments: `NAME LOAD_MS STEP_MS SLOTS PID_FILE [FAILURE]`. With a failure, loading ends with it. A prompt that starts
//! with 990 makes the engine panic, one that starts with 991 makes its backend fail.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program, which shows that printing does no harm"
)]

use engine::{
    Embedder, EngineSettings, Input, Model, ModelError, ModelLimits, Slice, StepOutput, grammar::TokenMask,
};
use node::engine_process::{self, Loaded, LoadedEmbedder, LoadedModel};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use testkit::{FakeEmbedder, FakeModel, FakeSettings, StepCost, VirtualClock};
use types::{ModelAssets, ModelCard, TokenId};

const PANIC_TOKEN: TokenId = 990;
const BACKEND_TOKEN: TokenId = 991;

/// A [`FakeModel`] whose clock is the real one: steps are over when they would be.
#[derive(Debug)]
struct PacedModel {
    model: FakeModel,
    card: ModelCard,
    clock: VirtualClock,
}

impl PacedModel {
    /// Lets the model's time pass that has passed.
    fn catch_up(&self) {
        self.clock.advance(Instant::now().saturating_duration_since(self.clock.now()));
    }
}

impl Model for PacedModel {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn limits(&self) -> ModelLimits {
        self.model.limits()
    }

    fn submit(&mut self, slices: &[Slice<'_>]) -> Result<(), ModelError> {
        let asked = |token| {
            slices.iter().any(|slice| {
                slice.start == 0 && matches!(slice.input, Input::Tokens(tokens) if tokens[0] == token)
            })
        };
        assert!(!asked(PANIC_TOKEN), "as asked");
        if asked(BACKEND_TOKEN) {
            return Err(ModelError::Backend("as asked".to_owned()));
        }
        self.catch_up();
        self.model.submit(slices)
    }

    fn draw(&mut self, masks: &[TokenMask]) -> Result<(), ModelError> {
        self.model.draw(masks)
    }

    fn collect(&mut self) -> Result<StepOutput, ModelError> {
        self.catch_up();
        let drawn = self.model.collect();
        std::thread::sleep(self.clock.now().saturating_duration_since(Instant::now()));
        drawn
    }
}

/// A [`FakeEmbedder`] whose passes take time.
#[derive(Debug)]
struct PacedEmbedder(FakeEmbedder, Duration);

impl Embedder for PacedEmbedder {
    fn card(&self) -> &ModelCard {
        self.0.card()
    }

    fn embed(&mut self, texts: &[&[TokenId]]) -> Result<Vec<Vec<f32>>, ModelError> {
        std::thread::sleep(self.1);
        assert!(!texts.iter().any(|text| text[0] == PANIC_TOKEN), "as asked");
        self.0.embed(texts)
    }
}

fn main() -> ExitCode {
    let stdout = engine_process::private_stdout().expect("a file descriptor is left");
    // Whoever prints must not disturb the frames.
    println!("printed by a library");
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, load_ms, step_ms, slots, pid_file, failure @ ..] = args.as_slice() else {
        eprintln!("expected NAME LOAD_MS STEP_MS SLOTS PID_FILE [FAILURE], got {args:?}");
        return ExitCode::FAILURE;
    };
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let load = |progress: &mut dyn FnMut(&str, f32)| {
        std::fs::write(pid_file, std::process::id().to_string()).map_err(|error| error.to_string())?;
        for percent in [0, 50, 100] {
            progress("weights", percent as f32 / 100.0);
            std::thread::sleep(Duration::from_millis(number(load_ms) / 3));
        }
        match failure {
            [] if name.starts_with("embed") => {
                let model = FakeEmbedder::new(name, Duration::ZERO, VirtualClock::new());
                let model = Box::new(PacedEmbedder(model, Duration::from_millis(number(step_ms))));
                Ok(Loaded::Embedder(LoadedEmbedder { model, assets: FakeEmbedder::assets() }))
            }
            [] => Ok(load(name, Duration::from_millis(number(step_ms)), number(slots) as usize).into()),
            [message, ..] if message == "panic" => panic!("as asked"),
            [message, ..] => Err(message.clone()),
        }
    };
    engine_process::run(load, EngineSettings::default(), std::io::stdin(), stdout)
}

fn load(name: &str, step: Duration, slots: usize) -> LoadedModel {
    let clock = VirtualClock::new();
    let settings = FakeSettings {
        name: name.to_owned(),
        limits: ModelLimits { slots, ..FakeSettings::default().limits },
        cost: StepCost { base: step, ..StepCost::none() },
        ..FakeSettings::default()
    };
    let (model, _) = FakeModel::new(settings, clock.clone());
    let assets = ModelAssets {
        tokenizer_json: "{}".to_owned(),
        chat_template: None,
        bos_token: None,
        eos_token: Some("</s>".to_owned()),
    };
    let card = ModelCard { assets: assets.hash(), ..model.card().clone() };
    LoadedModel { model: Box::new(PacedModel { model, card, clock }), assets }
}
