//! Grammars that take long to compile, on nodes that do nothing else meanwhile.

use super::*;
use bytes::BytesMut;
use node::{StartEngine, StartedEngine};
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::sync::mpsc;
use types::Grammar;
use wire::{Decoder, EngineCommand, FrameClass};

/// Longer than a node may bring nothing before its requests are tried elsewhere, and shorter than it may hang.
const COMPILE_TIME: Duration = Duration::from_millis(1300);

/// An engine that has requests with a grammar only after a while, and then without it, as the fake model knows no texts.
#[derive(Debug)]
struct SlowCompiler(EngineCommandLine);

impl StartEngine for SlowCompiler {
    fn start(&self) -> io::Result<StartedEngine> {
        let StartedEngine { commands: mut engine, reports, life } = self.0.start()?;
        let (commands, mut asked) = duplex(1 << 16);
        let (forward, mut due) = mpsc::channel::<EngineCommand>(64);
        tokio::spawn(async move {
            let (decoder, mut buffer) = (Decoder::<EngineCommand>::new(FrameClass::Engine), BytesMut::new());
            while asked.read_buf(&mut buffer).await.is_ok_and(|bytes| bytes > 0) {
                while let Some(mut command) = decoder.next(&mut buffer).expect("from a node") {
                    let (forward, mut wait) = (forward.clone(), Duration::ZERO);
                    if let EngineCommand::Submit(request) = &command
                        && request.rules.grammar.is_some()
                    {
                        let rules = OutputRules { grammar: None, ..request.rules.clone() };
                        let draft = GenerateDraft { rules, ..GenerateRequest::clone(request).into() };
                        command =
                            EngineCommand::Submit(GenerateRequest::try_from(draft).expect("valid").into());
                        wait = COMPILE_TIME;
                    }
                    tokio::spawn(async move {
                        tokio::time::sleep(wait).await;
                        // Fails only where the engine has ended.
                        let _ = forward.send(command).await;
                    });
                }
            }
        });
        tokio::spawn(async move {
            while let Some(command) = due.recv().await {
                let mut buffer = BytesMut::new();
                wire::encode(FrameClass::Engine, &command, &mut buffer).expect("small");
                if engine.write_all(&buffer).await.is_err() {
                    return;
                }
            }
        });
        Ok(StartedEngine { commands: Box::new(commands), reports, life })
    }
}

/// Neither asked elsewhere too, nor held against the node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grammar_is_waited_for_where_it_is_compiled() {
    let mut cluster = Cluster::new();
    cluster.add(&ENGINE, &[Role::Router]).await;
    for _ in 0..2 {
        let mut settings = cluster.settings(&ENGINE, &[Role::Node]);
        let engine = ["fake", "60", "10", "4"].map(Into::into).to_vec();
        let args = [engine, vec![cluster.pid_file(cluster.nodes.len()).into_os_string()]].concat();
        let program = EngineCommandLine { program: fake_engine(), args, env: Vec::new() };
        settings.engine = Some(Arc::new(SlowCompiler(program)));
        cluster.nodes.push(start(settings).await.expect("the node starts"));
    }
    cluster.ready(2).await;
    let router = &cluster.nodes[0];
    let plain = request(1, 5);
    let rules = OutputRules { grammar: Some(Grammar::Regex("a+".to_owned())), ..OutputRules::default() };
    let ruled = GenerateDraft { rules, ..plain.clone().into() }.try_into().expect("valid");
    let asked = Instant::now();
    let generation = router.generate(ruled).await.expect("accepted");
    let events = tokio::spawn(collect(generation));
    while !events.is_finished() {
        assert!(router.view().nodes.iter().all(|node| !node.avoided), "{:?}", router.view().nodes);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    check_text(&plain, &events.await.expect("no panic"));
    assert!(asked.elapsed() >= COMPILE_TIME, "{:?}", asked.elapsed());
    assert_eq!(router.view().moves, types::MoveCounts::default());
    cluster.shutdown().await;
}
