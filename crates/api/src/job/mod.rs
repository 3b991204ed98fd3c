//! The middle of the endpoint, which knows no protocol: from what a client asks to tokens, and from tokens to what it is told.
//!
//! A protocol is two translations and nothing else:
//!
//! 1. **In.** Its JSON becomes a [`Conversation`] (messages, tools, what the answer must be like, and [`RawParameters`],
//!    all of them unchecked). [`Conversation::job`] checks it all, renders the template and reads the prompt: a [`Job`]. A text
//!    to go on with, as of `/v1/completions`, becomes a [`Job`] in `handlers::completions`. Every error is an
//!    [`ApiError`](crate::error::ApiError); its `param` is OpenAI's name of the field.
//! 2. **Out.** [`start()`] sends the job and gives [`Started`]: `outputs`, one [`Output`](crate::text::Output) for each choice,
//!    by index, and the `x-mlx-route` header ([`ROUTE_HEADER`](crate::handlers::stream::ROUTE_HEADER)). An output is a
//!    stream of [`AnswerEvent`](crate::text::AnswerEvent)s, which ends with `Ended` or one error. [`collect()`] waits for all of them and gives [`Whole`]; for a stream of events to the client,
//!    a protocol implements [`handlers::stream::Format`](crate::handlers::stream::Format) and calls
//!    [`handlers::stream::stream`](crate::handlers::stream::stream).
//!
//! What holds of events: reasoning comes before content; content may come before calls and between them; a call's
//! `ToolCall` comes before its `Arguments`, and its `ToolCallEnd` before anything else; the pieces of a call's arguments are
//! one JSON object, unless the answer was cut off (`EndReason::Length`); usage is that of one choice ([`total_usage`] adds
//! up). Dropping outputs cancels what they wait for.
//!
//! [`RawParameters`]: crate::openai::parameters::RawParameters

mod collect;
mod conversation;
mod embed;
mod grammar;
mod render;
mod start;

pub(crate) use collect::{Events, Whole, best, collect, merge, total_usage};
pub(crate) use conversation::{Conversation, Message, Shape, Tool, ToolCall, ToolChoice};
pub(crate) use embed::{Wanted, embed};
pub(crate) use grammar::of_shape;
pub(crate) use start::{Job, Started, in_client_words, requests, resolve, start, why_not_ready};
