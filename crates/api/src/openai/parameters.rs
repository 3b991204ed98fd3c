//! The parameters that both completion requests share, checked.

use super::values::{LogitBias, PriorityValue, Seed, SpeculationValue, Strings};
use crate::{
    caller::{Caller, SESSION_HEADER},
    error::ApiError,
    limits::CHOICES_MAX,
};
use types::{
    AffinityKey, CacheScope, GenerateRequestError, ModelCard, OutputRules, SamplingDraft, SamplingParams,
    Service, SessionId, TokenId, TokenReport, limits,
};

/// The fields as a client gives them; `default()` is all of them left out.
#[derive(Debug, Clone, Default)]
pub(crate) struct RawParameters {
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) presence_penalty: Option<f32>,
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) logit_bias: LogitBias,
    pub(crate) seed: Option<Seed>,
    pub(crate) stop: Strings,
    pub(crate) stop_token_ids: Vec<TokenId>,
    pub(crate) ignore_eos: bool,
    pub(crate) max_tokens: Option<i64>,
    pub(crate) max_completion_tokens: Option<i64>,
    pub(crate) session_id: Option<String>,
    pub(crate) prompt_cache_key: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) cache_salt: Option<String>,
    pub(crate) priority: Option<PriorityValue>,
    pub(crate) ttft_target_ms: Option<i64>,
    pub(crate) tpot_target_ms: Option<i64>,
    /// Answers to each prompt.
    pub(crate) n: Option<i64>,
    /// Answers to draw for each prompt, of which the `n` most probable are given.
    pub(crate) best_of: Option<i64>,
    /// Most probable alternatives to tell of each token of the answer; none: no log-probabilities.
    pub(crate) logprobs: Option<i64>,
    /// The same for the prompt.
    pub(crate) prompt_logprobs: Option<i64>,
    /// What the client calls the former.
    pub(crate) logprobs_param: &'static str,
    pub(crate) min_tokens: Option<i64>,
    /// What the answer is expected to be like.
    pub(crate) prediction: String,
    pub(crate) speculation: SpeculationValue,
    /// The text ends after the stop string that ends it.
    pub(crate) include_stop: bool,
    /// Special tokens show as text.
    pub(crate) show_special: bool,
    /// `max_tokens` may be 0: nothing is wanted but what there is to tell of the prompt.
    pub(crate) may_be_nothing: bool,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

/// The fields, each in its range.
#[derive(Debug, Clone)]
pub(crate) struct Parameters {
    sampling: SamplingParams,
    /// Whether the client chose the seed.
    seeded: bool,
    /// None when the client left it to the endpoint; 0: only the prompt is of interest.
    pub(crate) max_tokens: Option<u32>,
    /// What the client calls that.
    pub(crate) max_tokens_param: &'static str,
    /// Answers to each prompt.
    pub(crate) n: usize,
    /// Answers drawn for each prompt, if these are more.
    best_of: Option<usize>,
    pub(crate) rules: OutputRules,
    pub(crate) report: TokenReport,
    /// Whether the client asks for log-probabilities of the answer.
    pub(crate) logprobs_told: bool,
    /// What the answer is expected to be like.
    pub(crate) prediction: String,
    /// Whether its tokens may be guessed ahead.
    pub(crate) speculates: bool,
    pub(crate) include_stop: bool,
    pub(crate) show_special: bool,
    pub(crate) stop_strings: Vec<String>,
    pub(crate) stop_tokens: Vec<TokenId>,
    pub(crate) ignore_eos: bool,
    pub(crate) service: Service,
    pub(crate) cache: CacheScope,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

impl RawParameters {
    /// Checks every range. Temperature is 1 unless given, as at OpenAI; a session in the body counts before one in a header.
    pub(crate) fn check(self, card: &ModelCard, caller: &Caller) -> Result<Parameters, ApiError> {
        card.must_generate()?;
        let stop_strings = check_stop_strings(self.stop.0)?;
        if self.stop_token_ids.len() > limits::STOP_TOKENS_MAX {
            let (count, max) = (self.stop_token_ids.len(), limits::STOP_TOKENS_MAX);
            let message = format!("stop_token_ids has {count} tokens; at most {max} are allowed");
            return Err(ApiError::parameter("stop_token_ids", message));
        }
        check_tokens("stop_token_ids", &self.stop_token_ids, card)?;
        for &(token, _) in &self.logit_bias.0 {
            check_tokens("logit_bias", &[token], card)?;
        }
        let (max_tokens_param, wanted) = match self.max_completion_tokens {
            Some(value) => ("max_completion_tokens", Some(value)),
            None => ("max_tokens", self.max_tokens),
        };
        let max_tokens = match wanted {
            _ if self.may_be_nothing && self.max_tokens == Some(0) => Some(0),
            Some(value) => Some(check_range(max_tokens_param, value, 1, limits::NEW_TOKENS_MAX)?),
            None => None,
        };
        let n = check_count("n", self.n, 1)?.unwrap_or(1);
        let best_of = check_count("best_of", self.best_of, n)?;
        if best_of.is_some_and(|best_of| best_of > n) && self.stream {
            let message =
                format!("best_of is {} and n is {n}; they must be equal in a stream", best_of.unwrap_or(n));
            return Err(ApiError::parameter("best_of", message));
        }
        let best_of = best_of.filter(|&best_of| best_of > n);
        let told = |param, value: Option<i64>| {
            value.map(|value| check_range(param, value, 0, limits::LOGPROBS_MAX)).transpose()
        };
        let report = TokenReport {
            // Answers are compared by how probable they are.
            logprobs: told(self.logprobs_param, self.logprobs)?.or_else(|| best_of.map(|_| 0)),
            prompt_logprobs: told("prompt_logprobs", self.prompt_logprobs)?,
        };
        let min_tokens = check_range("min_tokens", self.min_tokens.unwrap_or(0), 0, limits::NEW_TOKENS_MAX)?;
        let cache = CacheScope {
            salt: check_salt(self.cache_salt)?,
            session: match (self.session_id, &caller.session) {
                (Some(name), _) => Some(check_session("session_id", name)?),
                (None, Some(name)) => Some(check_session(SESSION_HEADER, name.clone())?),
                (None, None) => None,
            },
        };
        // Whoever names nothing goes wherever it is best.
        let names = [cache.session.as_ref().map(SessionId::as_str), self.prompt_cache_key.as_deref()];
        let name = names.into_iter().chain([self.user.as_deref()]).flatten().find(|name| !name.is_empty());
        let target = |param, value: Option<i64>| {
            value.map(|value| check_range(param, value, 1, limits::TARGET_MS_MAX)).transpose()
        };
        let service = Service {
            client: caller.client,
            priority: self.priority.map(|value| value.0).unwrap_or_default(),
            ttft_target_ms: target("ttft_target_ms", self.ttft_target_ms)?,
            tpot_target_ms: target("tpot_target_ms", self.tpot_target_ms)?,
            affinity: name.map(|name| AffinityKey::new(caller.client, name)),
        };
        let defaults = SamplingDraft::default();
        let draft = SamplingDraft {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            // OpenAI takes 0 for "the most probable token only".
            top_p: self
                .top_p
                .map_or(defaults.top_p, |top_p| if top_p == 0.0 { f32::MIN_POSITIVE } else { top_p }),
            top_k: check_top_k(self.top_k.unwrap_or(0))?,
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            logit_bias: self.logit_bias.0,
            seed: self.seed.map_or(0, |seed| seed.0),
        };
        Ok(Parameters {
            sampling: SamplingParams::try_from(draft)?,
            seeded: self.seed.is_some(),
            max_tokens,
            max_tokens_param,
            n,
            best_of,
            rules: OutputRules { grammar: None, min_tokens },
            report,
            logprobs_told: self.logprobs.is_some(),
            prediction: self.prediction,
            speculates: matches!(self.speculation, SpeculationValue::Auto),
            include_stop: self.include_stop,
            show_special: self.show_special,
            stop_strings,
            stop_tokens: self.stop_token_ids,
            ignore_eos: self.ignore_eos,
            service,
            cache,
            stream: self.stream,
            include_usage: self.include_usage,
        })
    }
}

impl Parameters {
    /// Answers to draw for each prompt.
    pub(crate) fn drawn(&self) -> usize {
        self.best_of.unwrap_or(self.n)
    }

    /// What the client calls that number.
    pub(crate) fn drawn_param(&self) -> &'static str {
        if self.best_of.is_some() { "best_of" } else { "n" }
    }

    /// How the tokens of one of the choices are drawn. Where the client chose a seed, each choice has one of its own that
    /// follows from it, the first one that seed itself; otherwise `random` is the seed.
    pub(crate) fn sampling(&self, random: u64, choice: usize) -> SamplingParams {
        let of_choice = (choice as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let seed = if self.seeded { self.sampling.seed ^ of_choice } else { random };
        let draft = SamplingDraft { seed, ..self.sampling.clone().into() };
        SamplingParams::try_from(draft).expect("valid before, and any seed is")
    }
}

/// Whether all are in the model's vocabulary.
pub(crate) fn check_tokens(
    param: &'static str,
    tokens: &[TokenId],
    card: &ModelCard,
) -> Result<(), ApiError> {
    match tokens.iter().find(|&&token| token >= card.vocab_size) {
        None => Ok(()),
        Some(token) => {
            let size = card.vocab_size;
            let message = format!("{param} has the token {token}; the model's vocabulary has {size} tokens");
            Err(ApiError::parameter(param, message))
        }
    }
}

fn check_range(param: &'static str, value: i64, min: u32, max: u32) -> Result<u32, ApiError> {
    let in_range = u32::try_from(value).ok().filter(|value| (min..=max).contains(value));
    in_range.ok_or_else(|| {
        ApiError::parameter(param, format!("{param} is {value}; it must be from {min} to {max}"))
    })
}

/// A number of answers.
fn check_count(param: &'static str, value: Option<i64>, min: usize) -> Result<Option<usize>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    match usize::try_from(value).ok().filter(|value| (min..=CHOICES_MAX).contains(value)) {
        Some(value) => Ok(Some(value)),
        None => {
            let message = format!("{param} is {value}; it must be from {min} to {CHOICES_MAX}");
            Err(ApiError::parameter(param, message))
        }
    }
}

/// Checked here and not only with the whole request, since it may be replaced by then.
fn check_salt(salt: Option<String>) -> Result<Option<String>, ApiError> {
    let bytes = salt.as_ref().map_or(0, String::len);
    if bytes > limits::CACHE_SALT_BYTES_MAX {
        let error = GenerateRequestError::CacheSaltTooLong { bytes };
        return Err(ApiError::parameter("cache_salt", error.to_string()));
    }
    Ok(salt)
}

fn check_session(param: &'static str, name: String) -> Result<SessionId, ApiError> {
    name.try_into().map_err(|error: types::SessionIdError| ApiError::parameter(param, error.to_string()))
}

/// 0 and -1 both keep all tokens.
fn check_top_k(value: i64) -> Result<u32, ApiError> {
    let in_range = u32::try_from(value.max(0)).ok().filter(|_| value >= -1);
    let allowed = "-1 or 0 (all tokens), or a number of tokens";
    in_range.ok_or_else(|| ApiError::parameter("top_k", format!("top_k is {value}; it must be {allowed}")))
}

fn check_stop_strings(stop: Vec<String>) -> Result<Vec<String>, ApiError> {
    let (count_max, bytes_max) = (limits::STOP_STRINGS_MAX, limits::STOP_STRING_BYTES_MAX);
    if stop.len() > count_max {
        let message = format!("stop has {} strings; at most {count_max} are allowed", stop.len());
        return Err(ApiError::parameter("stop", message));
    }
    for (index, text) in stop.iter().enumerate() {
        if text.is_empty() || text.len() > bytes_max {
            let bytes = text.len();
            let message = format!("stop[{index}] has {bytes} bytes; it must have from 1 to {bytes_max}");
            return Err(ApiError::parameter("stop", message));
        }
    }
    Ok(stop)
}
