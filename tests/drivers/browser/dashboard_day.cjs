// A visitor's day at the dashboard, in a real browser: a run with a map of fifty is started, watched live to its end, and looked
// into; nothing is an error on the console. The worker is a real one; its handlers wait at gates that open as the page shows
// what it should, so nothing here waits for luck. Run by days.rs.

const assert = require("node:assert/strict");
const { writeFileSync, statSync } = require("node:fs");
const { join } = require("node:path");
const { Client } = require("pg");
const puppeteer = require("puppeteer-core");

const { FLOWGATE_URL, FLOWGATE_HTTP, FLOWGATE_LOCKED_HTTP, FLOWGATE_BROWSER, FLOWGATE_SCREENSHOTS } = process.env;
const FLOW = "import_pages";
const PAGES = 50;
const LANES = 6;
const PATIENCE = { timeout: 30_000 };
const EVIL = "<script>window.taken = true</script><img src=x onerror='window.taken = true'>";
// More than a JavaScript number holds.
const BIG = "12345678901234567891";
const WORKER = "bbbbbbbb-0000-4000-8000-000000000001";
const SIZE_MAX = 300_000;

// ---- the worker ----

const gates = {};
for (const name of ["rest", "end"]) {
  gates[name] = {};
  gates[name].passed = new Promise((open) => { gates[name].open = open; });
}

const failed = new Set();
const work = {
  list: async () => Array.from({ length: PAGES }, (_, at) => ({ url: `https://example.org/${at}` })),
  fetch: async (task) => {
    if (task.task_index === 13 && !failed.has(13)) { failed.add(13); throw new Error(`HTTP 503: ${EVIL}`); }
    if (task.task_index >= 20) await gates.rest.passed;
    return { url: task.input.url, words: 100 + task.task_index, text: "lorem ipsum ".repeat(20) };
  },
  parse: async () => "parsed",
  thumbs: async () => ({ made: PAGES }),
  report: async () => { await gates.end.passed; return { report: EVIL, pages: PAGES }; },
};

async function connect() {
  const client = new Client(FLOWGATE_URL);
  await client.connect();
  return client;
}

/** As pgflow's workers do; an own connection for each of what is under way at once. */
async function lane(stopped) {
  const client = await connect();
  while (!stopped()) {
    const { rows: messages } = await client.query("select msg_id from pgflow.read_with_poll($1, 60, 1, 1, 50)", [FLOW]);
    if (!messages.length) continue;
    const { rows: tasks } = await client.query("select * from pgflow.start_tasks($1, $2::bigint[], $3)", [FLOW, messages.map((row) => row.msg_id), WORKER]);
    for (const task of tasks) {
      try {
        const output = await work[task.step_slug](task);
        await client.query("select pgflow.complete_task($1, $2, $3, $4)", [task.run_id, task.step_slug, task.task_index, JSON.stringify(output)]);
      } catch (error) {
        await client.query("select pgflow.fail_task($1, $2, $3, $4)", [task.run_id, task.step_slug, task.task_index, error.message]);
      }
    }
  }
  await client.end();
}

// ---- the visitor ----

/** What the page shows, should something be missing. */
let told = async () => "";

async function main() {
  const client = await connect();
  await client.query(`
    select pgflow.create_flow('${FLOW}', max_attempts => 3, base_delay => 4);
    select pgflow.add_step('${FLOW}', 'list');
    select pgflow.add_step('${FLOW}', 'fetch', array['list'], step_type => 'map');
    select pgflow.add_step('${FLOW}', 'parse', array['fetch']);
    select pgflow.add_step('${FLOW}', 'thumbs', array['fetch']);
    select pgflow.add_step('${FLOW}', 'report', array['parse', 'thumbs']);
    select pgflow.create_flow('doomed', max_attempts => 1); select pgflow.add_step('doomed', 'only');
    insert into pgflow.workers (worker_id, queue_name, function_name) values ('${WORKER}', '${FLOW}', 'day')`);
  const browser = await puppeteer.launch({ executablePath: FLOWGATE_BROWSER, args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"] });
  const errors = [];
  const open = async (view) => {
    const page = await browser.newPage();
    page.on("console", (message) => { if (["error", "warn", "warning"].includes(message.type())) errors.push(`${message.text()} ${message.location().url ?? ""}`); });
    page.on("pageerror", (error) => errors.push(String(error.stack)));
    page.setDefaultTimeout(PATIENCE.timeout);
    await page.setViewport(view);
    return page;
  };
  const page = await open({ width: 1440, height: 1000 });
  told = async () => `${page.url()}\n${await page.evaluate(() => document.body.innerText.slice(0, 3000))}\n${errors.join("\n")}`;
  const shown = (text, selector = "main") => page.waitForFunction((text, selector) => document.querySelector(selector)?.textContent.includes(text), PATIENCE, text, selector);
  const node = (step, status, words = "") => page.waitForFunction((step, status, words) => {
    const group = document.querySelector(`.node[data-step="${step}"]`);
    return group?.dataset.status === status && group.textContent.includes(words);
  }, PATIENCE, step, status, words);

  // Nothing there; then a run comes in by itself.
  await page.goto(FLOWGATE_HTTP);
  await shown("No run yet");
  await shown("live", "#live");
  const input = { site: "https://example.org", note: EVIL, account: BIG, words: Array.from({ length: 900 }, (_, at) => `word ${at}`) };
  const { rows: [{ run_id: run }] } = await client.query("select run_id from pgflow.start_flow($1, $2)", [FLOW, JSON.stringify(input).replace(`"${BIG}"`, BIG)]);
  await page.waitForSelector(`tr[data-run="${run}"] .badge[data-status="started"]`);

  // By keyboard alone to the run.
  await page.keyboard.press("j");
  await page.waitForSelector(`tr[data-run="${run}"][aria-selected="true"]`);
  await page.keyboard.press("Enter");
  await node("list", "started");
  await node("report", "created");
  assert.equal((await page.$$(".edge")).length, 5);

  // What is in a payload is text.
  await shown("window.taken");
  await shown("Show all", ".payload");
  assert.equal(await page.$$eval("main script, main img", (found) => found.length), 0);
  assert.ok(!(await page.$eval(".payload pre", (pre) => pre.textContent)).includes("word 899"));
  await page.$$eval(".payload button", (buttons) => buttons.find((button) => button.textContent.startsWith("Show all")).click());
  await shown("word 899", ".payload pre");
  await shown(`"account": ${BIG}`, ".payload pre");

  // The worker begins; one task fails and backs off, twenty-odd wait at their gate.
  let stopped = false;
  const lanes = Array.from({ length: LANES }, () => lane(() => stopped));
  await node("list", "completed");
  await node("fetch", "started", "19/50");
  await node("fetch", "started", "1 backing off");
  await page.click('.node[data-step="fetch"]');
  await page.click('.waterfall [data-row="fetch"]');
  await page.waitForSelector(".waterfall .row.task .phase-backing");
  await shown("HTTP 503: <script>");
  const pictures = await screenshots(page, open, run);
  gates.rest.open();
  await node("fetch", "completed", "50/50");
  await node("parse", "completed");
  await node("thumbs", "completed");
  await node("report", "started");
  await page.waitForSelector('h1 ~ [role="status"] .badge[data-status="started"]');
  gates.end.open();
  await node("report", "completed");
  await page.waitForSelector('h1 ~ [role="status"] .badge[data-status="completed"]');
  await shown("5 of 5 steps, 54 of 54 tasks");

  // Every event, once and in order, and where one would go on.
  const numbers = await page.$$eval(".events summary span:first-child", (spans) => spans.map((span) => Number(span.textContent)));
  assert.deepEqual(numbers, Array.from({ length: 12 }, (_, at) => at + 1));
  await shown("cursor 12");
  await page.click(".events details:last-child summary");
  await shown('"event_type": "run:completed"', ".events details:last-child");
  await page.keyboard.press("Escape");

  // The task that was tried twice, in the waterfall.
  await shown("13 · 2 tries", ".waterfall");

  // How to follow it, with this server's own address.
  const { host, pathname } = new URL(FLOWGATE_URL);
  for (const [language, words] of [["flowgate", `flowgate follow ${run}`], ["psql", `${host}${pathname}`], ["curl", `${FLOWGATE_HTTP}/events/runs/${run}`],
    ["JavaScript", "EventSource"], ["Python", `pgflow:run:${run}@0`], ["Rust", "tokio_postgres::connect"]]) {
    await page.$$eval(".segments button", (buttons, language) => buttons.find((button) => button.textContent === language).click(), language);
    await shown(words, ".snippet code");
  }

  // Keyboard, dialogs, the way back.
  await page.evaluate(() => document.activeElement.blur());
  await page.keyboard.press("?");
  await page.waitForSelector("#help-dialog[open]");
  await page.keyboard.press("Escape");
  await page.waitForFunction(() => !document.querySelector("#help-dialog").open);
  await page.keyboard.press("u");
  await page.waitForSelector(`tr[data-run="${run}"] .badge[data-status="completed"]`);

  // Filters: by status, and by flow; live all the same.
  const { rows: [{ run_id: doomed }] } = await client.query("select run_id from pgflow.start_flow('doomed', '{}')");
  await page.waitForSelector(`tr[data-run="${doomed}"] .badge[data-status="started"]`);
  await page.$$eval(".filters .segments button", (buttons) => buttons.find((button) => button.textContent === "Failed").click());
  await shown("No run fits");
  await client.query(`select pgflow.start_tasks('doomed', array(select msg_id from pgmq.read('doomed', 60, 1)), '${WORKER}')`);
  await client.query(`select pgflow.fail_task('${doomed}', 'only', 0, 'no luck')`);
  await page.waitForSelector(`tr[data-run="${doomed}"] .badge[data-status="failed"]`);
  assert.equal((await page.$$(".runs tbody tr")).length, 1);
  await page.$$eval(".filters .segments button", (buttons) => buttons.find((button) => button.textContent === "All").click());
  await page.waitForSelector(`tr[data-run="${run}"]`);
  await page.waitForFunction((flow) => [...document.querySelectorAll("select option")].some((option) => option.value === flow), PATIENCE, FLOW);
  await page.select(".filters select", FLOW);
  await page.waitForFunction((doomed) => document.querySelectorAll(".runs tbody tr").length === 1 && !document.querySelector(`tr[data-run="${doomed}"]`), PATIENCE, doomed);
  await page.keyboard.press("Escape");
  await page.goto(`${FLOWGATE_HTTP}/#/runs/${doomed}`);
  await shown("no luck", ".field.bad");
  await page.waitForSelector('.node[data-status="failed"]');

  // The proxy's own numbers.
  await page.keyboard.press("h");
  await shown("ready", ".tile");
  await shown("flowgate_requests_total", ".metrics");
  await page.waitForFunction(() => /\d\/s/.test(document.querySelectorAll(".tile")[1]?.textContent ?? ""), PATIENCE);
  assert.equal(await contrast(page), "");

  // A run there is none of, and a server that asks who one is: said in words (which a browser counts as errors of the network).
  assert.deepEqual(errors, []);
  await page.goto(`${FLOWGATE_HTTP}/#/runs/00000000-0000-4000-8000-00000000dead`);
  await shown("There is no run", "[role=alert]");
  await page.goto(FLOWGATE_LOCKED_HTTP);
  await page.waitForSelector("#key-dialog[open]");
  await page.type("#key-field", "open sesame");
  await page.keyboard.press("Enter");
  await page.waitForSelector(`tr[data-run="${run}"]`);
  await shown("live", "#live");
  const unexpected = errors.filter((error) => !/status of (404|401)/.test(error));
  assert.deepEqual(unexpected, []);
  assert.equal(await page.evaluate(() => window.taken), undefined);

  stopped = true;
  await Promise.all(lanes);
  await browser.close();
  await client.end();
  for (const [name, picture] of pictures) writeFileSync(join(FLOWGATE_SCREENSHOTS, name), picture);
  for (const [name] of pictures) assert.ok(statSync(join(FLOWGATE_SCREENSHOTS, name)).size < SIZE_MAX, name);
  console.log("the day is done");
}

/** Light, dark and on a phone, while the run goes on. Nothing of the page may be wider than its window. */
async function screenshots(page, open, run) {
  const fits = async (page) => assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "wider than the window");
  await fits(page);
  const pictures = [["dashboard.png", await page.screenshot()]];
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "dark" }]);
  await page.waitForSelector('html[data-theme="dark"]');
  pictures.push(["dashboard-dark.png", await page.screenshot()]);
  await page.click("#theme");
  await page.waitForSelector('html[data-theme="light"]');
  await page.click("#theme");
  await page.waitForSelector('html[data-theme="dark"]');
  await page.click("#theme");
  await page.emulateMediaFeatures([]);
  await page.waitForSelector('html[data-theme="light"]');
  const phone = await open({ width: 390, height: 1180, isMobile: true, hasTouch: true, deviceScaleFactor: 1.5 });
  await phone.goto(`${FLOWGATE_HTTP}/#/runs/${run}`);
  await phone.waitForSelector('.node[data-step="fetch"][data-status="started"]');
  await phone.waitForSelector(".waterfall .phase-running");
  await fits(phone);
  pictures.push(["dashboard-phone.png", await phone.screenshot()]);
  await phone.close();
  return pictures;
}

/** Texts that are hard to read (WCAG AA: 4.5 to 1), in either theme; none, one hopes. */
async function contrast(page) {
  let found = "";
  for (const theme of ["light", "dark"]) {
    found += await page.evaluate((theme) => {
      const root = document.documentElement;
      const before = root.dataset.theme;
      root.dataset.theme = theme;
      const style = getComputedStyle(root);
      const light = (name) => {
        const [r, g, b] = style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16) / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const pairs = [["--ink", "--bg"], ["--ink", "--card"], ["--dim", "--bg"], ["--dim", "--card"], ["--accent-ink", "--accent"], ["--ink", "--failed-soft"],
        ...["waiting", "running", "completed", "failed", "skipped"].map((status) => [`--${status}`, `--${status}-soft`])];
      const poor = pairs.filter(([a, b]) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05) < 4.5);
      root.dataset.theme = before;
      return poor.map((pair) => `${theme}: ${pair.join(" on ")}; `).join("");
    }, theme);
  }
  return found;
}

main().catch(async (error) => {
  console.error(error);
  console.error(await told().catch(String));
  process.exit(1);
});
