"""A day's work with psycopg 3, sync and async, at the server that FLOWGATE_URL names. Any surprise is an exception."""

import asyncio
import datetime
import decimal
import os
import threading
import uuid

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool

URL = os.environ["FLOWGATE_URL"]


def connect(**options):
    return psycopg.connect(URL, autocommit=True, **options)


def expect(error, work):
    try:
        work()
    except error as raised:
        return raised
    raise AssertionError(f"{error.__name__} was not raised")


def queries_and_types(conn):
    conn.execute("create table items (id int primary key, name text, price numeric, tags text[], doc jsonb)")
    conn.execute("insert into items values (%s, %s, %s, %s, %s)",
                 (1, "ünïcode", decimal.Decimal("12.50"), ["a", "b"], Jsonb({"k": [1, None]})))
    row = conn.cursor(row_factory=dict_row).execute("select * from items").fetchone()
    assert row == {"id": 1, "name": "ünïcode", "price": decimal.Decimal("12.50"), "tags": ["a", "b"],
                   "doc": {"k": [1, None]}}, row
    values = [uuid.uuid4(), datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc), b"\x00\xff", None,
              datetime.date(1999, 12, 31), 2**40, 1.5, True]
    for binary in (False, True):
        cursor = conn.cursor(binary=binary)
        got = cursor.execute("select %s::uuid, %s::timestamptz, %s::bytea, %s::text, %s::date, %s::int8, %s::float8, %s::bool",
                             values).fetchone()
        assert list(got) == values, (binary, got)
    assert conn.execute("").description is None
    with conn.cursor() as cursor:
        cursor.execute("select 1; select 2, 3")
        assert cursor.fetchall() == [(1,)] and cursor.nextset() and cursor.fetchall() == [(2, 3)]
    big = conn.execute("select repeat('x', 3000000)").fetchone()[0]
    assert len(big) == 3_000_000
    assert conn.execute("select length(%s)", ["y" * 3_000_000]).fetchone() == (3_000_000,)


def prepared(conn):
    conn.prepare_threshold = 0
    for n in range(250):
        # More texts than prepared_max, so psycopg evicts and deallocates.
        assert conn.execute(f"select %s::int + {n % 125}", [n]).fetchone() == (n + n % 125,)
    conn.execute("create table shape (a int)")
    conn.execute("insert into shape values (%s)", [7])
    assert conn.execute("select a from shape where a = %s", [7]).fetchone() == (7,)
    conn.execute("alter table shape alter a type text")
    expect(psycopg.Error, lambda: conn.execute("select a from shape where a = %s", [7]))
    conn.execute("deallocate all")
    assert conn.execute("select a from shape where a = %s", ["7"]).fetchone() == ("7",)
    cursor = conn.cursor()
    cursor.executemany("insert into items (id, name) values (%s, %s)", [(n, f"n{n}") for n in range(100, 200)])
    assert conn.execute("select count(*) from items where id >= 100").fetchone() == (100,)


def transactions(conn):
    with conn.transaction():
        conn.execute("insert into items (id) values (2)")
        try:
            with conn.transaction():
                conn.execute("insert into items (id) values (2)")
        except errors.UniqueViolation as raised:
            assert raised.sqlstate == "23505" and raised.diag.constraint_name == "items_pkey", raised
        else:
            raise AssertionError("the same key twice")
        conn.execute("insert into items (id) values (3)")
    try:
        with conn.transaction():
            conn.execute("insert into items (id) values (4)")
            raise psycopg.Rollback()
    except psycopg.Rollback:
        pass
    assert conn.execute("select id from items where id in (2, 3, 4) order by id").fetchall() == [(2,), (3,)]
    with connect(row_factory=dict_row) as other:
        other.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        other.read_only = True
        other.autocommit = False
        assert other.execute("show transaction_isolation").fetchone() == {"transaction_isolation": "serializable"}
        expect(errors.ReadOnlySqlTransaction, lambda: other.execute("insert into items (id) values (5)"))
        expect(errors.InFailedSqlTransaction, lambda: other.execute("select 1"))
        other.rollback()


def failures(conn):
    raised = expect(errors.UndefinedTable, lambda: conn.execute("select * from nowhere"))
    assert raised.sqlstate == "42P01" and raised.diag.statement_position == "15", raised.diag.statement_position
    expect(errors.DivisionByZero, lambda: conn.execute("select 1/%s", [0]))
    expect(errors.SyntaxError, lambda: conn.execute("selec 1"))
    notices = []
    conn.add_notice_handler(lambda diag: notices.append((diag.severity, diag.message_primary)))
    conn.execute("do $$ begin raise notice 'one'; raise warning 'two'; end $$")
    assert notices == [("NOTICE", "one"), ("WARNING", "two")], notices
    assert conn.execute("select 1").fetchone() == (1,)


def settings(conn):
    conn.execute("set timezone = 'Asia/Tokyo'")
    conn.execute("set work_mem = '7MB'")
    with connect() as other:
        assert other.execute("show work_mem").fetchone() != ("7MB",)
    assert conn.execute("show work_mem").fetchone() == ("7MB",)
    assert conn.info.parameter_status("TimeZone") == "Asia/Tokyo"
    conn.execute("reset all")
    with connect(options="-c work_mem=9MB -c search_path=pg_catalog", application_name="day") as other:
        assert other.execute("show work_mem").fetchone() == ("9MB",)
        assert other.execute("show application_name").fetchone() == ("day",)


def copy(conn):
    conn.execute("create table copied (id int, word text)")
    with conn.cursor() as cursor:
        with cursor.copy("copy copied from stdin") as into:
            for n in range(20_000):
                into.write_row((n, f"word\t{n}"))
        with cursor.copy("copy (select * from copied order by id) to stdout") as out:
            out.set_types(["int4", "text"])
            rows = list(out.rows())
        assert len(rows) == 20_000 and rows[-1] == (19_999, "word\t19999")
        with cursor.copy("copy copied (id, word) from stdin (format binary)") as into:
            into.set_types(["int4", "text"])
            into.write_row((-1, "binary"))

        def bad():
            with cursor.copy("copy copied from stdin") as into:
                into.write("not a number\tx\n")
        expect(errors.InvalidTextRepresentation, bad)

        def abandoned():
            with cursor.copy("copy copied from stdin") as into:
                into.write_row((-2, "never"))
                raise ZeroDivisionError
        expect(ZeroDivisionError, abandoned)
    assert conn.execute("select count(*), min(id) from copied").fetchone() == (20_001, -1)


def cursors(conn):
    with conn.transaction(), conn.cursor("held") as cursor:
        cursor.itersize = 300
        cursor.execute("select id from copied where id >= 0 order by id")
        assert [row[0] for row in cursor] == list(range(20_000))
    with conn.transaction(), conn.cursor("back", scrollable=True) as cursor:
        cursor.execute("select generate_series(1, 10)")
        cursor.scroll(5)
        assert cursor.fetchone() == (6,)
        cursor.scroll(0, mode="absolute")
        assert cursor.fetchmany(2) == [(1,), (2,)]
    with conn.cursor("beyond", withhold=True) as cursor:
        cursor.execute("select generate_series(1, 10)")
        assert len(cursor.fetchall()) == 10
    assert sum(n for (n,) in conn.cursor().stream("select generate_series(1, 1000)")) == 500_500


def pipeline(conn):
    with conn.pipeline() as pipe:
        cursors = [conn.execute("select %s::int", [n]) for n in range(100)]
        pipe.sync()
        assert [cursor.fetchone()[0] for cursor in cursors] == list(range(100))
    try:
        with conn.pipeline() as pipe:
            first = conn.execute("select 1")
            conn.execute("select 1/0")
            conn.execute("select 2")
            pipe.sync()
    except errors.DivisionByZero:
        pass
    else:
        raise AssertionError("an error in the pipeline was lost")
    assert first.fetchone() == (1,)
    assert conn.execute("select 3").fetchone() == (3,)


def notifications(conn):
    with connect() as listener:
        listener.execute("listen day")
        listener.execute('listen "Näme with space"')
        conn.execute("notify day, 'one'")
        conn.execute("select pg_notify('Näme with space', 'two')")
        with conn.transaction():
            conn.execute("notify day, 'three'")
        heard = [(n.channel, n.payload) for n in listener.notifies(timeout=20, stop_after=3)]
        assert heard == [("day", "one"), ("Näme with space", "two"), ("day", "three")], heard
        listener.execute("unlisten *")
        conn.execute("notify day, 'nobody'")
        assert list(listener.notifies(timeout=0.1)) == []


def cancel(conn):
    timer = threading.Timer(0.2, conn.cancel_safe)
    timer.start()
    expect(errors.QueryCanceled, lambda: conn.execute("select pg_sleep(30)"))
    timer.join()
    assert conn.execute("select 1").fetchone() == (1,)


def pooled():
    with ConnectionPool(URL, min_size=5, max_size=20, open=True) as pool:
        pool.wait(20)
        failed = []

        def work(n):
            try:
                for step in range(20):
                    with pool.connection() as conn, conn.transaction():
                        conn.execute("update items set price = coalesce(price, 0) + 1 where id = %s", [100 + n])
            except Exception as error:
                failed.append(error)
        threads = [threading.Thread(target=work, args=[n]) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
    with connect() as conn:
        assert conn.execute("select sum(price) from items where id between 100 and 119").fetchone() == (400,)


async def asynchronous():
    async with await psycopg.AsyncConnection.connect(URL, autocommit=True) as conn:
        async with conn.pipeline():
            made = await asyncio.gather(*(conn.execute("select %s::int", [n]) for n in range(20)))
            assert sorted([(await cursor.fetchone())[0] for cursor in made]) == list(range(20))
        async with conn.cursor() as cursor:
            async with cursor.copy("copy (select generate_series(1, 100)) to stdout") as out:
                assert len([block async for block in out.rows()]) == 100
        sleeping = asyncio.create_task(conn.execute("select pg_sleep(30)"))
        await asyncio.sleep(0.2)
        sleeping.cancel()
        try:
            await sleeping
        except (asyncio.CancelledError, errors.QueryCanceled):
            pass

    async def one(n):
        async with await psycopg.AsyncConnection.connect(URL) as conn:
            for _ in range(5):
                async with conn.transaction():
                    assert await (await conn.execute("select %s::int", [n])).fetchone() == (n,)
    await asyncio.gather(*(one(n) for n in range(50)))


with connect() as conn:
    conn.execute(sql.SQL("set search_path = {}").format(sql.Identifier("public")))
    for part in (queries_and_types, prepared, transactions, failures, settings, copy, cursors, pipeline, notifications,
                 cancel):
        part(conn)
        print(part.__name__, flush=True)
pooled()
asyncio.run(asynchronous())
print("the day is done")
