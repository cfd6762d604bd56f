// One run, live: its graph, its waterfall, what went in and came out, and every event. Events say what changed; rows, read again
// while the run goes on, say how far maps and tries are. A state only moves upwards, so whichever comes first is right.

import { Refused, get, read as parsed, stream } from "/dashboard/api.js";
import { badge, clock, copier, h, keep, moment, payload, seconds } from "/dashboard/dom.js";
import { Graph } from "/dashboard/graph.js";
import { snippetCard } from "/dashboard/snippets.js";
import { Waterfall } from "/dashboard/waterfall.js";

const LOOK_EVERY = 1000;
// A run with large outputs is looked at less often.
const LOOK_SHARE = 10;
const EVENTS_MAX = 2000;
const TASKS_MAX = 100;
const RANK = { created: 0, queued: 0, started: 1, completed: 2, failed: 2, skipped: 2 };

export function runPage(main, id, shell) {
  const stop = new AbortController();
  const steps = new Map();
  const events = [];
  const run = { id, status: null, began: NaN, ended: NaN };
  let [deps, rows, selected, seq, cut, failed, outcome, isAllTasks] = [[], null, null, 0, 0, null, null, false];

  const notice = h("div");
  const title = h("div", { class: "title" });
  const graph = new Graph(choose);
  const waterfall = new Waterfall((slug) => { if (slug) choose(slug, true); else draw(); });
  const details = h("div", { class: "body" });
  const detailsTitle = h("h2", {}, "Run");
  const log = h("div", { class: "events" });
  const cursor = h("span", { class: "dim" });
  const card = (name, head, body) => h("section", { class: "card", "aria-label": name }, h("div", { class: "head" }, head), body);
  main.replaceChildren(notice, title, h("div", { class: "columns" },
    h("div", { class: "stack" },
      card("Steps", [h("h2", {}, "Steps")], graph.element),
      card("Waterfall", [h("h2", {}, "Waterfall")], waterfall.element),
      card("Events", [h("h2", {}, "Events"), cursor, h("span", { class: "space" }), copier(() => events.map((event) => event.text).join("\n"), "Copy all")], log)),
    h("div", { class: "stack" },
      card("Details", [detailsTitle, h("span", { class: "space" }), h("button", { type: "button", class: "small", onclick: () => choose(null) }, "The run")], details),
      snippetCard(id))));

  const step = (slug) => {
    if (!steps.has(slug)) steps.set(slug, { slug, status: "created", began: NaN, ended: NaN, tasks: null, done: 0, list: [], index: Infinity, isMap: false });
    return steps.get(slug);
  };
  const rise = (thing, status) => { if (thing.status === null || (RANK[status] ?? 0) > (RANK[thing.status] ?? 0)) thing.status = status; };

  function choose(slug, stay) {
    selected = slug === selected && !stay ? null : slug;
    isAllTasks = false;
    draw();
  }

  function read(state) {
    rows = state;
    rise(run, state.run.status);
    run.flow = state.run.flow_slug;
    run.began = moment(state.run.started_at);
    run.ended = moment(state.run.completed_at ?? state.run.failed_at) || run.ended;
    deps = state.deps ?? deps;
    for (const row of state.steps) {
      const known = step(row.step_slug);
      rise(known, row.status);
      known.index = row.step_index ?? known.index;
      known.isMap = row.step_type === "map";
      known.began = moment(row.started_at) || known.began;
      known.ended = moment(row.completed_at ?? row.failed_at ?? row.skipped_at) || known.ended;
      known.tasks = row.initial_tasks ?? known.tasks;
      if (row.initial_tasks !== null && row.remaining_tasks !== null) known.done = Math.max(known.done, row.initial_tasks - row.remaining_tasks);
      known.error = row.error_message ?? row.skip_reason ?? known.error;
      known.output = row.output ?? known.output;
      known.list = [];
    }
    for (const task of state.tasks ?? []) {
      step(task.step_slug).list.push({
        index: task.task_index, status: task.status, attempts: task.attempts_count, error: task.error_message, output: task.output,
        queued: moment(task.queued_at), started: moment(task.started_at), ended: moment(task.completed_at ?? task.failed_at), worker: task.last_worker_id,
      });
    }
  }

  function hear(text, position) {
    let event;
    try { event = parsed(text); } catch { return; }
    const gap = event.event_type === "gap";
    // At least once: what came before comes no second time.
    if (!gap && event.seq !== undefined) {
      if (event.seq <= seq) return;
      seq = event.seq;
    }
    const [kind, word] = String(event.event_type).split(":");
    const at = moment(event.completed_at ?? event.failed_at ?? event.skipped_at ?? event.started_at);
    if (kind === "run") {
      rise(run, word);
      if (word === "started") run.began ||= at;
      else run.ended = at || run.ended;
    } else if (kind === "step" && event.step_slug) {
      const known = step(event.step_slug);
      rise(known, word);
      if (word === "started") {
        known.began = at || known.began;
        known.tasks = event.remaining_tasks ?? known.tasks;
      } else {
        known.ended = at || known.ended;
        if (word === "completed") { known.done = known.tasks ?? known.done; known.output = event.output ?? known.output; }
        known.error = event.error_message ?? event.skip_reason ?? known.error;
      }
    }
    events.push({ text, event, at, gap });
    log.append(entry(events.at(-1)));
    if (events.length > EVENTS_MAX) { events.shift(); log.firstElementChild.remove(); cut++; }
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
    cursor.textContent = position === undefined ? "" : `cursor ${position}${cut ? ` · ${cut} older ones left out` : ""}`;
    soon();
    draw();
  }

  function entry({ text, event, at, gap }) {
    const words = gap ? `events ${event.from} to ${event.to ?? "?"} are missing` : event.step_slug ?? event.flow_slug ?? "";
    const box = h("details", { class: gap ? "gap" : null, ontoggle: () => { if (box.open && box.children.length === 1) box.append(payload(pretty(text))); } },
      h("summary", {}, h("span", { class: "dim mono" }, event.seq ?? ""), h("span", { class: "dim mono when" }, clock(at)), h("span", {}, event.event_type), h("span", { class: "dim" }, words)));
    return box;
  }

  const pretty = (text) => { try { return JSON.stringify(parsed(text), null, 2); } catch { return text; } };

  // ---- rows ----

  let [looking, again, timer] = [false, false, null];
  async function look() {
    if (looking) { again = true; return; }
    looking = true;
    clearTimeout(timer);
    const began = performance.now();
    try {
      const state = await get(`/runs/${encodeURIComponent(id)}`, stop.signal);
      read(state);
      failed = null;
    } catch (error) {
      if (stop.signal.aborted) return;
      failed = error;
      if (error instanceof Refused && error.status === 401) shell.askKey(error.message);
    } finally {
      looking = false;
    }
    draw();
    const lost = failed instanceof Refused && failed.status < 500;
    const over = rows && RANK[rows.run.status] === 2;
    const pause = Math.max(document.hidden ? 5000 : LOOK_EVERY, LOOK_SHARE * (performance.now() - began));
    if (again) { again = false; soon(); } else if (!lost && !over) timer = setTimeout(look, pause);
  }
  function soon() {
    clearTimeout(timer);
    timer = setTimeout(look, 150);
  }

  // ---- drawing ----

  function ordered() {
    const retrying = (known) => known.list.filter((task) => task.status === "queued" && task.attempts > 0).length;
    const now = Date.now();
    const list = [...steps.values()].map((known) => ({
      ...known, retrying: retrying(known),
      took: (Number.isFinite(known.ended) ? known.ended : known.status === "started" && !Number.isFinite(run.ended) ? now : NaN) / 1000 - known.began / 1000,
    }));
    return list.sort((a, b) => a.index - b.index || (a.slug < b.slug ? -1 : 1));
  }

  function draw() {
    keep(notice, String(failed), () => failed && h("div", { class: "error", role: "alert" },
      failed.status === 404 ? `There is no run ${id} that you may see.` : `The run could not be read: ${failed.message}`));
    if (run.status === null) return;
    const list = ordered();
    const now = Date.now();
    head(list, now);
    graph.show(list, deps, selected);
    if (Number.isFinite(run.began)) waterfall.show(list, run, selected, Math.max(now, run.began + 1));
    panel(list);
    if (outcome !== run.status) {
      outcome = run.status;
      document.title = `${outcome === "started" ? "▸" : outcome === "completed" ? "✓" : "✕"} ${run.flow ?? id} · Flowgate`;
    }
  }

  const took = h("b");
  const count = h("b");
  function head(list, now) {
    took.textContent = seconds(((Number.isFinite(run.ended) ? run.ended : now) - run.began) / 1000);
    const [done, all] = [list.reduce((sum, known) => sum + known.done, 0), list.reduce((sum, known) => sum + (known.tasks ?? 0), 0)];
    count.textContent = `${list.filter((known) => RANK[known.status] === 2).length} of ${list.length} steps, ${done} of ${all} tasks`;
    keep(title, JSON.stringify([run.status, run.flow, run.began]), () => [
      h("h1", {}, run.flow ?? ""), h("span", { role: "status" }, badge(run.status)),
      h("div", { class: "facts" }, h("span", { class: "mono" }, id, " "), copier(() => id, "Copy id"),
        h("span", {}, "started ", h("b", {}, Number.isFinite(run.began) ? new Date(run.began).toLocaleString([], { hour12: false }) : "")),
        h("span", {}, "took ", took), h("span", {}, count)),
    ]);
  }

  function panel(list) {
    const known = list.find((each) => each.slug === selected);
    if (known) {
      detailsTitle.textContent = known.slug;
      keep(details, JSON.stringify([known.slug, known.status, known.error, known.list, known.output, isAllTasks]), () => stepPanel(known, list));
    } else {
      detailsTitle.textContent = "Run";
      const reason = events.findLast(({ event }) => event.event_type === "run:failed")?.event.error_message ?? list.find((each) => each.status === "failed")?.error;
      keep(details, JSON.stringify(["", run.status, rows?.run.input, rows?.run.output, reason]), () => [
        run.status === "failed" && reason && field("Error", reason, "bad"),
        rows && field("Input", rows.run.input),
        run.status === "completed" && rows && field("Output", rows.run.output),
      ]);
    }
  }

  const field = (name, value, kind) => h("div", { class: `field ${kind ?? ""}` }, h("h3", {}, name), payload(value));

  function stepPanel(known, list) {
    const before = deps.filter((dep) => dep.step_slug === known.slug).map((dep) => dep.dep_slug);
    const output = (each) => each.output ?? (each.isMap ? each.list.map((task) => task.output ?? null) : each.list[0]?.output);
    const inputs = before.length
      ? Object.fromEntries(before.map((slug) => [slug, output(list.find((each) => each.slug === slug) ?? { list: [] })]))
      : rows?.run.input;
    const error = known.error ?? known.list.find((task) => task.error)?.error;
    const shown = isAllTasks ? known.list : known.list.slice(0, TASKS_MAX);
    return [
      h("p", { class: "field" }, badge(known.status), " ", h("span", { class: "dim" }, before.length ? `after ${before.join(", ")}` : "a first step", known.isMap ? " · a task an element" : "")),
      error && field("Error", error, "bad"),
      known.status === "completed" && field("Output", output(known)),
      field(before.length ? "Input: outputs of the steps before" : "Input: the run's", inputs),
      known.list.length > 0 && h("div", { class: "field" }, h("h3", {}, `Tasks (${known.list.length})`),
        h("div", { class: "tasks", tabindex: "0" }, h("table", {}, h("thead", {}, h("tr", {}, ["Task", "Status", "Tries", "Took", ""].map((word) => h("th", { scope: "col" }, word)))),
          h("tbody", {}, shown.map((task) => h("tr", {},
            h("td", { class: "num" }, task.index), h("td", {}, badge(task.status)), h("td", { class: "num" }, task.attempts),
            h("td", { class: "num" }, seconds((task.ended - task.started) / 1000)), h("td", { class: "why" }, task.error ?? "")))))),
        shown.length < known.list.length && h("button", { type: "button", class: "small", onclick: () => { isAllTasks = true; draw(); } }, `Show all ${known.list.length}`)),
    ];
  }

  look().then(() => {
    if (failed instanceof Refused) return;
    stream(`/events/runs/${encodeURIComponent(id)}?cursor=0`, stop.signal, {
      event: (data, position, name) => { if (name === "message") hear(data, position); },
      state: shell.live,
      refused: (error) => { if (error.status === 401) shell.askKey(error.message); },
    }, 0);
  });
  const tick = setInterval(() => { if (!document.hidden && run.status === "started") draw(); }, 250);
  const resized = () => draw();
  addEventListener("resize", resized);

  return {
    stop() { stop.abort(); clearInterval(tick); clearTimeout(timer); removeEventListener("resize", resized); },
    move(by) {
      const slugs = ordered().map((known) => known.slug);
      const at = slugs.indexOf(selected);
      selected = slugs[at < 0 ? (by > 0 ? 0 : slugs.length - 1) : Math.max(0, Math.min(slugs.length - 1, at + by))] ?? null;
      isAllTasks = false;
      draw();
      graph.nodes.get(selected)?.group.scrollIntoView({ block: "nearest", inline: "nearest" });
    },
    enter() { details.scrollIntoView({ block: "nearest" }); details.querySelector("pre")?.focus(); },
  };
}
