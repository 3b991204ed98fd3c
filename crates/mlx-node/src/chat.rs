//! `mlx-node chat`: a conversation with a model of a running endpoint, on a terminal or through a pipe.
//!
//! On a terminal each line is a turn, Ctrl-C ends the answer and not the program, and what is said about an answer goes
//! to stderr. What is piped in is one message, and its answer is all there is on stdout.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the conversation is the command's result")]

use crate::{
    config::Values,
    endpoint::{AskError, Endpoint},
};
use serde_json::{Value, json};
use std::{
    io::{BufRead, IsTerminal, Read, Write, stderr, stdin, stdout},
    time::Instant,
};
use tokio::sync::mpsc;

/// Bytes of a message that is piped in: more than any model's context.
const MESSAGE_BYTES_MAX: u64 = 8 << 20;

/// How to talk.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ChatArguments {
    /// Say this and end; without it, lines are read until Ctrl-D
    message: Option<String>,
    /// What the model is told first
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of an answer, at most
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// How freely tokens are drawn: 0 always takes the likeliest
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Draws the same answers again
    #[arg(long, value_name = "N")]
    seed: Option<i64>,
}

/// Why a conversation ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChatError {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("no model can be asked now: mlx-node status tells why")]
    NoModel,
    #[error("nothing was said: standard input is empty")]
    Nothing,
    #[error("standard input: {0}")]
    Input(std::io::Error),
}

/// Talks until the input ends.
pub(crate) async fn run(values: &Values, arguments: &ChatArguments) -> Result<(), ChatError> {
    let endpoint = Endpoint::of(values)?;
    let named = values.model_name.clone().fixed();
    let served = served(&endpoint).await?;
    // The file may name what this machine serves; of a running cluster that is a model like any other.
    let model = named.or_else(|| served.first().cloned()).ok_or(ChatError::NoModel)?;
    let mut chat = Chat::new(endpoint, model, arguments);
    let message = match &arguments.message {
        Some(message) => Some(message.clone()),
        None if stdin().is_terminal() => None,
        None => Some(piped()?),
    };
    match message {
        Some(message) => Ok(chat.turn(&message).await.map(drop)?),
        None => chat.lines(&served).await,
    }
}

/// Names of what is served.
async fn served(endpoint: &Endpoint) -> Result<Vec<String>, AskError> {
    let models = endpoint.get_json("/v1/models").await?;
    let names = models["data"].as_array().into_iter().flatten();
    Ok(names.filter_map(|model| Some(model["id"].as_str()?.to_owned())).collect())
}

/// All that is piped in.
fn piped() -> Result<String, ChatError> {
    let mut message = String::new();
    stdin().take(MESSAGE_BYTES_MAX).read_to_string(&mut message).map_err(ChatError::Input)?;
    if message.trim().is_empty() { Err(ChatError::Nothing) } else { Ok(message) }
}

/// Whether an answer came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Whole,
    Interrupted,
}

struct Chat {
    endpoint: Endpoint,
    model: String,
    settings: Value,
    system: Option<String>,
    messages: Vec<Value>,
}

impl Chat {
    fn new(endpoint: Endpoint, model: String, arguments: &ChatArguments) -> Self {
        let &ChatArguments { max_tokens, temperature, seed, .. } = arguments;
        let settings = json!({ "max_tokens": max_tokens, "temperature": temperature, "seed": seed });
        let mut chat =
            Self { endpoint, model, settings, system: arguments.system.clone(), messages: Vec::new() };
        chat.begin();
        chat
    }

    fn begin(&mut self) {
        let system = self.system.iter().map(|text| json!({ "role": "system", "content": text }));
        self.messages = system.collect();
    }

    /// Reads and answers lines of a terminal.
    async fn lines(&mut self, served: &[String]) -> Result<(), ChatError> {
        eprintln!("{} at {}. /help tells more.", self.model, self.endpoint.url());
        let mut lines = read_lines();
        let mut warned = false;
        loop {
            eprint!("> ");
            let line = tokio::select! {
                line = lines.recv() => line,
                _ = tokio::signal::ctrl_c() => {
                    eprintln!();
                    if warned {
                        return Ok(());
                    }
                    warned = true;
                    eprintln!("Ctrl-C again, Ctrl-D or /quit ends.");
                    continue;
                }
            };
            let Some(line) = line else {
                eprintln!();
                return Ok(());
            };
            warned = false;
            let line = line.map_err(ChatError::Input)?;
            match line.trim() {
                "" => {}
                "/quit" | "/exit" => return Ok(()),
                "/new" => {
                    self.begin();
                    eprintln!("A new conversation.");
                }
                "/help" => eprintln!(
                    "/new forgets what was said; /model NAME asks another model ({}); /quit ends; Ctrl-C ends an answer.",
                    served.join(", ")
                ),
                command => match command.strip_prefix("/model ") {
                    Some(name) => name.trim().clone_into(&mut self.model),
                    None => {
                        if let Err(error) = self.turn(command).await {
                            eprintln!("{error}");
                        }
                    }
                },
            }
        }
    }

    /// Says something and prints the answer as it comes. What fails leaves the conversation as it was.
    async fn turn(&mut self, text: &str) -> Result<Turn, AskError> {
        self.messages.push(json!({ "role": "user", "content": text }));
        let mut answer = String::new();
        let outcome = self.answer(&mut answer).await;
        if !answer.is_empty() {
            println!();
            self.messages.push(json!({ "role": "assistant", "content": answer }));
        } else if outcome.is_err() {
            self.messages.pop();
        }
        outcome
    }

    async fn answer(&self, answer: &mut String) -> Result<Turn, AskError> {
        let mut body = json!({ "model": self.model, "messages": self.messages, "stream": true,
                               "stream_options": { "include_usage": true } });
        for (name, value) in
            self.settings.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null())
        {
            body[name.as_str()] = value.clone();
        }
        let started = Instant::now();
        let asked = self.endpoint.post("/v1/chat/completions", &body);
        let mut events = tokio::select! {
            events = asked => events?,
            _ = tokio::signal::ctrl_c() => return Ok(Turn::Interrupted),
        };
        let mut first = None;
        let mut usage = Value::Null;
        loop {
            let event = tokio::select! {
                event = events.next() => event?,
                _ = tokio::signal::ctrl_c() => return Ok(Turn::Interrupted),
            };
            let Some(event) = event else { break };
            if event["usage"].is_object() {
                usage = event["usage"].clone();
            }
            let text = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
            if !text.is_empty() {
                first.get_or_insert_with(Instant::now);
                answer.push_str(text);
                print!("{text}");
                // Where nobody reads any more the answer is of no use either; the end tells.
                let _ = stdout().flush();
            }
        }
        if stderr().is_terminal() && stdout().is_terminal() {
            eprint!("\n\x1b[2m{}\x1b[0m", facts(started, first, &usage, events.route.as_deref()));
        }
        Ok(Turn::Whole)
    }
}

/// What there is to say of an answer.
fn facts(started: Instant, first: Option<Instant>, usage: &Value, route: Option<&str>) -> String {
    let mut facts: Vec<String> = route.map(str::to_owned).into_iter().collect();
    if let Some(first) = first {
        facts.push(format!("first token after {:.0} ms", (first - started).as_secs_f64() * 1e3));
        let tokens = usage["completion_tokens"].as_f64().unwrap_or(0.0);
        let seconds = first.elapsed().as_secs_f64();
        if tokens > 1.0 && seconds > 0.0 {
            facts.push(format!("{tokens} tokens, {:.1} a second", (tokens - 1.0) / seconds));
        }
    }
    facts.join("; ")
}

/// Lines of stdin, read by a thread of their own: reading a terminal cannot be given up.
fn read_lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in stdin().lock().lines() {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
