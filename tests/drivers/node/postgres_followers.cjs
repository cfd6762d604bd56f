// Runs followed with postgres.js, which listens to all channels of a pool over one connection, and to the same ones again when that is
// lost. It knows a listener by its channel, and notifications come under the channel without a cursor: so one listens to that,
// and asks for all that was told before by a second; what comes between the two, after a connection was cut, is in that once more.
const postgres = require('postgres')
const { again, crowd, fail, gone, hear, last, met, url } = require('./followers.cjs')

async function follow(share) {
  const sql = postgres(url, { max: 1, onnotice: () => {} })
  const resume = (run, seq) => sql.listen(`pgflow:run:${run}@${seq}`, () => {})
  for (const run of share) {
    let times = 0
    if (process.env.FLOWGATE_CUT === '1') gone.add(run)
    const heard = (payload) => {
      if (hear(payload)) resume(run, last.get(run)).catch(fail)
    }
    await again(() => sql.listen(`pgflow:run:${run}`, heard, () => times++ && met.reconnects++))
    await again(() => resume(run, 0))
  }
}

crowd(follow).catch(fail)
