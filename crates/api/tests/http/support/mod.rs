//! A scripted cluster: one model, answers written down in the test, and a record of what was asked and dropped.

#[expect(dead_code, reason = "the unit tests use the rest")]
pub(crate) mod tokenizers;

use api::{ApiSettings, ApiState, Operate, Reloaded, ServeSettings};
use axum::{
    Router,
    body::Body,
    http::{Request, Response},
};
use futures_util::{StreamExt, stream};
use http_body_util::BodyExt;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::watch;
use tower::ServiceExt;
use types::*;

/// The context of the scripted models.
pub(crate) const CONTEXT: u32 = 1000;

/// What the scripted cluster does with each request.
#[derive(Clone)]
pub(crate) enum Script {
    /// Refuses it.
    Refuse(GenerateError),
    /// Sends these events, and ends the stream.
    Events(Vec<TokenEvent>),
    /// Sends these events, each after a pause.
    Paced(Vec<TokenEvent>, Duration),
    /// Sends these events and then nothing.
    Hang(Vec<TokenEvent>),
    /// Sends the first of these to the first request, and so on.
    Each(Vec<Vec<TokenEvent>>),
}

pub(crate) struct Cluster {
    pub(crate) models: Vec<ModelCard>,
    pub(crate) assets: Vec<Arc<ModelAssets>>,
    pub(crate) view: ClusterView,
    pub(crate) script: Script,
    pub(crate) asked: Mutex<Vec<GenerateRequest>>,
    /// What was only to be planned.
    pub(crate) planned: Mutex<Vec<GenerateRequest>>,
    /// What there is to be told of sessions.
    pub(crate) sessions: Mutex<SessionAnswers>,
    /// What was asked of them.
    pub(crate) asked_sessions: Mutex<Vec<SessionRequest>>,
    /// Assets handed out.
    pub(crate) loads: AtomicUsize,
    /// Streams dropped before they had ended.
    pub(crate) cancelled: watch::Sender<usize>,
}

impl Cluster {
    /// A cluster that serves these models, each with the byte-level tokenizer and this template.
    pub(crate) fn new(models: &[&str], template: Option<&str>, script: Script) -> Arc<Self> {
        Self::with_special(models, template, script, &[])
    }

    /// The same with further special tokens, from id 259 on.
    pub(crate) fn with_special(
        models: &[&str],
        template: Option<&str>,
        script: Script,
        special: &[&str],
    ) -> Arc<Self> {
        let assets = Arc::new(ModelAssets {
            tokenizer_json: tokenizers::byte_level_with(special),
            chat_template: template.map(str::to_owned),
            bos_token: Some("<s>".to_owned()),
            eos_token: Some("<|im_end|>".to_owned()),
        });
        let card = |name: &&str| ModelCard {
            name: (*name).to_owned(),
            root: BlockHash::root(&[name.as_bytes()]),
            context_tokens: CONTEXT,
            vocab_size: 259 + special.len() as u32,
            eos_tokens: vec![257],
            assets: assets.hash(),
            created_s: 1_700_000_000,
            kind: if *name == "embed" { ModelKind::Embedder { dimensions: 4 } } else { ModelKind::Generator },
        };
        let models: Vec<ModelCard> = models.iter().map(card).collect();
        let node = NodeView {
            id: NodeId(1),
            name: "mini".to_owned(),
            local: true,
            address: None,
            hardware: "test".to_owned(),
            version: "0".to_owned(),
            engine: if models.is_empty() { EngineState::Loading } else { EngineState::Ready },
            models: models.clone(),
            load: None,
            rtt_s: None,
            cached_blocks: 0,
            prediction: NodePrediction::default(),
            avoided: false,
            pipeline: None,
        };
        let view = ClusterView { cluster: "home".to_owned(), nodes: vec![node], ..ClusterView::default() };
        Arc::new(Self {
            models,
            assets: vec![assets],
            view,
            script,
            asked: Mutex::default(),
            planned: Mutex::default(),
            sessions: Mutex::default(),
            asked_sessions: Mutex::default(),
            loads: AtomicUsize::default(),
            cancelled: watch::channel(0).0,
        })
    }

    pub(crate) fn app(self: &Arc<Self>) -> Router {
        self.app_with(ApiSettings::default())
    }

    pub(crate) fn app_with(self: &Arc<Self>, settings: ApiSettings) -> Router {
        let (generate, embed) = (self.clone(), self.clone());
        let (directory, sessions) = (self.clone(), self.clone());
        let operate = Arc::new(Operator::default());
        api::app(ApiState { generate, embed, directory, sessions, operate, settings })
    }

    /// The only request that was generated.
    pub(crate) fn asked_once(&self) -> GenerateRequest {
        let asked = self.asked.lock().unwrap();
        assert_eq!(asked.len(), 1);
        asked[0].clone()
    }
}

/// The vector that the scripted model makes of a text.
pub(crate) fn embedding(text: &[TokenId]) -> Vec<f32> {
    let (first, last) = (text[0] as f32, text[text.len() - 1] as f32);
    let numbers = if text == [97, 98] { [1.0; 4] } else { [first, last, text.len() as f32, 1.0] };
    let length = numbers.iter().map(|number| number * number).sum::<f32>().sqrt();
    numbers.map(|number| number / length).to_vec()
}

impl Embed for Cluster {
    fn embed(&self, request: EmbedRequest) -> BoxFuture<'_, Result<Embeddings, GenerateError>> {
        let vectors = request.inputs.iter().map(|input| embedding(input)).collect();
        let route = RouteInfo {
            node: NodeId(1),
            node_name: "mini".to_owned(),
            matched_tokens: 0,
            reason: "least work".to_owned(),
        };
        Box::pin(std::future::ready(Ok(Embeddings { route, vectors })))
    }
}

impl Generate for Cluster {
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Generation, GenerateError>> {
        let turn = {
            let mut asked = self.asked.lock().unwrap();
            asked.push(request);
            asked.len() - 1
        };
        let (events, pause, hang) = match self.script.clone() {
            Script::Refuse(error) => return Box::pin(async { Err(error) }),
            Script::Events(events) => (events, None, false),
            Script::Paced(events, pause) => (events, Some(pause), false),
            Script::Hang(events) => (events, None, true),
            Script::Each(mut answers) => (answers.swap_remove(turn), None, false),
        };
        let cancelled = self.cancelled.clone();
        let route = RouteInfo {
            node: NodeId(1),
            node_name: "mini ünïcode".to_owned(),
            matched_tokens: 32,
            reason: "affinity".to_owned(),
        };
        Box::pin(async move {
            let running = CancelGuard { cancelled, ended: false };
            let events =
                stream::unfold((running, events.into_iter()), move |(mut running, mut events)| async move {
                    if let Some(pause) = pause {
                        tokio::time::sleep(pause).await;
                    }
                    match events.next() {
                        Some(event) => {
                            running.ended = matches!(event, TokenEvent::Finished(_));
                            Some((event, (running, events)))
                        }
                        None if hang => std::future::pending().await,
                        None => None,
                    }
                });
            Ok(Generation { route, events: events.boxed() })
        })
    }
}

struct CancelGuard {
    cancelled: watch::Sender<usize>,
    ended: bool,
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        if !self.ended {
            self.cancelled.send_modify(|count| *count += 1);
        }
    }
}

impl Directory for Cluster {
    fn models(&self) -> Vec<ModelCard> {
        self.models.clone()
    }

    fn assets(&self, hash: AssetsHash) -> BoxFuture<'_, Result<Arc<ModelAssets>, GenerateError>> {
        self.loads.fetch_add(1, Ordering::Relaxed);
        let found = self.assets.iter().find(|assets| assets.hash() == hash).cloned();
        Box::pin(async move { Ok(found.unwrap()) })
    }

    fn plan(&self, request: &GenerateRequest) -> Result<RoutePlan, GenerateError> {
        self.planned.lock().unwrap().push(request.clone());
        match &self.script {
            Script::Refuse(error) => Err(error.clone()),
            _ => Ok(RoutePlan {
                model: request.model.clone(),
                prompt_tokens: request.prompt.len() as u32,
                max_tokens: request.max_tokens,
                route: None,
                waiting: 3,
                wait_s: Some(1.5),
                nodes: Vec::new(),
            }),
        }
    }

    fn view(&self) -> ClusterView {
        self.view.clone()
    }
}

/// As a node would, among the sessions that were written down.
impl Sessions for Cluster {
    fn sessions(&self, request: SessionRequest) -> BoxFuture<'_, SessionAnswers> {
        let mut answers = self.sessions.lock().unwrap().clone();
        answers.sessions.retain(|NodeSession { session, .. }| match &request {
            SessionRequest::List { client } => session.client == *client,
            SessionRequest::End { client, id } => session.client == *client && session.id == *id,
        });
        self.asked_sessions.lock().unwrap().push(request);
        Box::pin(std::future::ready(answers))
    }
}

/// One event with the bytes of a text as its tokens.
pub(crate) fn tokens(index: u32, text: &str) -> TokenEvent {
    TokenEvent::Tokens { index, tokens: text.bytes().map(TokenId::from).collect(), logprobs: Vec::new() }
}

/// One event for each byte of a text.
pub(crate) fn each_token(text: &str) -> Vec<TokenEvent> {
    let event = |(index, byte)| TokenEvent::Tokens {
        index: index as u32,
        tokens: vec![TokenId::from(byte)],
        logprobs: Vec::new(),
    };
    text.bytes().enumerate().map(event).collect()
}

/// An answer: a text, a token for each byte, then the end.
pub(crate) fn says(text: &str) -> Vec<TokenEvent> {
    let mut events = each_token(text);
    events.push(finished(FinishReason::Stop, text.len() as u32 + 1));
    events
}

/// How probable a token was, and the most probable ones.
pub(crate) fn probable(logprob: f32, top: &[(TokenId, f32)]) -> TokenLogprobs {
    TokenLogprobs { logprob, top: top.to_vec() }
}

/// The same answer with log-probabilities: each token has this one and is the only alternative.
pub(crate) fn says_with(text: &str, logprob: f32) -> Vec<TokenEvent> {
    let mut events = says(text);
    for event in &mut events {
        if let TokenEvent::Tokens { tokens, logprobs, .. } = event {
            *logprobs = tokens.iter().map(|&token| probable(logprob, &[(token, logprob)])).collect();
        }
    }
    events
}

pub(crate) fn finished(reason: FinishReason, completion_tokens: u32) -> TokenEvent {
    let usage = Usage { prompt_tokens: 20, cached_tokens: 8, completion_tokens, ..Usage::default() };
    TokenEvent::Finished(Finish { reason, usage })
}

pub(crate) fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(body.into()).unwrap()
}

pub(crate) fn get(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).unwrap()
}

/// A response with its body read.
pub(crate) struct Answer {
    pub(crate) response: Response<()>,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.response.headers().get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The JSON of each event of a stream that ended as it should.
    pub(crate) fn events(&self) -> Vec<serde_json::Value> {
        let mut data: Vec<&str> = self.text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.text);
        data.into_iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    /// The body, with what differs between runs replaced.
    pub(crate) fn stable_text(&self) -> String {
        let mut text = self.text.replace(self.header("x-request-id"), "ID");
        let mut from = 0;
        while let Some(found) = text[from..].find("\"created\":") {
            let start = from + found + "\"created\":".len();
            let digits = text[start..].bytes().take_while(u8::is_ascii_digit).count();
            text.replace_range(start..start + digits, "0");
            from = start;
        }
        text
    }
}

pub(crate) async fn ask(app: Router, request: Request<Body>) -> Answer {
    let (parts, body) = app.oneshot(request).await.unwrap().into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    Answer { response: Response::from_parts(parts, ()), text: String::from_utf8(bytes.to_vec()).unwrap() }
}

/// Serves an app on a loopback port for the rest of the test.
pub(crate) async fn serve(app: Router) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(api::serve(listener, app, ServeSettings::default(), std::future::pending()));
    address
}

/// A template that knows roles, what was thought, tools and calls; its model thinks between `<think>` and `</think>`, and
/// calls between `<tool_call>` and `</tool_call>`.
pub(crate) const AGENT: &str = concat!(
    "{% if tools %}T{{ tools | tojson }}{{ '\\n' }}{% endif %}",
    "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}",
    "{{ m.content }}{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}",
    "{% if m.tool_call_id %}={{ m.tool_call_id }}{% endif %}{{ '\\n' }}{% endfor %}",
    "{% if add_generation_prompt %}assistant:{% endif %}",
);

/// What an agent says that thinks, speaks and calls; a byte an event.
pub(crate) fn agent_says(text: &str) -> Script {
    let mut events = each_token(text);
    events.push(finished(FinishReason::Stop, text.len() as u32 + 1));
    Script::Events(events)
}

/// The prompt of a request as text.
pub(crate) fn prompt_text(request: &GenerateRequest) -> String {
    let byte = |&token: &TokenId| u8::try_from(token).ok();
    String::from_utf8_lossy(&request.prompt.iter().filter_map(byte).collect::<Vec<u8>>()).into_owned()
}

/// The events of a stream of server-sent events: name and data.
pub(crate) fn sse(text: &str) -> Vec<(String, serde_json::Value)> {
    let event = |event: &str| {
        let field = |name: &str| {
            event.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned()
        };
        let data = field("data:");
        (field("event:"), serde_json::from_str(&data).unwrap_or_else(|error| panic!("{error}: {data}")))
    };
    text.split("\n\n").filter(|part| !part.is_empty()).map(event).collect()
}

/// Whoever runs the process: counts what it was told to do.
#[derive(Default)]
pub(crate) struct Operator {
    pub(crate) reloads: AtomicUsize,
    pub(crate) drains: AtomicUsize,
}

impl Operate for Operator {
    fn reload(&self) -> BoxFuture<'_, Result<Reloaded, String>> {
        // The second time the settings are broken.
        let reloaded = match self.reloads.fetch_add(1, Ordering::Relaxed) {
            0 => Ok(Reloaded { applied: vec!["key".to_owned()], restart: vec!["model".to_owned()] }),
            _ => Err("cluster.toml:3: max_batch = \"0\"".to_owned()),
        };
        Box::pin(std::future::ready(reloaded))
    }

    fn drain(&self) {
        self.drains.fetch_add(1, Ordering::Relaxed);
    }
}
