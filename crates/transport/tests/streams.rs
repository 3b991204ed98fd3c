//! Requests between two endpoints on loopback: answers, cancellation, loss, back-pressure, limits.

mod pair;
mod pipeline;

use futures_util::StreamExt;
use pair::{Pair, hello, loopback, next_generate, pair, request, within};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use transport::{ClusterKey, Endpoint, IncomingRequest, JoinError, ReplyError, ReplySender, limits};
use types::{
    AssetsHash, ClientId, EmbedDraft, EmbedRequest, EngineState, Finish, FinishReason, GenerateError,
    ModelAssets, NodeLoad, NodeRates, RequestId, Service, SessionInfo, SessionRequest, TokenEvent,
    TokenLogprobs, TokenStream, Usage,
};
use wire::{Control, Reply};

const USAGE: Usage = Usage {
    prompt_tokens: 3,
    cached_tokens: 0,
    completion_tokens: 4,
    accepted_drafts: 0,
    rejected_drafts: 0,
};

fn done() -> Finish {
    Finish { reason: FinishReason::Stop, usage: USAGE }
}

fn tokens(index: u32, tokens: &[u32]) -> Reply {
    Reply::Tokens { index, tokens: tokens.to_vec(), logprobs: Vec::new() }
}

/// Has the node answer with `replies`, and gives both ends of the stream.
async fn answered(pair: &Pair, replies: Vec<Reply>) -> (Result<TokenStream, GenerateError>, ReplySender) {
    let serve = async {
        let (_, mut sender) = next_generate(&pair.link).await;
        for reply in replies {
            sender.send(reply).await.expect("read");
        }
        sender
    };
    within(async { tokio::join!(pair.peer.generate(request(7)), serve) }).await
}

/// Why a stream failed, and after how many tokens.
async fn lost(stream: TokenStream) -> (u32, String) {
    let events: Vec<_> = within(stream.collect()).await;
    let finished = events.iter().filter(|event| matches!(event, TokenEvent::Finished(_))).count();
    assert_eq!(finished, 1, "exactly one end: {events:?}");
    match events.into_iter().last() {
        Some(TokenEvent::Finished(Finish {
            reason: FinishReason::Failed(GenerateError::NodeLost { tokens, reason }),
            ..
        })) => (tokens, reason),
        other => panic!("expected a lost node, got {other:?}"),
    }
}

#[tokio::test]
async fn a_request_comes_back_as_its_events() {
    let pair = pair().await;
    let started = Reply::Started { cached_tokens: 3 };
    let told = TokenLogprobs { logprob: -0.5, top: vec![(7, -0.25)] };
    let prompt = |index: u32, told: Option<TokenLogprobs>| (index, vec![told.clone(), told]);
    let reply = |(index, logprobs)| Reply::Prompt { index, logprobs };
    let replies = vec![
        Reply::Accepted,
        Reply::Prompt { index: 0, logprobs: vec![None] },
        reply(prompt(1, Some(told.clone()))),
        started,
        tokens(0, &[5]),
        tokens(1, &[6, 7]),
        tokens(3, &[8]),
        Reply::Done(done()),
    ];
    let stream = answered(&pair, replies).await.0.expect("accepted");
    let events: Vec<_> = within(stream.collect()).await;
    let token_event =
        |index, tokens: &[u32]| TokenEvent::Tokens { index, tokens: tokens.to_vec(), logprobs: Vec::new() };
    let event = |(index, logprobs)| TokenEvent::Prompt { index, logprobs };
    let expected = [
        TokenEvent::Prompt { index: 0, logprobs: vec![None] },
        event(prompt(1, Some(told))),
        TokenEvent::Started { cached_tokens: 3 },
        token_event(0, &[5]),
        token_event(1, &[6, 7]),
        token_event(3, &[8]),
        TokenEvent::Finished(done()),
    ];
    assert_eq!(events, expected);
    assert_eq!(pair.peer.hello().name, "node");
    assert_eq!(pair.link.router().name, "router");
    assert_eq!(pair.peer.remote_address(), pair.node.local_address());
    assert!(pair.peer.rtt() < Duration::from_secs(1));
}

#[tokio::test]
async fn a_refusal_comes_back_as_it_was_sent() {
    let pair = pair().await;
    let busy = GenerateError::Busy { retry_after_ms: 1500 };
    let (refused, _) = answered(&pair, vec![Reply::Rejected(busy.clone())]).await;
    assert_eq!(refused.err(), Some(busy));
}

#[tokio::test]
async fn replies_after_the_last_are_refused() {
    let pair = pair().await;
    let serve = async {
        let (_, mut sender) = next_generate(&pair.link).await;
        sender.send(Reply::Accepted).await.expect("read");
        sender.send(Reply::Done(done())).await.expect("read");
        assert_eq!(sender.send(tokens(0, &[1])).await, Err(ReplyError::Finished));
    };
    let (stream, ()) = within(async { tokio::join!(pair.peer.generate(request(7)), serve) }).await;
    let events: Vec<_> = within(stream.expect("accepted").collect()).await;
    assert_eq!(events, [TokenEvent::Finished(done())]);
}

#[tokio::test]
async fn a_broken_promise_is_a_lost_node() {
    let pair = pair().await;
    let check = async |replies: Vec<Reply>, tokens: u32, reason: &str| {
        let replies = [vec![Reply::Accepted], replies].concat();
        let (stream, _sender) = answered(&pair, replies).await;
        assert_eq!(lost(stream.expect("accepted")).await, (tokens, reason.to_owned()));
    };
    check(
        vec![tokens(0, &[1]), tokens(2, &[2])],
        1,
        "the node sent 1 tokens from index 2 where index 1 was due",
    )
    .await;
    check(
        vec![tokens(0, &[1, 2]), tokens(1, &[2])],
        2,
        "the node sent 1 tokens from index 1 where index 2 was due",
    )
    .await;
    check(vec![tokens(0, &[])], 0, "the node sent 0 tokens from index 0 where index 0 was due").await;
    let prompt = |index: u32, count: usize| Reply::Prompt { index, logprobs: vec![None; count] };
    check(
        vec![prompt(0, 1), prompt(2, 1)],
        0,
        "the node told of 1 tokens of the prompt from index 2 where index 1 was due",
    )
    .await;
    check(
        vec![prompt(0, 4)],
        0,
        "the node told of 4 tokens of the prompt from index 0 where index 0 was due",
    )
    .await;
    check(vec![tokens(0, &[1]), prompt(0, 1)], 1, "the node sent `Prompt` out of turn").await;
    let half = Reply::Tokens {
        index: 0,
        tokens: vec![1, 2],
        logprobs: vec![TokenLogprobs { logprob: -1.0, top: Vec::new() }],
    };
    check(vec![half], 0, "the node sent 1 log-probabilities of 2 tokens").await;
    check(vec![tokens(0, &[1]), Reply::Accepted], 1, "the node sent `Accepted` out of turn").await;
    let (stream, sender) = answered(&pair, vec![Reply::Accepted]).await;
    drop(sender);
    assert_eq!(lost(stream.expect("accepted")).await, (0, "given up by the other end".to_owned()));
}

#[tokio::test]
async fn dropping_the_stream_reaches_the_node_within_100_ms() {
    let pair = pair().await;
    let serve = async {
        let (_, mut sender) = next_generate(&pair.link).await;
        sender.send(Reply::Accepted).await.expect("read");
        sender.send(tokens(0, &[1])).await.expect("read");
        sender
    };
    let (stream, mut sender) = within(async { tokio::join!(pair.peer.generate(request(7)), serve) }).await;
    let mut stream = stream.expect("accepted");
    assert!(matches!(within(stream.next()).await, Some(TokenEvent::Tokens { index: 0, .. })));
    let cancelled = sender.cancelled();
    tokio::pin!(cancelled);
    let early = tokio::time::timeout(Duration::from_millis(50), &mut cancelled).await;
    assert!(early.is_err(), "nobody has cancelled yet");
    let start = Instant::now();
    drop(stream);
    within(cancelled).await;
    assert!(start.elapsed() < Duration::from_millis(100), "{:?}", start.elapsed());
    let error = sender.send(tokens(1, &[2])).await.expect_err("cancelled");
    assert_eq!(error, ReplyError::Cancelled { reason: "cancelled by the other end".to_owned() });
}

#[tokio::test]
async fn dropping_the_call_before_an_answer_cancels_too() {
    let pair = pair().await;
    let call = tokio::spawn({
        let peer = pair.peer.clone();
        async move { peer.generate(request(7)).await.map(drop) }
    });
    let (_, sender) = next_generate(&pair.link).await;
    let start = Instant::now();
    call.abort();
    within(sender.cancelled()).await;
    assert!(start.elapsed() < Duration::from_millis(100), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_node_that_goes_in_mid_stream_is_a_lost_node_with_its_reason() {
    let pair = pair().await;
    let serve = async {
        let (_, mut sender) = next_generate(&pair.link).await;
        sender.send(Reply::Accepted).await.expect("read");
        sender.send(tokens(0, &[1, 2, 3])).await.expect("read");
        sender
    };
    let (stream, _sender) = within(async { tokio::join!(pair.peer.generate(request(7)), serve) }).await;
    let mut stream = stream.expect("accepted");
    assert!(within(stream.next()).await.is_some());
    let start = Instant::now();
    within(pair.node.close("the node stops")).await;
    assert!(start.elapsed() < limits::CLOSE_TIME_MAX + Duration::from_millis(200));
    assert_eq!(lost(stream).await, (3, "the node stops".to_owned()));
    assert_eq!(within(pair.peer.closed()).await, "the node stops");
    let error = within(pair.peer.generate(request(8))).await.map(drop).expect_err("gone");
    assert!(error.is_retryable(), "{error}");
    let text = "the node serving this request was lost after 0 tokens: node \"node\": the node stops";
    assert_eq!(error.to_string(), text);
}

/// Killed, or its cable pulled: nothing more comes from it, not even a goodbye.
#[test]
fn a_node_that_falls_silent_is_lost_after_two_seconds() {
    let key = ClusterKey::generate().expect("random numbers");
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (ours, theirs) = (runtime(), runtime());
    let router = ours.block_on(async { Endpoint::bind(loopback(), &key).expect("binds") });
    let address = router.local_address();
    let (served, silence) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
    let thread = std::thread::spawn(move || {
        let held = theirs.block_on(async {
            let node = Endpoint::bind(loopback(), &key).expect("binds");
            let link = node.join(address, hello(2, "node")).await.expect("joined");
            let (_, mut sender) = next_generate(&link).await;
            sender.send(Reply::Accepted).await.expect("read");
            sender.send(tokens(0, &[1])).await.expect("read");
            tokio::time::sleep(Duration::from_millis(100)).await;
            (node, link, sender)
        });
        // Its runtime is not run any more: everything is there, and nothing answers.
        served.0.send(()).expect("awaited");
        silence.1.recv().expect_err("the test is over");
        drop((held, theirs));
    });
    ours.block_on(within(async {
        let (peer, mut reports) = router.accept(&hello(1, "router")).await.expect("open");
        let mut stream = peer.generate(request(7)).await.expect("accepted");
        assert!(stream.next().await.is_some());
        let start = Instant::now();
        assert_eq!(lost(stream).await, (1, "no sign of life for 2 s".to_owned()));
        let silent = start.elapsed();
        assert!((Duration::from_millis(1000)..Duration::from_millis(3500)).contains(&silent), "{silent:?}");
        assert_eq!(reports.next().await, None);
    }));
    served.1.recv().expect("served");
    drop(silence.0);
    thread.join().expect("no panic");
}

#[tokio::test]
async fn sixty_four_streams_at_once_keep_their_tokens_apart() {
    const STREAMS: u128 = 64;
    const TOKENS: u32 = 200;
    let pair = pair().await;
    let link = pair.link.clone();
    let server = tokio::spawn(async move {
        let mut served = tokio::task::JoinSet::new();
        for _ in 0..STREAMS {
            let (request, mut sender) = next_generate(&link).await;
            served.spawn(async move {
                sender.send(Reply::Accepted).await.expect("read");
                for index in 0..TOKENS {
                    sender.send(tokens(index, &[request.id.0 as u32 * 1000 + index])).await.expect("read");
                }
                sender.send(Reply::Done(done())).await.expect("read");
            });
        }
        served.join_all().await;
    });
    let clients = (0..STREAMS).map(|id| {
        let peer = pair.peer.clone();
        tokio::spawn(async move {
            let stream = peer.generate(request(id)).await.expect("accepted");
            let events: Vec<_> = stream.collect().await;
            let expected = (0..TOKENS)
                .map(|index| TokenEvent::Tokens {
                    index,
                    tokens: vec![id as u32 * 1000 + index],
                    logprobs: Vec::new(),
                })
                .chain([TokenEvent::Finished(done())]);
            assert_eq!(events, expected.collect::<Vec<_>>());
        })
    });
    for client in clients.collect::<Vec<_>>() {
        within(client).await.expect("no panic");
    }
    within(server).await.expect("no panic");
}

#[tokio::test]
async fn a_slow_reader_holds_up_its_own_stream_only() {
    let pair = pair().await;
    let serve = async {
        let (_, mut sender) = next_generate(&pair.link).await;
        sender.send(Reply::Accepted).await.expect("read");
        sender
    };
    let (slow, mut sender) = within(async { tokio::join!(pair.peer.generate(request(1)), serve) }).await;
    let mut slow = slow.expect("accepted");
    // Nobody reads `slow`: its sender must come to wait, after a bounded number of bytes.
    let step = [u32::MAX; 200];
    let mut index = 0;
    loop {
        let sent = sender.send(tokens(index, &step));
        match tokio::time::timeout(Duration::from_millis(300), sent).await {
            Ok(sent) => sent.expect("still wanted"),
            Err(_) => break,
        }
        index += step.len() as u32;
        assert!(index < limits::STREAM_WINDOW_BYTES, "4 bytes of each token and no end");
    }
    let start = Instant::now();
    let (stream, _) = answered(&pair, vec![Reply::Accepted, Reply::Done(done())]).await;
    assert_eq!(within(stream.expect("accepted").collect::<Vec<_>>()).await, [TokenEvent::Finished(done())]);
    assert!(start.elapsed() < Duration::from_millis(200), "{:?}", start.elapsed());
    // The reply whose sending was given up above had begun: it arrives whole, before the next one.
    let finish = async {
        sender.send(tokens(index + 200, &[1])).await.expect("read");
        sender.send(Reply::Done(done())).await.expect("read");
    };
    let read = async {
        let mut next = 0;
        while let Some(event) = slow.next().await {
            match event {
                TokenEvent::Tokens { index, tokens, .. } => {
                    assert_eq!(index, next);
                    next += tokens.len() as u32;
                }
                TokenEvent::Finished(finish) => assert_eq!(finish, done()),
                TokenEvent::Prompt { .. } | TokenEvent::Started { .. } => panic!("nobody said so"),
            }
        }
        next
    };
    assert_eq!(within(async { tokio::join!(finish, read).1 }).await, index + 201);
}

#[tokio::test]
async fn assets_of_20_mb_arrive_and_are_checked() {
    let pair = pair().await;
    let assets = ModelAssets {
        tokenizer_json: "0123456789".repeat(2_000_000),
        chat_template: Some("{{ messages }}".to_owned()),
        bos_token: None,
        eos_token: Some("</s>".to_owned()),
    };
    let hash = assets.hash();
    let serve = async |asked: AssetsHash, answer: Reply| match within(pair.link.next_request()).await {
        Some(IncomingRequest::Assets { hash, mut replies }) => {
            assert_eq!(hash, asked);
            replies.send(answer).await
        }
        other => panic!("expected a request for assets, got {other:?}"),
    };
    let start = Instant::now();
    let sent = serve(hash, Reply::Assets(assets.clone()));
    let (got, sent) = within(async { tokio::join!(pair.peer.assets(hash), sent) }).await;
    assert!(got == Ok(assets.clone()) && sent.is_ok());
    eprintln!("20 MB in {:?}", start.elapsed());

    let other = AssetsHash([7; 32]);
    let sent = serve(other, Reply::Assets(assets));
    let (got, _) = within(async { tokio::join!(pair.peer.assets(other), sent) }).await;
    let error = got.expect_err("not what was asked for").to_string();
    assert!(error.ends_with(&format!("the node sent assets with hash {hash}")), "{error}");
}

#[tokio::test]
async fn sessions_are_asked_for_and_told() {
    let pair = pair().await;
    let serve = async |expected: &SessionRequest, answer: Option<Reply>| {
        let (request, mut replies) = match within(pair.link.next_request()).await {
            Some(IncomingRequest::Sessions { request, replies }) => (request, replies),
            other => panic!("expected a request for sessions, got {other:?}"),
        };
        assert_eq!(request, *expected);
        if let Some(answer) = answer {
            replies.send(answer).await.expect("read");
        }
        replies.cancelled().await;
    };
    let asked = async |request: SessionRequest, answer: Option<Reply>| {
        let served = serve(&request, answer);
        within(async { tokio::join!(pair.peer.sessions(request.clone()), served).0 }).await
    };
    let (client, id) = (ClientId(7), || "chat".to_owned().try_into().expect("a valid name"));
    let session = SessionInfo { client, id: id(), tokens: 64, idle_s: 0.5, expires_in_s: 9.5 };
    let list = SessionRequest::List { client };
    let told = asked(list.clone(), Some(Reply::Sessions(vec![session.clone()]))).await;
    assert_eq!(told, Ok(vec![session]));
    let none = asked(SessionRequest::End { client, id: id() }, Some(Reply::Sessions(Vec::new()))).await;
    assert_eq!(none, Ok(Vec::new()));
    let refusal = GenerateError::Engine { message: "no engine".to_owned() };
    let error = asked(list.clone(), Some(Reply::Rejected(refusal))).await.expect_err("refused").to_string();
    assert_eq!(error, "node \"node\": the engine failed: no engine");
    let error = asked(list.clone(), Some(tokens(0, &[1]))).await.expect_err("out of turn").to_string();
    assert_eq!(error, "node \"node\": the node sent `Tokens` out of turn");
    let start = Instant::now();
    let error = asked(list, None).await.expect_err("silent").to_string();
    assert_eq!(error, "node \"node\": no answer within 2 s");
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[tokio::test]
async fn vectors_arrive_whole_and_one_for_each_text() {
    let pair = pair().await;
    let draft = |count: usize| EmbedDraft {
        id: RequestId(1),
        model: "m".to_owned(),
        inputs: vec![vec![1, 2]; count],
        service: Service::default(),
    };
    let asked = async |count: usize, answer: Option<Reply>| {
        let request = EmbedRequest::try_from(draft(count)).expect("valid");
        let served = async {
            let (request, mut replies) = match within(pair.link.next_request()).await {
                Some(IncomingRequest::Embed { request, replies }) => (request, replies),
                other => panic!("expected a request for vectors, got {other:?}"),
            };
            assert_eq!(request.inputs.len(), count);
            if let Some(answer) = answer {
                replies.send(answer).await.expect("read");
                replies.cancelled().await;
            }
        };
        within(async { tokio::join!(pair.peer.embed(request), served).0 }).await
    };
    // The largest answer that there is.
    let vectors = vec![vec![0.5_f32; types::limits::EMBED_DIMENSIONS_MAX]; types::limits::EMBED_INPUTS_MAX];
    let told = asked(vectors.len(), Some(Reply::Embedded(vectors.clone()))).await;
    assert_eq!(told, Ok(vectors));
    let wrong = GenerateError::Invalid { message: "too long".to_owned(), param: Some("input".to_owned()) };
    assert_eq!(asked(1, Some(Reply::Rejected(wrong.clone()))).await, Err(wrong));
    let said = async |count, answer| asked(count, answer).await.expect_err("no vectors").to_string();
    let fewer = said(2, Some(Reply::Embedded(vec![vec![1.0]]))).await;
    assert_eq!(fewer, "no node can serve \"m\" now: the node sent `Embedded` out of turn");
    let lost = said(1, None).await;
    assert!(lost.starts_with("the node serving this request was lost after 0 tokens"), "{lost}");
}

#[tokio::test]
async fn a_frame_over_the_limit_is_refused_before_it_is_sent() {
    let pair = pair().await;
    let serve = async {
        let (_, mut sender) = next_generate(&pair.link).await;
        sender.send(Reply::Accepted).await.expect("read");
        let error = sender.send(tokens(0, &[u32::MAX; 60_000])).await.expect_err("too large");
        assert!(matches!(error, ReplyError::Frame(wire::FrameError::TooLarge { .. })), "{error}");
        sender.send(Reply::Done(done())).await.expect("the stream is as it was");
    };
    let (stream, ()) = within(async { tokio::join!(pair.peer.generate(request(7)), serve) }).await;
    assert_eq!(within(stream.expect("accepted").collect::<Vec<_>>()).await, [TokenEvent::Finished(done())]);
}

#[tokio::test]
async fn reports_arrive_in_order_and_the_link_tells_why_it_ended() {
    let mut pair = pair().await;
    let rates = NodeRates { prefill_tokens_per_s: 1.0, decode_step_s: 2.0, decode_row_s: 3.0 };
    let load = |running| {
        Control::Load(NodeLoad {
            running,
            waiting: 0,
            slots: 8,
            prefill_backlog_tokens: 0,
            decode_backlog_tokens: 0,
            kv_tokens: (0, 0),
            cached_kv_tokens: 0,
            prefill_backlog_s: 0.0,
            prefill_budget_tokens: 0,
            decode_step_s: [0.0; 8],
            cache_tail_age_s: 0.0,
            cache_reuse_s: 0.0,
            passes: 0,
            step_s: 0.0,
            drafts: Default::default(),
            rates,
        })
    };
    let state = Control::State { state: EngineState::Restarting("killed".to_owned()), models: Vec::new() };
    let mut reports = vec![state];
    reports.extend((0..100).map(load));
    reports.push(Control::Leaving);
    let send = async {
        for report in &reports {
            pair.link.send(report.clone()).await.expect("open");
        }
    };
    let receive = async {
        for report in &reports {
            assert_eq!(pair.reports.next().await.as_ref(), Some(report));
        }
    };
    within(async { tokio::join!(send, receive) }).await;
    pair.peer.close("enough of it");
    assert_eq!(within(pair.link.closed()).await, "enough of it");
    assert!(within(pair.link.next_request()).await.is_none());
    let error = pair.link.send(Control::Leaving).await.expect_err("closed");
    assert_eq!(error.reason, "enough of it");
    assert_eq!(within(pair.reports.next()).await, None);
}

#[tokio::test]
async fn a_router_that_stops_tells_its_nodes() {
    let pair = pair().await;
    within(pair.router.close("the router stops")).await;
    assert_eq!(within(pair.link.closed()).await, "the router stops");
}

#[tokio::test]
async fn a_node_that_repeats_its_hello_is_disconnected() {
    let mut pair = pair().await;
    pair.link.send(Control::Hello(hello(2, "node"))).await.expect("open");
    assert_eq!(within(pair.reports.next()).await, None);
    assert_eq!(within(pair.link.closed()).await, "a second hello");
}

#[tokio::test]
async fn a_dual_stack_socket_reaches_both_families() {
    let key = ClusterKey::generate().expect("random numbers");
    let node = Endpoint::bind("0.0.0.0:0".parse().expect("an address"), &key).expect("binds");
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let router = match Endpoint::bind(address.parse().expect("an address"), &key) {
            Ok(router) => router,
            Err(error) => {
                eprintln!("skipped {address}: {error}");
                continue;
            }
        };
        let (to, welcome) = (router.local_address(), hello(1, "router"));
        let joined = async { tokio::join!(router.accept(&welcome), node.join(to, hello(2, "node"))) };
        let (accepted, link) = within(joined).await;
        let (peer, _reports) = accepted.expect("open");
        assert_eq!(link.expect("joined").remote_address(), to);
        assert_eq!(peer.remote_address().is_ipv4(), to.is_ipv4());
    }
}

/// As the simulator does it: socket, runtime and seed come from outside.
#[tokio::test]
async fn a_socket_can_be_brought_along() {
    let key = ClusterKey::generate().expect("random numbers");
    let bring = |seed| {
        let runtime: Arc<dyn quinn::Runtime> = Arc::new(quinn::TokioRuntime);
        let socket = std::net::UdpSocket::bind(loopback()).expect("binds");
        let socket = runtime.wrap_udp_socket(socket).expect("non-blocking");
        Endpoint::with_socket(socket, runtime, &key, Some([seed; 32])).expect("usable")
    };
    let (router, node) = (bring(1), bring(2));
    let (to, welcome) = (router.local_address(), hello(1, "router"));
    let (accepted, link) =
        within(async { tokio::join!(router.accept(&welcome), node.join(to, hello(2, "node"))) }).await;
    assert_eq!(accepted.expect("open").0.hello().node, types::NodeId(2));
    assert_eq!(link.expect("joined").router().node, types::NodeId(1));
}

#[tokio::test]
async fn addresses_that_cannot_answer_are_errors_in_bounded_time() {
    let key = ClusterKey::generate().expect("random numbers");
    let node = Endpoint::bind(loopback(), &key).expect("binds");
    let error = node.join("127.0.0.1:0".parse().expect("an address"), hello(2, "node")).await;
    assert!(matches!(error, Err(JoinError::Address { .. })), "{error:?}");
    // Bound, but no router: nobody accepts there.
    let deaf = Endpoint::bind(loopback(), &key).expect("binds");
    let start = Instant::now();
    let error = node.join(deaf.local_address(), hello(2, "node")).await;
    assert!(matches!(error, Err(JoinError::Unreachable { .. })), "{error:?}");
    assert!(start.elapsed() < limits::HANDSHAKE_TIME_MAX + Duration::from_millis(500));
    let taken = Endpoint::bind(deaf.local_address(), &key).expect_err("in use").to_string();
    assert!(taken.contains(&deaf.local_address().to_string()), "{taken}");
}

#[tokio::test]
async fn a_closed_endpoint_accepts_nobody() {
    let key = ClusterKey::generate().expect("random numbers");
    let router = Endpoint::bind(loopback(), &key).expect("binds");
    let welcome = hello(1, "router");
    let accepted = async { tokio::join!(router.accept(&welcome), router.close("over")).0 };
    assert!(within(accepted).await.is_none());
    assert!(within(router.accept(&welcome)).await.is_none());
}
