//! The cluster, with what it reads and writes booked on the client that asks.

use super::Rates;
use futures_util::StreamExt;
use std::{sync::Arc, time::Instant};
use types::{BoxFuture, Generate, GenerateError, GenerateRequest, Generation, TokenEvent};

/// Books the tokens of prompts when a request was accepted, and those of its answer as they come.
pub(crate) struct Metered {
    generate: Arc<dyn Generate>,
    rates: Arc<Rates>,
}

impl Metered {
    pub(crate) fn new(generate: Arc<dyn Generate>, rates: Arc<Rates>) -> Self {
        Self { generate, rates }
    }
}

impl Generate for Metered {
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Generation, GenerateError>> {
        let (client, prompt_tokens) = (request.service.client, request.prompt.len());
        Box::pin(async move {
            let Generation { route, events } = self.generate.generate(request).await?;
            self.rates.book(client, prompt_tokens, Instant::now());
            let rates = self.rates.clone();
            let events = events.inspect(move |event| {
                if let TokenEvent::Tokens { tokens, .. } = event {
                    rates.book(client, tokens.len(), Instant::now());
                }
            });
            Ok(Generation { route, events: events.boxed() })
        })
    }
}
