"""Follows runs: what psycopg and asyncpg have in common here. Each session follows its share; a run tells these events, in this
order, numbered from 1, each once or more."""

import json
import os
import uuid

URL = os.environ["FLOWGATE_URL"]
SESSIONS = 20
STORY = ["run:started", "step:started", "step:completed", "run:completed"]

RUNS = [str(uuid.uuid4()) for _ in range(int(os.environ["FLOWGATE_RUNS"]))]
SHARES = [RUNS[n::SESSIONS] for n in range(SESSIONS)]
START = "select pgflow.start_flow('greet', '{}', run) from unnest(%s::uuid[]) as run"


class Share:
    def __init__(self, runs):
        self.last = dict.fromkeys(runs, 0)

    def hear(self, payload):
        event = json.loads(payload)
        run, seq = event["run_id"], event["seq"]
        assert seq <= self.last[run] + 1, (event, self.last[run])
        if seq > self.last[run]:
            assert event["event_type"] == STORY[seq - 1], event
            self.last[run] = seq

    def is_over(self):
        return all(seq == len(STORY) for seq in self.last.values())
