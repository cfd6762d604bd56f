// A flow worked to its end by pgflow's own `PgflowSqlClient`, at each of the servers that FLOWGATE_URLS names: lists, maps
// over them, a task that fails and is tried again, one that fails for good, a run with an id of the caller's.
const assert = require('assert')
const { randomUUID } = require('crypto')
const { join } = require('path')
const { pathToFileURL } = require('url')
const postgres = require('postgres')

const numbers = (count) => [...Array(count).keys()]

// list → double (map) → sum; shout beside them; report at the end.
async function define(sql, flow) {
  await sql`select pgflow.create_flow(${flow}, max_attempts => 2, base_delay => 0, timeout => 30)`
  await sql`select pgflow.add_step(${flow}, 'list')`
  await sql`select pgflow.add_step(${flow}, 'double', array['list'], step_type => 'map')`
  await sql`select pgflow.add_step(${flow}, 'sum', array['double'])`
  await sql`select pgflow.add_step(${flow}, 'shout')`
  await sql`select pgflow.add_step(${flow}, 'report', array['sum', 'shout'])`
}

const tried = new Set()
const handlers = {
  list: (input) => numbers(input.run.count),
  double: (element) => element * 2 + 1,
  sum: (input) => ({ total: input.double.reduce((sum, n) => sum + n, 0) }),
  shout: (input, run) => {
    if (input.run.fail) throw new Error('never')
    if (!tried.has(run)) {
      tried.add(run)
      throw new Error('once more')
    }
    return { said: input.run.word.toUpperCase() }
  },
  report: (input) => ({ ...input.sum, ...input.shout }),
}

// As the edge worker does it: one poll, one start, the handlers a few at a time.
async function work(client, flow, worker, until) {
  while (!(await until())) {
    const messages = await client.readMessages(flow, 5, 10, 1, 20)
    if (messages.length === 0) continue
    const tasks = await client.startTasks(flow, messages.map((message) => message.msg_id), worker)
    await Promise.all(tasks.map(async (task) => {
      try {
        await client.completeTask(task, handlers[task.step_slug](task.input, task.run_id))
      } catch (error) {
        await client.failTask(task, error)
      }
    }))
  }
}

async function day(PgflowSqlClient, url, flow) {
  const sql = postgres(url, { prepare: false, max: 4, onnotice: () => {} })
  const client = new PgflowSqlClient(sql)
  await define(sql, flow)
  const worker = randomUUID()
  await sql`insert into pgflow.workers (queue_name, worker_id, function_name) values (${flow}, ${worker}, 'day') returning *`

  const chosen = randomUUID()
  const good = await client.startFlow(flow, { count: 20, word: 'ünïcode' })
  const named = await client.startFlow(flow, { count: 0, word: 'none' }, chosen)
  assert.deepStrictEqual([good.status, good.remaining_steps, named.run_id], ['started', 5, chosen])
  await assert.rejects(client.startFlow(flow, {}, chosen), (error) => error.code === '23505')
  await assert.rejects(client.startFlow('nothing', {}), (error) => error.code === '23503')
  const bad = await client.startFlow(flow, { count: 1, fail: true })

  const open = async () => (await sql`select count(*)::int as n from pgflow.runs where flow_slug = ${flow} and status = 'started'`)[0].n === 0
  await work(client, flow, worker, open)

  const run = async (id) => (await sql`select pgflow.get_run_with_states(${id}) as run`)[0].run
  const [done, empty, failed] = await Promise.all([good, named, bad].map((one) => run(one.run_id)))
  assert.deepStrictEqual(done.run.output, { report: { total: 400, said: 'ÜNÏCODE' } })
  assert.deepStrictEqual(empty.run.output, { report: { total: 0, said: 'NONE' } })
  assert.deepStrictEqual([done.run.status, empty.run.status, failed.run.status], ['completed', 'completed', 'failed'])
  assert.strictEqual(failed.steps.find((step) => step.step_slug === 'shout').error_message, 'never')
  assert.deepStrictEqual(new Set(done.steps.map((step) => step.status)), new Set(['completed']))
  const [left] = await sql`select queue_length::int as n from pgmq.metrics(${flow})`
  assert.strictEqual(left.n, 0)
  const [late] = await sql`select count(*)::int as n from pgflow.start_tasks(${flow}, array[1, 2, 3]::bigint[], ${worker}::uuid)`
  assert.strictEqual(late.n, 0)
  await sql.end()
}

async function main() {
  const core = pathToFileURL(join(process.env.NODE_PATH, '@pgflow/core/dist/index.js'))
  const { PgflowSqlClient } = await import(core)
  for (const [n, url] of process.env.FLOWGATE_URLS.split(' ').entries()) {
    await day(PgflowSqlClient, url, `day_${n}`)
  }
  console.log('the day is done')
}

main().catch((error) => { console.error(error); process.exit(1) })
