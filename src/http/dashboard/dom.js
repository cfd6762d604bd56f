// Elements from data. Text is always set as text, never as markup: nothing a run carries can become part of the page.

const SVG = "http://www.w3.org/2000/svg";

function make(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const h = (name, attributes, ...children) => make(document.createElement(name), attributes, children);
export const s = (name, attributes, ...children) => make(document.createElementNS(SVG, name), attributes, children);

/** Replaces what is in `place` only if `signature` is not what it was made from: focus and selections survive. */
export function keep(place, signature, build) {
  if (place.signature === signature) return;
  place.signature = signature;
  place.replaceChildren(...[build()].flat(Infinity).filter((child) => child));
}

export const badge = (status) => h("span", { class: "badge", "data-status": status }, WORDS[status] ?? status);
export const WORDS = { created: "waiting", started: "running", completed: "completed", failed: "failed", skipped: "skipped", queued: "queued" };

export function seconds(value) {
  if (!Number.isFinite(value)) return "";
  const time = Math.max(0, value);
  if (time < 10) return `${time.toFixed(2)} s`;
  if (time < 100) return `${time.toFixed(1)} s`;
  const [minutes, hours] = [Math.floor(time / 60), Math.floor(time / 3600)];
  if (hours < 1) return `${minutes} m ${Math.floor(time % 60)} s`;
  if (hours < 48) return `${hours} h ${minutes % 60} m`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function ago(date) {
  const past = (Date.now() - date) / 1000;
  if (past < 60) return "just now";
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  if (past < 86400) return `${Math.floor(past / 3600)} h ago`;
  return new Date(date).toLocaleDateString();
}

export const clock = (date) => Number.isFinite(date) ? new Date(date).toLocaleTimeString([], { hour12: false }) : "";
export const moment = (text) => (text ? Date.parse(text) : NaN);
export const short = (id) => String(id).slice(0, 8);
export const size = (letters) => letters < 10_000 ? `${letters} characters` : letters < 1_000_000 ? `${Math.round(letters / 1000)} kB` : `${(letters / 1e6).toFixed(1)} MB`;

const SHOWN = 4000;

/** JSON, or a text, as text; a long one in part until all is asked for. */
export function payload(value) {
  const text = typeof value === "string" && value !== "" ? value : JSON.stringify(value, null, 2) ?? "null";
  const pre = h("pre", { tabindex: "0" }, text.slice(0, SHOWN) + (text.length > SHOWN ? " …" : ""));
  const box = h("div", { class: "payload" }, pre);
  const bar = h("div", { class: "bar" });
  if (text.length > SHOWN) {
    bar.append(h("button", {
      type: "button", class: "small",
      onclick: (event) => { pre.textContent = text; event.target.remove(); },
    }, `Show all (${size(text.length)})`));
  }
  bar.append(copier(() => text));
  box.append(bar);
  return box;
}

export function copier(text, label = "Copy") {
  return h("button", {
    type: "button", class: "small",
    onclick: async (event) => {
      const button = event.target;
      try {
        await navigator.clipboard.writeText(text());
        button.textContent = "Copied";
      } catch {
        // Without TLS a browser may not let us: then by the old way.
        const area = h("textarea", { "aria-hidden": "true" });
        area.value = text();
        document.body.append(area);
        area.select();
        button.textContent = document.execCommand("copy") ? "Copied" : "Not allowed";
        area.remove();
      }
      setTimeout(() => { button.textContent = label; }, 1500);
    },
  }, label);
}
