// How to follow this run from elsewhere, with this server's own address.

import { copier, h } from "/dashboard/dom.js";

/** Where Postgres' protocol is spoken: as configured, or on the host of this page if that means every address. */
function postgres() {
  const { postgres: address, database } = document.documentElement.dataset;
  const at = address.lastIndexOf(":");
  let host = address.slice(0, at);
  if (host === "0.0.0.0" || host === "[::]") host = location.hostname;
  return { url: `postgres://USER:PASSWORD@${host}:${address.slice(at + 1)}/${encodeURIComponent(database)}`, short: `postgres://USER@${host}:${address.slice(at + 1)}/${encodeURIComponent(database)}` };
}

export function snippets(id) {
  const { url, short } = postgres();
  const http = location.origin;
  return {
    flowgate: `flowgate follow ${id} \\\n  --url ${short}\n\n# every event as JSON, one a line; the exit status is the outcome\nflowgate follow ${id} --json --url ${short}`,
    psql: `psql ${short}\n\nlisten "pgflow:run:${id}@0";\nselect jsonb_pretty(pgflow.get_run_with_states('${id}'));`,
    curl: `# events, from the first; Last-Event-ID goes on where you were\ncurl -N -H "apikey: $KEY" \\\n  '${http}/events/runs/${id}?cursor=0'\n\n# the run as it is now\ncurl -H "apikey: $KEY" '${http}/runs/${id}'`,
    JavaScript: `const events = new EventSource("${http}/events/runs/${id}?snapshot=1");\nevents.addEventListener("snapshot", ({ data }) => console.log(JSON.parse(data)));\nevents.onmessage = ({ data }) => {\n  const event = JSON.parse(data);\n  console.log(event.seq, event.event_type, event.step_slug ?? "");\n  if (["run:completed", "run:failed"].includes(event.event_type)) events.close();\n};`,
    Python: `import json, psycopg\n\nwith psycopg.connect("${url}", autocommit=True) as conn:\n    conn.execute('listen "pgflow:run:${id}@0"')\n    for notification in conn.notifies():\n        event = json.loads(notification.payload)\n        print(event.get("seq"), event["event_type"], event.get("step_slug", ""))\n        if event["event_type"] in ("run:completed", "run:failed"):\n            break`,
    Rust: `use futures_util::{StreamExt, stream};\nuse tokio_postgres::{AsyncMessage, NoTls};\n\n#[tokio::main]\nasync fn main() -> Result<(), Box<dyn std::error::Error>> {\n    let (client, mut connection) = tokio_postgres::connect("${url}", NoTls).await?;\n    let (tell, mut events) = tokio::sync::mpsc::channel(1000);\n    tokio::spawn(async move {\n        let mut messages = stream::poll_fn(move |cx| connection.poll_message(cx));\n        while let Some(Ok(message)) = messages.next().await {\n            if let AsyncMessage::Notification(event) = message {\n                drop(tell.send(event).await);\n            }\n        }\n    });\n    client.batch_execute("listen \\"pgflow:run:${id}@0\\"").await?;\n    while let Some(event) = events.recv().await {\n        println!("{}", event.payload());\n    }\n    Ok(())\n}`,
  };
}

export function snippetCard(id) {
  const texts = snippets(id);
  const code = h("code");
  const choose = (name) => {
    code.textContent = texts[name];
    for (const tab of tabs.children) tab.setAttribute("aria-pressed", String(tab.textContent === name));
  };
  const tabs = h("div", { class: "segments", role: "group", "aria-label": "Language" }, Object.keys(texts).map((name) => h("button", { type: "button", class: "small", onclick: () => choose(name) }, name)));
  choose("flowgate");
  return h("section", { class: "card", "aria-label": "Follow this run from elsewhere" },
    h("div", { class: "head" }, h("h2", {}, "Follow it")),
    h("div", { class: "body stack" }, h("div", { class: "scroll" }, tabs), h("div", { class: "snippet" }, h("pre", { tabindex: "0" }, code), copier(() => code.textContent))));
}
