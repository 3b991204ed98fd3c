// The stream of news, for as long as the page is there: read with fetch, since an EventSource sends no key.

const SILENCE_MS_MAX = 5000; // news comes every second
const WAIT_MS_MIN = 500;
const WAIT_MS_MAX = 5000;
const KEY = "mlx-cluster-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export const headers = () => (key.get() ? { authorization: `Bearer ${key.get()}` } : {});

/** The `data:` of each server-sent event of a response. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      const lines = rest.slice(0, end).split("\n").filter((line) => line.startsWith("data: "));
      if (lines.length > 0) yield lines.map((line) => line.slice(6)).join("\n");
    }
  }
}

/** Why a request was refused, in words. */
export async function refusal(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `the answer is ${response.status} ${response.statusText}`;
}

/**
 * Reads news until the page ends; `on.news(json)`, `on.state("live" | "connecting" | "lost" | "refused", why)`.
 * Returns a function that connects anew at once, as after another key.
 */
export function follow(on) {
  let abort = new AbortController();
  let wake = () => {};
  let wait = WAIT_MS_MIN;

  async function once() {
    abort = new AbortController();
    let timer = setTimeout(() => abort.abort(), SILENCE_MS_MAX);
    try {
      const response = await fetch("/v1/cluster/events", { headers: headers(), signal: abort.signal, cache: "no-store" });
      if (response.status === 401) return on.state("refused", await refusal(response));
      if (!response.ok) return on.state("lost", await refusal(response));
      for await (const text of events(response)) {
        clearTimeout(timer);
        timer = setTimeout(() => abort.abort(), SILENCE_MS_MAX);
        wait = WAIT_MS_MIN;
        on.state("live");
        on.news(JSON.parse(text));
      }
      on.state("lost", "the router ended the stream");
    } catch (error) {
      on.state("lost", String(error.message ?? error));
    } finally {
      clearTimeout(timer);
    }
  }

  (async () => {
    for (;;) {
      await once();
      await new Promise((resolve) => {
        wake = resolve;
        setTimeout(resolve, wait);
      });
      wait = Math.min(wait * 2, WAIT_MS_MAX);
    }
  })();

  return () => {
    wait = WAIT_MS_MIN;
    abort.abort();
    wake();
  };
}
