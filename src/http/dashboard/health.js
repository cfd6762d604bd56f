// How the proxy is: its own numbers (/metrics, Prometheus' text format) as they change.

import { h, keep, s } from "/dashboard/dom.js";

const EVERY = 2000;
const HISTORY = 60;

/** Lines of `name{label="value",…} number`. */
export function parse(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/.exec(line);
    if (!match || line.startsWith("#")) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));
    }
    found.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return found;
}

const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });

export function healthPage(main, shell) {
  const stop = new AbortController();
  let [before, failed, history] = [null, null, []];
  const notice = h("div");
  const tiles = h("div", { class: "tiles" });
  const search = h("input", { type: "search", placeholder: "Filter   ( / )", "aria-label": "Filter the numbers", "data-search": true });
  const table = h("tbody");
  search.addEventListener("input", () => before && list(before.all));
  main.replaceChildren(notice, tiles, h("section", { class: "card", "aria-label": "All numbers" },
    h("div", { class: "head" }, h("h2", {}, "All numbers"), h("span", { class: "space" }), search, h("a", { href: "/metrics" }, "/metrics")),
    h("div", { class: "metrics", tabindex: "0" }, h("table", {}, table))));

  async function look() {
    try {
      const [metrics, ready] = await Promise.all([fetch("/metrics", { signal: stop.signal }), fetch("/readyz", { signal: stop.signal })]);
      if (!metrics.ok) throw new Error(`${metrics.status} ${metrics.statusText}`);
      const all = parse(await metrics.text());
      const now = { at: performance.now(), all, sums: sums(all), ready: ready.ok, words: (await ready.text()).trim() };
      show(now);
      [before, failed] = [now, null];
      shell.live("live");
    } catch (error) {
      if (stop.signal.aborted) return;
      failed = error;
      shell.live("away");
    }
    keep(notice, String(failed), () => failed && h("div", { class: "error", role: "alert" }, `The proxy does not answer: ${failed.message}`));
    timer = setTimeout(look, document.hidden ? 5 * EVERY : EVERY);
  }

  function sums(all) {
    const found = new Map();
    for (const { name, value } of all) found.set(name, (found.get(name) ?? 0) + value);
    return found;
  }

  function show(now) {
    const has = (name) => now.sums.has(name);
    const value = (name) => now.sums.get(name) ?? 0;
    const passed = before ? (now.at - before.at) / 1000 : NaN;
    const rate = (name) => (before ? Math.max(0, value(name) - (before.sums.get(name) ?? 0)) / passed : NaN);
    const by = (name, label) => now.all.filter((each) => each.name === name && label in each.labels).map((each) => [each.labels[label], each.value]);
    const requests = rate("flowgate_requests_total");
    if (Number.isFinite(requests)) history = [...history, requests].slice(-HISTORY);
    const each = (value) => (Number.isFinite(value) ? `${number(value, value < 10 ? 1 : 0)}/s` : "…");
    const rows = (...pairs) => pairs.filter(([, name]) => has(name)).map(([word, name, bad]) => [word, number(value(name)), bad && value(name) > 0]);
    const kept = /shared|parked|shed|joined|coalesc/;
    const quieter = [...now.sums.keys()].filter((name) => kept.test(name)).map((name) => [name.replace(/^flowgate_|_total$/g, "").replaceAll("_", " "), number(value(name))]);
    const cards = [
      { title: "Postgres", big: now.ready ? "ready" : "not ready", rows: [["what /readyz says", now.words, !now.ready]] },
      { title: "Requests", big: each(requests), rows: by("flowgate_requests_total", "to").map(([to, count]) => [to, number(count)]), line: history },
      { title: "Clients", big: number(value("flowgate_clients")), small: "connected", rows: rows(["logins", "flowgate_logins_total"], ["logins refused", "flowgate_logins_failed_total", true], ["refused: full", "flowgate_clients_refused_total", true], ["HTTP connections", "flowgate_http_connections"], ["tied to a server", "flowgate_pins_total"]) },
      { title: "Pools", big: number(value("flowgate_servers_opened_total") - value("flowgate_servers_closed_total")), small: "servers open", rows: rows(["opened", "flowgate_servers_opened_total"], ["failed", "flowgate_servers_failed_total", true], ["waits for a server", "flowgate_checkout_waits_total"], ["given up waiting", "flowgate_checkout_timeouts_total", true], ["abandoned", "flowgate_servers_abandoned_total"]) },
      { title: "Events", big: each(rate("flowgate_event_deliveries_total")), small: "delivered", rows: rows(["delivered", "flowgate_event_deliveries_total"], ["rows of the outbox", "flowgate_event_outbox_rows_total"], ["wake-ups", "flowgate_event_wakeups_total"], ["gaps announced", "flowgate_event_gaps_total", true], ["slow readers cut", "flowgate_event_cuts_total", true], ["listener lost", "flowgate_event_listener_lost_total", true]) },
      { title: "Reads kept on the primary", big: number(value("flowgate_reads_kept_total")), rows: by("flowgate_reads_kept_total", "why").map(([why, count]) => [why, number(count)]) },
      { title: "Upkeep", big: value("flowgate_maintenance_leader") ? "here" : "elsewhere or off", rows: rows(["tasks requeued", "flowgate_maintenance_tasks_requeued_total"], ["tasks given up", "flowgate_maintenance_tasks_stalled", true], ["runs pruned", "flowgate_maintenance_runs_pruned_total"], ["errors", "flowgate_maintenance_errors_total", true]) },
      quieter.length && { title: "Shared, parked, shed", big: "", rows: quieter },
    ].filter(Boolean);
    tiles.replaceChildren(...cards.map(tile));
    list(now.all);
  }

  function tile({ title, big, small, rows, line }) {
    return h("section", { class: "card tile", "aria-label": title }, h("h2", {}, title),
      h("div", { class: "big" }, big, small && h("small", {}, ` ${small}`)),
      line?.length > 1 && spark(line),
      h("dl", {}, rows.map(([word, count, bad]) => [h("dt", {}, word), h("dd", { class: bad ? "bad" : null }, count)])));
  }

  function spark(line) {
    const most = Math.max(1, ...line);
    const points = line.map((value, at) => `${(100 * (at + HISTORY - line.length)) / (HISTORY - 1)},${30 - (28 * value) / most}`).join(" ");
    return s("svg", { viewBox: "0 0 100 32", preserveAspectRatio: "none", role: "img", "aria-label": `requests a second, up to ${number(most)}` }, s("polyline", { points }));
  }

  function list(all) {
    const wanted = search.value.trim().toLowerCase();
    const name = ({ name, labels }) => name + (Object.keys(labels).length ? ` {${Object.entries(labels).map(([key, value]) => `${key}=${value}`).join(", ")}}` : "");
    const shown = all.filter((each) => !each.name.endsWith("_bucket") && (!wanted || name(each).toLowerCase().includes(wanted)));
    table.replaceChildren(...shown.map((each) => h("tr", {}, h("td", { class: "mono" }, name(each)), h("td", { class: "num" }, number(each.value, 3)))));
  }

  let timer;
  look();
  return { stop() { stop.abort(); clearTimeout(timer); }, move() {}, enter() {} };
}
