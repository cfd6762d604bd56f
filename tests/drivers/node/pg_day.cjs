// A day's work with node-postgres (`pg`) at the server that FLOWGATE_URL names. Any surprise is an exception.
const assert = require('assert')
const { pipeline } = require('stream/promises')
const { Readable } = require('stream')
const { Client, Pool } = require('pg')
const Cursor = require('pg-cursor')
const copy = require('pg-copy-streams')

const connectionString = process.env.FLOWGATE_URL
const connect = async (more) => {
  const client = new Client({ connectionString, ...more })
  await client.connect()
  return client
}
const fails = (work, code) => assert.rejects(work, (error) => (assert.strictEqual(error.code, code), true))

async function queries(client) {
  await client.query('create table items (id int primary key, name text, price numeric, tags text[], doc jsonb)')
  await client.query('insert into items values ($1, $2, $3, $4, $5)', [1, 'ünïcode', '12.50', ['a', 'b'], { k: [1, null] }])
  const { rows } = await client.query('select * from items')
  assert.deepStrictEqual(rows, [{ id: 1, name: 'ünïcode', price: '12.50', tags: ['a', 'b'], doc: { k: [1, null] } }])
  const many = await client.query('select 1 as a; select 2 as b')
  assert.deepStrictEqual(many.map((result) => result.rows[0]), [{ a: 1 }, { b: 2 }])
  assert.strictEqual((await client.query('')).command, null)
  const binary = await client.query({ text: 'select $1::int4 as n, $2::bool as yes', values: [7, true], binary: true })
  assert.deepStrictEqual(binary.rows, [{ n: 7, yes: true }])
  const raw = await client.query('select $1::bytea as raw', [Buffer.from([0, 255])])
  assert.deepStrictEqual(raw.rows[0].raw, Buffer.from([0, 255]))
  const big = await client.query("select repeat('x', 3000000) as x, length($1) as n", ['y'.repeat(3000000)])
  assert.strictEqual(big.rows[0].x.length, 3000000)
  assert.strictEqual(big.rows[0].n, 3000000)
  const portal = await client.query({ text: 'select generate_series(1, 100) as n', rows: 7, rowMode: 'array' })
  assert.strictEqual(portal.rows.length, 100)
}

async function prepared(client) {
  for (let n = 0; n < 100; n++) {
    const { rows } = await client.query({ name: `plus-${n % 10}`, text: `select $1::int + ${n % 10} as sum`, values: [n] })
    assert.strictEqual(rows[0].sum, n + (n % 10))
  }
  await fails(client.query({ name: 'broken', text: 'select * from nowhere' }), '42P01')
  await fails(client.query({ name: 'late', text: 'select 1 / $1::int', values: [0] }), '22012')
  assert.strictEqual((await client.query({ name: 'late', text: 'select 1 / $1::int', values: [1] })).rowCount, 1)
  // Sent without waiting for one another.
  const all = await Promise.all([...Array(200).keys()].map((n) => client.query({ name: 'all', text: 'select $1::int as n', values: [n] })))
  assert.deepStrictEqual(all.map((result) => result.rows[0].n), [...Array(200).keys()])
}

async function transactions(client) {
  await client.query('begin')
  await client.query('insert into items (id) values (2)')
  await client.query('savepoint a')
  await fails(client.query('insert into items (id) values ($1)', [2]), '23505')
  await fails(client.query('select 1'), '25P02')
  await client.query('rollback to a')
  await client.query('commit')
  await client.query('begin')
  await client.query('delete from items')
  await client.query('rollback')
  assert.strictEqual((await client.query('select count(*)::int as n from items')).rows[0].n, 2)
}

async function failures(client) {
  await assert.rejects(client.query('select * from nowhere'), { code: '42P01', position: '15', severity: 'ERROR' })
  await fails(client.query('selec 1'), '42601')
  const notices = []
  client.on('notice', (notice) => notices.push(notice.message))
  await client.query("do $$ begin raise notice 'one'; raise warning 'two'; end $$")
  assert.deepStrictEqual(notices, ['one', 'two'])
  await client.query("set statement_timeout = '100ms'")
  await fails(client.query('select pg_sleep(30)'), '57014')
  await client.query('reset statement_timeout')
  await fails(connect({ connectionString: connectionString + '_missing' }), '3D000')
}

async function copying(client) {
  await client.query('create table copied (id int, word text)')
  const lines = [...Array(20000).keys()].map((n) => `${n}\tword ${n}\n`)
  await pipeline(Readable.from(lines), client.query(copy.from('copy copied from stdin')))
  let size = 0
  const out = client.query(copy.to('copy (select * from copied order by id) to stdout'))
  for await (const block of out) size += block.length
  assert.strictEqual(size, lines.join('').length)
  await fails(pipeline(Readable.from(['x\ty\n']), client.query(copy.from('copy copied from stdin'))), '22P02')
  assert.strictEqual((await client.query('select count(*)::int as n from copied')).rows[0].n, 20000)
}

async function cursors(client) {
  const cursor = client.query(new Cursor('select id from copied where id < $1 order by id', [1000]))
  let rows = 0
  for (let part; (part = await cursor.read(99)).length; ) rows += part.length
  assert.strictEqual(rows, 1000)
  await cursor.close()
  const left = client.query(new Cursor('select id from copied order by id'))
  assert.strictEqual((await left.read(5)).length, 5)
  await left.close()
  assert.strictEqual((await client.query('select 1 as n')).rows[0].n, 1)
}

async function notifications(client) {
  const listener = await connect()
  const heard = []
  const all = new Promise((resolve) => {
    listener.on('notification', ({ channel, payload }) => heard.push([channel, payload]) === 101 && resolve())
  })
  await listener.query('listen day')
  await listener.query('listen "Näme"')
  for (let n = 0; n < 100; n++) await client.query("select pg_notify('day', $1)", [String(n)])
  await client.query(`notify "Näme", 'last'`)
  await all
  assert.deepStrictEqual(heard, [...[...Array(100).keys()].map((n) => ['day', String(n)]), ['Näme', 'last']])
  await listener.end()
}

async function pooled() {
  const pool = new Pool({ connectionString, max: 40 })
  await pool.query('insert into items (id, price) select n, 0 from generate_series(100, 139) n')
  const work = async (n) => {
    for (let step = 0; step < 10; step++) {
      const client = await pool.connect()
      try {
        await client.query('begin')
        await client.query({ name: 'work', text: 'update items set price = price + 1 where id = $1', values: [100 + n] })
        await client.query('commit')
      } finally {
        client.release()
      }
    }
  }
  await Promise.all([...Array(40).keys()].map(work))
  const { rows } = await pool.query('select sum(price)::int as n from items where id between 100 and 139')
  assert.strictEqual(rows[0].n, 400)
  await pool.end()
}

async function day() {
  const client = await connect()
  for (const part of [queries, prepared, transactions, failures, copying, cursors, notifications]) {
    await part(client)
    console.log(part.name)
  }
  await client.end()
  await pooled()
  console.log('the day is done')
}

day().catch((error) => {
  console.error(error)
  process.exit(1)
})
