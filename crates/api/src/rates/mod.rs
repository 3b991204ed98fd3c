//! What each API key may ask for: requests and tokens by the minute, and requests at a time.
//!
//! [`Rates`] owns what every client has left. [`limit`] asks it before a request is read and holds the request's place until
//! its answer ends; [`Metered`] stands before the cluster and books the tokens of prompts and answers as they come. Tokens
//! are booked when they are known, so a request is refused where earlier ones left nothing, not by its own length.

mod bucket;
mod metered;

pub(crate) use metered::Metered;

use crate::{AppState, error::ApiError, held::Held};
use axum::{
    extract::{Request, State},
    http::Method,
    middleware::Next,
    response::{IntoResponse, Response},
};
use bucket::Bucket;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use types::ClientId;

/// What a key may ask for; without keys, all clients together. None: as much as they like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RateLimits {
    /// Requests by the minute.
    pub requests_per_minute: Option<u32>,
    /// Tokens of prompts and answers by the minute.
    pub tokens_per_minute: Option<u32>,
    /// Requests that are being answered.
    pub concurrent: Option<u32>,
}

/// A request that has to wait.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("this API key may {what}; try again in {} s", wait.as_secs_f64().ceil().max(1.0))]
pub(crate) struct RateError {
    what: String,
    pub(crate) wait: Duration,
}

/// How long a client is told to wait that has too many requests at a time: nobody knows when one of them ends.
const CONCURRENT_WAIT: Duration = Duration::from_secs(1);

/// What every client has left.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    /// As many as there are keys, or were: who has none is not let in, or is the one client that has no key.
    clients: Mutex<HashMap<ClientId, Client>>,
}

#[derive(Debug, Default)]
struct Client {
    /// What the buckets were made for.
    limits: RateLimits,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    running: u32,
}

impl Rates {
    /// Takes a request's place, or says what it has to wait for.
    pub(crate) fn admit(
        self: &Arc<Self>,
        client: ClientId,
        limits: RateLimits,
        now: Instant,
    ) -> Result<Place, RateError> {
        let mut clients = self.clients();
        let entry = clients.entry(client).or_default();
        entry.bound(limits, now);
        if let Some(limit) = limits.concurrent.filter(|&limit| entry.running >= limit) {
            let what = format!("have {limit} requests answered at a time");
            return Err(RateError { what, wait: CONCURRENT_WAIT });
        }
        let refuse = |bucket: &mut Option<Bucket>, limit: Option<u32>, of: &str| {
            let wait = bucket.as_mut().map(|bucket| bucket.wait(1.0, now)).filter(|wait| !wait.is_zero())?;
            let what = format!("use {} {of} by the minute", limit.unwrap_or_default());
            Some(RateError { what, wait })
        };
        let refused = refuse(&mut entry.requests, limits.requests_per_minute, "requests")
            .or_else(|| refuse(&mut entry.tokens, limits.tokens_per_minute, "tokens"));
        if let Some(error) = refused {
            return Err(error);
        }
        if let Some(bucket) = &mut entry.requests {
            bucket.take(1.0, now);
        }
        entry.running += 1;
        Ok(Place { rates: self.clone(), client })
    }

    /// Books tokens that were read or written.
    pub(crate) fn book(&self, client: ClientId, tokens: usize, now: Instant) {
        let mut clients = self.clients();
        if let Some(bucket) = clients.get_mut(&client).and_then(|client| client.tokens.as_mut()) {
            bucket.take(tokens as f64, now);
        }
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<ClientId, Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Client {
    /// Holds it to these limits from now on; what others left of a bucket is forgotten.
    fn bound(&mut self, limits: RateLimits, now: Instant) {
        let bucket = |limit: Option<u32>| limit.map(|limit| Bucket::new(limit, now));
        if self.limits.requests_per_minute != limits.requests_per_minute {
            self.requests = bucket(limits.requests_per_minute);
        }
        if self.limits.tokens_per_minute != limits.tokens_per_minute {
            self.tokens = bucket(limits.tokens_per_minute);
        }
        self.limits = limits;
    }
}

/// A request that is being answered, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    rates: Arc<Rates>,
    client: ClientId,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(client) = self.rates.clients().get_mut(&self.client) {
            client.running -= 1;
        }
    }
}

/// Lets a request pass that its client may make. Only what is posted costs anything.
pub(crate) async fn limit(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let limits: RateLimits = request.extensions().get().copied().unwrap_or_default();
    if request.method() != Method::POST || limits == RateLimits::default() {
        return next.run(request).await;
    }
    let client = request.extensions().get().copied().unwrap_or_default();
    let place = match state.rates.admit(client, limits, Instant::now()) {
        Ok(place) => place,
        Err(error) => return ApiError::from(error).into_response(),
    };
    next.run(request).await.map(|body| Held::body(body, place))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn limits(requests: u32, tokens: u32, concurrent: u32) -> RateLimits {
        let some = |limit: u32| Some(limit).filter(|&limit| limit > 0);
        RateLimits {
            requests_per_minute: some(requests),
            tokens_per_minute: some(tokens),
            concurrent: some(concurrent),
        }
    }

    #[test]
    fn each_client_has_its_own() {
        let (rates, limits) = (Arc::<Rates>::default(), limits(2, 0, 0));
        let now = Instant::now();
        for client in [1, 2].map(ClientId) {
            assert!(rates.admit(client, limits, now).is_ok() && rates.admit(client, limits, now).is_ok());
            let error = rates.admit(client, limits, now).expect_err("a third one");
            let expected = "this API key may use 2 requests by the minute; try again in 30 s";
            assert_eq!(error.to_string(), expected);
            assert!(rates.admit(client, limits, now + MINUTE / 2).is_ok());
        }
    }

    #[test]
    fn tokens_are_booked_afterwards() {
        let (rates, limits) = (Arc::<Rates>::default(), limits(0, 600, 0));
        let (client, now) = (ClientId(0), Instant::now());
        assert!(rates.admit(client, limits, now).is_ok());
        rates.book(client, 1200, now);
        assert_eq!(rates.admit(client, limits, now).expect_err("600 too many").wait.as_secs_f64(), 60.1);
        assert!(rates.admit(client, limits, now + MINUTE).is_err());
        assert!(rates.admit(client, limits, now + MINUTE + Duration::from_millis(100)).is_ok());
    }

    #[test]
    fn a_place_is_given_back() {
        let (rates, limits) = (Arc::<Rates>::default(), limits(0, 0, 1));
        let now = Instant::now();
        let place = rates.admit(ClientId(1), limits, now).expect("the first");
        assert_eq!(rates.admit(ClientId(1), limits, now).expect_err("a second").wait, CONCURRENT_WAIT);
        assert!(rates.admit(ClientId(2), limits, now).is_ok());
        drop(place);
        assert!(rates.admit(ClientId(1), limits, now).is_ok());
    }

    #[test]
    fn other_limits_hold_at_once() {
        let rates = Arc::<Rates>::default();
        let (client, now) = (ClientId(1), Instant::now());
        let running = rates.admit(client, limits(1, 0, 0), now).expect("the first");
        assert!(rates.admit(client, limits(1, 0, 0), now).is_err());
        // Another bound, and what runs still counts.
        assert!(rates.admit(client, limits(2, 0, 1), now).is_err());
        drop(running);
        let _place = rates.admit(client, limits(2, 0, 1), now).expect("two by the minute now");
        assert!(rates.admit(client, RateLimits::default(), now).is_ok());
    }
}
