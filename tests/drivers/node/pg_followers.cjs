// Runs followed with node-postgres: a client a share, and another one from where it was when that is lost.
const { Client } = require('pg')
const { again, crowd, fail, hear, last, met, url } = require('./followers.cjs')

const from = (run) => `listen "pgflow:run:${run}@${last.get(run)}"`

async function follow(share, how = (run) => `listen "pgflow:run:${run}"`) {
  await again(async () => {
    const client = new Client({ connectionString: url })
    let followed = false
    let broken = false
    const lost = () => {
      if (broken) return
      broken = true
      if (!followed) return
      met.reconnects++
      follow(share, from).catch(fail)
    }
    client.on('error', lost)
    client.on('end', lost)
    client.on('notification', ({ payload }) => {
      const run = hear(payload)
      if (run) client.query(from(run)).catch(lost)
    })
    try {
      await client.connect()
      for (const run of share) await client.query(how(run))
      if (broken) throw new Error('lost while it began to listen')
      followed = true
    } catch (error) {
      client.end().catch(() => {})
      throw error
    }
  })
}

crowd((share) => follow(share)).catch(fail)
