// A conversation with a model of the cluster.

import { byId, make, rate, setText, span } from "./dom.js";
import { events, headers, refusal } from "./live.js";

const TURNS_MAX = 200; // of one conversation: what a page can hold

const [log, say, send, model] = ["log", "say", "send", "model"].map(byId);
let turns = [];
let session = newSession();
let running = null;

/** `crypto.randomUUID` is there over HTTPS only. */
function newSession() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return `page-${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

export function showModels(names) {
  if ([...model.options].map((option) => option.value).join("\n") === names.join("\n")) return;
  const chosen = model.value;
  model.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  if (names.includes(chosen)) model.value = chosen;
  model.disabled = names.length === 0;
}

function bubble(role, text) {
  const parts = { text: make("div", { class: "text" }, text), note: make("div", { class: "note" }) };
  const said = make("div", { class: "said", "data-role": role }, parts.text, parts.note);
  log.append(said);
  log.scrollTop = log.scrollHeight;
  return { said, ...parts };
}

function append(answer, text) {
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  answer.text.append(text);
  if (follows) log.scrollTop = log.scrollHeight;
}

async function ask(answer, abort) {
  const started = performance.now();
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { ...headers(), "content-type": "application/json", "x-session-id": session },
    body: JSON.stringify({ model: model.value, messages: turns, stream: true, stream_options: { include_usage: true } }),
    signal: abort.signal,
  });
  if (!response.ok) throw new Error(await refusal(response));
  const [node, reason] = (response.headers.get("x-mlx-route") ?? "").split("; ");
  let [text, first, usage] = ["", null, null];
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    usage = chunk.usage ?? usage;
    const { content, reasoning_content: thought } = chunk.choices[0]?.delta ?? {};
    if (content || thought) first ??= performance.now();
    if (content) {
      text += content;
      append(answer, content);
    }
  }
  const ended = performance.now();
  const facts = [node && `${node} (${reason})`];
  if (first !== null) facts.push(`first token after ${span((first - started) / 1000)}`);
  if (usage && first !== null && usage.completion_tokens > 1) {
    facts.push(`${rate((usage.completion_tokens - 1) / ((ended - first) / 1000))} tokens/s`);
    const cached = usage.prompt_tokens_details?.cached_tokens;
    if (cached) facts.push(`${cached} of ${usage.prompt_tokens} prompt tokens cached`);
  }
  setText(answer.note, facts.filter(Boolean).join(" · "));
  return text;
}

async function turn() {
  const text = say.value.trim();
  if (!text || running) return;
  say.value = "";
  turns = [...turns, { role: "user", content: text }].slice(-TURNS_MAX);
  bubble("user", text);
  const answer = bubble("assistant", "");
  answer.said.dataset.busy = "";
  running = new AbortController();
  setText(send, "Stop");
  try {
    turns.push({ role: "assistant", content: await ask(answer, running) });
  } catch (error) {
    const stopped = running.signal.aborted;
    const said = answer.text.textContent;
    if (said) turns.push({ role: "assistant", content: said });
    else turns.pop();
    if (!stopped) answer.said.dataset.failed = "";
    setText(answer.note, stopped ? "stopped" : `It failed: ${error.message}`);
  } finally {
    delete answer.said.dataset.busy;
    running = null;
    setText(send, "Send");
  }
}

export function startChat() {
  byId("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else turn();
  });
  say.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      turn();
    }
    if (event.key === "Escape" && running) running.abort();
  });
  byId("chat-new").addEventListener("click", () => {
    running?.abort();
    turns = [];
    session = newSession();
    log.replaceChildren();
    say.focus();
  });
}
