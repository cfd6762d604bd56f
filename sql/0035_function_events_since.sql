-- The events whose transactions were not yet visible in the snapshot `since`, and are now, by `id`; at most `max_rows`
-- of those after `after_id`. Read page after page in one REPEATABLE READ transaction, and keep that transaction's
-- pg_current_snapshot() as the next `since`: no event is then missed or met twice, whatever order writers commit in.
-- Called by: whoever follows all events by itself, on the primary: a standby's snapshots don't name the transactions that were
-- in progress, so there it is refused (0A000). Locks: none. Failure: the reader's own.
--
-- Asks for "xid at or past xmax" and "xid was in progress" rather than for everything past xmin: one long transaction
-- anywhere in the cluster holds xmin back, and everything since would be read again at every wake-up.
create or replace function flowgate.events_since(since pg_snapshot, after_id bigint default 0, max_rows integer default 1000)
returns table (
    id bigint, xid xid8, topic text, seq bigint, event text, payload jsonb, private boolean, message_id uuid,
    inserted_at timestamptz
)
language plpgsql
stable
set search_path = ''
rows 100
as $$
#variable_conflict use_column
begin
    if pg_is_in_recovery() then
        raise exception 'events can be followed on the primary only' using errcode = 'feature_not_supported';
    end if;
    return query
    select fresh.id, fresh.xid, fresh.topic, fresh.seq, fresh.event, fresh.payload, fresh.private, fresh.message_id,
           fresh.inserted_at
    from (
        select later.* from flowgate.event as later where later.xid >= pg_snapshot_xmax(events_since.since)
        union all
        select running.*
        from pg_snapshot_xip(events_since.since) as was_running(xid)
        join flowgate.event as running on running.xid = was_running.xid
    ) as fresh
    where fresh.id > events_since.after_id
    order by fresh.id
    limit events_since.max_rows;
end;
$$;

revoke all on function flowgate.events_since(pg_snapshot, bigint, integer) from public;
