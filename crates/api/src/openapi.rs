//! `GET /openapi.json`: what is served, out of the types that bodies are parsed into and answers are written from.
//!
//! A row of [`operations`] is a route. Tests hold the rows to the routes of [`crate::app`].

use crate::{
    anthropic, error,
    handlers::{admin, embeddings, tokenize},
    ollama,
    openai::{request, response},
    responses, shape,
};
use axum::{
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings, json_schema};
use serde_json::{Map, Value, json};
use std::sync::LazyLock;

/// The answer to who asks for the document.
pub(crate) async fn document() -> Response {
    static TEXT: LazyLock<String> = LazyLock::new(|| build().to_string());
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], TEXT.as_str()).into_response()
}

/// Statuses of refusals that every operation may answer with, and those of operations that generate.
const REFUSALS: [(u16, &str); 8] = [
    (400, "The request cannot be served as it is; the message says why"),
    (401, "The API key is missing or wrong"),
    (403, "The API key is not good for this"),
    (405, "The path does not take this method"),
    (429, "Too many requests; `Retry-After` says when to come back"),
    (431, "Path or headers are too long"),
    (500, "The fault is here"),
    (503, "No node can serve this now"),
];
const REFUSALS_OF_BODIES: [(u16, &str); 2] =
    [(408, "The body did not arrive in time"), (413, "The body is too large")];
const REFUSAL_OF_NAMES: (u16, &str) = (404, "There is no model, session or response of that name");
const REFUSAL_OF_NODES: (u16, &str) = (502, "The node was lost, and none went on");

/// What there is to say of a route.
struct Operation {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    body: Option<Schema>,
    /// What is answered with status 200, by its type.
    answers: Vec<(&'static str, Schema)>,
    error: Schema,
    /// What follows the path.
    query: Option<Schema>,
}

const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";
const TEXT: &str = "text/plain";
const LINES: &str = "application/x-ndjson";

struct Schemas {
    /// Of what clients send, named where they are used twice.
    sent: SchemaGenerator,
    /// Of what they get.
    got: SchemaGenerator,
}

impl Schemas {
    fn new() -> Self {
        let settings = SchemaSettings::draft2020_12().with(|settings| {
            settings.meta_schema = None;
            settings.definitions_path = "/components/schemas".into();
        });
        let got = settings.clone().for_serialize().with(|settings| settings.inline_subschemas = true);
        Self { sent: settings.into_generator(), got: got.into_generator() }
    }

    fn sent<T: JsonSchema>(&mut self) -> Option<Schema> {
        Some(self.sent.subschema_for::<T>())
    }

    fn query<T: JsonSchema>(&mut self) -> Option<Schema> {
        Some(T::json_schema(&mut self.sent))
    }

    fn got<T: JsonSchema>(&mut self) -> Vec<(&'static str, Schema)> {
        vec![(JSON, self.got.subschema_for::<T>())]
    }

    fn streamed<T: JsonSchema>(&mut self, stream: &'static str) -> Vec<(&'static str, Schema)> {
        let mut answers = self.got::<T>();
        // Readers of such documents do not agree on what a schema is of: the whole stream, or each event.
        answers.push((stream, json_schema!({})));
        answers
    }
}

fn operations(schemas: &mut Schemas) -> Vec<Operation> {
    let openai = schemas.got.subschema_for::<error::ErrorJson>();
    let anthropic = schemas.got.subschema_for::<shape::AnthropicError>();
    let ollama = schemas.got.subschema_for::<shape::OllamaError>();
    let object = || vec![(JSON, json_schema!({"type": "object"}))];
    let texts = |kind| vec![(kind, json_schema!({"type": "string"}))];
    let operation = |method, path, summary, body, answers| {
        let error = match shape::Protocol::of(path) {
            shape::Protocol::OpenAi | shape::Protocol::Responses => &openai,
            shape::Protocol::Anthropic => &anthropic,
            shape::Protocol::Ollama => &ollama,
        };
        Operation { method, path, summary, body, answers, error: error.clone(), query: None }
    };
    vec![
        operation(
            "post",
            "/v1/chat/completions",
            "Answers a conversation",
            schemas.sent::<request::ChatCompletionRequest>(),
            schemas.streamed::<response::ChatWhole<'_>>(EVENTS),
        ),
        operation(
            "post",
            "/v1/completions",
            "Goes on with texts",
            schemas.sent::<request::CompletionRequest>(),
            schemas.streamed::<response::Completion<'_, response::TextChoice<'_>>>(EVENTS),
        ),
        operation(
            "post",
            "/v1/responses",
            "Answers a conversation, and keeps it for a while",
            schemas.sent::<responses::ResponsesRequest>(),
            schemas.streamed::<responses::ResponseJson>(EVENTS),
        ),
        operation(
            "get",
            "/v1/responses/{id}",
            "A response that is kept",
            None,
            schemas.got::<responses::ResponseJson>(),
        ),
        operation(
            "delete",
            "/v1/responses/{id}",
            "Deletes a response that is kept",
            None,
            schemas.got::<responses::Deletion>(),
        ),
        Operation {
            query: schemas.query::<responses::ItemQuery>(),
            ..operation(
                "get",
                "/v1/responses/{id}/input_items",
                "What a response answers",
                None,
                schemas.got::<responses::ItemList>(),
            )
        },
        operation(
            "post",
            "/v1/messages",
            "Answers a conversation, in Anthropic's words",
            schemas.sent::<anthropic::MessagesRequest>().map(|message| {
                // To count its tokens, it need not have it.
                json_schema!({"allOf": [message, {"required": ["max_tokens"]}]})
            }),
            schemas.streamed::<anthropic::MessageJson>(EVENTS),
        ),
        operation(
            "post",
            "/v1/messages/count_tokens",
            "The tokens of a conversation",
            schemas.sent::<anthropic::MessagesRequest>(),
            schemas.got::<anthropic::TokenCount>(),
        ),
        operation(
            "post",
            "/api/chat",
            "Answers a conversation, in Ollama's words",
            schemas.sent::<ollama::ChatRequest>(),
            schemas.streamed::<ollama::Line>(LINES),
        ),
        operation(
            "post",
            "/api/generate",
            "Answers or goes on with a text, in Ollama's words",
            schemas.sent::<ollama::TextRequest>(),
            schemas.streamed::<ollama::Line>(LINES),
        ),
        operation(
            "post",
            "/v1/embeddings",
            "Vectors of texts",
            schemas.sent::<embeddings::EmbeddingsRequest>(),
            schemas.got::<embeddings::EmbeddingList>(),
        ),
        operation(
            "post",
            "/api/embed",
            "Vectors of texts, in Ollama's words",
            schemas.sent::<ollama::embed::EmbedBody>(),
            schemas.got::<ollama::embed::Embeddings>(),
        ),
        operation("get", "/api/tags", "What is served", None, schemas.got::<ollama::models::Tags>()),
        operation(
            "post",
            "/api/show",
            "A model",
            schemas.sent::<ollama::models::ShowRequest>(),
            schemas.got::<ollama::models::Shown>(),
        ),
        operation("get", "/api/version", "The version", None, schemas.got::<ollama::models::Version>()),
        operation(
            "post",
            "/tokenize",
            "A text or a conversation in tokens",
            schemas.sent::<tokenize::TokenizeBody>(),
            schemas.got::<tokenize::Tokenized>(),
        ),
        operation(
            "post",
            "/detokenize",
            "Tokens as text",
            schemas.sent::<tokenize::DetokenizeRequest>(),
            schemas.got::<tokenize::Detokenized>(),
        ),
        operation("get", "/v1/models", "What is served", None, schemas.got::<response::ModelList<'_>>()),
        operation("get", "/v1/models/{id}", "A model", None, schemas.got::<response::Model<'_>>()),
        operation(
            "get",
            "/v1/sessions",
            "The caller's sessions",
            None,
            schemas.got::<response::SessionList<'_>>(),
        ),
        operation(
            "delete",
            "/v1/sessions/{id}",
            "Ends a session",
            None,
            schemas.got::<response::SessionDeletion<'_>>(),
        ),
        operation("get", "/v1/cluster", "Nodes, models and load", None, object()),
        operation(
            "post",
            "/v1/cluster/route",
            "Where a chat or a completion would go now, and why",
            Some(json_schema!({"anyOf": [
                schemas.sent::<request::ChatCompletionRequest>(), schemas.sent::<request::CompletionRequest>(),
            ]})),
            object(),
        ),
        operation(
            "get",
            "/v1/cluster/events",
            "The same and this router's requests, every second",
            None,
            vec![(EVENTS, json_schema!({}))],
        ),
        operation(
            "post",
            "/v1/admin/reload",
            "Reads the configuration again; needs a key with the scope admin",
            None,
            schemas.got::<admin::ReloadJson>(),
        ),
        operation(
            "post",
            "/v1/admin/drain",
            "Finishes what runs, then ends this process; needs a key with the scope admin",
            None,
            schemas.got::<admin::DrainJson>(),
        ),
        operation("get", "/metrics", "Figures as Prometheus reads them", None, texts(TEXT)),
        operation("get", "/health", "Whether the process lives", None, object()),
        operation("get", "/ready", "Whether a model can answer", None, object()),
        operation("get", "/openapi.json", "This document", None, object()),
    ]
}

fn build() -> Value {
    let mut schemas = Schemas::new();
    let mut paths: Map<String, Value> = Map::new();
    for operation in operations(&mut schemas) {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = operation.describe();
    }
    let components = schemas.sent.take_definitions(true);
    json!({
        "openapi": "3.1.0",
        "info": {"title": "mlx-cluster", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        // Where no keys are set, none is needed.
        "security": [{"key": []}, {}],
    })
}

impl Operation {
    fn describe(&self) -> Value {
        let content: Map<String, Value> = self
            .answers
            .iter()
            .map(|(kind, schema)| ((*kind).to_owned(), json!({"schema": schema})))
            .collect();
        let mut answers = json!({"200": {"description": "Done", "content": content}});
        let posted = self.body.is_some();
        let refusals = REFUSALS.into_iter().chain([REFUSAL_OF_NAMES, REFUSAL_OF_NODES]);
        for (status, description) in refusals.chain(REFUSALS_OF_BODIES.into_iter().filter(|_| posted)) {
            let content = json!({JSON: {"schema": self.error}});
            answers[status.to_string()] = json!({"description": description, "content": content});
        }
        let mut described = json!({"summary": self.summary, "responses": answers});
        if let Some(body) = &self.body {
            described["requestBody"] = json!({"required": true, "content": {JSON: {"schema": body}}});
        }
        let mut parameters = Vec::new();
        if self.path.contains("{id}") {
            let schema = json!({"type": "string", "minLength": 1});
            parameters.push(json!({"name": "id", "in": "path", "required": true, "schema": schema}));
        }
        let fields = self.query.as_ref().and_then(|query| query.as_value()["properties"].as_object());
        for (name, schema) in fields.into_iter().flatten() {
            parameters.push(json!({"name": name, "in": "query", "schema": schema}));
        }
        if !parameters.is_empty() {
            described["parameters"] = parameters.into();
        }
        described
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_route_is_described() {
        let described = operations(&mut Schemas::new());
        let described: BTreeSet<String> =
            described.iter().map(|operation| operation.path.to_owned()).collect();
        let source = include_str!("lib.rs");
        let routes = source.split(".route(\"").skip(1).map(|rest| rest.split('"').next().unwrap_or_default());
        let routes: BTreeSet<String> = routes.map(|route| route.replace("{*id}", "{id}")).collect();
        assert_eq!(described, routes);
    }

    #[test]
    fn references_lead_somewhere() {
        let document = build();
        let mut count = 0;
        let mut stack = vec![&document];
        while let Some(value) = stack.pop() {
            match value {
                Value::Object(fields) => {
                    if let Some(Value::String(reference)) = fields.get("$ref") {
                        let pointer = reference.strip_prefix('#').expect("within the document");
                        assert!(document.pointer(pointer).is_some(), "{reference}");
                        count += 1;
                    }
                    stack.extend(fields.values());
                }
                Value::Array(values) => stack.extend(values),
                _ => {}
            }
        }
        assert!(count > 10, "{count} references");
    }
}
