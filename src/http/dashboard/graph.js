// A run's steps as a layered graph: layout once, then only what changes. Pure layout, SVG below it.

import { h, s, seconds, WORDS } from "/dashboard/dom.js";

const NODE = { width: 184, height: 58 };
const GAP = { layer: 54, row: 18 };
const SWEEPS = 6;
const SMALLEST = 0.7;
const MARKS = { created: "·", started: "▸", completed: "✓", failed: "✕", skipped: "↷" };

/** Layers by the longest way from a root; in a layer, near those it hangs on (barycentres, swept both ways). */
export function layout(slugs, deps, down) {
  const parents = new Map(slugs.map((slug) => [slug, []]));
  const children = new Map(slugs.map((slug) => [slug, []]));
  for (const { step_slug, dep_slug } of deps) {
    if (!parents.has(step_slug) || !parents.has(dep_slug)) continue;
    parents.get(step_slug).push(dep_slug);
    children.get(dep_slug).push(step_slug);
  }
  const depth = new Map();
  const open = new Map(slugs.map((slug) => [slug, parents.get(slug).length]));
  let wave = slugs.filter((slug) => open.get(slug) === 0);
  for (let layer = 0; wave.length; layer++) {
    const next = [];
    for (const slug of wave) {
      depth.set(slug, layer);
      for (const child of children.get(slug)) {
        open.set(child, open.get(child) - 1);
        if (open.get(child) === 0) next.push(child);
      }
    }
    wave = next;
  }
  for (const slug of slugs) if (!depth.has(slug)) depth.set(slug, 0);
  const layers = [];
  for (const slug of slugs) (layers[depth.get(slug)] ??= []).push(slug);
  const place = new Map();
  const settle = (layer) => layer.forEach((slug, at) => place.set(slug, at - (layer.length - 1) / 2));
  layers.forEach(settle);
  for (let sweep = 0; sweep < SWEEPS; sweep++) {
    const near = sweep % 2 === 0 ? parents : children;
    const order = sweep % 2 === 0 ? layers : [...layers].reverse();
    for (const layer of order) {
      const weight = (slug) => {
        const others = near.get(slug);
        return others.length ? others.reduce((sum, other) => sum + place.get(other), 0) / others.length : place.get(slug);
      };
      const weights = new Map(layer.map((slug) => [slug, weight(slug)]));
      layer.sort((a, b) => weights.get(a) - weights.get(b));
      settle(layer);
    }
  }
  const widest = Math.max(1, ...layers.map((layer) => layer.length));
  const across = down ? NODE.width + GAP.row : NODE.height + GAP.row;
  const along = (down ? NODE.height : NODE.width) + GAP.layer;
  const at = new Map();
  for (const slug of slugs) {
    const main = depth.get(slug) * along;
    const cross = (place.get(slug) + (widest - 1) / 2) * across;
    at.set(slug, down ? { x: cross, y: main } : { x: main, y: cross });
  }
  const long = layers.length * along - GAP.layer;
  const wide = widest * across - GAP.row;
  return { at, width: down ? wide : long, height: down ? long : wide };
}

export class Graph {
  constructor(select) {
    this.select = select;
    this.element = h("div", { class: "graph body" });
    this.nodes = new Map();
    this.edges = [];
  }

  /** `steps`: [{slug, status, done, tasks, took, isMap}] in the order of the flow. */
  show(steps, deps, selected) {
    const down = this.element.clientWidth > 0 && this.element.clientWidth < 620;
    const shape = JSON.stringify([steps.map((step) => step.slug), deps, down]);
    if (shape !== this.shape) {
      this.shape = shape;
      this.build(steps.map((step) => step.slug), deps, down);
    }
    for (const step of steps) this.paint(step, step.slug === selected);
    const over = new Set(steps.filter((step) => step.status === "completed" || step.status === "skipped").map((step) => step.slug));
    for (const { edge, arrow, from, to } of this.edges) {
      edge.setAttribute("class", `edge${over.has(from) ? " done" : ""}${selected === from || selected === to ? " lit" : ""}`);
      arrow.setAttribute("class", `arrow${over.has(from) ? " done" : ""}`);
    }
  }

  build(slugs, deps, down) {
    const { at, width, height } = layout(slugs, deps, down);
    const pad = 8;
    this.nodes.clear();
    this.edges = [];
    const svg = s("svg", {
      width: width + 2 * pad, height: height + 2 * pad, viewBox: `${-pad} ${-pad} ${width + 2 * pad} ${height + 2 * pad}`,
      role: "group", "aria-label": `${slugs.length} steps and how they depend on each other`,
    });
    // Small enough to be seen whole, large enough to be read; beyond that it scrolls.
    svg.style.minWidth = `${SMALLEST * (width + 2 * pad)}px`;
    for (const { step_slug, dep_slug } of deps) {
      const [from, to] = [at.get(dep_slug), at.get(step_slug)];
      if (!from || !to) continue;
      const a = down ? [from.x + NODE.width / 2, from.y + NODE.height] : [from.x + NODE.width, from.y + NODE.height / 2];
      const b = down ? [to.x + NODE.width / 2, to.y - 6] : [to.x - 6, to.y + NODE.height / 2];
      const bend = (down ? b[1] - a[1] : b[0] - a[0]) / 2;
      const [c, d] = down ? [[a[0], a[1] + bend], [b[0], b[1] - bend]] : [[a[0] + bend, a[1]], [b[0] - bend, b[1]]];
      const edge = s("path", { d: `M${a} C${c} ${d} ${b}` });
      const tip = down ? `M${b[0] - 5} ${b[1] - 2}h10l-5 7z` : `M${b[0] - 2} ${b[1] - 5}v10l7 -5z`;
      const arrow = s("path", { d: tip });
      this.edges.push({ edge, arrow, from: dep_slug, to: step_slug });
      svg.append(edge, arrow);
    }
    for (const slug of slugs) svg.append(this.node(slug, at.get(slug)));
    this.element.replaceChildren(svg);
  }

  node(slug, { x, y }) {
    const name = slug.length > 19 ? `${slug.slice(0, 18)}…` : slug;
    const part = {
      mark: s("text", { class: "mark", x: 11, y: 23 }),
      sub: s("text", { class: "sub", x: 28, y: 40 }),
      track: s("rect", { class: "track", x: 11, y: 47, width: NODE.width - 22, height: 4, rx: 2 }),
      bar: s("rect", { class: "bar", x: 11, y: 47, width: 0, height: 4, rx: 2 }),
    };
    const group = s("g", {
      class: "node", transform: `translate(${x} ${y})`, tabindex: "0", role: "button", "data-step": slug,
      onclick: () => this.select(slug),
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); this.select(slug); } },
    },
    s("title", {}, slug),
    s("rect", { class: "box", width: NODE.width, height: NODE.height, rx: 9 }),
    part.mark, s("text", { x: 28, y: 23 }, name), part.sub, part.track, part.bar);
    this.nodes.set(slug, { group, ...part });
    return group;
  }

  paint(step, selected) {
    const node = this.nodes.get(step.slug);
    if (!node) return;
    const many = step.isMap || step.tasks > 1;
    const progress = many && step.tasks !== null ? `${step.done}/${step.tasks}` : "";
    const retry = step.retrying ? `${step.retrying} backing off` : "";
    // As much as fits: who backs off counts more than the time.
    const time = Number.isFinite(step.took) ? seconds(step.took) : WORDS[step.status];
    const words = [progress, retry || time].filter(Boolean).join(" · ");
    node.group.setAttribute("data-status", step.status);
    node.group.setAttribute("class", `node${selected ? " selected" : ""}`);
    node.group.setAttribute("aria-pressed", String(selected));
    node.group.setAttribute("aria-label", `${step.slug}: ${WORDS[step.status] ?? step.status}${progress ? `, ${progress} tasks` : ""}`);
    node.mark.textContent = MARKS[step.status] ?? "·";
    node.sub.textContent = words;
    const shown = many && step.tasks ? "visible" : "hidden";
    node.track.setAttribute("visibility", shown);
    node.bar.setAttribute("visibility", shown);
    node.bar.setAttribute("width", step.tasks ? ((NODE.width - 22) * Math.min(1, step.done / step.tasks)).toFixed(1) : 0);
  }
}
