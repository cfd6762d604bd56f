// Runs followed with node-postgres: a client a share.
const { Client } = require('pg')
const { follower, runs, shares, start, url } = require('./followers.cjs')

async function listen(share) {
  const client = new Client({ connectionString: url })
  await client.connect()
  const { hear, over } = follower(share)
  client.on('notification', ({ payload }) => hear(payload))
  for (const run of share) await client.query(`listen "pgflow:run:${run}"`)
  return { client, over }
}

async function day() {
  const sessions = await Promise.all(shares.map(listen))
  const client = new Client({ connectionString: url })
  await client.connect()
  await client.query(start, [runs])
  await Promise.all(sessions.map(({ over }) => over))
  await Promise.all([client, ...sessions.map(({ client }) => client)].map((client) => client.end()))
  console.log('the day is done')
}

day().catch((error) => {
  console.error(error)
  process.exit(1)
})
