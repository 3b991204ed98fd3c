//! What each API key may ask for: requests and tokens by the minute, and requests at a time.
//!
//! [`Rates`] owns what every client has left. [`limit`] asks it before a request is read and holds the request's place until
//! its answer ends; [`Metered`] stands before the cluster and books the tokens of prompts and answers as they come. Tokens
//! are booked when they are known, so a request is refused where earlier ones left nothing, not by its own length.

mod bucket;
mod metered;

pub(crate) use metered::Metered;

use crate::{AppState, error::ApiError};
use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    http::Method,
    middleware::Next,
    response::{IntoResponse, Response},
};
use bucket::Bucket;
use hyper::body::{Frame, SizeHint};
use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};
use types::ClientId;

/// What each key may ask for; without keys, all clients together. None: as much as they like.
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
#[derive(Debug)]
pub(crate) struct Rates {
    limits: RateLimits,
    /// As many as there are keys at most: who has none is not let in, or is the one client that has no key.
    clients: Mutex<HashMap<ClientId, Client>>,
}

#[derive(Debug)]
struct Client {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    running: u32,
}

impl Rates {
    pub(crate) fn new(limits: RateLimits) -> Self {
        Self { limits, clients: Mutex::default() }
    }

    /// Takes a request's place, or says what it has to wait for.
    pub(crate) fn admit(self: &Arc<Self>, client: ClientId, now: Instant) -> Result<Place, RateError> {
        let mut clients = self.clients();
        let entry = self.entry(&mut clients, client, now);
        if let Some(limit) = self.limits.concurrent.filter(|&limit| entry.running >= limit) {
            let what = format!("have {limit} requests answered at a time");
            return Err(RateError { what, wait: CONCURRENT_WAIT });
        }
        let refuse = |bucket: &mut Option<Bucket>, limit: Option<u32>, of: &str| {
            let wait = bucket.as_mut().map(|bucket| bucket.wait(1.0, now)).filter(|wait| !wait.is_zero())?;
            let what = format!("use {} {of} by the minute", limit.unwrap_or_default());
            Some(RateError { what, wait })
        };
        let refused = refuse(&mut entry.requests, self.limits.requests_per_minute, "requests")
            .or_else(|| refuse(&mut entry.tokens, self.limits.tokens_per_minute, "tokens"));
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
        if self.limits.tokens_per_minute.is_none() {
            return;
        }
        let mut clients = self.clients();
        if let Some(bucket) = &mut self.entry(&mut clients, client, now).tokens {
            bucket.take(tokens as f64, now);
        }
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<ClientId, Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry<'a>(
        &self,
        clients: &'a mut HashMap<ClientId, Client>,
        client: ClientId,
        now: Instant,
    ) -> &'a mut Client {
        let bucket = |limit: Option<u32>| limit.map(|limit| Bucket::new(limit, now));
        clients.entry(client).or_insert_with(|| Client {
            requests: bucket(self.limits.requests_per_minute),
            tokens: bucket(self.limits.tokens_per_minute),
            running: 0,
        })
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
    if request.method() != Method::POST || state.settings.rates == RateLimits::default() {
        return next.run(request).await;
    }
    let client = request.extensions().get().copied().unwrap_or_default();
    let place = match state.rates.admit(client, Instant::now()) {
        Ok(place) => place,
        Err(error) => return ApiError::from(error).into_response(),
    };
    next.run(request).await.map(|body| Body::new(Held { body, _place: place }))
}

/// The body of an answer that holds its place, wherever it ends.
struct Held {
    body: Body,
    _place: Place,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
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
        let rates = Arc::new(Rates::new(limits(2, 0, 0)));
        let now = Instant::now();
        for client in [1, 2].map(ClientId) {
            assert!(rates.admit(client, now).is_ok() && rates.admit(client, now).is_ok());
            let error = rates.admit(client, now).expect_err("a third one");
            let expected = "this API key may use 2 requests by the minute; try again in 30 s";
            assert_eq!(error.to_string(), expected);
            assert!(rates.admit(client, now + MINUTE / 2).is_ok());
        }
    }

    #[test]
    fn tokens_are_booked_afterwards() {
        let rates = Arc::new(Rates::new(limits(0, 600, 0)));
        let (client, now) = (ClientId(0), Instant::now());
        assert!(rates.admit(client, now).is_ok());
        rates.book(client, 1200, now);
        assert_eq!(rates.admit(client, now).expect_err("600 too many").wait.as_secs_f64(), 60.1);
        assert!(rates.admit(client, now + MINUTE).is_err());
        assert!(rates.admit(client, now + MINUTE + Duration::from_millis(100)).is_ok());
    }

    #[test]
    fn a_place_is_given_back() {
        let rates = Arc::new(Rates::new(limits(0, 0, 1)));
        let now = Instant::now();
        let place = rates.admit(ClientId(1), now).expect("the first");
        assert_eq!(rates.admit(ClientId(1), now).expect_err("a second").wait, CONCURRENT_WAIT);
        assert!(rates.admit(ClientId(2), now).is_ok());
        drop(place);
        assert!(rates.admit(ClientId(1), now).is_ok());
    }
}
