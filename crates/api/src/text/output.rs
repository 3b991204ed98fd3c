//! One answer: token events in, what is told of it out.

use super::{
    AnswerEvent, AnswerParser, Detokenizer, EndReason, Ending, HarmonyParser, Part, Parts, ReasoningFormat,
    ReasoningParser, Shown, Start, StopMatcher, TextUsage, TokenInfo,
    tools::{ToolFormat, ToolParser},
};
use crate::{
    error::ApiError,
    job::{Tool, in_client_words},
    metrics::Board,
    prompt::ModelText,
};
use futures_util::StreamExt;
use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};
use tracing::{info, warn};
use types::{FinishReason, GenerateError, RequestId, TokenEvent, TokenId, TokenLogprobs, TokenStream};

/// How an answer's text is to be read.
#[derive(Debug, Clone, Default)]
pub(crate) struct AnswerFormat {
    /// The model writes messages with headers, as gpt-oss does.
    pub(crate) harmony: bool,
    pub(crate) reasoning: Option<(ReasoningFormat, Start)>,
    pub(crate) tools: Option<(ToolFormat, Arc<[Tool]>)>,
    /// The answer ends with its first call.
    pub(crate) one_call: bool,
}

impl AnswerFormat {
    /// Special tokens that the parsers must see.
    pub(crate) fn shown(&self, text: &ModelText) -> Shown {
        let reasoning = self.reasoning.iter().flat_map(|(format, _)| [format.open, format.close]);
        let tools = self.tools.iter().flat_map(|(format, _)| format.syntax().shown());
        let harmony = HarmonyParser::MARKERS.into_iter().filter(|_| self.harmony);
        let markers: HashSet<&str> = reasoning.chain(tools).chain(harmony).collect();
        let special = text.special_tokens().iter();
        let is_part = |content: &str| markers.iter().any(|marker| marker.contains(content));
        let shown = special.filter(|(content, _)| is_part(content)).map(|&(_, id)| id);
        let shown: Arc<[TokenId]> = shown.collect();
        if shown.is_empty() { Shown::None } else { Shown::Some(shown) }
    }

    /// Whether reasoning is told apart from the answer.
    fn tells_reasoning(&self) -> bool {
        self.harmony || self.reasoning.is_some()
    }

    fn parser(&self) -> AnswerParser {
        AnswerParser {
            harmony: self.harmony.then(HarmonyParser::new),
            reasoning: self.reasoning.map(|(format, start)| ReasoningParser::new(format, start)),
            tools: self.tools.clone().map(|(format, tools)| ToolParser::new(format, tools)),
        }
    }
}

/// How an answer is made of its tokens.
#[derive(Debug, Clone)]
pub(crate) struct OutputSettings {
    pub(crate) format: AnswerFormat,
    pub(crate) stop_strings: Vec<String>,
    /// The text ends after the stop string, not before it.
    pub(crate) include_stop: bool,
    /// Whether tokens are told of beside their text.
    pub(crate) logprobs: bool,
    /// Nothing is wanted but what there is to tell of the prompt.
    pub(crate) prompt_only: bool,
    /// What the client calls the grammar.
    pub(crate) grammar_param: &'static str,
    /// Hears where a stop string is the end: what generates does not know it.
    pub(crate) board: Arc<Board>,
}

/// An answer being generated. Dropping it cancels the request.
pub(crate) struct Output {
    id: RequestId,
    /// None once the answer has ended: the request is over or cancelled.
    events: Option<TokenStream>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    parser: AnswerParser,
    parts: Parts,
    settings: OutputSettings,
    ready: VecDeque<AnswerEvent>,
    prompt: Arc<[TokenId]>,
    /// Tokens of it that were told of.
    prompt_told: usize,
    /// As soon as the node said so.
    cached_tokens: Option<u32>,
    tokens: u32,
    reasoning_tokens: u32,
    calls: usize,
    /// Whether the only call that may be has ended: nothing more is told.
    is_over: bool,
    /// Bytes of text that came, and of these, that the stop strings let through.
    text_bytes: usize,
    released_bytes: usize,
    /// Tokens whose text is held back, each with where it begins.
    untold: VecDeque<(usize, TokenInfo)>,
}

impl Output {
    pub(crate) fn new(
        id: RequestId,
        events: TokenStream,
        detokenizer: Detokenizer,
        settings: OutputSettings,
        prompt: Arc<[TokenId]>,
    ) -> Self {
        Self {
            id,
            events: Some(events),
            detokenizer,
            stops: StopMatcher::new(&settings.stop_strings, settings.include_stop),
            parser: settings.format.parser(),
            parts: Parts::default(),
            settings,
            ready: VecDeque::new(),
            prompt,
            prompt_told: 0,
            cached_tokens: None,
            tokens: 0,
            reasoning_tokens: 0,
            calls: 0,
            is_over: false,
            text_bytes: 0,
            released_bytes: 0,
            untold: VecDeque::new(),
        }
    }

    /// What became known next; none after the end or an error.
    pub(crate) async fn next(&mut self) -> Option<Result<AnswerEvent, ApiError>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            let event = self.events.as_mut()?.next().await;
            match self.take(event) {
                Ok(ended) => {
                    self.tell_parts();
                    let over = || self.is_over.then(|| self.ending(EndReason::Stop, None));
                    if let Some(ending) = ended.or_else(over) {
                        self.settings.board.stopped(self.id);
                        self.events = None;
                        self.end(ending);
                    }
                }
                Err(error) => {
                    self.events = None;
                    warn!(id = %self.id, tokens = self.tokens, %error, "text broke off");
                    return Some(Err(error));
                }
            }
        }
    }

    /// Waits for the first event, so long at most, which stays to be had from [`Output::next`]; an error does not.
    pub(crate) async fn await_first(&mut self, time_max: Duration) -> Result<(), ApiError> {
        match tokio::time::timeout(time_max, self.next()).await {
            Ok(Some(Ok(event))) => self.ready.push_front(event),
            Ok(Some(Err(error))) => return Err(error),
            Ok(None) | Err(_) => {}
        }
        Ok(())
    }

    fn take(&mut self, event: Option<TokenEvent>) -> Result<Option<Ending>, ApiError> {
        match event {
            Some(TokenEvent::Started { cached_tokens }) => {
                self.cached_tokens = Some(cached_tokens);
                Ok(self.settings.prompt_only.then(|| self.ending(EndReason::Length, None)))
            }
            Some(TokenEvent::Prompt { index, logprobs }) => {
                self.take_prompt(index, logprobs)?;
                Ok(None)
            }
            Some(TokenEvent::Tokens { index, tokens, logprobs }) => {
                if self.settings.prompt_only {
                    return Ok(Some(self.ending(EndReason::Length, None)));
                }
                if index != self.tokens {
                    let message = format!("token {index} came where {} was due", self.tokens);
                    return Err(GenerateError::Engine { message }.into());
                }
                self.take_tokens(&tokens, logprobs)
            }
            Some(TokenEvent::Finished(finish)) => {
                let reason = match finish.reason {
                    FinishReason::Stop => EndReason::Stop,
                    FinishReason::Length => EndReason::Length,
                    FinishReason::Cancelled => return Err(ApiError::Cancelled),
                    FinishReason::Failed(error) => {
                        return Err(in_client_words(error, self.settings.grammar_param));
                    }
                };
                let (reason, stop) = self.last_text(reason)?;
                let mut ending = self.ending(reason, stop);
                ending.usage.prompt_tokens = finish.usage.prompt_tokens;
                ending.usage.cached_tokens = Some(finish.usage.cached_tokens);
                ending.usage.drafts = Some((finish.usage.accepted_drafts, finish.usage.rejected_drafts));
                if !self.settings.prompt_only {
                    ending.usage.completion_tokens = finish.usage.completion_tokens;
                }
                Ok(Some(ending))
            }
            None => {
                let message = "its events ended without a last one".to_owned();
                Err(GenerateError::Engine { message }.into())
            }
        }
    }

    fn take_prompt(&mut self, index: u32, logprobs: Vec<Option<TokenLogprobs>>) -> Result<(), ApiError> {
        let (from, to) = (index as usize, index as usize + logprobs.len());
        if from != self.prompt_told || to > self.prompt.len() {
            let message =
                format!("tokens {from}..{to} of the prompt came where {} was due", self.prompt_told);
            return Err(GenerateError::Engine { message }.into());
        }
        let tokens = self.prompt[from..to].iter().zip(logprobs);
        let infos = tokens.map(|(&token, logprobs)| TokenInfo { token, logprobs }).collect();
        self.prompt_told = to;
        self.ready.push_back(AnswerEvent::Prompt(infos));
        Ok(())
    }

    /// Token by token, so that those after a stop string are not counted.
    fn take_tokens(
        &mut self,
        tokens: &[TokenId],
        logprobs: Vec<TokenLogprobs>,
    ) -> Result<Option<Ending>, ApiError> {
        let mut logprobs = logprobs.into_iter();
        let mut piece = String::new();
        for &token in tokens {
            self.tokens += 1;
            piece.clear();
            self.detokenizer.push(token, &mut piece).map_err(|message| ApiError::Tokenizer { message })?;
            if self.settings.logprobs {
                let logprobs = logprobs.next();
                self.untold.push_back((self.text_bytes, TokenInfo { token, logprobs }));
            }
            let was_reasoning = self.parser.is_reasoning();
            let stop = self.push_text(&piece);
            self.reasoning_tokens += u32::from(was_reasoning || self.parser.is_reasoning());
            if let Some(stop) = stop {
                return Ok(Some(self.ending(EndReason::Stop, Some(stop))));
            }
        }
        Ok(None)
    }

    /// Takes a piece of the text; the stop string that it completes.
    fn push_text(&mut self, piece: &str) -> Option<String> {
        if piece.is_empty() {
            return None;
        }
        self.text_bytes += piece.len();
        let released = self.stops.push(piece);
        self.released_bytes += released.text.len();
        self.parser.push(&released.text, &mut self.parts);
        released.stopped
    }

    /// What was held back, since nothing follows.
    fn last_text(&mut self, reason: EndReason) -> Result<(EndReason, Option<String>), ApiError> {
        if self.settings.prompt_only {
            return Ok((EndReason::Length, None));
        }
        let mut piece = String::new();
        self.detokenizer.finish(&mut piece).map_err(|message| ApiError::Tokenizer { message })?;
        if let Some(stop) = self.push_text(&piece) {
            return Ok((EndReason::Stop, Some(stop)));
        }
        let held = self.stops.finish();
        self.parser.push(&held, &mut self.parts);
        self.released_bytes = usize::MAX;
        Ok((reason, None))
    }

    fn ending(&self, reason: EndReason, stop_string: Option<String>) -> Ending {
        let usage = TextUsage {
            prompt_tokens: u32::try_from(self.prompt.len()).unwrap_or(u32::MAX),
            completion_tokens: self.tokens,
            cached_tokens: self.cached_tokens,
            reasoning_tokens: self.settings.format.tells_reasoning().then_some(self.reasoning_tokens),
            drafts: None,
        };
        Ending { reason, stop_string, usage }
    }

    /// Queues what there is to tell: tokens whose text was let through, then the text's parts.
    fn tell_parts(&mut self) {
        let released = self.released_bytes;
        let told = self.untold.partition_point(|&(begin, _)| begin < released);
        if told > 0 {
            let infos = self.untold.drain(..told).map(|(_, info)| info).collect();
            self.ready.push_back(AnswerEvent::Tokens(infos));
        }
        for part in std::mem::take(&mut self.parts).0 {
            if !self.is_over {
                self.is_over = self.settings.format.one_call && part == Part::CallEnd;
                self.tell(part);
            }
        }
    }

    fn tell(&mut self, part: Part) {
        let call = self.calls.saturating_sub(1);
        self.ready.push_back(match part {
            Part::Reasoning(text) => AnswerEvent::Reasoning(text),
            Part::Content(text) => AnswerEvent::Content(text),
            Part::Call(name) => {
                let call = self.calls;
                self.calls += 1;
                AnswerEvent::ToolCall { call, id: self.call_id(call), name }
            }
            Part::Arguments(text) => AnswerEvent::Arguments { call, text },
            Part::CallEnd => AnswerEvent::ToolCallEnd { call },
        });
    }

    fn end(&mut self, mut ending: Ending) {
        self.parser.finish(&mut self.parts);
        self.tell_parts();
        if ending.reason == EndReason::Stop && self.calls > 0 {
            ending.reason = EndReason::ToolCalls;
        }
        let (tokens, prompt_tokens) = (self.tokens, self.prompt.len());
        info!(id = %self.id, tokens, prompt_tokens, reason = ?ending.reason, calls = self.calls, "text ended");
        self.ready.push_back(AnswerEvent::Ended(ending));
    }

    /// Unlike any other call's.
    fn call_id(&self, call: usize) -> String {
        let mut seed = self.id.0.to_le_bytes().to_vec();
        seed.extend(call.to_le_bytes());
        let short = self.settings.format.tools.as_ref().is_some_and(|(format, _)| format.syntax().short_ids);
        if short { short_id(&seed) } else { format!("call_{}", &blake3::hash(&seed).to_hex()[..24]) }
    }
}

/// Nine letters and digits, by whatever there is.
pub(crate) fn short_id(seed: &[u8]) -> String {
    const DIGITS: &[u8; 32] = b"ABCDEFGHJKLMNPQRSTUVWXYZ23456789";
    let hash = blake3::hash(seed);
    hash.as_bytes()[..9].iter().map(|&byte| char::from(DIGITS[usize::from(byte) % 32])).collect()
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.events.is_some() {
            info!(id = %self.id, tokens = self.tokens, "cancelled: the client went away");
        }
    }
}

#[cfg(test)]
#[path = "output_tests.rs"]
mod tests;
