//! However tokens arrive, an answer is told the same.

use super::*;
use crate::tokenizers_for_tests::byte_level_with;
use futures_util::stream;
use proptest::{collection::vec, prelude::*};
use types::{Finish, ModelAssets, Usage};

thread_local! {
    static TEXT: Arc<ModelText> = {
        let tokenizer_json = byte_level_with(&["[TOOL_CALLS]", "[THINK]", "[/THINK]"]);
        let assets = ModelAssets { tokenizer_json, chat_template: None, bos_token: None, eos_token: None };
        Arc::new(ModelText::load(&assets).unwrap())
    };
}

/// Everything that an answer is told to be, joined.
#[derive(Debug, Default, PartialEq)]
struct Told {
    reasoning: String,
    content: String,
    calls: Vec<(String, String)>,
    tokens: Vec<TokenId>,
    ending: Option<Ending>,
}

/// Tells an answer whose tokens come in events of these lengths.
fn tell(
    tokens: &[TokenId],
    lengths: &[usize],
    format: &AnswerFormat,
    stops: &[String],
    reason: FinishReason,
) -> Told {
    let mut events = vec![TokenEvent::Started { cached_tokens: 1 }];
    let (mut index, mut lengths) = (0, lengths.iter().copied().cycle());
    while index < tokens.len() {
        let end = (index + lengths.next().unwrap_or(1).max(1)).min(tokens.len());
        let tokens = tokens[index..end].to_vec();
        let logprobs = tokens.iter().map(|_| TokenLogprobs { logprob: -1.0, top: Vec::new() }).collect();
        events.push(TokenEvent::Tokens { index: index as u32, tokens, logprobs });
        index = end;
    }
    let usage = Usage {
        prompt_tokens: 1,
        cached_tokens: 1,
        completion_tokens: tokens.len() as u32,
        ..Usage::default()
    };
    events.push(TokenEvent::Finished(Finish { reason, usage }));
    let text = TEXT.with(Clone::clone);
    let settings = OutputSettings {
        format: format.clone(),
        stop_strings: stops.to_vec(),
        include_stop: false,
        logprobs: true,
        prompt_only: false,
        grammar_param: "tools",
        board: Arc::new(Board::new()),
    };
    let detokenizer = Detokenizer::new(text.clone(), format.shown(&text));
    let mut output =
        Output::new(RequestId(1), stream::iter(events).boxed(), detokenizer, settings, vec![97].into());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let mut told = Told::default();
        while let Some(event) = output.next().await {
            assert!(told.ending.is_none(), "nothing follows the end");
            match event.unwrap() {
                AnswerEvent::Prompt(_) => unreachable!("nobody asked"),
                AnswerEvent::Tokens(infos) => told.tokens.extend(infos.iter().map(|info| info.token)),
                AnswerEvent::Reasoning(text) => told.reasoning.push_str(&text),
                AnswerEvent::Content(text) => told.content.push_str(&text),
                AnswerEvent::ToolCall { call, name, .. } => {
                    assert_eq!(call, told.calls.len());
                    told.calls.push((name, String::new()));
                }
                AnswerEvent::Arguments { call, text } => told.calls[call].1.push_str(&text),
                AnswerEvent::ToolCallEnd { call } => assert_eq!(call + 1, told.calls.len()),
                AnswerEvent::Ended(ending) => told.ending = Some(ending),
            }
        }
        told
    })
}

/// Tokens of text, of markers, and of pieces that mean something.
fn pieces() -> impl Strategy<Value = Vec<TokenId>> {
    let text = |text: &str| text.bytes().map(TokenId::from).collect::<Vec<_>>();
    prop_oneof![
        Just(vec![259]),
        Just(vec![260]),
        Just(vec![261]),
        Just(vec![257]),
        Just(text("[{\"name\": \"time\", \"arguments\": {\"a\": \"é\"}}]")),
        Just(text("time[ARGS]{}")),
        Just(text(" END ")),
        Just(text("\n")),
        Just(vec![0xc3]),
        "[abé€ E{]{1,6}".prop_map(move |part| part.bytes().map(TokenId::from).collect()),
    ]
}

proptest! {
    #[test]
    fn events_change_nothing(
        parts in vec(pieces(), 0..12),
        lengths in vec(1..9_usize, 1..5),
        stops in prop::sample::select(vec![vec![], vec!["END".to_owned()], vec!["END".to_owned(), "\n".to_owned()]]),
        reasoning: bool,
        tools: bool,
        length: bool,
    ) {
        let tokens = parts.concat();
        let format = AnswerFormat {
            reasoning: reasoning.then_some((ReasoningFormat { open: "[THINK]", close: "[/THINK]" }, Start::Before)),
            tools: tools.then(|| (ToolFormat::Mistral, Arc::from([]))),
            ..AnswerFormat::default()
        };
        let reason = || if length { FinishReason::Length } else { FinishReason::Stop };
        let single = tell(&tokens, &[1], &format, &stops, reason());
        prop_assert_eq!(&tell(&tokens, &lengths, &format, &stops, reason()), &single);
        prop_assert_eq!(&tell(&tokens, &[1000], &format, &stops, reason()), &single);
        let ending = single.ending.as_ref().unwrap();
        prop_assert!(tokens.starts_with(&single.tokens), "of the first tokens, in order");
        if ending.stop_string.is_none() {
            prop_assert_eq!(single.tokens.len(), tokens.len(), "all are told of");
        } else {
            prop_assert!(ending.usage.completion_tokens as usize >= single.tokens.len());
        }
        if !reasoning && !tools && stops.is_empty() {
            prop_assert_eq!(&single.content, &TEXT.with(|text| text.plain(&tokens)).unwrap());
        }
    }
}
