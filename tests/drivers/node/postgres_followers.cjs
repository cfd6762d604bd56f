// Runs followed with postgres.js, which listens to all channels of a pool over one connection.
const postgres = require('postgres')
const { follower, runs, shares, start, url } = require('./followers.cjs')

async function listen(share) {
  const sql = postgres(url, { max: 1, onnotice: () => {} })
  const { hear, over } = follower(share)
  for (const run of share) await sql.listen(`pgflow:run:${run}`, hear)
  return { sql, over }
}

async function day() {
  const sessions = await Promise.all(shares.map(listen))
  const sql = postgres(url, { max: 1 })
  await sql.unsafe(start, [runs])
  await Promise.all(sessions.map(({ over }) => over))
  await Promise.all([sql, ...sessions.map(({ sql }) => sql)].map((sql) => sql.end()))
  console.log('the day is done')
}

day().catch((error) => {
  console.error(error)
  process.exit(1)
})
