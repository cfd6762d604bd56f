// Follows runs: what pg and postgres.js have in common here. Each session follows its share; a run tells these events, in this
// order, numbered from 1, each once or more.
const assert = require('assert')
const { randomUUID } = require('crypto')

const STORY = ['run:started', 'step:started', 'step:completed', 'run:completed']
const SESSIONS = 20
const runs = Array.from({ length: Number(process.env.FLOWGATE_RUNS) }, () => randomUUID())
const shares = Array.from({ length: SESSIONS }, (_, n) => runs.filter((_, at) => at % SESSIONS === n))

// `hear` takes payloads; `over` is a promise.
function follower(share) {
  const last = new Map(share.map((run) => [run, 0]))
  let left = share.length
  let hear
  const over = new Promise((resolve, reject) => {
    hear = (payload) => {
      try {
        const { run_id, seq, event_type } = JSON.parse(payload)
        assert(seq <= last.get(run_id) + 1, `${payload} after ${last.get(run_id)}`)
        if (seq <= last.get(run_id)) return
        assert.equal(event_type, STORY[seq - 1], payload)
        last.set(run_id, seq)
        if (seq === STORY.length && --left === 0) resolve()
      } catch (error) {
        reject(error)
      }
    }
  })
  return { hear, over }
}

const start = "select pgflow.start_flow('greet', '{}', run) from unnest($1::uuid[]) as run"
module.exports = { runs, shares, follower, start, url: process.env.FLOWGATE_URL }
