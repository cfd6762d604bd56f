// The admin console as node-postgres and postgres.js see it. Any surprise is an exception.
"use strict";

const assert = require("node:assert");
const pg = require("pg");
const postgres = require("postgres");

const url = process.env.FLOWGATE_URL;
const console_url = url.replace(/\/[^/]*$/, "/flowgate");
const tables = ["POOLS", "CLIENTS", "SERVERS", "STATS", "DATABASES", "USERS", "CONFIG", "VERSION", "LISTS", "MEM", "PINS", "PARKED"];

async function with_pg() {
  const client = new pg.Client(console_url);
  await client.connect();
  for (const table of tables) {
    const simple = await client.query(`SHOW ${table}`);
    const extended = await client.query({ text: `SHOW ${table}`, values: [] });
    const named = await client.query({ name: table, text: `SHOW ${table}` });
    assert.deepEqual(simple.fields.map((f) => f.name), extended.fields.map((f) => f.name));
    assert.deepEqual(simple.fields.map((f) => f.name), named.fields.map((f) => f.name));
  }
  const { rows } = await client.query("show pools");
  assert.equal(typeof rows[0].cl_active, "number");
  await assert.rejects(client.query("select 1"), { code: "42601" });
  await assert.rejects(client.query({ text: "pause nosuchdb", values: [] }), { code: "3D000" });
  const [version, lists] = await client.query("show version; show lists");
  assert.match(version.rows[0].version, /^Flowgate /);
  assert.ok(lists.rows.length > 3);
  await client.end();
}

async function with_postgres_js() {
  const sql = postgres(console_url, { max: 1, fetch_types: false });
  for (const table of tables) {
    await sql.unsafe(`SHOW ${table}`);
    await sql.unsafe(`SHOW ${table}`, [], { prepare: true });
  }
  await assert.rejects(sql.unsafe("show nothing", [], { prepare: true }), { code: "42601" });
  await sql.unsafe("reconnect");
  await sql.end();
}

async function main() {
  const client = new pg.Client(url);
  await client.connect();
  await client.query("select 1");
  await with_pg();
  await with_postgres_js();
  await client.end();
  console.log("the day is done");
}

main();
