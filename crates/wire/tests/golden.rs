//! The bytes of one message of each kind. When one of these changes, peers of the old and the new program would
//! misread each other: bump `wire::VERSION`, then store the new bytes (the failure prints them).

use bytes::BytesMut;
use serde::Serialize;
use types::{
    AffinityKey, AssetsHash, BlockHash, CacheEvent, CacheScope, ClientId, DraftCount, EmbedDraft,
    EmbedRequest, EngineState, EpochId, Finish, FinishReason, GenerateDraft, GenerateError, GenerateRequest,
    Grammar, LinkProfile, MeasureQuery, MemberProfile, ModelAssets, ModelCard, NodeId, NodeLoad, NodeRates,
    OutputRules, PipelinePhase, PipelinePlan, PipelineReport, PlannedStage, Priority, RequestId, Role,
    SamplingDraft, Service, SessionId, SessionInfo, SessionRequest, Speculation, StageNews, StageOrder,
    StageProfile, TokenEvent, TokenLogprobs, TokenReport, TunnelOrder, Usage,
};
use wire::{Control, EngineCommand, EngineReport, FrameClass, Hello, Reply, Request, encode};

/// Bytes of all messages below, in order.
const GOLDEN: &str = include_str!("golden.txt");

fn hello() -> Hello {
    Hello {
        program: "0.1.0".to_owned(),
        node: NodeId(0x1234),
        name: "studio".to_owned(),
        cluster: "home".to_owned(),
        roles: vec![Role::Node, Role::Router],
        hardware: "Apple M4 Max, 64 GiB".to_owned(),
    }
}

fn card() -> ModelCard {
    ModelCard {
        name: "smollm2".to_owned(),
        root: BlockHash(0x77),
        context_tokens: 8192,
        vocab_size: 49152,
        eos_tokens: vec![2],
        assets: AssetsHash([0xab; 32]),
        created_s: 1_700_000_000,
        kind: types::ModelKind::Generator,
    }
}

fn session() -> SessionId {
    "chat-42".to_owned().try_into().expect("a valid name")
}

fn session_requests() -> [SessionRequest; 2] {
    let client = ClientId(0xc11e);
    [SessionRequest::List { client }, SessionRequest::End { client, id: session() }]
}

fn sessions() -> Vec<SessionInfo> {
    let info = SessionInfo {
        client: ClientId(0xc11e),
        id: session(),
        tokens: 320,
        idle_s: 1.5,
        expires_in_s: 1800.0,
    };
    vec![info]
}

/// A request with every field set, or with as few as there may be.
fn request(full: bool) -> GenerateRequest {
    let sampling = SamplingDraft {
        temperature: 0.5,
        top_p: 0.75,
        top_k: 40,
        min_p: 0.125,
        repetition_penalty: 1.5,
        presence_penalty: -1.0,
        frequency_penalty: 0.25,
        logit_bias: vec![(7, -100.0)],
        seed: 99,
    };
    let draft = GenerateDraft {
        id: RequestId(0xfeed),
        model: "smollm2".to_owned(),
        prompt: vec![1, 300, 70_000],
        sampling: sampling.try_into().expect("in range"),
        max_tokens: 64,
        stop_tokens: vec![2],
        ignore_eos: false,
        service: Service {
            client: ClientId(0xc11e),
            priority: Priority::High,
            ttft_target_ms: Some(500),
            tpot_target_ms: Some(50),
            affinity: Some(AffinityKey(0xaff)),
        },
        cache: CacheScope { salt: Some("salt".to_owned()), session: Some(session()) },
        output: vec![5, 70_001],
        rules: OutputRules { grammar: Some(Grammar::JsonSchema("{}".to_owned())), min_tokens: 3 },
        report: TokenReport { logprobs: Some(20), prompt_logprobs: Some(0) },
        speculation: Speculation { enabled: false, prediction: vec![8, 70_002] },
    };
    let draft = if full {
        draft
    } else {
        let (service, cache, rules, report, speculation) = Default::default();
        GenerateDraft { service, cache, output: Vec::new(), rules, report, speculation, ..draft }
    };
    draft.try_into().expect("valid")
}

fn embed_request() -> EmbedRequest {
    let draft = EmbedDraft {
        id: RequestId(0xfeed),
        model: "bge".to_owned(),
        inputs: vec![vec![101, 70_000, 102], vec![1]],
        service: Service { client: ClientId(0xc11e), ..Service::default() },
    };
    draft.try_into().expect("valid")
}

fn logprobs() -> TokenLogprobs {
    TokenLogprobs { logprob: -0.5, top: vec![(1, -0.5), (70_001, -2.0)] }
}

fn finish(reason: FinishReason) -> Finish {
    let usage = Usage {
        prompt_tokens: 3,
        cached_tokens: 2,
        completion_tokens: 1,
        accepted_drafts: 4,
        rejected_drafts: 5,
    };
    Finish { reason, usage }
}

fn assets() -> ModelAssets {
    ModelAssets {
        tokenizer_json: "{}".to_owned(),
        chat_template: Some("{{ messages }}".to_owned()),
        bos_token: None,
        eos_token: Some("</s>".to_owned()),
    }
}

fn load() -> NodeLoad {
    let rates = NodeRates { prefill_tokens_per_s: 1000.0, decode_step_s: 0.5, decode_row_s: 0.25 };
    NodeLoad {
        running: 1,
        waiting: 2,
        slots: 3,
        prefill_backlog_tokens: 400,
        decode_backlog_tokens: 500,
        kv_tokens: (600, 7000),
        cached_kv_tokens: 800,
        prefill_backlog_s: 0.5,
        prefill_budget_tokens: 900,
        decode_step_s: [0.5, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75, 1.0],
        cache_tail_age_s: 32.0,
        cache_reuse_s: 8.0,
        passes: 300,
        step_s: 0.25,
        drafts: std::array::from_fn(|at| DraftCount { accepted: at as u64, rejected: 7 }),
        rates,
    }
}

fn blocks() -> Vec<BlockHash> {
    vec![BlockHash(1), BlockHash(u128::MAX)]
}

fn cache_events() -> Vec<CacheEvent> {
    vec![
        CacheEvent::Removed { blocks: vec![BlockHash(9)] },
        CacheEvent::Stored { parent: BlockHash(0x77), blocks: blocks() },
    ]
}

const EPOCH: EpochId = EpochId { head: NodeId(0x1234), number: 300 };

fn profile() -> StageProfile {
    StageProfile {
        memory_bytes: 1 << 34,
        weights: BlockHash(0x77),
        layer_s: vec![(1, 0.5), (8, 0.75)],
        head_s: vec![(1, 0.25)],
        layer_bytes: vec![1000, 70_000],
        embedding_bytes: 400,
        head_bytes: 500,
        hidden_bytes: 1152,
        kv_bytes_per_token: 768,
    }
}

fn pipeline_requests() -> [Request; 4] {
    let order = StageOrder {
        epoch: EPOCH,
        model: "smollm2".to_owned(),
        weights: BlockHash(0x77),
        rank: 1,
        members: vec![NodeId(0x1234), NodeId(0x5678)],
        layers: vec![(0, 20), (20, 30)],
        kv_tokens: 4096,
        direct_ports: vec![7000, 7001],
    };
    [
        Request::Measure(MeasureQuery { model: "smollm2".to_owned(), members: vec![NodeId(0x5678)] }),
        Request::Stage(order),
        Request::Tunnel(TunnelOrder { epoch: EPOCH, rank: 1 }),
        Request::Probe { bytes: 70_000 },
    ]
}

fn pipeline_replies() -> [Reply; 8] {
    let link = LinkProfile { to: NodeId(0x5678), latency_s: 0.5, bytes_per_s: 1e9 };
    [
        Reply::Measured(MemberProfile { stage: profile(), links: vec![link], direct_port: Some(7000) }),
        Reply::Stage(StageNews::Started),
        Reply::Stage(StageNews::Joined),
        Reply::Stage(StageNews::Ready),
        Reply::Stage(StageNews::Beat { passes: 300 }),
        Reply::Stage(StageNews::Failed { message: "killed".to_owned() }),
        Reply::Tunnel,
        Reply::Probed,
    ]
}

fn pipeline_report(phase: PipelinePhase, full: bool) -> PipelineReport {
    let stage = PlannedStage {
        node: NodeId(0x1234),
        name: "studio".to_owned(),
        layers: (0, 20),
        weight_bytes: 1 << 33,
        kv_bytes: 300,
        memory_bytes: 1 << 34,
        stage_s: 0.5,
        link_s: 0.25,
    };
    let plan = PipelinePlan {
        stages: vec![stage],
        kv_tokens: 4096,
        rows: 8,
        micro_batches: 2,
        micro_rows: 4,
        cycle_s: 1.5,
        tokens_per_s: 5.0,
        bubble: 0.125,
    };
    PipelineReport {
        model: "smollm2".to_owned(),
        head: full.then_some(NodeId(0x1234)),
        epoch: 3,
        phase,
        detail: "as planned".to_owned(),
        plan: full.then_some(plan),
    }
}

fn errors() -> [GenerateError; 7] {
    let text = |text: &str| text.to_owned();
    [
        GenerateError::Invalid { message: text("bad"), param: Some(text("top_p")) },
        GenerateError::UnknownModel { model: text("a"), served: vec![text("b")] },
        GenerateError::ContextExceeded { prompt_tokens: 1, max_tokens: 2, context_tokens: 3 },
        GenerateError::Busy { retry_after_ms: 1500 },
        GenerateError::Unavailable { model: text("a"), reason: text("none") },
        GenerateError::NodeLost { tokens: 9, reason: text("gone") },
        GenerateError::Engine { message: text("abort") },
    ]
}

fn line(name: &str, class: FrameClass, message: &impl Serialize) -> String {
    let mut buffer = BytesMut::new();
    encode(class, message, &mut buffer).expect("fits");
    let bytes: String = buffer.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{name} {bytes}\n")
}

#[test]
fn bytes_are_those_of_this_version_or_the_version_must_be_bumped() {
    let mut all = format!("version {}\n", wire::VERSION);
    let preface: String = wire::preface::preface().iter().map(|byte| format!("{byte:02x}")).collect();
    all += &format!("preface {preface}\n");
    let mut add =
        |name: &str, class, message: &dyn Fn(&str, FrameClass) -> String| all += &message(name, class);
    macro_rules! add {
        ($class:ident: $($message:expr),* $(,)?) => {
            $(add(stringify!($message).split(['(', '{']).next().expect("not empty").trim(), FrameClass::$class,
                &|name, class| line(name, class, &$message));)*
        };
    }
    let state = |state| Control::State { state, models: vec![card()] };
    add!(Hello: Control::Hello(hello()), Control::Welcome(hello()));
    add!(Control: state(EngineState::Loading), state(EngineState::Ready), state(EngineState::Draining),
        state(EngineState::Restarting("killed".to_owned())), state(EngineState::Pipeline("a part".to_owned())),
        Control::Load(load()), Control::Leaving,
        Control::Pipeline(pipeline_report(PipelinePhase::Waiting, false)),
        Control::Pipeline(pipeline_report(PipelinePhase::Planning, false)),
        Control::Pipeline(pipeline_report(PipelinePhase::Starting, false)),
        Control::Pipeline(pipeline_report(PipelinePhase::Running, true)),
        Control::Pipeline(pipeline_report(PipelinePhase::Refused, false)),
        Control::CacheSnapshot { epoch: 3, seq: 300, blocks: blocks(), last: true },
        Control::CacheEvents { epoch: 3, first_seq: 300, events: cache_events() });
    add!(Request: Request::Generate(request(true).into()), Request::Generate(request(false).into()),
        Request::Assets(AssetsHash([0xab; 32])), Request::Resync, Request::Embed(embed_request().into()));
    for request in pipeline_requests() {
        add!(Request: request);
    }
    for reply in pipeline_replies() {
        add!(Reply: reply);
    }
    for request in session_requests() {
        add!(Request: Request::Sessions(request.clone()));
        add!(Engine: EngineCommand::Sessions { call: 7, request: request.clone() });
    }
    add!(Reply: Reply::Accepted, Reply::Started { cached_tokens: 300 }, Reply::Resyncing, Reply::Tokens { index: 5, tokens: vec![1, 2, 3], logprobs: vec![] },
        Reply::Tokens { index: 5, tokens: vec![1], logprobs: vec![logprobs()] }, Reply::Prompt { index: 300, logprobs: vec![None, Some(logprobs())] },
        Reply::Done(finish(FinishReason::Stop)), Reply::Done(finish(FinishReason::Length)),
        Reply::Done(finish(FinishReason::Cancelled)));
    for error in errors() {
        add!(Reply: Reply::Rejected(error.clone()), Reply::Done(finish(FinishReason::Failed(error.clone()))));
    }
    add!(Reply: Reply::Sessions(sessions()));
    add!(Assets: Reply::Assets(assets()));
    let vectors = || vec![vec![0.5, -0.5], vec![1.0, 0.0]];
    add!(Embedded: Reply::Embedded(vectors()));
    let card_of =
        |kind| Control::State { state: EngineState::Ready, models: vec![ModelCard { kind, ..card() }] };
    add!(Control: card_of(types::ModelKind::Embedder { dimensions: 384 }));
    add!(Engine: EngineCommand::Submit(request(true).into()), EngineCommand::Cancel(RequestId(0xfeed)), EngineCommand::Shutdown,
        EngineCommand::Embed(embed_request().into()), EngineReport::Embedded { id: RequestId(0xfeed), vectors: vectors() });
    let event = |event| EngineReport::Event { id: RequestId(0xfeed), event };
    add!(Engine: EngineReport::Loading { what: "weights".to_owned(), fraction: 0.5 },
        EngineReport::Ready { card: card(), assets: assets(), rates: load().rates, slots: 8 },
        EngineReport::Rejected { id: RequestId(1), error: GenerateError::Busy { retry_after_ms: 1 } },
        event(TokenEvent::Started { cached_tokens: 300 }),
        event(TokenEvent::Tokens { index: 5, tokens: vec![1, 2, 3], logprobs: vec![] }),
        event(TokenEvent::Tokens { index: 5, tokens: vec![1], logprobs: vec![logprobs()] }),
        event(TokenEvent::Prompt { index: 300, logprobs: vec![None, Some(logprobs())] }),
        event(TokenEvent::Finished(finish(FinishReason::Stop))),
        EngineReport::Load(load()), EngineReport::Failed { message: "abort".to_owned() },
        EngineReport::Sessions { call: 7, sessions: sessions() }, EngineReport::Cache(cache_events()),
        EngineReport::Joined, EngineReport::StageReady, EngineReport::Beat { passes: 300 },
        EngineReport::Profile(profile()));
    assert!(
        all == GOLDEN,
        "the wire format changed: bump wire::VERSION and store this as golden.txt (if VERSION is already bumped, \
         only store it)\n{all}"
    );
}
