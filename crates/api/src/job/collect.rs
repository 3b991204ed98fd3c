//! Whole answers: everything that a stream would tell, put together.

use super::ToolCall;
use crate::{
    error::ApiError,
    text::{AnswerEvent, EndReason, Ending, Output, TextUsage, TokenInfo},
};
use futures_util::{
    StreamExt,
    stream::{self, BoxStream, SelectAll},
};
use std::ops::Range;

/// One whole answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Whole {
    /// Of the prompt, where it was asked for.
    pub(crate) prompt: Vec<TokenInfo>,
    pub(crate) reasoning: String,
    pub(crate) content: String,
    pub(crate) calls: Vec<ToolCall>,
    /// Of the answer, where it was asked for.
    pub(crate) tokens: Vec<TokenInfo>,
    /// Those of them that are `content`: neither reasoning, nor calls, nor the end.
    content_tokens: Vec<Range<usize>>,
    /// How many of them are of what was told.
    told_tokens: usize,
    pub(crate) ending: Ending,
}

impl Whole {
    fn new() -> Self {
        Self {
            prompt: Vec::new(),
            reasoning: String::new(),
            content: String::new(),
            calls: Vec::new(),
            tokens: Vec::new(),
            content_tokens: Vec::new(),
            told_tokens: 0,
            ending: Ending { reason: EndReason::Stop, stop_string: None, usage: TextUsage::default() },
        }
    }

    fn add(&mut self, event: AnswerEvent) {
        match event {
            AnswerEvent::Prompt(infos) => self.prompt.extend(infos),
            AnswerEvent::Tokens(infos) => self.tokens.extend(infos),
            AnswerEvent::Reasoning(text) => {
                self.told_tokens = self.tokens.len();
                self.reasoning.push_str(&text);
            }
            AnswerEvent::Content(text) => {
                let from = std::mem::replace(&mut self.told_tokens, self.tokens.len());
                match self.content_tokens.last_mut().filter(|last| last.end == from) {
                    Some(last) => last.end = self.tokens.len(),
                    None => self.content_tokens.push(from..self.tokens.len()),
                }
                self.content.push_str(&text);
            }
            AnswerEvent::ToolCall { call: _, id, name } => {
                self.told_tokens = self.tokens.len();
                self.calls.push(ToolCall { id, name, arguments: String::new() });
            }
            AnswerEvent::Arguments { call, text } => {
                self.told_tokens = self.tokens.len();
                if let Some(call) = self.calls.get_mut(call) {
                    call.arguments.push_str(&text);
                }
            }
            AnswerEvent::ToolCallEnd { .. } => {}
            AnswerEvent::Ended(ending) => self.ending = ending,
        }
    }

    /// The tokens of `content`, where they were asked for.
    pub(crate) fn content_tokens(&self) -> impl Iterator<Item = &[TokenInfo]> {
        self.content_tokens.iter().map(|range| &self.tokens[range.clone()])
    }

    /// How probable the model found the answer, for each token.
    fn mean_logprob(&self) -> f64 {
        let logprobs = self.tokens.iter().filter_map(|info| Some(f64::from(info.logprobs.as_ref()?.logprob)));
        let (sum, count) = logprobs.fold((0.0, 0), |(sum, count), logprob| (sum + logprob, count + 1));
        if count == 0 { f64::NEG_INFINITY } else { sum / f64::from(count) }
    }
}

/// The events of all outputs as they come, each with its output's index.
pub(crate) type Events = SelectAll<BoxStream<'static, (usize, Result<AnswerEvent, ApiError>)>>;

/// Merges outputs.
pub(crate) fn merge(outputs: Vec<Output>) -> Events {
    let streams = outputs.into_iter().enumerate().map(|(index, output)| {
        stream::unfold(output, move |mut output| async move {
            let event = output.next().await?;
            Some(((index, event), output))
        })
        .boxed()
    });
    stream::select_all(streams)
}

/// Waits for all answers, or the first error.
pub(crate) async fn collect(outputs: Vec<Output>) -> Result<Vec<Whole>, ApiError> {
    let mut answers = vec![Whole::new(); outputs.len()];
    let mut events = merge(outputs);
    while let Some((index, event)) = events.next().await {
        answers[index].add(event?);
    }
    Ok(answers)
}

/// Of each `drawn` answers, the `n` most probable, the best first; usage is that of all.
pub(crate) fn best(answers: Vec<Whole>, drawn: usize, n: usize) -> Vec<Whole> {
    if drawn == n {
        return answers;
    }
    let mut answers = answers.into_iter();
    let mut best = Vec::new();
    loop {
        let mut group: Vec<Whole> = answers.by_ref().take(drawn).collect();
        if group.is_empty() {
            return best;
        }
        group.sort_by(|a, b| b.mean_logprob().total_cmp(&a.mean_logprob()));
        let lost: Vec<TextUsage> = group.drain(n..).map(|whole| whole.ending.usage).collect();
        for usage in lost {
            group[0].ending.usage = group[0].ending.usage.with(usage);
        }
        best.extend(group);
    }
}

/// The cost of all answers: each prompt counts once, however many answers it has.
pub(crate) fn total_usage(usages: impl IntoIterator<Item = TextUsage>, n: usize) -> TextUsage {
    let mut total: Option<TextUsage> = None;
    for (index, usage) in usages.into_iter().enumerate() {
        total = Some(match total {
            None => usage,
            Some(total) if index % n == 0 => total.plus(usage),
            Some(total) => total.with(usage),
        });
    }
    total.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokens_of_the_content_are_told_apart() {
        let info = |token| TokenInfo { token, logprobs: None };
        let tokens = |tokens: &[u32]| AnswerEvent::Tokens(tokens.iter().map(|&token| info(token)).collect());
        let check = |events: Vec<AnswerEvent>, expected: &[u32]| {
            let mut whole = Whole::new();
            events.into_iter().for_each(|event| whole.add(event));
            let found: Vec<u32> = whole.content_tokens().flatten().map(|info| info.token).collect();
            assert_eq!(found, expected);
        };
        let content = || AnswerEvent::Content("x".to_owned());
        let reasoning = || AnswerEvent::Reasoning("x".to_owned());
        let call = || AnswerEvent::ToolCall { call: 0, id: String::new(), name: String::new() };
        let arguments = || AnswerEvent::Arguments { call: 0, text: "x".to_owned() };
        check(vec![content()], &[]);
        check(vec![tokens(&[1, 2]), content(), tokens(&[3]), tokens(&[4]), content()], &[1, 2, 3, 4]);
        // The last one is the end of the text.
        check(vec![tokens(&[1]), reasoning(), tokens(&[2]), content(), tokens(&[3])], &[2]);
        check(
            vec![
                tokens(&[1]),
                content(),
                tokens(&[2]),
                call(),
                tokens(&[3]),
                arguments(),
                tokens(&[4]),
                content(),
            ],
            &[1, 4],
        );
    }
}
