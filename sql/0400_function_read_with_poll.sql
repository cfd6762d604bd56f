-- Takes up to `qty` visible messages of a queue, waiting for the first of them up to `max_poll_seconds`.
-- Called by: workers of pgflow 0.7, all the time; Flowgate holds the wait itself and lets only the hit through.
-- Locks: the messages taken, SKIP LOCKED, never waiting. Failure: the caller's; nothing is then taken.
-- Holds its connection and its snapshot while it waits. The clock is a parameter of the scan, not called in it, so that the
-- index on vt can be used when many messages are invisible. Which columns a message has depends on pgmq's version, so they
-- are matched by name.
create or replace function pgflow.read_with_poll(
    queue_name       text,
    vt               integer,
    qty              integer,
    max_poll_seconds integer default 5,
    poll_interval_ms integer default 100,
    conditional      jsonb default '{}'
)
returns setof pgmq.message_record
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
declare
    v_deadline timestamptz := clock_timestamp() + make_interval(secs => read_with_poll.max_poll_seconds);
    v_sql      text := format(
        'with taken as materialized ('
        '  select m.msg_id from pgmq.%1$I as m where m.vt <= $1 %2$s order by m.msg_id limit $2 for update skip locked), '
        'read as ('
        '  update pgmq.%1$I as m set vt = clock_timestamp() + make_interval(secs => $3), read_ct = m.read_ct + 1'
        '  from taken where m.msg_id = taken.msg_id'
        '  returning to_jsonb(m) as message) '
        'select told.* from read, jsonb_populate_record(null::pgmq.message_record, read.message) as told',
        pgmq.format_table_name(read_with_poll.queue_name::text, 'q'::text),
        case when read_with_poll.conditional <> '{}'::jsonb then 'and m.message @> $4' else '' end);
begin
    loop
        if clock_timestamp() >= v_deadline then
            return;
        end if;

        return query execute v_sql
            using clock_timestamp(), read_with_poll.qty, read_with_poll.vt, read_with_poll.conditional;
        if found then
            return;
        end if;

        perform pg_sleep(greatest(read_with_poll.poll_interval_ms, 1) / 1000.0);
    end loop;
end;
$$;
