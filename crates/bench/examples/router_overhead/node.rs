//! What our router routes to: a node with an HTTP endpoint of its own, as `mlx-node` starts one, and an engine without a
//! model.

use api::{ApiSettings, ApiState, Operate, Reloaded, ServeSettings};
use engine::{
    DrawnToken, EngineSettings, Model, ModelError, ModelLimits, Slice, StepOutput, grammar::TokenMask,
};
use mlx::checkpoint::Checkpoint;
use node::{
    DispatchSettings, ENGINE_SILENCE_MAX, EngineCommandLine, MODEL_LOAD_TIME_MAX, NodeSettings,
    engine_process::{self, LoadedModel},
};
use std::{
    collections::VecDeque, error::Error, fs, io, net::SocketAddr, path::Path, process::ExitCode, sync::Arc,
};
use tokio::net::TcpListener;
use transport::ClusterKey;
use types::{BLOCK_TOKENS, BoxFuture, ModelCard, NodeId, Role, TokenId};

/// As many as `mlx-node` has.
const WORKER_THREADS: usize = 1;
/// Tokens of prompt and output together.
const CONTEXT_TOKENS: u32 = 65_536;
/// More than are ever asked at once: who waits for a slot is not what is measured.
const SLOTS: usize = 256;
/// What is drawn: any token with text.
const DRAWN: TokenId = 1000;

pub(crate) fn run(http: SocketAddr, router: &str, key: &Path, model: &str) -> Result<(), Box<dyn Error>> {
    let key: ClusterKey = fs::read_to_string(key)?.trim().parse()?;
    let settings = NodeSettings {
        name: "node".to_owned(),
        cluster: "home".to_owned(),
        id: NodeId(1),
        roles: vec![Role::Node, Role::Router],
        hardware: "none".to_owned(),
        listen: ([127, 0, 0, 1], 0).into(),
        keys: key.into(),
        engine: Some(Arc::new(EngineCommandLine {
            program: std::env::current_exe()?,
            args: ["engine", model].map(Into::into).to_vec(),
            env: Vec::new(),
        })),
        dispatch: DispatchSettings::default(),
        wait_for_model: true,
        model_load_time_max: MODEL_LOAD_TIME_MAX,
        engine_silence_max: ENGINE_SILENCE_MAX,
        mdns: false,
        peers: vec![router.to_owned()],
        interfaces: Vec::new(),
        pipeline: None,
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(WORKER_THREADS).enable_all().build()?;
    runtime.block_on(async {
        let node = node::start(settings).await?;
        let app = api::app(ApiState {
            generate: Arc::new(node.clone()),
            embed: Arc::new(node.clone()),
            directory: Arc::new(node.clone()),
            sessions: Arc::new(node),
            operate: Arc::new(Nobody),
            settings: ApiSettings::default(),
        });
        api::serve(TcpListener::bind(http).await?, app, ServeSettings::default(), std::future::pending())
            .await?;
        Ok(())
    })
}

/// The engine's process.
pub(crate) fn engine(model: &Path) -> io::Result<ExitCode> {
    let stdout = engine_process::private_stdout()?;
    let load = |progress: &mut dyn FnMut(&str, f32)| {
        let checkpoint = Checkpoint::open(model, progress).map_err(|error| error.to_string())?;
        let card = ModelCard {
            name: "small".to_owned(),
            root: checkpoint.fingerprint,
            context_tokens: CONTEXT_TOKENS,
            vocab_size: checkpoint.config["vocab_size"].as_u64().unwrap_or_default() as u32,
            eos_tokens: checkpoint.eos_tokens,
            assets: checkpoint.assets.hash(),
            created_s: checkpoint.created_s,
            kind: types::ModelKind::Generator,
        };
        Ok(LoadedModel {
            model: Box::new(Instant { card, steps: VecDeque::new() }),
            assets: checkpoint.assets,
        })
    };
    Ok(engine_process::run(load, EngineSettings::default(), io::stdin(), stdout))
}

/// A model whose passes take no time.
#[derive(Debug)]
struct Instant {
    card: ModelCard,
    /// Rows that sample, of each pass in flight.
    steps: VecDeque<usize>,
}

impl Model for Instant {
    fn card(&self) -> &ModelCard {
        &self.card
    }

    fn limits(&self) -> ModelLimits {
        let blocks = 16 * CONTEXT_TOKENS as usize / BLOCK_TOKENS;
        ModelLimits { slots: SLOTS, blocks, kv_bytes_per_token: 1 }
    }

    fn submit(&mut self, slices: &[Slice<'_>]) -> Result<(), ModelError> {
        self.steps.push_back(slices.iter().filter(|slice| slice.sample.is_some()).count());
        Ok(())
    }

    fn draw(&mut self, _masks: &[TokenMask]) -> Result<(), ModelError> {
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, ModelError> {
        let drawn = DrawnToken { token: DRAWN, logprobs: None };
        Ok(StepOutput { drawn: vec![drawn; self.steps.pop_front().unwrap_or_default()], scores: Vec::new() })
    }
}

/// Nobody reloads or drains a program that is measured.
struct Nobody;

impl Operate for Nobody {
    fn reload(&self) -> BoxFuture<'_, Result<Reloaded, String>> {
        Box::pin(std::future::ready(Err("there are no settings here".to_owned())))
    }

    fn drain(&self) {}
}
