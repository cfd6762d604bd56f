-- The outbox with the columns of Supabase's realtime.messages, for whoever reads that.
-- Left out where a relation of that name exists that is not a view. Locks: none. Failure: the reader's own.
do $$
begin
    if exists (
        select from pg_catalog.pg_class as c
        where c.oid = to_regclass('realtime.messages') and c.relkind <> 'v'
    ) then
        raise notice 'realtime.messages exists and is not a view: left alone';
        return;
    end if;
    create or replace view realtime.messages as
    select
        e.message_id as id,
        e.topic,
        'broadcast'::text as extension,
        e.payload,
        e.event,
        e.private,
        e.inserted_at at time zone 'UTC' as updated_at,
        e.inserted_at at time zone 'UTC' as inserted_at
    from flowgate.event as e
    where e.seq is not null;
end;
$$;
