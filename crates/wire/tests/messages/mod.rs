//! Strategies for every message, one function per frame that travels.

mod pipeline;

use proptest::{collection::vec, option, prelude::*};
use types::{
    AffinityKey, AssetsHash, BlockHash, CacheEvent, CacheScope, ClientId, EmbedDraft, EmbedRequest,
    EngineState, Finish, FinishReason, GenerateDraft, GenerateError, GenerateRequest, Grammar, ModelAssets,
    ModelCard, NodeId, NodeLoad, NodeRates, OutputRules, Priority, RequestId, Role, SamplingDraft,
    SamplingParams, Service, SessionId, SessionInfo, SessionRequest, Speculation, TokenEvent, TokenLogprobs,
    TokenReport, Usage, limits,
};
use wire::{Control, EngineCommand, EngineReport, Hello, Reply, Request};

pub(crate) fn hello() -> impl Strategy<Value = Hello> {
    let role = prop_oneof![Just(Role::Node), Just(Role::Router)];
    let strings = (text(), text(), text(), text());
    (strings, any::<u128>(), vec(role, 0..3)).prop_map(|((program, name, cluster, hardware), id, roles)| {
        Hello { program, node: NodeId(id), name, cluster, roles, hardware }
    })
}

pub(crate) fn control() -> impl Strategy<Value = Control> {
    let state = prop_oneof![
        Just(EngineState::Loading),
        Just(EngineState::Ready),
        Just(EngineState::Draining),
        text().prop_map(EngineState::Restarting),
        text().prop_map(EngineState::Pipeline),
    ];
    prop_oneof![
        hello().prop_map(Control::Hello),
        hello().prop_map(Control::Welcome),
        (state, vec(card(), 0..4)).prop_map(|(state, models)| Control::State { state, models }),
        load().prop_map(Control::Load),
        Just(Control::Leaving),
        (any::<u64>(), any::<u64>(), blocks(), any::<bool>())
            .prop_map(|(epoch, seq, blocks, last)| Control::CacheSnapshot { epoch, seq, blocks, last }),
        (any::<u64>(), any::<u64>(), vec(cache_event(), 1..5))
            .prop_map(|(epoch, first_seq, events)| Control::CacheEvents { epoch, first_seq, events }),
        pipeline::report().prop_map(Control::Pipeline),
    ]
}

pub(crate) fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        generate_request().prop_map(|request| Request::Generate(request.into())),
        any::<[u8; 32]>().prop_map(|hash| Request::Assets(AssetsHash(hash))),
        session_request().prop_map(Request::Sessions),
        Just(Request::Resync),
        embed_request().prop_map(|request| Request::Embed(request.into())),
        pipeline::request(),
    ]
}

pub(crate) fn reply() -> impl Strategy<Value = Reply> {
    prop_oneof![
        Just(Reply::Accepted),
        error().prop_map(Reply::Rejected),
        (any::<u32>(), tokens(), logprobs()).prop_map(|(index, tokens, logprobs)| Reply::Tokens {
            index,
            tokens,
            logprobs
        }),
        (any::<u32>(), vec(option::of(token_logprobs()), 1..20))
            .prop_map(|(index, logprobs)| Reply::Prompt { index, logprobs }),
        finish().prop_map(Reply::Done),
        vectors().prop_map(Reply::Embedded),
        sessions().prop_map(Reply::Sessions),
        any::<u32>().prop_map(|cached_tokens| Reply::Started { cached_tokens }),
        Just(Reply::Resyncing),
        pipeline::reply(),
    ]
}

pub(crate) fn assets() -> impl Strategy<Value = Reply> {
    prop_oneof![model_assets().prop_map(Reply::Assets), error().prop_map(Reply::Rejected)]
}

pub(crate) fn engine_command() -> impl Strategy<Value = EngineCommand> {
    prop_oneof![
        generate_request().prop_map(|request| EngineCommand::Submit(request.into())),
        any::<u128>().prop_map(|id| EngineCommand::Cancel(RequestId(id))),
        Just(EngineCommand::Shutdown),
        embed_request().prop_map(|request| EngineCommand::Embed(request.into())),
        (any::<u64>(), session_request())
            .prop_map(|(call, request)| EngineCommand::Sessions { call, request }),
    ]
}

pub(crate) fn engine_report() -> impl Strategy<Value = EngineReport> {
    let id = || any::<u128>().prop_map(RequestId);
    let event = prop_oneof![
        (any::<u32>(), tokens(), logprobs()).prop_map(|(index, tokens, logprobs)| TokenEvent::Tokens {
            index,
            tokens,
            logprobs
        }),
        (any::<u32>(), vec(option::of(token_logprobs()), 1..20))
            .prop_map(|(index, logprobs)| TokenEvent::Prompt { index, logprobs }),
        finish().prop_map(TokenEvent::Finished),
        any::<u32>().prop_map(|cached_tokens| TokenEvent::Started { cached_tokens }),
    ];
    prop_oneof![
        (text(), 0f32..=1.0).prop_map(|(what, fraction)| EngineReport::Loading { what, fraction }),
        (card(), model_assets(), rates(), any::<u32>())
            .prop_map(|(card, assets, rates, slots)| EngineReport::Ready { card, assets, rates, slots }),
        (id(), error()).prop_map(|(id, error)| EngineReport::Rejected { id, error }),
        (id(), event).prop_map(|(id, event)| EngineReport::Event { id, event }),
        load().prop_map(EngineReport::Load),
        text().prop_map(|message| EngineReport::Failed { message }),
        (any::<u64>(), sessions()).prop_map(|(call, sessions)| EngineReport::Sessions { call, sessions }),
        vec(cache_event(), 1..5).prop_map(EngineReport::Cache),
        (id(), vectors()).prop_map(|(id, vectors)| EngineReport::Embedded { id, vectors }),
        pipeline::engine_report(),
    ]
}

/// A valid request but for what `prompt` makes of it.
pub(crate) fn draft(prompt: Vec<u32>) -> GenerateDraft {
    GenerateDraft {
        id: RequestId(0x0123_4567_89ab_cdef),
        model: "smollm2".to_owned(),
        prompt,
        sampling: SamplingParams::greedy(),
        max_tokens: 64,
        stop_tokens: vec![2],
        ignore_eos: false,
        service: Service::default(),
        cache: CacheScope::default(),
        output: Vec::new(),
        rules: OutputRules::default(),
        report: TokenReport::default(),
        speculation: Speculation::default(),
    }
}

fn blocks() -> impl Strategy<Value = Vec<BlockHash>> {
    vec(any::<u128>().prop_map(BlockHash), 1..6)
}

fn cache_event() -> impl Strategy<Value = CacheEvent> {
    prop_oneof![
        (any::<u128>(), blocks())
            .prop_map(|(parent, blocks)| CacheEvent::Stored { parent: BlockHash(parent), blocks }),
        blocks().prop_map(|blocks| CacheEvent::Removed { blocks }),
    ]
}

fn session_id() -> impl Strategy<Value = SessionId> {
    vec(b'!'..=b'~', 1..=limits::SESSION_ID_BYTES_MAX)
        .prop_map(|name| String::from_utf8(name).expect("ASCII").try_into().expect("a valid name"))
}

fn session_request() -> impl Strategy<Value = SessionRequest> {
    let client = || any::<u64>().prop_map(ClientId);
    prop_oneof![
        client().prop_map(|client| SessionRequest::List { client }),
        (client(), session_id()).prop_map(|(client, id)| SessionRequest::End { client, id }),
    ]
}

fn sessions() -> impl Strategy<Value = Vec<SessionInfo>> {
    let info = (any::<u64>(), session_id(), any::<u32>(), 0f32..1e6, 0f32..1e6);
    let info = info.prop_map(|(client, id, tokens, idle_s, expires_in_s)| SessionInfo {
        client: ClientId(client),
        id,
        tokens,
        idle_s,
        expires_in_s,
    });
    vec(info, 0..4)
}

fn service() -> impl Strategy<Value = Service> {
    let priority = prop_oneof![Just(Priority::Low), Just(Priority::Normal), Just(Priority::High)];
    let target = || option::of(1..=limits::TARGET_MS_MAX);
    let affinity = option::of(any::<u64>().prop_map(AffinityKey));
    (any::<u64>(), priority, target(), target(), affinity).prop_map(
        |(client, priority, ttft_target_ms, tpot_target_ms, affinity)| Service {
            client: ClientId(client),
            priority,
            ttft_target_ms,
            tpot_target_ms,
            affinity,
        },
    )
}

fn cache_scope() -> impl Strategy<Value = CacheScope> {
    (option::of(text()), option::of(session_id())).prop_map(|(salt, session)| CacheScope { salt, session })
}

fn text() -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..20).prop_map(String::from_iter)
}

fn tokens() -> impl Strategy<Value = Vec<u32>> {
    vec(any::<u32>(), 1..40)
}

fn token_logprobs() -> impl Strategy<Value = TokenLogprobs> {
    (-50f32..=0.0, vec((any::<u32>(), -50f32..=0.0), 0..=20))
        .prop_map(|(logprob, top)| TokenLogprobs { logprob, top })
}

fn logprobs() -> impl Strategy<Value = Vec<TokenLogprobs>> {
    vec(token_logprobs(), 0..20)
}

fn rules() -> impl Strategy<Value = (Option<Grammar>, u32)> {
    let grammar = prop_oneof![
        text().prop_map(Grammar::JsonSchema),
        text().prop_map(Grammar::Regex),
        text().prop_map(Grammar::Lark)
    ];
    (option::of(grammar), any::<u32>())
}

fn report() -> impl Strategy<Value = TokenReport> {
    let count = || option::of(0..=limits::LOGPROBS_MAX);
    (count(), count()).prop_map(|(logprobs, prompt_logprobs)| TokenReport { logprobs, prompt_logprobs })
}

fn speculation() -> impl Strategy<Value = Speculation> {
    (any::<bool>(), vec(any::<u32>(), 0..8))
        .prop_map(|(enabled, prediction)| Speculation { enabled, prediction })
}

fn generate_request() -> impl Strategy<Value = GenerateRequest> {
    let sampling = (0f32..=2.0, 0.01f32..=1.0, any::<u32>(), 0f32..=1.0, any::<u64>());
    let bias = vec((any::<u32>(), -100f32..=100.0), 0..5);
    (
        any::<u128>(),
        text(),
        tokens(),
        (sampling, bias),
        1u32..=1 << 20,
        vec(any::<u32>(), 0..8),
        any::<bool>(),
        (service(), cache_scope(), vec(any::<u32>(), 0..8), rules(), report(), speculation()),
    )
        .prop_map(
            |(id, model, prompt, (sampling, logit_bias), max_tokens, stop_tokens, ignore_eos, how)| {
                let (temperature, top_p, top_k, min_p, seed) = sampling;
                let sampling = SamplingDraft {
                    temperature,
                    top_p,
                    top_k,
                    min_p,
                    seed,
                    logit_bias,
                    repetition_penalty: 1.1,
                    presence_penalty: -0.5,
                    frequency_penalty: 0.25,
                };
                let sampling = sampling.try_into().expect("in range");
                let id = RequestId(id);
                let (service, cache, mut output, (grammar, min_tokens), report, speculation) = how;
                let rules = OutputRules { grammar, min_tokens: min_tokens % (max_tokens + 1) };
                output.truncate(max_tokens as usize - 1);
                let draft = GenerateDraft {
                    id,
                    model,
                    prompt,
                    sampling,
                    max_tokens,
                    stop_tokens,
                    ignore_eos,
                    service,
                    cache,
                    output,
                    rules,
                    report,
                    speculation,
                };
                draft.try_into().expect("valid")
            },
        )
}

fn error() -> impl Strategy<Value = GenerateError> {
    prop_oneof![
        (text(), option::of(text())).prop_map(|(message, param)| GenerateError::Invalid { message, param }),
        (text(), vec(text(), 0..4)).prop_map(|(model, served)| GenerateError::UnknownModel { model, served }),
        any::<(u32, u32, u32)>().prop_map(|(prompt_tokens, max_tokens, context_tokens)| {
            GenerateError::ContextExceeded { prompt_tokens, max_tokens, context_tokens }
        }),
        any::<u64>().prop_map(|retry_after_ms| GenerateError::Busy { retry_after_ms }),
        (text(), text()).prop_map(|(model, reason)| GenerateError::Unavailable { model, reason }),
        (any::<u32>(), text()).prop_map(|(tokens, reason)| GenerateError::NodeLost { tokens, reason }),
        text().prop_map(|message| GenerateError::Engine { message }),
    ]
}

fn finish() -> impl Strategy<Value = Finish> {
    let reason = prop_oneof![
        Just(FinishReason::Stop),
        Just(FinishReason::Length),
        Just(FinishReason::Cancelled),
        error().prop_map(FinishReason::Failed),
    ];
    (reason, any::<[u32; 5]>()).prop_map(|(reason, counts)| {
        let [prompt_tokens, cached_tokens, completion_tokens, accepted_drafts, rejected_drafts] = counts;
        let usage =
            Usage { prompt_tokens, cached_tokens, completion_tokens, accepted_drafts, rejected_drafts };
        Finish { reason, usage }
    })
}

fn kind() -> impl Strategy<Value = types::ModelKind> {
    let embedder = any::<u32>().prop_map(|dimensions| types::ModelKind::Embedder { dimensions });
    prop_oneof![Just(types::ModelKind::Generator), embedder]
}

fn embed_request() -> impl Strategy<Value = EmbedRequest> {
    (any::<u128>(), text(), vec(vec(any::<u32>(), 1..9), 1..5)).prop_map(|(id, model, inputs)| {
        let draft = EmbedDraft { id: RequestId(id), model, inputs, service: Service::default() };
        draft.try_into().expect("valid")
    })
}

fn vectors() -> impl Strategy<Value = Vec<Vec<f32>>> {
    vec(vec(-1.0f32..1.0, 1..9), 1..5)
}

fn card() -> impl Strategy<Value = ModelCard> {
    (text(), any::<u128>(), any::<(u32, u32, u64)>(), vec(any::<u32>(), 0..4), any::<[u8; 32]>(), kind())
        .prop_map(|(name, root, (context_tokens, vocab_size, created_s), eos_tokens, assets, kind)| {
            ModelCard {
                name,
                root: BlockHash(root),
                context_tokens,
                vocab_size,
                eos_tokens,
                assets: AssetsHash(assets),
                created_s,
                kind,
            }
        })
}

fn model_assets() -> impl Strategy<Value = ModelAssets> {
    (text(), option::of(text()), option::of(text()), option::of(text())).prop_map(
        |(tokenizer_json, chat_template, bos_token, eos_token)| ModelAssets {
            tokenizer_json,
            chat_template,
            bos_token,
            eos_token,
        },
    )
}

fn rates() -> impl Strategy<Value = NodeRates> {
    (0f32..1e6, 0f32..10.0, 0f32..1.0).prop_map(|(prefill_tokens_per_s, decode_step_s, decode_row_s)| {
        NodeRates { prefill_tokens_per_s, decode_step_s, decode_row_s }
    })
}

fn load() -> impl Strategy<Value = NodeLoad> {
    let tokens = || any::<(u64, u64)>();
    let requests = any::<(u32, u32, u32)>();
    let decode_step_s = prop::array::uniform8(0f32..10.0);
    (requests, tokens(), tokens(), tokens(), (0f32..1e6, 0f32..1e6), decode_step_s, rates()).prop_map(
        |(requests, backlog, kv_tokens, cache_and_budget, seconds, decode_step_s, rates)| NodeLoad {
            running: requests.0,
            waiting: requests.1,
            slots: requests.2,
            prefill_backlog_tokens: backlog.0,
            decode_backlog_tokens: backlog.1,
            kv_tokens,
            cached_kv_tokens: cache_and_budget.0,
            prefill_backlog_s: seconds.0,
            prefill_budget_tokens: cache_and_budget.1,
            decode_step_s,
            cache_tail_age_s: seconds.1,
            cache_reuse_s: seconds.1,
            passes: backlog.1,
            step_s: seconds.0,
            drafts: Default::default(),
            rates,
        },
    )
}
