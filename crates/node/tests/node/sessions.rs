//! Sessions, salts and what of a prompt is found again, over whole nodes.

use crate::{Cluster, ENGINE, check_text, collect, request};
use node::NodeHandle;
use std::time::{Duration, Instant};
use testkit::check_stream;
use types::{
    CacheScope, ClientId, Generate, GenerateDraft, GenerateRequest, Role, Service, SessionAnswers, SessionId,
    SessionRequest, Sessions, Usage, limits,
};

/// A turn of a client's conversation that says `first` and, up to so many tokens, nothing new.
fn turn(id: u128, client: ClientId, session: &str, first: u32, tokens: u32) -> GenerateRequest {
    let draft = GenerateDraft {
        prompt: (0..tokens).map(|index| (index * 3 + first) % 900 + 1).collect(),
        service: Service { client, ..Service::default() },
        cache: CacheScope { salt: None, session: Some(session.to_owned().try_into().expect("a name")) },
        ..request(id, 8).into()
    };
    GenerateRequest::try_from(draft).expect("a valid request")
}

/// Usage of a request that must be served well.
async fn served(node: &NodeHandle, request: GenerateRequest) -> (String, Usage) {
    let generation = node.generate(request.clone()).await.expect("accepted");
    let name = generation.route.node_name.clone();
    let events = collect(generation).await;
    check_text(&request, &events);
    (name, check_stream(&events).expect("a proper stream").1.usage)
}

/// (session, node, tokens) of each.
fn told(answers: &SessionAnswers) -> Vec<(&str, &str, u32)> {
    let found = answers.sessions.iter();
    found.map(|it| (it.session.id.as_str(), it.node_name.as_str(), it.session.tokens)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_are_listed_and_ended_on_all_nodes() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Node, Role::Router]).await;
    cluster.add(&ENGINE, &[Role::Node]).await;
    cluster.ready(2).await;
    let node = &cluster.nodes[0];
    let [one, two] = [ClientId(1), ClientId(2)];
    // At the same time, so that each node gets one.
    let requests = [turn(1, one, "a", 5, 200), turn(2, one, "b", 50, 200)];
    let [first, second] = requests.map(|request| {
        let node = node.clone();
        tokio::spawn(async move { served(&node, request).await })
    });
    let (place_a, usage) = first.await.expect("no panic");
    let (place_b, _) = second.await.expect("no panic");
    assert_eq!(usage.cached_tokens, 0);
    assert_ne!(place_a, place_b);
    let list = |client| node.sessions(SessionRequest::List { client });
    let answers = list(one).await;
    // 200 tokens of the prompt and 7 of the text: 6 full blocks.
    assert_eq!(told(&answers), [("a", &*place_a, 192), ("b", &*place_b, 192)]);
    assert!(answers.sessions.iter().all(|found| found.session.expires_in_s > 1700.0), "{answers:?}");
    assert_eq!(list(two).await, SessionAnswers::default());

    // The next turn goes where the first one was, and finds its KV.
    let (place, usage) = served(node, turn(3, one, "a", 5, 300)).await;
    assert_eq!((place, usage.prompt_tokens, usage.cached_tokens), (place_a.clone(), 300, 192));
    assert_eq!(told(&list(one).await), [("a", &*place_a, 288), ("b", &*place_b, 192)]);

    let id = |name: &str| SessionId::try_from(name.to_owned()).expect("a name");
    let end = |client, name| node.sessions(SessionRequest::End { client, id: id(name) });
    assert_eq!(end(two, "a").await, SessionAnswers::default(), "another client's");
    assert_eq!(told(&end(one, "a").await), [("a", &*place_a, 288)]);
    assert_eq!(end(one, "a").await, SessionAnswers::default());
    assert_eq!(told(&end(one, "b").await), [("b", &*place_b, 192)]);
    assert_eq!(list(one).await, SessionAnswers::default());
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_does_not_tell_of_its_sessions_is_named() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Node, Role::Router]).await;
    cluster.add(&ENGINE, &[Role::Node]).await;
    cluster.ready(2).await;
    let node = &cluster.nodes[0];
    for (index, silent) in [(0, "node-0"), (1, "node-1")] {
        cluster.signal_engine(index, "-STOP");
        let asked = Instant::now();
        let answers = node.sessions(SessionRequest::List { client: ClientId(1) }).await;
        let bound = limits::SESSIONS_TIME_MAX + Duration::from_millis(500);
        assert!(asked.elapsed() < bound, "took {:?}", asked.elapsed());
        assert_eq!((answers.sessions.len(), answers.incomplete), (0, vec![silent.to_owned()]));
        cluster.signal_engine(index, "-CONT");
    }
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn salts_keep_prompts_apart() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Node, Role::Router]).await;
    cluster.ready(1).await;
    let node = &cluster.nodes[0];
    let mut id = 0;
    let mut check = async |salt: Option<&str>, cached_tokens: u32, matched_tokens: u32| {
        id += 1;
        let mut draft = GenerateDraft::from(turn(id, ClientId(1), "x", 5, 100));
        draft.cache = CacheScope { salt: salt.map(str::to_owned), session: None };
        let request = GenerateRequest::try_from(draft).expect("valid");
        let generation = node.generate(request).await.expect("accepted");
        let expected = generation.route.matched_tokens;
        let (_, finish) = check_stream(&collect(generation).await).expect("a proper stream");
        assert_eq!((finish.usage.cached_tokens, expected), (cached_tokens, matched_tokens), "{salt:?}");
    };
    check(None, 0, 0).await;
    check(None, 96, 96).await;
    check(Some("a"), 0, 0).await;
    check(Some("b"), 0, 0).await;
    check(Some("a"), 96, 96).await;
    cluster.shutdown().await;
}
