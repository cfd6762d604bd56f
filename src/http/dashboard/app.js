// Which page is shown, the key, the theme, the keyboard.

import { key, setKey } from "/dashboard/api.js";
import { healthPage } from "/dashboard/health.js";
import { runPage } from "/dashboard/run.js";
import { runsPage } from "/dashboard/runs.js";

const main = document.getElementById("main");
const live = document.getElementById("live");
const [keyDialog, helpDialog] = [document.getElementById("key-dialog"), document.getElementById("help-dialog")];
const THEME = "flowgate.theme";
const THEMES = ["system", "light", "dark"];
let page = null;

const shell = {
  live(state) {
    live.dataset.state = state;
    live.textContent = { live: "live", away: "reconnecting", off: "not live" }[state];
  },
  askKey(why) {
    if (keyDialog.open) return;
    document.getElementById("key-why").textContent = why;
    document.getElementById("key-field").value = key();
    keyDialog.showModal();
  },
};

function show() {
  page?.stop();
  live.textContent = "";
  document.title = "Flowgate";
  const [path, query] = (location.hash.slice(1) || "/").split("?");
  const parts = path.split("/").filter(Boolean);
  const name = parts[0] === "health" ? "health" : "runs";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (name === "health") page = healthPage(main, shell);
  else if (parts[0] === "runs" && parts[1]) page = runPage(main, decodeURIComponent(parts[1]), shell);
  else page = runsPage(main, new URLSearchParams(query ?? ""), shell);
  scrollTo(0, 0);
}

// ---- theme ----

const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => (THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "system");
function dress() {
  const wanted = theme();
  const isDark = wanted === "dark" || (wanted === "system" && dark.matches);
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  document.getElementById("theme").textContent = { system: "Auto", light: "Light", dark: "Dark" }[wanted];
}
function turn() {
  localStorage.setItem(THEME, THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]);
  dress();
}
dark.addEventListener("change", dress);
document.getElementById("theme").addEventListener("click", turn);
document.getElementById("help").addEventListener("click", () => helpDialog.showModal());

// ---- key ----

document.getElementById("key").addEventListener("click", () => shell.askKey(""));
document.getElementById("key-field").addEventListener("keydown", (event) => {
  // Enter would press the first button, which forgets.
  if (event.key === "Enter") { event.preventDefault(); keyDialog.close("use"); }
});
keyDialog.addEventListener("close", () => {
  const word = document.getElementById("key-field").value.trim();
  document.getElementById("key-field").value = "";
  if (keyDialog.returnValue === "use") setKey(word);
  else if (keyDialog.returnValue === "forget") setKey("");
  else return;
  keyDialog.returnValue = "";
  show();
});

// ---- keyboard ----

addEventListener("keydown", (event) => {
  const typing = event.target.matches?.("input, select, textarea");
  if (event.key === "Escape" && typing) { event.target.blur(); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey || keyDialog.open || helpDialog.open) return;
  const pressed = event.target.matches?.("button, a, summary, [role=button]");
  const keys = {
    j: () => page.move(1), k: () => page.move(-1), u: () => { location.hash = "#/"; }, h: () => { location.hash = "#/health"; }, t: turn,
    "?": () => helpDialog.showModal(), "/": () => (main.querySelector("[data-search]") ?? main).focus(),
  };
  if (!pressed) keys.Enter = () => page.enter();
  if (!Object.hasOwn(keys, event.key)) return;
  event.preventDefault();
  keys[event.key]();
});

addEventListener("hashchange", show);
dress();
show();
