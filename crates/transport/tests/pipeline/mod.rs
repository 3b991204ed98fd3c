//! What members of a pipeline ask of each other, between two endpoints on loopback.

use crate::pair::{Pair, pair, within};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use transport::{IncomingRequest, ReplySender, Tunnel};
use types::{
    BlockHash, EpochId, GenerateError, LinkProfile, MeasureQuery, MemberProfile, NodeId, StageNews,
    StageOrder, StageProfile, TunnelOrder,
};
use wire::Reply;

const EPOCH: EpochId = EpochId { head: NodeId(1), number: 7 };
const TUNNEL: TunnelOrder = TunnelOrder { epoch: EPOCH, rank: 1 };
const PATIENCE: Duration = Duration::from_secs(10);

fn order() -> StageOrder {
    StageOrder {
        epoch: EPOCH,
        model: "m".to_owned(),
        weights: BlockHash(3),
        rank: 1,
        members: vec![NodeId(1), NodeId(2)],
        layers: vec![(0, 2), (2, 5)],
        kv_tokens: 64,
        direct_ports: Vec::new(),
    }
}

async fn next_stage(pair: &Pair) -> (StageOrder, ReplySender) {
    match within(pair.link.next_request()).await {
        Some(IncomingRequest::Stage { order, replies }) => (order, replies),
        other => panic!("expected a stage, got {other:?}"),
    }
}

#[tokio::test]
async fn measurements_come_back() {
    let pair = pair().await;
    let stage = StageProfile {
        memory_bytes: 1,
        weights: BlockHash(2),
        layer_s: vec![(1, 0.5)],
        head_s: vec![(1, 0.25)],
        layer_bytes: vec![3, 4],
        embedding_bytes: 5,
        head_bytes: 6,
        hidden_bytes: 7,
        kv_bytes_per_token: 8,
    };
    let link = LinkProfile { to: NodeId(9), latency_s: 0.125, bytes_per_s: 1e9 };
    let profile = MemberProfile { stage, links: vec![link], direct_port: Some(7000) };
    let query = MeasureQuery { model: "m".to_owned(), members: vec![NodeId(9)] };
    let serve = async {
        match pair.link.next_request().await {
            Some(IncomingRequest::Measure { query, mut replies }) => {
                replies.send(Reply::Measured(profile.clone())).await.expect("read");
                query
            }
            other => panic!("expected a measurement, got {other:?}"),
        }
    };
    let (measured, asked) = within(async { tokio::join!(pair.peer.measure(query.clone()), serve) }).await;
    assert_eq!((measured.expect("measured"), asked), (profile, query));
}

#[tokio::test]
async fn a_stage_tells_until_it_fails() {
    let pair = pair().await;
    let failed = StageNews::Failed { message: "killed".to_owned() };
    let news =
        [StageNews::Started, StageNews::Joined, StageNews::Ready, StageNews::Beat { passes: 3 }, failed];
    let serve = async {
        let (got, mut replies) = next_stage(&pair).await;
        for news in &news {
            replies.send(Reply::Stage(news.clone())).await.expect("read");
        }
        got
    };
    let (stage, got) = within(async { tokio::join!(pair.peer.stage(order()), serve) }).await;
    assert_eq!(got, order());
    let mut stage = stage.expect("hosted");
    for news in &news {
        assert_eq!(within(stage.next()).await.as_ref(), Some(news));
    }
    assert_eq!(within(stage.next()).await, None);
}

#[tokio::test]
async fn a_stage_ends_with_its_stream_and_with_its_node() {
    let pair = pair().await;
    let serve = async {
        let (_, mut replies) = next_stage(&pair).await;
        replies.send(Reply::Stage(StageNews::Started)).await.expect("read");
        replies
    };
    let (stage, replies) = within(async { tokio::join!(pair.peer.stage(order()), serve) }).await;
    drop(stage.expect("hosted"));
    within(replies.cancelled()).await;
    let serve = async {
        let (_, mut replies) = next_stage(&pair).await;
        replies.send(Reply::Stage(StageNews::Started)).await.expect("read");
        replies
    };
    let (stage, replies) = within(async { tokio::join!(pair.peer.stage(order()), serve) }).await;
    let mut stage = stage.expect("hosted");
    assert_eq!(within(stage.next()).await, Some(StageNews::Started));
    drop(replies);
    let ended = within(stage.next()).await;
    assert_eq!(ended, Some(StageNews::Failed { message: "given up by the other end".to_owned() }));
}

async fn tunnel(pair: &Pair) -> (Tunnel, Tunnel) {
    let serve = async {
        match pair.link.next_request().await {
            Some(IncomingRequest::Tunnel(opening)) => {
                assert_eq!(opening.order, TUNNEL);
                opening.accept().await.expect("waited for")
            }
            other => panic!("expected a tunnel, got {other:?}"),
        }
    };
    let (near, far) = within(async { tokio::join!(pair.peer.tunnel(TUNNEL, PATIENCE), serve) }).await;
    (near.expect("open"), far)
}

#[tokio::test]
async fn bytes_go_through_a_tunnel_both_ways_at_once() {
    const BYTES: usize = 3 << 20;
    let pair = pair().await;
    let (near, far) = tunnel(&pair).await;
    let through = |tunnel: Tunnel, own: u8, other: u8| async move {
        let (mut read, mut write) = tokio::io::split(tunnel);
        let send = async {
            write.write_all(&vec![own; BYTES]).await.expect("taken");
            write.shutdown().await.expect("ended");
        };
        let receive = async {
            let mut got = Vec::new();
            read.read_to_end(&mut got).await.expect("in good order");
            assert!(got.len() == BYTES && got.iter().all(|&byte| byte == other), "{} bytes", got.len());
        };
        tokio::join!(send, receive);
    };
    within(async { tokio::join!(through(near, 1, 2), through(far, 2, 1)) }).await;
}

/// So many bytes are on their way before the first was read: where there and back takes 10 ms, 39 MB go a second.
#[tokio::test]
async fn a_tunnel_has_room_for_a_long_way() {
    const ON_THE_WAY: usize = 390_000;
    let pair = pair().await;
    let (mut near, mut far) = tunnel(&pair).await;
    within(near.write_all(&vec![7; ON_THE_WAY])).await.expect("taken though nobody reads");
    let mut got = vec![0; ON_THE_WAY];
    within(far.read_exact(&mut got)).await.expect("in good order");
    assert!(got.iter().all(|&byte| byte == 7));
}

/// Who reads at the other end sees an error, not an end in good order.
#[tokio::test]
async fn a_tunnel_that_is_dropped_breaks_off() {
    let pair = pair().await;
    for near_goes in [true, false] {
        let (near, far) = tunnel(&pair).await;
        let (gone, mut left) = if near_goes { (near, far) } else { (far, near) };
        drop(gone);
        let read = within(left.read(&mut [0; 8])).await;
        assert!(read.is_err(), "{near_goes}: {read:?}");
    }
    let (_near, mut far) = tunnel(&pair).await;
    pair.peer.close("over");
    assert!(within(far.read(&mut [0; 8])).await.is_err());
}

#[tokio::test]
async fn tunnels_are_refused_with_a_reason() {
    let pair = pair().await;
    let error = GenerateError::Unavailable { model: "m".to_owned(), reason: "no such epoch".to_owned() };
    let serve = async {
        match pair.link.next_request().await {
            Some(IncomingRequest::Tunnel(opening)) => opening.refuse(error.clone()).await,
            other => panic!("expected a tunnel, got {other:?}"),
        }
    };
    let (refused, ()) = within(async { tokio::join!(pair.peer.tunnel(TUNNEL, PATIENCE), serve) }).await;
    let refused = refused.expect_err("refused").to_string();
    assert!(refused.contains("no such epoch"), "{refused}");
}

#[tokio::test]
async fn a_link_is_measured() {
    let pair = pair().await;
    // Whoever serves requests takes probes without a word.
    let serve = pair.link.next_request();
    let rate = tokio::select! {
        rate = pair.peer.probe() => rate.expect("arrived"),
        request = serve => panic!("{request:?}"),
    };
    assert!(rate > 1e5, "{rate} bytes a second over loopback");
}
