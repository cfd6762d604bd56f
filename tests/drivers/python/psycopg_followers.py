"""Runs followed with psycopg 3's `notifies()`."""

import asyncio

import psycopg

from followers import SHARES, START, RUNS, URL, Share


async def listen(runs):
    conn = await psycopg.AsyncConnection.connect(URL, autocommit=True)
    for run in runs:
        await conn.execute(f'listen "pgflow:run:{run}"')
    return conn, Share(runs)


async def hear(conn, share):
    async for news in conn.notifies():
        share.hear(news.payload)
        if share.is_over():
            break
    await conn.close()


async def day():
    sessions = await asyncio.gather(*map(listen, SHARES))
    async with await psycopg.AsyncConnection.connect(URL, autocommit=True) as conn:
        await conn.execute(START, (RUNS,))
    await asyncio.gather(*(hear(*session) for session in sessions))


asyncio.run(day())
print("the day is done")
