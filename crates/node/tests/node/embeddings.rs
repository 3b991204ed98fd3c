//! Vectors of texts, from whichever node has the model.

use super::*;
use testkit::FakeEmbedder;
use types::{Embed, EmbedDraft, EmbedRequest, Embeddings, ModelKind, TokenId};

const EMBEDDER: Engine = Engine { model: "embed", ..ENGINE };

fn texts(id: u128, inputs: &[&[TokenId]]) -> EmbedRequest {
    let inputs = inputs.iter().map(|input| input.to_vec()).collect();
    let draft =
        EmbedDraft { id: RequestId(id), model: "embed".to_owned(), inputs, service: Service::default() };
    draft.try_into().expect("valid")
}

fn check_vectors(request: &EmbedRequest, embedded: Result<Embeddings, GenerateError>) -> String {
    let embedded = embedded.expect("vectors");
    let expected: Vec<_> = request.inputs.iter().map(|input| FakeEmbedder::vector(input)).collect();
    assert_eq!(embedded.vectors, expected);
    embedded.route.node_name
}

/// An embedder beside a model that generates, both reached through the node that has the latter.
#[tokio::test(flavor = "multi_thread")]
async fn each_model_is_asked_for_what_it_does() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Node, Role::Router]).await;
    cluster.add(&EMBEDDER, &[Role::Node]).await;
    cluster.ready(2).await;
    let router = &cluster.nodes[0];
    let kinds: Vec<_> = router.models().into_iter().map(|card| (card.name, card.kind)).collect();
    let embedder = ModelKind::Embedder { dimensions: FakeEmbedder::DIMENSIONS as u32 };
    assert_eq!(kinds, [("embed".to_owned(), embedder), (MODEL.to_owned(), ModelKind::Generator)]);
    let request = texts(1, &[&[1, 2, 3], &[4]]);
    assert_eq!(check_vectors(&request, router.embed(request.clone()).await), "node-1");

    let refused = async |model: &str, input: TokenId| {
        let draft = EmbedDraft { model: model.to_owned(), ..texts(2, &[&[input]]).into() };
        router.embed(draft.try_into().expect("valid")).await.expect_err("refused").to_string()
    };
    let wrong = "the model \"fake\" generates texts (/v1/chat/completions); it makes no vectors of them";
    assert_eq!(refused(MODEL, 1).await, wrong);
    assert_eq!(refused("embed", 1000).await, "input 0 holds the token 1000; the model's tokens end at 1000");
    let unknown = "the model \"other\" does not exist; this cluster serves: embed, fake";
    assert_eq!(refused("other", 1).await, unknown);
    let long = texts(3, &[&[1; 4097]]);
    let said = router.embed(long).await.expect_err("refused").to_string();
    assert_eq!(said, "input 0 has 4097 tokens; the model's context is 4096 tokens");
    let draft = GenerateDraft { model: "embed".to_owned(), ..request_draft() };
    let said = router.generate(draft.try_into().expect("valid")).await.expect_err("refused").to_string();
    assert_eq!(said, "the model \"embed\" makes vectors of texts (/v1/embeddings); it does not generate");
    cluster.shutdown().await;
}

fn request_draft() -> GenerateDraft {
    request(9, 1).into()
}

/// Many at once are spread over both nodes; where one dies, what it had is asked of the other.
#[tokio::test(flavor = "multi_thread")]
async fn vectors_survive_the_death_of_an_engine() {
    let mut cluster = Cluster::new();
    let slow = Engine { step_ms: 40, ..EMBEDDER };
    cluster.add(&slow, &[Role::Node, Role::Router]).await;
    cluster.add(&slow, &[Role::Node]).await;
    cluster.ready(2).await;
    let router = cluster.nodes[0].clone();
    let asked = (0..40).map(|id| {
        let (router, request) = (router.clone(), texts(id, &[&[id as TokenId + 1; 9], &[7, id as TokenId]]));
        tokio::spawn(async move { check_vectors(&request, router.embed(request.clone()).await) })
    });
    let asked: Vec<_> = asked.collect();
    tokio::time::sleep(Duration::from_millis(60)).await;
    cluster.kill_engine(1);
    let mut nodes = BTreeMap::<String, usize>::new();
    for answer in asked {
        *nodes.entry(answer.await.expect("vectors")).or_default() += 1;
    }
    assert_eq!(nodes.values().sum::<usize>(), 40, "{nodes:?}");
    // Whoever gives up is forgotten: the engine has room again.
    for id in 100..400 {
        drop(tokio::time::timeout(Duration::from_millis(1), router.embed(texts(id, &[&[1; 100]]))).await);
    }
    let last = texts(500, &[&[5]]);
    check_vectors(&last, router.embed(last.clone()).await);
    // A text that engines fail of is tried twice.
    let said = router.embed(texts(501, &[&[990]])).await.expect_err("fails");
    assert!(matches!(said, GenerateError::Engine { .. } | GenerateError::NodeLost { .. }), "{said}");
    cluster.shutdown().await;
}
