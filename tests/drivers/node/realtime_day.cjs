// pgflow's own client on supabase-js, both unmodified, with Flowgate's HTTP address for a URL: runs are started, found, followed and
// waited for by broadcasts alone, also over a Flowgate that is killed and started again. Once with the oldest supabase-js
// that the client admits (protocol 1.0.0), once with the newest (2.0.0).
const assert = require('assert')
const { spawn } = require('child_process')
const { randomUUID } = require('crypto')
const net = require('net')
const { join } = require('path')
const { pathToFileURL } = require('url')
const postgres = require('postgres')
const ws = require('ws')

const KEY = 'sb_publishable_day'
const { FLOWGATE_BIN: bin, FLOWGATE_PRIMARY: primary } = process.env
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

const freePort = () =>
  new Promise((resolve) => {
    const server = net.createServer().listen(0, '127.0.0.1', () => {
      const { port } = server.address()
      server.close(() => resolve(port))
    })
  })

async function serve(ports, role) {
  const [sql, http] = ports.map((port) => `127.0.0.1:${port}`)
  const args = ['serve', '--primary', primary, '--listen', sql, '--http', http, '--auth', 'trust', '--log', 'warn']
  const env = { ...process.env, FLOWGATE_HTTP__API_KEYS: `[{ key = "${KEY}", role = "${role}" }]` }
  const flowgate = spawn(bin, args, { env, stdio: ['ignore', 'inherit', 'inherit'] })
  process.on('exit', () => flowgate.kill('SIGKILL'))
  for (;;) {
    const ready = await fetch(`http://${http}/readyz`).catch(() => null)
    if (ready?.status === 200) return flowgate
    assert.strictEqual(flowgate.exitCode, null, 'flowgate ended')
    await pause(20)
  }
}

// Works off what there is, a few tasks at a time.
const work = (sql) =>
  sql`select pgflow.complete_task(t.run_id, t.step_slug, t.task_index, jsonb_build_object('of', t.step_slug))
      from pgflow.start_tasks('greet', array(select msg_id from pgmq.read('greet', 600, 10)),
        'aaaaaaaa-0000-4000-8000-000000000001') t`

async function day(PgflowClient, connect, ports, sql, role, flowgate) {
  const supabase = connect()
  const pgflow = new PgflowClient(supabase)

  // Runs at once, worked on while they are started.
  let working = true
  const worker = (async () => {
    while (working) if ((await work(sql)).length === 0) await pause(5)
  })()
  const runs = await Promise.all(
    [...Array(15).keys()].map(async (n) => {
      const run = await pgflow.startFlow('greet', { n })
      const seen = []
      run.on('*', (event) => seen.push(event.event_type))
      const steps = ['hello', 'bye'].map((slug) => run.step(slug).waitForStatus('completed', { timeoutMs: 30000 }))
      await run.waitForStatus('completed', { timeoutMs: 30000 })
      for (const step of await Promise.all(steps)) assert.deepStrictEqual(step.output, { of: step.step_slug })
      assert.deepStrictEqual(run.output, { bye: { of: 'bye' } })
      assert.strictEqual(run.input.n, n)
      return run.run_id
    }),
  )
  working = false
  await worker

  // Ended before anybody asks (on a socket of its own: the newest library joins a topic once a socket); and one that does not exist.
  const later = new PgflowClient(connect())
  const late = await later.getRun(runs[0])
  assert.strictEqual(late.status, 'completed')
  await later.disposeAll()
  assert.strictEqual(await pgflow.getRun(randomUUID()), null)
  await assert.rejects(pgflow.startFlow('no_such_flow', {}), (error) => error.code === '23503')

  // Found half-way by another client.
  const started = await pgflow.startFlow('greet', { n: 'found' })
  await work(sql)
  const other = new PgflowClient(connect())
  const found = await other.getRun(started.run_id)
  const both = [started, found].map((run) => run.waitForStatus('completed', { timeoutMs: 30000 }))
  await work(sql)
  await Promise.all(both)
  await other.disposeAll()

  // All of it happens while nobody is there to tell.
  const lost = await pgflow.startFlow('greet', { n: 'lost' })
  const ended = new Promise((resolve) => flowgate.once('exit', resolve))
  flowgate.kill('SIGKILL')
  await ended
  await work(sql)
  await work(sql)
  flowgate = await serve(ports, role)
  await lost.waitForStatus('completed', { timeoutMs: 60000 })
  assert.deepStrictEqual(lost.output, { bye: { of: 'bye' } })
  await pgflow.disposeAll()
  await supabase.removeAllChannels()
  supabase.realtime.disconnect()
  return flowgate
}

async function main() {
  const { PgflowClient } = await import(
    pathToFileURL(join(process.env.NODE_PATH, '@pgflow/client/dist/index.js')).href
  )
  const role = `day_${randomUUID().slice(0, 8)}`
  const sql = postgres(primary, { max: 4, onnotice: () => {} })
  await sql.unsafe(`create role ${role}; select flowgate.grant_viewer('${role}')`)
  await sql`select pgflow.create_flow('greet')`
  await sql`select pgflow.add_step('greet', 'hello')`
  await sql`select pgflow.add_step('greet', 'bye', array['hello'])`
  await sql`insert into pgflow.workers (worker_id, queue_name, function_name)
            values ('aaaaaaaa-0000-4000-8000-000000000001', 'greet', 'day')`
  const ports = [await freePort(), await freePort()]
  let flowgate = await serve(ports, role)
  const url = `http://127.0.0.1:${ports[1]}`
  // The old one brings its own WebSocket, and never sets up one that it is given; the new one has none before Node 22.
  for (const [library, realtime] of [['@supabase/supabase-js', {}], ['supabase-js-latest', { transport: ws }]]) {
    const { createClient } = require(library)
    const connect = () => createClient(url, KEY, { auth: { persistSession: false }, realtime })
    flowgate = await day(PgflowClient, connect, ports, sql, role, flowgate)
    console.log(`${library}: done`)
  }
  flowgate.kill('SIGKILL')
  await sql.end()
  console.log('the day is done')
  process.exit(0)
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
