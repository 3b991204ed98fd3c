//! The router as its process uses it: it generates (`course.rs` has a request's way), knows the cluster, and reaches all
//! sessions at once.

use crate::assets::AssetsCache;
use crate::course;
use crate::dispatch::Dispatch;
use crate::embedding;
use futures_util::future::join_all;
use std::sync::Arc;
use tokio::time::timeout;
use types::{
    AssetsHash, BoxFuture, ClusterView, Directory, Embed, EmbedRequest, Embeddings, Generate, GenerateError,
    GenerateRequest, Generation, ModelAssets, ModelCard, NodeSession, RoutePlan, SessionAnswers,
    SessionRequest, Sessions, limits,
};

/// The router as its process uses it. Clones share it.
#[derive(Clone)]
pub(crate) struct RouterHandle {
    pub(crate) dispatch: Arc<Dispatch>,
    pub(crate) assets: Arc<AssetsCache>,
}

impl Generate for RouterHandle {
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Generation, GenerateError>> {
        Box::pin(course::start(self.dispatch.clone(), request))
    }
}

impl Embed for RouterHandle {
    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embeddings, GenerateError>> {
        Box::pin(embedding::embed(self.dispatch.clone(), request))
    }
}

impl Directory for RouterHandle {
    fn models(&self) -> Vec<ModelCard> {
        self.dispatch.models()
    }

    fn assets(&self, hash: AssetsHash) -> BoxFuture<'_, Result<Arc<ModelAssets>, GenerateError>> {
        Box::pin(self.assets.get(hash, move || self.dispatch.holders(hash)))
    }

    fn plan(&self, request: &GenerateRequest) -> Result<RoutePlan, GenerateError> {
        self.dispatch.plan(&self.dispatch.ask(request))
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
