// Runs started and followed with pgflow's own client on supabase-js, both unmodified: half of the sockets by the oldest
// supabase-js that the client admits (protocol 1.0.0), half by the newest (2.0.0). Connects and joins again by itself. A client that
// is told of what it missed as a state alone (it read too slowly) has its runs' states right all the same.
const { join } = require('path')
const { pathToFileURL } = require('url')
const ws = require('ws')
const { all, crowd, fail, hear, http, key, last, met, pause, patience } = require('./followers.cjs')

const slow = process.env.FLOWGATE_SLOW === '1'
const LIBRARIES = [['@supabase/supabase-js', {}], ['supabase-js-latest', { transport: ws }]]
const shares = []
// It tells of every channel.
console.log = console.error = () => {}

const heard = (event) => {
  // Made of a run's state.
  if (slow && (event.seq === undefined || event.seq > last.get(event.run_id) + 1)) met.made_up++
  else hear(event)
}

async function connected(library, realtime) {
  const { PgflowClient } = await import(
    pathToFileURL(join(process.env.NODE_PATH, '@pgflow/client/dist/index.js')).href
  )
  const supabase = require(library).createClient(http, key, { auth: { persistSession: false }, realtime })
  const pgflow = new PgflowClient(supabase)
  pgflow.onRunEvent(heard)
  pgflow.onStepEvent(heard)
  return pgflow
}

async function follow(share) {
  const library = LIBRARIES[shares.length % LIBRARIES.length]
  const one = { share, library }
  shares.push(one)
  one.pgflow = await connected(...library)
}

// A start that failed may have succeeded: then the run is there. The oldest library may never get through with what it
// was joining when its socket broke, so that is left to a new one.
async function started({ pgflow, library }, run) {
  for (;;) {
    try {
      return await pgflow.startFlow('greet', {}, run)
    } catch (error) {
      met.reconnects++
      pgflow.dispose(run)
      await pause(200)
      pgflow = await connected(...library)
      const found = await pgflow.getRun(run).catch(() => null)
      if (found) return found
    }
  }
}

async function ended(told) {
  const timeoutMs = patience * 1000
  const step = told.step('hello')
  await Promise.all([told.waitForStatus('completed', { timeoutMs }), step.waitForStatus('completed', { timeoutMs })])
}

async function begin() {
  const runs = shares.flatMap((client) => client.share.map((run) => started(client, run)))
  const told = await Promise.all(runs)
  process.stdout.write('begun\n')
  await Promise.all(told.map(ended))
  if (!slow) await all
}

crowd(follow, begin).catch(fail)
