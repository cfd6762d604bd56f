-- One counter a topic: the `seq` of its last event.
-- Written by: `realtime.send` (upsert, so the row stays locked until the sender commits: that is what makes `seq`
-- gap-free and equal to commit order, at every isolation level and under savepoint rollback), and pruned by
-- `flowgate.drop_partitions`. Failure: see `realtime.send`.
--
-- Why a counter and not max(seq) + 1 over `flowgate.event` behind an advisory lock: the counter outlives the partitions
-- (a topic must not start at 1 again because its old events were dropped), a REPEATABLE READ sender gets 40001 instead
-- of a duplicate number, and it is cheaper: max() probes the index of every partition. Figures in sql/README.md.
--
-- INVARIANT: no index but the primary key, so that counting is a HOT update.
create table if not exists flowgate.topic (
    topic      text primary key,
    seq        bigint not null,
    ended      boolean not null default false,      -- a run's topic whose run has reached its end
    updated_at timestamptz not null default now()
) with (fillfactor = 60);
