"""Follows runs: what psycopg and asyncpg have in common here. `crowd.rs` says on standard input which runs (one line of JSON), then
`start`. A run tells these events, in this order, numbered from 1, each once or more, whatever happens in between. Says `ready` once
all are followed, and what was met when all have ended."""

import asyncio
import json
import os
import sys
import traceback

URL = os.environ["FLOWGATE_URL"]
PATIENCE = float(os.environ["FLOWGATE_PATIENCE"])
SESSIONS = int(os.environ["FLOWGATE_SESSIONS"])
BREATH = 0.1
STORY = ["run:started", "step:started", "step:completed", "run:completed"]

met = {"runs": 0, "events": 0, "repeats": 0, "reconnects": 0, "gaps": 0}
# The last number heard of each run.
last = {}
# Runs of which something was left out, to be asked for again.
gone = set()
trouble = None


def channel(run, resumed):
    return f"pgflow:run:{run}@{last[run]}" if resumed else f"pgflow:run:{run}"


def hear(payload):
    """The run that must be followed anew from its last number, if this says that something was left out."""
    event = json.loads(payload)
    run, seq = event["run_id"], event.get("seq")
    told = (payload[:300], last[run])
    if event["event_type"] == "gap":
        met["gaps"] += 1
        gone.add(run)
        return run
    met["events"] += 1
    if seq <= last[run]:
        met["repeats"] += 1
    elif seq > last[run] + 1:
        assert run in gone, told
    else:
        assert event["event_type"] == STORY[seq - 1], told
        last[run] = seq
    return None


def is_over(share):
    return all(last[run] == len(STORY) for run in share)


def met_trouble(error):
    """Something that passes; the last of them is told should nothing else come."""
    global trouble
    if isinstance(error, AssertionError):
        raise error
    trouble = error


async def crowd(follow):
    """`follow` takes a share of the runs and something to call once they are followed; it ends when they have ended."""
    runs = json.loads(sys.stdin.readline())
    last.update(dict.fromkeys(runs, 0))
    met["runs"] = len(runs)
    shares = [share for share in (runs[n::SESSIONS] for n in range(SESSIONS)) if share]
    waiting = len(shares)

    def followed():
        nonlocal waiting
        waiting -= 1
        if waiting == 0:
            print("ready", flush=True)

    await asyncio.gather(*(follow(share, followed) for share in shares))


def main(follow):
    try:
        asyncio.run(asyncio.wait_for(crowd(follow), PATIENCE))
        print(json.dumps(met), flush=True)
    except BaseException:
        traceback.print_exc()
        missing = [run for run in last.items() if run[1] < len(STORY)]
        print(met, f"last trouble: {trouble!r}", f"missing: {len(missing)}", missing[:5], file=sys.stderr, flush=True)
        os._exit(1)
