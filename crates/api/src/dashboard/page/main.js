// Brings the news to the parts of the page.

import { Chart } from "./chart.js";
import { showModels, startChat } from "./chat.js";
import { byId, count, make, percent, rate, setText, span, sum } from "./dom.js";
import { follow, key } from "./live.js";
import { ready, showNodes } from "./nodes.js";
import { showRequests } from "./requests.js";

const STATES = { live: "Live", connecting: "Connecting", lost: "Reconnecting", refused: "Key needed" };
const RATE_SECONDS = 5; // over which the rate of now is a mean

const charts = {
  tokens: new Chart(byId("chart-tokens"), ["tokens"]),
  prompt: new Chart(byId("chart-prompt"), ["from cache", "read"]),
};
let version = null;

/** Says something of a kind that stays until it is taken back. */
function banner(kind, text, label, act) {
  const box = byId("banner");
  if (!box.hidden && box.dataset.kind === kind) return;
  const button = make("button", { type: "button" }, label);
  button.addEventListener("click", act);
  box.replaceChildren(text, button);
  box.dataset.kind = kind;
  box.hidden = false;
}

function takeBack(kind) {
  const box = byId("banner");
  if (box.dataset.kind === kind) box.hidden = true;
}

function setTile(id, value, small = "") {
  const tile = byId(id);
  const text = small ? `${value} ${small}` : value;
  if (tile.dataset.text === text) return;
  tile.dataset.text = text;
  tile.replaceChildren(value, ...(small ? [make("small", {}, ` ${small}`)] : []));
}

function showNews(news) {
  const { cluster, history, totals } = news;
  setText(byId("cluster"), cluster.cluster);
  document.title = `${cluster.cluster} · mlx-cluster`;
  setTile("tile-nodes", String(ready(cluster.nodes)), `of ${cluster.nodes.length}`);
  setTile("tile-running", String(sum(cluster.nodes.map((node) => node.load?.running ?? 0))));
  setTile("tile-waiting", String(cluster.waiting + sum(cluster.nodes.map((node) => node.load?.waiting ?? 0))));
  setTile("tile-rate", rate(sum(history.tokens.slice(-RATE_SECONDS)) / RATE_SECONDS));
  setTile("tile-hits", totals.prompt_tokens > 0 ? percent(totals.cached_tokens / totals.prompt_tokens) : "–");
  setTile("tile-done", count(totals.done), totals.failed > 0 ? `${count(totals.failed)} failed` : "");
  charts.tokens.show([history.tokens]);
  charts.prompt.show([history.cached, history.prompt.map((tokens, index) => tokens - history.cached[index])]);
  showNodes(cluster.nodes);
  showRequests(news.requests, news.running, cluster.recent_moves);
  showModels([...new Set(cluster.nodes.flatMap((node) => node.models.map((model) => model.name)))].sort());
  setText(byId("version"), `mlx-node ${news.version}`);
  setText(byId("uptime"), `up for ${span(news.uptime_s)}`);
  version ??= news.version;
  if (version !== news.version) {
    banner("version", `This router now runs version ${news.version}.`, "Load its page", () => location.reload());
  }
}

function showState(state, why = "") {
  const link = byId("link");
  link.dataset.state = state;
  link.title = why;
  setText(byId("link-text"), STATES[state]);
  if (state === "refused") banner("key", `This cluster asks for an API key: ${why}.`, "Give one", openKey);
  else if (state === "live") takeBack("key");
}

const dialog = byId("key-dialog");

function openKey() {
  byId("key").value = key.get();
  dialog.showModal();
}

const again = follow({ news: showNews, state: showState });

function setKey(value) {
  key.set(value);
  dialog.close();
  takeBack("key");
  again();
}

byId("key-open").addEventListener("click", openKey);
byId("key-forget").addEventListener("click", () => setKey(""));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
});
startChat();
