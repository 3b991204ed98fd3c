//! How an [`Engine`] takes requests in: what it refuses, and when their tokens are due.

use super::{Engine, State};
use crate::{
    SequenceId,
    grammar::Matcher,
    memory::Held,
    sequence::{self, Sequence, Targets},
    settings::TARGET_MAX,
};
use std::time::{Duration, Instant};
use types::{BLOCK_TOKENS, Finish, FinishReason, GenerateError, GenerateRequest, TokenEvent, Usage, limits};

/// A prompt's first token is due after the TTFT target plus this many times the seconds that reading it alone takes: long
/// prompts may wait for short ones, and for long ones that came before.
const TTFT_STRETCH: f64 = 2.0;
/// A prompt is read in good time within half of the time to its deadline, but not sooner than within the first nor later
/// than within the second of these multiples of what reading it alone takes: who sends a long prompt waits anyway, and
/// gentleness must not make a fast machine slow.
const GOOD_STRETCH: [f64; 2] = [1.75, 4.0];
/// The same where no request waits behind it: nobody but its sender gains by haste.
const CALM_STRETCH: [f64; 2] = [4.0, 8.0];
/// Shortest `Retry-After` in seconds: a few steps.
const RETRY_AFTER_MIN_S: f64 = 0.1;
/// Longest `Retry-After` in seconds: what runs is predicted by its `max_tokens`, and most texts end long before.
const RETRY_AFTER_MAX_S: f64 = 30.0;

impl Engine {
    /// Takes a request into the waiting queue. One that brings a part of its answer goes on after it, as if that had been
    /// drawn here.
    ///
    /// # Errors
    /// [`GenerateError::Unavailable`] when draining or after a failure, [`GenerateError::UnknownModel`],
    /// [`GenerateError::Invalid`] for tokens outside the vocabulary, an id that is in use, or a grammar, which must be
    /// compiled first; [`GenerateError::ContextExceeded`] for what can never fit, [`GenerateError::Busy`] when the queue is
    /// full.
    pub fn submit(&mut self, now: Instant, request: GenerateRequest) -> Result<(), GenerateError> {
        if request.rules.grammar.is_some() {
            return Err(invalid("the grammar was not compiled".to_owned(), "grammar"));
        }
        self.enqueue(now, request, None)
    }

    /// [`Engine::submit`] for a request with a grammar: `matcher` is at the beginning of the texts that it allows.
    ///
    /// # Errors
    /// As from [`Engine::submit`], and [`GenerateError::Invalid`] where the answer so far is not in the grammar.
    pub fn submit_under(
        &mut self,
        now: Instant,
        request: GenerateRequest,
        mut matcher: Matcher,
    ) -> Result<(), GenerateError> {
        for &token in &request.output {
            matcher.consume(token).map_err(|error| invalid(error.to_string(), "output"))?;
        }
        self.enqueue(now, request, Some(matcher))
    }

    /// Whether [`Engine::submit`] would take a request now, its grammar aside.
    ///
    /// # Errors
    /// As from [`Engine::submit`].
    pub fn check(&self, request: &GenerateRequest) -> Result<(), GenerateError> {
        self.check_request(request)?;
        // Slots that are free count: what is submitted between two steps has not been admitted yet.
        let most = self.model.limits().slots + limits::ENGINE_WAITING_MAX;
        if self.waiting.len() + self.running.len() >= most {
            let wait_s = self.seconds_to_free_slot().clamp(RETRY_AFTER_MIN_S, RETRY_AFTER_MAX_S);
            return Err(GenerateError::Busy { retry_after_ms: (wait_s * 1000.0).ceil() as u64 });
        }
        Ok(())
    }

    fn enqueue(
        &mut self,
        now: Instant,
        request: GenerateRequest,
        matcher: Option<Matcher>,
    ) -> Result<(), GenerateError> {
        self.check(&request)?;
        if matcher.as_ref().is_some_and(Matcher::is_complete) {
            // All that was lost with the node that it comes from is the word that this is the end.
            let usage = Usage {
                prompt_tokens: request.prompt.len() as u32,
                completion_tokens: request.output.len() as u32,
                ..Usage::default()
            };
            let finish = Finish { reason: FinishReason::Stop, usage };
            self.ended.push((request.id, TokenEvent::Finished(finish)));
            return Ok(());
        }
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        // Of a prompt whose tokens are told of nothing may be left out.
        let cached = self.settings.prefix_cache && request.report.prompt_logprobs.is_none();
        let root = cached.then(|| request.cache.root(self.model.card().root));
        let given = [request.prompt.as_slice(), &request.output].concat();
        let held = Held::new(root, &given);
        let cached = self.memory.matched(held.reusable(given.len())).0 * BLOCK_TOKENS;
        let target = |given: Option<u32>, usual: Duration| {
            given.map_or(usual, |ms| Duration::from_millis(u64::from(ms)).min(TARGET_MAX))
        };
        let alone_s = self.cost.first_slice_seconds() + self.cost.slice_seconds(cached, given.len() - cached);
        let stretched = |by: f64| Duration::from_secs_f64((by * alone_s).min(TARGET_MAX.as_secs_f64()));
        let allowed =
            target(request.service.ttft_target_ms, self.settings.ttft_target) + stretched(TTFT_STRETCH);
        let between = |[least, most]: [f64; 2]| (allowed / 2).clamp(stretched(least), stretched(most));
        let targets = Targets {
            arrived: now,
            first_due: now + allowed,
            good_due: now + between(GOOD_STRETCH),
            calm_due: now + between(CALM_STRETCH),
            tpot: target(request.service.tpot_target_ms, self.settings.tpot_target),
        };
        let sequence = Sequence::new(id, request, self.model.card(), matcher, held, targets);
        self.shares.enter(sequence.client);
        if let Some(session) = &sequence.session {
            self.memory.touch_session(session, now);
        }
        self.waiting.push(sequence);
        Ok(())
    }

    fn check_request(&self, request: &GenerateRequest) -> Result<(), GenerateError> {
        let card = self.model.card();
        let unavailable = match &self.state {
            State::Serving => None,
            State::Draining => Some("it is draining".to_owned()),
            State::Failed(error) => Some(error.to_string()),
        };
        if let Some(reason) = unavailable {
            return Err(GenerateError::Unavailable { model: card.name.clone(), reason });
        }
        if request.model != card.name {
            let served = vec![card.name.clone()];
            return Err(GenerateError::UnknownModel { model: request.model.clone(), served });
        }
        let invalid = |message: String, param: &str| Err(invalid(message, param));
        let vocab = card.vocab_size;
        if let Some(at) = request.prompt.iter().position(|&token| token >= vocab) {
            let token = request.prompt[at];
            let message = format!("token {token} at position {at} of the prompt is not below {vocab}");
            return invalid(message, "prompt");
        }
        if let Some(token) = request.output.iter().find(|token| **token >= vocab) {
            return invalid(format!("token {token} of the answer so far is not below {vocab}"), "output");
        }
        if let Some(token) = request.speculation.prediction.iter().find(|token| **token >= vocab) {
            return invalid(format!("token {token} of the prediction is not below {vocab}"), "prediction");
        }
        if let Some((token, _)) = request.sampling.logit_bias.iter().find(|(token, _)| *token >= vocab) {
            return invalid(format!("token {token} of logit_bias is not below {vocab}"), "logit_bias");
        }
        let prompt_tokens = request.prompt.len() as u32;
        let tokens = u64::from(prompt_tokens) + u64::from(request.max_tokens);
        let blocks = self.model.limits().blocks;
        if tokens > u64::from(card.context_tokens) || sequence::most_blocks(request) > blocks {
            return Err(GenerateError::ContextExceeded {
                prompt_tokens,
                max_tokens: request.max_tokens,
                context_tokens: (card.context_tokens as usize).min(blocks * BLOCK_TOKENS) as u32,
            });
        }
        let in_use = self.waiting.iter().chain(&self.running).any(|sequence| sequence.request == request.id)
            || self.ended.iter().any(|(id, _)| *id == request.id);
        if in_use {
            return invalid(format!("a request with the id {} is already here", request.id), "id");
        }
        Ok(())
    }

    /// Seconds until the first running sequence will have ended, at the latest.
    fn seconds_to_free_slot(&self) -> f64 {
        let rows = self.running.len().max(1);
        let step_s = self.decode_seconds(rows);
        let left = |sequence: &Sequence| {
            self.cost.slice_seconds(sequence.submitted(), sequence.prefill_left())
                + step_s * f64::from(sequence.output_left())
        };
        self.running.iter().map(left).fold(RETRY_AFTER_MAX_S, f64::min)
    }
}

fn invalid(message: String, param: &str) -> GenerateError {
    GenerateError::Invalid { message, param: Some(param.to_owned()) }
}
