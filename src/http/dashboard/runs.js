// All runs, newest first, live: filters, paging, and a row that changes when its run does.

import { Refused, get, stream } from "/dashboard/api.js";
import { ago, badge, h, keep, moment, seconds, short } from "/dashboard/dom.js";

const PAGE = 50;
// Rows kept; those beyond are a page away.
const ROWS_MAX = 1000;
const STATES = [["", "All"], ["started", "Running"], ["completed", "Completed"], ["failed", "Failed"]];
const UUID = /^[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}$/i;

export function runsPage(main, query, shell) {
  const stop = new AbortController();
  const runs = new Map();
  const seqs = new Map();
  const filter = { flow: query.get("flow") ?? "", status: query.get("status") ?? "" };
  let [next, chosen, failed, loaded] = [null, null, null, false];

  const search = h("input", { type: "search", placeholder: "Find a run by its id   ( / )", "aria-label": "Find a run by its id", "data-search": true });
  const flows = h("select", { "aria-label": "Flow", onchange: () => go({ ...filter, flow: flows.value }) }, h("option", { value: "" }, "All flows"));
  const states = h("div", { class: "segments", role: "group", "aria-label": "Status" }, STATES.map(([value, word]) =>
    h("button", { type: "button", "aria-pressed": String(filter.status === value), onclick: () => go({ ...filter, status: value }) }, word)));
  const find = h("form", {
    class: "filters", role: "search",
    onsubmit: (event) => {
      event.preventDefault();
      const text = search.value.trim();
      if (UUID.test(text)) location.hash = `#/runs/${encodeURIComponent(text)}`;
      else draw();
    },
  }, search, flows, states);
  search.addEventListener("input", () => draw());
  const notice = h("div");
  const table = h("tbody");
  const more = h("div", { class: "more" });
  const card = h("div", { class: "card scroll" },
    h("table", { class: "runs", "aria-label": "Runs, newest first" },
      h("thead", {}, h("tr", {},
        h("th", { scope: "col" }, "Status"), h("th", { scope: "col" }, "Flow"), h("th", { scope: "col" }, "Run"),
        h("th", { scope: "col", class: "wide" }, "Started"), h("th", { scope: "col", class: "num" }, "Took"))),
      table), more);
  main.replaceChildren(find, notice, card);

  function go(wanted) {
    const said = new URLSearchParams(Object.entries(wanted).filter(([, value]) => value));
    location.hash = `#/${said.size ? `?${said}` : ""}`;
  }

  async function load(before) {
    const wanted = new URLSearchParams({ limit: PAGE });
    for (const [name, value] of Object.entries(filter)) if (value) wanted.set(name, value);
    if (before) wanted.set("before", before);
    try {
      const page = await get(`/runs?${wanted}`, stop.signal);
      for (const run of page.runs) {
        // An event that came meanwhile knows more.
        if (run.status !== "started" || !runs.has(run.run_id)) runs.set(run.run_id, run);
      }
      if (before || !loaded) next = page.next;
      [failed, loaded] = [null, true];
    } catch (error) {
      if (stop.signal.aborted) return;
      failed = error;
      if (error instanceof Refused && error.status === 401) shell.askKey(error.message);
    }
    draw();
  }

  async function loadFlows() {
    try {
      const answer = await get("/flows", stop.signal);
      flows.append(...answer.flows.map(({ flow_slug }) => h("option", { value: flow_slug }, flow_slug)));
    } catch { /* a role that sees runs may see no definitions */ }
    if (filter.flow && ![...flows.options].some((option) => option.value === filter.flow)) flows.append(h("option", { value: filter.flow }, filter.flow));
    flows.value = filter.flow;
  }

  const fits = (run) => (!filter.flow || run.flow_slug === filter.flow) && (!filter.status || run.status === filter.status);

  function hear(text) {
    const event = JSON.parse(text);
    if (event.event_type === "gap") { load(); return; }
    const [kind, word] = String(event.event_type).split(":");
    if (kind !== "run") return;
    const id = event.run_id;
    if (event.seq <= (seqs.get(id) ?? 0)) return;
    seqs.set(id, event.seq);
    if (seqs.size > 10 * ROWS_MAX) seqs.clear();
    const known = runs.get(id);
    if (!known && word !== "started") { if (filter.status === word) soon(); return; }
    const run = { ...known, run_id: id, flow_slug: event.flow_slug ?? known?.flow_slug, status: word, fresh: true };
    for (const key of ["started_at", "completed_at", "failed_at"]) run[key] = event[key] ?? known?.[key];
    runs.delete(id);
    if (fits(run)) runs.set(id, run);
    draw();
  }

  // Runs that begin to fit a filter are asked for, all at once.
  let asked;
  function soon() {
    clearTimeout(asked);
    asked = setTimeout(() => load(), 400);
  }

  function listed() {
    const text = search.value.trim().toLowerCase();
    const all = [...runs.values()].filter((run) => !text || run.run_id.startsWith(text) || run.flow_slug?.toLowerCase().includes(text));
    const time = (run) => moment(run.started_at) || 0;
    all.sort((a, b) => time(b) - time(a) || (a.run_id < b.run_id ? 1 : -1));
    return all.slice(0, ROWS_MAX);
  }

  function draw() {
    keep(notice, String(failed), () => failed && h("div", { class: "error", role: "alert" }, `The runs could not be read: ${failed.message}`));
    const rows = listed();
    const made = new Map([...table.children].map((row) => [row.dataset.run, row]));
    const wanted = rows.map((run) => row(run, made.get(run.run_id)));
    if (wanted.length !== table.children.length || wanted.some((element, at) => element !== table.children[at])) table.replaceChildren(...wanted);
    const empty = !rows.length && loaded;
    keep(more, `${next} ${empty} ${filter.flow} ${filter.status}`, () => [
      empty && h("p", { class: "note" }, filter.flow || filter.status || search.value ? "No run fits." : "No run yet. Start one, and it appears here."),
      next && h("button", { type: "button", onclick: () => load(next) }, "Older runs"),
    ]);
  }

  function row(run, old) {
    const [began, ended] = [moment(run.started_at), moment(run.completed_at ?? run.failed_at)];
    const signature = JSON.stringify([run.status, run.started_at, ended, run.flow_slug, chosen === run.run_id]);
    const took = seconds(((Number.isFinite(ended) ? ended : Date.now()) - began) / 1000);
    if (old?.signature === signature) {
      if (run.status === "started") old.querySelector(".took").textContent = took;
      old.querySelector(".ago").textContent = ago(began);
      return old;
    }
    const href = `#/runs/${run.run_id}`;
    const element = h("tr", {
      "data-run": run.run_id, "aria-selected": String(chosen === run.run_id), class: run.fresh ? "fresh" : null,
      onclick: (event) => { if (event.target.tagName !== "A" && !getSelection().toString()) location.hash = href; },
    },
    h("td", {}, badge(run.status)), h("td", { class: "flow", title: run.flow_slug }, run.flow_slug ?? ""),
    h("td", { class: "mono" }, h("a", { href, title: run.run_id }, short(run.run_id))),
    h("td", { class: "wide dim ago", title: run.started_at }, ago(began)), h("td", { class: "num took" }, took));
    delete run.fresh;
    element.signature = signature;
    return element;
  }

  load();
  const path = filter.flow ? `/events/flows/${encodeURIComponent(filter.flow)}` : "/events";
  stream(path, stop.signal, {
    event: (data, id, name) => { if (name === "message") hear(data); },
    state: (state) => {
      // What happened before anybody listened, or while nobody did.
      if (state === "live") load();
      shell.live(state);
    },
    refused: (error) => { if (error.status === 401) shell.askKey(error.message); },
  });
  loadFlows();
  const clock = setInterval(() => { if (!document.hidden) draw(); }, 1000);

  return {
    stop() { stop.abort(); clearInterval(clock); clearTimeout(asked); },
    move(by) {
      const ids = listed().map((run) => run.run_id);
      const at = Math.max(0, Math.min(ids.length - 1, ids.indexOf(chosen) + by));
      chosen = ids[chosen === null ? 0 : at] ?? null;
      draw();
      table.querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
    },
    enter() { if (chosen) location.hash = `#/runs/${chosen}`; },
  };
}
