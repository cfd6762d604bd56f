// Follows runs: what the Node followers have in common. `crowd.rs` says on standard input which runs (one line of JSON), then, for
// who starts them, when (a line `start`). A run tells these events, in this order, numbered from 1, each once or more, whatever
// happens in between. Says `ready` once all are followed, and what it met when all have ended.
const assert = require('assert')
const readline = require('readline')

const STORY = ['run:started', 'step:started', 'step:completed', 'run:completed']
const BREATH_MS = 100
const { FLOWGATE_URL: url, FLOWGATE_HTTP: http, FLOWGATE_KEY: key, FLOWGATE_PATIENCE: patience } = process.env
const sessions = Number(process.env.FLOWGATE_SESSIONS)

const met = { runs: 0, events: 0, repeats: 0, reconnects: 0, gaps: 0, made_up: 0 }
// The last number heard of each run.
const last = new Map()
// Runs of which something was left out, to be asked for again.
const gone = new Set()
let trouble = null

// An event, or its JSON. The run that must be followed anew from its last number, if this says that something was left out.
function hear(payload) {
  const event = typeof payload === 'string' ? JSON.parse(payload) : payload
  const { run_id, seq, event_type } = event
  const told = `${JSON.stringify(event).slice(0, 300)} after ${last.get(run_id)}`
  assert(last.has(run_id), told)
  if (event_type === 'gap') {
    met.gaps++
    gone.add(run_id)
    return run_id
  }
  assert(Number.isInteger(seq), told)
  met.events++
  if (seq <= last.get(run_id)) {
    met.repeats++
    return
  }
  if (seq > last.get(run_id) + 1) {
    assert(gone.has(run_id), told)
    return
  }
  assert.equal(event_type, STORY[seq - 1], told)
  last.set(run_id, seq)
  if (seq === STORY.length && --left === 0) over()
}

let left
let over
const all = new Promise((resolve) => (over = resolve))

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

// Until it succeeds.
async function again(attempt) {
  for (;;) {
    try {
      return await attempt()
    } catch (error) {
      if (error instanceof assert.AssertionError) throw error
      trouble = error
      await pause(BREATH_MS)
    }
  }
}

function fail(error) {
  process.stderr.write(`${error.stack ?? error}\n${JSON.stringify(met)}\nlast trouble: ${trouble?.stack ?? trouble}\n`)
  process.exit(1)
}

// `follow` takes a share of the runs and resolves when they are followed; `begin`, if it starts runs, all of them.
async function crowd(follow, begin = () => all) {
  process.on('uncaughtException', fail)
  process.on('unhandledRejection', fail)
  const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]()
  const runs = JSON.parse((await lines.next()).value)
  for (const run of runs) last.set(run, 0)
  met.runs = left = runs.length
  setTimeout(() => {
    const missing = [...last].filter(([, seq]) => seq < STORY.length)
    fail(`not heard in time, of ${missing.length} runs: ${JSON.stringify(missing.slice(0, 5))}`)
  }, patience * 1000)
  const shares = Array.from({ length: sessions }, (_, n) => runs.filter((_, at) => at % sessions === n))
  await Promise.all(shares.filter((share) => share.length > 0).map(follow))
  process.stdout.write('ready\n')
  assert.equal((await lines.next()).value, 'start')
  await begin(runs)
  process.stdout.write(`${JSON.stringify(met)}\n`, () => process.exit(0))
}

module.exports = { BREATH_MS, again, all, crowd, fail, gone, hear, http, key, last, met, pause, patience, url }
