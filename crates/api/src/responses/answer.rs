//! What `/v1/responses` answers.

use super::{
    items::{InputItem, OutputItem, output},
    request::Echo,
};
use crate::{
    error::ApiError,
    job::Whole,
    prompt::{ModelText, unix_seconds},
    shape::Protocol,
    text::{EndReason, TextUsage},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::time::SystemTime;
use types::{ModelCard, RequestId};

/// Items in one list: OpenAI's bounds.
const ITEMS_MAX: usize = 100;
const ITEMS_DEFAULT: usize = 20;

/// A response, at any stage.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(crate) struct ResponseJson {
    pub(super) id: String,
    object: &'static str,
    created_at: u64,
    status: Status,
    error: Option<FailureJson>,
    incomplete_details: Option<IncompleteJson>,
    model: String,
    pub(super) output: Vec<OutputItem>,
    /// Of a response that is over.
    usage: Option<UsageJson>,
    #[serde(flatten)]
    pub(super) echo: Echo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

#[derive(Debug, Clone, Serialize, JsonSchema)]
struct FailureJson {
    code: &'static str,
    message: String,
}

#[derive(Debug, Clone, Serialize, JsonSchema)]
struct IncompleteJson {
    reason: &'static str,
}

#[derive(Debug, Clone, Serialize, JsonSchema)]
struct UsageJson {
    input_tokens: u32,
    input_tokens_details: InputDetails,
    output_tokens: u32,
    output_tokens_details: OutputDetails,
    total_tokens: u32,
}

#[derive(Debug, Clone, Serialize, JsonSchema)]
struct InputDetails {
    cached_tokens: u32,
}

#[derive(Debug, Clone, Serialize, JsonSchema)]
struct OutputDetails {
    reasoning_tokens: u32,
}

impl From<TextUsage> for UsageJson {
    fn from(usage: TextUsage) -> Self {
        Self {
            input_tokens: usage.prompt_tokens,
            input_tokens_details: InputDetails { cached_tokens: usage.cached_tokens.unwrap_or(0) },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputDetails { reasoning_tokens: usage.reasoning_tokens.unwrap_or(0) },
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
        }
    }
}

impl ResponseJson {
    /// A response that is being written.
    pub(super) fn begun(id: RequestId, card: &ModelCard, echo: Echo) -> Self {
        Self {
            id: format!("resp_{id}"),
            object: "response",
            created_at: unix_seconds(SystemTime::now()),
            status: Status::InProgress,
            error: None,
            incomplete_details: None,
            model: card.name.clone(),
            output: Vec::new(),
            usage: None,
            echo,
        }
    }

    /// The same, complete.
    pub(super) fn answered(self, id: RequestId, whole: &Whole, text: &ModelText) -> Self {
        let output = output(id, whole, text, item_status(whole.ending.reason));
        self.ended(output, whole.ending.reason, whole.ending.usage)
    }

    /// The same, with what came of it.
    pub(super) fn ended(mut self, output: Vec<OutputItem>, reason: EndReason, usage: TextUsage) -> Self {
        self.status = Status::Completed;
        if reason == EndReason::Length {
            self.status = Status::Incomplete;
            self.incomplete_details = Some(IncompleteJson { reason: "max_output_tokens" });
        }
        self.output = output;
        self.usage = Some(usage.into());
        self
    }

    /// The same, broken off.
    pub(super) fn failed(mut self, error: &ApiError) -> Self {
        self.status = Status::Failed;
        self.error = Some(FailureJson { code: "server_error", message: error.message(Protocol::Responses) });
        self
    }

    #[cfg(test)]
    pub(super) fn for_test(id: String) -> Self {
        let card = ModelCard {
            name: String::new(),
            root: types::BlockHash(0),
            context_tokens: 1,
            vocab_size: 1,
            eos_tokens: Vec::new(),
            assets: types::AssetsHash([0; 32]),
            created_s: 0,
            kind: types::ModelKind::Generator,
        };
        Self { id, ..Self::begun(RequestId(0), &card, Echo::default()) }
    }

    pub(super) fn status(&self) -> Status {
        self.status
    }
}

/// The status of the items of an answer that ended so.
pub(super) fn item_status(reason: EndReason) -> &'static str {
    if reason == EndReason::Length { "incomplete" } else { "completed" }
}

/// `DELETE /v1/responses/{id}`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Deletion {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) deleted: bool,
}

/// `GET /v1/responses/{id}/input_items`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ItemList {
    pub(super) object: &'static str,
    pub(super) data: Vec<Value>,
    pub(super) first_id: Option<String>,
    pub(super) last_id: Option<String>,
    pub(super) has_more: bool,
}

/// Which items are told.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct ItemQuery {
    /// At most, from 1 to 100; 20 unless told otherwise.
    limit: Option<usize>,
    /// The newest first unless told otherwise.
    order: Option<Order>,
    /// Those after the item of this id.
    after: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Order {
    Asc,
    Desc,
}

impl ItemList {
    /// The items of a response's request, each with an id.
    pub(super) fn new(response: &str, items: &[InputItem], query: &ItemQuery) -> Result<Self, ApiError> {
        let limit = query.limit.unwrap_or(ITEMS_DEFAULT);
        if limit == 0 || limit > ITEMS_MAX {
            let message = format!("limit is {limit}; it must be from 1 to {ITEMS_MAX}");
            return Err(ApiError::parameter("limit", message));
        }
        let mut data: Vec<Value> = items.iter().enumerate().map(|item| described(response, item)).collect();
        if query.order != Some(Order::Asc) {
            data.reverse();
        }
        if let Some(after) = &query.after {
            let Some(index) = data.iter().position(|item| item["id"] == after.as_str()) else {
                return Err(ApiError::parameter("after", format!("there is no item {after:?}")));
            };
            data.drain(..=index);
        }
        let has_more = data.len() > limit;
        data.truncate(limit);
        let id = |item: Option<&Value>| item.and_then(|item| item["id"].as_str()).map(str::to_owned);
        let (first_id, last_id) = (id(data.first()), id(data.last()));
        Ok(Self { object: "list", data, first_id, last_id, has_more })
    }
}

fn described(response: &str, (index, item): (usize, &InputItem)) -> Value {
    let mut item = serde_json::to_value(item).expect("numbers, strings and arrays of them");
    if let Some(fields) = item.as_object_mut() {
        fields.entry("id").or_insert_with(|| format!("item_{response}{index:04x}").into());
        fields.entry("type").or_insert_with(|| "message".into());
    }
    item
}
