"""Runs followed with psycopg 3's `notifies()`: a connection a share, and another one from where it was when that is lost."""

import asyncio

import psycopg

from followers import BREATH, URL, channel, hear, is_over, main, met, met_trouble


async def hear_all(conn, share):
    while not is_over(share):
        missed = set()
        # It ends with all that came at once: whoever leaves it earlier loses the rest.
        async for news in conn.notifies(stop_after=1):
            if run := hear(news.payload):
                missed.add(run)
        for run in missed:
            await conn.execute(f'listen "{channel(run, True)}"')


async def follow(share, followed):
    connected = False
    while True:
        try:
            async with await psycopg.AsyncConnection.connect(URL, autocommit=True) as conn:
                for run in share:
                    await conn.execute(f'listen "{channel(run, connected)}"')
                if connected:
                    met["reconnects"] += 1
                else:
                    followed()
                connected = True
                await hear_all(conn, share)
                return
        except psycopg.Error as error:
            met_trouble(error)
            await asyncio.sleep(BREATH)


main(follow)
