// The server's JSON and event streams, with the key of this tab. EventSource can send no headers, so streams are read by fetch.

const KEY = "flowgate.key";
const BACKOFF_MIN = 250;
const BACKOFF_MAX = 5000;
// The server says something every 15 s.
const SILENCE_MAX = 40_000;

/** Numbers that JavaScript has no room for keep their digits, where the browser can do that: they are shown, not counted with. */
export const read = JSON.rawJSON
  ? (text) => JSON.parse(text, (_, value, { source }) => (typeof value === "number" && String(value) !== source ? JSON.rawJSON(source) : value))
  : JSON.parse;

export class Refused extends Error {
  constructor(status, words) {
    super(words);
    this.status = status;
  }
}

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (value) => value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY);

function headers() {
  const word = key();
  if (!word) return {};
  return word.split(".").length === 3 ? { Authorization: `Bearer ${word}` } : { apikey: word };
}

async function refusal(answer) {
  let words = `${answer.status} ${answer.statusText}`;
  try {
    const body = await answer.json();
    if (body.message) words = body.message + (body.hint ? ` (${body.hint})` : "");
  } catch { /* no JSON: the status must do */ }
  return new Refused(answer.status, words);
}

export async function get(path, signal) {
  const answer = await fetch(path, { headers: headers(), signal, cache: "no-store" });
  if (!answer.ok) throw await refusal(answer);
  return read(await answer.text());
}

/** Calls `on.event(data, id, name)` for each message until `signal` aborts; comes back by itself behind the last id. */
export async function stream(path, signal, on, cursor) {
  let backoff = BACKOFF_MIN;
  let last = cursor;
  while (!signal.aborted) {
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    signal.addEventListener("abort", stop);
    let silence = setTimeout(stop, SILENCE_MAX);
    try {
      const sent = { ...headers(), Accept: "text/event-stream" };
      if (last !== undefined) sent["Last-Event-ID"] = String(last);
      const answer = await fetch(path, { headers: sent, signal: attempt.signal, cache: "no-store" });
      if (!answer.ok) throw await refusal(answer);
      on.state?.("live");
      backoff = BACKOFF_MIN;
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      const parser = parse((data, id, name) => {
        if (id !== undefined) last = id;
        on.event(data, id, name);
      });
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        clearTimeout(silence);
        silence = setTimeout(stop, SILENCE_MAX);
        parser(value);
      }
    } catch (error) {
      if (signal.aborted) break;
      if (error instanceof Refused && error.status < 500) {
        on.state?.("off");
        on.refused?.(error);
        return;
      }
    } finally {
      clearTimeout(silence);
      signal.removeEventListener("abort", stop);
    }
    if (signal.aborted) break;
    on.state?.("away");
    await new Promise((done) => setTimeout(done, backoff));
    backoff = Math.min(backoff * 2, BACKOFF_MAX);
  }
}

/** The lines of text/event-stream (HTML, "Server-sent events"). */
function parse(emit) {
  let rest = "";
  let data = [];
  let id;
  let name = "message";
  return (chunk) => {
    rest += chunk;
    // A CR at the end may be half of CRLF.
    const lines = rest.split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length) emit(data.join("\n"), id, name);
        data = [];
        name = "message";
        continue;
      }
      const colon = line.indexOf(":");
      if (colon === 0) continue;
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "data") data.push(value);
      else if (field === "id") id = value;
      else if (field === "event") name = value;
    }
  };
}
