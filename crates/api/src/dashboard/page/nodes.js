// The nodes, a card each.

import { byId, compact, keyed, make, percent, setText, span } from "./dom.js";

const TONES = { ready: "good", loading: "warn", draining: "warn", restarting: "bad" };

function gauge(title) {
  const [name, value, bar] = [make("span", {}, title), make("span", { class: "quiet" }), make("div", { class: "bar" })];
  bar.append(make("i"), make("i"));
  return { box: make("div", { class: "gauge" }, make("div", { class: "words" }, name, value), bar), value, bar };
}

function create() {
  const parts = {
    name: make("h3"), state: make("span", { class: "state" }), what: make("p", { class: "what" }),
    slots: gauge("Requests"), kv: gauge("Context"), facts: make("p", { class: "facts" }),
  };
  const head = make("div", { class: "node-head" }, parts.name, parts.state);
  const card = make("li", { class: "node card" }, head, parts.what, parts.slots.box, parts.kv.box, parts.facts);
  card.parts = parts;
  return card;
}

function setBar(gauge, words, ...shares) {
  setText(gauge.value, words);
  [...gauge.bar.children].forEach((part, index) => {
    part.style.width = `${Math.min(100, Math.max(0, (shares[index] ?? 0) * 100))}%`;
  });
}

function facts(node) {
  const { load, prediction } = node;
  const told = [];
  if (load) told.push(["reads", `${compact(load.rates.prefill_tokens_per_s)} tokens/s`]);
  if (load) told.push(["step", span(load.decode_step_s[0])]);
  if (node.rtt_s !== null) told.push(["round trip", span(node.rtt_s)]);
  if (load?.waiting) told.push(["waiting there", String(load.waiting)]);
  if (prediction.requests > 0) told.push(["prediction off by", percent(prediction.error)]);
  return told;
}

function update(card, node) {
  const { parts } = card;
  const state = node.engine.state ?? String(node.engine);
  setText(parts.name, node.name);
  setText(parts.state, node.avoided ? "left alone: it failed" : state);
  parts.state.dataset.tone = node.avoided ? "bad" : (TONES[state] ?? "warn");
  parts.state.title = node.engine.detail ?? "";
  const models = node.models.map((model) => model.name).join(", ") || "no model yet";
  const where = node.local ? "this process" : node.address;
  setText(parts.what, `${node.hardware} · ${models} · ${where} · ${node.version}`);
  const { load } = node;
  parts.slots.box.hidden = parts.kv.box.hidden = !load;
  if (load) {
    const [used, all] = load.kv_tokens;
    setBar(parts.slots, `${load.running} of ${load.slots}`, load.running / load.slots);
    const cached = Math.max(0, Math.min(load.cached_kv_tokens, all - used));
    const words = `${compact(used)} used, ${compact(load.cached_kv_tokens)} cached of ${compact(all)} tokens`;
    setBar(parts.kv, words, used / all, cached / all);
  }
  const told = facts(node);
  const text = told.map(([name, value]) => `${name} ${value}`).join();
  if (parts.facts.dataset.text !== text) {
    parts.facts.dataset.text = text;
    parts.facts.replaceChildren(...told.map(([name, value]) => make("span", {}, `${name} `, make("b", {}, value))));
  }
}

export function showNodes(nodes) {
  byId("nodes-none").hidden = nodes.length > 0;
  if (nodes.length === 0) setText(byId("nodes-none"), "No node has joined this cluster yet.");
  keyed(byId("nodes"), nodes, (node) => node.id, create, update);
}

/** Nodes that answer, of all. */
export const ready = (nodes) => nodes.filter((node) => node.engine.state === "ready" && !node.avoided).length;
