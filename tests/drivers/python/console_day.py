"""The admin console as psycopg 3 and asyncpg see it, simple and extended, text and binary. Any surprise is an exception."""

import asyncio
import os
import re

import asyncpg
import psycopg
from psycopg import errors
from psycopg.rows import dict_row

URL = os.environ["FLOWGATE_URL"]
CONSOLE = re.sub(r"/[^/]*$", "/flowgate", URL)
TABLES = ["POOLS", "CLIENTS", "SERVERS", "STATS", "STATS_TOTALS", "STATS_AVERAGES", "TOTALS", "DATABASES", "USERS", "CONFIG",
          "VERSION", "LISTS", "MEM", "STATE", "HELP", "PINS", "ROUTES", "REPLICAS", "SUBSCRIBERS", "PARKED", "LIMITS", "RUNS"]


def with_psycopg(database):
    for autocommit in (True, False):
        with psycopg.connect(CONSOLE, autocommit=autocommit, row_factory=dict_row) as conn:
            for prepare in (None, True):
                for binary in (False, True):
                    for table in TABLES:
                        with conn.cursor(binary=binary) as cursor:
                            cursor.execute(f"SHOW {table}", prepare=prepare)
                            rows = cursor.fetchall()
                            assert all(len(row) == len(cursor.description) for row in rows)
            pool = [row for row in conn.execute("show pools;") if row["database"] == database]
            assert len(pool) == 1 and pool[0]["cl_active"] == 1 and isinstance(pool[0]["sv_idle"], int), pool
            conn.execute("reconnect; wait_close")
            conn.execute("reload")
            try:
                conn.execute("select 1")
                raise AssertionError("the console runs no SQL")
            except errors.SyntaxError as error:
                assert error.diag.sqlstate == "42601" and "invalid command" in error.diag.message_primary
            conn.rollback()
            try:
                conn.execute("pause nosuchdb")
                raise AssertionError("there is no such database")
            except errors.InvalidCatalogName:
                conn.rollback()
            assert conn.execute("show version").fetchone()["version"].startswith("Flowgate ")


async def with_asyncpg(database):
    conn = await asyncpg.connect(CONSOLE)
    for table in TABLES:
        rows = await conn.fetch(f"SHOW {table}")
        assert all(len(row) > 0 for row in rows)
    stats = [row for row in await conn.fetch("SHOW STATS") if row["database"] == database]
    assert stats[0]["total_query_count"] >= 2 and isinstance(stats[0]["total_sent"], int), stats
    databases = {row["name"]: row for row in await conn.fetch("SHOW DATABASES")}
    assert databases[database]["paused"] == 0
    await conn.execute("PAUSE")
    assert {row["paused"] for row in await conn.fetch("SHOW DATABASES")} == {1}
    await conn.fetch("RESUME")
    prepared = await conn.prepare("SHOW CONFIG pool.size")
    assert [attribute.name for attribute in prepared.get_attributes()] == ["key", "value", "default", "changeable"]
    assert (await prepared.fetchrow())["value"] == "10"
    try:
        await conn.fetch("SHOW NOTHING")
        raise AssertionError("there is no such table")
    except asyncpg.PostgresSyntaxError:
        pass
    await conn.close()


with psycopg.connect(URL, autocommit=True) as client:
    client.execute("select 1")
    name = client.execute("select current_database()").fetchone()[0]
    with_psycopg(name)
    asyncio.run(with_asyncpg(name))
    client.execute("select 1")
print("the day is done")
