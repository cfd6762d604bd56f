"""Runs followed with asyncpg's `add_listener`."""

import asyncio

import asyncpg

from followers import RUNS, SHARES, START, URL, Share


async def listen(runs):
    conn = await asyncpg.connect(URL)
    share, over = Share(runs), asyncio.get_running_loop().create_future()

    def hear(_conn, _pid, _channel, payload):
        try:
            share.hear(payload)
        except Exception as error:
            over.done() or over.set_exception(error)
        if share.is_over():
            over.done() or over.set_result(None)

    for run in runs:
        await conn.add_listener(f"pgflow:run:{run}", hear)
    return conn, over


async def day():
    sessions = await asyncio.gather(*map(listen, SHARES))
    conn = await asyncpg.connect(URL)
    await conn.execute(START.replace("%s", "$1"), RUNS)
    await asyncio.gather(*(over for _conn, over in sessions))
    await asyncio.gather(conn.close(), *(conn.close() for conn, _over in sessions))


asyncio.run(day())
print("the day is done")
