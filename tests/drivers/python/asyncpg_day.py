"""A day's work with asyncpg at the server that FLOWGATE_URL names. Any surprise is an exception."""

import asyncio
import datetime
import decimal
import json
import os
import uuid

import asyncpg

URL = os.environ["FLOWGATE_URL"]


async def expect(error, work):
    try:
        await work
    except error as raised:
        return raised
    raise AssertionError(f"{error.__name__} was not raised")


async def queries_and_types(conn):
    await conn.execute("""
        create type mood as enum ('sad', 'happy');
        create type pair as (a int, b text);
        create domain positive as int check (value > 0);
        create table items (id int primary key, name text, price numeric, feeling mood, duo pair, pairs pair[], n positive)
    """)
    row = (1, "ünïcode", decimal.Decimal("1.50"), "happy", (1, "x"), [(2, "y"), (3, None)], 5)
    await conn.execute("insert into items values ($1, $2, $3, $4, $5, $6, $7)", *row)
    got = await conn.fetchrow("select * from items where id = $1", 1)
    assert got["feeling"] == "happy" and tuple(got["duo"]) == (1, "x"), got
    assert [tuple(pair) for pair in got["pairs"]] == [(2, "y"), (3, None)], got
    values = [uuid.uuid4(), datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc), b"\x00\xff", None,
              2**40, 1.5, True, [[1, 2], [3, 4]], asyncpg.Range(1, 5)]
    got = await conn.fetchrow(
        "select $1::uuid, $2::timestamptz, $3::bytea, $4::text, $5::int8, $6::float8, $7::bool, $8::int[][], $9::int4range",
        *values)
    assert list(got) == values, got
    await conn.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
    assert await conn.fetchval("select $1::jsonb", {"k": [1]}) == {"k": [1]}
    assert len(await conn.fetchval("select repeat('x', 3000000)")) == 3_000_000
    assert await conn.fetchval("select length($1)", "y" * 3_000_000) == 3_000_000
    assert await conn.execute("insert into items (id) values (2)") == "INSERT 0 1"
    await conn.executemany("insert into items (id, name) values ($1, $2)", [(n, f"n{n}") for n in range(100, 1100)])
    assert await conn.fetchval("select count(*) from items where id >= 100") == 1000
    assert await conn.fetchmany("select $1::int * 2", [(1,), (2,)]) == [(2,), (4,)]


async def prepared(conn):
    statement = await conn.prepare("select $1::int + 1 as next")
    assert [attribute.name for attribute in statement.get_attributes()] == ["next"]
    for n in range(50):
        assert await statement.fetchval(n) == n + 1
    # More texts than the cache holds (100): old ones are closed.
    for n in range(250):
        assert await conn.fetchval(f"select $1::int + {n}", 1) == n + 1
    await conn.execute("create table shape (a int)")
    await conn.execute("insert into shape values (7)")
    assert await conn.fetchval("select a from shape") == 7
    await conn.execute("alter table shape alter a type text")
    assert await conn.fetchval("select a from shape") == "7"
    other = await asyncpg.connect(URL, statement_cache_size=0)
    for n in range(10):
        assert await other.fetchval("select $1::int", n) == n
    await other.close()


async def transactions(conn):
    async with conn.transaction():
        await conn.execute("insert into items (id) values (3)")
        try:
            async with conn.transaction():
                await conn.execute("insert into items (id) values (3)")
        except asyncpg.UniqueViolationError as raised:
            assert raised.sqlstate == "23505" and raised.constraint_name == "items_pkey"
        else:
            raise AssertionError("the same key twice")
        await conn.execute("insert into items (id) values (4)")
    transaction = conn.transaction(isolation="serializable", readonly=True)
    await transaction.start()
    await expect(asyncpg.ReadOnlySQLTransactionError, conn.execute("insert into items (id) values (5)"))
    await expect(asyncpg.InFailedSQLTransactionError, conn.execute("select 1"))
    await transaction.rollback()
    assert await conn.fetch("select id from items where id in (3, 4, 5) order by id") == [(3,), (4,)]


async def failures(conn):
    raised = await expect(asyncpg.UndefinedTableError, conn.fetch("select * from nowhere where a = $1", 1))
    assert raised.position == "15", raised.position
    await expect(asyncpg.DivisionByZeroError, conn.fetchval("select 1 / $1::int", 0))
    await expect(asyncpg.PostgresSyntaxError, conn.execute("selec 1"))
    heard = []
    conn.add_log_listener(lambda _conn, message: heard.append((message.severity, message.message)))
    await conn.execute("do $$ begin raise notice 'one'; raise warning 'two'; end $$")
    await asyncio.sleep(0)
    assert heard == [("NOTICE", "one"), ("WARNING", "two")], heard
    await expect(asyncio.TimeoutError, conn.fetchval("select pg_sleep(30)", timeout=0.2))
    assert await conn.fetchval("select 1") == 1


async def copy(conn):
    await conn.execute("create table copied (id int, word text)")
    rows = [(n, f"word\t{n}") for n in range(20_000)]
    assert await conn.copy_records_to_table("copied", records=rows) == "COPY 20000"
    out = bytearray()

    async def take(block):
        out.extend(block)
    await conn.copy_from_query("select * from copied where id < $1 order by id", 10_000, output=take, format="csv")
    assert out.count(b"\n") == 10_000

    async def blocks():
        for n in range(1000):
            yield f"{n},x\n".encode()
    assert await conn.copy_to_table("copied", source=blocks(), format="csv") == "COPY 1000"
    bad = conn.copy_records_to_table("copied", records=[("x", 1)])
    await expect((TypeError, asyncpg.DataError), bad)
    assert await conn.fetchval("select count(*) from copied") == 21_000


async def cursors(conn):
    async with conn.transaction():
        seen = [row["id"] async for row in conn.cursor("select id from copied order by id limit 5000", prefetch=333)]
        assert len(seen) == 5000
        cursor = await conn.cursor("select generate_series(1, $1::int)", 100)
        await cursor.forward(10)
        assert (await cursor.fetchrow())[0] == 11
        # Two portals at once, and a query between.
        one, two = await conn.cursor("select generate_series(1, 10)"), await conn.cursor("select generate_series(11, 20)")
        assert (await one.fetch(2), await two.fetch(2)) == ([(1,), (2,)], [(11,), (12,)])
        assert await conn.fetchval("select 1") == 1
        assert await one.fetch(2) == [(3,), (4,)]


async def notifications(conn):
    listener = await asyncpg.connect(URL)
    heard = asyncio.Queue()
    await listener.add_listener("day", lambda _conn, _pid, channel, payload: heard.put_nowait((channel, payload)))
    for n in range(100):
        await conn.execute("select pg_notify('day', $1)", str(n))
    got = [await asyncio.wait_for(heard.get(), 20) for _ in range(100)]
    assert got == [("day", str(n)) for n in range(100)], got
    await listener.reset()
    await conn.execute("notify day, 'nobody'")
    assert await listener.fetchval("select 1") == 1
    assert heard.empty()
    await listener.close()


async def pooled():
    async with asyncpg.create_pool(URL, min_size=5, max_size=40) as pool:
        async def work(n):
            for _ in range(10):
                async with pool.acquire() as conn:
                    async with conn.transaction():
                        await conn.execute("update items set price = coalesce(price, 0) + 1 where id = $1", 100 + n)
                        await conn.execute("set local work_mem = '8MB'")
                    await conn.execute(f"set application_name = 'worker {n}'")
                    assert await conn.fetchval("show application_name") == f"worker {n}"
        await asyncio.gather(*(work(n) for n in range(60)))
        # The pool's reset: pg_advisory_unlock_all, CLOSE ALL, UNLISTEN *, RESET ALL.
        async with pool.acquire() as conn:
            await conn.fetchval("select pg_advisory_lock(1)")
            await conn.execute("set work_mem = '9MB'")
        async with pool.acquire() as conn:
            assert await conn.fetchval("show work_mem") != "9MB"
            assert await conn.fetchval("select pg_try_advisory_lock(1)")
        assert await pool.fetchval("select sum(price) from items where id between 100 and 159") == 600


async def main():
    conn = await asyncpg.connect(URL)
    for part in (queries_and_types, prepared, transactions, failures, copy, cursors, notifications):
        await part(conn)
        print(part.__name__, flush=True)
    await conn.close()
    await pooled()
    print("the day is done")


asyncio.run(main())
