// When each step and task waited, ran and backed off, on one axis.

import { h, seconds } from "/dashboard/dom.js";

const TASKS = 100;
export const PHASES = [["blocked", "waits for other steps"], ["waiting", "waits for a worker"], ["running", "running"], ["completed", "done"], ["failed", "failed"], ["backing", "backing off, earlier tries"]];

/** Spans of one task: [{phase, from, to}], `now` where it goes on. */
export function taskSpans(task, now) {
  const { queued, started, ended } = task;
  if (!Number.isFinite(queued)) return [];
  const first = Number.isFinite(started) ? started : Number.isFinite(ended) ? ended : now;
  const again = task.attempts > (Number.isFinite(started) ? 1 : 0);
  const spans = [{ phase: again ? "backing" : "waiting", from: queued, to: first }];
  if (Number.isFinite(started)) {
    const phase = task.status === "failed" ? "failed" : task.status === "completed" ? "completed" : "running";
    spans.push({ phase, from: started, to: Number.isFinite(ended) ? ended : now });
  }
  return spans;
}

/** Of a step, from its own times and those of its tasks. */
export function stepSpans(step, run, now) {
  const spans = [];
  const began = Number.isFinite(step.began) ? step.began : step.ended;
  const over = Number.isFinite(run.ended) ? run.ended : now;
  const ready = Number.isFinite(began) ? began : step.status === "created" ? over : NaN;
  if (ready > run.began) spans.push({ phase: "blocked", from: run.began, to: ready });
  if (!Number.isFinite(step.began)) return spans;
  const end = Number.isFinite(step.ended) ? step.ended : over;
  const starts = step.list.map((task) => task.started).filter(Number.isFinite);
  const first = starts.length ? Math.min(...starts) : step.list.length ? end : step.began;
  const waited = step.list.some((task) => task.attempts > 0) || !step.list.length ? "backing" : "waiting";
  if (first > step.began) spans.push({ phase: starts.length ? "waiting" : waited, from: step.began, to: Math.min(first, end) });
  const phase = step.status === "failed" ? "failed" : step.status === "completed" ? "completed" : "running";
  if (starts.length || !step.list.length) spans.push({ phase, from: Math.min(first, end), to: end });
  for (const task of step.list) {
    if (task.status === "queued" && task.attempts > 0) spans.push({ phase: "backing", from: Math.max(task.queued, first), to: now });
  }
  // Several tasks that back off are one stretch.
  const backing = spans.filter((span) => span.phase === "backing");
  if (backing.length < 2) return spans;
  const one = { phase: "backing", from: Math.min(...backing.map((span) => span.from)), to: Math.max(...backing.map((span) => span.to)) };
  return [...spans.filter((span) => span.phase !== "backing"), one];
}

export class Waterfall {
  constructor(select) {
    this.select = select;
    this.open = new Set();
    this.all = new Set();
    this.grid = h("div", { class: "waterfall", role: "group", "aria-label": "When each step and task waited and ran" });
    const legend = h("div", { class: "legend" }, PHASES.map(([phase, word]) => h("span", {}, h("i", { class: `phase-${phase}` }), word)));
    this.element = h("div", { class: "body stack" }, legend, this.grid);
  }

  show(steps, run, selected, now) {
    const end = Number.isFinite(run.ended) ? run.ended : now;
    const whole = Math.max(1, end - run.began);
    const rows = [];
    for (const step of steps) {
      const tasks = step.list.length > 1 || step.list.some((task) => task.attempts > 1);
      rows.push({ key: step.slug, step, tasks, name: step.slug, spans: stepSpans(step, run, now), took: step.took });
      if (!this.open.has(step.slug)) continue;
      const shown = this.all.has(step.slug) ? step.list : step.list.slice(0, TASKS);
      for (const task of shown) {
        const to = Number.isFinite(task.ended) ? task.ended : Number.isFinite(task.started) ? now : NaN;
        const tries = task.attempts > 1 ? ` · ${task.attempts} tries` : "";
        rows.push({ key: `${step.slug} ${task.index}`, task, name: `${task.index}${tries}`, spans: taskSpans(task, now), took: (to - task.started) / 1000 });
      }
      if (shown.length < step.list.length) rows.push({ key: `${step.slug} more`, more: step.slug, name: `all ${step.list.length} …`, spans: [], took: NaN });
    }
    const shape = JSON.stringify(rows.map((row) => [row.key, row.name, row.tasks, row.spans.length]));
    if (shape !== this.shape) {
      this.shape = shape;
      const again = document.activeElement?.dataset?.row;
      this.grid.replaceChildren(...rows.map((row) => this.row(row)), h("div", { class: "axis", "aria-hidden": "true" }, h("span"), h("span"), h("span"), h("span"), h("span")));
      if (again) this.grid.querySelector(`[data-row="${CSS.escape(again)}"]`)?.focus();
    }
    rows.forEach((row, at) => {
      const element = this.grid.children[at];
      element.classList.toggle("selected", row.key === selected);
      const [, lane, took] = element.children;
      took.textContent = seconds(row.took);
      row.spans.forEach((span, n) => {
        const bar = lane.children[n];
        bar.className = `phase-${span.phase}`;
        bar.style.left = `${(100 * (span.from - run.began)) / whole}%`;
        bar.style.width = `${(100 * Math.max(0, span.to - span.from)) / whole}%`;
        bar.title = `${span.phase}: ${seconds((span.to - span.from) / 1000)}`;
      });
    });
    [...this.grid.lastElementChild.children].forEach((mark, at) => { mark.textContent = seconds((whole * at) / 4000); });
  }

  row(row) {
    const label = row.tasks ? `${this.open.has(row.key) ? "▾" : "▸"} ${row.name}` : row.name;
    const name = h("button", {
      type: "button", class: "name", title: row.name, "data-row": row.key,
      "aria-expanded": row.tasks ? String(this.open.has(row.key)) : null,
      onclick: () => {
        if (row.more) this.all.add(row.more);
        else if (row.tasks && !this.open.delete(row.key)) this.open.add(row.key);
        this.shape = null;
        this.select(row.step?.slug ?? null);
      },
    }, label);
    return h("div", { class: `row${row.step ? "" : " task"}` }, name,
      h("div", { class: "lane", "aria-hidden": "true" }, row.spans.map(() => h("i"))), h("div", { class: "took" }));
  }
}
