// A day's work with postgres.js (`postgres`) at the server that FLOWGATE_URL names. Any surprise is an exception.
const assert = require('assert')
const { pipeline } = require('stream/promises')
const { Readable } = require('stream')
const postgres = require('postgres')

const url = process.env.FLOWGATE_URL
const fails = (work, code) => assert.rejects(async () => await work, (error) => (assert.strictEqual(error.code, code), true))
const numbers = (count) => [...Array(count).keys()]

async function queries(sql) {
  await sql`create table items (id int primary key, name text, price numeric, tags text[], doc jsonb, day timestamptz)`
  const day = new Date(Date.UTC(2024, 1, 29))
  await sql`insert into items values (1, ${'ünïcode'}, ${'12.50'}, ${['a', 'b']}, ${sql.json({ k: [1, null] })}, ${day})`
  const [row] = await sql`select * from items where id = ${1}`
  assert.deepStrictEqual({ ...row }, { id: 1, name: 'ünïcode', price: '12.50', tags: ['a', 'b'], doc: { k: [1, null] }, day })
  await sql`insert into items ${sql(numbers(1000).map((n) => ({ id: 100 + n, name: `n${n}` })))}`
  assert.strictEqual((await sql`select count(*)::int as n from items where id in ${sql([100, 101, 5])}`)[0].n, 2)
  const [first, second] = await sql.unsafe('select 1 as a; select 2 as b')
  assert.deepStrictEqual([first[0].a, second[0].b], [1, 2])
  assert.strictEqual((await sql`select length(${'y'.repeat(3000000)}) as n`)[0].n, 3000000)
  assert.strictEqual((await sql`select repeat('x', 3000000) as x`)[0].x.length, 3000000)
  const described = await sql`select ${1}::int as n, name from items`.describe()
  assert.deepStrictEqual(described.columns.map((column) => column.name), ['n', 'name'])
}

async function pipelined(sql) {
  const all = await Promise.all(numbers(500).map((n) => sql`select ${n}::int as n`))
  assert.deepStrictEqual(all.map((rows) => rows[0].n), numbers(500))
  // One of many fails; its neighbours do not.
  const settled = await Promise.allSettled(numbers(20).map((n) => sql`select 10 / ${n - 10}::int as n`))
  assert.deepStrictEqual(settled.map((one) => one.status === 'rejected' ? one.reason.code : 'ok'),
    numbers(20).map((n) => n === 10 ? '22012' : 'ok'))
}

async function transactions(sql) {
  await sql.begin(async (tx) => {
    await tx`insert into items (id) values (2)`
    await fails(tx.savepoint((inner) => inner`insert into items (id) values (2)`), '23505')
    await tx`insert into items (id) values (3)`
  })
  await fails(sql.begin(async (tx) => {
    await tx`delete from items`
    await tx`select 1 / 0`
  }), '22012')
  assert.strictEqual((await sql`select count(*)::int as n from items where id < 100`)[0].n, 3)
  const [{ isolation }] = await sql.begin('isolation level serializable read only', (tx) => tx`select current_setting('transaction_isolation') as isolation`)
  assert.strictEqual(isolation, 'serializable')
  const pipelinedInside = await sql.begin((tx) => numbers(50).map((n) => tx`select ${n}::int as n`))
  assert.deepStrictEqual(pipelinedInside.map((rows) => rows[0].n), numbers(50))
  // Many at once, more than there are servers.
  await Promise.all(numbers(100).map((n) => sql.begin(async (tx) => {
    await tx`update items set price = coalesce(price, 0) + 1 where id = ${100 + n % 50}`
    await tx`select 1`
  })))
  assert.strictEqual((await sql`select sum(price)::int as n from items where id between 100 and 149`)[0].n, 100)
  const reserved = await sql.reserve()
  await reserved`create temp table mine (a int)`
  await reserved`insert into mine values (1)`
  assert.strictEqual((await reserved`select * from mine`).length, 1)
  await reserved`drop table mine`
  reserved.release()
}

async function failures(sql) {
  await assert.rejects(async () => await sql`select * from nowhere`, { code: '42P01', position: '15' })
  await fails(sql`selec 1`, '42601')
  const sleeping = sql`select pg_sleep(30)`.execute()
  setTimeout(() => sleeping.cancel(), 200)
  await fails(sleeping, '57014')
  assert.strictEqual((await sql`select 1 as n`)[0].n, 1)
}

// After a COPY stream postgres.js may lose track of its connection (at Postgres itself too): each has one of its own, ended by
// the end of the process.
async function copying(sql, connect) {
  await sql`create table copied (id int, word text)`
  const lines = numbers(20000).map((n) => `${n}\tword ${n}\n`)
  await pipeline(Readable.from(lines), await connect()`copy copied from stdin`.writable())
  let size = 0
  for await (const block of await connect()`copy (select * from copied order by id) to stdout`.readable()) size += block.length
  assert.strictEqual(size, lines.join('').length)
  assert.strictEqual((await sql`select count(*)::int as n from copied`)[0].n, 20000)
}

async function cursors(sql) {
  let rows = 0
  for await (const part of sql`select id from copied where id < ${1000} order by id`.cursor(99)) rows += part.length
  assert.strictEqual(rows, 1000)
  let parts = 0
  await sql`select id from copied order by id`.cursor(10, () => (++parts === 3 ? sql.CLOSE : undefined))
  assert.strictEqual(parts, 3)
  let each = 0
  await sql`select id from copied`.forEach(() => each++)
  assert.strictEqual(each, 20000)
}

async function notifications(sql) {
  const heard = []
  let done
  const all = new Promise((resolve) => (done = resolve))
  const { unlisten } = await sql.listen('day', (payload) => heard.push(payload) === 100 && done())
  for (const n of numbers(100)) await sql.notify('day', String(n))
  await all
  assert.deepStrictEqual(heard, numbers(100).map(String))
  await unlisten()
}

async function day() {
  for (const prepare of [true, false]) {
    for (const part of [queries, pipelined, transactions, failures, notifications, copying, cursors]) {
      const connect = () => postgres(url, { onnotice: () => {}, max: 20, prepare })
      const sql = connect()
      await part(sql, connect)
      await sql.end({ timeout: 1 })
      console.log(part.name, prepare ? '' : 'without prepared statements')
    }
    const sql = postgres(url, { max: 1 })
    await sql`drop table items, copied`
    await sql.end()
  }
  console.log('the day is done')
  process.exit(0)
}

day().catch((error) => {
  console.error(error)
  process.exit(1)
})
