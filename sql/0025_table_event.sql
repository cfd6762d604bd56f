-- The outbox: every event, in the transaction that caused it.
-- Written by: `realtime.send` (with a `seq`) and the task trigger (`seq` null: a signal, ordered by `id` only).
-- Read by: Flowgate's event reader (`flowgate.events_since`, or by (topic, seq) to replay a topic).
-- Locks: plain inserts. Failure: see the writers.
--
-- Commit-safe reading goes by `xid`: an event is new to a reader when its writer was not yet visible in the snapshot the
-- reader took last time. `id` alone can't tell, since ids are drawn before commit. Within a topic that has `seq`s, `id`, `seq`
-- and commit order agree, as `id` is drawn while the topic's counter is locked.
--
-- Partitioned by UTC day so that retention is a DROP. Rows of a day that has no partition land in event_default and are
-- moved out by `flowgate.ensure_partitions`.
create sequence if not exists flowgate.event_id_seq as bigint;

create table if not exists flowgate.event (
    id          bigint not null default nextval('flowgate.event_id_seq'),
    xid         xid8 not null default pg_current_xact_id(),
    topic       text not null,
    seq         bigint,
    event       text not null,
    payload     jsonb not null,
    private     boolean not null default false,
    message_id  uuid not null default gen_random_uuid(),
    inserted_at timestamptz not null default now()
) partition by range (inserted_at);

alter sequence flowgate.event_id_seq owned by flowgate.event.id;

-- Replay of a topic reads by `seq`; signals without one stay out of this index, which saves a third of what they cost.
create index if not exists event_topic_seq_idx on flowgate.event (topic, seq) where seq is not null;
create index if not exists event_xid_idx on flowgate.event (xid);

create table if not exists flowgate.event_default partition of flowgate.event default;
