"""Runs followed with asyncpg's `add_listener`: a connection a share, and another one from where it was when that is lost. It knows a
listener by its channel, and notifications come under the channel without a cursor: so that is what is listened to, and what was
told before is asked for apart; what comes between the two is in that once more."""

import asyncio

import asyncpg

from followers import BREATH, URL, channel, gone, hear, is_over, main, met, met_trouble


async def hear_all(conn, share, news):
    while not is_over(share):
        payload = await news.get()
        if payload is None:
            raise ConnectionError("lost")
        if run := hear(payload):
            await conn.execute(f'listen "{channel(run, True)}"')


async def follow(share, followed):
    connected = False
    while True:
        news, conn = asyncio.Queue(), None
        try:
            conn = await asyncpg.connect(URL)
            conn.add_termination_listener(lambda _conn, news=news: news.put_nowait(None))
            for run in share:
                if connected:
                    gone.add(run)
                await conn.add_listener(channel(run, False), lambda *args, news=news: news.put_nowait(args[3]))
                if connected:
                    await conn.execute(f'listen "{channel(run, True)}"')
            if connected:
                met["reconnects"] += 1
            else:
                followed()
            connected = True
            await hear_all(conn, share, news)
            return
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            met_trouble(error)
            await asyncio.sleep(BREATH)
        finally:
            if conn is not None:
                conn.terminate()


main(follow)
