// Requests through this router: where each went, why, and how far it is.

import { byId, compact, keyed, make, rate, setText, span } from "./dom.js";

const COLUMNS = ["stage", "path", "prompt", "answer", "first", "speed", "age"];
const LABELS = { prompt: "Prompt", answer: "Answer", first: "First token", speed: "Tokens/s", age: "Age" };
const TONES = { waiting: "warn", writing: "good", reading: "", stop: "none", length: "none", abort: "none" };
const WORDS = { stop: "done", length: "done, at its length", abort: "client left", node_lost: "node lost", engine_failed: "engine failed" };
const MOVES = { retried: "sent again", resumed: "went on", hedged: "tried beside", hedge_won: "went on" };

function create(request) {
  const row = make("tr");
  row.cells_ = {};
  for (const name of COLUMNS) {
    const cell = make("td", LABELS[name] ? { class: "n", "data-label": LABELS[name] } : { class: name });
    row.cells_[name] = cell;
    row.append(cell);
  }
  row.state_ = make("span", { class: "state" });
  row.cells_.stage.append(row.state_);
  row.way_ = make("div", { class: "way" });
  row.why_ = make("div", { class: "why" });
  row.cells_.path.append(row.way_, row.why_, make("div", { class: "id" }, `${request.id.slice(0, 8)} · ${request.model}`));
  return row;
}

function why(request, moves) {
  const parts = [];
  if (request.reason) parts.push(request.reason);
  if (request.matched_tokens > 0) parts.push(`${compact(request.matched_tokens)} tokens expected in its cache`);
  for (const move of moves) {
    parts.push(`${MOVES[move.kind] ?? move.kind} on ${move.to} after ${compact(move.tokens)} tokens: ${move.why}`);
  }
  return parts.join("; ") || "waiting for a node with room";
}

function update(row, request, moves) {
  const { state } = request;
  setText(row.state_, WORDS[state] ?? state.replaceAll("_", " "));
  row.state_.dataset.tone = TONES[state] ?? "bad";
  row.dataset.ended = String(request.ended);
  // Tried beside, it has not moved yet.
  const moved = moves.filter((move) => move.kind !== "hedged");
  const way = [request.node ?? "–", ...moved.map((move) => move.to)];
  setText(row.way_, way.filter((node, index) => node !== way[index - 1]).join(" → "));
  setText(row.why_, why(request, moves));
  const cached = request.cached_tokens ? `${compact(request.cached_tokens)} cached of ` : "";
  setText(row.cells_.prompt, `${cached}${compact(request.prompt_tokens)}`);
  setText(row.cells_.answer, request.ended ? compact(request.tokens) : `${compact(request.tokens)} / ${compact(request.max_tokens)}`);
  setText(row.cells_.first, span(request.first_token_s));
  setText(row.cells_.speed, request.tokens_per_s === null ? "–" : rate(request.tokens_per_s));
  setText(row.cells_.age, request.ended ? `took ${span(request.age_s)}` : span(request.age_s));
}

export function showRequests(requests, running, moves) {
  const of = (request) => moves.filter((move) => move.request === request.id);
  byId("requests-none").hidden = requests.length > 0;
  setText(byId("requests-count"), running > 0 ? `${running} in flight` : "");
  keyed(byId("requests"), requests, (request) => request.id, create, (row, request) => update(row, request, of(request)));
}
