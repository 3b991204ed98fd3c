//! A request through the router: placed, tried elsewhere while no token has come, and streamed straight to its consumer.
//! And what a router asks all nodes at once: their sessions.

use crate::assets::AssetsCache;
use crate::dispatch::{Ask, Dispatch, Place};
use crate::settings::{ENGINE_FAILURES_MAX, ROUTER_WAIT_MAX, TRIES_MAX};
use futures_util::{StreamExt, future::join_all, stream};
use std::sync::Arc;
use tokio::time::{Instant, timeout};
use types::{
    AssetsHash, BoxFuture, ClusterView, Directory, Finish, FinishReason, Generate, GenerateError,
    GenerateRequest, Generation, ModelAssets, ModelCard, NodeId, NodeSession, SessionAnswers, SessionRequest,
    Sessions, TokenEvent, TokenStream, Usage, limits,
};

/// The router as its process uses it. Clones share it.
#[derive(Clone)]
pub(crate) struct RouterHandle {
    pub(crate) dispatch: Arc<Dispatch>,
    pub(crate) assets: Arc<AssetsCache>,
}

impl Generate for RouterHandle {
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Generation, GenerateError>> {
        Box::pin(async move {
            let mut tries = Tries::new(self.dispatch.clone(), request);
            let (place, events) = tries.next(None).await?;
            let route = place.info.clone();
            Ok(Generation { route, events: retried_stream(tries, place, events) })
        })
    }
}

impl Directory for RouterHandle {
    fn models(&self) -> Vec<ModelCard> {
        self.dispatch.models()
    }

    fn assets(&self, hash: AssetsHash) -> BoxFuture<'_, Result<Arc<ModelAssets>, GenerateError>> {
        Box::pin(self.assets.get(hash, move || self.dispatch.holders(hash)))
    }

    fn view(&self) -> ClusterView {
        self.dispatch.view()
    }
}

impl Sessions for RouterHandle {
    fn sessions(&self, request: SessionRequest) -> BoxFuture<'_, SessionAnswers> {
        let asked = self.dispatch.session_holders().into_iter().map(|(node, node_name, target)| {
            let request = request.clone();
            async move {
                let answer = timeout(limits::SESSIONS_TIME_MAX, target.sessions(request)).await;
                let late = |_| Err(format!("no answer within {} s", limits::SESSIONS_TIME_MAX.as_secs()));
                (node, node_name, answer.unwrap_or_else(late))
            }
        });
        let asked = join_all(asked);
        Box::pin(async move {
            let mut answers = SessionAnswers::default();
            for (node, node_name, answer) in asked.await {
                match answer {
                    Ok(sessions) => {
                        answers.sessions.extend(sessions.into_iter().map(|session| NodeSession {
                            node,
                            node_name: node_name.clone(),
                            session,
                        }))
                    }
                    Err(reason) => {
                        tracing::info!(node = %node_name, reason, "did not tell of its sessions");
                        answers.incomplete.push(node_name);
                    }
                }
            }
            answers.sessions.sort_by(|one, two| {
                (&one.session.id, &one.node_name, one.node).cmp(&(&two.session.id, &two.node_name, two.node))
            });
            answers.incomplete.sort();
            answers
        })
    }
}

/// What is needed to try a request again, and what has been tried.
struct Tries {
    dispatch: Arc<Dispatch>,
    request: GenerateRequest,
    ask: Arc<Ask>,
    tried: Vec<NodeId>,
    /// Engines, or whole nodes, that failed while they had it.
    failures: usize,
    deadline: Instant,
}

impl Tries {
    fn new(dispatch: Arc<Dispatch>, request: GenerateRequest) -> Self {
        let ask = Arc::new(dispatch.ask(&request));
        let deadline = Instant::now() + ROUTER_WAIT_MAX;
        Self { dispatch, request, ask, tried: Vec::new(), failures: 0, deadline }
    }

    /// A node that had accepted it failed with `error`: whether it is worth another try.
    fn failed(&mut self, node: NodeId, error: &GenerateError) -> bool {
        self.tried.push(node);
        if matches!(error, GenerateError::NodeLost { .. } | GenerateError::Engine { .. }) {
            self.failures += 1;
        }
        error.is_retryable() && self.failures < ENGINE_FAILURES_MAX
    }

    /// Has the next node accept the request; `failed` is what the last one failed with.
    async fn next(&mut self, failed: Option<GenerateError>) -> Result<(Place, TokenStream), GenerateError> {
        let mut last = failed;
        loop {
            if let Some(error) = &last
                && (!error.is_retryable() || self.tried.len() >= TRIES_MAX)
            {
                return Err(error.clone());
            }
            let tried = last.is_some();
            let place = match self.dispatch.place(&self.ask, &self.tried, tried).await {
                Ok(place) => place,
                // That the other nodes cannot either says less than what the first one failed with.
                Err(error) => return Err(last.unwrap_or(error)),
            };
            let error = match place.target.generate(self.request.clone()).await {
                Ok(events) => {
                    place.accepted();
                    return Ok((place, events));
                }
                Err(error) => error,
            };
            tracing::debug!(request = %self.request.id, node = %place.info.node_name, %error, "refused");
            if matches!(error, GenerateError::Busy { .. }) && Instant::now() < self.deadline {
                // Others filled it since it last reported: not its fault, and it may be asked again.
                place.refused_busy();
            } else {
                self.tried.push(place.info.node);
            }
            last = Some(error);
        }
    }
}

enum Stage {
    /// No token yet: all that is needed to try elsewhere is kept.
    Waiting(Box<(Tries, Place, TokenStream)>),
    Streaming(Place, TokenStream),
    Ended,
}

/// The events of an accepted request; one that breaks off before its first token goes on elsewhere, unseen.
fn retried_stream(tries: Tries, place: Place, events: TokenStream) -> TokenStream {
    Box::pin(stream::unfold(Stage::Waiting(Box::new((tries, place, events))), next_event))
}

async fn next_event(stage: Stage) -> Option<(TokenEvent, Stage)> {
    match stage {
        Stage::Waiting(waiting) => {
            let (mut tries, mut place, mut events) = *waiting;
            loop {
                let event = events.next().await.unwrap_or_else(|| lost(&tries.request));
                let finish = match event {
                    TokenEvent::Tokens { .. } => {
                        place.first_token();
                        return Some((event, Stage::Streaming(place, events)));
                    }
                    TokenEvent::Finished(finish) => finish,
                };
                let error = match &finish.reason {
                    FinishReason::Failed(error) if tries.failed(place.info.node, error) => error.clone(),
                    _ => return Some((TokenEvent::Finished(finish), Stage::Ended)),
                };
                tracing::info!(request = %tries.request.id, node = %place.info.node_name, %error, "trying elsewhere");
                drop(place);
                match tries.next(Some(error)).await {
                    Ok(next) => (place, events) = next,
                    Err(error) => {
                        let finish = Finish { reason: FinishReason::Failed(error), usage: finish.usage };
                        return Some((TokenEvent::Finished(finish), Stage::Ended));
                    }
                }
            }
        }
        Stage::Streaming(place, mut events) => {
            // Its producers end every stream with a last event; `None` here is after it.
            let event = events.next().await?;
            let stage = match event {
                TokenEvent::Tokens { .. } => Stage::Streaming(place, events),
                TokenEvent::Finished(_) => Stage::Ended,
            };
            Some((event, stage))
        }
        Stage::Ended => None,
    }
}

fn lost(request: &GenerateRequest) -> TokenEvent {
    let error = GenerateError::NodeLost { tokens: 0, reason: "its stream ended without an end".to_owned() };
    let usage = Usage { prompt_tokens: request.prompt.len() as u32, ..Usage::default() };
    TokenEvent::Finished(Finish { reason: FinishReason::Failed(error), usage })
}
